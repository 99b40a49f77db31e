"""Two rounds with the real command, on the embedded model at toy size."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from processes import selfeval, start
from toy import FEW, copy_lab, toy_arguments

SIZES = (*FEW, "policy.iterations=1", "evaluator.epochs=1")
QUESTION = "Tom has 3 pens. He buys 2 more. How many pens does Tom have now?"


def _arguments(recipe: Path, output: Path, *more: str) -> list[str]:
    return toy_arguments(recipe, output, *more, sizes=SIZES)


def _evidence(folder: Path) -> dict[str, Any]:
    """report.json without what a clock or another process's memory decides."""
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    del report["time"], report["memory"]["peak_bytes"]
    return report


def _rows(folder: Path, name: str) -> list[dict[str, Any]]:
    lines = [line for path in sorted((folder / name).glob("shard-*")) for line in path.read_bytes().splitlines()]
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_lab(tmp_path_factory.mktemp("rounds") / "lab")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, recipe: Path) -> Path:
    """A run of one round that goes on with a second one."""
    folder = tmp_path_factory.mktemp("rounds") / "run"
    one = selfeval(*_arguments(recipe, folder))
    assert one.returncode == 0, one.stderr
    assert "rounds" not in _evidence(folder)
    policy = (folder / "policy" / "manifest.json").read_bytes()
    two = selfeval(*_arguments(recipe, folder, "--set", "rounds=2"))
    assert two.returncode == 0, two.stderr
    assert (folder / "policy" / "manifest.json").read_bytes() == policy
    assert "By gold, on round 1's pairs, the evaluator" in two.stdout.replace("\n", " ")
    return folder


def test_the_second_round_is_a_run_of_its_own_and_the_report_has_both(finished: Path) -> None:
    second = finished / "rounds" / "02"
    for folder in (finished, second):
        assert json.loads((folder / "run.json").read_text())["status"] == "finished"
        assert _evidence(folder)["memory"]["weight_copies"] == 1  # the first round's base has left the memory
    rows = _evidence(finished)["rounds"]
    assert [(row["round"], row["folder"]) for row in rows] == [(1, "."), (2, "rounds/02")]
    for row, folder in zip(rows, (finished, second), strict=True):
        report = _evidence(folder)
        assert row["evaluator"]["accuracy_gold"] == report["evaluator"]["accuracy_gold"]
        assert row["evaluator"]["accuracy_gold_first_pairs"] == report["evaluator"]["first_pairs"]["accuracy_gold"]
        assert {name: report["policy"][name] for name in row["policy"]} == row["policy"]
    on_first = [row["evaluator"]["accuracy_gold_first_pairs"]["n"] for row in rows]
    assert on_first[0] == on_first[1] == rows[0]["evaluator"]["accuracy_gold"]["n"] > 0
    assert (rows[0]["evaluator"]["gain"], rows[1]["evaluator"]["gain"]["n"]) == (None, on_first[0])
    assert "Round by round" in (finished / "index.html").read_text()
    assert "Round by round" not in (second / "index.html").read_text()


def test_the_test_questions_are_those_of_round_one_and_never_trained_on(finished: Path) -> None:
    second = finished / "rounds" / "02"
    first, later = ({q["id"]: q for q in _rows(folder, "questions")} for folder in (finished, second))
    tests = {name: q for name, q in first.items() if q["split"] == "test"}
    assert len(tests) == 12
    assert {name: q for name, q in later.items() if q["split"] == "test"} == tests
    new = {name for name, q in later.items() if q["split"] == "train"}
    assert len(new) == 24
    assert not new & set(first)
    assert not {later[name]["text"] for name in new} & {q["text"] for q in first.values()}
    assert {row["question_id"] for row in _rows(second, "policy")} <= new
    trained = json.loads((second / "evaluator" / "manifest.json").read_text())["counts"]
    pairs = [p for folder in (finished, second) for p in _rows(folder, "pairs/train")]
    assert trained["trained"] + trained["held_out"] == len(pairs)


def test_the_evaluator_of_a_round_scores_and_the_round_is_not_gone_on_with(finished: Path, recipe: Path) -> None:
    second = finished / "rounds" / "02"
    scored = selfeval("score", str(second), "--question", QUESTION, "--reply", "The answer is 5", "--reply", "Well, 6")
    assert scored.returncode == 0, scored.stderr
    assert scored.stdout.splitlines()[-1].startswith("preferred: ")
    refused = selfeval(*_arguments(recipe, second, "--set", "rounds=2"))
    assert (refused.returncode, "is round 2 of a run" in refused.stderr) == (2, True)


@pytest.mark.slow
def test_a_run_killed_after_its_first_round_and_in_its_second_ends_the_same(
    finished: Path, recipe: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    arguments = _arguments(recipe, folder, "--set", "rounds=2")
    for milestone in ("report/manifest.json", "rounds/02/checkpoints/policy/step-*"):
        process = start(arguments)
        deadline = time.monotonic() + 280
        while not list(folder.glob(milestone)) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "killed while it ran"
    assert not (folder / "rounds" / "02" / "policy" / "manifest.json").exists()
    found = selfeval(*arguments)
    assert found.returncode == 0, found.stderr
    for name in (".", "rounds/02"):
        assert _evidence(folder / name) == _evidence(finished / name)
    for role in ("evaluator-0", "policy"):
        path = f"rounds/02/roles/{role}/adapter_model.safetensors"
        assert (folder / path).read_bytes() == (finished / path).read_bytes()
