from __future__ import annotations

from pathlib import Path

import pytest
import torch

from selfeval.backbone.threads import cpu_threads, is_set_by_user, pick_threads, usable_cores


def test_all_cores_are_used_unless_fewer_are_clearly_faster() -> None:
    assert pick_threads(4, lambda number: 1 / number) == 4
    assert pick_threads(4, lambda number: {1: 0.9, 2: 0.9, 4: 1.0}[number]) == 4
    assert pick_threads(4, lambda number: {1: 1.1, 2: 0.7, 4: 1.0}[number]) == 2


def test_one_thread_is_used_next_to_other_jobs() -> None:
    assert pick_threads(4, lambda number: float(number)) == 1


def test_rare_long_waits_count() -> None:
    times = iter([0.5, 1.0] * 3 + [20.0, 1.0])
    assert pick_threads(2, lambda number: next(times)) == 1


def test_the_measurement_leaves_the_number_as_it_was() -> None:
    with cpu_threads(1):
        assert pick_threads(2) in (1, 2)
        assert torch.get_num_threads() == 1


@pytest.mark.parametrize("variable", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_a_variable_of_the_user_is_found(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    assert not is_set_by_user()
    monkeypatch.setenv(variable, "3")
    assert is_set_by_user()


@pytest.mark.parametrize(
    ("text", "expected"),
    [("150000 100000", 2), ("50000 100000", 1), ("max 100000", None), ("", None), ("1600000 100000", None)],
)
def test_the_quota_of_the_control_group_is_respected(text: str, expected: int | None, tmp_path: Path) -> None:
    file = tmp_path / "cpu.max"
    file.write_text(text)
    cores = usable_cores(tmp_path / "absent")
    assert cores >= 1
    assert usable_cores(file) == min(cores, expected or cores)
