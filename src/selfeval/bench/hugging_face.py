"""The side of Hugging Face: the same weights and adapters in transformers and PEFT, in padded batches of similar length.

The batches are sorted by length, which a loop over a data set does not do by itself, so this side is as fast as it gets without
other code.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    StoppingCriteria,
    StoppingCriteriaList,
)

from selfeval.backbone.export import write_adapter
from selfeval.backbone.precision import DTYPES
from selfeval.backbone.roles import Backbone
from selfeval.bench.workloads import Replies
from selfeval.config import RunConfig

__all__ = [
    "bare_copy",
    "last_logits",
    "last_logits_by_generate",
    "load_causal",
    "load_classifier",
    "reply_logprobs",
    "reply_scores",
    "sample_replies",
    "with_adapter",
]


def load_causal(config: RunConfig, backbone: Backbone, *, trust_remote_code: bool = False) -> Any:
    """Load the model as a user of transformers does, in the precision and on the device of the backbone.

    Replies do not end by themselves: the generation config of the model, with its end tokens, is replaced.
    """
    model = _load(AutoModelForCausalLM, config, backbone, trust_remote_code)
    model.generation_config = GenerationConfig(pad_token_id=backbone.loaded.pad_id)
    return model


def load_classifier(config: RunConfig, backbone: Backbone, *, trust_remote_code: bool = False) -> Any:
    """Load the model with a scalar head, which scores the last token that is not padding."""
    model = _load(AutoModelForSequenceClassification, config, backbone, trust_remote_code, num_labels=1)
    model.config.get_text_config().pad_token_id = backbone.loaded.pad_id
    return model


def _load(kind: Any, config: RunConfig, backbone: Backbone, trust_remote_code: bool, **options: Any) -> Any:
    dtype = DTYPES[backbone.loaded.precision]
    model = kind.from_pretrained(config.model, dtype=dtype, trust_remote_code=trust_remote_code, **options)
    return model.to(backbone.loaded.device).eval().requires_grad_(False)


def with_adapter(model: Any, backbone: Backbone, role: str) -> Any:
    """Return the model with the adapter of a role as PEFT's, and its head if it has one."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)  # PEFT reads it
        write_adapter(backbone, role, Path(folder), backbone.source)
        return PeftModel.from_pretrained(model, folder).eval().requires_grad_(False)


def bare_copy(model: Any) -> Any:
    """Return the model without the adapters that it gets later; both share the weights."""
    memo = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo)


# -- sampling -----------------------------------------------------------------------------------------------------------


class _ReplyLimits(StoppingCriteria):
    """Ends each row at its own number of new tokens. As with end tokens, a row is computed until all have ended."""

    def __init__(self, limits_B: Tensor, prompt: int) -> None:
        self.limits_B, self.prompt = limits_B, prompt

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return input_ids.shape[1] - self.prompt >= self.limits_B


