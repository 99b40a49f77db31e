"""Stop strings end a reply, wherever the borders of its tokens are."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

import tiny_models
from selfeval.backbone.adapters import BASE
from selfeval.prompt import Prompt
from selfeval.rollout.engine import generate
from selfeval.rollout.requests import Request, Rollout
from selfeval.rollout.stop_strings import StopStrings, before_stop
from selfeval.rollout.thinking import ThinkingTokens


class Bytes:
    """A tokenizer whose tokens are bytes, or several of them."""

    def __init__(self, *tokens: bytes) -> None:
        self.tokens = tokens

    def decode(self, ids: list[int]) -> str:
        return b"".join(self.tokens[i] for i in ids).decode(errors="replace")


@pytest.mark.parametrize(
    ("tokens", "strings", "ends_at"),
    [
        ([b"a", b"\n", b"\n", b"b"], ["\n\n"], 3),
        ([b"a", b"\n\nQ", b"b"], ["\n\n"], 2),  # the token has more than the end of the string
        ([b"x", b"Que", b"stion", b": 4"], ["Question:"], 4),
        ([b"a", "é".encode()[:1], "é".encode()[1:], b"b"], ["é"], 3),  # a character in two tokens
        ([b"a", b"b", b"c"], ["cb", "abc"], 3),
        ([b"a", b"b", b"c"], ["ca"], None),
        ([b"User", b":", b" Hi", b" there"], ["User: "], 3),
    ],
)
def test_the_token_that_completes_a_string_is_found(tokens: list[bytes], strings: list[str], ends_at: int | None) -> None:
    stops = StopStrings(Bytes(*tokens))
    ends = [n for n in range(1, len(tokens) + 1) if stops.end(list(range(n)), strings)]
    assert ends[:1] == ([] if ends_at is None else [ends_at])


def replies(request: Request, **options: Any) -> list[Rollout]:
    backbone = tiny_models.backbone("llama", 40, eos=())
    with backbone.acting_as(BASE):
        return generate(backbone, [request, Request(Prompt((7, 8)), 0.0)], max_new_tokens=12, seed=0, **options)


def test_a_reply_ends_with_the_token_that_completes_the_string_and_others_do_not() -> None:
    prompt = Prompt((5, 9, 2))
    free, other = replies(Request(prompt, 0.0))
    decode = tiny_models.words_tokenizer().decode
    text = decode(list(free.ids[3:5]))  # two words, with the space between them
    stopped, same = replies(Request(prompt, 0.0, stop_strings=("no such text", text)))
    ends = next(n for n in range(1, 13) if text in decode(list(free.ids[:n])))
    assert (stopped.ids, stopped.finished) == (free.ids[:ends], True)
    assert same.ids == other.ids
    assert not free.finished


def test_a_chain_of_thought_is_not_searched() -> None:
    prompt = Prompt((5, 9, 2))
    free, _ = replies(Request(prompt, 0.0))
    decode = tiny_models.words_tokenizer().decode
    opening, closing = free.ids[0], free.ids[6]
    thinking = ThinkingTokens(frozenset({opening}), frozenset({closing}))
    strings = (decode([free.ids[3]]),)
    found, _ = replies(Request(prompt, 0.0, stop_strings=strings), thinking=thinking)
    closed = free.ids.index(closing) + 1
    assert len(found.ids) > closed
    assert found.hidden >= closed


def test_a_stop_string_is_cut_off_and_the_end_token_takes_its_place() -> None:
    loaded: Any = SimpleNamespace(tokenizer=Bytes(b"4 apples", b".", b" Quest", b"ion:", b"!"), eos_ids=(9,))
    rollout = Rollout((0, 1, 2, 3), (-1.0, -2.0, -3.0, -4.0), finished=True)
    # The token " Quest" has the beginning of the string, so none of it stays.
    found = before_stop(rollout, ("Question:",), loaded)
    assert (found.ids, found.logprobs) == ((0, 1, 9), (-1.0, -2.0, 0.0))
    assert before_stop(rollout, ("Question:", "apples"), loaded).ids == (9,)
    assert before_stop(rollout, ("nothing",), loaded) == rollout
    assert before_stop(rollout, (), loaded) == rollout
