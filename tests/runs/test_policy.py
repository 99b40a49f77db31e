"""The guidance that a policy is loaded with. Sampling with it: tests/rollout/test_guide.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tiny_models
from selfeval.backbone.role_files import save_role
from selfeval.errors import RunFolderError
from selfeval.rollout.guide import Guide
from selfeval.runs.policy import GUIDE, load_policy
from selfeval.training.context import POLICY


@pytest.fixture(scope="module")
def roles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, backbone = tmp_path_factory.mktemp("roles"), tiny_models.backbone()
    for seed, role in enumerate((POLICY, "q-0", "q-1")):
        backbone.roles.add(role, seed=seed)
        save_role(backbone, role, folder / role)
    return folder


def test_the_roles_of_the_guidance_are_loaded(roles: Path) -> None:
    guide = Guide(("q-0", "q-1"), 0.25)
    (roles / POLICY / GUIDE).write_text(json.dumps(guide.as_json()))
    backbone = tiny_models.backbone()
    assert load_policy(backbone, roles) == guide
    assert {POLICY, "q-0", "q-1"} <= set(backbone.roles.names)


@pytest.mark.parametrize(
    ("names", "strength"),
    [
        (["../../elsewhere"], 1.0), (["/etc"], 1.0), (["a/b"], 1.0), ([3], 1.0), ([], 1.0), ("q-0", 1.0), (None, 1.0),
        (["q-0"], 0), (["q-0"], -1.0), (["q-0"], True), (["q-0"], "1"), (["q-0"], None), (["q-0"], float("inf")),
    ],
)  # fmt: skip
def test_damaged_guidance_is_refused_with_its_content(roles: Path, names: Any, strength: Any) -> None:
    (roles / POLICY / GUIDE).write_text(json.dumps({"roles": names, "strength": strength}))
    with pytest.raises(RunFolderError, match=r"guide\.json is damaged: "):
        load_policy(tiny_models.backbone(), roles)
