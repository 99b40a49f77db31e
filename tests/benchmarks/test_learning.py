"""The harness of the benchmarks of policy learning: which outcomes of a training are kept as results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import learning
import pytest
import rounds

from selfeval.errors import LoopError


@pytest.mark.slow
def test_a_training_with_an_error_is_no_result(tmp_path: Path) -> None:
    job = {"name": "ppo-0", "run": str(tmp_path / "no run"), "seed": 0, "settings": ["iterations=1"]}
    with pytest.raises(SystemExit, match=r"1 of 1 trainings had errors; .*ppo-0: .*no run"):
        learning.train_all([job], tmp_path / "results")
    assert list((tmp_path / "results").iterdir()) == []


def test_a_training_that_a_watchdog_stopped_is_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: Any) -> Any:
        raise LoopError("loss is NaN or infinite")

    monkeypatch.setattr(learning, "train", stopped)
    to = tmp_path / "ppo-0.json"
    monkeypatch.setattr(
        "sys.argv", ["learning.py", "--run", "runs/one", "--seed", "3", "--set", "learning_rate=1", "--to", str(to)]
    )
    learning.main()
    assert json.loads(to.read_text()) == {
        "run": "one", "seed": 3, "settings": ["learning_rate=1"], "failed": ["loss is NaN or infinite"]
    }  # fmt: skip


def test_the_gate_does_not_end_the_benchmark_of_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def started(*arguments: str) -> float:
        asked.extend(arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(rounds, "selfeval", started)
    with pytest.raises(KeyboardInterrupt):
        rounds.measure(0, 2, tmp_path, ["policy.gate=evidence"])
    gates = [value for value in asked if value.startswith("policy.gate")]
    assert gates == ["policy.gate=off", "policy.gate=evidence"], "off, unless the command says otherwise"
