from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LONG = ROOT / "docs" / "concepts" / "long-context.md"
COST = ROOT / "docs" / "concepts" / "cost.md"
ALGORITHMS = ROOT / "docs" / "algorithms"
CONTROL, STABILITY = ALGORITHMS / "control-check.md", ALGORITHMS / "stability.md"
CARD = ROOT / "src" / "selfeval" / "lab" / "word_problems" / "README.md"
PAGES = {"README": ROOT / "README.md", "model card": CARD, "long context": LONG, "cost": COST, "control check": CONTROL}
PAGES |= {
    "stability": STABILITY,
    "evidence": ROOT / "docs" / "concepts" / "evidence.md",
    "check": ROOT / "docs" / "guides" / "check.md",
    "which judge": ROOT / "docs" / "guides" / "which-judge.md",
    "learners": ALGORITHMS / "learners.md",
    "fine-tuning": ROOT / "docs" / "concepts" / "fine-tuning.md",
    "over-optimisation": ALGORITHMS / "over-optimisation.md",
}
RESULTS = ROOT / "benchmarks" / "results"


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES.keys())
def test_there_is_one_place_for_the_figures(page: Path) -> None:
    """Without it nothing would be written, and nothing compared."""
    assert len(re.findall(r"<!-- figures -->\n.*?<!-- /figures -->", page.read_text(encoding="utf-8"), re.DOTALL)) == 1


def test_pages_show_exactly_the_measured_figures() -> None:
    if not (RESULTS / "loop.json").is_file():
        pytest.skip("benchmarks/results/loop.json does not exist yet; python benchmarks/loop.py measures it")
    before = [page.read_bytes() for page in PAGES.values()]
    command = [sys.executable, str(ROOT / "benchmarks" / "figures.py"), "--check"]
    found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert found.returncode == 0, found.stderr
    assert [page.read_bytes() for page in PAGES.values()] == before  # a check changes nothing
