from __future__ import annotations

from pathlib import Path

import pytest
import torch

from selfeval.backbone import threads
from selfeval.backbone.threads import cpu_threads, pick_threads, usable_cores


def test_more_threads_are_used_where_they_pay() -> None:
    assert pick_threads({}, cores=4, seconds=lambda number: 1 / number) == 4
    assert pick_threads({}, cores=4, seconds=lambda number: {1: 1.0, 2: 0.6, 4: 0.58}[number]) == 2


def test_one_thread_is_used_next_to_other_jobs() -> None:
    assert pick_threads({}, cores=4, seconds=lambda number: float(number)) == 1


def test_rare_long_waits_count() -> None:
    times = iter([1.0, 0.5] * 4 + [1.0, 20.0])
    assert pick_threads({}, cores=2, seconds=lambda number: next(times)) == 1


@pytest.mark.parametrize("variable", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_the_number_of_the_user_is_kept(variable: str) -> None:
    def measure(number: int) -> float:
        raise AssertionError("measured")

    assert pick_threads({variable: "3"}, cores=8, seconds=measure) == torch.get_num_threads()


def test_it_is_measured() -> None:
    with cpu_threads(1):
        assert pick_threads({}, cores=2) in (1, 2)
        assert torch.get_num_threads() == 1
        assert threads._seconds(1) > 0


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
