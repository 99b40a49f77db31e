"""The source tree of the documentation site: which file of the repository becomes which page, and where its links lead.

The Markdown pages of the repository are written for GitHub. Here they are copied to a folder for MkDocs, with their links
changed: a link to a page leads to that page of the site, and a linked file or folder, such as a recipe, gets a page.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from translations import ORIGINALS, ROOT, anchors, translation_of, unmarked

__all__ = ["VOICES", "Tree", "public_names"]

VOICES = {
    "en": {
        "tutorials": "Tutorials",
        "guides": "Guides",
        "concepts": "Concepts",
        "reference": "Reference",
        "decisions": "Decisions",
    },
    "zh": {"tutorials": "教程", "guides": "指南", "concepts": "概念", "reference": "参考", "decisions": "设计决策"},
}
_WORDS = {
    "en": {"home": "Home", "contents": "All pages", "api": "Python API", "algorithms": "Algorithms", "errors": "Errors"},
    "zh": {"home": "首页", "contents": "全部页面", "api": "Python API", "algorithms": "算法", "errors": "异常"},
}
_NOT_TRANSLATED = '!!! note "本页尚未翻译"\n\n    以下为英文原文。\n\n'
_OUTSIDE_DOCS = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "recipes/README.md": "recipes.md",
    "docs/README.md": "contents.md",
}
_TOKENS = re.compile(
    r"(?P<fence>^ *(?P<ticks>```+|~~~+).*?^ *(?P=ticks) *$)|(?P<span>`[^`\n]+`)"
    r"|(?P<open>\]\(\s*<?)(?P<target>[^)\s>]+)(?P<close>>?(?:\s+\"[^\"]*\")?\s*\))",
    re.DOTALL | re.MULTILINE,
)
# The READMEs link to each other; the site has a menu of languages.
_OTHER_LANGUAGE = re.compile(r"^\[[^\]]+\]\(README(?:\.zh)?\.md\)\n\n", re.MULTILINE)
_PICTURES = (".svg", ".png")
_LANGUAGES = {".toml": "toml", ".py": "python", ".jinja": "jinja", ".json": "json", ".jsonl": "json"}


@cache
def _pages() -> dict[str, str]:
    """Return the page of the site for each Markdown page of the repository, by path from its root."""
    docs = ROOT / "docs"
    inside = {
        f"docs/{name}": name for path in docs.rglob("*.md") if not (name := path.relative_to(docs).as_posix()).startswith("zh/")
    }
    return {**inside, **_OUTSIDE_DOCS}


def public_names() -> list[str]:
    """Return the public names of the package without importing it, because the environment of the site has no torch."""
    for node in ast.parse((ROOT / "src" / "selfeval" / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            names: list[str] = ast.literal_eval(node.value)
            return [name for name in names if not name.startswith("__")]
    raise LookupError("src/selfeval/__init__.py assigns no __all__")


def _fenced(path: Path) -> str:
    # Longer than any fence in the file, so that none of its lines ends the block.
    return f"`````{_LANGUAGES.get(path.suffix, 'text')}\n{path.read_text(encoding='utf-8').rstrip()}\n`````\n"


def _notebook(path: Path) -> str:
    """Return the cells of a notebook as Markdown, without their outputs."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    texts = [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
    return "\n\n".join(text if kind == "markdown" else f"```python\n{text}\n```" for kind, text in texts) + "\n"


def _shown(path: Path) -> str:
    """Return a page that shows a file, or the files of a folder."""
    name = path.relative_to(ROOT).as_posix()
    if path.suffix == ".ipynb":
        return _notebook(path)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file())
        return f"# {name}\n\n" + "\n".join(f"## {file.name}\n\n{_fenced(file)}" for file in files)
    return f"# {name}\n\n{_fenced(path)}"


