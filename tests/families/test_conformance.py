"""Every family that the project names passes every check or is refused with a reason, as the table in the docs states."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import family_checks
import tiny_models
from selfeval.backbone.adapters import BASE
from selfeval.errors import ModelError
from selfeval.prompt import Prompt
from selfeval.rollout.engine import generate
from selfeval.rollout.requests import Request
from tiny_families import FAMILIES, REFUSED, WINDOW

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture(scope="module", autouse=True)
def leave_no_model_behind() -> Iterator[None]:
    """Tests of other files count copies of weights in this process."""
    yield
    family_checks.two_roles.cache_clear()


@pytest.mark.parametrize("check", family_checks.CHECKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_family_passes(family: str, check: str) -> None:
    assert family_checks.passes(family, check)


@pytest.mark.parametrize("family", REFUSED)
def test_the_family_is_refused(family: str) -> None:
    backbone = tiny_models.backbone(family)
    with backbone.acting_as(BASE), pytest.raises(ModelError, match=f"models of type {REFUSED[family].model_type} store"):
        generate(backbone, [Request(Prompt((5, 9)))], max_new_tokens=2, seed=0)


@pytest.mark.parametrize("family", [name for name, f in FAMILIES.items() if f.window and not f.nested])
def test_the_window_of_the_tiny_model_hides_something(family: str) -> None:
    """Without this, the checks could pass on a window that changes nothing."""
    narrow, wide = tiny_models.model(family, 40), tiny_models.model(family, 40, sliding_window=512)
    ids = torch.tensor([list(range(2, 2 + 3 * WINDOW))])
    with torch.no_grad():
        difference_T = (narrow(input_ids=ids).logits - wide(input_ids=ids).logits)[0].abs().amax(-1)
    assert difference_T[:WINDOW].max() < 1e-5
    assert difference_T[WINDOW:].max() > 0.05


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_families", DOCS / "generate_families.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_families_is_up_to_date() -> None:
    """The page is generated from the checks above, which run once per process."""
    page = (DOCS / "concepts" / "families.md").read_text(encoding="utf-8")
    assert page == generator().render(), "run: python docs/generate_families.py"
