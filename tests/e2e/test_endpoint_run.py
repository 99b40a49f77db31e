"""A run whose judge and referee are a server: it fails in the middle, and the next command continues."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from chat_server import Asked, Response, chat_server, completion, failure
from selfeval.cli.app import app
from selfeval.judging.server.client import client_of
from selfeval.records import VerdictState
from selfeval.runs.reader import RunReader
from toy import FEW, copy_lab, toy_arguments

PROMPT = "{{ question }}\nReply A: {{ first }}\nReply B: {{ second }}\n"
SECRET = "sk-0123456789"


def recipe_with_leads(folder: Path) -> Path:
    """The embedded recipe with templates that a chat model can read."""
    recipe = copy_lab(folder)
    templates = folder / "word_problems" / "templates"
    for kind in ("judge", "referee"):
        (templates / f"{kind}.jinja").write_text(f"{kind}\n{PROMPT}")
    text = (templates / "templates.toml").read_text()
    (templates / "templates.toml").write_text(text.replace('lead = ""', 'lead = "Verdict:"'))
    return recipe


def shorter_is_better(asked: Asked) -> Response:
    lines = asked.prompt.splitlines()
    first, second = (next(line for line in lines if line.startswith(f"Reply {name}:")) for name in "AB")
    labels = ("[A]", "[B]") if asked.prompt.startswith("judge") else ("(1)", "(2)")
    better = labels[0] if (len(first), first) < (len(second), second) else labels[1]
    return completion(f"Verdict:{better}", top={better: 0.9, labels[0] if better == labels[1] else labels[1]: 0.1})


def run(recipe: Path, output: Path, url: str, *more: str) -> Result:
    client_of.cache_clear()  # as in another process
    sections = ("verdicts.endpoint", "evaluation.referee")
    given = [f"{name}.{key}" for name in sections for key in (f"url={url}", "model=m", "key_variable=TOY_API_KEY", "retries=0")]
    prices = ["verdicts.endpoint.price_read=1", "verdicts.endpoint.price_written=2", "verdicts.judge=endpoint"]
    settings = [part for value in (*given, *prices) for part in ("--set", value)]
    return CliRunner().invoke(app, toy_arguments(recipe, output, *settings, *more, sizes=FEW))


@pytest.mark.slow
def test_a_run_with_a_server_as_judge_and_referee_continues_after_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOY_API_KEY", SECRET)
    recipe, output = recipe_with_leads(tmp_path / "lab"), tmp_path / "run"
    with chat_server(lambda asked: failure(500) if asked.number == 40 else shorter_is_better(asked)) as server:
        failed = run(recipe, output, server.url)
        assert failed.exit_code == 2
        assert "the server failed 1 times" in " ".join(failed.output.split())
        assert f"questions and replies are sent to m at {server.url}" in " ".join(failed.output.split())
        done = run(recipe, output, server.url, "--set", "verdicts.endpoint.in_flight=2")
        assert done.exit_code == 0, done.output
        kept = len(list((output / "answers").rglob("*.json")))
        assert len(server.asked) == kept + 1  # the failure; no answer was asked for twice
    verdicts = RunReader(output).records("verdicts")
    assert {v.probability for v in verdicts if v.state == VerdictState.KEPT} <= {0.9, 0.1}
    report = json.loads((output / "report.json").read_text())
    judge, referee = report["servers"]
    assert (judge["role"], referee["role"], judge["answers"] + referee["answers"]) == ("judge", "referee", kept)
    assert judge["cost"] == pytest.approx((judge["tokens_read"] + 2 * judge["tokens_written"]) / 1e6)
    assert judge["tokens_read"] == 100 * judge["answers"] > 0
    assert "cost" not in referee
    assert report["policy"]["win_rate"]["n"] > 0
    assert f"cost, judge m at {server.url}" in " ".join(done.output.split())
    assert "price" in (output / "index.html").read_text()
    written = [path for path in output.rglob("*") if path.is_file()]
    assert not [path for path in written if SECRET.encode() in path.read_bytes()]
    resumed = CliRunner().invoke(app, ["run", "--output", str(output)])
    assert resumed.exit_code == 2
    assert "texts of the run would be sent there" in " ".join(resumed.output.split())
