"""Curves in TensorBoard, Weights & Biases, MLflow or trackio, through accelerate's trackers.

They are copies: everything is in metrics/*.jsonl as well, and nothing reads a curve from a tracker. If a tracker fails during
a run (for example, its server is down), a note is printed, the tracker is dropped, and the run continues.
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
    """Refuse trackers whose package is not installed.

    Raises:
        ConfigError: a tracker's package is missing.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"tracker {name} is not installed; run pip install 'self-evaluator[{name}]', or remove it from trackers"
            )


class Trackers:
    """The trackers of one run. Each is started when the first figure is logged.

    Args:
        config: names the trackers, and is sent to them as the run's settings.
        folder: folder for trackers that write files.
        terminal: prints a note when a tracker fails.
    """

    def __init__(self, config: RunConfig, folder: Path, terminal: Terminal) -> None:
        self.config, self.folder, self.terminal = config, folder, terminal
        self._started: dict[str, Any] | None = None

    def log(self, stage: str, values: Mapping[str, Any]) -> None:
        """Send one line of a stage's metrics as `stage/name`, at the step in the line."""
        numbers = {k: float(v) for k, v in values.items() if isinstance(v, int | float) and math.isfinite(v)}
        named = {f"{stage}/{name}": value for name, value in numbers.items()}
        for name, tracker in list(self._running().items()):
            # Each stage counts its own steps. Weights & Biases and trackio need one count that never falls, and plot against a
            # figure of the line instead; the others take the step as it is.
            step = None if name in ("wandb", "trackio") else int(values["step"])
            self._guarded(name, lambda tracker=tracker, step=step: tracker.log(named, step=step))

    def close(self) -> None:
        """Flush and close the trackers."""
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

        # accelerate's logger, which its trackers use, raises an error unless this state exists.
        PartialState()
        self.folder.mkdir(parents=True, exist_ok=True)
        if name == "mlflow":  # log to a file in the run folder unless the user names a server
            os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{(self.folder / 'mlflow.db').resolve()}")
        tracker = LOGGER_TYPE_TO_CLASS[name](**self._arguments(name))
        tracker.start()
        assert self._started is not None
        # Before the settings are sent: if that fails, `_guarded` finds the tracker and drops it.
        self._started[name] = tracker
        tracker.store_init_configuration(_flat(self.config.model_dump(mode="json")))
        if name == "wandb":
            for stage in ("evaluator", "steps", "policy", "evaluation"):
                tracker.run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")

    def _arguments(self, name: str) -> dict[str, Any]:
        """Return the project `self-evaluator`, and the run's name if the tracker supports one."""
        run = self.config.name
        arguments: dict[str, dict[str, Any]] = {
            "tensorboard": {"run_name": run, "logging_dir": self.folder},
            "wandb": {"run_name": "self-evaluator", "name": run, "dir": str(self.folder)},
            "mlflow": {"experiment_name": "self-evaluator", "run_name": run},
            "trackio": {"run_name": "self-evaluator", "name": run},
        }
        return arguments[name]

    def _guarded(self, name: str, work: Any) -> None:
        """Call a tracker; on any exception, print a note and drop the tracker, because a remote server must not end a run."""
        try:
            work()
        except Exception as error:
            (self._started or {}).pop(name, None)
            self.terminal.note(
                f"tracker {name} is disabled: {type(error).__name__}: {error}; the curves are still written to metrics/"
            )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings to `section.key`; lists become text, because trackers accept only plain values."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value if isinstance(value, bool | int | float | str) else str(value)
    return found
