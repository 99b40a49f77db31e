"""TRL's trainers and lm-eval on the exports of a run, by the guide's own snippets (`make peers` builds their environment)."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from processes import environment, selfeval
from toy import SIZES, copy_lab, toy_arguments

PEERS = Path(__file__).resolve().parents[2] / "benchmarks" / "peers"

pytestmark = pytest.mark.slow


def _interpreter() -> str:
    """Return the interpreter of the peers, or skip the test."""
    asked = "import sys; sys.path.insert(0, sys.argv[1]); import environment; print(environment.interpreter() or '')"
    found = subprocess.run([sys.executable, "-c", asked, str(PEERS)], capture_output=True, text=True, check=True)
    if not found.stdout.strip():
        pytest.skip("there is no environment with TRL and lm-eval; make peers builds one")
    return found.stdout.strip()


def _measured(script: str, *paths: str | Path) -> dict[str, Any]:
    """Return the figures of a benchmark, measured in a process of its own."""
    code = (
        f"import json, sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); import {script}; "
        f"print('RESULT ' + json.dumps({script}.measure(*map(Path, sys.argv[2:]))))"
    )
    command = [sys.executable, "-c", code, str(PEERS), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
    assert done.returncode == 0, done.stderr[-4000:]
    values: dict[str, Any] = json.loads(done.stdout.rsplit("RESULT ", 1)[1])
    return values


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder, python = tmp_path_factory.mktemp("peers"), _interpreter()
    recipe = copy_lab(folder / "lab")
    made = selfeval(*toy_arguments(recipe, folder / "run", sizes=SIZES))
    assert made.returncode == 0, made.stderr
    return _measured("run", python, folder / "work", folder / "run")


@pytest.mark.parametrize("name", ["RewardTrainer", "DPOTrainer", "GRPOTrainer", "RLOOTrainer"])
def test_trl_trains_on_the_exports(name: str, figures: dict[str, Any]) -> None:
    trainer = figures["trainers"][name]
    losses = [line["loss"] for line in trainer["log"] if "loss" in line]
    assert trainer["steps"] == len(losses) == 5
    assert all(math.isfinite(loss) for loss in losses)
    if name in ("RewardTrainer", "DPOTrainer"):
        assert trainer["equal_ids"] is True, "the token ids of the run"
    else:
        rewards = [line["rewards/evaluator-0/mean"] for line in trainer["log"] if "loss" in line]
        assert all(math.isfinite(reward) for reward in rewards)
        assert len({round(reward, 4) for reward in rewards}) > 1


def test_the_reward_trainer_starts_from_an_evaluator_that_knows_the_pairs(figures: dict[str, Any]) -> None:
    first = figures["trainers"]["RewardTrainer"]["log"][0]
    assert first["accuracy"] > 0.5
    assert first["loss"] < math.log(2), "on the right prompt; a new head would be at log 2"


def test_lm_eval_gets_the_replies_of_the_run(figures: dict[str, Any]) -> None:
    found = figures["lm_eval"]
    assert found["n"] == 16
    assert found["chat_template"] == 1.0, "token for token the greedy replies of this package"
    assert found["bare_question"] < 1.0, "so the template matters"


def test_the_loss_of_fine_tuning_is_that_of_trl(tmp_path: Path) -> None:
    found = _measured("sft", _interpreter(), tmp_path)["tiny"]
    assert list(found) == ["messages", "messages, no marks", "prompt and completion", "plain text"]
    for name, row in found.items():
        assert row["n"] >= 8
        assert (row["equal_ids"], row["equal_masks"]) == (True, True), name
        assert row["packed"] == pytest.approx(row["trl"], abs=1e-5), name
        assert row["one_by_one"] == pytest.approx(row["trl"], abs=1e-5), name
