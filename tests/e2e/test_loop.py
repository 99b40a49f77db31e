"""The whole loop with the real command, on the embedded model at toy size."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from processes import python, selfeval, start
from selfeval.report.metrics import METRICS
from selfeval.report.reading import read_report
from selfeval.runs.reader import RunReader
from toy import FEW, ToyRun, toy_arguments

STAGES = ("questions", "replies", "verdicts", "pairs", "evaluator", "policy", "evaluation", "report")


def _evidence(folder: Path) -> dict[str, Any]:
    """report.json without what a clock or another process's memory decides."""
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    del report["time"], report["memory"]["peak_bytes"]
    return report


def _times(folder: Path) -> dict[str, int]:
    """When each stage's manifest was written."""
    return {stage: (folder / stage / "manifest.json").stat().st_mtime_ns for stage in STAGES}


def _without_seconds(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


@pytest.fixture(scope="module")
def recipe(toy_run: ToyRun) -> Path:
    return toy_run.recipe


@pytest.fixture(scope="module")
def finished(toy_run: ToyRun) -> Path:
    """An undisturbed run; tests that change it work on a copy."""
    return toy_run.folder


def test_the_command_ends_with_a_table(toy_run: ToyRun) -> None:
    assert f"Report: {toy_run.folder / 'index.html'}" in toy_run.out
    rows = dict(line.split("\t") for line in toy_run.out.splitlines() if "\t" in line)
    assert {"evaluator accuracy, gold labels", "win rate, after vs. before", "peak memory"} <= set(rows)


def test_a_run_leaves_everything_that_the_design_promises(finished: Path) -> None:
    run = json.loads((finished / "run.json").read_text())
    assert run["status"] == "finished"
    assert {name: row["state"] for name, row in run["stages"].items()} == dict.fromkeys(STAGES, "finished")
    for role in ("evaluator-0", "policy"):
        assert (finished / "roles" / role / "adapter_model.safetensors").is_file()
    assert (finished / "index.html").stat().st_size > 10_000
    assert not list(finished.rglob("*.part"))


def test_the_report_has_the_agreed_figures(finished: Path) -> None:
    report = _evidence(finished)
    assert report["schema"] == 1
    figures = {
        "evaluator": ("accuracy_gold", "accuracy_judge"),
        "policy": ("win_rate", "length_controlled", "gold_before", "gold_after", "kl", "length_ratio"),
    }
    for section, names in figures.items():
        for name in names:
            assert {"value", "ci_low", "ci_high", "n"} <= set(report[section][name]), f"{section}.{name}"
    assert set(report["evaluator"]["baselines"]) == {"longer_wins", "first_wins", "mean_logprob", "ngram", "judge"}
    verdicts = report["verdicts"]
    assert verdicts["judged"] == sum(verdicts[state] for state in ("kept", "tie", "unsure", "unparsable"))
    assert report["policy"]["gold_after"]["n"] <= 16
    assert report["memory"]["weight_copies"] == 1
    assert report["memory"]["shared_prompts"]


def test_the_schema_reads_the_report_of_a_run_and_writes_the_same_bytes(finished: Path) -> None:
    report = read_report(finished / "report.json")
    assert json.dumps(report.as_json(), indent=2, ensure_ascii=False) + "\n" == (finished / "report.json").read_text("utf-8")
    assert report.schema_number == 1


def test_every_logged_metric_is_in_the_table_of_the_docs(finished: Path) -> None:
    logged = {
        path.stem: set(_without_seconds(path)[0]) for path in (finished / "metrics").glob("*.jsonl") if path.stat().st_size
    }
    assert {"evaluator", "policy", "evaluation"} <= set(logged)
    for stage, keys in logged.items():
        assert keys - {metric.name for metric in METRICS[stage]} == set(), f"metrics/{stage}.jsonl"


def test_test_questions_are_never_trained_on(finished: Path) -> None:
    def rows(name: str) -> list[dict[str, Any]]:
        lines = [line for path in sorted((finished / name).glob("shard-*")) for line in path.read_bytes().splitlines()]
        return [json.loads(line) for line in lines]

    split = {row["id"]: row["split"] for row in rows("questions")}
    assert sorted(split.values()) == ["test"] * 16 + ["train"] * 48
    assert {row["split"] for row in rows("pairs/train")} == {"train"}
    assert {row["split"] for row in rows("pairs/test")} == {"test"}
    pairs = rows("pairs/train") + rows("pairs/test")
    assert all(split[row["question_id"]] == row["split"] for row in pairs)
    trained = json.loads((finished / "evaluator" / "manifest.json").read_text())["counts"]
    assert trained["trained"] + trained["held_out"] == sum(row["split"] == "train" for row in pairs)
    assert {split[row["question_id"]] for row in rows("policy")} == {"train"}


def test_the_same_command_again_says_that_it_is_finished(finished: Path, recipe: Path) -> None:
    before = _times(finished)
    found = selfeval(*toy_arguments(recipe, finished))
    assert found.returncode == 0
    assert f"Nothing left to do: the run is already finished in {finished}." in found.stdout
    assert _times(finished) == before


@pytest.mark.slow
def test_a_run_with_most_layers_on_disk_gives_the_same_evidence(finished: Path, recipe: Path, tmp_path: Path) -> None:
    # 320 KiB beside the layers, 710 KiB each: room for one that stays and one that a pass brings in; four are on disk.
    found = selfeval(*toy_arguments(recipe, tmp_path / "run", "--set", "backbone.placement.max_memory.cpu=1900KiB"))
    assert found.returncode == 0, found.stderr
    assert "layer 0 on cpu, layers 1-4 on disk" in found.stderr
    assert "meta device" not in found.stdout + found.stderr
    device = json.loads((tmp_path / "run" / "run.json").read_text())["device"]
    assert device["placement"]["layers"] == [["0", "cpu"], ["1-4", "disk"]]
    assert json.loads((finished / "run.json").read_text())["device"]["placement"]["layers"] == [["0-4", "cpu"]]
    placed, whole = _evidence(tmp_path / "run"), _evidence(finished)
    assert placed["config"]["backbone"].pop("placement") != whole["config"]["backbone"].pop("placement")
    assert placed == whole


def _kill_in(stage: str, arguments: list[str], folder: Path, milestone: str, delay: float) -> None:
    """Starts the run and kills it in the middle of `stage`, `delay` seconds after `milestone` has appeared in its folder."""
    process = start(arguments)
    try:
        deadline = time.monotonic() + 200
        while not list(folder.glob(milestone)) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(delay)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL, "killed while it ran"
    assert list(folder.glob(milestone)), "what the next try goes on from"
    assert not (folder / stage / "manifest.json").exists(), f"{stage} was over too early for this test to mean anything"


def test_a_run_killed_three_times_ends_where_an_undisturbed_one_does(finished: Path, recipe: Path, tmp_path: Path) -> None:
    """Once between two shards, and in both trainings after a checkpoint, so that every kind of resuming is used."""
    folder, rng = tmp_path / "run", random.Random(7)
    arguments = toy_arguments(recipe, folder)
    _kill_in("replies", arguments, folder, "replies/shard-*", 0.0)
    for stage, checkpoints in (("evaluator", "evaluator/evaluator-0"), ("policy", "policy")):
        _kill_in(stage, arguments, folder, f"checkpoints/{checkpoints}/step-*", rng.uniform(0.0, 0.1))
    found = selfeval(*arguments)
    assert found.returncode == 0, found.stderr
    assert _evidence(folder) == _evidence(finished)
    for name in ("evaluator", "policy", "evaluation"):
        path = f"metrics/{name}.jsonl"
        assert _without_seconds(folder / path) == _without_seconds(finished / path)
    for role in ("evaluator-0", "policy"):
        path = f"roles/{role}/adapter_model.safetensors"
        assert (folder / path).read_bytes() == (finished / path).read_bytes()


def test_a_changed_policy_redoes_the_policy_and_what_follows(finished: Path, recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder, ignore=shutil.ignore_patterns(".lock"))
    before = _times(folder)
    refused = selfeval(*toy_arguments(recipe, folder, "--set", "policy.iterations=2"))
    assert refused.returncode == 2
    assert "policy.iterations: 4, now 2. Continuing moves these results to" in refused.stderr
    assert _times(folder) == before
    found = selfeval(*toy_arguments(recipe, folder, "--set", "policy.iterations=2", "--restart"))
    assert found.returncode == 0, found.stderr
    after = _times(folder)
    assert [stage for stage in STAGES if after[stage] != before[stage]] == ["policy", "evaluation", "report"]
    said = [line.split(":")[0] for line in found.stderr.splitlines() if "the configuration has changed" in line]
    assert said == ["policy", "evaluation", "report"]
    assert len((folder / "metrics" / "policy.jsonl").read_text().splitlines()) == 2
    kept = [path.relative_to(folder / "replaced") for path in (folder / "replaced").rglob("report.json")]
    assert [str(path) for path in kept] == ["1/report.json"]
    assert (folder / "replaced" / "1" / "roles" / "policy" / "adapter_model.safetensors").read_bytes() == (
        finished / "roles" / "policy" / "adapter_model.safetensors"
    ).read_bytes()


def test_a_second_process_is_refused_while_one_runs(recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    arguments = toy_arguments(recipe, folder, "--set", "policy.iterations=4000", "--set", "policy.kl_target=1000")
    first = start(arguments)
    try:
        deadline = time.monotonic() + 200
        while not (folder / "run.json").exists() and first.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        second = selfeval(*arguments)
        assert second.returncode == 2
        said = second.stderr.splitlines()[-1]
        assert said.startswith(f"Error: another process is using {folder} (process ")
        assert said.endswith("; wait for it, or use another folder")
        assert first.poll() is None, "the first one goes on"
        looked = selfeval("show", str(folder), "questions")
        assert looked.returncode in (0, 2)
        assert "another process" not in looked.stderr
    finally:
        first.kill()
        first.communicate()


STAGE_BY_STAGE = """
import sys
from pathlib import Path
from selfeval.cli import main

stages, arguments = sys.argv[1].split(), sys.argv[2:]
folder = Path(arguments[arguments.index("--output") + 1])
for stage in stages:
    sys.argv = ["selfeval", *arguments, "--quiet", "--until", stage]
    try:
        main()
    except SystemExit as end:
        written = [name for name in stages if (folder / name / "manifest.json").exists()]
        status = "finished" if '"status": "finished"' in (folder / "run.json").read_text() else "partial"
        print("AFTER", end.code, status, *written)
"""


@pytest.mark.slow
def test_until_works_stage_by_stage(finished: Path, recipe: Path, tmp_path: Path) -> None:
    """Every stage with a command and a model of its own (in one child process, because importing is what takes long)."""
    found = python(STAGE_BY_STAGE, " ".join(STAGES), *toy_arguments(recipe, tmp_path / "run"))
    assert found.returncode == 0, found.stderr
    after = [line.split()[1:] for line in found.stdout.splitlines() if line.startswith("AFTER ")]
    expected = [["0", "partial", *STAGES[:number]] for number in range(1, len(STAGES))]
    assert after == [*expected, ["0", "finished", *STAGES]]
    assert _evidence(tmp_path / "run") == _evidence(finished)


def test_show_score_and_report_work_on_a_finished_run(finished: Path, tmp_path: Path) -> None:
    shown = selfeval("show", str(finished), "pairs", "-n", "2")
    assert shown.returncode == 0
    assert shown.stdout.count('"chosen"') == 2
    question = "Tom has 3 pens. He buys 2 more. How many pens does Tom have now?"
    scored = selfeval("score", str(finished), "--question", question, "--reply", "The answer is 5", "--reply", "Well, 6")
    assert scored.returncode == 0, scored.stderr
    lines = scored.stdout.splitlines()
    assert [line.split("  ", 1)[1] for line in lines[:2]] == ["The answer is 5", "Well, 6"]
    assert lines[2].startswith("preferred: ")
    assert lines[2].endswith("not calibrated: too few held-out pairs to fit a temperature)")  # 1 pair is held out
    folder = tmp_path / "run"
    shutil.copytree(finished, folder, ignore=shutil.ignore_patterns(".lock"))
    (folder / "index.html").unlink()
    drawn = selfeval("report", str(folder))
    assert drawn.stdout == f"Report: {folder / 'index.html'}\n"
    assert (folder / "index.html").read_bytes() == (finished / "index.html").read_bytes()


@pytest.mark.slow
def test_an_on_policy_run_gets_its_report(recipe: Path, tmp_path: Path) -> None:
    """One step per iteration: the KL of an update is float32 rounding, about 1e-13, and the chart of it must be drawn."""
    folder = tmp_path / "run"
    small = ("policy.epochs=1", "policy.minibatch=128", "policy.iterations=2", "evaluator.epochs=1")
    found = selfeval(*toy_arguments(recipe, folder, *(part for size in small for part in ("--set", size)), sizes=FEW))
    assert found.returncode == 0, found.stderr
    page, report = (folder / "index.html").read_text(), json.loads((folder / "report.json").read_text())
    assert "could not be drawn" not in page
    assert report["prompts"]["referee.jinja"] == (folder / "templates" / "referee.jinja").read_text() != ""
    assert "<code>referee.jinja</code>" in page
    kls = [json.loads(line)["approximate_kl"] for line in (folder / "metrics" / "policy.jsonl").read_text().splitlines()]
    assert len(kls) == 2
    assert all(abs(kl) < 1e-9 for kl in kls)  # otherwise this is not the case that it wants to be


def _scores(*arguments: str, given: str = "") -> list[dict[str, Any]]:
    found = selfeval("score", *arguments, "--json", given=given)
    assert found.returncode == 0, found.stderr
    return [json.loads(line) for line in found.stdout.splitlines()]


def test_score_reads_json_lines_and_gives_each_what_it_gets_alone(finished: Path, tmp_path: Path) -> None:
    """Alone and in batches of any size: padding and neighbours change no score beyond rounding."""
    question = "Tom has {n} pens. He buys 2 more. How many pens does Tom have now?"
    asked = [
        {"id": n, "question": question.replace("{n}", str(n)), "replies": [f"The answer is {n + 2}", f"{n} + 2 = {n + 3}"]}
        for n in range(3, 8)
    ]
    asked.append({"question": "Why?", "reply": "So.\u001b[31m"})
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in asked))
    together = _scores(str(finished), "--file", str(path))
    assert [{k: row[k] for k in line} for row, line in zip(together, asked, strict=True)] == asked, "its own fields, in order"
    streamed = _scores(str(finished), "--file", "-", "--batch", "1", given=path.read_text())
    (alone,) = _scores(
        str(finished), "--question", asked[0]["question"], *(p for r in asked[0]["replies"] for p in ("--reply", r))
    )
    for one, other in [*zip(together, streamed, strict=True), (together[0], alone)]:
        assert one["scores"] == pytest.approx(other["scores"], abs=1e-4)
        assert one["preferred"] == other["preferred"]
    for row in together[:-1]:
        assert row["preferred"] == (0 if row["scores"][0] > row["scores"][1] else 1)
        assert 0.5 <= row["confidence"] <= 1.0
        assert row["unsure"] == (row["confidence"] < 0.8)
    assert together[-1]["preferred"] is None
    shown = selfeval("score", str(finished), "--file", str(path))
    assert r"So.\x1b[31m" in shown.stdout
    assert "\x1b" not in shown.stdout


