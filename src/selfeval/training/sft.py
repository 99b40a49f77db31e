"""Supervised fine-tuning of a role: next-token loss over rows of documents, on all tokens or on completions only.

    loss = - sum_t m_t log p(x_t | x_<t) / sum_t m_t

over all tokens of a batch; m is 1 where the loss counts. Two kinds of rows:

- Plain text is concatenated and cut into rows, as in pretraining; a row is one document, and texts in a row see each other.
  After RoPE scaling, a few steps on long rows recover the quality that the changed rotation angles cost (Chen et al. 2023,
  https://arxiv.org/abs/2306.15595; Peng et al. 2023, https://arxiv.org/abs/2309.00071).
- Conversations are packed whole (`selfeval.training.documents`), and documents in a row do not see each other. Families that
  cannot separate them read each document in a separate sequence: same loss, same steps, more padding.

Shapes: B sequences, T tokens of a sequence, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from selfeval.backbone.budget import Phase
from selfeval.backbone.logprobs import HasOutputHead, token_logprobs
from selfeval.backbone.output_head import OutputHead
from selfeval.backbone.packing import pad_rows, reads_packed_rows, rows_hidden
from selfeval.backbone.roles import Backbone
from selfeval.backbone.sequences import reply_logprobs
from selfeval.config import TuningConfig
from selfeval.errors import LoopError
from selfeval.prompt import Prompt
from selfeval.training.checkpoint import Checkpoints
from selfeval.training.documents import Document, Row, whole_text
from selfeval.training.gradient_accumulation import add_gradients
from selfeval.training.held_out_loss import HeldOutLoss
from selfeval.training.neftune import Noise, embedding_noise, neftune_noise
from selfeval.training.schedules import draw
from selfeval.training.supervised import train_supervised

__all__ = ["document_losses", "documents_loss", "pack", "text_logprobs", "tune_on_documents", "tune_on_text"]

Numbered = Sequence[tuple[int, Document]]
"""Documents of a sequence, each with its number in the batch."""


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
    _check_documents(backbone, [(whole_text(row),) for row in rows])
    return reply_logprobs(
        backbone, [Prompt(tuple(row[:1])) for row in rows], [row[1:] for row in rows], batch_tokens=batch_tokens
    )


@torch.no_grad()
def documents_loss(
    backbone: Backbone, role: str, rows: Sequence[Row], batch_tokens: int, *, packs: bool | None = None
) -> float:
    """Return the mean loss in nats over the tokens whose loss counts, without gradients.

    Args:
        backbone: the model that has the role.
        role: name of the role.
        rows: rows of documents.
        batch_tokens: maximum tokens of a micro-batch.
        packs: Optional. The result of `reads_packed_rows`, if it is known. Default: it is measured.
    """
    sequences = _sequences(rows, reads_packed_rows(backbone) if packs is None else packs)
    tokens = _trained_tokens(rows)
    return _in_groups(
        backbone, role, Phase.SCORE, sequences, batch_tokens, lambda group: float(_summed_loss(backbone, group)) / tokens
    )


@torch.no_grad()
def document_losses(
    backbone: Backbone, role: str, documents: Sequence[Document], batch_tokens: int, *, vocabulary: int | None = None
) -> list[float]:
    """Return the loss in nats of each document: the sum over its tokens whose loss counts.

    Args:
        backbone: the model that has the role.
        role: name of the role.
        documents: the documents.
        batch_tokens: maximum tokens of a micro-batch.
        vocabulary: Optional. Number of tokens, from the first on, that the output layer is cut to. Default: all.
    """

    def of_group(group: list[int]) -> list[float]:
        head = _CutHead(backbone.output_head if vocabulary is None else replace(backbone.output_head, vocabulary=vocabulary))
        logprobs_BT = _logprobs(backbone, [[(i, documents[i])] for i in group], head)
        return [-value for value in logprobs_BT.sum(dim=1, dtype=torch.float64).tolist()]

    with backbone.acting_as(role):
        groups = list(backbone.budget.in_groups(Phase.SCORE, list(map(len, documents)), batch_tokens, of_group))
    found = {i: value for group, values in groups for i, value in zip(group, values, strict=True)}
    return [found[i] for i in range(len(documents))]


@dataclass(frozen=True)
class _CutHead:
    """An output layer as `token_logprobs` takes it."""

    output_head: OutputHead


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
    """Train a role's adapter on rows of text, on the loss of every token. See `tune_on_documents`.

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
    tune_on_documents(
        backbone,
        role,
        [(whole_text(row),) for row in rows],
        config,
        checkpoints,
        seed=seed,
        batch_tokens=batch_tokens,
        log=log,
        resumed=resumed,
    )


