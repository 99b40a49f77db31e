"""Sample token ids from the acting role, and record the log-prob of every sampled token.

Rows with the same prompt that begin together share its prefill. Finished rows leave the batch and waiting requests take their
places (continuous batching), so that a batch stays full until no request is waiting. The engine works on token ids
throughout: a sampled end-of-sequence token is part of the reply.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from selfeval.backbone.budget import Phase
from selfeval.backbone.families.cache import check_state
from selfeval.backbone.roles import Backbone
from selfeval.backbone.sequences import refuse_images
from selfeval.errors import LoopError
from selfeval.prompt import Image, Prompt
from selfeval.rollout.batch import Batch
from selfeval.rollout.guide import Guide
from selfeval.rollout.requests import Request, Rollout
from selfeval.rollout.rows import joins_rows
from selfeval.rollout.thinking import ThinkingTokens

__all__ = ["Tally", "add_to_tally", "by_length", "check_prompts", "count_tokens", "generate", "note_tokens", "visible_ids"]

_TURNS = 8
"""Requests per place of a batch whose rows are replaced. More would keep it full for longer, but their random numbers are drawn
in advance."""


@dataclass
class Tally:
    """Number of tokens processed by `generate`: prompt tokens read (shared prompts count once) and reply tokens written."""

    read: int = 0
    written: int = 0


_TALLY: ContextVar[Tally | None] = ContextVar("tally", default=None)


@contextmanager
def count_tokens() -> Iterator[Tally]:
    """Count the tokens of every `generate` call inside the block, including nested calls; those of this process only.

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


def add_to_tally(requests: Sequence[Request], rollouts: Sequence[Rollout]) -> None:
    """Count the tokens of a finished batch in the block of `count_tokens`, if there is one."""
    note_tokens(
        sum(len(prompt.ids) for prompt in {request.prompt for request in requests}),
        sum(len(rollout.ids) for rollout in rollouts),
    )


def note_tokens(read: int, written: int) -> None:
    """Count tokens in the block of `count_tokens`, if there is one."""
    if tally := _TALLY.get():
        tally.read += read
        tally.written += written


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
        batch_size: number of rows at a time (a guided reply counts once per role); halved when memory runs out. Default: 256.
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
    # The longest first: a later row then never needs more columns than those before it.
    order = sorted(range(len(requests)), key=lambda i: by_length(requests[i].prompt), reverse=True)
    joins = joins_rows(backbone, guide)
    results: dict[int, Rollout] = {}
    tally = _TALLY.get()

    def of_group(group: list[int]) -> dict[int, Rollout]:
        # After a lack of memory, the replies that were finished before it are kept.
        indices = [order[i] for i in group if order[i] not in results]
        if not indices:
            return {order[i]: results[order[i]] for i in group}

        def ended(row: int, rollout: Rollout) -> None:
            results[indices[row]] = rollout
            if tally:
                tally.written += len(rollout.ids)
            if advance:
                advance(1)

        # The index in the caller's whole list selects the random stream, whichever batch the request is in.
        numbers = [first + i if (own := requests[i].stream) is None else own for i in indices]
        chosen = [requests[i] for i in indices]
        places = backbone.budget.within(Phase.ROLLOUT, batch_size) if joins else None
        batch = Batch(backbone, chosen, numbers, max_new_tokens, stop, watch, seed, guide, thinking, places, ended)
        batch.run()
        if tally:
            tally.read += batch.rows.tokens_read
        return {order[i]: results[order[i]] for i in group}

    # The roles of a guide read the same tokens in separate rows, which take memory as well.
    sizes = [1 if guide is None else 1 + len(guide.roles)] * len(order)
    # Each process counts its own replies; all return the replies of all.
    for _, found in backbone.budget.in_groups(Phase.ROLLOUT, sizes, batch_size, of_group, turns=_TURNS if joins else 1):
        results |= found
    return [results[i] for i in range(len(requests))]


def by_length(prompt: Prompt) -> tuple[int, tuple[int, ...], tuple[Image, ...]]:
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
