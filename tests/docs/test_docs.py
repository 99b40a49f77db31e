"""Everything that the docs name must exist: links, commands, options, settings, stages, files, modules, make targets."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import typing
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
from pydantic import TypeAdapter, ValidationError
from translations import anchors

from selfeval.cli.app import app
from selfeval.config import EMBEDDERS, JUDGES, LEARNERS, EmbeddingsConfig, PolicyConfig, RunConfig
from selfeval.report.schema import Report
from selfeval.stages import STAGE_NAMES

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "recipes").rglob("*.md")])

_FENCE = re.compile(r"^ *(```+|~~~+) *(\w*)[^\n]*\n(.*?)^ *\1 *$", re.DOTALL | re.MULTILINE)
_SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_LINK = re.compile(r"!?\[(?:[^\]\[]|\[[^\]]*\])*\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)|(?:src|href)=\"([^\"]+)\"")
_PLACEHOLDER = re.compile(r"\.\.\.|…|^[A-Z][A-Z0-9_.]*(?:=[A-Z]+)?$|^<.*>$|^\[.*\]?$|^\|$")


def _text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def _prose(page: Path) -> str:
    return _FENCE.sub("", _text(page))


def _blocks(page: Path) -> list[tuple[str, str]]:
    """(language, content) of the fenced blocks."""
    return [(match.group(2), match.group(3)) for match in _FENCE.finditer(_text(page))]


def _spans(page: Path) -> list[str]:
    return [match.group(1).strip() for match in _SPAN.finditer(_prose(page))]


@cache
def _anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, and those that are set by hand."""
    return {*anchors(page), *re.findall(r"<a (?:id|name)=\"([^\"]+)\"", _text(page))}


