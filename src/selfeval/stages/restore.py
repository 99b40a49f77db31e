"""Restore results that were set aside: `selfeval restore`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from selfeval.config import config_of_run
from selfeval.errors import RunFolderError
from selfeval.stages.changes import cost, differences
from selfeval.stages.graph import STAGES, Stage, source_of
from selfeval.store import OF_THE_RUN, Archive, Expected, Ledger, Output, RunStore, read_run

__all__ = ["listed", "restore"]


def listed(folder: Path) -> list[str]:
    """List the results that can be restored, one line per number: stages, cost, and settings that differ from today's.

    The folder of the run is only read, without its lock.
    """
    archive, now = Archive(folder), read_run(folder).get("config") or {}
    lines = []
    for number in archive.numbers():
        facts = archive.facts(number)
        stages = "; ".join(f"{name} ({cost(row)})" for name, row in facts["stages"].items())
        known = facts["config"] is not None
        changed = "; ".join(differences(facts["config"], now)) or "the same settings" if known else "settings unknown"
        lines.append(f"{number}: {stages}. {changed}")
    return lines


def restore(store: RunStore, number: int) -> list[str]:
    """Move results that were set aside back, with their configuration. The current results are set aside.

    If these results were restored last and are still in their place, nothing is done.

    Args:
        store: folder of the run, or of one of its later rounds.
        number: number of the folder in `replaced/`.

    Returns:
        The names of the stages that were restored.

    Raises:
        RunFolderError: there is no such number, its results were computed from inputs that have changed since, or other files
            are in their place.
    """
    archive = Archive(store.root)
    if number not in archive.numbers() and (names := _already_restored(store, number)):
        return names
    facts = archive.facts(number)
    restored = [stage for stage in STAGES if stage.name in facts["stages"]]
    if not restored:
        raise RunFolderError(f"{archive.folder / str(number)} contains no stage of a run; there is nothing to restore")
    # Before anything is moved.
    _refuse_other_sources(store, restored[0], facts)
    room = _in_the_way(store, restored, facts)
    rows = {name: row for name, row in store.run.get("stages", {}).items() if name not in facts["stages"]}
    config = {name: facts[name] for name in OF_THE_RUN if facts.get(name) is not None}
    # With the results: after a kill any command completes the move, and the same command may be repeated after it.
    note = {"number": number, "keys": {stage.name: _key_in(facts, stage.name) for stage in restored}}
    store.put_back(number, room, **config, status="partial", stages={**rows, **facts["stages"]}, restored=note)
    return [stage.name for stage in restored]


def _already_restored(store: RunStore, number: int) -> list[str]:
    """Return the stages that were the results of this number, if they were restored last and are still in their place."""
    note = store.run.get("restored") or {"number": None}
    if note["number"] != number:
        return []
    ledger, keys = Ledger(store.root), note["keys"]
    return list(keys) if all(key is not None and ledger.key(name) == key for name, key in keys.items()) else []


def _key_in(facts: Mapping[str, Any], stage: str) -> str | None:
    key: str | None = facts["keys"].get(stage, {}).get("key")
    return key


def _refuse_other_sources(store: RunStore, first: Stage, facts: Mapping[str, Any]) -> None:
    """Refuse results whose input stages have changed since they were computed."""
    for stage in STAGES[: STAGES.index(first)]:
        # A stage without a key had not begun when these results were set aside.
        wanted = _key_in(facts, stage.name)
        if wanted is not None and Ledger(store.root).key(stage.name) != wanted:
            raise _other_sources(store.root, first, stage)
    if facts["config"] is None:
        return  # without their settings the results are refused below
    inputs = facts["keys"].get(first.name, {}).get("inputs")
    config = config_of_run(facts["config"], store.root / "replaced")
    for edge in first.reads:
        read = source_of(edge.stage, config)
        # Outputs of other rounds are compared when the run is run.
        if inputs is not None and edge.rounds == "this" and not _can_be_made_from(store, first, read, inputs):
            raise _other_sources(store.root, first, next(stage for stage in STAGES if stage.name == read))


def _can_be_made_from(store: RunStore, stage: Stage, read: str, inputs: str) -> bool:
    """Return whether the output that a stage reads is finished, and is what the stage was computed from.

    A stage that gathers outputs of several rounds is compared when the run is run.
    """
    content = Output(store.root, read).content
    return content is not None and (stage.gathers or content == inputs.partition("+")[0])  # after it: labels of people


def _other_sources(root: Path, first: Stage, stage: Stage) -> RunFolderError:
    return RunFolderError(
        f"{first.name} was computed from other results of {stage.name} than those now in {root}; restore those first (list "
        f"them: selfeval restore {root})"
    )


def _in_the_way(store: RunStore, stages: list[Stage], facts: Mapping[str, Any]) -> dict[str, list[Path]]:
    """Return the stages with results in the places to be filled, and their files and folders, by both configurations."""
    if facts["config"] is None:
        raise RunFolderError(
            "the settings of these results are unknown, because run.json was missing when they were set aside; move the files "
            f"you need from {store.root / 'replaced'} into the run folder yourself"
        )
    old = config_of_run(facts["config"], store.root / "replaced")
    now = config_of_run(store.run["config"], store.root / "run.json")
    moved = {s.name: [*dict.fromkeys([*s.moved_paths(store.root, now), *s.moved_paths(store.root, old)])] for s in stages}
    return {
        name: paths for name, paths in moved.items() if Ledger(store.root, {name: Expected("", owned=paths)}).has_work(name)
    }
