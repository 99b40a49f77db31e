"""Training in several processes: gradients, metrics, weights and checkpoints are those of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from parallel_training import Trained, train_alone, train_in
from process_groups import in_processes
from selfeval.backbone.process_group import ProcessGroup
from selfeval.errors import ProcessGroupError
from selfeval.training.checkpoint import Checkpoints

EVALUATOR = {"epochs": 1, "batch": 7, "learning_rate": 1e-3, "max_grad_norm": 1e9}
SFT = {"steps": 3, "batch": 6, "learning_rate": 1e-3, "max_grad_norm": 1e9, "neftune_alpha": 5.0}
# The rate of real trainings: Adam divides a gradient by its own size, so where one is near zero, a rounding error of it
# changes the step by up to twice the rate.
POLICY = {"iterations": 2, "epochs": 1, "learning_rate": 1e-4}
TOLERANCE = 1e-6


def compare(kind: str, settings: dict[str, Any], folder: Path, count: int) -> None:
    """Assert that processes compute gradients, metrics and weights of one process, each with one copy of the base."""
    one = train_alone(kind, folder / "one", settings)
    (folder / "meeting").mkdir()
    for found in in_processes(count, folder / "meeting", train_in, kind, folder / "many", settings):
        assert len(found.gradients) == len(one.gradients)
        assert max(float(gradient.abs().max()) for gradient in one.gradients) > 1e-3
        for ours, theirs in zip(one.gradients, found.gradients, strict=True):
            # Relative to the largest: a sum of a few hundred numbers in fp32 is exact to some units of its last place.
            torch.testing.assert_close(theirs, ours, rtol=0, atol=TOLERANCE * max(1.0, float(ours.abs().max())))
        assert_same_result(one, found, TOLERANCE)


def assert_same_result(one: Trained, found: Trained, tolerance: float) -> None:
    assert found.share == one.share == 1.0
    assert [line.keys() for line in found.lines] == [line.keys() for line in one.lines]
    for ours, theirs in zip(one.lines, found.lines, strict=True):
        assert theirs == pytest.approx(ours, abs=1e-5, rel=1e-5, nan_ok=True)
    assert found.weights.keys() == one.weights.keys()
    for name, weight in one.weights.items():
        torch.testing.assert_close(found.weights[name], weight, rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize(("kind", "settings"), [("evaluator", EVALUATOR), ("sft", SFT), ("ppo", POLICY)])
def test_two_processes_compute_the_gradients_of_one(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    compare(kind, settings, tmp_path, 2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["evaluator", "sft", "ppo", "grpo", "dpo", "trpo", "soft_q", "ilql", "raft", "remax"])
def test_four_processes_compute_the_gradients_of_one(kind: str, tmp_path: Path) -> None:
    compare(kind, {"evaluator": EVALUATOR, "sft": SFT}.get(kind, POLICY), tmp_path, 4)


@pytest.mark.slow
def test_a_training_resumes_with_another_number_of_processes(tmp_path: Path) -> None:
    settings = {**POLICY, "checkpoint_every": 1}
    whole = train_alone("ppo", tmp_path / "whole", {**settings, "iterations": 6})
    counts = [2, 1, 3]
    # Each leaves its last checkpoint at the iteration before its last one. The decay of the learning rate depends on the
    # number of iterations, so that it is the same in all of them.
    for number, (count, until) in enumerate(zip(counts, [3, 5, 6], strict=True)):
        meeting = tmp_path / f"meeting-{number}"
        meeting.mkdir()
        found = in_processes(count, meeting, _train_until, tmp_path / "parts", {**settings, "iterations": 6}, until)
    assert [line["step"] for line in found[0].lines] == [5.0, 6.0]
    for result in found:
        for name, weight in whole.weights.items():
            torch.testing.assert_close(result.weights[name], weight, rtol=0, atol=1e-5, msg=name)


class _StoppedError(Exception):
    pass


def _train_until(group: ProcessGroup, folder: Path, settings: dict[str, Any], until: int) -> Trained | None:
    """Train, but stop like a killed process before the checkpoint of an iteration."""
    save = Checkpoints.save

    def saving(self: Checkpoints, step: int, state: Any) -> None:
        if step >= until:
            raise _StoppedError
        save(self, step, state)

    Checkpoints.save = saving  # type: ignore[method-assign]
    try:
        return train_in(group, "ppo", folder, settings)
    except _StoppedError:
        return None
    finally:
        Checkpoints.save = save  # type: ignore[method-assign]


def _drift(group: ProcessGroup, folder: Path) -> str:
    import policies
    from selfeval.training.context import POLICY

    backbone = policies.four_roles()
    backbone.budget.processes = group
    if group.rank == 1:
        parameter = next(iter(backbone.roles.parameters(POLICY).values()))
        with torch.no_grad():
            parameter.view(-1)[3] += 1e-7
    with pytest.raises(ProcessGroupError) as caught:
        Checkpoints(folder, backbone, [POLICY], {}).save(4, {})
    return str(caught.value)


def test_processes_with_different_weights_save_nothing(tmp_path: Path) -> None:
    (tmp_path / "meeting").mkdir()
    for found in in_processes(2, tmp_path / "meeting", _drift, tmp_path / "checkpoints"):
        assert "after step 4 the weights of process 1 differ from those of process 0" in found
    assert not (tmp_path / "checkpoints").exists()
