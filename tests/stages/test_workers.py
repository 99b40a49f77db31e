"""Workers that cannot reach the run are refused before any of them starts."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest

from selfeval.config import RunConfig
from selfeval.errors import ConfigError, WorkerError
from selfeval.scale.cluster import Cluster
from selfeval.scale.pool import Needs
from selfeval.stages import workers
from selfeval.stages.running import new_config
from selfeval.stages.terminal import Terminal
from selfeval.stages.workers import WorkersAsked, _refuse_remote_copy, _Sizes, _sizes, open_workers
from selfeval.store import RunStore
from selfeval.store.remote.mirror import opened


def test_a_run_at_a_url_needs_workers_of_one_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SELFEVAL_CACHE", str(tmp_path / "cache"))
    one, two = (Cluster("auto", "2.60.0", ({"CPU": 2.0},) * nodes) for nodes in (1, 2))
    with opened((tmp_path / "shop").as_uri()) as folder:
        store = RunStore(folder)
        _refuse_remote_copy(store, one)
        with pytest.raises(ConfigError, match=r"the other 1 machine\(s\) of the cluster cannot read; use a folder"):
            _refuse_remote_copy(store, two)
        store.close()
    with_folder = RunStore(tmp_path / "run")
    _refuse_remote_copy(with_folder, two)
    with_folder.close()


def _sizes_on(nodes: list[dict[str, float]], number: int | None = None, **scale: int) -> _Sizes:
    config = RunConfig(scale=scale)
    return _sizes(WorkersAsked(number, "auto"), config, Cluster("auto", "2.60.0", tuple(nodes)), uses_cards="gpus" in scale)


HEAD = {"memory": 1e9}
"""A head node that only coordinates has no CPUs."""


def test_the_head_of_a_cluster_is_no_place_for_a_worker() -> None:
    assert _sizes_on([HEAD, {"CPU": 32.0}, {"CPU": 32.0}]) == _Sizes(2, 32, Needs(32))
    assert _sizes_on([HEAD, {"CPU": 32.0}, {"CPU": 32.0}], 4) == _Sizes(4, 16, Needs(16))
    with pytest.raises(WorkerError, match=r"1 workers with 1 CPU\(s\) each are more than the 0 for which the nodes have room"):
        _sizes_on([HEAD])


def test_workers_get_as_many_cpus_as_all_of_them_can_have() -> None:
    # With 13 each, the first node would hold 4 workers instead of 8.
    assert _sizes_on([{"CPU": 64.0, "GPU": 8.0}, {"CPU": 64.0, "GPU": 1.0}], gpus=1) == _Sizes(9, 8, Needs(8, 1))
    # Both on the larger node: with one on each, they would have 8.
    assert _sizes_on([{"CPU": 8.0}, {"CPU": 32.0}], 2) == _Sizes(2, 16, Needs(16))


def test_workers_that_no_node_can_hold_are_refused() -> None:
    with pytest.raises(WorkerError, match=r"2 workers with 1 CPU\(s\) and 2 GPU\(s\) each are more than the 0 .*scale.gpus"):
        _sizes_on([{"CPU": 8.0, "GPU": 1.0}] * 4, 2, gpus=2)
    with pytest.raises(WorkerError, match=r"2 workers with 16 CPU\(s\) each .*; lower scale.threads"):
        _sizes_on([{"CPU": 8.0}] * 2, threads=16)
    with pytest.raises(WorkerError, match="use --workers 2, lower"):
        _sizes_on([{"CPU": 16.0}] * 2, 3, threads=16)


def test_several_workers_with_another_engine_are_refused_before_any_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = RunStore(tmp_path / "run")
    config = new_config(assignments=["backbone.engine=vllm"])
    cluster = Cluster("auto", "2.60.0", ({"CPU": 4.0},))
    monkeypatch.setattr(workers, "_connection", lambda asked, uses_cards: nullcontext(cluster))

    def opened_with(number: int) -> int:
        with open_workers(WorkersAsked(number, "auto"), config, store, Terminal(quiet=True)) as found:
            return found.threads

    with pytest.raises(ConfigError, match=r'set backbone\.engine = "own", or use one worker or none'):
        opened_with(2)
    assert opened_with(1) == 4
    store.close()
