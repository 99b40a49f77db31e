"""A worker of a training: an actor that joins a process group of torch and does the job of the group."""

from __future__ import annotations

import logging
import os
import platform
import socket
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

from selfeval.backbone.process_group import ProcessGroup
from selfeval.errors import portable
from selfeval.scale.cluster import ray_library
from selfeval.scale.worker import WorkerFacts, write_to_log

__all__ = ["FailedJob", "Job", "Meeting", "TrainingWorker", "WorkerResources"]

_LOGGER = logging.getLogger(__name__)

_WAIT = timedelta(days=7)
"""Limit of the wait for another process. Ray notices a lost worker much earlier; a slow one is not lost."""

Send = Callable[[Any], None]


class Job(Protocol):
    """The work of every worker: picklable, and the same in all of them but for the process group."""

    def __call__(self, processes: ProcessGroup, send: Send) -> Any:
        """Do it.

        Args:
            processes: the workers.
            send: passes an object to the process that started the workers; only what worker 0 sends arrives.

        Returns:
            The result; that of worker 0 is the result of the job.
        """
        ...


@dataclass(frozen=True)
class WorkerResources:
    """Resources of each worker.

    Attributes:
        cpus: CPUs that Ray reserves. Default: 1.
        gpus: GPUs, of which it sees no others. Default: none.
        threads: CPU threads. Default: 1.
    """

    cpus: int = 1
    gpus: int = 0
    threads: int = 1


@dataclass(frozen=True)
class Meeting:
    """Where the workers of a group meet.

    Attributes:
        address: address for torch: a private file on one machine, or a port of worker 0.
        size: number of workers.
    """

    address: str
    size: int


@dataclass(frozen=True)
class FailedJob:
    """The error of a worker, with its rank and traceback as a note."""

    error: Exception


class TrainingWorker:
    """One process of the group, as an actor with two threads: one works, the other returns what was sent.

    Args:
        log: Optional. File to which the output of the process is appended.
    """

    def __init__(self, log: Path | None = None) -> None:
        self._log = log
        self._sent: deque[Any] = deque()

    def address(self) -> str:
        """Return an address on this machine at which the processes can meet."""
        with socket.socket() as found:
            found.bind(("", 0))
            port = found.getsockname()[1]
        return f"tcp://{ray_library().util.get_node_ip_address()}:{port}"

    def take_sent(self) -> list[Any]:
        """Return what was sent since the last call."""
        return [self._sent.popleft() for _ in range(len(self._sent))]

    def facts(self) -> WorkerFacts:
        """Return where it runs."""
        return WorkerFacts(platform.node(), os.getpid())

    def work(self, job: Job, rank: int, meeting: Meeting, resources: WorkerResources) -> Any:
        """Join the group and do the job; return its result or a `FailedJob`."""
        try:
            if self._log is not None:
                write_to_log(self._log)
                _LOGGER.info("training as worker %d of %d", rank, meeting.size)
            return self._work(job, rank, meeting, resources)
        except Exception as error:
            _LOGGER.exception("failed")
            return FailedJob(_with_origin(error, rank, meeting.size))

    def _work(self, job: Job, rank: int, meeting: Meeting, resources: WorkerResources) -> Any:
        import torch
        from torch import distributed

        from selfeval.backbone.process_group import TorchProcessGroup

        torch.set_num_threads(resources.threads)
        # Not by what torch sees: Ray hides no cards from a worker that was given none.
        backend = "nccl" if resources.gpus else "gloo"
        if meeting.address.startswith("file:"):
            os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = "lo"
        distributed.init_process_group(backend, init_method=meeting.address, rank=rank, world_size=meeting.size, timeout=_WAIT)
        try:
            result = job(TorchProcessGroup(_WAIT), self._sent.append)
            distributed.barrier()  # a worker that ends early would look like a lost one
            return result
        finally:
            distributed.destroy_process_group()


def _with_origin(error: Exception, rank: int, size: int) -> Exception:
    """Return the error, or a portable one with its text, with its rank and traceback as a note."""
    if not getattr(error, "__notes__", None):  # an error of another worker has that of its origin
        error.add_note(f"in worker {rank} of {size}:\n{''.join(traceback.format_exception(error))}")
    return portable(error)
