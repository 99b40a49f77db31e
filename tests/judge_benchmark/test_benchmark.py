"""A benchmark of the embedded model's judge: resume after a kill, refusals, and log-probs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import selfeval
from selfeval.cli.app import app
from selfeval.errors import ConfigError, DataError, InputError, RunFolderError
from selfeval.judge_benchmark import benchmark
from selfeval.judge_benchmark.benchmark import JudgeBenchmark, benchmark_judge
from selfeval.judge_benchmark.judging import JudgeLabelled, Outcome
from selfeval.records import from_json
from toy import LAB

MODEL = str(LAB / "word_problems")
SETTINGS = ("verdicts.reasoning=false", "verdicts.label_mass=0")


def _row(number: int) -> dict[str, Any]:
    question = f"Tom has {number} pens. He buys 2 more. How many pens does Tom have now?"
    good, bad = f"{number} + 2 = {number + 2}. The answer is {number + 2}.", f"{number} - 2 = 1. The answer is 1."
    return {"question": question, "chosen": good, "rejected": bad, "subset": "even" if number % 2 == 0 else "odd"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("".join(json.dumps(_row(number)) + "\n" for number in range(4, 10)))
    return path


def measured(data: Path, output: Path | None = None, **more: Any) -> JudgeBenchmark:
    return benchmark_judge(data, **{"model": MODEL, "settings": SETTINGS, "output": output, "progress": False, **more})


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[JudgeBenchmark, Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "SHARD", 2)
        output = tmp_path_factory.mktemp("benchmark") / "whole"
        return measured(data, output), output


def outcomes(folder: Path) -> list[Outcome]:
    lines = [line for path in sorted(folder.glob("judgements/shard-*.jsonl")) for line in path.read_text().splitlines()]
    return [from_json(Outcome, json.loads(line)) for line in lines]


@pytest.mark.slow  # loads the model again
def test_the_figures_are_of_the_judgements_in_the_folder(whole: tuple[JudgeBenchmark, Path], data: Path) -> None:
    result, folder = whole
    found = outcomes(folder)
    assert len(found) == result.measured.pairs == 6
    assert json.loads((folder / "benchmark.json").read_text()) == result.as_json()
    # The judge of the API on the same pairs.
    judge = selfeval.Judge(*_parts())
    for row, outcome in zip(map(json.loads, data.read_text().splitlines()), found, strict=True):
        probability = judge.compare(row["question"], row["chosen"], row["rejected"]).probability
        assert probability is not None
        assert outcome.judgement.probability in (
            pytest.approx(probability, abs=1e-4),
            pytest.approx(1 - probability, abs=1e-4),
        )
    assert set(result.measured.subsets) == {"even", "odd"}


def _parts() -> tuple[Any, Any, Any, Any]:
    from datetime import date

    from selfeval.judge_benchmark.subject import subject_of

    subject = subject_of(None, MODEL, None, SETTINGS)
    loaded = subject.load(date(2026, 1, 1))
    return loaded.backbone, loaded.templates, subject.config, MODEL


def test_the_base_finds_the_right_reply_more_likely_and_its_log_probs_are_means(whole: tuple[JudgeBenchmark, Path]) -> None:
    result, folder = whole
    logprobs = [value for outcome in outcomes(folder) for value in outcome.logprobs]
    # Per token: sums over the 15 tokens of a reply would be far lower.
    assert all(value is not None and -8 < value < 0 for value in logprobs)
    assert result.measured.baselines["mean_logprob"].value == 1.0


def test_a_killed_benchmark_resumes_and_computes_only_what_is_left(
    whole: tuple[JudgeBenchmark, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "SHARD", 2)
    shards: list[int] = []
    work = JudgeLabelled.__call__

    def killed(self: JudgeLabelled, model: Any, batch: Any) -> Any:
        shards.append(batch.index)
        if shards == [0, 1]:
            raise KeyboardInterrupt
        return work(self, model, batch)

    monkeypatch.setattr(JudgeLabelled, "__call__", killed)
    with pytest.raises(KeyboardInterrupt):
        measured(data, tmp_path / "out")
    resumed = measured(data, tmp_path / "out")
    assert shards == [0, 1, 1, 2]
    assert resumed == whole[0]
    # A finished one judges nothing, with another threshold neither.
    assert measured(data, tmp_path / "out", sure=0.5).measured.scores.coverage.value == 1.0
    assert shards == [0, 1, 1, 2]


def test_results_of_other_settings_are_refused(whole: tuple[JudgeBenchmark, Path], data: Path) -> None:
    for more in ({"settings": SETTINGS[:1]}, {"limit": 3}, {"judge": "referee"}):
        with pytest.raises(RunFolderError, match="has results of another judge, other settings or other pairs"):
            measured(data, whole[1], **more)


@pytest.mark.parametrize(
    ("more", "error", "said"),
    [
        ({"model": None}, InputError, "pass either the folder of a run, or --model MODEL"),
        ({"judge": "pairwize"}, ConfigError, 'did you mean "pairwise"'),
        ({"sure": 0.3}, InputError, r"sure must be between 0\.5 and 1, got 0\.3"),
        ({"limit": 0}, InputError, "limit must be at least 1, got 0"),
        ({"model": None, "run": "no-such-run", "settings": ()}, RunFolderError, "no-such-run"),
        ({"model": None, "run": "runs", "judge": "pairwise", "settings": ()}, InputError, 'a run has no judge "pairwise"'),
        ({"model": None, "run": "runs"}, InputError, "remove --set verdicts.reasoning=false"),
    ],
)
def test_arguments_are_checked(more: dict[str, Any], error: type[Exception], said: str, data: Path) -> None:
    with pytest.raises(error, match=said):
        measured(data, **more)


def test_a_file_without_labels_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "open.jsonl"
    path.write_text('{"question": "Q", "first": "a", "second": "b", "label": null}\n')
    with pytest.raises(DataError, match=r"no pair of .* has a label of the majority"):
        measured(path)


def test_the_command_prints_tables_and_json(whole: tuple[JudgeBenchmark, Path], data: Path) -> None:
    settings = [part for one in SETTINGS for part in ("--set", one)]
    command = ["benchmark-judge", "--model", MODEL, *settings, "--data", str(data), "--output", str(whole[1]), "--quiet"]
    runner = CliRunner()
    shown, printed = runner.invoke(app, command), runner.invoke(app, [*command, "--json"])
    assert (shown.exit_code, printed.exit_code) == (0, 0)
    assert json.loads(printed.stdout) == whole[0].as_json()
    for text in ("6 pairs", "baseline: the longer reply", "judge minus chance level", "even", "odd"):
        assert text in shown.stdout
    missing = runner.invoke(app, ["benchmark-judge", "--model", MODEL, "--data", "llmbar"])
    assert missing.exit_code == 2
    assert "--file PATH" in missing.output
