from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).resolve().parents[1]


def killed_training(folder: Path, seed: int, *settings: str) -> dict[str, Any]:
    paths = os.pathsep.join([str(TESTS.parent / "src"), str(TESTS)])
    command = [sys.executable, str(TESTS / "killed_training.py"), str(folder), "20", str(seed), *settings]
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot fork here")
def test_twenty_kills_at_random_moments_leave_the_final_weights_byte_for_byte_the_same(tmp_path: Path) -> None:
    # Everything that moves from iteration to iteration is on: adaptive KL, a moving reference, the entropy floor.
    found = killed_training(tmp_path, 0, "reference_ema=0.1", "entropy_floor=0.99", "kl_target=0.5", "kl_horizon=200")
    assert found["same_bytes"]
    assert found["kills"] == 20
    assert found["in_write"] >= 6
    assert len(set(found["resumed_at"])) >= 8  # all along the training, and not again and again at its start
