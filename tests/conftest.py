"""Fixtures shared by several packages."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import settings

from toy import ToyRun, make_toy_run

# The user's own key is neither used nor created.
os.environ["XDG_STATE_HOME"] = str(Path(tempfile.gettempdir()) / f"selfeval-tests-{os.getuid()}")

# A busy machine is no failure.
settings.register_profile("suite", deadline=None)
settings.load_profile("suite")

if "PYTEST_XDIST_WORKER" in os.environ:
    # Before torch is imported: workers with several torch threads each compete for the cores, which is 3 to 4 times slower.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Fix the order of sums: threads split a sum differently when its shape changes, which changes its last bits."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def toy_run(tmp_path_factory: pytest.TempPathFactory) -> ToyRun:
    """An undisturbed run at toy size, made once for all test processes. Tests that write to it or to its lab make a copy."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # each process has a folder in it
    with FileLock(root / "toy.lock"):
        return make_toy_run(root / "toy")


def _freeze() -> None:
    """Keep all that is there out of full garbage collections, which would visit it again and again."""
    gc.collect()
    gc.freeze()


def pytest_collection_finish() -> None:
    gc.set_threshold(5000, 10, 10)  # the default, 700, is for programs with fewer objects
    _freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """Freeze what a file leaves behind, which are the modules that its tests were the first to import."""
    yield
    if nextitem is not None and nextitem.path != item.path:
        _freeze()


_LONG = (
    "tests/e2e/",
    "tests/docs/test_guide_commands.py",
    "tests/docs/test_python_api.py",
    "tests/planner/test_planning.py",
    "tests/families/",
    "tests/training/test_oracle.py",
    "tests/training/learners/",
    "tests/runs/test_export.py",
    "tests/stages/test_tuning.py",
    "tests/test_cli.py",
    "tests/test_api.py",
)
"""Files that take long. Distributed last, one of them would keep one process busy after all others have ended."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first."""

    def rank(item: pytest.Item) -> int:
        return next((number for number, start in enumerate(_LONG) if item.nodeid.startswith(start)), len(_LONG))

    items.sort(key=rank)  # stable: keeps the order within a file
