"""Replies to the seeds against those of the seeds file, with the embedded model."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from selfeval.config import RunConfig
from selfeval.judging.templates import Templates
from selfeval.lab import vocabulary
from selfeval.records import Seed
from selfeval.rollout.requests import Rollout
from selfeval.stages import seed_references
from selfeval.stages.context import Context
from selfeval.stages.graph import stage_keys
from selfeval.stages.seed_references import compare_seed_replies, seed_passes
from selfeval.stages.seeds import replied_seeds
from selfeval.stages.terminal import Terminal
from selfeval.store import RunStore
from selfeval.training.context import POLICY

pytest.importorskip("sacrebleu")

MODEL = Path(vocabulary.__file__).parent / "word_problems"

QUESTIONS = [f"Tom has {n} apples and buys 2 more. How many apples does Tom have now?" for n in range(3, 8)]


def _context(folder: Path, lines: Sequence[Mapping[str, Any]]) -> Context:
    seeds = folder / "seeds.jsonl"
    seeds.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = {"evaluation": {"temperature": 0.01}, "replies": {"max_new_tokens": 24}}
    config = RunConfig(model=str(MODEL), seeds=str(seeds), **settings)
    run = Context(config, RunStore(folder / "run"), Terminal(quiet=True))
    run.backbone.roles.add(POLICY)  # equal to the base until it is trained
    return run


def test_replies_of_the_start_and_the_policy_are_compared_with_those_of_the_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = _context(tmp_path, [{"question": q, **({"reply": "It is 5."} if i else {})} for i, q in enumerate(QUESTIONS)])
    asked: list[tuple[str, list[str]]] = []
    real = seed_references.sample_replies

    def recorded(*arguments: Any, role: str = POLICY, **options: Any) -> list[Rollout]:
        found = real(*arguments, role=role, **options)
        asked.append((role, [run.templates.text(r.reply_ids) for r in found]))
        return found

    monkeypatch.setattr(seed_references, "sample_replies", recorded)
    done: list[int] = []
    scores = compare_seed_replies(run, None, done.append)
    assert scores is not None
    assert sum(done) == seed_passes(run) == 8
    (start, before), (policy, after) = asked
    assert (start, policy) == (run.ensure_start(), POLICY)
    assert start != POLICY
    # At this temperature replies are nearly always those of the greatest probability, and both models are the same.
    assert before == after
    assert [row.difference.n for row in scores.metrics] == [4] * 4
    assert {row.difference.value for row in scores.metrics} == {0.0}


def test_a_reply_equal_to_that_of_the_file_has_the_highest_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _context(tmp_path, [{"question": q, "reply": f"Tom has {i} red apples."} for i, q in enumerate(QUESTIONS)])
    monkeypatch.setattr(Templates, "text", lambda self, ids: "Tom has 4 red apples.")
    scores = compare_seed_replies(run, None, lambda count: None)
    assert scores is not None
    longest = next(row for row in scores.metrics if row.name == "rougeL")
    # One reply of five is equal; in the others, four of five words are.
    assert longest.after.value == pytest.approx((1 + 4 * 0.8) / 5)


def test_only_seeds_with_a_reply_to_their_question_are_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = [Seed("a", "1"), Seed("b"), Seed("c", " "), Seed("d", "2", {"messages": []}), Seed("e", "3", {"topic": "x"})]
    assert replied_seeds(RunConfig(seeds="s.jsonl"), seeds) == [("a", "1"), ("e", "3")]
    assert replied_seeds(RunConfig(seeds="s.jsonl", questions={"file": "s.jsonl"}), seeds) == []
    run = _context(tmp_path, [{"question": q} for q in QUESTIONS])
    monkeypatch.setattr(seed_references, "sample_replies", None)
    assert compare_seed_replies(run, None, lambda count: None) is None
    assert seed_passes(run) == 0


def test_a_seed_that_leaves_no_room_for_a_reply_is_not_asked(tmp_path: Path) -> None:
    run = _context(tmp_path, [{"question": QUESTIONS[0], "reply": "5"}, {"question": QUESTIONS[1] * 200, "reply": "6"}])
    assert seed_passes(run) == 2


def test_without_the_libraries_a_run_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, notes = _context(tmp_path, [{"question": QUESTIONS[0], "reply": "5"}]), list[str]()
    monkeypatch.setattr(run.terminal, "note", notes.append)
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    monkeypatch.setattr(seed_references, "sample_replies", None)  # no reply is sampled that could not be compared
    assert seed_passes(run) == 0
    assert compare_seed_replies(run, None, lambda count: None) is None
    [note] = notes
    assert "replies to the seeds are not compared" in note


def test_the_replies_of_the_seeds_change_the_evaluation_alone() -> None:
    config = RunConfig()
    bare, one, other = (stage_keys(config, [Seed("a", reply), Seed("b")]) for reply in (None, "1", "2"))
    changed = {name for name in bare if bare[name] != one[name]}
    assert changed == {name for name in bare if one[name] != other[name]} == {"evaluation", "report"}
