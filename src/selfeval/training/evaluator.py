"""Evaluator training: a LoRA adapter with a scalar head, Bradley-Terry loss with the judge's probabilities as soft labels.

The score of a reply is the output of the head at its last token, after the `grade` prompt. Each reply is scored by itself, so
a comparison of two replies does not depend on their order.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from selfeval.algorithms.preference_losses import bradley_terry_loss, centering_penalty
from selfeval.backbone.budget import Phase
from selfeval.backbone.roles import Backbone
from selfeval.backbone.sequences import final_scores, pad_sequences
from selfeval.config import EvaluatorConfig
from selfeval.errors import LoopError, NotFiniteError
from selfeval.training.checkpoint import Checkpoints, role_optimizer
from selfeval.training.gradient_accumulation import add_gradients, clip_gradients
from selfeval.training.schedules import warmup_and_decay

__all__ = ["EVALUATOR", "Preference", "score_replies", "train_evaluator"]

EVALUATOR = "evaluator-0"
"""Role name of the evaluator, or of the first member of an ensemble."""


@dataclass(frozen=True)
class Preference:
    """A pair as token ids; `label` is the probability that `chosen` is the better reply."""

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    label: float


@torch.no_grad()
def score_replies(
    backbone: Backbone,
    role: str,
    prompts: Sequence[Sequence[int]],
    replies: Sequence[Sequence[int]],
    batch_tokens: int,
    advance: Callable[[int], None] | None = None,
) -> list[float]:
    """Score replies with an evaluator role.

    Args:
        backbone: the model that has the role.
        role: name of the evaluator.
        prompts: grade prompt of each reply.
        replies: token ids.
        batch_tokens: maximum tokens of a micro-batch.
        advance: Optional. Called after each micro-batch with its number of replies, for progress.

    Returns:
        One score per reply, in the order of the arguments.
    """

    def of_group(group: list[int]) -> list[float]:
        batch = pad_sequences(backbone, [prompts[i] for i in group], [replies[i] for i in group])
        found: list[float] = final_scores(backbone, role, batch).tolist()
        return found

    scores = [0.0] * len(prompts)
    sizes = [len(p) + len(r) for p, r in zip(prompts, replies, strict=True)]
    with backbone.acting_as(role):
        for group, found in backbone.budget.in_groups(Phase.SCORE, sizes, batch_tokens, of_group):
            for index, value in zip(group, found, strict=True):
                scores[index] = value
            if advance:
                advance(len(group))
    return scores


def _pair_losses(backbone: Backbone, role: str, pairs: Sequence[Preference], config: EvaluatorConfig) -> tuple[Tensor, Tensor]:
    """Return the summed loss of the pairs and their score differences `[N]`."""
    prompts = [p.prompt for p in pairs] * 2
    batch = pad_sequences(backbone, prompts, [p.chosen for p in pairs] + [p.rejected for p in pairs])
    scores = final_scores(backbone, role, batch)
    chosen_N, rejected_N = scores[: len(pairs)], scores[len(pairs) :]
    label_N = torch.tensor([p.label for p in pairs], device=scores.device)
    losses_N = bradley_terry_loss(chosen_N, rejected_N, label_N)
    return (losses_N + config.centering * centering_penalty(chosen_N, rejected_N)).sum(), chosen_N - rejected_N


def _step(
    backbone: Backbone, role: str, pairs: Sequence[Preference], config: EvaluatorConfig, batch_tokens: int
) -> dict[str, float]:
    """Accumulate the gradients of one batch over micro-batches and return its mean loss and accuracy."""
    parameters = list(backbone.parameters(role).values())

    def of_group(group: list[int]) -> tuple[float, int]:
        loss, margins = _pair_losses(backbone, role, [pairs[i] for i in group], config)
        found = loss.item(), int((margins > 0).sum())
        add_gradients(loss / len(pairs), parameters)
        return found

    total, right = 0.0, 0
    sizes = [2 * (len(p.prompt) + max(len(p.chosen), len(p.rejected))) for p in pairs]
    with backbone.acting_as(role):
        for _, (loss, correct) in backbone.budget.in_groups(Phase.UPDATE, sizes, batch_tokens, of_group):
            total += loss
            right += correct
    return {"loss": total / len(pairs), "accuracy": right / len(pairs)}


def _order(role: str) -> str:
    """Return the name that is mixed into the seed of the order of the pairs: `evaluator` for the first member."""
    return role if role != EVALUATOR else "evaluator"


def train_evaluator(
    backbone: Backbone,
    pairs: Sequence[Preference],
    config: EvaluatorConfig,
    checkpoints: Callable[[Mapping[str, Any]], Checkpoints],
    *,
    seed: int,
    batch_tokens: int,
    log: Callable[[dict[str, float]], None],
    resumed: Callable[[int], None],
    role: str = EVALUATOR,
) -> None:
    """Train an evaluator, resuming from its last checkpoint if there is one.

    Args:
        backbone: has the role, with its initial weights.
        pairs: training pairs.
        config: hyperparameters.
        checkpoints: factory of the checkpoint manager, called with the optimizer of each role.
        seed: seed of the order of the pairs; each member of an ensemble has a different order.
        batch_tokens: maximum tokens of a micro-batch.
        log: called after every step with step, loss, accuracy, gradient norm and learning rate.
        resumed: called with the step of the checkpoint that training resumes from (0 for a new training).
        role: Optional. Name of the evaluator. Default: the first one.

    Raises:
        LoopError: the loss or its gradient became NaN or infinite.
    """
    parameters = backbone.parameters(role)
    optimizer = role_optimizer(parameters, config.learning_rate)
    keeper = checkpoints({role: optimizer})
    state = keeper.restore()
    step = int(state["step"]) if state else 0
    if state:
        backbone.load_training_state(state)
    resumed(step)
    per_epoch = math.ceil(len(pairs) / config.batch)
    steps = per_epoch * config.epochs
    while step < steps:
        order = list(range(len(pairs)))
        random.Random(f"{seed}/{_order(role)}/{step // per_epoch}").shuffle(order)
        start = (step % per_epoch) * config.batch
        rate = config.learning_rate * warmup_and_decay(step, steps, config.warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate
        try:
            values = _step(backbone, role, [pairs[i] for i in order[start : start + config.batch]], config, batch_tokens)
            norm = clip_gradients(parameters, config.max_grad_norm)
        except NotFiniteError as error:
            raise LoopError(
                f"evaluator training diverged at step {step + 1}: {error}; lower evaluator.learning_rate"
            ) from error
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        log({"step": step, **values, "grad_norm": norm, "learning_rate": rate})
        if step % config.checkpoint_every == 0 and step < steps:
            keeper.save(step, backbone.training_state())
