"""Run the examples in the docstrings."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import selfeval.algorithms


@pytest.mark.parametrize("module", [module.name for module in pkgutil.iter_modules(selfeval.algorithms.__path__)])
def test_examples_give_what_they_show(module: str) -> None:
    failed, _ = doctest.testmod(importlib.import_module(f"selfeval.algorithms.{module}"))
    assert failed == 0
