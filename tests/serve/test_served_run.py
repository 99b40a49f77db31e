"""What of a run is served: a run need not have trained a policy or an evaluator, but what it has must be whole."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from selfeval.errors import RunFolderError
from selfeval.serve.api_errors import ApiError
from selfeval.serve.limits import Limits
from selfeval.serve.served_run import ServedRun
from selfeval.serve.service import Service
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
