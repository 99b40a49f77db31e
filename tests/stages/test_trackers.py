from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from selfeval.config import RunConfig
from selfeval.errors import ConfigError
from selfeval.stages import trackers
from selfeval.stages.terminal import Terminal
from selfeval.stages.trackers import Trackers, check_installed


def told(*names: Any) -> tuple[RunConfig, Terminal, io.StringIO]:
    text = io.StringIO()
    return RunConfig(name="shop", trackers=names), Terminal(console=Console(file=text, width=200)), text


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(folder.rglob("events.out.*")):
        read = event_accumulator.EventAccumulator(str(path)).Reload()
        for tag in read.Tags()["scalars"]:
            found.setdefault(tag, []).extend((e.step, e.value) for e in read.Scalars(tag))
    return found


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_gets_every_finite_figure_at_its_step(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    config, terminal, text = told("tensorboard")
    tracked = Trackers(config, tmp_path, terminal)
    tracked.log("policy", {"step": 1, "kl": 0.5, "explained_variance": None, "reward": math.nan, "note": "no figure"})
    tracked.log("policy", {"step": 2, "kl": 0.75})
    tracked.log("evaluator", {"step": 1, "loss": 0.25})
    tracked.close()
    found = curves(tmp_path / "shop")
    assert found["policy/kl"] == [(1, 0.5), (2, 0.75)]
    assert found["evaluator/loss"] == [(1, 0.25)]
    assert not {"policy/explained_variance", "policy/reward", "policy/note"} & set(found)
    assert text.getvalue() == ""


def test_without_trackers_nothing_is_written(tmp_path: Path) -> None:
    config, terminal, _ = told()
    tracked = Trackers(config, tmp_path / "trackers", terminal)
    tracked.log("policy", {"step": 1, "kl": 0.5})
    tracked.close()
    assert not (tmp_path / "trackers").exists()


class _Broken:
    """A tracker whose server goes away after the first line."""

    name = "trackio"
    lines: list[dict[str, float]] = []  # noqa: RUF012

    def __init__(self, **arguments: Any) -> None:
        self.arguments = arguments

    def start(self) -> None:
        self.lines.clear()

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        assert values["policy.learner"] == "ppo"
        assert values["seed"] == 0

    def log(self, values: dict[str, float], step: int | None) -> None:
        if self.lines:
            raise ConnectionError("no route to host")
        self.lines.append(values)

    def finish(self) -> None:
        raise AssertionError("it was left out")


def test_a_tracker_that_breaks_is_told_of_once_and_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import tracking

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "trackio", _Broken)
    config, terminal, text = told("trackio")
    tracked = Trackers(config, tmp_path, terminal)
    for step in (1, 2, 3):
        tracked.log("policy", {"step": step, "kl": 0.5})
    tracked.close()
    assert _Broken.lines == [{"policy/step": 1.0, "policy/kl": 0.5}]
    assert text.getvalue().count("tracker trackio is disabled: ConnectionError: no route to host") == 1


def test_a_tracker_that_is_not_installed_is_refused_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    check_installed(["json"])  # any module that is there
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"wandb is not installed; run pip install 'self-evaluator\[wandb\]'"):
        check_installed(["wandb"])
