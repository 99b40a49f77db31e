"""A pool on a cluster of several nodes, of which one is lost and another one joins."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ray_tasks import Add, Task
from selfeval.scale.cluster import joined, ray_library
from selfeval.scale.pool import Needs, Pool

pytestmark = pytest.mark.slow


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    paths = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "src"), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    ray_library()
    from ray.cluster_utils import Cluster

    # The head has no room for workers, so that a lost node is never that of the driver.
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    yield found
    found.shutdown()


def test_the_tasks_of_a_lost_node_are_computed_by_the_others(cluster: Any, tmp_path: Path) -> None:
    first, second = (cluster.add_node(num_cpus=1) for _ in range(2))
    tasks = [Task(n, 1.0) for n in range(16)]
    notes = list[str]()
    with joined(cluster.address) as found:
        assert found.total("CPU") == 2
        pool = Pool(2, Needs(), tmp_path, note=notes.append)
        while sum(pool.events.hosts.values()) < 2:
            list(pool.map(Add(0), tasks[:2]))
        results = dict[int, int]()
        for number, (result, _) in pool.map(Add(100), tasks):
            results[number] = result
            if len(results) == 3:
                cluster.remove_node(second, allow_graceful=False)
        assert results == {n: 100 + n for n in range(16)}
        assert pool.events.lost >= 1
        assert "is replaced" in notes[0]
        # Its replacement waits for a node, and begins as soon as there is one.
        cluster.add_node(num_cpus=1)
        until = time.monotonic() + 120
        while sum(pool.events.hosts.values()) < 3 and time.monotonic() < until:
            list(pool.map(Add(100), tasks[:4]))
        assert sum(pool.events.hosts.values()) == 3
        pool.stop()
    assert not first.dead_processes()
