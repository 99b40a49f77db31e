"""A token in a run folder that tells a worker whether it may still write there.

The lock of a run folder belongs to the process of the command, and a worker of a training writes under it. If that process
is killed, its lock is free at once, but a worker on another machine ends seconds later, or when its network is back. The
process therefore leaves a token before it starts workers, and the worker that writes compares it before each write. The next
workers get another token, and the next holder of the lock removes it.

Comparison and write are two steps: a worker that is stopped exactly between them still writes one file. No shared file system
offers both in one step.
"""

from __future__ import annotations

import secrets
from pathlib import Path

from selfeval.errors import RunFolderError
from selfeval.store.files import open_file, write_file

__all__ = ["FENCE", "admit_writer", "dismiss_writer", "refuse_dismissed"]

FENCE = ".writer"
"""File with the token, while workers train."""


def admit_writer(root: Path) -> str:
    """Write a new token, by which the worker with an earlier one must not write any more; return it.

    Args:
        root: the run folder, whose lock this process holds.

    Raises:
        StorageError: the disk is full or not writable.
    """
    token = secrets.token_hex(16)
    write_file(root / FENCE, token)
    return token


def dismiss_writer(root: Path) -> None:
    """Remove the token, so that no worker may write. The folder may be gone."""
    (root / FENCE).unlink(missing_ok=True)


def refuse_dismissed(root: Path, token: str) -> None:
    """Refuse to write with a token that is not the current one.

    Raises:
        RunFolderError: the process that gave the token has ended, or has started other workers.
    """
    try:
        # Opened anew each time: NFS then asks its server instead of its cache.
        with open_file(root / FENCE) as file:
            current = file.read(2 * len(token))
    except FileNotFoundError:
        current = b""
    if current != token.encode():
        raise RunFolderError(
            f"this worker may not write to {root} any more: the command that started it has ended or has replaced it. Nothing "
            "was written; repeat the command to resume from the last checkpoint"
        )
