"""`selfeval check` as a command: the embedded model is recommended, models that cannot judge are not, for the right reasons."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tiny_llama
from processes import selfeval
from toy import LAB

SHORT = ("questions.max_new_tokens=8", "replies.max_new_tokens=8", "verdicts.max_new_tokens=8", "verdicts.reasoning=false")
STORIES = Path(__file__).resolve().parents[3] / "shared" / "models" / "stories260K"


def checked(tmp_path: Path, *arguments: str, code: int) -> dict[str, Any]:
    """Run the check without progress, and return its JSON."""
    output = tmp_path / "check.json"
    done = selfeval("check", *arguments, "--quiet", "--output", str(output))
    assert done.returncode == code, done.stdout + done.stderr
    values: dict[str, Any] = json.loads(output.read_text("utf-8"))
    # One screen ends with the recommendation, which the file has too.
    assert (values["command"] or "This model is not shown to judge this domain") in done.stdout
    assert list(tmp_path.glob("runs")) == []
    return values


@pytest.mark.slow
def test_the_embedded_model_is_recommended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    batch = ("--set", "backbone.rollout_batch_size=64")
    try:
        values = checked(tmp_path, "--minutes", "1", *batch, code=0)
    except AssertionError:  # the budget is wall time, and a busy machine judges too few pairs in it
        values = checked(tmp_path, "--minutes", "5", *batch, code=0)
    judges = {judge["name"]: judge for judge in values["measures"]["judges"]}
    assert values["command"] == f"selfeval run --set backbone.rollout_batch_size=64 --set verdicts.judge={values['judge']}"
    gold = judges[values["judge"]]["gold"]
    assert gold["finding"] == "better"
    # Its labels are right in 99% of the cases (README), and half of its replies are wrong.
    assert gold["losses"] <= 1
    assert judges[values["judge"]]["gap"]["difference"]["ci_low"] > 0
    assert values["measures"]["questions"]["in_domain"]["value"] > 0.8
    assert values["time"]["seconds"] > 0
    assert values["memory"]["fits"]


@pytest.mark.slow
def test_a_random_model_is_rejected_because_it_cannot_write_or_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_llama.write(tmp_path / "model")
    settings = [part for value in (*SHORT, "backbone.rollout_batch_size=16") for part in ("--set", value)]
    values = checked(tmp_path, "model", str(LAB / "seeds.jsonl"), "--minutes", "0.2", *settings, code=3)
    assert (values["recommended"], values["judge"]) == (False, None)
    said = " ".join(values["reasons"])
    assert "it does not write usable questions: 0.0%" in said
    assert "its replies do not end" in said
    assert "pairwise: none of its" in said
    assert any("use a stronger model" in remedy for remedy in values["remedies"])
    # Nothing is left behind but what was asked for.
    assert {path.name for path in tmp_path.iterdir()} == {"model", "check.json"}


@pytest.mark.slow
@pytest.mark.skipif(not STORIES.is_dir(), reason=f"the model stories260K is not there ({STORIES})")
def test_a_model_of_stories_is_rejected_because_its_replies_do_not_end(tmp_path: Path) -> None:
    settings = [part for value in ("verdicts.max_new_tokens=64", "backbone.rollout_batch_size=64") for part in ("--set", value)]
    values = checked(tmp_path, str(STORIES), str(LAB / "seeds.jsonl"), "--minutes", "0.5", *settings, code=3)
    said = " ".join(values["reasons"])
    assert "its replies do not end" in said
    assert "pairwise: none of its" in said


def test_what_cannot_be_checked_is_refused_before_any_work(tmp_path: Path) -> None:
    missing = selfeval("check", "--output", str(tmp_path / "none" / "check.json"))
    assert missing.returncode == 2
    assert "does not exist; pass a file in an existing folder" in missing.stderr
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "What is 1?", "chosen": "1", "rejected": "2"}\n')
    labelled = selfeval("check", "--set", f"pairs.file={pairs}")
    assert labelled.returncode == 2
    assert "remove pairs.file" in labelled.stderr
