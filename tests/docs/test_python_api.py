"""The guide to the Python API, the examples in the API's docstrings, and the notebooks: all executed, on one toy run."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from processes import environment, python

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
DOCUMENTED = (
    "selfeval.runs.comparison",
    "selfeval.runs.evaluator",
    "selfeval.runs.judge",
    "selfeval.runs.policy",
    "selfeval.runs.reader",
    "selfeval.runs.run",
    "selfeval.stages.running",
)

needs = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("pandas", "datasets", "nbclient", "ipykernel")),
    reason="pandas, datasets, nbclient or ipykernel is not installed; `make test` installs them",
)
pytestmark = needs


QUIET = "import warnings; warnings.simplefilter('ignore')"


@pytest.fixture(scope="module")
def guide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder in which the guide was executed, with its run in runs/first, and what the guide printed."""
    folder = tmp_path_factory.mktemp("guide")
    text = (ROOT / "docs" / "guides" / "python-api.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 8
    done = python("\n".join([QUIET, *blocks]), cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


@pytest.mark.slow
def test_the_guide_runs_from_top_to_bottom(guide: tuple[Path, str]) -> None:
    folder, printed = guide
    lines = printed.splitlines()
    assert lines[0] == "Run('runs/first', finished)"
    assert re.search(r"^gold gain -?0\.\d+ \[-?0\.\d+, -?0\.\d+\], n = 16$", printed, re.MULTILINE), printed
    assert "3 iterations" in lines
    assert "Evaluator('runs/first', fp32 on cpu)" in lines
    assert lines[-1] == "runs/nothing is not a run (no run.json); pass a folder written by `selfeval run`"
    assert (folder / "runs" / "first" / "index.html").is_file()


DOCTESTS = """
import doctest, importlib, sys
for name in sys.argv[1:]:
    found = doctest.testmod(importlib.import_module(name))
    print(name, found.attempted, found.failed)
"""


@pytest.mark.slow
def test_the_examples_in_the_docstrings_give_what_they_say(guide: tuple[Path, str]) -> None:
    folder, _ = guide
    done = python(f"{QUIET}\n{DOCTESTS}", *DOCUMENTED, cwd=folder)
    assert done.returncode == 0, done.stderr
    results = [line.split() for line in done.stdout.splitlines() if line.startswith("selfeval.")]
    assert [name for name, _, _ in results] == list(DOCUMENTED), done.stdout
    assert all(int(attempted) > 0 and failed == "0" for _, attempted, failed in results), done.stdout


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path: Path, guide: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """On the guide's run: their first cell is the guide's own call, which would be refused if a setting differed."""
    import nbformat
    from nbclient import NotebookClient

    folder, _ = guide
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(folder / "jupyter"))
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    client.execute()
    shown = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert len(shown) >= 4, "cells that show a result"
    assert not any(output.output_type == "error" for output in shown)
    if path.stem == "first_run":
        pages = [output["data"].get("text/html", "") for output in shown if output.output_type == "execute_result"]
        assert "win rate, after vs. before" in pages[0], "a run shows its figures"


def test_notebooks_are_committed_without_outputs() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["evaluator_as_reward", "first_run"]
    for path in NOTEBOOKS:
        cells: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["cells"]
        code = [cell for cell in cells if cell["cell_type"] == "code"]
        assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code), path.name
        assert os.path.getsize(path) < 10_000
