"""The folder that an export writes to."""

from __future__ import annotations

import os
from pathlib import Path

from selfeval.errors import ExportError

__all__ = ["free_folder"]


def free_folder(target: Path) -> Path:
    """Return the absolute path of a folder that may be written.

    Raises:
        ExportError: the folder is not empty, or is a file.
    """
    target = Path(os.path.abspath(target))  # Path.resolve raises on a symlink loop
    if target.is_dir() and any(target.iterdir()):
        raise ExportError(f"{target} exists and is not empty, and nothing is overwritten; pass a new or empty folder to --to")
    if target.exists() and not target.is_dir():
        raise ExportError(f"{target} is a file; pass a new or empty folder to --to")
    return target
