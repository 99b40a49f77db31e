"""Sample token ids from the acting role, and record the log-prob of every sampled token.

Rows with the same prompt share its prefill, and finished rows leave the batch. The engine works on token ids throughout: a
sampled end-of-sequence token is part of the reply. Continuous batching (new rows joining a running batch) is not implemented.

With a guide, value functions modify the distribution of the acting role. Their roles read the same tokens in the same forward
pass, as additional rows with separate keys and values (or in one pass per role if the family cannot mix roles in a batch).

Shapes: B active rows, T tokens so far, V vocabulary, W watched tokens, N roles per pass (the acting role first).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from selfeval.backbone.budget import Phase
from selfeval.backbone.families.cache import check_state, preallocated_cache, select_rows, state_arguments
from selfeval.backbone.roles import Backbone
from selfeval.backbone.sequences import refuse_images
from selfeval.errors import LoopError, NotFiniteError, RoleError
from selfeval.prompt import Image, Prompt
from selfeval.rollout.draws import pick, row_draws
from selfeval.rollout.guide import Guide
from selfeval.rollout.thinking import ReplyProgress, ThinkingTokens

__all__ = ["Batch", "Request", "Rollout", "Tally", "check_prompts", "count_tokens", "generate", "visible_ids"]


@dataclass(frozen=True)
class Request:
    """A request for one reply: prompt and sampling parameters (temperature 0 is greedy).

    Attributes:
        stream: Optional. Number of its random stream, from 0 to 2**64 - 1. Default: its index among the requests.
        limit: Optional. Maximum number of new tokens of this reply, if lower than that of `generate`. Default: the same.
    """

    prompt: Prompt
    temperature: float = 1.0
    top_p: float = 1.0
    stream: int | None = None
    limit: int | None = None


@dataclass(frozen=True)
class Rollout:
    """One sampled reply.

    Attributes:
        ids: sampled tokens, including the end-of-sequence token.
        logprobs: log-prob of each token in nats at the sampling temperature (1 if greedy), before top-p filtering; under
            the guided distribution if a guide was used.
        finished: whether an end-of-sequence token was sampled before the limit.
        watched: log-probs of the watched tokens at temperature 1 for each step, `[T][W]`; empty by default.
        hidden: number of leading tokens that are thinking, markers included. Default: 0.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finished: bool
    watched: tuple[tuple[float, ...], ...] = ()
    hidden: int = 0

    @property
    def thinking_ids(self) -> tuple[int, ...]:
        """The tokens that judge and evaluator do not read."""
        return self.ids[: self.hidden]

    @property
    def reply_ids(self) -> tuple[int, ...]:
        """The tokens after the thinking; empty if the reply was cut off in it."""
        return self.ids[self.hidden :]

    def within(self, limit: int, prompt: Prompt, thinking: ThinkingTokens | None = None) -> Rollout:
        """Return the rollout that the same random numbers give with these limits, which are not higher than its own were.

        Args:
            limit: maximum number of tokens of the reply.
            prompt: prompt of the reply.
            thinking: Optional. Markers and limit of the thinking. Default: none is recognised.
        """
        progress = ReplyProgress(limit, len(self.ids), prompt, thinking)
        for token in self.ids:
            progress.add(token)
            if progress.length >= progress.limit:
                break
        kept = progress.length
        finished = self.finished and kept == len(self.ids)
        hidden = progress.hidden(finished=finished)
        return Rollout(self.ids[:kept], self.logprobs[:kept], finished, self.watched[:kept], hidden)


@dataclass
class Tally:
    """Number of tokens processed by `generate`: prompt tokens read (shared prompts count once) and reply tokens written."""

    read: int = 0
    written: int = 0


_TALLY: ContextVar[Tally | None] = ContextVar("tally", default=None)


@contextmanager
def count_tokens() -> Iterator[Tally]:
    """Count the tokens of every `generate` call inside the block, including nested calls.

    Example:
        >>> with count_tokens() as tally:
        ...     pass
        >>> tally
        Tally(read=0, written=0)
    """
    tally = Tally()
    before = _TALLY.set(tally)
    try:
        yield tally
    finally:
        _TALLY.reset(before)


