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
def test_the_quota_of_the_control_group_is_respected(
    text: str, expected: int | None, tmp_path: Path, eight_cores: None
) -> None:
    absent = tmp_path / "absent"
    assert usable_cores(absent, absent) == 8
    (tmp_path / "cpu.max").write_text(text)
    assert usable_cores(tmp_path, absent) == (expected or 8)


@pytest.fixture
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(8)), raising=False)


def test_the_smallest_quota_of_the_groups_around_a_process_counts(tmp_path: Path, eight_cores: None) -> None:
    membership, group = tmp_path / "membership", tmp_path / "groups" / "user.slice" / "job.scope"
    group.mkdir(parents=True)
    membership.write_text("1:name=systemd:/other\n0::/user.slice/job.scope\n")
    (group / "cpu.max").write_text("max 100000\n")
    (group.parent / "cpu.max").write_text("250000 100000\n")
    assert usable_cores(tmp_path / "groups", membership) == 3
    (group / "cpu.max").write_text("200000 100000\n")
    assert usable_cores(tmp_path / "groups", membership) == 2


@pytest.mark.parametrize(("quota", "expected"), [("150000", 2), ("-1", 8)])
def test_quotas_of_the_first_version_are_respected(quota: str, expected: int, tmp_path: Path, eight_cores: None) -> None:
    membership, group = tmp_path / "membership", tmp_path / "groups" / "cpu" / "docker" / "1f"
    group.mkdir(parents=True)
    membership.write_text("4:memory:/docker/1f\n3:cpu,cpuacct:/docker/1f\n")
    (group / "cpu.cfs_quota_us").write_text(f"{quota}\n")
    (group / "cpu.cfs_period_us").write_text("100000\n")
    assert usable_cores(tmp_path / "groups", membership) == expected
