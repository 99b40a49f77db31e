"""Supervised fine-tuning of a role on plain text: next-token loss over rows of packed documents.

After RoPE scaling, a few steps on long rows recover the quality that the changed rotation angles cost (Chen et al. 2023,
https://arxiv.org/abs/2306.15595; Peng et al. 2023, https://arxiv.org/abs/2309.00071). Rows are packed without attention masks
between documents, as is usual in pretraining. A loss on part of a row (completions only) is not implemented.

Shapes: B rows, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from selfeval.backbone.budget import Phase
from selfeval.backbone.logprobs import token_logprobs
from selfeval.backbone.roles import Backbone
from selfeval.backbone.sequences import pad_sequences, reply_hidden, reply_logprobs
from selfeval.config import TuningConfig
from selfeval.errors import LoopError
from selfeval.prompt import Prompt
from selfeval.training.checkpoint import Checkpoints
from selfeval.training.gradient_accumulation import add_gradients
from selfeval.training.schedules import draw
from selfeval.training.supervised import train_supervised

__all__ = ["pack", "text_logprobs", "tune_on_text"]


def pack(documents: Sequence[Sequence[int]], length: int) -> list[tuple[int, ...]]:
    """Concatenate documents and cut them into rows of `length` tokens; an incomplete last row is dropped.

    Example:
        >>> pack([[1, 5, 6], [1, 7], [1, 8, 9]], 3)
        [(1, 5, 6), (1, 7, 1)]
    """
    stream = [token for document in documents for token in document]
    return [tuple(stream[i : i + length]) for i in range(0, len(stream) - length + 1, length)]


def text_logprobs(backbone: Backbone, rows: Sequence[Sequence[int]], batch_tokens: int) -> list[tuple[float, ...]]:
    """Return the log-probs in nats, under the acting role, of all tokens but the first of each row.

    Raises:
        LoopError: a row has fewer than two tokens, or is longer than the model's context.
    """
    _check_rows(backbone, rows)
    return reply_logprobs(
        backbone, [Prompt(tuple(row[:1])) for row in rows], [row[1:] for row in rows], batch_tokens=batch_tokens
    )


def tune_on_text(
    backbone: Backbone,
    role: str,
    rows: Sequence[Sequence[int]],
    config: TuningConfig,
    checkpoints: Callable[[Mapping[str, Any]], Checkpoints],
    *,
    seed: int,
    batch_tokens: int,
    log: Callable[[dict[str, float]], None],
    resumed: Callable[[int], None] = lambda step: None,
) -> None:
    """Train a role's adapter on rows of text, resuming from its last checkpoint if there is one.

    The loss of a step is the mean over all predicted tokens of its rows, whatever the size of the micro-batches. Rows are
    reshuffled in every epoch.

    Args:
        backbone: has the role, with its initial weights.
        role: name of the role.
        rows: token ids, of any lengths within the model's context.
        config: hyperparameters.
        checkpoints: factory of the checkpoint manager, called with the optimizer of each role.
        seed: seed of the order of the rows.
        batch_tokens: maximum tokens of a micro-batch.
        log: called after every step with step, loss (nats per token), tokens, gradient norm and learning rate.
        resumed: Optional. Called with the step of the checkpoint that training resumes from (0 for a new training).

    Raises:
        LoopError: there are no rows, a row has fewer than two tokens or exceeds the model's context, or the loss or its
            gradient is not finite.
    """
    _check_rows(backbone, rows)

    def gradients(step: int) -> dict[str, float]:
        batch = [rows[i] for i in draw(len(rows), step, config.batch, f"{seed}/{role}")]
        return {"loss": _step(backbone, role, batch, batch_tokens), "tokens": sum(len(row) - 1 for row in batch)}

    train_supervised(
        backbone,
        role,
        gradients,
        config,
        checkpoints,
        steps=config.steps,
        log=log,
        resumed=resumed,
        save_last=True,
        work=f"tuning of {role}",
        setting="its learning_rate",
    )


def _check_rows(backbone: Backbone, rows: Sequence[Sequence[int]]) -> None:
    context = backbone.loaded.context_length
    lengths = [len(row) for row in rows]
    if not lengths or min(lengths) < 2:
        raise LoopError(
            f"{len(lengths)} rows of text, the shortest with {min(lengths, default=0)} tokens; every row needs at least 2"
        )
    if context is not None and max(lengths) > context:
        raise LoopError(
            f"a row of text has {max(lengths)} tokens, more than this model's context of {context}; pack shorter rows, or "
            "load the model with backbone.context.rope_scaling and a backbone.context.rope_factor"
        )


def _step(backbone: Backbone, role: str, rows: Sequence[Sequence[int]], batch_tokens: int) -> float:
    """Accumulate the gradients of one batch over micro-batches and return its mean loss."""
    tokens, parameters = sum(len(row) - 1 for row in rows), list(backbone.roles.parameters(role).values())

    def of_group(group: list[int]) -> float:
        chosen = [rows[i] for i in group]
        # Nothing predicts the first token, so it serves as the prompt and the rest of the row as the reply.
        batch = pad_sequences(backbone, [Prompt(tuple(row[:1])) for row in chosen], [row[1:] for row in chosen])
        found = token_logprobs(backbone, reply_hidden(backbone, batch), batch.reply_BR, batch.mask_BR)
        loss = -found.logprobs.sum()
        value = loss.item()
        # Last, because a group that runs out of memory is repeated.
        add_gradients(loss / tokens, parameters)
        return value

    with backbone.acting_as(role):
        sizes = [len(row) for row in rows]
        groups = backbone.budget.in_groups(Phase.UPDATE, sizes, batch_tokens, of_group)
        return sum(value for _, value in groups) / tokens
