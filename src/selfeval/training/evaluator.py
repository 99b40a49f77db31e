"""Evaluator training: a LoRA adapter with a scalar head, Bradley-Terry loss with the judge's probabilities as soft labels.

The score of a reply is the output of the head at its last token, after the `grade` prompt, or at the mean over its tokens
(`evaluator.inputs`). Each reply is scored by itself, so a comparison of two replies does not depend on their order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from selfeval.algorithms.preference_losses import bradley_terry_loss, centering_penalty, hard_labels
from selfeval.backbone.budget import Phase
from selfeval.backbone.roles import Backbone
from selfeval.backbone.sequences import Sequences, final_scores, pad_sequences, prompt_numbers
from selfeval.config import EvaluatorConfig
from selfeval.prompt import Prompt
from selfeval.training.checkpoint import Checkpoints
from selfeval.training.gradient_accumulation import add_gradients
from selfeval.training.held_out_loss import HeldOutLoss
from selfeval.training.pair_order import epoch_length, epoch_order
from selfeval.training.supervised import train_supervised

__all__ = ["EVALUATOR", "Preference", "pair_loss", "score_replies", "steps_of", "train_evaluator"]

EVALUATOR = "evaluator-0"
"""Role name of the evaluator, or of the first member of an ensemble."""


@dataclass(frozen=True)
class Preference:
    """A pair of replies as token ids, with their prompt; `label` is the probability that `chosen` is the better reply."""

    prompt: Prompt
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    label: float


@torch.no_grad()
def score_replies(
    backbone: Backbone,
    role: str,
    prompts: Sequence[Prompt],
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
    sizes = [len(p.ids) + len(r) for p, r in zip(prompts, replies, strict=True)]
    with backbone.acting_as(role):
        grouped = prompt_numbers(backbone, prompts, sizes)
        for group, found in backbone.budget.in_groups(Phase.SCORE, sizes, batch_tokens, of_group, grouped):
            for index, value in zip(group, found, strict=True):
                scores[index] = value
            if advance:
                advance(len(group))
    return scores


def pair_loss(
    backbone: Backbone, role: str, batch: Sequences, label_N: Tensor, config: EvaluatorConfig
) -> tuple[Tensor, Tensor]:
    """Compute the summed loss of a micro-batch of pairs (all chosen replies, then all rejected), and the margins `[N]`."""
    chosen_N, rejected_N = final_scores(backbone, role, batch).split(len(label_N))
    return _losses(chosen_N, rejected_N, label_N, config).sum(), chosen_N - rejected_N


def _losses(chosen_N: Tensor, rejected_N: Tensor, label_N: Tensor, config: EvaluatorConfig) -> Tensor:
    # The label is a probability, so the loss is the cross-entropy between judge and evaluator; 0.5 asks for equal scores.
    if config.labels == "hard":
        label_N = hard_labels(label_N)
    losses_N = bradley_terry_loss(chosen_N, rejected_N, label_N, margin=config.margin * (2 * label_N - 1))
    return losses_N + config.centering * centering_penalty(chosen_N, rejected_N)


def _step(
    backbone: Backbone, role: str, pairs: Sequence[Preference], config: EvaluatorConfig, batch_tokens: int
) -> dict[str, float]:
    """Accumulate the gradients of one batch over micro-batches and return its mean loss and accuracy."""
    parameters = list(backbone.roles.parameters(role).values())

    def of_group(group: list[int]) -> tuple[float, int]:
        some = [pairs[i] for i in group]
        batch = pad_sequences(backbone, [p.prompt for p in some] * 2, [p.chosen for p in some] + [p.rejected for p in some])
        label_N = torch.tensor([p.label for p in some], device=batch.ids_BT.device)
        loss, margins = pair_loss(backbone, role, batch, label_N, config)
        found = loss.item(), int((margins > 0).sum())
        # Last, because a group that runs out of memory is repeated. Divided by the whole batch, not by this micro-batch.
        add_gradients(loss / len(pairs), parameters)
        return found

    total, right = 0.0, 0
    # A pair is two rows, padded to the longer of them.
    sizes = [2 * (len(p.prompt.ids) + max(len(p.chosen), len(p.rejected))) for p in pairs]
    with backbone.acting_as(role):
        for _, (loss, correct) in backbone.budget.in_groups(Phase.UPDATE, sizes, batch_tokens, of_group):
            total += loss
            right += correct
    return {"loss": total / len(pairs), "accuracy": right / len(pairs)}


def _excess(pairs: Sequence[Preference]) -> list[int]:
    return [len(p.chosen) - len(p.rejected) for p in pairs]


def steps_of(pairs: Sequence[Preference], config: EvaluatorConfig) -> int:
    """Return the number of steps of a training."""
    return config.epochs * math.ceil(epoch_length(_excess(pairs), balanced=config.length_balanced) / config.batch)


@torch.no_grad()
def _mean_loss(backbone: Backbone, role: str, pairs: Sequence[Preference], config: EvaluatorConfig, batch_tokens: int) -> float:
    """Return the mean loss of the current weights on pairs, with the penalty and the margin of training."""
    replies = [p.chosen for p in pairs] + [p.rejected for p in pairs]
    scores = score_replies(backbone, role, [p.prompt for p in pairs] * 2, replies, batch_tokens)
    chosen, rejected = torch.tensor(scores).chunk(2)
    return _losses(chosen, rejected, torch.tensor([p.label for p in pairs]), config).mean().item()


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
    held_out: Sequence[Preference] = (),
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
        held_out: pairs of other questions. With `config.early_stopping`, the weights with the lowest loss on them are kept.

    Raises:
        LoopError: the loss or its gradient became NaN or infinite.
    """
    excess, steps = _excess(pairs), steps_of(pairs, config)
    per_epoch = steps // config.epochs

    def gradients(step: int) -> dict[str, float]:
        # The order is computed from the step alone, so a resumed training draws the same batches.
        order = epoch_order(excess, seed=f"{seed}/{_order(role)}/{step // per_epoch}", balanced=config.length_balanced)
        start = (step % per_epoch) * config.batch
        return _step(backbone, role, [pairs[i] for i in order[start : start + config.batch]], config, batch_tokens)

    def held_out_loss() -> float:
        return _mean_loss(backbone, role, held_out, config, batch_tokens)

    train_supervised(
        backbone,
        role,
        gradients,
        config,
        checkpoints,
        steps=steps,
        log=log,
        resumed=resumed,
        save_last=False,
        work="evaluator training",
        setting="evaluator.learning_rate",
        held_out=HeldOutLoss(held_out_loss, config.checkpoint_every) if config.early_stopping and held_out else None,
    )
