"""The gate of policy training, with a real evaluator on a tiny model: labels that follow its scores, or do not."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from evidence_records import verdict
from selfeval.config import RunConfig
from selfeval.errors import LoopError
from selfeval.records import Question, Reply, Split, Verdict, VerdictState
from selfeval.stages import policy
from selfeval.stages.context import Context
from selfeval.stages.graph import stage_keys
from selfeval.stages.held_out import score_pairs
from selfeval.stages.policy_gate import check_evaluator
from tiny_runs import run_with_evaluator

PAIRS = 60


def run_of(folder: Path, settings: Mapping[str, Any] | None = None, **options: Any) -> Context:
    """A run with a random evaluator and held-out pairs of replies; their verdicts are written by `judged`."""
    made = run_with_evaluator(folder, RunConfig(policy=settings or {}), **options)
    made.store.write_shard("questions", 0, [Question(f"q{i}", f"What is {i}?", Split.TEST, "self") for i in range(PAIRS)])
    made.store.write_shard("replies", 0, [_reply(i, n) for i in range(PAIRS) for n in (0, 1)])
    return made


def _reply(i: int, n: int) -> Reply:
    draw = random.Random(f"{i}/{n}")
    ids = tuple(draw.randrange(10, 300) for _ in range(6))
    text = "x" * random.Random(f"text {i}/{n}").randrange(4, 40)  # its length says nothing about its score
    return Reply(f"q{i}-r{n}", f"q{i}", text, ids, "sample", 1.0, 1.0, -draw.random(), True)


def judged(run: Context, count: int, better: Callable[[float, int], bool]) -> None:
    """Write kept verdicts: the first reply is better if `better` says so from the evaluator's margin and the pair's number."""
    questions = {q.id: q for q in run.store.read("questions", Question)}
    asked = [verdict(f"q{i}") for i in range(count)]
    margins = [pair.margin for pair in score_pairs(run, asked, questions)]
    found: list[Verdict] = [verdict(f"q{i}", 0.9 if better(m, i) else 0.1) for i, m in enumerate(margins)]
    # Pairs that the gate must not count: the evaluator is right on none of them.
    others = [verdict(f"q{i}", 0.1 if m > 0 else 0.9, VerdictState.UNSURE) for i, m in enumerate(margins)]
    trained = [verdict(f"q{i}", 0.1 if m > 0 else 0.9, split=Split.TRAIN) for i, m in enumerate(margins)]
    run.store.write_shard("verdicts", 0, [*found, *others, *trained])


def agrees(margin: float, number: int) -> bool:
    return margin > 0


def coin(margin: float, number: int) -> bool:
    return random.Random(number).random() < 0.5


def often_longer(margin: float, number: int) -> bool:
    """The evaluator is right on half of the pairs, and the longer reply is better on the others."""
    return margin > 0 if number % 2 else len(_reply(number, 0).text) > len(_reply(number, 1).text)


def test_an_evaluator_that_makes_the_judges_choices_may_train(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    judged(run, PAIRS, agrees)
    check_evaluator(run)


@pytest.mark.parametrize(
    ("count", "better", "said"),
    [
        (PAIRS, coin, r"not shown to beat .* on held-out pairs: its accuracy is .*n = 60\), and the difference"),
        (PAIRS, often_longer, r"not shown to beat picking the longer reply on held-out pairs: .*the difference .*sign test"),
        (5, agrees, r"5 held-out pairs were kept, and a comparison needs at least 6"),
        (0, agrees, r"0 held-out pairs were kept"),
    ],
)
def test_an_evaluator_that_is_not_shown_to_be_useful_trains_no_policy(
    tmp_path: Path, count: int, better: Callable[[float, int], bool], said: str
) -> None:
    run = run_of(tmp_path)
    judged(run, count, better)
    with pytest.raises(LoopError, match=said) as caught:
        policy.run(run)
    assert '--force, or set policy.gate = "off"' in str(caught.value)
    assert 'policy.dpo.pairs = "kept"' in str(caught.value)
    assert not run.role_folder("policy").exists()
    assert not run.checkpoint_folder("policy").exists()


def test_pairs_without_a_preference_are_no_evidence(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    run.store.write_shard("verdicts", 0, [verdict(f"q{i}", 0.5) for i in range(PAIRS)])
    with pytest.raises(LoopError, match="cannot be compared with trivial rules: 0 held-out pairs were kept"):
        check_evaluator(run)


def test_the_gate_is_passed_by_force_a_setting_pairs_or_a_training_that_has_begun(tmp_path: Path) -> None:
    forced = run_of(tmp_path / "forced", force=True)
    judged(forced, PAIRS, coin)
    check_evaluator(forced)
    for name, settings in (("off", {"gate": "off"}), ("dpo", {"learner": "dpo", "dpo": {"pairs": "kept"}})):
        passed = run_of(tmp_path / name, settings)
        judged(passed, PAIRS, coin)
        check_evaluator(passed)
    begun = run_of(tmp_path / "begun")
    judged(begun, PAIRS, coin)
    begun.checkpoint_folder("policy").mkdir(parents=True)
    check_evaluator(begun)  # a forced training that was interrupted resumes without --force


def test_the_gate_is_no_reason_to_train_again() -> None:
    assert stage_keys(RunConfig(policy={"gate": "off"}), []) == stage_keys(RunConfig(), [])