def visible_ids(backbone: Backbone, rollout: Rollout) -> tuple[int, ...]:
    """Return the tokens of a reply that are scored; a reply that was cut off in its reasoning counts as an empty one.

    Args:
        backbone: where the reply was sampled.
        rollout: the reply.
    """
    return rollout.reply_ids or backbone.loaded.eos_ids[:1] or (backbone.loaded.pad_id,)


def generate(
    backbone: Backbone,
    requests: Sequence[Request],
    *,
    max_new_tokens: int,
    seed: int,
    batch_size: int = 256,
    stop: Sequence[int] = (),
    watch: Sequence[int] = (),
    guide: Guide | None = None,
    thinking: ThinkingTokens | None = None,
    first: int = 0,
    advance: Callable[[int], None] | None = None,
) -> list[Rollout]:
    """Sample one rollout per request under the acting role.

    Args:
        backbone: backbone with an acting role.
        requests: requests, processed in batches of similar prompt length.
        max_new_tokens: maximum number of new tokens per reply.
        seed: sampling seed. The same requests in the same order produce the same rollouts. Each request has a separate
            random stream, so its draws do not depend on `batch_size` or on the other replies in the batch.
        batch_size: number of rows in a batch (a guided reply counts once per role); halved when memory runs out. Default: 256.
        stop: additional token ids that end a reply. Default: none.
        watch: token ids whose log-probs are recorded at every step. Default: none.
        guide: optional value functions that modify the distribution of every reply.
        thinking: optional markers of a chain of thought before the reply, and its limit. Default: all tokens are the reply.
        first: index of the first request if `requests` is a slice of a longer list. The slice then gets the same draws as
            in the whole list. Default: 0.
        advance: optional callback that receives the number of newly finished replies.

    Returns:
        Rollouts in the order of the requests. A reply is cut off at the end of the model's context.

    Raises:
        LoopError: a prompt fills the model's context.
        ModelError: the model's cache does not support removing rows, or a prompt has an image.
        MemoryLimitError: there is not enough memory for a single row.
        RoleError: no role is acting, or the guide names one that does not exist.
    """
    check_state(backbone.loaded)
    backbone.refuse_mixed_rows("sampling")
    check_prompts(backbone, [r.prompt for r in requests])
    order = sorted(range(len(requests)), key=lambda i: _by_length(requests[i].prompt))

    def of_group(group: list[int]) -> list[Rollout]:
        chosen = [requests[order[i]] for i in group]
        # The index in the caller's whole list selects the random stream, whichever batch the request is in.
        numbers = [first + order[i] if (own := requests[order[i]].stream) is None else own for i in group]
        return Batch(backbone, chosen, numbers, max_new_tokens, stop, watch, seed, guide, thinking).run()

    results: dict[int, Rollout] = {}
    # The roles of a guide read the same tokens in separate rows, which take memory as well.
    sizes = [1 if guide is None else 1 + len(guide.roles)] * len(order)
    tally = _TALLY.get()
    for group, rollouts in backbone.budget.in_groups(Phase.ROLLOUT, sizes, batch_size, of_group):
        results.update({order[i]: rollout for i, rollout in zip(group, rollouts, strict=True)})
        if tally:
            tally.read += sum(len(prompt.ids) for prompt in {requests[order[i]].prompt for i in group})
            tally.written += sum(len(rollout.ids) for rollout in rollouts)
        if advance:
            advance(len(group))
    return [results[i] for i in range(len(requests))]


def _by_length(prompt: Prompt) -> tuple[int, tuple[int, ...], tuple[Image, ...]]:
    """Sort key that puts prompts of similar length in one batch, and equal prompts next to each other."""
    return len(prompt.ids), prompt.ids, prompt.images


def check_prompts(backbone: Backbone, prompts: Sequence[Prompt]) -> None:
    """Check that the model can read every prompt and reply to it within its context.

    Raises:
        LoopError: a prompt fills the context.
        ModelError: a prompt has an image.
    """
    refuse_images(backbone, prompts)
    context, longest = backbone.loaded.context_length, max((len(p.ids) for p in prompts), default=0)
    if context is not None and longest >= context:
        raise LoopError(
            f"a prompt of {longest} tokens leaves no room for a reply in this model's context of {context}; use shorter "
            "questions or "
            "templates, fewer examples (questions.examples), or a model with a longer context"
        )


