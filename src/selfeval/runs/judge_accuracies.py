"""The accuracies of the members of a combined judge, which the stage verdicts estimates once per round."""

from __future__ import annotations

from pathlib import Path

from selfeval.config import CombinedConfig, VerdictsConfig
from selfeval.errors import RunFolderError
from selfeval.store import read_object

__all__ = ["ACCURACIES_FILE", "read_accuracies"]

ACCURACIES_FILE = "judge_accuracies.json"
"""File in the folder of a round, only with `verdicts.judge = "combined"`."""


def read_accuracies(config: VerdictsConfig, root: Path) -> tuple[float, ...] | None:
    """Return the accuracies of the members; None if the judge is not combined.

    Args:
        config: settings of the verdicts.
        root: folder of the round.

    Raises:
        RunFolderError: the stage verdicts has not estimated them yet, or the file is damaged.
    """
    if not isinstance(config.settings, CombinedConfig):
        return None
    path = root / ACCURACIES_FILE
    if not path.is_file():
        raise RunFolderError(
            f"{root} has no accuracies of {', '.join(config.settings.judges)} yet, which the stage verdicts estimates; "
            "`selfeval run` runs it (with pairs.file it judges nothing, so there are none: use a judge that is not combined)"
        )
    values = read_object(path, "judges", "accuracies")
    judges, accuracies = values["judges"], values["accuracies"]
    names = list(config.settings.judges)
    is_valid = isinstance(accuracies, list) and all(type(a) is float and 0.0 < a < 1.0 for a in accuracies)
    if judges != names or not is_valid or len(accuracies) != len(names):
        raise RunFolderError(
            f"{path} is damaged: expected the judges {', '.join(names)} and their accuracies, numbers between 0 and 1; remove "
            "it, and rerun the command"
        )
    return tuple(accuracies)
