"""How the stage samples: test questions as evaluation does, training questions from the ranges of the stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import tiny_models
from selfeval.backbone.role_files import save_role
from selfeval.config import RepliesConfig, RunConfig
from selfeval.errors import LoopError
from selfeval.judging.templates import Templates, templates_folder
from selfeval.prompt import Prompt
from selfeval.quality.reply_diversity import measure_diversity
from selfeval.records import Drop, Message, Question, Reply, Split
from selfeval.rollout import engines
from selfeval.rollout.beams import beam_search
from selfeval.rollout.engine import generate, visible_ids
from selfeval.rollout.requests import Request, Rollout
from selfeval.rollout.thinking import ThinkingTokens
from selfeval.runs.reply_limit import LIMIT_FILE, read_limit
from selfeval.stages import replies
from selfeval.stages.context import Context
from selfeval.stages.draws import Draws
from selfeval.stages.replies import WriteReplies, run
from selfeval.stages.shards import StageShards
from selfeval.stages.terminal import Terminal
from selfeval.stages.verdicts import _pairs
from selfeval.store import RunStore, write_json


def test_test_questions_are_sampled_as_evaluation_is_configured_and_training_questions_are_not() -> None:
    model: Any = SimpleNamespace(templates=Templates.load(templates_folder("none"), tiny_models.words_tokenizer()))
    config = RepliesConfig(temperature=(0.9, 1.1), top_p=(0.95, 1.0))
    work = WriteReplies(config, 8, 64, Draws(0), 16, test_temperature=0.5, test_top_p=0.75)
    tested = work._request(model, Question("q0", "Why?", Split.TEST, "self"), 0)
    assert (tested.temperature, tested.top_p) == (0.5, 0.75)
    trained = work._request(model, Question("q1", "Why?", Split.TRAIN, "self"), 0)
    assert 0.9 <= trained.temperature <= 1.1
    assert 0.95 <= trained.top_p <= 1.0


# -- the limit that the first shard decides -----------------------------------------------------------------------------


def context(folder: Path, **changes: Any) -> Context:
    """A run of a tiny model that has its questions."""
    settings = {"max_new_tokens": "auto", "max_new_tokens_cap": 48, "shard": 12, "beams": 2, "beam_share": 0.3, **changes}
    made = Context(RunConfig(replies=settings), RunStore(folder), Terminal(quiet=True))  # type: ignore[arg-type]
    backbone = tiny_models.backbone("llama", 384)
    # A random model hardly ever writes the one end token; with many, replies have many lengths.
    object.__setattr__(backbone.loaded, "eos_ids", tuple(range(1, 48)))
    made.__dict__.update(backbone=backbone, templates=Templates.load(templates_folder("none"), backbone.loaded.tokenizer))
    asked = [Question(f"q{i:02d}", f"What is {i}?", Split.TRAIN if i % 3 else Split.TEST, "self") for i in range(24)]
    made.store.write_shard("questions", 0, asked)
    return made


def shards(made: Context) -> list[bytes]:
    return [path.read_bytes() for path in made.store.shards("replies")]


def test_the_first_shard_decides_the_limit_of_all(tmp_path: Path) -> None:
    made = context(tmp_path / "auto")
    run(made)
    limit = read_limit(made.store.root)
    assert 0 < limit.tokens < limit.cap == 48
    assert limit.replies == 24
    assert made.reply_limit == limit.tokens
    found = made.store.read("replies", Reply)
    assert max(len(reply.ids) for reply in found) == limit.tokens
    assert all(reply.finished or len(reply.ids) == limit.tokens for reply in found)
    # Samples are those that the limit would have given.
    fixed = context(tmp_path / "fixed", max_new_tokens=limit.tokens)
    run(fixed)
    assert fixed.reply_limit == limit.tokens
    assert not (fixed.store.root / LIMIT_FILE).exists()
    same = {reply.id: reply for reply in fixed.store.read("replies", Reply)}
    assert all(reply == same[reply.id] for reply in found if reply.sampling_method == "sample")


def test_a_resumed_stage_does_not_decide_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = context(tmp_path / "whole")
    run(made)
    whole, limit = shards(made), (made.store.root / LIMIT_FILE).read_bytes()
    for path in made.store.shards("replies"):
        path.unlink()  # as a kill before the first shard was written leaves it
    monkeypatch.setattr(replies, "decide_limit", None)
    run(made)
    assert (made.store.root / LIMIT_FILE).read_bytes() == limit
    written = [path.read_bytes() for path in made.store.shards("replies")]
    assert written == whole
    monkeypatch.undo()
    killed = context(tmp_path / "killed")
    with monkeypatch.context() as patch:
        patch.setattr(StageShards, "write", lambda self, index, output: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(killed)
    run(killed)
    assert (killed.store.root / LIMIT_FILE).read_bytes() == limit


def test_a_later_round_takes_the_limit_of_the_first(tmp_path: Path) -> None:
    first = context(tmp_path / "run")
    write_json(first.store.root / LIMIT_FILE, {"tokens": 5, "cap": 48, "replies": 24, "finished": 24})
    later = context(tmp_path / "run" / "rounds" / "02")
    later.earlier = (first.store,)
    save_role(first.backbone, first.backbone.roles.add("policy") or "policy", first.role_folder("policy"))
    run(later)
    assert later.reply_limit == 5
    assert max(len(reply.ids) for reply in later.store.read("replies", Reply)) == 5


def test_the_cap_fits_the_context_with_the_longest_prompt(tmp_path: Path) -> None:
    made = context(tmp_path / "run", max_new_tokens_cap=4096)
    length = made.backbone.loaded.context_length
    assert length is not None
    longest = max(len(made.templates.prompt("reply", question=q.text).ids) for q in made.store.read("questions", Question))
    said: list[str] = []
    object.__setattr__(made.terminal, "note", said.append)
    assert replies._cap(made, made.store.read("questions", Question)) == length - longest
    assert said == [
        f"replies: the cap is lowered from 4096 to {length - longest} tokens by the prompt of question q00 ({longest} tokens); "
        "remove the question, or use a model with a longer context"
    ]


def test_a_question_that_leaves_no_room_for_any_reply_is_named(tmp_path: Path) -> None:
    made = context(tmp_path / "run", max_new_tokens_cap=4096)
    length = made.backbone.loaded.context_length
    assert length is not None
    short = made.store.read("questions", Question)
    long = Question("q000123", "Why? " * (length // 4), Split.TRAIN, "self")
    while length - len(made.templates.reply_prompt(long).ids) >= 64:
        long = replace(long, text=long.text + "Why? ")
    tokens = len(made.templates.reply_prompt(long).ids)
    said = (
        rf"question q000123 has {tokens} tokens, .* of 64 tokens .*remove the question, or set replies.max_new_tokens to a num"
    )
    with pytest.raises(LoopError, match=said):
        replies._cap(made, [*short, long])
    # A cap below 64 tokens needs no more than the cap.
    made = context(tmp_path / "small", max_new_tokens_cap=8)
    assert replies._cap(made, [*short, replace(long, text=long.text[: len(short[0].text)])]) == 8


def test_beams_are_searched_with_the_cap_in_every_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, limits = context(tmp_path / "run", max_thinking_tokens=9), list[int]()

    def searched(*arguments: Any, **options: Any) -> list[Rollout]:
        limits.append(options["max_new_tokens"])
        return beam_search(*arguments, **options)

    monkeypatch.setattr(replies, "beam_search", searched)
    run(made)
    assert limits == [48 + 9] * 2
    beams = [r for r in made.store.read("replies", Reply) if r.sampling_method == "beam"]
    assert beams
    assert all(len(reply.ids) <= made.reply_limit for reply in beams)


# -- thinking -----------------------------------------------------------------------------------------------------------


def thinking_context(folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Context:
    """The same run of a model that thinks: many of its tokens begin or end a chain of thought."""
    opening, closing = frozenset(range(48, 80)), frozenset(range(80, 150))
    monkeypatch.setattr(Templates, "thinking", lambda self, limit=None: ThinkingTokens(opening, closing, limit))
    return context(folder, **{"max_new_tokens": 6, **changes})


def test_the_thinking_is_kept_in_the_record_and_is_no_part_of_the_reply(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = thinking_context(tmp_path / "run", monkeypatch, max_thinking_tokens=9)
    seen: list[Rollout] = []

    def sampled(*arguments: Any, **options: Any) -> list[Rollout]:
        seen.extend(found := generate(*arguments, **options))
        return found

    monkeypatch.setattr(engines, "generate", sampled)
    run(made)
    found = [reply for reply in made.store.read("replies", Reply) if reply.sampling_method == "sample"]
    whole = {made.templates.thinking_text(r.thinking_ids) for r in seen}
    assert {reply.thinking for reply in found} == whole
    assert len(whole) > 5
    for reply in found:
        assert 1 <= len(reply.ids) <= 6
        assert reply.text == made.templates.text(reply.ids)
    assert {reply.ids for reply in found} == {visible_ids(made.backbone, r) for r in seen}
    sums = {round(sum(r.logprobs[r.hidden :]), 4) for r in seen}
    assert {reply.logprob for reply in found} == sums


def test_a_decided_limit_is_that_of_the_reply_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = thinking_context(tmp_path / "run", monkeypatch, max_new_tokens="auto", max_thinking_tokens=9)
    run(made)
    same = thinking_context(tmp_path / "same", monkeypatch, max_new_tokens=made.reply_limit, max_thinking_tokens=9)
    run(same)
    wanted = {reply.id: reply for reply in same.store.read("replies", Reply)}
    found = [reply for reply in made.store.read("replies", Reply) if reply.sampling_method == "sample"]
    assert [wanted[reply.id] for reply in found] == found


def test_replies_that_never_leave_their_thinking_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit, remedy in ((None, "set replies.max_thinking_tokens"), (2, r"raise replies.max_thinking_tokens \(now 2\)")):
        made = thinking_context(tmp_path / f"run-{limit}", monkeypatch, max_thinking_tokens=limit)
        object.__setattr__(made.backbone.loaded, "eos_ids", (1,))
        monkeypatch.setattr(Templates, "thinking", lambda self, limit=None: _Opened(frozenset(), frozenset(), limit))
        with pytest.raises(LoopError, match=f"cut off inside their reasoning and have no text to judge; {remedy}"):
            run(made)


class _Opened(ThinkingTokens):
    def opened_by(self, prompt: Any) -> bool:
        return True


# -- conversations ------------------------------------------------------------------------------------------------------


def test_replies_continue_the_turns_of_a_conversation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, seen = context(tmp_path / "run", max_new_tokens=4), set[Prompt]()
    tokenizer = tiny_models.words_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<reply>"
    made.__dict__["templates"] = Templates.load(templates_folder("none"), tokenizer)
    turns = (Message("user", "Two plus three?"), Message("assistant", "Five."), Message("user", "Why?"))
    splits = (Split.TRAIN, Split.TEST, Split.TRAIN)
    asked = [Question(f"q{i}", f"{i}", split, "file", turns[: 3 if i else 0]) for i, split in enumerate(splits)]
    made.store.write_shard("questions", 0, asked)

    def sampled(backbone: Any, requests: Sequence[Request], **options: Any) -> list[Rollout]:
        seen.update(request.prompt for request in requests)
        return generate(backbone, requests, **options)

    monkeypatch.setattr(engines, "generate", sampled)
    monkeypatch.setattr(Templates, "grades_with_reference_answer", True)
    run(made)
    assert len({made.templates.reply_prompt(question) for question in asked}) == 2
    assert seen == {made.templates.reply_prompt(question) for question in asked}
    text = tokenizer.decode(list(made.templates.reply_prompt(asked[1]).ids))
    assert text == "<user>Two plus three?<assistant>Five.<user>Why?<reply>"


# -- loops --------------------------------------------------------------------------------------------------------------


def looping(folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Context:
    """A run in which the first reply to each question is a loop, and the others are as the model samples them."""
    made = context(folder, max_new_tokens=48, beam_share=0.0, per_question=3, **changes)
    plain = engines.OwnEngine.generate

    def generate(self: Any, backbone: Any, requests: Any, **options: Any) -> list[Rollout]:
        found = plain(self, backbone, requests, **options)
        loop = Rollout((50, 51, *(60, 61, 62) * 14), (0.0,) * 44, False)
        return [loop if number % 3 == 0 else rollout for number, rollout in enumerate(found)]

    monkeypatch.setattr(engines.OwnEngine, "generate", generate)
    return made


def test_a_loop_is_dropped_and_not_judged_except_of_a_test_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = looping(tmp_path, monkeypatch)
    counts = run(made)
    drops = made.store.read_dropped("replies")
    training = [q.id for q in made.store.read("questions", Question) if q.split == Split.TRAIN]
    assert [drop.detail["reply"] for drop in drops] == [f"{id}-r0" for id in training]
    assert counts["dropped_loop"] == len(training) == 16
    first, replies_by_id = drops[0], made.replies()
    assert (first.stage, first.reason, first.text) == ("replies", "loop", replies_by_id["q01-r0"].text)
    assert first.detail == {"question": "What is 1?", "reply": "q01-r0", "block": 3, "repeated": 42, "tokens": 44}
    assert len(replies_by_id) == counts["replies"] == 72  # they stay, so that the share of unfinished replies counts them
    pairs = _pairs(made, made.store.read("questions", Question))
    judged = {reply.id for pair in pairs if not isinstance(pair, Drop) for reply in pair[1:]}
    assert judged & {f"{id}-r0" for id in training} == set()
    assert any(id.endswith("-r0") for id in judged)  # of test questions


def test_a_question_whose_other_replies_are_loops_has_no_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = looping(tmp_path, monkeypatch)
    run(made)
    lost = [Drop("replies", "loop", "", {"reply": f"q01-r{number}"}) for number in (0, 1)]
    made.store.write_shard("replies", 0, made.replies().values(), lost)
    question = next(q for q in made.store.read("questions", Question) if q.id == "q01")
    assert _pairs(made, [question]) == [Drop("verdicts", "single_reply", "What is 1?")]


def test_loops_are_kept_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = looping(tmp_path, monkeypatch, loops="keep")
    assert "dropped_loop" not in run(made)
    assert made.store.read_dropped("replies") == []
    training = [q for q in made.store.read("questions", Question) if q.split == Split.TRAIN]
    judged = {reply.id for pair in _pairs(made, training) if not isinstance(pair, Drop) for reply in pair[1:]}
    assert any(id.endswith("-r0") for id in judged)


def test_the_diversity_of_the_replies_to_training_questions_is_counted(tmp_path: Path) -> None:
    made = context(tmp_path, max_new_tokens=12)
    counts = run(made)
    texts: dict[str, list[str]] = {q.id: [] for q in made.store.read("questions", Question) if q.split == Split.TRAIN}
    for reply in made.replies().values():
        if reply.question_id in texts:
            texts[reply.question_id].append(reply.text)
    assert {len(found) for found in texts.values()} == {2}
    expected = measure_diversity(texts.values()).means()
    assert {name: counts[name] for name in expected} == expected
    assert 0 < counts["distinct_2"] <= 1