class _Pass:
    """One forward pass over one or more roles, whose rows are concatenated role by role, and its cache.

    Args:
        backbone: backbone with an acting role.
        guides: roles of the guide, each with separate rows.
        own: whether the acting role has rows in this pass.
        room: number of tokens to reserve in the cache beyond the prompt.
    """

    def __init__(self, backbone: Backbone, guides: Sequence[str], own: bool, room: int) -> None:
        if backbone.acting is None:
            raise RoleError("sampling outside of `with backbone.acting_as(role)`; select a role first")
        self.backbone, self.own = backbone, own
        self.roles = (*((backbone.acting,) if own else ()), *guides)
        self.cache = preallocated_cache(backbone.model.config, room)
        self.step = backbone.decode_step()

    def logits(self, ids_BT: Tensor, attention_BT: Tensor) -> Tensor:
        """Compute next-token logits `[roles, B, V]` after these tokens."""
        count = len(self.roles)
        ids, attention = ids_BT.repeat(count, 1), attention_BT.repeat(count, 1)
        with self._acting(len(ids_BT)):
            if self.step is not None and ids.shape[1] == 1:
                logits = self.step.logits(ids, attention, self.cache)
            else:
                logits = self._model_logits(ids, attention)
        return logits.float().view(count, len(ids_BT), -1)

    def _model_logits(self, ids: Tensor, attention: Tensor) -> Tensor:
        """Compute them in the model's own pass."""
        loaded = self.backbone.loaded
        arguments: dict[str, Any] = {"input_ids": ids, **state_arguments(loaded, self.cache, attention, ids.shape[1])}
        if loaded.forward_accepts("position_ids"):
            # Count real tokens only, because left padding must not shift the positions. Padding gets 0 and is masked.
            positions = (attention.cumsum(-1) - 1).clamp_min(0)
            arguments["position_ids"] = positions[:, -ids.shape[1] :]
        if loaded.forward_accepts("logits_to_keep"):
            # An index instead of a count: a view of the last position is not contiguous, and a bf16 matmul on a CPU would then
            # copy the output layer once per row.
            arguments["logits_to_keep"] = torch.tensor([ids.shape[1] - 1], device=ids.device)
        logits: Tensor = self.backbone.model(**arguments, use_cache=True).logits
        return logits[:, -1]

    def _acting(self, rows: int) -> AbstractContextManager[None]:
        # The caller's block already acts for a pass of the acting role alone. Otherwise name one role per row, or a single
        # role where there is only one: fused experts refuse roles per row.
        if self.own and len(self.roles) == 1:
            return nullcontext()
        return self.backbone.acting_as([role for role in self.roles for _ in range(rows)] if self.roles[1:] else self.roles[0])

    def select(self, rows: Sequence[int], of: int) -> None:
        """Keep (or repeat) these rows out of the `of` rows of each role."""
        # Row r of the k-th role is at index k * of + r.
        select_rows(self.cache, [k * of + row for k in range(len(self.roles)) for row in rows], self.backbone.loaded.device)


