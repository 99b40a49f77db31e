"""Curves in TensorBoard, Weights & Biases, MLflow or trackio, through accelerate's trackers.

They are copies: everything is in metrics/*.jsonl as well, and nothing reads a curve from a tracker. A tracker that breaks in
the middle of a run (its server is away) is told of and left out; the run goes on.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from selfeval.config import RunConfig
from selfeval.errors import ConfigError
from selfeval.stages.terminal import Terminal

__all__ = ["Trackers", "check_installed"]


def check_installed(names: Sequence[str]) -> None:
    """Refuses trackers whose package is missing.

    Raises:
        ConfigError: one is.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"tracker {name} is not installed; pip install 'self-evaluator[{name}]', or take it out of trackers"
            )


class Trackers:
    """The trackers of one run; each begins when the first figure comes.

    Args:
        config: says which, and goes to them as the run's settings.
        folder: where those that write files write them.
        terminal: is told of one that breaks.
    """

    def __init__(self, config: RunConfig, folder: Path, terminal: Terminal) -> None:
        self.config, self.folder, self.terminal = config, folder, terminal
        self._started: dict[str, Any] | None = None

    def log(self, stage: str, values: Mapping[str, Any]) -> None:
        """Sends one line of a stage's metrics as `stage/name`, at the step that it carries."""
        numbers = {k: float(v) for k, v in values.items() if isinstance(v, int | float) and math.isfinite(v)}
        named = {f"{stage}/{name}": value for name, value in numbers.items()}
        for name, tracker in list(self._running().items()):
            # Stages count steps of their own. Weights & Biases and trackio want one count that never falls, and draw over a
            # figure of the line instead; the others take the step as it is.
            step = None if name in ("wandb", "trackio") else int(values["step"])
            self._guarded(name, lambda tracker=tracker, step=step: tracker.log(named, step=step))

    def close(self) -> None:
        """Lets them write what they hold back."""
        for name, tracker in (self._started or {}).items():
            self._guarded(name, tracker.finish)
        self._started = None

    def _running(self) -> dict[str, Any]:
        if self._started is None:
            self._started = {}
            for name in self.config.trackers:
                self._guarded(name, lambda name=name: self._start(name))
        return self._started

    def _start(self, name: str) -> None:
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        PartialState()
        self.folder.mkdir(parents=True, exist_ok=True)
        if name == "mlflow":  # a file of the run, unless the user names a server
            os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{(self.folder / 'mlflow.db').resolve()}")
        tracker = LOGGER_TYPE_TO_CLASS[name](**self._arguments(name))
        tracker.start()
        assert self._started is not None
        self._started[name] = tracker
        tracker.store_init_configuration(_flat(self.config.model_dump(mode="json")))
        if name == "wandb":
            for stage in ("evaluator", "policy", "evaluation"):
                tracker.run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")

    def _arguments(self, name: str) -> dict[str, Any]:
        """Project `self-evaluator`, and the run's own name where the tracker has a place for it."""
        run = self.config.name
        arguments: dict[str, dict[str, Any]] = {
            "tensorboard": {"run_name": run, "logging_dir": self.folder},
            "wandb": {"run_name": "self-evaluator", "name": run, "dir": str(self.folder)},
            "mlflow": {"experiment_name": "self-evaluator", "run_name": run},
            "trackio": {"run_name": "self-evaluator", "name": run},
        }
        return arguments[name]

    def _guarded(self, name: str, work: Any) -> None:
        """Somebody else's server must not end a run: whatever it raises is told, and the tracker is left out."""
        try:
            work()
        except Exception as error:
            (self._started or {}).pop(name, None)
            self.terminal.note(
                f"tracker {name} is left out: {type(error).__name__}: {error}; the curves are in metrics/ as ever"
            )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as `section.key`; lists as text, as the trackers take plain values only."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value if isinstance(value, bool | int | float | str) else str(value)
    return found