def _links(page: Path) -> Iterator[str]:
    without_code = _SPAN.sub("", _prose(page))
    for match in _LINK.finditer(without_code):
        yield match.group(1) or match.group(2)
    yield from re.findall(r"^\[[^\]]+\]:\s*(\S+)", without_code, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in _links(page):
        if re.match(r"[a-z][a-z0-9+.-]*:", link):
            continue
        target, _, anchor = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        lost = anchor and path.suffix == ".md" and path.exists() and anchor not in _anchors(path)
        if not path.exists() or not path.is_relative_to(ROOT) or lost:
            broken.append(link)
    assert broken == []


# -- commands -----------------------------------------------------------------------------------------------------------


def _command_lines(page: Path) -> Iterator[str]:
    """Return every `selfeval ...`, `make ...` and so on in a code block or a code span."""
    for language, content in _blocks(page):
        if language in ("", "bash", "sh", "shell", "console", "text"):
            for line in content.replace("\\\n", " ").splitlines():
                yield re.sub(r"^\s*(\$ |.*?/bin/(?=selfeval))?", "", line).strip()
    yield from _spans(page)


def _words(line: str) -> list[str]:
    """The words of one command: up to two blanks (a remark follows), a comment, or the next command."""
    command = re.split(r"\s{2,}|\s#|\s(?:&&|\|\||;|>|\|)\s", line)[0]
    apostrophe = command.count("'") == 1
    return [re.sub(r"^\[|\]$", "", word) for word in (command.split() if apostrophe else shlex.split(command))]


def _options(command: Any) -> dict[str, Any]:
    return {
        name: parameter
        for parameter in command.params
        for name in (*parameter.opts, *parameter.secondary_opts)
        if name.startswith("-")
    }


def _keys(allowed: Any, key: str) -> list[str]:
    """The key, if a table with keys of this type may have it."""
    try:
        return [TypeAdapter(allowed).validate_python(key)]
    except ValidationError:
        return []


def _check_setting(assignment: str) -> str | None:
    model: Any = RunConfig
    for part in assignment.split("=")[0].split("."):
        if typing.get_origin(model) is dict:  # a table whose keys are the user's, within what its type allows
            allowed, model = typing.get_args(model)
            if part not in _keys(allowed, part):
                return f"--set {assignment}: no such key"
            continue
        if model is PolicyConfig and part in LEARNERS:
            model = LEARNERS[part].config
            continue
        if model is EmbeddingsConfig and part in EMBEDDERS:
            model = EMBEDDERS[part].config
            continue
        fields = getattr(model, "model_fields", {})
        if part not in fields:
            return f"--set {assignment}: no such key"
        model = fields[part].annotation
    return None


@cache
def _selfeval() -> Any:
    """Return the command with its subcommands, which takes a tenth of a second to build."""
    return typer.main.get_command(app)


def _problems(words: list[str]) -> list[str]:
    """Return the names in a command line that do not exist."""
    command, rest = _selfeval(), words[1:]
    while hasattr(command, "commands") and rest and not rest[0].startswith("-") and not _PLACEHOLDER.search(rest[0]):
        if rest[0] not in command.commands:
            return [f"{' '.join(words)}: no command {rest[0]}"]
        command, rest = command.commands[rest[0]], rest[1:]
    options, found = _options(command), []
    for word, value in zip(rest, [*rest, ""][1:], strict=True):
        name, _, attached = word.partition("=")
        if not name.startswith("-") or name == "--help":
            continue
        if name not in options:
            found.append(f"{' '.join(words)}: no option {name}")
        elif name == "--set" and not _PLACEHOLDER.search(value) and value != "key=value" and (problem := _check_setting(value)):
            found.append(problem)
        elif name == "--until" and not _PLACEHOLDER.search(attached or value) and (attached or value) not in STAGE_NAMES:
            found.append(f"{' '.join(words)}: no stage {value}")
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_exist_with_these_options(page: Path) -> None:
    lines = [line for line in _command_lines(page) if re.match(r"selfeval(\s|$)", line)]
    assert [problem for line in lines for problem in _problems(_words(line))] == []


def test_a_command_that_does_not_exist_is_noticed() -> None:
    """Check that the checker detects errors."""
    bad = {
        "selfeval walk": "no command walk",
        "selfeval run --fast": "no option --fast",
        "selfeval run --set policy.speed=3": "no such key",
        "selfeval run --until midnight": "no stage midnight",
        "selfeval lab dance": "no command dance",
    }
    for line, problem in bad.items():
        assert [problem in found for found in _problems(_words(line))] == [True], line
    good = ("selfeval run RECIPE --set policy.iterations=20   resumes", "selfeval lab exam --questions 10", "selfeval --help")
    for line in (*good, "selfeval show", "selfeval"):
        assert _problems(_words(line)) == []


@cache
def _make_words() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_make_words_exist(page: Path) -> None:
    used = {match.group(1) for line in _command_lines(page) if (match := re.match(r"make ([a-z-]+)", line))}
    assert used - _make_words() == set()


# -- settings, files, modules -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_settings_exist(page: Path) -> None:
    """A span such as `policy.iterations` or `verdicts.keep = 0.8` whose first word is a section of the recipe."""
    sections = {name for name, field in RunConfig.model_fields.items() if hasattr(field.annotation, "model_fields")}
    report_too = {"policy", "evaluator", "verdicts", "questions", "evaluation"}  # also sections of report.json and file names
    wrong = []
    for span in _spans(page):
        match = re.fullmatch(r"(\w+)\.(\w+(?:\.\w+)?)( ?= ?\S+)?", span)
        if not match or match.group(1) not in sections or match.group(2) in ("jsonl", "json", "py"):
            continue
        if (
            match.group(1) in report_too
            and not match.group(3)
            and _is_in_report(match.group(1), match.group(2).partition(".")[0])
        ):
            continue
        if _check_setting(f"{match.group(1)}.{match.group(2)}"):
            wrong.append(span)
    assert wrong == []


def _is_in_report(section: str, name: str) -> bool:
    """Return whether report.json has this key; `evaluation` and `questions` are only names of files there."""
    part = Report.model_fields[section].annotation if section in Report.model_fields else None
    return part is not None and name in part.model_fields


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_exist(page: Path) -> None:
    """Check the spans that are paths from the repository root, or packages of the source."""
    rooms = {path.name for path in (ROOT / "src" / "selfeval").iterdir() if path.is_dir()}
    missing = []
    for span in _spans(page):
        if not re.fullmatch(r"[\w./-]+", span) or "/" not in span:
            continue
        top = span.split("/")[0]
        if top in ("src", "tests", "docs", "recipes", "benchmarks", ".ci") and not (ROOT / span).exists():
            missing.append(span)
        run_folders = ("questions", "replies", "verdicts", "pairs", "policy", "evaluator", "evaluation", "report", "runs")
        if top in rooms - set(run_folders) and not (ROOT / "src" / "selfeval" / span).exists():
            missing.append(span)
    assert missing == []


def _resolves(name: str) -> bool:
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_modules_and_names_exist(page: Path) -> None:
    spans = {name for span in _spans(page) for name in re.findall(r"\bselfeval(?:\.\w+)+", span)} - {"selfeval.domains"}
    assert [name for name in sorted(spans) if not _resolves(name)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_snippets_compile_and_import_what_exists(page: Path) -> None:
    missing = []
    for language, content in _blocks(page):
        if language not in ("python", "py"):
            continue
        for node in ast.walk(ast.parse(content, filename=str(page))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("selfeval"):
                missing += [f"{node.module}.{a.name}" for a in node.names if not _resolves(f"{node.module}.{a.name}")]
            elif isinstance(node, ast.Import):
                missing += [a.name for a in node.names if a.name.startswith("selfeval") and not _resolves(a.name)]
    assert missing == []


# -- registries ---------------------------------------------------------------------------------------------------------


def test_every_learner_is_in_the_table_of_its_page() -> None:
    _, _, below = _text(ROOT / "docs" / "algorithms" / "learners.md").partition("| `policy.learner` |")
    table, _, _ = below.partition("\n\n")
    assert sorted(re.findall(r"^\| `(\w+)`", table, re.MULTILINE)) == sorted(LEARNERS)


def test_every_judge_is_on_its_page() -> None:
    assert [name for name in JUDGES if name not in _spans(ROOT / "docs" / "algorithms" / "judging.md")] == []
