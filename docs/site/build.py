"""Build the documentation site in English and Chinese, offline, into build/site.

.venv-docs/bin/python docs/site/build.py [--to FOLDER]

A warning of MkDocs, such as a link to a page that does not exist, fails the build.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from sources import Tree  # noqa: E402
from translations import ROOT  # noqa: E402

_LANGUAGES = {"en": "English", "zh": "简体中文"}
# Words end at these characters; \u200b is what the search plugin puts between Chinese words.
_SEPARATOR = r"[\s\u200b\u3000-\u303f\uff00-\uffef\-_,:!=\[\]()\"`/]+|\.(?!\d)|&[lg]t;"


def _settings(language: str, work: Path, site: Path, navigation: list[object]) -> dict[str, object]:
    to = {
        "en": "index.html" if language == "en" else "../index.html",
        "zh": "zh/index.html" if language == "en" else "index.html",
    }
    python = {
        "paths": [str(ROOT / "src")],
        "options": {
            "docstring_style": "google",
            "extensions": [str(HERE / "example_sections.py")],
            "docstring_section_style": "list",
            "heading_level": 2,
            "inherited_members": True,
            "members_order": "source",
            "merge_init_into_class": True,
            "separate_signature": True,
            "show_root_heading": True,
            "show_root_full_path": False,
            "show_signature_annotations": True,
            "show_source": False,
            "show_symbol_type_heading": True,
            "signature_crossrefs": True,
        },
    }
    return {
        "INHERIT": os.path.relpath(HERE / "mkdocs.yml", work),
        "docs_dir": str(work / "pages"),
        "site_dir": str(site),
        "theme": {"language": language},
        "nav": navigation,
        "plugins": [
            {"search": {"lang": ["en"] if language == "en" else ["zh", "en"], "separator": _SEPARATOR}},
            {"offline": {}},
            {"mkdocstrings": {"handlers": {"python": python}}},
        ],
        # The plugin `offline` would load its own script of this name from another host.
        "extra": {
            "polyfills": ["assets/iframe-worker.js"],
            "alternate": [{"name": name, "link": to[key], "lang": key} for key, name in _LANGUAGES.items()],
        },
    }


def build(to: Path, language: str) -> None:
    """Build the site in one language; Chinese is a folder of the English site."""
    work = to.parent / f"{to.name}-sources" / language
    navigation = Tree(language, work / "pages").write()
    (work / "pages" / "assets").mkdir(exist_ok=True)
    for name in ("site.css", "accessibility.js", "iframe-worker.js"):
        shutil.copyfile(HERE / name, work / "pages" / "assets" / name)
    settings = _settings(language, work, to if language == "en" else to / "zh", navigation)
    (work / "mkdocs.yml").write_text(json.dumps(settings, ensure_ascii=False, indent=1), encoding="utf-8")
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-m", "mkdocs", "build", "--strict"]
    subprocess.run([*command, "--config-file", work / "mkdocs.yml"], check=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})


def main() -> int:
    parser = argparse.ArgumentParser(description="Builds the documentation site.")
    parser.add_argument("--to", type=Path, default=ROOT / "build" / "site", help="folder to write (default: build/site)")
    to = parser.parse_args().to.resolve()
    start = time.perf_counter()
    shutil.rmtree(to, ignore_errors=True)
    for language in _LANGUAGES:  # English first: MkDocs empties the folder that it writes
        build(to, language)
    files = [path for path in to.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files) / 2**20
    pages = sum(path.suffix == ".html" for path in files)
    print(f"{to}/index.html: {pages} pages, {size:.1f} MiB, {time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