def test_show_and_report_print_json(finished: Path) -> None:
    rows = [json.loads(line) for line in selfeval("show", str(finished), "replies", "--json", "-n", "3").stdout.splitlines()]
    first = (finished / "replies" / "shard-00000.jsonl").read_text().splitlines()[:3]
    assert rows == [json.loads(line) for line in first]
    assert all(isinstance(token, int) for row in rows for token in row["ids"])
    printed = selfeval("report", str(finished), "--json")
    assert json.loads(printed.stdout) == json.loads((finished / "report.json").read_text())


# -- compare ------------------------------------------------------------------------------------------------------------


def test_compare_says_who_is_no_independent_judge_and_refuses_questions_of_the_training(finished: Path, tmp_path: Path) -> None:
    rows, asked = list(RunReader(finished).rows("questions")), tmp_path / "asked.jsonl"
    train = next(row["text"] for row in rows if row["split"] == "train")
    asked.write_text(json.dumps({"question": train}) + "\n")
    compared = ["compare", str(finished), f"{finished}@base", "--json"]
    refused = selfeval(*compared, "--questions", str(asked))
    assert refused.returncode == 2
    assert "a policy was trained on each of the 1 common questions" in refused.stderr
    done = selfeval(*compared, "--judge", "judge", "--judge", "evaluator", "--limit", "2")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["questions"]["used"] == 2
    assert json.loads(done.stdout)["notes"] == [
        f"the judge of {finished} labelled the pairs that its policy learned from, so it is no independent judge of {finished}",
        f"the evaluator of {finished} was the reward of its policy, so it is no independent judge of {finished}",
    ]


