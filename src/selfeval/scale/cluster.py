"""Start Ray on this machine, or join a cluster."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from selfeval.errors import MissingPackageError, WorkerError

__all__ = ["LOCAL", "Cluster", "joined", "ray_library", "refuse_without_nodes", "room", "started"]

LOCAL = "local"
"""Address of a Ray that is started on this machine for one run."""

_OBJECT_STORE = 256 << 20
"""Bytes of the object store of a local Ray. Only records pass through it; Ray's default is a third of the memory."""

_STARTS = 3
"""Attempts to start a local Ray."""


@dataclass(frozen=True)
class Cluster:
    """The Ray that this process is connected to.

    Attributes:
        address: address as the user gave it, or `local`.
        version: version of Ray.
        nodes: resources of each live node, such as `{"CPU": 8.0, "GPU": 1.0}`.
    """

    address: str
    version: str
    nodes: tuple[dict[str, float], ...]

    def total(self, resource: str) -> int:
        """Return the amount of a resource on all nodes."""
        return int(sum(node.get(resource, 0.0) for node in self.nodes))

    def room(self, cpus: int, gpus: int) -> int:
        """Return the number of workers with these resources that the cluster can hold."""
        return room(self.nodes, cpus, gpus)


def room(nodes: Iterable[Mapping[str, float]], cpus: int, gpus: int) -> int:
    """Return the number of workers that nodes can hold, each on one node.

    Args:
        nodes: resources of each node.
        cpus: CPUs of a worker, at least 1.
        gpus: GPUs of a worker.

    Example:
        >>> room([{"CPU": 64, "GPU": 8}, {"CPU": 64, "GPU": 1}, {"GPU": 1}], cpus=12, gpus=1)
        6
    """
    found = 0
    for node in nodes:
        fitting = node.get("CPU", 0.0) // cpus
        found += int(min(fitting, node.get("GPU", 0.0) // gpus) if gpus else fitting)
    return found


def refuse_without_nodes() -> None:
    """Refuse to wait for workers that no node could start: on one machine, Ray does not replace its raylet when it dies.

    Raises:
        WorkerError: no node is alive.
    """
    if not any(node["Alive"] for node in ray_library().nodes()):
        raise WorkerError(
            "Ray has ended on all machines (its raylet was killed, perhaps for a lack of memory); repeat the command, which "
            "resumes the run"
        )


def ray_library() -> ModuleType:
    """Import Ray, which sends no usage statistics.

    Raises:
        MissingPackageError: it is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # A worker without a GPU sees the devices as this process does; the other behaviour is deprecated, with a warning.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "ray":
            raise
        raise MissingPackageError("work on several workers", "ray", "scale") from error
    return ray  # type: ignore[no-any-return]


@contextmanager
def started(cpus: int, gpus: int = 0) -> Iterator[Cluster]:
    """Run a Ray on this machine while the block runs. It accepts connections from this machine only, with a secret token;
    in a program that has imported Ray before, with the settings of that program.

    All its processes end with this one, also if it is killed.

    Args:
        cpus: number of units of the resource CPU, by which workers are counted.
        gpus: number of GPUs. Default: none.

    Raises:
        MissingPackageError: Ray is not installed.
        WorkerError: it cannot be started.
    """
    _protect()
    size = {"num_cpus": cpus, "num_gpus": gpus, "object_store_memory": _OBJECT_STORE}
    with _connected(LOCAL, {"address": LOCAL, "include_dashboard": False, **size}) as cluster:
        yield cluster


def _protect() -> None:
    """Set the variables that close a Ray to other machines and users, unless this process has imported Ray before.

    Ray reads them once. With a token that only some of its parts know, it would not start.
    """
    if "ray" in sys.modules:
        return
    # On Linux, Ray listens to the network unless this variable of other systems says otherwise.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    # Otherwise every user of this machine could run code in the workers.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


@contextmanager
def joined(address: str) -> Iterator[Cluster]:
    """Stay connected to a cluster while the block runs.

    Args:
        address: `auto`, `HOST:PORT` or `ray://HOST:PORT`.

    Raises:
        MissingPackageError: Ray is not installed.
        WorkerError: the cluster cannot be reached.
    """
    with _connected(address, {"address": address}) as cluster:
        yield cluster


@contextmanager
def _connected(address: str, options: dict[str, Any]) -> Iterator[Cluster]:
    ray = ray_library()
    # A program that uses Ray itself stays connected.
    ours = not ray.is_initialized()
    if ours:
        _connect(ray, address, options)
    try:
        yield Cluster(address, str(ray.__version__), tuple(dict(node["Resources"]) for node in ray.nodes() if node["Alive"]))
    finally:
        if ours:
            ray.shutdown()


def _connect(ray: Any, address: str, options: dict[str, Any]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    # Lost workers are reported by the pool; Ray would write paragraphs across the progress bar.
    logging.getLogger("ray").setLevel(logging.CRITICAL)
    try:
        _init(ray, address, {"log_to_driver": False, "configure_logging": False, "namespace": "selfeval", **options})
    except Exception as error:
        first = str(error).strip().splitlines()[:1]
        reason = f"{type(error).__name__}: {first[0] if first else ''}"
        remedy = "look at the logs in /tmp/ray/session_latest/logs" if address == LOCAL else "check the address and the token"
        what = "Ray cannot be started" if address == LOCAL else f"the Ray cluster at {address} cannot be reached"
        raise WorkerError(f"{what} ({reason}); {remedy}, or run without --workers and --ray") from error
    finally:
        # Ray ends the process at SIGTERM; the command has its own way to stop. Other threads can set no handler.
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _init(ray: Any, address: str, options: dict[str, Any]) -> None:
    """Start or join Ray; start it again if necessary: the limit of its start is fixed, and a busy machine may pass it."""
    for attempts_left in reversed(range(_STARTS if address == LOCAL else 1)):
        try:
            ray.init(**options)
            return
        except Exception:
            if not attempts_left:
                raise
            ray.shutdown()  # what was started
