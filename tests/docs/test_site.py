"""The documentation site: a strict build in both languages, its pages in a browser, and the links of its source tree."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import sources
from test_browser import FLAGS, axe_core

import selfeval

ROOT = Path(__file__).resolve().parents[2]


PYTHON = ROOT / ".venv-docs" / "bin" / "python"


# -- the source tree ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["en", "zh"])
def tree(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    folder = tmp_path_factory.mktemp(request.param)
    return folder, sources.Tree(request.param, folder).write()


def _named(entries: Any) -> set[str]:
    """Return the pages in a navigation."""
    if isinstance(entries, str):
        return {entries}
    children = entries.values() if isinstance(entries, dict) else entries
    return set().union(*(_named(child) for child in children))


def test_every_link_leads_to_a_file_of_the_tree(tree: tuple[Path, list[Any]]) -> None:
    folder, _ = tree
    links = 0
    for page in folder.rglob("*.md"):
        for match in sources._TOKENS.finditer(page.read_text(encoding="utf-8")):
            target = (match["target"] or "").partition("#")[0]
            if not target or re.match(r"[a-z][a-z0-9+.-]*:", target) or target.endswith("index.html"):
                continue
            links += 1
            assert (page.parent / target).is_file(), f"{page.relative_to(folder)} links to {target}"
    assert links > 200


def test_navigation_has_every_page_but_those_of_linked_files(tree: tuple[Path, list[Any]]) -> None:
    folder, navigation = tree
    pages = {page.relative_to(folder).as_posix() for page in folder.rglob("*.md")}
    assert {page for page in pages if not page.startswith("repository/")} == _named(navigation)
    assert "repository/recipes/toy.toml.md" in pages
    assert "max_new_tokens" in (folder / "repository/recipes/toy.toml.md").read_text(encoding="utf-8")


def test_there_is_an_entry_for_every_public_name(tree: tuple[Path, list[Any]]) -> None:
    folder, _ = tree
    written = re.findall(r"^::: selfeval\.(\w+)$", "\n".join(p.read_text() for p in (folder / "api").iterdir()), re.MULTILINE)
    assert sorted(written) == sorted({*selfeval.__all__} - {"__version__"})


def test_links_in_code_stay_and_a_link_to_nothing_is_an_error(tmp_path: Path) -> None:
    tree = sources.Tree("en", tmp_path)
    page = ROOT / "docs" / "guides" / "check.md"
    changed = tree._linked("[a](x.md) `[b](x.md)`\n```\n[c](x.md)\n```\n", lambda link: f"new-{link}")
    assert changed == "[a](new-x.md) `[b](x.md)`\n```\n[c](x.md)\n```\n"
    assert tree._link(page, "guides/check.md", "../../recipes/toy.toml") == "../repository/recipes/toy.toml.md"
    assert tree._link(page, "guides/check.md", "../../README.md#limits") == "../index.md#limits"
    with pytest.raises(LookupError, match=r"docs/guides/check.md links to nowhere.md, which does not exist"):
        tree._link(page, "guides/check.md", "nowhere.md")


# -- the built site -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not PYTHON.is_file():
        pytest.skip(".venv-docs is missing: the site is not built here; make docs builds both")
    folder = tmp_path_factory.mktemp("site") / "site"
    command = [PYTHON, ROOT / "docs" / "site" / "build.py", "--to", folder]
    # A proxy that refuses every connection: what is fetched while building fails the build.
    offline = {**os.environ, "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    done = subprocess.run(command, capture_output=True, text=True, env=offline, timeout=580, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder


class Resources(HTMLParser):
    """Collect what a browser loads with a page; links that a reader follows do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        names = ("src", "srcset", "poster", "data") if tag != "a" else ()
        self.found += [value for name in names if (value := values.get(name))]
        if tag == "link" and values.get("rel") not in ("alternate", "next", "prev", "canonical"):
            self.found.append(values.get("href") or "")


def _resources(page: Path) -> list[str]:
    parser = Resources()
    text = page.read_text(encoding="utf-8")
    parser.feed(text)
    return parser.found + re.findall(r"url\(\s*['\"]?([^'\")]+)", text)


