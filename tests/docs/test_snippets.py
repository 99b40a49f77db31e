"""The blocks of a page, and the outputs that benchmarks/figures.py puts into a tutorial."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import figures
import pytest
from snippets import Block, blocks, commands

PAGE = """# Title

```toml title="a.toml"
x = 1
```

```bash
# a comment
$ selfeval run a.toml \\
  --until pairs
selfeval show runs/a
```

<!-- figures: selfeval show runs/a, last 2 -->
```text
old
```
<!-- /figures -->

```
plain
```
"""
PRINTED: dict[str, Any] = {
    "command": "python benchmarks/tutorials.py a",
    "model": "word_problems",
    "printed": [
        {"command": "selfeval run a.toml --until pairs", "code": 2, "seconds": 50, "out": [], "error": "Error: no"},
        {"command": "selfeval show runs/a", "code": 0, "seconds": 70, "out": ["first", "a\t1", "longer\t2"]},
    ],
}


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "a.md"
    path.write_text(PAGE, encoding="utf-8")
    return path


def test_blocks_have_their_language_and_file_and_generated_ones_are_left_out(page: Path) -> None:
    found = blocks(page)
    assert [(block.language, block.title) for block in found] == [("toml", "a.toml"), ("bash", ""), ("", "")]
    assert found[0] == Block("toml", "a.toml", "x = 1\n")
    assert found[2].text == "plain\n"


def test_commands_are_whole_and_comments_are_none(page: Path) -> None:
    assert list(commands(blocks(page)[1].text)) == ["selfeval run a.toml --until pairs", "selfeval show runs/a"]


@pytest.mark.parametrize(
    ("marker", "shown"),
    [
        ("selfeval show runs/a", "```text\nfirst\na       1\nlonger  2\n```\n"),
        ("selfeval show runs/a, last 2", "```text\na       1\nlonger  2\n```\n"),
        ("selfeval show runs/a, first 1", "```text\nfirst\n```\n"),
        ("selfeval run a.toml --until pairs, error", "```text\nError: no\n```\n"),
        ("selfeval plan", "`python benchmarks/tutorials.py a` has no results yet.\n"),
        ("measured", "By `python benchmarks/tutorials.py a`: word_problems, 2 minutes on one thread of a shared machine.\n"),
    ],
)
def test_a_marker_names_the_command_and_the_lines_of_its_output(marker: str, shown: str) -> None:
    match = figures._PRINTED.fullmatch(f"<!-- figures: {marker} -->\nold\n<!-- /figures -->")
    assert match is not None
    assert figures._printed(PRINTED, match) == shown
