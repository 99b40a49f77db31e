"""Reading and validation of run.json, which may come from an untrusted folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from selfeval.errors import RunFolderError
from selfeval.store.files import read_object
from selfeval.store.sealed import SEAL, refuse_changed
from selfeval.texts import shortened, visible

__all__ = ["RUN_SCHEMA", "read_run"]

RUN_SCHEMA = 4
"""Version of the layout of a run folder, `schema` in run.json. Schema 2 has the judge's evidence in one field of a verdict;
schema 3 has the settings of the backbone in one section of `config`; schema 4 has the names `reference_answers`,
`sampling_method`, `verdicts.reasoning` and `backbone.rollout_batch_size`."""

_REBUILD_RUN = "remove it and rerun the full command: the recipe or --model, --seeds and every --set"


class _Values(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class _Stage(_Values):
    state: str = ""
    seconds: float = 0.0
    counts: dict[str, Any] = {}
    memory_events: list[dict[str, Any]] = []


class _Device(_Values):
    device: str = ""
    model: str = ""
    asked: str = ""
    precision: Literal["fp32", "bf16", "fp16", "int8", "nf4"]
    notes: list[str] = []
    placement: dict[str, Any] | None = None


class _Restored(_Values):
    number: int
    keys: dict[str, str | None]


class _Run(_Values):
    status: str = ""
    kind: str | None = None
    round: int = Field(1, ge=1, le=10**6)
    seed: int = 0
    config: dict[str, Any] | None = None
    made_of: dict[str, str] | None = None
    stages: dict[str, _Stage] = {}
    date: str | None = None
    templates: dict[str, str] | None = None
    device: _Device | None = None
    restored: _Restored | None = None


def read_run(root: Path) -> dict[str, Any]:
    """Read run.json.

    Raises:
        RunFolderError: the file is missing, damaged or of another version, or has no hash of its content.
    """
    path = root / "run.json"
    if not path.exists():
        raise RunFolderError(f"{root} is not a run (no run.json); pass a folder written by `selfeval run`")
    values = read_object(path, remedy=_REBUILD_RUN)
    if SEAL in values:
        refuse_changed(path, values, _REBUILD_RUN)
    # Before the hash is required: early versions wrote none.
    _refuse_other_versions(path, values)
    if SEAL not in values:
        raise RunFolderError(
            f'{path} has no "{SEAL}" of its content, so a changed value would go unnoticed; restore it from a backup, or '
            f"{_REBUILD_RUN}"
        )
    _check_types(path, values)
    return values


def _refuse_other_versions(path: Path, values: dict[str, Any]) -> None:
    """Check that this version reads the run folder.

    Raises:
        RunFolderError: another version wrote it.
    """
    if (schema := values.get("schema", RUN_SCHEMA)) != RUN_SCHEMA:
        raise RunFolderError(
            f"{path} was written by another version of selfeval: it has schema {visible(shortened(repr(schema)))}, this "
            "version reads "
            f"schema {RUN_SCHEMA}. Use the version recorded in its `versions`, or start a new run: selfeval run RECIPE "
            "--output NEW"
        )


def _check_types(path: Path, values: dict[str, Any]) -> None:
    """Validate the types of the values in run.json.

    Raises:
        RunFolderError: a value has an unexpected type; the message names it.
    """
    try:
        _Run.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key, got = visible(".".join(str(part) for part in first["loc"])), shortened(repr(first["input"]))
        raise RunFolderError(f"{path} is damaged: {key} is {visible(got)}; {first['msg']}; {_REBUILD_RUN}") from None
