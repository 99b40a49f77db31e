"""The prompt templates that a run used, read from its folder."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from selfeval.config import VerdictsConfig
from selfeval.errors import RunFolderError
from selfeval.judging.kinds import kinds_of_run
from selfeval.judging.templates import Templates, template_texts
from selfeval.links import refuse_links
from selfeval.store import read_run
from selfeval.texts import text_digest

__all__ = [
    "TEMPLATES",
    "copy_templates",
    "day_of",
    "stored_texts",
    "templates_of",
    "templates_of_run",
    "text_hash",
    "write_texts",
]

TEMPLATES = "templates"
"""Folder of the templates in a run folder, and key of their hashes in run.json."""


def day_of(run: Mapping[str, Any]) -> date:
    """Return the date that templates print: the day the run began, or today if it has not begun.

    Args:
        run: content of run.json.

    Raises:
        RunFolderError: it contains no date.
    """
    found = run.get("date")
    try:
        # Once the run has begun, its own date: prompts must not change when it is resumed on another day.
        return date.today() if found is None else date.fromisoformat(found)
    except (TypeError, ValueError) as error:
        raise RunFolderError(
            f'run.json has the invalid date {found!r} (expected a day such as "2026-01-31"); remove run.json and rerun the '
            "full command: the recipe or --model, --seeds and every --set"
        ) from error


def templates_of_run(folder: Path, tokenizer: PreTrainedTokenizerBase, verdicts: VerdictsConfig) -> Templates:
    """Return the templates that a run used, even if the model folder has changed since.

    Args:
        folder: folder of the run or of one of its rounds.
        tokenizer: tokenizer of its model.
        verdicts: settings of its verdicts, which name the judge whose templates are read.

    Raises:
        RunFolderError: they are missing, or have changed since the run wrote them.
    """
    root = _root(folder)
    refuse_links(root, [root / TEMPLATES], RunFolderError)
    run = read_run(root)
    known, texts = run.get(TEMPLATES) or {}, stored_texts(root)
    remedy = "rerun the run's own command (`selfeval run`), which copies them there"
    if not known or not texts:
        raise RunFolderError(f"{root / TEMPLATES} does not contain the prompt templates that the run used; {remedy}")
    changed = sorted(name for name in {*known, *texts} if name not in texts or known.get(name) != text_hash(texts[name]))
    if changed:
        raise RunFolderError(
            f"{root / TEMPLATES / changed[0]} differs from the version that the run used; restore it, or {remedy}"
        )
    return Templates.load(root / TEMPLATES, tokenizer, day_of(run), texts, kinds_of_run(verdicts))


def copy_templates(folder: Path, target: Path) -> None:
    """Copy the templates that a run used into an exported folder; `templates_of_run` has checked them."""
    write_texts(stored_texts(_root(folder)), target)


def templates_of(folder: Path) -> Path:
    """Return the folder of the templates that a run used.

    Raises:
        RunFolderError: the folder is a round that was copied without its run.
    """
    return _root(folder) / TEMPLATES


def _root(folder: Path) -> Path:
    """Return the folder of the run that a round belongs to.

    Raises:
        RunFolderError: the folder is a round that was copied without its run.
    """
    number = read_run(folder).get("round", 1)
    if number == 1:
        return folder
    # Resolved, because a relative path such as "." has no parents to look at.
    whole = folder.resolve()
    if whole.parent.name != "rounds" or not (whole.parents[1] / "run.json").is_file():
        raise RunFolderError(
            f"{folder} is round {number} of a run, but is not inside the run folder, which contains the prompt templates; "
            f"copy the complete run folder and pass RUN/rounds/{number:02d}"
        )
    return whole.parents[1]


def stored_texts(root: Path) -> dict[str, str]:
    """Return the text of all templates in a run folder by file name; empty before they were copied there."""
    return template_texts(root / TEMPLATES) if (root / TEMPLATES).is_dir() else {}


def write_texts(texts: Mapping[str, str], target: Path) -> None:
    """Write templates to a folder, byte for byte."""
    for name, text in texts.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text(text, encoding="utf-8", newline="")


def text_hash(text: str) -> str:
    """Return the hash of a template that run.json stores."""
    return text_digest(text).hex()
