"""The command line of the generators in this folder: write a page, or check that it is up to date."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from translations import localized, with_translation

__all__ = ["fill", "main"]


def fill(text: str, blocks: Mapping[str, str]) -> str:
    """Put each block between its markers, `<!-- generated: NAME -->` and `<!-- /generated -->`.

    Raises:
        SystemExit: a block has no place in the page, or a place has no block.
    """
    pattern = re.compile(r"(<!-- generated: (.+?) -->\n).*?(<!-- /generated -->)", re.DOTALL)
    places = [match.group(2) for match in pattern.finditer(text)]
    if sorted(places) != sorted(blocks):
        sys.exit(f"the page has places for {sorted(places)}, and the generator has blocks for {sorted(blocks)}")
    return pattern.sub(lambda match: f"{match.group(1)}{blocks[match.group(2)]}\n{match.group(3)}", text)


def main(page: Path, blocks: Mapping[str, str], source: str) -> int:
    """Write the blocks into the page and its translation, or compare them with `--check`; return the exit status."""
    script = Path(sys.argv[0]).name
    parser = argparse.ArgumentParser(description=f"Writes docs/{page.relative_to(Path(__file__).parent)} from {source}.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 when the page is stale")
    check = parser.parse_args().check
    for path in with_translation(page):
        old = path.read_text(encoding="utf-8")
        new = fill(old, {name: localized(block, page, path) for name, block in blocks.items()})
        if not check:
            path.write_text(new, encoding="utf-8")
        elif new != old:
            print(f"{path.name} is stale; run: python docs/{script}", file=sys.stderr)
            return 1
    return 0
