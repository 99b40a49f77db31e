"""Generated pages are up to date with the code. docs/generate_families.py is checked by the tests whose results it shows."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from processes import script

ROOT = Path(__file__).resolve().parents[2]
GENERATORS = sorted(path.name for path in (ROOT / "docs").glob("generate_*.py"))


def check(generator: Path) -> subprocess.CompletedProcess[str]:
    return script(generator, "--check", cwd=ROOT)


@pytest.mark.parametrize("name", sorted({*GENERATORS} - {"generate_families.py"}))
def test_generated_pages_are_up_to_date(name: str) -> None:
    found = check(ROOT / "docs" / name)
    assert found.returncode == 0, found.stderr


def test_every_row_of_a_table_is_one_line() -> None:
    """A line break in a description would end the table there."""
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert len(rows) > 80
    assert all(line.endswith(" |") and line.replace("\\|", "").count("|") == 6 for line in rows)


@pytest.mark.parametrize(("name", "page"), [("metrics", "metrics.md"), ("evidence", "concepts/evidence.md")])
def test_a_changed_page_is_stale(name: str, page: str, tmp_path: Path) -> None:
    docs = shutil.copytree(ROOT / "docs", tmp_path / "docs")
    for home in ("README.md", "README.zh.md"):  # the generators write into translations as well, and look for all of them
        shutil.copy(ROOT / home, tmp_path)
    text = (docs / page).read_text(encoding="utf-8")
    changed, count = re.subn(r"(<!-- generated: .*? -->\n\| .* \|\n\|[-|]+\|\n\| `?\w+)", r"\1_", text, count=1)
    assert count == 1
    (docs / page).write_text(changed, encoding="utf-8")
    found = check(docs / f"generate_{name}.py")
    assert found.returncode == 1
    assert f"is stale; run: python docs/generate_{name}.py" in found.stderr
    assert (docs / page).read_text(encoding="utf-8") == changed, "a check writes nothing"


def test_make_and_ci_check_every_generator() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    recipe = makefile[makefile.index("\npages:") :].split("\n\n")[0]
    assert re.search(r"for \w+ in docs/generate_\*\.py benchmarks/figures\.py; do .* --check", recipe)
    assert re.search(r"^docs: pages\b", makefile, re.MULTILINE)
    steps = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    # The fast tests have those of this file, of test_figures.py and of the families, so CI need not call `make pages`.
    assert re.search(r"^make test$", steps, re.MULTILINE)
