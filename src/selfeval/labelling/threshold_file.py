"""label_threshold.json: the evaluator's threshold from labels, which `score`, `serve` and `Evaluator.compare` use."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from selfeval.errors import RunFolderError
from selfeval.quality.selective_risk import Threshold
from selfeval.store import as_storage_error, content_hash, fingerprint, read_object, write_json

__all__ = ["THRESHOLD", "has_threshold", "saved_sure", "write_threshold"]

THRESHOLD = "label_threshold.json"
"""The file, in a run folder; only while the labels give a threshold."""
_REMEDY = "remove it; `selfeval report` writes it again from the labels"
_LOGGER = logging.getLogger(__name__)


def write_threshold(folder: Path, threshold: Threshold) -> None:
    """Write the threshold atomically if it differs from the saved one; remove the file if no threshold passed.

    Args:
        folder: the run folder.
        threshold: the threshold that the current labels give.

    Raises:
        StorageError: the disk is full or not writable.
    """
    if has_threshold(folder, threshold):
        return
    path = folder / THRESHOLD
    if threshold.value is not None:
        write_json(path, _as_json(folder, threshold))
        return
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise as_storage_error(path, error) from error


def has_threshold(folder: Path, threshold: Threshold) -> bool:
    """Return whether a threshold is the saved one; for one that no confidence passed, whether none is saved.

    Raises:
        RunFolderError: the file is damaged.
    """
    path = folder / THRESHOLD
    if threshold.value is None or not path.exists():
        return threshold.value is None and not path.exists()
    return read_object(path, remedy=_REMEDY) == _as_json(folder, threshold)


def _as_json(folder: Path, threshold: Threshold) -> dict[str, Any]:
    return {
        "sure": threshold.value,
        "error": threshold.error,
        "delta": threshold.delta,
        "pairs": threshold.coverage.n,
        "selected": threshold.selected,
        "evaluator": _evaluator(folder),
    }


def saved_sure(folder: Path) -> float | None:
    """Return the saved threshold; None without one, or if the evaluator was trained again since.

    Raises:
        RunFolderError: the file is damaged.
    """
    path = folder / THRESHOLD
    if not path.exists():
        return None
    values = read_object(path, "sure", "evaluator", remedy=_REMEDY)
    sure = values["sure"]
    if isinstance(sure, bool) or not isinstance(sure, int | float) or not 0.5 <= sure <= 1:
        raise RunFolderError(f"{path} is damaged: sure is {sure!r} instead of a number from 0.5 to 1; {_REMEDY}")
    if values["evaluator"] != _evaluator(folder):
        _LOGGER.warning("%s is of an earlier evaluator and not used; run: selfeval report %s", path, folder)
        return None
    return float(sure)


def _evaluator(folder: Path) -> str:
    """Return a fingerprint of the units and the temperature of all members, which differ after every training."""
    files = sorted((folder / "roles").glob("evaluator-*/evaluator.json"))
    return fingerprint([content_hash(file) for file in files])
