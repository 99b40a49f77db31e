"""Do what the tutorials say, from top to bottom, with small models and at toy size."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from snippets import SHELL, Block, blocks, commands

import bigram_chat
from processes import python, script, selfeval
from selfeval.errors import ConfigError
from selfeval.execution.sandbox import check_sandbox
from toy import FEW, LAB, with_settings

ROOT = Path(__file__).resolve().parents[2]
TUTORIALS = ROOT / "docs" / "tutorials"

LIMITS = ("verdicts.max_new_tokens=32", "replies.max_new_tokens=32")
ANY_VERDICT = ("verdicts.tie=1.0", "verdicts.label_mass=0", "verdicts.reasoning=false")
"""The judge of a small model keeps every verdict, however improbable, so that there is something to train on."""
SIZES = (*FEW, *LIMITS, *ANY_VERDICT, "policy.watchdogs=warn", "backbone.device=cpu")
"""For `selfeval run`."""
QUICK = ("--minutes", "0.1", *(part for limit in LIMITS for part in ("--set", limit)))
"""For `selfeval check`."""

LABELS = [
    f"{lead} {label}"
    for lead, labels in {
        "Verdict:": ("A", "B", "tie"),
        "Better response:": ("1", "2", "neither"),
        "Better writer:": ("1", "2", "neither"),
        "Grade:": ("1", "2", "3", "4"),
    }.items()
    for label in labels
]
"""Verdicts of all judges and referees of the tutorials."""


def _embedded(folder: Path) -> None:
    shutil.copytree(LAB / "word_problems", folder)


def _coder(folder: Path) -> None:
    tasks = _questions("code")
    names = [found[1] for task in tasks if (found := re.search(r"function (\w+)", task))]
    values = ("x * 2", "x[-1]", "max(x)")
    programs = [f"```python\ndef {name}(x):\n    return {value}\n```" for name in names for value in values]
    bigram_chat.write(folder, [*tasks, *programs, *LABELS], whims=0.5)


def _writer(folder: Path) -> None:
    bigram_chat.write(folder, [*_questions("writing"), *LABELS], whims=0.5)


MODELS: dict[str, Callable[[Path], None]] = {"mathematics": _embedded, "code": _coder, "writing": _writer}
"""The tutorials, and what writes `path/to/model`: the embedded model, or one that only strings words together."""


def _questions(name: str) -> list[str]:
    lines = [line for block in _on_the_page(name) if block.title.endswith(".jsonl") for line in block.text.splitlines()]
    return [json.loads(line)["question"] for line in lines]


def _on_the_page(name: str) -> list[Block]:
    return blocks(TUTORIALS / f"{name}.md")


def _command_lines(name: str) -> Iterator[str]:
    for block in _on_the_page(name):
        if block.language in SHELL:
            yield from commands(block.text)


def _has_sandbox() -> bool:
    try:
        check_sandbox()
    except ConfigError:
        return False
    return True


def _run(line: str) -> None:
    program, *words = shlex.split(line, comments=True)
    if program == "python":
        done = script(Path(words[0]), *words[1:])
    elif words[0] == "check":  # 3: it recommends no run, as is right for a model that strings words together
        done = selfeval(*words, *QUICK)
    else:
        done = selfeval(*with_settings(words, SIZES))
    allowed = (0, 3) if words[0] == "check" else (0,)
    assert done.returncode in allowed, (line, done.stdout[-2000:], done.stderr[-4000:])


def _follow(name: str, folder: Path) -> None:
    for block in _on_the_page(name):
        if block.title:
            (folder / block.title).parent.mkdir(parents=True, exist_ok=True)
            (folder / block.title).write_text(block.text, encoding="utf-8")
        elif block.language in SHELL:
            for line in commands(block.text):
                _run(line)
        elif block.language == "python":
            done = python(f"import warnings; warnings.simplefilter('ignore')\n{block.text}", cwd=folder)
            assert done.returncode == 0, (block.text, done.stderr)


@pytest.mark.parametrize("name", MODELS)
def test_a_tutorial_uses_commands_of_the_package_and_scripts_that_it_shows(name: str) -> None:
    titles = {block.title for block in _on_the_page(name)}
    lines = list(_command_lines(name))
    words = {line.split()[1] for line in lines if line.startswith("selfeval ")}
    assert {"check", "plan", "run", "show", "score", "export"} <= words
    others = [shlex.split(line, comments=True) for line in lines if not line.startswith("selfeval ")]
    assert [parts for parts in others if parts[0] != "python" or parts[1] not in titles] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_tutorial_works_from_top_to_bottom(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "--allow-code-execution" in "".join(_command_lines(name)) and not _has_sandbox():
        pytest.skip("there is no sandbox for code on this system")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    MODELS[name](tmp_path / "path" / "to" / "model")
    _follow(name, tmp_path)
