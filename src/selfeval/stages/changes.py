"""Work that a changed configuration would set aside: listed with its cost, and moved only if the user agrees.

`--restart` counts as agreement. On a terminal the user is asked. Otherwise the command is refused and nothing is moved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from selfeval.backbone.snapshot import commit_of
from selfeval.errors import RunFolderError
from selfeval.stages.context import Context
from selfeval.stages.graph import STAGES, Stage, input_fingerprints
from selfeval.store import Ledger

__all__ = ["Loss", "agree", "cost", "differences", "loss_of", "what_changed"]


@dataclass(frozen=True)
class Loss:
    """Work that would be set aside.

    Attributes:
        stage: name of the stage, including the round if it is a later one.
        row: the stage's row in run.json.
    """

    stage: str
    row: Mapping[str, Any]

    def __str__(self) -> str:
        return f"{self.stage} ({cost(self.row)})"


def cost(row: Mapping[str, Any]) -> str:
    """Describe the cost of a stage: seconds and counts.

    Example:
        >>> cost({"state": "finished", "seconds": 12.34, "counts": {"train": 48}})
        '12.3 s; train 48'
    """
    counts = row.get("counts") or {}
    parts = [f"{row.get('seconds', 0.0):,.1f} s" + ("" if row.get("state") == "finished" else ", not finished")]
    return "; ".join([*parts, *([", ".join(f"{k} {v}" for k, v in counts.items())] if counts else [])])


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """List the settings in which two configurations differ, by dotted name with both values.

    Example:
        >>> differences({"seed": 0, "policy": {"epochs": 2}}, {"seed": 0, "policy": {"epochs": 1}})
        ['policy.epochs: 2, now 1']
    """
    found = []
    for name in dict.fromkeys([*old, *new]):
        one, other = old.get(name), new.get(name)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            found += differences(one, other, f"{prefix}{name}.")
        elif one != other:
            found.append(f"{prefix}{name}: {_shown(one)}, now {_shown(other)}")
    return found


def _shown(value: Any) -> str:
    text = "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _at(values: Any, name: str) -> Any:
    """Return the value with a dotted name, or None if a stored configuration lacks it."""
    for part in name.split("."):
        values = values.get(part) if isinstance(values, Mapping) else None
    return values


def loss_of(context: Context, stage: Stage) -> Loss:
    """Return the work of a stage as it would be set aside."""
    name = f"round {context.round}, {stage.name}" if context.earlier else stage.name
    return Loss(name, context.store.run.get("stages", {}).get(stage.name, {}))


def what_changed(context: Context) -> str:
    """Describe how this configuration differs from that of the results in the run folder."""
    store, sections = context.store, dict.fromkeys(section for stage in STAGES for section in stage.sections)
    old, new = store.run.get("config") or {}, context.config.model_dump(mode="json")
    found = differences({name: _at(old, name) for name in sections}, {name: _at(new, name) for name in sections})
    known, found_now = store.run.get("made_of") or {}, input_fingerprints(context)
    found += [f"{name} changed" for name in found_now if name in known and known[name] != found_now[name]]
    before, now = store.run.get("commit"), commit_of(context.config.model)
    if before and now and before != now:
        found.append(f"commit of {context.config.model}: {before}, now {now}")
    ledger = Ledger(store.root)
    # Without its key a stage's results cannot be attributed to any configuration, so they count as changed.
    lost = [stage.name for stage in STAGES if ledger.key(stage.name) is None and ledger.has_work(stage.name)]
    found += [f"{name}/key.json is missing" for name in lost]
    return f"{store.root} has results of a different configuration: {', '.join(found) or 'unknown'}"


def agree(context: Context, losses: Sequence[Loss], reasons: Sequence[str]) -> None:
    """Ask the user to accept the losses; return if they do. Later calls in the same command do not ask again.

    Args:
        context: context of the run.
        losses: the work that would be set aside.
        reasons: why each of them would be.

    Raises:
        RunFolderError: the user did not agree; nothing has been moved.
    """
    # Also True after an earlier answer of yes.
    if context.restart or not losses:
        return
    folder = context.first.root
    text = f"{'; '.join(reasons)}. Continuing moves these results to {folder / 'replaced'}: {'; '.join(map(str, losses))}"
    # Nothing has been moved yet: a refusal leaves the folder as it was.
    if context.terminal.ask(f"{text}.\nMove them and rerun these stages?"):
        context.restart = True
        return
    raise RunFolderError(
        f"{text}. Nothing was moved. To resume with the run's own settings: selfeval run --output {folder}. To rerun these "
        "stages: rerun the same command with --restart (`selfeval restore` brings the old results back)"
    )
