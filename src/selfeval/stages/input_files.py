"""The user's files that a run is made of, and which of them a run that is resumed by its folder may read.

run.json has a fingerprint of the content of each (`made_of`). A run folder may come from somebody else, and its run.json could
name any file of this machine, whose text would end up in prompts and records. A file outside of the run folder is therefore
read only if its content is the recorded one, which nobody can record without knowing it, or if the command itself names it.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

from selfeval.config import RunConfig
from selfeval.errors import InputError, RunFolderError
from selfeval.judging.rubric import with_rubric
from selfeval.judging.templates import template_texts, templates_folder
from selfeval.records import Seed
from selfeval.stages.given import given_key
from selfeval.stages.gold import gold_key
from selfeval.stages.seeds import read_seeds
from selfeval.store import fingerprint

__all__ = ["file_fingerprints", "refuse_other_files"]

_TEMPLATES = "the templates"
_GIVEN = "the file of questions, replies or pairs"
_GOLD = "the gold file"
_SEEDS = "the seeds"


def file_fingerprints(config: RunConfig, seeds: Sequence[Seed]) -> dict[str, str]:
    """Return fingerprints of the user's files for run.json."""
    return {name: find(config, seeds) for name, find in _FINGERPRINTS.items()}


def refuse_other_files(run: Path, made_of: Mapping[str, Any], config: RunConfig, is_named: Callable[[str], bool]) -> None:
    """Refuse files that only run.json names, unless they are in the run folder or the run was made of them.

    A missing file is not refused here: its reader says so.

    Args:
        run: run folder.
        made_of: fingerprints that its run.json recorded.
        config: configuration to resume with.
        is_named: returns whether this command itself sets a dotted key.

    Raises:
        RunFolderError: there is such a file; the message names the option that allows it.
    """
    for key, name in _SETTINGS.items():
        path = Path(attrgetter(_FIELDS.get(key, key))(config))
        if path == Path() or is_named(key) or not path.exists() or path.resolve().is_relative_to(run.resolve()):
            continue
        if made_of.get(name) is None or made_of[name] != _content(key, name, path, config):
            raise _other_file(run, key, path)


_FINGERPRINTS: dict[str, Callable[[RunConfig, Sequence[Seed]], str]] = {
    _TEMPLATES: lambda config, seeds: fingerprint(
        with_rubric(template_texts(templates_folder(config.model, config.templates)), config.verdicts.rubric)
    ),
    _GIVEN: lambda config, seeds: fingerprint(given_key(config)),
    _GOLD: lambda config, seeds: gold_key(config),
    _SEEDS: lambda config, seeds: fingerprint([seed.question for seed in seeds]),
}
"""By name in run.json."""

_SETTINGS = {
    "templates": _TEMPLATES,
    "questions.file": _GIVEN,
    "replies.file": _GIVEN,
    "pairs.file": _GIVEN,
    "gold": _GOLD,
    "seeds": _SEEDS,
    "verdicts.pointwise.rubric": _TEMPLATES,
}
"""Settings that name a file, with the name of its fingerprint. The rubric is one of the templates."""
_FIELDS = {"verdicts.pointwise.rubric": "verdicts.rubric"}
"""Attributes of the settings that are in the section of a judge."""


def _content(key: str, name: str, path: Path, config: RunConfig) -> str | None:
    """Return the fingerprint of a file; None if it cannot be read, without the reader's message, which quotes the file."""
    if not (path.is_file() or key == "templates"):  # a named pipe would never end
        return None
    try:
        return _FINGERPRINTS[name](config, read_seeds(str(path)) if key == "seeds" else [])
    except InputError:
        return None


def _other_file(run: Path, key: str, path: Path) -> RunFolderError:
    option = partial(_option, key)
    own = run / "seeds.jsonl"
    kept = f"; to keep the run's own: {option(own)}" if key == "seeds" and own.is_file() else ""
    return RunFolderError(
        f"{run / 'run.json'} sets {key} = {path}, which is outside of the run folder, and the run was not made of its present "
        f"content: it has changed, or the run folder comes from another machine. To use it as it is, add {option(path)}{kept}"
    )


def _option(key: str, value: Path) -> str:
    return f"--set {shlex.quote(f'{key}={value}')}"