@dataclass
class Tree:
    """The source tree of the site in one language.

    Attributes:
        language: `en` or `zh`. In Chinese, a page without a translation is the English page, with a note that says so.
        folder: where the tree is written.
    """

    language: str
    folder: Path
    _files: set[Path] = field(default_factory=set)

    def write(self) -> list[object]:
        """Write the pages, the pages of linked files and those of the Python API; return the navigation for MkDocs.

        Raises:
            LookupError: a link leads to nothing.
        """
        shutil.rmtree(self.folder, ignore_errors=True)
        pages = _pages()
        for original, page in pages.items():
            self._put(page, self._text(ROOT / original, page))
        for path in sorted(self._files):
            if path.suffix in _PICTURES:
                self._copy(path)
            else:
                self._put(self._page_of(path), _shown(path))
        return self._navigation(pages, self._write_api())

    def _put(self, page: str, text: str) -> None:
        path = self.folder / page
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    def _copy(self, path: Path) -> None:
        target = self.folder / self._page_of(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)

    def _text(self, original: Path, page: str) -> str:
        """Return the text of a page in this language with the links of the site."""
        source, note = original, ""
        if self.language == "zh":
            translation = translation_of(original)
            source = translation if translation.is_file() else original
            note = _NOT_TRANSLATED if source == original else ""
        kept = _OTHER_LANGUAGE.sub("", unmarked(source.read_text(encoding="utf-8")))
        text = self._linked(kept, lambda link: self._link(source, page, link))
        heading, _, rest = text.partition("\n")
        return f"{heading}\n\n{note}{rest}" if heading.startswith("# ") else note + text

    @staticmethod
    def _linked(text: str, change: Callable[[str], str]) -> str:
        def replace(match: re.Match[str]) -> str:
            if match["target"] is None:
                return match.group()
            return match["open"] + change(match["target"]) + match["close"]

        return _TOKENS.sub(replace, text)

    def _link(self, source: Path, page: str, link: str) -> str:
        """Return a link of a file of the repository as a link from its page of the site."""
        name, mark, anchor = link.partition("#")
        if re.match(r"[a-z][a-z0-9+.-]*:", link) or not name:
            return link
        target = (source.parent / name).resolve()
        if not target.exists():
            raise LookupError(f"{source.relative_to(ROOT)} links to {link}, which does not exist")
        original = ORIGINALS.get(target, target)
        if original.suffix != ".md":
            self._files.add(original)
        return os.path.relpath(self._page_of(original), Path(page).parent) + mark + self._anchor(original, target, anchor)

    def _anchor(self, original: Path, target: Path, anchor: str) -> str:
        """Return the anchor of the same heading on the page in this language."""
        translation = translation_of(original)
        if not anchor or target != original or self.language != "zh" or not translation.is_file():
            return anchor
        matching = dict(zip(anchors(original), anchors(translation), strict=True))
        return matching.get(anchor, anchor)

    @staticmethod
    def _page_of(path: Path) -> str:
        name = path.relative_to(ROOT).as_posix()
        if path.suffix == ".md":
            return _pages()[name]
        return name.removeprefix("docs/") if path.suffix in _PICTURES else f"repository/{name}.md"

    def _write_api(self) -> list[object]:
        """Write one page for each public name, and one for all errors."""
        names = public_names()
        errors = [name for name in names if name.endswith("Error")]
        groups = {name: [name] for name in names if name not in errors} | {_WORDS[self.language]["errors"]: errors}
        entries: list[object] = []
        for title, members in groups.items():
            page = f"api/{members[0] if len(members) == 1 else 'errors'}.md"
            single = f"::: selfeval.{title}\n    options:\n      heading_level: 1\n"
            several = f"# {title}\n\n" + "\n".join(f"::: selfeval.{member}\n" for member in members)
            self._put(page, single if len(members) == 1 else several)
            entries.append({title: page})
        return entries

    def _navigation(self, pages: dict[str, str], api: list[object]) -> list[object]:
        words, voices = _WORDS[self.language], VOICES[self.language]
        ordered = list(_reading_order(pages))

        def within(folder: str) -> list[object]:
            return [page for page in ordered if page.startswith(f"{folder}/")]

        single = [page for page in ordered if "/" not in page and page not in ("index.md", "contents.md", "contributing.md")]
        reference = [{words["algorithms"]: within("algorithms")}, {words["api"]: api}, *single]
        return [
            {words["home"]: "index.md"},
            {voices["tutorials"]: within("tutorials")},
            {voices["guides"]: within("guides")},
            {voices["concepts"]: within("concepts")},
            {voices["reference"]: [*reference, "contributing.md", {words["contents"]: "contents.md"}]},
            {voices["decisions"]: within("decisions")},
        ]


def _reading_order(pages: dict[str, str]) -> Iterator[str]:
    """Yield the pages in the order in which docs/README.md names them, then the others by name."""
    contents = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    named = {page: contents.find(f"]({page}") for page in pages.values()}
    last = len(contents)
    yield from sorted(pages.values(), key=lambda page: (named[page] if named[page] >= 0 else last, page))
