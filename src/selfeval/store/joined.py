"""The run folder in a worker of the process that has locked it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from selfeval.records import Drop
from selfeval.store.fence import refuse_dismissed
from selfeval.store.run_store import RunStore

__all__ = ["JoinedStore"]


class JoinedStore(RunStore):
    """A run folder that another process has opened and locked. This process writes to it on behalf of that one, or only reads.

    Args:
        root: the folder.
        token: Optional. Token of the worker that writes (`admit_writer`). Default: this process does not write. The other
            workers of a training compute the same files, and write none of them.
    """

    def __init__(self, root: Path, token: str | None = None) -> None:
        self._join(root)
        self._token = token

    def close(self) -> None:
        """Leave the lock to the process that holds it."""

    def check_writable(self) -> None:
        """Refuse to write if the folder was removed, or if another worker writes in place of this one.

        Raises:
            RunFolderError: see above.
        """
        super().check_writable()
        if self._token is not None:
            refuse_dismissed(self.root, self._token)

    def write_text(self, path: Path, text: str) -> None:
        if self._token is not None:
            super().write_text(path, text)

    def write_json(self, path: Path, value: Any) -> None:
        if self._token is not None:
            super().write_json(path, value)

    def update_run(self, **values: Any) -> None:
        if self._token is not None:
            super().update_run(**values)

    def write_shard(self, stage: str, index: int, records: Iterable[Any], drops: Iterable[Drop] | None = None) -> None:
        if self._token is not None:
            super().write_shard(stage, index, records, drops)

    def write_records(self, name: str, records: Iterable[Any]) -> None:
        if self._token is not None:
            super().write_records(name, records)

    def add_metrics(self, stage: str, values: Mapping[str, Any]) -> None:
        if self._token is not None:
            super().add_metrics(stage, values)

    def keep_metrics(self, stage: str, last_step: int) -> None:
        if self._token is not None:
            super().keep_metrics(stage, last_step)

    def _refuse(self, *arguments: Any, **named: Any) -> NoReturn:
        raise AssertionError("the process that holds the lock begins, ends and moves stages; a worker only trains")

    begin = finish = put_back = record_stage = reopen = set_aside = write_dropped = _refuse
