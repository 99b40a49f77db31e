"""One damaged file in a finished run: whatever reads it says so, and what the message advises works."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from selfeval.cli import app
from slow import slow
from toy import ToyRun, copy_lab, toy_arguments

SCORE = ["--question", "Tom has 3 pens. He buys 2 more. How many pens has he?", "--reply", "5", "--reply", "6"]


def selfeval(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "300"})


@pytest.fixture(scope="module")
def arguments(toy_run: ToyRun) -> list[str]:
    """The command that made `toy_run`."""
    return toy_arguments(toy_run.recipe, toy_run.folder)


@pytest.fixture
def run(toy_run: ToyRun, tmp_path: Path) -> Path:
    return Path(shutil.copytree(toy_run.folder, tmp_path / "run", ignore=shutil.ignore_patterns(".lock")))


def flip_a_bit(path: Path) -> None:
    """Of the exponent of the last number of a safetensors file; of a digit elsewhere."""
    data = bytearray(path.read_bytes())
    if path.suffix == ".safetensors":
        data[-1] ^= 64
    else:
        digits = [i for i, byte in enumerate(data) if chr(byte).isdigit()]
        data[digits[len(digits) // 2]] ^= 1
    path.write_bytes(bytes(data))


READERS = [
    ("roles/evaluator-0/head.safetensors", ["score", "RUN", *SCORE]),
    ("roles/evaluator-0/adapter_model.safetensors", ["score", "RUN", *SCORE]),
    ("roles/evaluator-0/adapter_config.json", ["score", "RUN", *SCORE]),
    ("roles/evaluator-0/evaluator.json", ["score", "RUN", *SCORE]),
    ("roles/evaluator-0/head.safetensors", ["export", "RUN", "--role", "evaluator", "--merge", "--to", "OUT"]),
    ("roles/policy/adapter_model.safetensors", ["export", "RUN", "--role", "policy", "--to", "OUT"]),
    ("pairs/train/shard-00000.jsonl", ["show", "RUN", "pairs"]),
    ("dropped/verdicts/shard-00000.jsonl", ["show", "RUN", "dropped"]),
    ("report.json", ["report", "RUN"]),
    ("metrics/policy.jsonl", ["report", "RUN"]),
    ("run.json", ["score", "RUN", *SCORE]),
    ("metrics/evaluator.jsonl", ["run", "--output", "RUN"]),
    ("verdicts/shard-00001.jsonl", ["run", "--output", "RUN"]),
]
CASES = [*READERS[:2], *(slow(*reader) for reader in READERS[2:])]


@pytest.mark.parametrize(("name", "command"), CASES, ids=lambda part: part if isinstance(part, str) else part[0])
def test_one_flipped_bit_is_named_by_every_reader_and_nothing_is_written(
    run: Path, tmp_path: Path, name: str, command: list[str]
) -> None:
    flip_a_bit(run / name)
    places = {"RUN": str(run), "OUT": str(tmp_path / "out")}
    found = selfeval(*[places.get(word, word) for word in command])
    assert found.exit_code == 2, found.output
    assert f"{run / name} is damaged" in found.output
    assert "Traceback" not in found.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stage", [slow("questions"), slow("replies"), "verdicts"])
def test_a_shard_of_a_killed_stage_that_was_changed_is_refused_and_its_remedy_works(run: Path, stage: str) -> None:
    shards = sorted((run / stage).glob("shard-*.jsonl"))
    assert len(shards) > 1
    before = {path: path.read_bytes() for path in shards}
    for path in (run / stage / "manifest.json", shards[-1]):  # as a kill leaves them
        path.unlink()
    field = {"questions": "text", "replies": "logprob", "verdicts": "probability"}[stage]
    rows = [json.loads(line) for line in shards[0].read_text().splitlines()]
    for row in rows:
        row[field] = f"{row[field]}?" if stage == "questions" else None if row[field] is None else 1 - row[field]
    shards[0].write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    refused = selfeval("run", "--output", run, "--until", stage)
    assert refused.exit_code == 2, refused.output
    assert f"{shards[0]} is damaged: its content does not match its recorded hash; remove this file and rerun the same" in (
        refused.output
    )
    shards[0].unlink()
    found = selfeval("run", "--output", run, "--until", stage)
    assert found.exit_code == 0, found.output
    assert {path: path.read_bytes() for path in shards} == before


def test_a_run_is_resumed_by_its_folder_alone(run: Path) -> None:
    before = json.loads((run / "run.json").read_text())["config"]
    found = selfeval("run", "--output", run)
    assert found.exit_code == 0, found.output
    assert f"Nothing left to do: the run is already finished in {run}" in found.output
    assert json.loads((run / "run.json").read_text())["config"] == before


def test_the_seeds_in_the_folder_are_used_where_the_file_is_gone(tmp_path: Path) -> None:
    recipe, run = copy_lab(tmp_path / "lab"), tmp_path / "run"
    few = ("--set", "questions.train=12", "--set", "questions.test=4")
    assert selfeval(*toy_arguments(recipe, run, "--until", "questions", *few)).exit_code == 0
    Path(json.loads((run / "run.json").read_text())["config"]["seeds"]).unlink()
    found = selfeval("run", "--output", run, "--until", "questions")
    assert found.exit_code == 0, found.output
    assert "is already finished" in found.output


def test_a_forgotten_setting_is_refused_and_both_remedies_work(run: Path) -> None:
    policy = (run / "roles" / "policy" / "adapter_model.safetensors").read_bytes()
    refused = selfeval("run", "--output", run, "--set", "policy.ppo.clip=0.1")
    assert refused.exit_code == 2
    assert "policy.ppo.clip: 0.2, now 0.1" in refused.output
    assert re.search(r"policy \(\d+\.\d s; iterations 4, .*evaluation \(\d+\.\d s", refused.output)
    assert not (run / "replaced").exists()
    advice = re.search(r"settings: (selfeval run --output \S+)\. ", refused.output)
    assert advice
    assert selfeval(*shlex.split(advice.group(1))[1:]).exit_code == 0
    assert (run / "roles" / "policy" / "adapter_model.safetensors").read_bytes() == policy
    again = selfeval("run", "--output", run, "--set", "policy.ppo.clip=0.1", "--restart", "--until", "policy")
    assert again.exit_code == 0, again.output
    assert (run / "roles" / "policy" / "adapter_model.safetensors").read_bytes() != policy
    listed = selfeval("restore", run)
    assert re.search(r"^1: policy \(.*policy\.ppo\.clip: 0\.2, now 0\.1", listed.output)
    restored = selfeval("restore", run, "1")
    assert "restored: policy, evaluation, report" in restored.output
    assert (run / "roles" / "policy" / "adapter_model.safetensors").read_bytes() == policy
    assert "Nothing left to do" in selfeval("run", "--output", run).output


def test_run_json_can_be_rebuilt(run: Path, arguments: list[str]) -> None:
    whole = [*arguments[:3], str(run), *arguments[4:]]
    (run / "run.json").write_text('{"config": [')
    refused = selfeval("run", "--output", run)
    assert refused.exit_code == 2
    assert f"{run / 'run.json'} is damaged" in refused.output
    assert "remove it and rerun the full command" in refused.output
    (run / "run.json").unlink()
    found = selfeval(*whole)
    assert found.exit_code == 0, found.output
    assert "Nothing left to do" in found.output
    assert selfeval("score", run, *SCORE).exit_code == 0


def test_a_sampled_reply_file_that_is_lost_in_the_middle_of_training_is_missed(run: Path) -> None:
    shutil.rmtree(run / "roles" / "policy")
    for name in ("policy/manifest.json", "policy/shard-00001.jsonl"):
        (run / name).unlink()
    refused = selfeval("run", "--output", run)
    assert refused.exit_code == 2
    assert f"{run / 'policy' / 'shard-00001.jsonl'}, which this training wrote before it stopped, is missing" in refused.output
    found = selfeval("run", "--output", run, "--restart", "--until", "policy")
    assert found.exit_code == 0, found.output
    assert (run / "policy" / "shard-00001.jsonl").is_file()


def test_a_dropped_file_is_made_again_as_its_message_advises(run: Path) -> None:
    path = run / "dropped" / "verdicts" / "shard-00000.jsonl"
    before = path.read_bytes()
    path.write_text("{")
    refused = selfeval("run", "--output", run)
    assert refused.exit_code == 2
    assert "remove it and rerun the same command to regenerate it" in refused.output
    os.unlink(path)
    assert selfeval("run", "--output", run).exit_code == 0
    assert path.read_bytes() == before


def test_an_evaluator_that_is_trained_again_to_the_same_weights_keeps_the_policy(run: Path) -> None:
    before = (run / "policy" / "manifest.json").read_bytes()
    weights = (run / "roles" / "evaluator-0" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(run / "roles" / "evaluator-0")
    refused = selfeval("run", "--output", run)
    assert refused.exit_code == 2
    assert re.search(r"evaluator: roles/evaluator-0/\S+ is missing.*Nothing was moved.*--restart", refused.output)
    found = selfeval("run", "--output", run, "--restart")
    assert found.exit_code == 0, found.output
    assert (run / "roles" / "evaluator-0" / "adapter_model.safetensors").read_bytes() == weights
    assert (run / "policy" / "manifest.json").read_bytes() == before


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
@pytest.mark.parametrize("name", ["report.json", "metrics/policy.jsonl", "metrics/mine.jsonl"])
def test_a_page_is_not_drawn_from_a_named_pipe(run: Path, name: str) -> None:
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    found = selfeval("report", run)
    assert found.exit_code == 2
    assert name in found.output