@pytest.mark.slow
def test_no_page_loads_a_resource_from_another_host(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 150
    for page in pages:
        for resource in _resources(page):
            assert not re.match(r"(https?:)?//", resource), f"{page.relative_to(site)} loads {resource}"
            if not resource.startswith("data:"):
                base = site / ("zh" if "zh" in page.relative_to(site).parts else "") if page.name == "404.html" else page.parent
                assert (base / resource.lstrip("/")).is_file(), f"{page.relative_to(site)} loads {resource}"
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(url\(\s*['\"]?|@import\s+['\"])(https?:)?//", sheet.read_text(encoding="utf-8")), sheet


@pytest.mark.slow
@pytest.mark.parametrize(("folder", "text"), [("", "Train a reward model"), ("zh", "奖励模型")])
def test_both_languages_have_pages_search_and_python_api(site: Path, folder: str, text: str) -> None:
    index = json.loads((site / folder / "search" / "search_index.json").read_text(encoding="utf-8"))
    found = {entry["location"]: entry["text"] for entry in index["docs"]}
    assert {f"api/{name}.html" for name in selfeval.__all__ if not re.search("Error$|^__", name)} <= set(found)
    assert "api/errors.html#selfeval.SeedsError" in found
    assert "questions" in found["api/Policy.html#selfeval.Policy.reply"]
    home = (site / folder / "index.html").read_text(encoding="utf-8")
    assert text in home
    assert (site / folder / "search" / "search_index.js").is_file(), "without it the search needs a server"
    languages = {"": "zh/index.html", "zh": "../index.html"}
    assert f'href="{languages[folder]}"' in home


def _in_browser(address: str, folder: Path, width: int = 1280) -> str:
    """Return the document after its scripts have run."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed: the site is not opened in a browser here")
    command = [chromium, *FLAGS, f"--user-data-dir={folder / 'profile'}", f"--window-size={width},1000"]
    command += ["--virtual-time-budget=20000", "--dump-dom", address]
    return subprocess.run(command, capture_output=True, text=True, timeout=180, check=True).stdout


@pytest.mark.slow
@pytest.mark.parametrize(("page", "query", "count"), [("index.html", "evaluator", 10), ("zh/index.html", "奖励模型", 1)])
def test_search_finds_pages_from_a_folder_without_a_server(
    site: Path, tmp_path: Path, page: str, query: str, count: int
) -> None:
    dom = _in_browser(f"{(site / page).as_uri()}?q={query}", tmp_path)
    found = re.search(r'md-search-result__meta">(\d+|找到 (\d+))', dom)
    assert found is not None, re.findall(r'md-search-result__meta">[^<]*', dom)
    assert int(found[2] or found[1]) >= count


RULES = """
setTimeout(() => axe.run(document, {runOnly: {type: "tag", values: ["wcag2a", "wcag2aa", "best-practice"]}}).then(found => {
  const seen = found.violations.filter(v => ["serious", "critical"].includes(v.impact));
  const shown = seen.map(v => [v.id, v.help, v.nodes.map(n => n.html.slice(0, 160))]);
  document.body.setAttribute("data-found", JSON.stringify(shown));
}), 500);
"""
PAGES = [("index.html", 1280, "default"), ("api/Run.html", 1280, "slate"), ("zh/guides/check.html", 500, "slate")]


@pytest.mark.slow
@pytest.mark.parametrize(("page", "width", "scheme"), PAGES)
def test_pages_break_no_serious_rule_of_accessibility(site: Path, tmp_path: Path, page: str, width: int, scheme: str) -> None:
    rules = f"<script>{axe_core()}{RULES}</script></body>"
    text = (site / page).read_text(encoding="utf-8").replace("</body>", rules)
    copy = (site / page).with_name(f"checked-{width}-{scheme}.html")
    copy.write_text(text.replace('data-md-color-scheme="default"', f'data-md-color-scheme="{scheme}"', 1), encoding="utf-8")
    dom = _in_browser(copy.as_uri(), tmp_path, width)
    copy.unlink()
    assert f'data-md-color-scheme="{scheme}"' in dom
    found = re.search('data-found="([^"]*)"', dom)
    assert found is not None, "the script did not come to its end"
    assert json.loads(html.unescape(found[1])) == []
