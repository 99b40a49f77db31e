"""label_queue.json: the queue as it was drawn, so that labels keep their probabilities if the evaluator is trained again.

If the set of pairs changes, a new queue is drawn. The labels of the old one were drawn with probabilities that depend on pairs
which are gone, so they count in no figure; its file is renamed to `label_queue-ID.json`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from selfeval.errors import RunFolderError
from selfeval.labelling.pairs import LabelPair, key_of
from selfeval.labelling.queue import Draw, Preference
from selfeval.store import as_storage_error, fingerprint, read_object, write_json

__all__ = ["QUEUE", "queue_id", "read_preference", "read_queue", "write_queue"]

QUEUE = "label_queue.json"
"""The file, in a run folder; written with the first label."""
_REMEDY = "restore it from a backup; without it, labels are weighted as if they were drawn with the current evaluator"


def queue_id(queue: Sequence[Draw]) -> str:
    """Return a fingerprint of the order and the probabilities of the draws, which does not change with the evaluator."""
    return fingerprint([_as_json(draw) for draw in queue])


def write_queue(folder: Path, queue: Sequence[Draw], prefer: Preference = "uncertain") -> None:
    """Write the queue atomically, after renaming the file of an earlier one.

    Args:
        folder: the run folder.
        queue: the queue.
        prefer: the pairs that come early in it. Default: `uncertain`.

    Raises:
        StorageError: the disk is full or not writable.
        RunFolderError: the file of the earlier queue is damaged.
    """
    path = folder / QUEUE
    if path.exists():
        earlier = fingerprint(read_object(path, "draws", remedy=_REMEDY)["draws"])
        try:
            path.replace(path.with_stem(f"{path.stem}-{earlier}"))
        except OSError as error:
            raise as_storage_error(path, error) from error
    write_json(path, {"prefer": prefer, "draws": [_as_json(draw) for draw in queue]})


def _as_json(draw: Draw) -> dict[str, Any]:
    pair = draw.pair
    identity = {"question_id": pair.question_id, "first": pair.first, "second": pair.second, "texts": pair.texts}
    return {**identity, "weight": draw.weight, "rank": draw.rank, "uniform": draw.uniform}


def read_queue(folder: Path, pairs: Sequence[LabelPair]) -> list[Draw] | None:
    """Read the queue.

    Args:
        folder: the run folder.
        pairs: the pairs of the run, with its current margins.

    Returns:
        The queue; None if there is none, or if it was drawn from other pairs.

    Raises:
        RunFolderError: the file is damaged.
    """
    path = folder / QUEUE
    if not path.exists():
        return None
    rows, known = read_object(path, "draws", remedy=_REMEDY)["draws"], {pair.key: pair for pair in pairs}
    try:
        found = [_draw(row, known) for row in rows]
    except (TypeError, KeyError, ValueError) as error:
        raise RunFolderError(f"{path} is damaged ({type(error).__name__}: {error}); {_REMEDY}") from error
    queue = [draw for draw in found if draw is not None]
    return queue if len(queue) == len(rows) == len(pairs) else None


def read_preference(folder: Path) -> str:
    """Return the pairs that come early in the saved queue; `uncertain` if the file does not say, as earlier versions.

    Raises:
        RunFolderError: the file is missing or damaged.
    """
    return str(read_object(folder / QUEUE, "draws", remedy=_REMEDY).get("prefer", "uncertain"))


def _draw(row: Mapping[str, Any], known: Mapping[Any, LabelPair]) -> Draw | None:
    pair = known.get(key_of(row["question_id"], row["first"], row["second"]))
    weight, rank, uniform = float(row["weight"]), int(row["rank"]), row["uniform"]
    if not 0 < weight < float("inf") or not isinstance(uniform, bool):
        raise ValueError(f"weight {weight}, uniform {uniform}")
    return Draw(pair, weight, rank, uniform) if pair is not None and pair.texts == row["texts"] else None
