"""The Chinese translations of the documentation: which are missing, and which are older than their originals.

python docs/translations.py                       prints a table; exits with 1 if a translation is malformed
python docs/translations.py --update PAGE...      records that these translations match their originals as they are now

The translation of README.md is README.zh.md; that of docs/PAGE is docs/zh/PAGE. The first line of a translation names its
original and the hash of the translated text. Generated blocks do not count: their generators write the same block into both.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import sys
from pathlib import Path

__all__ = [
    "CHINESE",
    "ORIGINALS",
    "ROOT",
    "anchors",
    "problems",
    "state",
    "translation_of",
    "unmarked",
    "update",
    "with_translation",
]

ROOT = Path(__file__).resolve().parents[1]
CHINESE = ROOT / "docs" / "zh"
_RECORD = re.compile(r"\A<!-- translation of (\S+), sha256 ([0-9a-f]{16}) -->\n")
_BLOCK = re.compile(r"<!-- (figures|generated)(: [^\n]*?)? -->\n.*?<!-- /\1 -->", re.DOTALL)
_FENCE = re.compile(r"^ *(```+|~~~+)[^\n]*\n.*?^ *\1 *$", re.DOTALL | re.MULTILINE)
_HEADING = re.compile(r"^(#{1,6}) +(.+?) *#* *$", re.MULTILINE)


def translation_of(original: Path) -> Path:
    """Return where the translation of a page is, or would be."""
    if original.parent == ROOT:
        return original.with_name(f"{original.stem}.zh.md")
    docs = ROOT / "docs"
    return CHINESE / original.relative_to(docs) if original.is_relative_to(docs) else original.with_suffix(".zh.md")


def with_translation(page: Path) -> list[Path]:
    """Return a page and, if there is one, its translation."""
    return [path for path in (page, translation_of(page)) if path == page or path.is_file()]


def localized(block: str, original: Path, translation: Path) -> str:
    """Return a generated block of the original for its translation: the same text, with links that start at the translation."""
    matching = dict(zip(anchors(original), anchors(translation), strict=False))

    def moved(match: re.Match[str]) -> str:
        name, mark, anchor = match[1].partition("#")
        if re.match(r"[a-z][a-z0-9+.-]*:", match[1]):
            return match.group()
        path = os.path.relpath(original.parent / name, translation.parent) if name else ""
        return f"]({path}{mark}{anchor if name else matching.get(anchor, anchor)})"

    return re.sub(r"\]\(([^)\s]+)\)", moved, block) if translation != original else block


def _originals() -> list[Path]:
    docs = ROOT / "docs"
    return [ROOT / "README.md", *sorted((docs / "guides").glob("*.md")), *sorted((docs / "concepts").glob("*.md"))]


ORIGINALS = {translation_of(page): page for page in _originals()}
"""The original of each translation, translated or not: README, guides and concepts."""


def unmarked(text: str) -> str:
    """Return the text of a page without the record of a translation."""
    return _RECORD.sub("", text)


def _digest(original: Path) -> str:
    text = _BLOCK.sub("", original.read_text(encoding="utf-8"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _prose(page: Path) -> str:
    return _FENCE.sub("", unmarked(page.read_text(encoding="utf-8")))


def anchors(page: Path) -> list[str]:
    """Return the anchors of a page's headings, as GitHub makes them, in order."""
    found: list[str] = []
    for _, heading in _HEADING.findall(_prose(page)):
        plain = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        number = sum(name == slug or re.fullmatch(rf"{re.escape(slug)}-\d+", name) is not None for name in found)
        found.append(f"{slug}-{number}" if number else slug)
    return found


