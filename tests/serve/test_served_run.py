"""What of a run is served: a run need not have trained a policy or an evaluator, but what it has must be whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from selfeval.errors import RunFolderError
from selfeval.serve.api_errors import ApiError
from selfeval.serve.limits import Limits
from selfeval.serve.served_run import ServedRun
from selfeval.serve.service import Service
from selfeval.store import write_sealed
from toy import ToyRun


@pytest.fixture
def copy(toy_run: ToyRun, tmp_path: Path) -> Path:
    return Path(shutil.copytree(toy_run.folder, tmp_path / "run"))


def test_a_run_that_has_trained_nothing_serves_its_base(copy: Path) -> None:
    shutil.rmtree(copy / "roles")
    run = ServedRun.load(copy)
    assert run.names == ["base"]
    worker: Any = None
    service = Service(run, worker, Limits(), worker)
    with pytest.raises(ApiError, match="this run has no evaluator") as refused:
        service.check_scorer("evaluator")
    assert (refused.value.status, refused.value.code) == (501, "no_evaluator")
    with pytest.raises(ApiError, match='model "policy" does not exist; models for this endpoint: base') as refused:
        service.check_replier("policy")
    assert refused.value.status == 404


@pytest.mark.parametrize("role", ["policy", "evaluator-0"])
def test_a_damaged_role_is_refused(role: str, copy: Path) -> None:
    (copy / "roles" / role / "adapter_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(RunFolderError, match=role):
        ServedRun.load(copy)


def test_another_role_without_a_head_replies_too(copy: Path) -> None:
    shutil.copytree(copy / "roles" / "policy", copy / "roles" / "earlier")
    run = ServedRun.load(copy)
    assert run.names == ["policy", "base", "earlier", "evaluator"]
    assert "earlier" in run.model.backbone.roles.names


# -- the token limit of replies -----------------------------------------------------------------------------------------


def _set_replies(folder: Path, **values: Any) -> Path:
    run = json.loads((folder / "run.json").read_text("utf-8"))
    run["config"]["replies"].update(values)
    write_sealed(folder / "run.json", run)
    return folder


@pytest.mark.parametrize(
    ("settings", "limit"),
    [
        ({"max_new_tokens": 48}, 48),
        ({"max_new_tokens": 48, "max_thinking_tokens": 100}, 148),
        ({"max_new_tokens": "auto"}, None),
    ],
)
def test_the_limit_of_replies_includes_their_thinking(settings: dict[str, Any], limit: int | None, copy: Path) -> None:
    assert ServedRun.load(_set_replies(copy, **settings)).reply_limit == limit


def test_a_damaged_limit_of_replies_is_refused_when_the_run_is_loaded(copy: Path) -> None:
    _set_replies(copy, max_new_tokens="auto")
    (copy / "replies" / "limit.json").write_text("{", "utf-8")
    with pytest.raises(RunFolderError, match=r"limit\.json"):
        ServedRun.load(copy)