@torch.no_grad()
def sample_replies(model: Any, backbone: Backbone, replies: Replies, rows: int, *, greedy: bool = False) -> list[list[int]]:
    """Sample the replies with `generate`.

    Args:
        model: model of transformers or PEFT.
        backbone: for padding and device.
        replies: prompts, and the length of each reply.
        rows: batch size: prompts of similar length, times the replies per prompt.
        greedy: take the likeliest tokens; all replies to a prompt then begin alike. Default: sample at temperature 1.
    """
    prompts, samples = replies.distinct, replies.samples
    found: dict[int, list[int]] = {}
    for group in _sorted_batches([len(prompt.ids) for prompt in prompts], max(1, rows // samples)):
        ids, attention = _padded(backbone, [prompts[i].ids for i in group], left=True)
        numbers = [i * samples + k for i in group for k in range(samples)]
        limits = [replies.lengths[n] for n in numbers]
        if greedy:  # `generate` refuses several greedy replies to one row
            ids, attention = ids.repeat_interleave(samples, 0), attention.repeat_interleave(samples, 0)
        criteria = _ReplyLimits(torch.tensor(limits, device=ids.device), ids.shape[1])
        output = model.generate(
            input_ids=ids,
            attention_mask=attention,
            **({"do_sample": False} if greedy else {"do_sample": True, "top_k": 0, "num_return_sequences": samples}),
            max_new_tokens=max(limits),
            stopping_criteria=StoppingCriteriaList([criteria]),
        )
        written = output[:, ids.shape[1] :].tolist()
        found.update({n: row[:limit] for n, row, limit in zip(numbers, written, limits, strict=True)})
    return [found[n] for n in range(len(replies.lengths))]


# -- reading ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def last_logits(model: Any, backbone: Backbone, rows: Sequence[Sequence[int]], batch: int) -> Tensor:
    """Return the logits `[B, V]` after the last token of each row, by one pass per batch."""

    def of_batch(ids: Tensor, attention: Tensor) -> Tensor:
        arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": attention, "use_cache": False}
        if backbone.loaded.forward_accepts("position_ids"):
            arguments["position_ids"] = (attention.cumsum(-1) - 1).clamp_min(0)
        if backbone.loaded.forward_accepts("logits_to_keep"):
            arguments["logits_to_keep"] = 1
        logits: Tensor = model(**arguments).logits
        return logits[:, -1]

    return _last(backbone, rows, batch, of_batch)


@torch.no_grad()
def last_logits_by_generate(model: Any, backbone: Backbone, rows: Sequence[Sequence[int]], batch: int) -> Tensor:
    """Return the logits `[B, V]` after the last token of each row, by generating one token."""

    def of_batch(ids: Tensor, attention: Tensor) -> Tensor:
        output = model.generate(
            input_ids=ids,
            attention_mask=attention,
            do_sample=False,
            max_new_tokens=1,
            return_dict_in_generate=True,
            output_logits=True,
        )
        logits: Tensor = output.logits[0]
        return logits

    return _last(backbone, rows, batch, of_batch)


def _last(backbone: Backbone, rows: Sequence[Sequence[int]], batch: int, of_batch: Any) -> Tensor:
    order: list[int] = []
    found = []
    for group in _sorted_batches([len(row) for row in rows], batch):
        found.append(of_batch(*_padded(backbone, [rows[i] for i in group], left=True)).float())
        order += group
    return torch.cat(found)[torch.tensor(order).argsort().to(found[0].device)]


@torch.no_grad()
def reply_logprobs(
    model: Any, backbone: Backbone, prompts: Sequence[Sequence[int]], replies: Sequence[Sequence[int]], batch: int
) -> list[list[float]]:
    """Return the log-probs of given replies: all logits, log-softmax, gather."""
    rows = [[*prompt, *reply] for prompt, reply in zip(prompts, replies, strict=True)]
    found: dict[int, list[float]] = {}
    for group in _sorted_batches([len(row) for row in rows], batch):
        ids, attention = _padded(backbone, [rows[i] for i in group], left=False)
        logits = model(input_ids=ids, attention_mask=attention, use_cache=False).logits
        logprobs = torch.log_softmax(logits[:, :-1].float(), -1).gather(-1, ids[:, 1:, None])[..., 0].tolist()
        for i, row in zip(group, logprobs, strict=True):
            start = len(prompts[i]) - 1
            found[i] = row[start : start + len(replies[i])]
    return [found[i] for i in range(len(rows))]


@torch.no_grad()
def reply_scores(model: Any, backbone: Backbone, rows: Sequence[Sequence[int]], batch: int) -> list[float]:
    """Return the score of each row by a classifier with one label."""
    found: dict[int, float] = {}
    for group in _sorted_batches([len(row) for row in rows], batch):
        ids, attention = _padded(backbone, [rows[i] for i in group], left=False)
        scores = model(input_ids=ids, attention_mask=attention, use_cache=False).logits[:, 0].float().tolist()
        found.update(zip(group, scores, strict=True))
    return [found[i] for i in range(len(rows))]


def _sorted_batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _padded(backbone: Backbone, rows: Sequence[Sequence[int]], *, left: bool) -> tuple[Tensor, Tensor]:
    """Return ids and attention mask."""
    width, pad, device = max(map(len, rows)), backbone.loaded.pad_id, backbone.loaded.device
    filled = [([pad] * (width - len(row)), [0] * (width - len(row))) for row in rows]
    pairs = [(list(row), [1] * len(row)) for row in rows]
    ids = [(p + r) if left else (r + p) for (p, _), (r, _) in zip(filled, pairs, strict=True)]
    attention = [(p + r) if left else (r + p) for (_, p), (_, r) in zip(filled, pairs, strict=True)]
    return torch.tensor(ids, device=device), torch.tensor(attention, device=device)
