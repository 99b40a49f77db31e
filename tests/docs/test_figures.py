from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = {
    ROOT / "README.md": 1,
    ROOT / "src" / "selfeval" / "lab" / "word_problems" / "README.md": 1,
    DOCS / "concepts" / "cost.md": 1,
    DOCS / "concepts" / "embeddings.md": 1,
    DOCS / "concepts" / "evidence.md": 1,
    DOCS / "concepts" / "fine-tuning.md": 2,
    DOCS / "concepts" / "judge-benchmark.md": 1,
    DOCS / "concepts" / "long-context.md": 1,
    DOCS / "concepts" / "loop.md": 1,
    DOCS / "concepts" / "memory.md": 1,
    DOCS / "concepts" / "questions.md": 2,
    DOCS / "concepts" / "roles.md": 1,
    DOCS / "concepts" / "scale.md": 3,
    DOCS / "concepts" / "speed.md": 3,
    DOCS / "concepts" / "text-metrics.md": 1,
    DOCS / "guides" / "check.md": 1,
    DOCS / "guides" / "scale.md": 1,
    DOCS / "guides" / "search.md": 2,
    DOCS / "guides" / "serve.md": 1,
    DOCS / "guides" / "storage.md": 1,
    DOCS / "guides" / "which-judge.md": 1,
    **{
        DOCS / "algorithms" / f"{name}.md": 1
        for name in (
            "control-check",
            "evaluator",
            "judging",
            "learners",
            "over-optimisation",
            "sparse-reward",
            "stability",
            "steps",
        )
    },
}
"""Number of places for figures in each page."""
RESULTS = ROOT / "benchmarks" / "results"


@pytest.mark.parametrize(("page", "places"), PAGES.items(), ids=lambda value: getattr(value, "stem", None))
def test_every_place_for_figures_is_there(page: Path, places: int) -> None:
    """Without it nothing would be written, and nothing compared."""
    found = re.findall(r"<!-- figures -->\n.*?<!-- /figures -->", page.read_text(encoding="utf-8"), re.DOTALL)
    assert len(found) == places


def test_every_page_with_figures_is_listed() -> None:
    """Those of the tutorials are filled command by command, and have as many places as commands."""
    found = {page for page in DOCS.rglob("*.md") if "<!-- figures -->" in page.read_text(encoding="utf-8")}
    expected = {page for page in PAGES if page.is_relative_to(DOCS)}
    assert {page for page in found if not {"zh", "tutorials"} & {*page.relative_to(DOCS).parts}} == expected


def test_pages_show_exactly_the_measured_figures() -> None:
    if not (RESULTS / "loop.json").is_file():
        pytest.skip("benchmarks/results/loop.json does not exist yet; python benchmarks/loop.py measures it")
    before = [page.read_bytes() for page in PAGES]
    command = [sys.executable, str(ROOT / "benchmarks" / "figures.py"), "--check"]
    found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert found.returncode == 0, found.stderr
    assert [page.read_bytes() for page in PAGES] == before  # a check changes nothing
