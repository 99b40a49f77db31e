"""Thinking before a reply: where it ends, and at which length a reply is cut off."""

from __future__ import annotations

import pytest

import tiny_models
from selfeval.backbone.adapters import BASE
from selfeval.prompt import Prompt
from selfeval.rollout.engine import generate, visible_ids
from selfeval.rollout.requests import Request, Rollout
from selfeval.rollout.thinking import ReplyProgress, ThinkingTokens

OPEN, CLOSE, END = 2, 3, 1


def cut(ids: list[int], limit: int, thinking: int | None, prompt: tuple[int, ...] = (5,), room: int = 99) -> tuple[int, int]:
    """Return the number of tokens after which a reply of these ids is cut off, and how many of them are thinking."""
    progress = ReplyProgress(limit, room, Prompt(prompt), ThinkingTokens(frozenset([OPEN]), frozenset([CLOSE]), thinking))
    for token in ids:
        progress.add(token)
        if token == END or progress.length >= progress.limit:
            break
    return progress.length, progress.hidden(finished=token == END)


@pytest.mark.parametrize(
    ("ids", "limit", "thinking", "found"),
    [
        ([7, 7, 7, 7], 2, 3, (2, 0)),  # no thinking: its limit does not count
        ([OPEN, 7, CLOSE, 8, 8, 8], 2, 3, (5, 3)),
        ([OPEN, 7, 7, 7, 7, 7], 2, 3, (4, 4)),  # the marker and three tokens, none of which is a reply
        ([OPEN, 7, CLOSE, 8, END], 2, 3, (5, 3)),
        ([OPEN, 7, END], 2, 3, (3, 2)),  # the model ended inside: an empty reply
        ([OPEN, 7, CLOSE, 8, 8, 8], 2, None, (2, 2)),  # one limit for both
        ([OPEN, 7, CLOSE, 8, 8, 8], 5, None, (5, 3)),
        ([7, CLOSE, 8, 8, 8], 2, 3, (4, 2)),  # closed but never opened
        ([OPEN, CLOSE, OPEN, CLOSE, OPEN, CLOSE, 8], 2, 3, (5, 5)),  # cannot go on for longer than both limits
    ],
)
def test_thinking_has_a_limit_of_its_own(ids: list[int], limit: int, thinking: int | None, found: tuple[int, int]) -> None:
    assert cut(ids, limit, thinking) == found


def test_a_thinking_that_the_prompt_opens_is_recognised() -> None:
    assert cut([7, CLOSE, 8, 8, 8], 2, 3, (5, OPEN, 6)) == (4, 2)
    assert cut([7] * 9, 2, 3, (5, OPEN, 6)) == (3, 3)
    assert cut([7] * 9, 2, 3, (5, OPEN, CLOSE, 6)) == (2, 0)  # disabled: the template closes it at once
    assert cut([7] * 9, 2, 3, (OPEN, 5, 5, 5, 5)) == (2, 0)  # in the text of the question


def test_a_marker_may_have_several_tokens() -> None:
    harmony = ThinkingTokens(frozenset([(2, 3)]), frozenset([(2, 4, 5), 6]), 3)

    def found(ids: list[int], prompt: tuple[int, ...] = (9,)) -> tuple[int, int]:
        progress = ReplyProgress(2, 99, Prompt(prompt), harmony)
        for token in ids:
            progress.add(token)
            if progress.length >= progress.limit:
                break
        return progress.length, progress.hidden(finished=False)

    assert found([2, 3, 7, 2, 4, 5, 8, 8, 8]) == (5, 5), "three tokens after the opening marker, none of which closes it"
    assert found([2, 3, 2, 4, 5, 8, 8, 8]) == (5, 5), "markers count toward both limits together"
    assert found([2, 3, 6, 8, 8, 8]) == (5, 3), "a marker of one token"
    assert found([2, 7, 8, 8]) == (2, 0), "half a marker"
    assert found([7, 7, 7, 7], (9, 2, 3, 9)) == (3, 3), "opened by the prompt"
    assert found([7, 7, 7, 7], (2, 3, 2, 4, 5)) == (2, 0), "and closed by it"


def test_the_context_ends_both() -> None:
    assert cut([OPEN, 7, CLOSE, 8, 8, 8], 4, 3, room=4) == (4, 3)


def test_the_engine_samples_the_same_tokens_and_cuts_them_off_there() -> None:
    backbone, prompts = tiny_models.backbone(), [Prompt((i, 9)) for i in range(5, 25)]
    requests = [Request(prompt) for prompt in prompts]
    thinking = ThinkingTokens(frozenset(range(5, 8)), frozenset(range(8, 11)), 4)
    with backbone.acting_as(BASE):
        plain = generate(backbone, requests, max_new_tokens=10, seed=3)
        found = generate(backbone, requests, max_new_tokens=6, seed=3, thinking=thinking, batch_size=7)
    assert any(r.hidden for r in found)
    assert any(len(r.ids) > 6 for r in found)
    for whole, reply, prompt in zip(plain, found, prompts, strict=True):
        assert reply == _near(whole.within(6, prompt, thinking), reply)
        assert len(reply.reply_ids) <= 6
        assert reply.thinking_ids + reply.reply_ids == reply.ids
        assert not reply.reply_ids or reply.reply_ids[0] not in thinking.closing or not reply.hidden


def _near(wanted: Rollout, found: Rollout) -> Rollout:
    """Return `wanted` with the log-probs of `found`, which may differ in the last digits, after comparing them."""
    assert found.logprobs == pytest.approx(wanted.logprobs, abs=1e-5)
    return Rollout(wanted.ids, found.logprobs, wanted.finished, wanted.watched, wanted.hidden)


def test_a_reply_that_was_cut_off_in_its_thinking_is_scored_as_an_empty_one() -> None:
    backbone = tiny_models.backbone()
    assert visible_ids(backbone, Rollout((OPEN, 7), (0.0, 0.0), False, hidden=2)) == backbone.loaded.eos_ids[:1]
    assert visible_ids(backbone, Rollout((OPEN, CLOSE, 7), (0.0,) * 3, False, hidden=2)) == (7,)
