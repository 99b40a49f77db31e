"""Step evaluator: the model of the evaluator, read at the last token of each step, and trained on soft labels of the steps.

The score of a step is a logit. A causal model reads nothing after that token, so the scores of all steps of a reply come from
one pass.

Shapes: S steps of all replies of a batch, reply by reply.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from selfeval.algorithms.step_scores import step_loss
from selfeval.backbone.budget import Phase
from selfeval.backbone.roles import Backbone
from selfeval.backbone.sequences import Sequences, pad_sequences, prompt_numbers, states_at
from selfeval.config import StepsConfig
from selfeval.prompt import Prompt
from selfeval.training.checkpoint import Checkpoints
from selfeval.training.gradient_accumulation import add_gradients
from selfeval.training.schedules import draw
from selfeval.training.supervised import train_supervised

__all__ = ["STEP_EVALUATOR", "LabelledReply", "score_steps", "train_step_evaluator", "training_steps"]

STEP_EVALUATOR = "steps"
"""Role name of the step evaluator."""


@dataclass(frozen=True)
class LabelledReply:
    """A reply as token ids, with its `grade` prompt and the labels of its steps.

    Attributes:
        prompt: prompt before the reply.
        ids: token ids of the reply.
        ends: number of tokens up to the end of each step, at least one.
        labels: label of each step, in [0, 1].
    """

    prompt: Prompt
    ids: tuple[int, ...]
    ends: tuple[int, ...]
    labels: tuple[float, ...]


def _step_logits(backbone: Backbone, role: str, batch: Sequences, ends: Sequence[Sequence[int]]) -> Tensor:
    """Return the scalar head of `role` (which must be acting) at the last token of each step, `[S]`."""
    device = batch.ids_BT.device
    row_S = torch.tensor([row for row, of_reply in enumerate(ends) for _ in of_reply], device=device)
    end_S = torch.tensor([end for of_reply in ends for end in of_reply], device=device)
    return backbone.score(role, states_at(backbone, batch, row_S, end_S - 1))


@torch.no_grad()
def score_steps(
    backbone: Backbone,
    role: str,
    prompts: Sequence[Prompt],
    replies: Sequence[Sequence[int]],
    ends: Sequence[Sequence[int]],
    batch_tokens: int,
) -> list[list[float]]:
    """Score the steps of replies with a step evaluator.

    Args:
        backbone: the model that has the role.
        role: name of the step evaluator.
        prompts: grade prompt of each reply.
        replies: token ids.
        ends: number of tokens up to the end of each step of each reply.
        batch_tokens: maximum tokens of a micro-batch.

    Returns:
        One logit per step, for each reply in the order of the arguments.
    """

    def of_group(group: list[int]) -> list[list[float]]:
        batch = pad_sequences(backbone, [prompts[i] for i in group], [replies[i] for i in group])
        some = [ends[i] for i in group]
        scores: list[list[float]] = [
            part.tolist() for part in _step_logits(backbone, role, batch, some).split([len(of_reply) for of_reply in some])
        ]
        return scores

    found: dict[int, list[float]] = {}
    sizes = [len(p.ids) + len(r) for p, r in zip(prompts, replies, strict=True)]
    with backbone.acting_as(role):
        grouped = prompt_numbers(backbone, prompts, sizes)
        for group, scores in backbone.budget.in_groups(Phase.SCORE, sizes, batch_tokens, of_group, grouped):
            found.update(zip(group, scores, strict=True))
    return [found[i] for i in range(len(prompts))]


def _gradients(backbone: Backbone, role: str, replies: Sequence[LabelledReply], batch_tokens: int) -> dict[str, float]:
    """Accumulate the gradients of one batch over micro-batches; return its mean loss and accuracy over steps."""
    parameters = list(backbone.roles.parameters(role).values())
    steps = sum(len(reply.ends) for reply in replies)

    def of_group(group: list[int]) -> tuple[float, int]:
        some = [replies[i] for i in group]
        batch = pad_sequences(backbone, [reply.prompt for reply in some], [reply.ids for reply in some])
        logits_S = _step_logits(backbone, role, batch, [reply.ends for reply in some])
        labels_S = torch.tensor([label for reply in some for label in reply.labels], device=logits_S.device)
        loss = step_loss(logits_S, labels_S).sum()
        found = loss.item(), int(((logits_S > 0) == (labels_S >= 0.5)).sum())
        # Last, because a group that runs out of memory is repeated. Every step of the batch has the same weight.
        add_gradients(loss / steps, parameters)
        return found

    total, right = 0.0, 0
    sizes = [len(reply.prompt.ids) + len(reply.ids) for reply in replies]
    with backbone.acting_as(role):
        grouped = prompt_numbers(backbone, [reply.prompt for reply in replies], sizes)
        for _, (loss, agreeing) in backbone.budget.in_groups(Phase.UPDATE, sizes, batch_tokens, of_group, grouped):
            total += loss
            right += agreeing
    return {"loss": total / steps, "accuracy": right / steps}


def training_steps(replies: int, config: StepsConfig) -> int:
    """Return the number of gradient steps of a training on a number of replies."""
    return math.ceil(config.epochs * replies / config.batch)


def train_step_evaluator(
    backbone: Backbone,
    replies: Sequence[LabelledReply],
    config: StepsConfig,
    checkpoints: Callable[[Mapping[str, Any]], Checkpoints],
    *,
    seed: int,
    batch_tokens: int,
    log: Callable[[dict[str, float]], None],
    resumed: Callable[[int], None],
    role: str = STEP_EVALUATOR,
) -> None:
    """Train a step evaluator, resuming from its last checkpoint if there is one.

    Args:
        backbone: has the role, with its initial weights.
        replies: labelled replies.
        config: hyperparameters.
        checkpoints: factory of the checkpoint manager, called with the optimizer of the role.
        seed: seed of the order of the replies.
        batch_tokens: maximum tokens of a micro-batch.
        log: called after every step with step, loss, accuracy, gradient norm and learning rate.
        resumed: called with the step of the checkpoint that training resumes from (0 for a new training).
        role: Optional. Name of the role. Default: `steps`.

    Raises:
        LoopError: the loss or its gradient became NaN or infinite.
    """

    def gradients(step: int) -> dict[str, float]:
        rows = draw(len(replies), step, config.batch, f"{seed}/steps")
        return _gradients(backbone, role, [replies[i] for i in rows], batch_tokens)

    train_supervised(
        backbone,
        role,
        gradients,
        config,
        checkpoints,
        steps=training_steps(len(replies), config),
        log=log,
        resumed=resumed,
        save_last=False,
        work="training of the step evaluator",
        setting="steps.learning_rate",
    )
