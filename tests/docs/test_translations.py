"""The Chinese translations: their records, and that they keep the structure of their originals."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import figures
import pytest
import translations

ROOT = Path(__file__).resolve().parents[2]


WRITTEN = [page for page in (ROOT / "README.zh.md", *sorted((ROOT / "docs" / "zh").rglob("*.md"))) if page.is_file()]
ORIGINAL = """# Title

See [the guide](guides/check.md#start) and [a site](https://example.org).

## Start

```
selfeval run   # a comment
```

<!-- figures -->
| n | 1 |
<!-- /figures -->
"""
TRANSLATION = ORIGINAL.replace("Title", "标题").replace("Start", "开始").replace("See", "参见").replace("#start", "#开始")


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: str(page.relative_to(ROOT)))
def test_translations_are_well_formed(page: Path) -> None:
    assert translations.problems(page) == []


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """An original and its translation, recorded, in a repository with one page."""
    original, translation = tmp_path / "README.md", tmp_path / "README.zh.md"
    (tmp_path / "guides").mkdir()
    original.write_text(ORIGINAL, encoding="utf-8")
    translation.write_text(TRANSLATION, encoding="utf-8")
    monkeypatch.setattr(translations, "ROOT", tmp_path)
    monkeypatch.setattr(translations, "ORIGINALS", {translation: original})
    translations.update(translation)
    return original, translation


def test_a_recorded_translation_is_up_to_date_until_the_text_changes(pair: tuple[Path, Path]) -> None:
    original, translation = pair
    assert (translations.state(translation), translations.problems(translation)) == ("up to date", [])
    new_figures = ORIGINAL.replace("| n | 1 |", "| n | 2 |")
    original.write_text(new_figures, encoding="utf-8")
    assert translations.state(translation) == "up to date", "a generated block is written by its generator"
    original.write_text(ORIGINAL.replace("See", "Read"), encoding="utf-8")
    assert (translations.state(translation), translations.problems(translation)) == ("outdated", [])
    translations.update(translation)
    assert translations.state(translation) == "up to date"
    assert translation.read_text(encoding="utf-8").count("<!-- translation of") == 1


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        ("## 开始", "### 开始", "headings"),
        ("# a comment", "# 注释", "code blocks"),
        ("| n | 1 |", "| n | 2 |", "generated blocks"),
        ("guides/check.md", "guides/first-run.md", "links"),
        ("https://example.org", "https://example.com", "links"),
    ],
)
def test_other_structure_is_a_problem(pair: tuple[Path, Path], old: str, new: str, part: str) -> None:
    _, translation = pair
    translation.write_text(translation.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    (problem,) = translations.problems(translation)
    assert f"README.zh.md: other {part} than in README.md" in problem


def test_generators_write_a_translation_too(pair: tuple[Path, Path], tmp_path: Path) -> None:
    original, translation = pair
    assert translations.with_translation(original) == [original, translation]
    figures._refresh(original, "| n | 3 |\n", check=False)
    assert translation.read_text(encoding="utf-8").count("| n | 3 |") == 1
    translation.write_text(TRANSLATION, encoding="utf-8")
    with pytest.raises(SystemExit, match=r"the figures in README.zh.md are not those of"):
        figures._refresh(original, "| n | 3 |\n", check=True)


def test_links_of_a_generated_block_start_at_the_translation(pair: tuple[Path, Path], tmp_path: Path) -> None:
    original, _ = pair
    moved = tmp_path / "zh" / "README.md"
    moved.parent.mkdir()
    moved.write_text(TRANSLATION, encoding="utf-8")
    block = "[a](guides/check.md#start) [b](#start) [c](https://example.org)"
    assert translations.localized(block, original, original) == block
    found = translations.localized(block, original, moved)
    assert found == "[a](../guides/check.md#start) [b](#开始) [c](https://example.org)"


def test_a_malformed_record_is_a_problem(pair: tuple[Path, Path]) -> None:
    _, translation = pair
    translation.write_text(TRANSLATION, encoding="utf-8")
    (problem,) = translations.problems(translation)
    assert "run: python docs/translations.py --update README.zh.md" in problem


def test_anchors_are_those_of_github(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# `make run`: a [link](x.md)\n```\n# no heading\n```\n## 轮次\n## Same\n## Same\n", encoding="utf-8")
    assert translations.anchors(page) == ["make-run-a-link", "轮次", "same", "same-1"]


def test_the_command_lists_missing_and_outdated_pages() -> None:
    done = subprocess.run([sys.executable, ROOT / "docs" / "translations.py"], capture_output=True, text=True, check=False)
    states = [translations.state(page) for page in translations.ORIGINALS]
    assert done.returncode == 0, done.stderr
    assert f"{states.count('up to date')} of {len(states)} pages are translated and up to date" in done.stdout
    assert done.stdout.count("  missing ") == states.count("missing")
    assert "families.md" not in done.stdout, "a generated page has nothing to translate"


def test_a_page_that_is_no_translation_has_no_record(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="is not a translation"):
        translations.update(tmp_path / "page.md")
