from __future__ import annotations

import sys

import pytest

from processes import python
from selfeval.errors import MissingPackageError
from selfeval.scale.cluster import ray_library, room


def test_a_missing_ray_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'self-evaluator\[scale\]'"):
        ray_library()


def test_a_run_in_process_imports_no_ray() -> None:
    code = "import sys, selfeval.stages.running, selfeval.stages.pipeline; assert 'ray' not in sys.modules"
    assert python(code).returncode == 0


def test_workers_are_counted_by_node_not_by_totals() -> None:
    single_cards = [{"CPU": 64.0, "GPU": 1.0}] * 4
    assert room(single_cards, 1, 1) == 4
    assert room(single_cards, 1, 2) == 0, "no node has two cards"
    # 5 x 12 CPUs of the first node, although it has 8 cards; the head has no CPUs.
    assert room([{"CPU": 64.0, "GPU": 8.0}, {"CPU": 64.0, "GPU": 1.0}, {"GPU": 8.0}], 12, 1) == 6
    assert room([{"CPU": 8.0}] * 3, 16, 0) == 0
    assert room([{"CPU": 8.0}] * 3, 3, 0) == 6


ON_THIS_MACHINE_ONLY = """
import os, re, socket
from selfeval.scale.cluster import started

connected = []
plain = socket.socket.connect
def connect(self, address):
    connected.append(address)
    return plain(self, address)
socket.socket.connect = connect

import psutil
with started(1):
    family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    found = [c for process in family for c in process.net_connections(kind="inet") if process.is_running()]
    listening = {c.laddr.ip for c in found if c.status == "LISTEN"}
    remote = {c.raddr.ip for c in found if c.raddr}
    assert listening and listening <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}, listening
    assert remote <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}, remote
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
assert {a[0] for a in connected if isinstance(a, tuple)} <= {"127.0.0.1", "localhost", "::1"}, connected
print("ended", [process.pid for process in family[1:] if process.is_running() and process.status() != "zombie"])
"""


WITHOUT_A_RAYLET = """
import sys, tempfile
from pathlib import Path
import psutil
from ray_tasks import Add, Task, local_ray
from selfeval.errors import WorkerError
from selfeval.scale.pool import Needs, Pool
from selfeval.scale.training import train_on_workers

with local_ray(1):
    pool = Pool(1, Needs(), Path(tempfile.mkdtemp()))
    found = pool.map(Add(1), [Task(n, 0.1) for n in range(1000)])
    next(found)
    (raylet,) = [p for p in psutil.Process().children() if p.name() == "raylet"]
    raylet.kill()
    for work in (lambda: list(found), lambda: train_on_workers(None, 1)):
        try:
            work()
        except Exception as error:
            print(type(error).__name__, str(error)[:32])
"""


@pytest.mark.slow
def test_a_ray_that_has_lost_its_raylet_is_an_error_instead_of_a_wait_for_workers() -> None:
    found = python(WITHOUT_A_RAYLET)
    assert found.returncode == 0, found.stderr
    # Before them, Ray prints the log of its raylet.
    mapped, trained = [line for line in found.stdout.splitlines() if "Error " in line][-2:]
    assert mapped == "WorkerError Ray has ended on all machines (i"
    assert trained.startswith("ProcessGroupError 1 workers with 1 CPU"), "its nodes have no room"


@pytest.mark.slow
def test_a_local_ray_neither_listens_to_the_network_nor_calls_it() -> None:
    found = python(ON_THIS_MACHINE_ONLY)
    assert found.returncode == 0, found.stderr
    assert found.stdout.endswith("ended []\n")
