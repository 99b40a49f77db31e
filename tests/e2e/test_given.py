"""The loop from the user's own questions, replies and pairs, and gold from a file, with the real command at toy size."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from processes import python, selfeval
from selfeval.errors import ConfigError
from selfeval.execution.sandbox import check_sandbox
from slow import slow
from toy import FEW, copy_lab, toy_arguments

NAMES, THINGS = ("Ben", "Mia", "Tom", "Sam"), ("pens", "eggs", "cards")
PROBLEMS = [
    (f"{name} has {a} {thing}. {name} buys {b} more. How many {thing} does {name} have now?", a, b)
    for name, (a, b) in zip(NAMES * 3, ((n + 11, 3 * n + 2) for n in range(12)), strict=True)
    for thing in THINGS
]


def _right(a: int, b: int) -> str:
    return f"{a} + {b} = {a + b}. The answer is {a + b}"


def _wrong(a: int, b: int) -> str:
    return f"{a} + {b} = {a + b + 1}. The answer is {a + b + 1}"


def _line(kind: str, question: str, a: int, b: int) -> dict[str, Any]:
    return {
        "questions": {"question": question, "answer": a + b},
        "replies": {"prompt": question, "replies": [_right(a, b), _wrong(a, b)]},
        "pairs": {"prompt": question, "chosen": _right(a, b), "rejected": _wrong(a, b)},
    }[kind]


def _write(folder: Path, kind: str) -> Path:
    path = folder / f"{kind}.jsonl"
    path.write_text("".join(json.dumps(_line(kind, *problem)) + "\n" for problem in PROBLEMS))
    return path


def _rows(folder: Path, name: str) -> list[dict[str, Any]]:
    lines = [line for path in sorted((folder / name).glob("shard-*")) for line in path.read_bytes().splitlines()]
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_lab(tmp_path_factory.mktemp("given") / "lab")


def _arguments(recipe: Path, folder: Path, kind: str, *more: str) -> list[str]:
    folder.mkdir(exist_ok=True)
    settings = (f"{kind}.file={_write(folder, kind)}", f"gold={_write(folder, 'questions')}", "domain=none", "seeds=none")
    sizes = ("verdicts.keep=0.5", "verdicts.tie=1.0", "policy.iterations=1", "evaluator.epochs=1")
    options = [part for setting in (*settings, *sizes) for part in ("--set", setting)]
    return [*toy_arguments(recipe, folder / "run", sizes=FEW), *options, *more]


@pytest.mark.parametrize("kind", [slow("questions"), slow("replies"), "pairs"])
def test_the_loop_runs_from_a_file_and_is_measured_by_gold_from_a_file(tmp_path: Path, recipe: Path, kind: str) -> None:
    found = selfeval(*_arguments(recipe, tmp_path, kind))
    assert found.returncode == 0, found.stderr
    run = tmp_path / "run"
    questions = _rows(run, "questions")
    assert [q["text"] for q in questions] == [question for question, _, _ in PROBLEMS], "no question was written"
    split = {q["id"]: q["split"] for q in questions}
    assert sorted(split.values()) == ["test"] * 12 + ["train"] * 24  # questions.test=12 to questions.train=24
    ways = {(split[r["question_id"]], r["sampling_method"], r["id"].split("-")[1]) for r in _rows(run, "replies")}
    if kind != "questions":
        files = {(part, "file", number) for part in ("train", "test") for number in ("f0", "f1")}
        assert ways == {*files, ("test", "sample", "r0")}, "of the model's own, one reply to each test question"
    trained = _rows(run, "pairs/train")
    assert {split[p["question_id"]] for p in trained} == {"train"}
    assert {split[p["question_id"]] for p in _rows(run, "pairs/test")} == {"test"}
    assert {split[row["question_id"]] for row in _rows(run, "policy")} == {"train"}
    report = json.loads((run / "report.json").read_text())
    assert report["policy"]["gold_after"]["n"] == 12
    assert report["model"]["gold_file"] == str(tmp_path / "questions.jsonl")
    if kind == "pairs":
        assert {(p["prompt"], p["chosen"], p["rejected"]) for p in trained} <= {
            (question, _right(a, b), _wrong(a, b)) for question, a, b in PROBLEMS
        }
        assert report["verdicts"]["source"] == "file"
        assert "judge" not in report["evaluator"]["baselines"], "no judge was asked"
        assert report["evaluator"]["accuracy_gold"]["value"] == report["evaluator"]["accuracy_judge"]["value"]
        first = [v["probability"] for v in _rows(run, "verdicts")]
        assert set(first) == {0.0, 1.0}, "the better reply is as often the first as the second"
    if kind == "replies":
        assert report["evaluator"]["accuracy_gold"]["n"] == 12


@pytest.mark.slow
def test_unit_tests_are_gold_only_if_the_command_allows_to_run_code(tmp_path: Path, recipe: Path) -> None:
    try:
        check_sandbox()
    except ConfigError as error:
        pytest.skip(str(error))
    arguments = _arguments(recipe, tmp_path, "pairs")
    gold = tmp_path / "tests.jsonl"
    rows = [{"question": question, "tests": ["assert answer()"]} for question, _, _ in PROBLEMS]
    gold.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments += ["--set", f"gold={gold}"]
    refused = selfeval(*arguments)
    assert refused.returncode == 2
    assert "--allow-code-execution" in refused.stderr
    assert not (tmp_path / "run").exists()
    done = selfeval(*arguments, "--allow-code-execution")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["model"]["gold_file"] == str(gold)
    assert (report["policy"]["gold_after"]["value"], report["policy"]["gold_after"]["n"]) == (0.0, 12)
    resumed = selfeval("run", "--output", str(tmp_path / "run"))
    assert resumed.returncode == 2, "no run folder allows it"


WITH_DEAD_GOLD = """
import sys
from selfeval.stages.gold import FileGold

def never(self, question, reply):
    raise RuntimeError("gold was asked")

FileGold.is_right = never
from selfeval.cli import main
sys.argv[0] = "selfeval"
main()
"""


def test_training_never_asks_the_gold_file_and_does_not_depend_on_it(tmp_path: Path, recipe: Path) -> None:
    def run(code: str, *more: str) -> subprocess.CompletedProcess[str]:
        return python(code, *_arguments(recipe, tmp_path, "pairs", *more))

    trained = run(WITH_DEAD_GOLD, "--until", "policy")
    assert trained.returncode == 0, trained.stderr
    policy = (tmp_path / "run" / "policy" / "manifest.json").read_bytes()
    evaluated = run(WITH_DEAD_GOLD)
    assert evaluated.returncode == 1
    assert "gold was asked" in evaluated.stderr
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"question": q, "answer": 1000}) + "\n" for q, _, _ in PROBLEMS))
    again = selfeval(*_arguments(recipe, tmp_path, "pairs", "--set", f"gold={other}"))
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "run" / "policy" / "manifest.json").read_bytes() == policy, "other gold redoes the evaluation only"
    assert json.loads((tmp_path / "run" / "report.json").read_text())["policy"]["gold_after"]["value"] == 0.0
