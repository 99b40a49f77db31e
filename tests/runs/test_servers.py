"""Servers that only a run.json names are not asked: the folder may come from somebody else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from chat_server import Asked, Response, chat_server
from selfeval.cli.app import app
from selfeval.config import RunConfig
from selfeval.errors import InputError, RunFolderError
from selfeval.judge_benchmark.label_check import judge_check
from selfeval.runs.judge import Judge
from selfeval.runs.run import Run
from selfeval.runs.servers import is_named_by, named_servers, refuse_servers, with_servers
from selfeval.store import RunStore
from view_runs import ViewRun

pytest.importorskip("openai")

pytestmark = pytest.mark.filterwarnings("ignore:builtin type .* has no __module__ attribute:DeprecationWarning")


def vectors(asked: Asked) -> Response:
    rows = [{"index": n, "embedding": [float(len(text)), 1.0]} for n, text in enumerate(asked.body["input"])]
    return Response(json.dumps({"data": rows, "usage": {"prompt_tokens": 1}}))


def written(tmp_path: Path, **sections: Any) -> Path:
    """A run folder whose run.json has these sections."""
    folder = ViewRun().write(tmp_path / "run")
    store = RunStore(folder)
    store.update_run(config=store.run["config"] | sections)
    store.close()
    return folder


def embedding_server(url: str, key_variable: str = "") -> dict[str, Any]:
    return {"embedder": "endpoint", "endpoint": {"url": url, "model": "m", "key_variable": key_variable}}


def judging_server(url: str) -> dict[str, Any]:
    return {**RunConfig().verdicts.model_dump(mode="json"), "judge": "endpoint", "endpoint": {"url": url, "model": "m"}}


def test_no_text_is_sent_to_the_server_of_a_run_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "secret")
    with chat_server(vectors) as server:
        folder = written(tmp_path, embeddings=embedding_server(server.url, "MY_API_KEY"))
        run = Run.open(folder)
        for ask in (lambda: run.embed(["a"]), lambda: run.search("a"), run.build_index, lambda: run.recommend_seeds(1)):
            with pytest.raises(
                RunFolderError, match=r"embeddings.endpoint.url = http.*key_variable = MY_API_KEY.*would be sent"
            ):
                ask()
        found = CliRunner().invoke(app, ["search", str(folder), "a"])
        assert found.exit_code == 2
        assert f"--set embeddings.endpoint.url={server.url} --set embeddings.endpoint.key_variable=MY_API_KEY" in " ".join(
            found.output.split()
        )
        # The address alone does not allow the key.
        with pytest.raises(RunFolderError, match="key_variable = MY_API_KEY, and"):
            Run.open(folder, servers=[f"embeddings.endpoint.url={server.url}"]).embed(["a"])
        assert server.asked == []


def test_the_server_that_the_user_names_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "secret")
    with chat_server(vectors) as server:
        folder = written(tmp_path, embeddings=embedding_server("http://localhost:9/elsewhere", "MY_API_KEY"))
        named = [f"embeddings.endpoint.url={server.url}", "embeddings.endpoint.key_variable="]
        assert Run.open(folder, servers=named).embed(["abc"]).shape == (1, 2)
        assert all("secret" not in str(asked.headers) for asked in server.asked)
        arguments = ["search", str(folder), "abc", "--json", *(part for each in named for part in ("--set", each))]
        assert CliRunner().invoke(app, arguments).exit_code == 0
        assert len(server.asked) >= 2


def test_the_judge_of_a_run_json_is_not_asked(tmp_path: Path) -> None:
    with chat_server(vectors) as server:
        folder = written(tmp_path, verdicts=judging_server(server.url))
        for load in (lambda: Judge.load(folder), lambda: Run.open(folder).judge()):
            with pytest.raises(RunFolderError, match=r"verdicts.endpoint.url = http.*verdicts.judge=pairwise to judge"):
                load()
        assert server.asked == []


def test_a_check_of_labels_does_not_ask_it_either(tmp_path: Path) -> None:
    with chat_server(vectors) as server:
        folder = written(tmp_path, verdicts=judging_server(server.url))
        line = {"question": "Why?", "first": "a", "second": "b", "label": "first"}
        (tmp_path / "labels.jsonl").write_text(json.dumps(line) + "\n")
        with pytest.raises(InputError, match="a run folder cannot choose where texts are sent"):
            judge_check(folder, tmp_path / "labels.jsonl", progress=False)
        assert server.asked == []


def test_other_settings_of_a_run_stay_as_they_are() -> None:
    with pytest.raises(InputError, match=r'"policy.iterations" cannot be set here; allowed: embeddings.embedder, '):
        with_servers(RunConfig(), ["policy.iterations=3"])
    config = RunConfig.model_validate({"embeddings": embedding_server("http://localhost:9/v1")})
    assert with_servers(config, ["embeddings.embedder=backbone"]).embeddings.embedder == "backbone"


def test_the_caller_of_a_run_has_named_its_servers() -> None:
    config = RunConfig.model_validate({"embeddings": embedding_server("http://localhost:9/v1", "A_API_KEY")})
    named = named_servers(config)
    assert named == ["embeddings.endpoint.url=http://localhost:9/v1", "embeddings.endpoint.key_variable=A_API_KEY"]
    refuse_servers(Path("run"), config.all_servers, is_named_by(named))
    with pytest.raises(RunFolderError):
        refuse_servers(Path("run"), config.all_servers, is_named_by(["embeddings.embedder=endpoint"]))