def _structure(page: Path) -> dict[str, list[str]]:
    """Return the parts of a page that a translation keeps."""
    text = page.read_text(encoding="utf-8")
    prose = _BLOCK.sub("", _prose(page))
    targets = [_target(page, link) for link in re.findall(r"\]\(\s*<?([^)\s>]+)", re.sub(r"`[^`\n]+`", "`", prose))]
    return {
        "headings": [marks for marks, _ in _HEADING.findall(prose)],
        "code blocks": [match.group() for match in _FENCE.finditer(text)],
        "generated blocks": [match.group() for match in _BLOCK.finditer(text)],
        "links": sorted(targets),
    }


def _target(page: Path, link: str) -> str:
    """Return what a link leads to, whichever language it leads to and without its anchor."""
    if re.match(r"[a-z][a-z0-9+.-]*:", link):
        return link
    name = link.partition("#")[0]
    path = (page.parent / name).resolve() if name else page
    pair = {ROOT / "README.md", translation_of(ROOT / "README.md")}
    return "the other language" if page in pair and path in pair - {page} else str(ORIGINALS.get(path, path))


def problems(translation: Path) -> list[str]:
    """Return what is malformed in a translation that is up to date: its record, or parts that differ from the original."""
    original = ORIGINALS.get(translation)
    name = translation.relative_to(ROOT).as_posix()
    if original is None:
        return [f"{name}: no page of this name is translated; allowed are README, docs/guides/ and docs/concepts/"]
    record = _RECORD.match(translation.read_text(encoding="utf-8"))
    source = original.relative_to(ROOT).as_posix()
    if record is None or record[1] != source:
        return [f"{name}: the first line must be a record of {source}; run: python docs/translations.py --update {name}"]
    if state(translation) == "outdated":
        return []
    ours, theirs = _structure(translation), _structure(original)
    theirs["generated blocks"] = [localized(block, original, translation) for block in theirs["generated blocks"]]
    return [
        f"{name}: other {part} than in {source}: {_difference(ours[part], theirs[part])}"
        for part in ours
        if ours[part] != theirs[part]
    ]


def _difference(ours: list[str], theirs: list[str]) -> str:
    for here, there in zip(ours, theirs, strict=False):
        if here != there:
            return f"{here!r} for {there!r}"
    return f"{len(ours)} for {len(theirs)}"


def state(translation: Path) -> str:
    """Return `missing`, `outdated` or `up to date`."""
    if not translation.is_file():
        return "missing"
    record = _RECORD.match(translation.read_text(encoding="utf-8"))
    return "up to date" if record and record[2] == _digest(ORIGINALS[translation]) else "outdated"


def update(translation: Path) -> None:
    """Record the hash of the original in the first line of a translation.

    Raises:
        SystemExit: the file is not the translation of a page.
    """
    original = ORIGINALS.get(translation.resolve())
    if original is None or not translation.is_file():
        sys.exit(
            f"{translation} is not a translation; expected README.zh.md, or a file in docs/zh/guides/ or docs/zh/concepts/"
        )
    record = f"<!-- translation of {original.relative_to(ROOT).as_posix()}, sha256 {_digest(original)} -->\n"
    translation.write_text(record + unmarked(translation.read_text(encoding="utf-8")), encoding="utf-8")


def _table() -> str:
    rows = [(original.relative_to(ROOT).as_posix(), state(translation)) for translation, original in ORIGINALS.items()]
    done = sum(found == "up to date" for _, found in rows)
    lines = [f"{done} of {len(rows)} pages are translated and up to date"]
    return "\n".join(lines + [f"  {found:10} {name}" for name, found in rows if found != "up to date"])


def main() -> int:
    parser = argparse.ArgumentParser(description="Lists missing and outdated Chinese translations.")
    parser.add_argument("--update", nargs="+", type=Path, metavar="PAGE", help="record that these translations are up to date")
    for page in parser.parse_args().update or []:
        update(page)
    print(_table())
    written = [ROOT / "README.zh.md", *sorted(CHINESE.rglob("*.md"))]
    found = [problem for page in written if page.is_file() for problem in problems(page)]
    print("\n".join(found), file=sys.stderr, end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
