"""Every family that the project names passes every check, or is refused with a sentence; the table in the docs says the same."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

import family_checks
import tiny_models
from selfeval.backbone.roles import BASE
from selfeval.errors import ModelError
from selfeval.rollout.engine import Request, generate
from tiny_families import FAMILIES, REFUSED

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.mark.parametrize("check", family_checks.CHECKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_family_passes(family: str, check: str) -> None:
    assert family_checks.passes(family, check)


@pytest.mark.parametrize("family", REFUSED)
def test_the_family_is_refused(family: str) -> None:
    backbone = tiny_models.backbone(family)
    with backbone.acting_as(BASE), pytest.raises(ModelError, match=f"models of type {REFUSED[family].model_type} keep"):
        generate(backbone, [Request((5, 9))], max_new_tokens=2, seed=0)