def test_compare_ranks_runs_their_base_and_a_file_and_resumes(finished: Path, tmp_path: Path) -> None:
    other, wrong, output = tmp_path / "other", tmp_path / "wrong.jsonl", tmp_path / "out"
    shutil.copytree(finished, other, ignore=shutil.ignore_patterns(".lock"))
    test = list(RunReader(finished).rows("questions", split="test"))
    wrong.write_text("".join(json.dumps({"question": q["text"], "reply": "The answer is 987654."}) + "\n" for q in test))
    policies = [str(finished), str(other), f"{finished}@base", str(wrong)]
    asked = ["compare", *policies, "--judge", "referee", "--judge", "gold", "--output", str(output)]
    done = selfeval(*asked, "--json")
    assert done.returncode == 0, done.stderr
    found, report = json.loads(done.stdout), _evidence(finished)
    assert found == json.loads((output / "comparison.json").read_text())
    assert found["questions"] == {"used": 16, "common": 16, "left_out_trained": 0, "left_out_missing": 0}
    # The base's replies are those of the run, so they are as often right as its report says; no reply of the file is.
    assert found["gold"]["accuracy"][f"{finished}@base"] == report["policy"]["gold_before"]
    assert found["gold"]["accuracy"][str(wrong)]["value"] == 0
    referee, gold = found["judges"]
    for judge in (referee, gold):
        assert len(judge["pairs"]) == 6
        assert all(sum(pair[name] for name in ("win", "tie", "loss", "unparsable")) == 16 for pair in judge["pairs"])
    assert gold["ranking"][-1]["name"] == str(wrong)
    # A copy of a run is the same policy, whose replies are sampled once.
    assert (referee["pairs"][0]["second"], referee["pairs"][0]["tie"]) == (str(other), 16)
    assert len(list(output.glob("replies-*"))) == 1
    assert found["agreement"]["n"] > 0
    assert not found["notes"]
    # Everything is known now: the same command loads nothing, and prints one line per row.
    shards = {path: path.stat().st_mtime_ns for path in output.glob("*/shard-*.jsonl")}
    again = selfeval(*asked)
    assert again.returncode == 0, again.stderr
    assert "loading" not in again.stderr
    assert {path: path.stat().st_mtime_ns for path in output.glob("*/shard-*.jsonl")} == shards
    rows = [line.split("\t") for line in again.stdout.splitlines() if "\t" in line]
    assert [row[1] for row in rows if row[0] == "rank"][:4] == [place["name"] for place in referee["ranking"]]
    assert sum(row[0] == "pair" for row in rows) == 12
    assert "could not be drawn" not in (output / "index.html").read_text()
