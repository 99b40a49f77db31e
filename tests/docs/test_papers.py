"""docs/papers.md has a row for every paper that a docstring or comment cites by a DOI, or by its number in an archive."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAPERS = ROOT / "docs" / "papers.md"

_ID = re.compile(
    r"doi\.org/(10\.[^\s`\"']+)|arxiv\.org/(?:abs|pdf)/([\w./-]+)|aclanthology\.org/([\w.-]+)|openreview\.net/forum\?id=(\w+)"
)


def ids(text: str) -> set[str]:
    """Return the DOIs and archive numbers of a text, without the punctuation of the sentence around them."""
    found = set()
    for match in _ID.finditer(text):
        name = next(filter(None, match.groups())).rstrip(".,;:")
        # A DOI may have brackets; the bracket that the sentence closes behind it belongs to the sentence.
        while name.count(")") > name.count("("):
            name = name[: name.rindex(")")]
        found.add(name)
    return found


def test_every_cited_paper_has_a_row() -> None:
    rows = ids("\n".join(line for line in PAPERS.read_text(encoding="utf-8").splitlines() if line.startswith("|")))
    cited = {path: ids(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "src").rglob("*.py"))}
    missing = [f"{path.relative_to(ROOT)}: {name}" for path, names in cited.items() for name in sorted(names - rows)]
    assert not missing, "\n".join(missing)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("(Bates, https://arxiv.org/abs/2104.08279). Or", "2104.08279"),
        ("Ledoit (https://doi.org/10.1016/S0047-259X(03)00096-4), at", "10.1016/S0047-259X(03)00096-4"),
        ("[TER](https://aclanthology.org/2006.amta-papers.25),", "2006.amta-papers.25"),
        ("https://openreview.net/forum?id=SyK00v5xx", "SyK00v5xx"),
    ],
)
def test_identifiers_are_read_from_sentences(text: str, found: str) -> None:
    assert ids(text) == {found}