def tune_on_documents(
    backbone: Backbone,
    role: str,
    rows: Sequence[Row],
    config: TuningConfig,
    checkpoints: Callable[[Mapping[str, Any]], Checkpoints],
    *,
    seed: int,
    batch_tokens: int,
    log: Callable[[dict[str, float]], None],
    resumed: Callable[[int], None] = lambda step: None,
    held_out: Sequence[Row] = (),
) -> HeldOutLoss | None:
    """Train a role's adapter on rows of documents, resuming from its last checkpoint if there is one.

    The loss of a step is the mean over all tokens of its rows whose loss counts, whatever the size of the micro-batches. Rows
    are reshuffled in every epoch. If documents are held out, training ends with the weights of the step with the lowest
    held-out loss.

    Args:
        backbone: has the role, with its initial weights.
        role: name of the role.
        rows: rows of documents; each document fits the model's context.
        config: hyperparameters.
        checkpoints: factory of the checkpoint manager, called with the optimizer of each role.
        seed: seed of the order of the rows and of the NEFTune noise.
        batch_tokens: maximum tokens of a micro-batch.
        log: called after every step with step, loss (nats per token), tokens whose loss counts, gradient norm, learning rate
            and, when it was measured, the held-out loss.
        resumed: Optional. Called with the step of the checkpoint that training resumes from (0 for a new training).
        held_out: Optional. Rows whose loss is measured before training, every `checkpoint_every` steps, and after the last one.

    Returns:
        The measurements of the held-out loss; None without held-out rows.

    Raises:
        LoopError: there are no rows, a document has no token whose loss counts or exceeds the model's context, or the loss or
            its gradient is not finite.
    """
    _check_documents(backbone, [*rows, *held_out])
    packs = any(len(row) > 1 for row in (*rows, *held_out)) and reads_packed_rows(backbone)

    def gradients(step: int) -> dict[str, float]:
        batch = [rows[i] for i in draw(len(rows), step, config.batch, f"{seed}/{role}")]
        noise = neftune_noise(config.neftune_alpha, f"{seed}/{role}/{step}") if config.neftune_alpha else None
        return {"loss": _step(backbone, role, batch, batch_tokens, packs, noise), "tokens": _trained_tokens(batch)}

    def held_out_loss() -> float:
        return documents_loss(backbone, role, held_out, batch_tokens, packs=packs)

    measured = HeldOutLoss(held_out_loss, config.checkpoint_every) if held_out else None
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
        held_out=measured,
    )
    return measured


def _check_documents(backbone: Backbone, rows: Sequence[Row]) -> None:
    context = backbone.loaded.context_length
    documents = [document for row in rows for document in row]
    if not documents or not all(document.trained_tokens for document in documents):
        shortest = min(map(len, documents), default=0)
        raise LoopError(
            f"{len(documents)} rows of text, the shortest with {shortest} tokens; every row needs at least 2, and a token "
            "whose loss counts"
        )
    longest = max(map(len, documents))
    if context is not None and longest > context:
        raise LoopError(
            f"a row of text has {longest} tokens, more than this model's context of {context}; pack shorter rows, or "
            "load the model with backbone.context.rope_scaling and a backbone.context.rope_factor"
        )


def _trained_tokens(rows: Sequence[Row]) -> int:
    return sum(document.trained_tokens for row in rows for document in row)


# -- micro-batches --------------------------------------------------------------------------------------------------------


def _sequences(rows: Sequence[Row], packs: bool) -> list[Numbered]:
    """Return the sequences that a pass reads: the rows, or each document by itself if the model cannot separate them."""
    numbers = iter(range(sum(map(len, rows))))
    numbered = [[(next(numbers), document) for document in row] for row in rows]
    return list(numbered) if packs else [[each] for row in numbered for each in row]


def _in_groups(
    backbone: Backbone,
    role: str,
    phase: Phase,
    sequences: Sequence[Numbered],
    batch_tokens: int,
    work: Callable[[list[Numbered]], float],
) -> float:
    """Return the sum of what `work` returns for micro-batches of sequences."""
    sizes = [sum(len(document) for _, document in sequence) for sequence in sequences]
    with backbone.acting_as(role):
        groups = backbone.budget.in_groups(phase, sizes, batch_tokens, lambda group: work([sequences[i] for i in group]))
        return sum(value for _, value in groups)


def _summed_loss(backbone: Backbone, sequences: Sequence[Numbered]) -> Tensor:
    """Return the sum of the loss under the acting role over the tokens whose loss counts."""
    return -_logprobs(backbone, sequences, backbone).sum()


def _logprobs(backbone: Backbone, sequences: Sequence[Numbered], head: HasOutputHead) -> Tensor:
    """Return the log-probs `[B, T - 1]` of the tokens whose loss counts under the acting role, 0 for others."""
    documents = [[document for _, document in sequence] for sequence in sequences]
    rows = pad_rows([[d.ids for d in row] for row in documents], backbone.loaded.pad_id, backbone.loaded.device)
    width = rows.ids_BT.shape[1]
    masks = [[counts for document in row for counts in document.trained] for row in documents]
    mask_BT = torch.tensor([[*mask, *[False] * (width - len(mask))] for mask in masks], device=rows.ids_BT.device)
    hidden_BTD = rows_hidden(backbone, rows)
    # The state at a token predicts the next one. The first token of a document never counts, so none predicts another document.
    return token_logprobs(head, hidden_BTD[:, :-1], rows.ids_BT[:, 1:], mask_BT[:, 1:]).logprobs


def _step(
    backbone: Backbone, role: str, rows: Sequence[Row], batch_tokens: int, packs: bool = False, noise: Noise | None = None
) -> float:
    """Accumulate the gradients of one batch over micro-batches and return its mean loss."""
    tokens, parameters = _trained_tokens(rows), list(backbone.roles.parameters(role).values())

    def of_group(group: list[Numbered]) -> float:
        lengths = [[(number, len(document)) for number, document in sequence] for sequence in group]
        with embedding_noise(backbone, lengths, noise):
            loss = _summed_loss(backbone, group)
            value = loss.item()
            # Last, because a group that runs out of memory is repeated.
            add_gradients(loss / tokens, parameters)
        return value

    sequences = _sequences(rows, packs)
    return _in_groups(backbone, role, Phase.UPDATE, sequences, batch_tokens, of_group) / tokens
