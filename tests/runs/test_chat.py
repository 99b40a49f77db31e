"""Replies in pieces. The commands on the terminal: tests/cli/test_chatting.py."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest

import tiny_models
from chats import CHATML, CONTROL
from selfeval.config import RunConfig
from selfeval.errors import DataError, InputError
from selfeval.judging.templates import Templates, templates_folder
from selfeval.rollout.live import NewToken
from selfeval.rollout.thinking import ReplyProgress, ThinkingTokens
from selfeval.runs.chat import Conversation, Exchange, Sampling, Speaker, _TextSoFar, sampling_of
from selfeval.runs.model import RunModel
from selfeval.runs.policy import Policy
from selfeval.training.context import POLICY
from tiny_runs import random_roles

QUESTION = "What is 2 + 3?"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> RunModel:
    return random_roles(tmp_path_factory.mktemp("run"), CHATML)


def _speaker(model: RunModel, role: str = POLICY, seed: int = 0, limit: int = 40) -> Speaker:
    return Speaker(model, role, Sampling(1.0, 1.0, limit, seed))


@pytest.mark.parametrize("seed", range(6))
def test_the_pieces_together_are_the_reply_of_the_python_api(model: RunModel, seed: int) -> None:
    reply = _speaker(model, seed=seed).reply(QUESTION)
    pieces = [piece for piece in reply if piece]
    (expected,) = Policy(model).reply(QUESTION, seed=seed, max_new_tokens=40, temperature=1.0, top_p=1.0)
    assert "".join(pieces) == reply.text == expected
    assert len(pieces) > 5
    assert 5 < reply.tokens <= 40


def test_another_number_is_another_sample(model: RunModel) -> None:
    expected = Policy(model).reply(QUESTION, 3, seed=4, max_new_tokens=12, temperature=1.0, top_p=1.0)
    speaker = _speaker(model, seed=4, limit=12)
    assert ["".join(speaker.reply(QUESTION, number)) for number in range(3)] == expected
    assert len(set(expected)) == 3


def test_the_base_replies_without_the_policy(model: RunModel) -> None:
    base, policy = ("".join(_speaker(model, role).reply(QUESTION)) for role in ("base", POLICY))
    assert base != policy


def test_later_questions_see_the_turns_before_them(model: RunModel) -> None:
    conversation = Conversation("Be brief.")
    conversation.exchanges.append(Exchange(QUESTION, "Five."))
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": "Five."},
        {"role": "user", "content": "Why?"},
    ]
    assert conversation.asked("Why?") == turns
    sampled = "".join(_speaker(model).reply(conversation.asked("Why?")))
    assert [sampled] == Policy(model).reply(turns, max_new_tokens=40, temperature=1.0, top_p=1.0)
    assert sampled != "".join(_speaker(model).reply("Why?"))


def test_a_first_question_without_a_system_message_is_one_of_a_run(model: RunModel) -> None:
    assert Conversation().asked("Why?") == "Why?"
    assert Conversation(remembers=False, exchanges=[Exchange("a", "b")]).asked("Why?") == "Why?"


def test_a_reply_that_is_stopped_leaves_nothing_behind(model: RunModel) -> None:
    speaker = _speaker(model)
    stopped = speaker.reply(QUESTION)
    begun = "".join(islice(stopped, 12))
    assert stopped.text == begun
    whole = "".join(speaker.reply(QUESTION))
    assert whole.startswith(begun)
    assert len(begun) < len(whole)


def test_a_reply_at_its_limit_is_not_finished(model: RunModel) -> None:
    cut = _speaker(model, limit=3).reply(QUESTION)
    assert "".join(cut) == cut.text
    assert (cut.tokens, cut.finished) == (3, False)


def test_a_conversation_that_fills_the_context_is_refused_and_a_reply_shortened(model: RunModel) -> None:
    context = model.backbone.loaded.context_length
    assert context is not None
    room = context - len(model.templates.prompt("reply", question=" a" * 50).ids)
    long = " a" * (50 + room - 4)
    assert _speaker(model).reply(long)._limit <= 5
    with pytest.raises(InputError, match=r"leaves no room for a reply in this model's context of \d+; remove turns \(/undo\)"):
        _speaker(model).reply(long + " a" * 9)


def test_without_a_chat_template_there_is_no_conversation(tmp_path: Path) -> None:
    model = random_roles(tmp_path, None)
    assert "".join(_speaker(model).reply(QUESTION))
    with pytest.raises(DataError, match="no chat template"):
        _speaker(model).reply([{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}])


def test_numbers_that_are_not_given_are_those_of_the_run(model: RunModel) -> None:
    config = RunConfig.model_validate({"evaluation": {"temperature": 0.5, "top_p": 0.9}, "replies": {"max_new_tokens": 7}})
    other = random_roles(model.reader.folder, CHATML, config)
    assert sampling_of(other, None, None, None, 3) == Sampling(0.5, 0.9, 7, 3)
    assert sampling_of(other, 0.0, 1.0, 2, 3) == Sampling(0.0, 1.0, 2, 3)
    for changed in ({"temperature": -1.0}, {"top_p": 0.0}, {"max_new_tokens": 0}):
        with pytest.raises(InputError, match=f"{next(iter(changed))} must be"):
            sampling_of(other, **{"temperature": None, "top_p": None, "max_new_tokens": None, "seed": 0, **changed})  # type: ignore[arg-type]


def test_a_character_waits_for_its_last_byte() -> None:
    tokenizer: Any = tiny_models.words_tokenizer(CONTROL)
    templates = Templates.load(templates_folder("none"), tokenizer)
    ids = tokenizer.encode("né 🙂!", add_special_tokens=False)
    assert len(ids) >= 9, "the tokenizer has no tokens for these characters, only bytes"
    reply = _TextSoFar(templates, ReplyProgress(99, 99, templates.prompt("reply", question="Why?")))
    seen = []
    for token in ids:
        reply.add(NewToken(token, 0.0))
        seen.append(reply.stable())
    # A space waits as well: one at the end of a reply is left out.
    assert seen == ["n", "n", "né", "né", "né", "né", "né", "né 🙂", "né 🙂!"]


def test_text_before_a_closing_marker_is_no_part_of_the_reply(model: RunModel) -> None:
    reply = _speaker(model).reply(QUESTION)
    before, after, close = (_ids(model, text) for text in ("well", "five", "tie"))
    thinking = ThinkingTokens(opening=frozenset(), closing=frozenset([close]))
    prompt = model.templates.prompt("reply", question=QUESTION)
    reply._reply = _TextSoFar(model.templates, ReplyProgress(99, 99, prompt, thinking))
    pieces = []
    for token in (*before, *close, *after):
        reply._reply.add(NewToken(token, 0.0))
        pieces.append(reply._news(reply._reply.stable()))
    pieces.append(reply._news(model.templates.text(after), is_last=True))
    assert "".join(pieces).startswith("well")
    assert "".join(pieces).endswith("\nfive")
    assert reply.text == "five"


def test_a_reply_that_is_cut_off_in_its_thinking_is_empty(model: RunModel) -> None:
    reply = _speaker(model).reply(QUESTION)
    begun, opening = _ids(model, "well"), _ids(model, "tie")
    prompt = model.templates.prompt("reply", question=QUESTION)
    progress = ReplyProgress(99, 99, prompt, ThinkingTokens(opening=frozenset([opening]), closing=frozenset()))
    reply._reply = _TextSoFar(model.templates, progress)
    for token in (*begun, *opening):
        reply._reply.add(NewToken(token, 0.0))
        reply._news(reply._reply.stable())
    assert (reply._news("", is_last=True), reply.text) == ("", "")


def _ids(model: RunModel, text: str) -> tuple[int, ...]:
    return tuple(model.templates.tokenizer.encode(text, add_special_tokens=False))
