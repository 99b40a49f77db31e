"""benchmarks/README.md has a row for every script, and names those that `make bench` leaves out."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
HELPERS = {
    *("common.py", "figures.py", "learning.py", "tutorials.py"),
    *(f"scale_{name}.py" for name in ("costs", "formula", "hardware", "runs", "simulation", "tables", "work")),
}
"""Modules that measure nothing for results/NAME.json by themselves, or are run for a page of the tutorials."""


def scripts() -> set[str]:
    return {path.name for path in (ROOT / "benchmarks").glob("*.py")} - HELPERS


def run_by_make() -> set[str]:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    names = re.search(r"^bench:.*?for name in (.*?); do", makefile, re.DOTALL | re.MULTILINE)
    assert names is not None
    return {f"{name}.py" for name in re.findall(r"[\w/]+", names[1])}


def test_every_script_has_a_row() -> None:
    assert scripts() <= set(re.findall(r"^\| `([\w/]+\.py)` \|", README, re.MULTILINE))


def test_the_scripts_that_make_bench_leaves_out_are_listed() -> None:
    listed = re.search(r"`make bench` runs all except (.*?)\.\s", README, re.DOTALL)
    assert listed is not None
    named = {name for name in re.findall(r"`([\w/]+\.py)`", listed[1]) if not name.startswith("peers/")}
    assert named == scripts() - run_by_make()