class Batch:
    """State of one batch during sampling.

    `prefill`, `draw` and `advance` do not depend on tensor values, except to check for NaN, and the planner calls them on
    shapes. `run` decides which rows are finished.

    Args:
        backbone: backbone with an acting role.
        requests: one per row.
        numbers: index of each request, which selects its random stream.
        limit: maximum number of new tokens per reply.
        stop, watch, seed, guide, thinking: as in `generate`.
    """

    def __init__(
        self,
        backbone: Backbone,
        requests: Sequence[Request],
        numbers: Sequence[int],
        limit: int,
        stop: Sequence[int],
        watch: Sequence[int],
        seed: int,
        guide: Guide | None,
        thinking: ThinkingTokens | None = None,
    ) -> None:
        context = backbone.loaded.context_length or sys.maxsize
        limits = [limit if r.limit is None else min(limit, r.limit) for r in requests]
        self.progress = [
            ReplyProgress(most, context - len(r.prompt.ids), r.prompt, thinking)
            for r, most in zip(requests, limits, strict=True)
        ]
        self.most = max(progress.most for progress in self.progress)
        self.backbone = backbone
        device = backbone.loaded.device
        self.requests = requests
        self.ends = {*backbone.loaded.eos_ids, *stop}
        self.watch = torch.tensor(list(watch), dtype=torch.long, device=device)
        self.temperature_B = torch.tensor([r.temperature for r in requests], device=device)
        self.top_p_B = torch.tensor([r.top_p for r in requests], device=device)
        self.filters = any(r.top_p < 1 for r in requests)
        # Draw all random numbers in advance, so a row's number at a step does not depend on which rows are still alive.
        self.draws_BT = None
        if any(r.temperature for r in requests):
            self.draws_BT = row_draws(seed, numbers, self.most).to(device)
        self.guide = guide
        self.passes = _passes(backbone, guide.roles if guide else (), self.most)
        self.alive = torch.arange(len(requests), device=device)
        self.ids: list[list[int]] = [[] for _ in requests]
        self.logprobs: list[list[float]] = [[] for _ in requests]
        self.watched: list[list[tuple[float, ...]]] = [[] for _ in requests]
        self.finished = [False] * len(requests)

    @torch.no_grad()
    def run(self) -> list[Rollout]:
        logits_NBV, attention_BT = self.prefill()
        for step in range(self.most):
            tokens_B = self.draw(logits_NBV, step)
            del logits_NBV  # the next pass makes as many
            keep = self._record(tokens_B)
            if not keep:
                break
            logits_NBV, attention_BT = self.advance(keep, tokens_B, attention_BT)  # noqa: RUF059 (read by the next step)
        return [
            Rollout(tuple(i), tuple(p), f, tuple(w), progress.hidden(finished=f))
            for i, p, f, w, progress in zip(self.ids, self.logprobs, self.finished, self.watched, self.progress, strict=True)
        ]

    def prefill(self) -> tuple[Tensor, Tensor]:
        """Return next-token logits `[N, B, V]` and the attention mask after the prompts.

        Prefill each distinct prompt once (left-padded), then expand the cache to all rows that share it.
        """
        distinct, owners = _distinct_prompts(self.requests)
        width = max(len(p.ids) for p in distinct)
        pad, device = self.backbone.loaded.pad_id, self.backbone.loaded.device
        # Left-padded, so the last column holds the last token of every prompt.
        ids = torch.tensor([[pad] * (width - len(p.ids)) + list(p.ids) for p in distinct], device=device)
        attention = torch.tensor([[0] * (width - len(p.ids)) + [1] * len(p.ids) for p in distinct], device=device)
        logits = self._forward(ids, attention)
        if len(distinct) == len(self.requests):
            return logits, attention
        self._select(owners, len(distinct))
        rows = torch.tensor(owners, device=device)
        return logits[:, rows], attention[rows]

    def _forward(self, ids_BT: Tensor, attention_BT: Tensor) -> Tensor:
        """Compute next-token logits `[N, B, V]` after these tokens."""
        found = [part.logits(ids_BT, attention_BT) for part in self.passes]
        return found[0] if len(found) == 1 else torch.cat(found)

    def _select(self, rows: Sequence[int], of: int) -> None:
        for part in self.passes:
            part.select(rows, of)

    def _logprobs(self, logits_NBV: Tensor) -> Tensor:
        """Compute log-probs `[B, V]` from the logits, with the guide applied if there is one."""
        logprobs_NBV = torch.log_softmax(logits_NBV, dim=-1)
        return logprobs_NBV[0] if self.guide is None else self.guide.logprobs(logprobs_NBV[0], logprobs_NBV[1:])

    def advance(self, keep: Sequence[int], tokens_B: Tensor, attention_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Drop all rows except `keep`, and return logits and attention mask after the sampled tokens.

        The last rows take the places of those that are dropped, so that the cache moves few of them.
        """
        if len(keep) < len(tokens_B):
            order = _in_holes(keep)
            self._select(order, len(tokens_B))
            rows = torch.tensor(order, device=tokens_B.device)
            self.alive = self.alive[rows]
            tokens_B, attention_BT = tokens_B[rows], attention_BT[rows]
        attention_BT = torch.cat([attention_BT, attention_BT.new_ones(len(attention_BT), 1)], dim=1)
        return self._forward(tokens_B[:, None], attention_BT), attention_BT

    def draw(self, logits_NBV: Tensor, step: int) -> Tensor:
        """Sample a token per row and record its log-prob and those of the watched tokens."""
        temperature = self.temperature_B[self.alive]
        greedy = temperature == 0
        # Divide greedy rows by 1 instead of 0; their token is the argmax at any temperature.
        scaled_NBV = logits_NBV / torch.where(greedy, 1.0, temperature)[:, None]
        logprobs_BV = self._logprobs(scaled_NBV)
        if bool(logprobs_BV[:, 0].isnan().any()):  # a single NaN or +inf logit makes the whole row NaN
            raise NotFiniteError(f"the logits for token {step + 1} of a reply are NaN or infinite")
        tokens_B = logprobs_BV.argmax(-1)
        if self.draws_BT is not None:
            allowed_BV = _nucleus(logprobs_BV, self.top_p_B[self.alive]) if self.filters else logprobs_BV
            tokens_B = torch.where(greedy, tokens_B, pick(allowed_BV, self.draws_BT[self.alive, step]))
        # From the full distribution, not the nucleus: a later forward pass computes the same.
        self._drawn = logprobs_BV.gather(1, tokens_B[:, None])[:, 0]
        # From the unscaled logits, because watched tokens are reported at temperature 1.
        self._seen = self._logprobs(logits_NBV)[:, self.watch] if len(self.watch) else None
        return tokens_B

    def _record(self, tokens_B: Tensor) -> list[int]:
        """Append the sampled tokens to their rows; return the positions of the rows that are not finished."""
        watched = self._seen.tolist() if self._seen is not None else None
        keep = []
        # `position` counts the rows still in the batch, `row` those that it started with.
        for position, (row, token, logprob) in enumerate(
            zip(self.alive.tolist(), tokens_B.tolist(), self._drawn.tolist(), strict=True)
        ):
            self.ids[row].append(token)
            self.logprobs[row].append(logprob)
            if watched is not None:
                self.watched[row].append(tuple(watched[position]))
            self.finished[row], progress = token in self.ends, self.progress[row]
            progress.add(token)
            if not self.finished[row] and progress.length < progress.limit:
                keep.append(position)
        return keep


def _distinct_prompts(requests: Sequence[Request]) -> tuple[list[Prompt], list[int]]:
    """Return the distinct prompts of the requests, and for each request the index of its prompt among them."""
    index: dict[Prompt, int] = {}
    owners = [index.setdefault(request.prompt, len(index)) for request in requests]
    return list(index), owners


def _in_holes(keep: Sequence[int]) -> list[int]:
    """Order ascending positions so that those below their number keep their place, and the others fill the gaps.

    Example:
        >>> _in_holes([0, 2, 3, 6])
        [0, 6, 2, 3]
    """
    count, kept = len(keep), set(keep)
    rest = reversed([position for position in keep if position >= count])
    return [place if place in kept else next(rest) for place in range(count)]


def _passes(backbone: Backbone, guides: Sequence[str], room: int) -> list[_Pass]:
    """Create the passes over the acting role and the guides: a single one, or one per role if roles cannot share a pass."""
    if backbone.mixes_rows:
        return [_Pass(backbone, guides, True, room)]
    return [_Pass(backbone, (), True, room), *(_Pass(backbone, (role,), False, room) for role in guides)]


def _nucleus(logprobs_BV: Tensor, top_p_B: Tensor) -> Tensor:
    """Set log-probs outside each row's nucleus to minus infinity (top-p sampling, Holtzman et al. 2020)."""
    sorted_BV, index_BV = logprobs_BV.sort(dim=-1, descending=True)
    # Probability of all likelier tokens. It is exactly 0 for the first, which therefore always stays.
    before_BV = sorted_BV.exp().cumsum(-1) - sorted_BV.exp()
    outside_BV = (before_BV >= top_p_B[:, None]) & (top_p_B < 1)[:, None]
    # The argsort of a permutation is its inverse: back to the order of the vocabulary.
    return sorted_BV.masked_fill(outside_BV, float("-inf")).gather(1, index_BV.argsort(-1))
