"""Run every `selfeval` command in a code block of the guides, in order and at toy size."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from snippets import SHELL, blocks, commands

from processes import selfeval
from selfeval.errors import ConfigError
from selfeval.execution.sandbox import check_sandbox
from toy import FEW, LAB, with_settings

ROOT = Path(__file__).resolve().parents[2]
GUIDES = ("first-run", "your-own-model", "use-elsewhere", "your-own-data")
"""Guides with such commands, in an order in which they work: the third one exports the run of the second one."""

SMALL = (*FEW, "verdicts.tie=1.0")

REFUSED = {
    "selfeval run --set policy.iterations=40",
    "selfeval run recipes/own-model.toml --set questions.train=200 --until pairs",
}
"""Commands that change a finished run of the guide, so without a terminal they ask for --restart."""

PROBLEMS = [(f"{name} has {n} pens. {name} buys {n + 3} more. How many pens does {name} have now?", 2 * n + 3)
            for n in range(11, 21) for name in ("Ben", "Mia", "Tom")]  # fmt: skip


def _commands(page: Path) -> Iterator[str]:
    for block in blocks(page):
        if block.language in ("", *SHELL):
            yield from (line for line in commands(block.text) if line.startswith("selfeval "))


def _write(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the guides name. The recipe for a model of one's own gets the embedded model in place of a hub id."""
    folder = tmp_path_factory.mktemp("guides")
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    shutil.copytree(LAB, folder / "src" / "selfeval" / "lab")
    shutil.copytree(LAB / "word_problems", folder / "path" / "to" / "model")
    shutil.copy(LAB / "seeds.jsonl", folder / "seeds.jsonl")
    recipe = folder / "recipes" / "own-model.toml"
    text, changed = re.subn(r'^model = ".*"$', 'model = "../path/to/model"', recipe.read_text("utf-8"), flags=re.MULTILINE)
    assert changed == 1
    recipe.write_text(text.replace('seeds = "example-seeds.jsonl"', 'seeds = "../seeds.jsonl"'), encoding="utf-8")
    _write(folder / "problems.jsonl", [{"question": question, "answer": answer} for question, answer in PROBLEMS])
    _write(folder / "tasks.jsonl", [{"question": question, "tests": ["assert answer() > 0"]} for question, _ in PROBLEMS])
    pairs = [{"prompt": q, "chosen": f"The answer is {a}", "rejected": f"The answer is {a + 1}"} for q, a in PROBLEMS]
    _write(folder / "my_pairs.jsonl", list(pairs))
    _write(
        folder / "replies.jsonl", [{"question": q, "replies": ["The answer is 5", f"The answer is {a}"]} for q, a in PROBLEMS]
    )
    return folder


def test_every_guide_with_commands_is_here() -> None:
    found = {page.stem for page in (ROOT / "docs" / "guides").glob("*.md") if list(_commands(page))}
    assert found == set(GUIDES)


@pytest.mark.slow
def test_the_commands_of_the_guides_work_in_their_order(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    for guide in GUIDES:
        _run_guide(guide, folder)


def _has_sandbox() -> bool:
    try:
        check_sandbox()
    except ConfigError:
        return False
    return True


def _run_guide(guide: str, folder: Path) -> None:
    for line in _commands(ROOT / "docs" / "guides" / f"{guide}.md"):
        if guide == "your-own-data":  # its commands are alternatives with the same --output
            shutil.rmtree(folder / "runs" / "mine", ignore_errors=True)
        if "--allow-code-execution" in line and not _has_sandbox():
            continue
        done = selfeval(*with_settings(shlex.split(line.partition(" > ")[0])[1:], SMALL))
        if line in REFUSED:
            assert (done.returncode, "--restart" in done.stderr) == (2, True), (line, done.stderr)
        else:
            assert done.returncode == 0, (line, done.stderr)
        if guide == "your-own-data":
            report = json.loads((folder / "runs" / "mine" / "report.json").read_text(encoding="utf-8"))
            assert report["verdicts"]["source"] == ("file" if "pairs.file" in line else "judge")
