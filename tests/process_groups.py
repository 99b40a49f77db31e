"""Run a function in several processes with a gloo process group, as the workers of a training do."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from selfeval.backbone.process_group import TorchProcessGroup

__all__ = ["in_processes"]

Work = Callable[..., Any]
"""A function of a module, which is called with the process group and further arguments."""


def in_processes(count: int, folder: Path, work: Work, *arguments: Any) -> list[Any]:
    """Call `work(group, *arguments)` in processes of their own, and return the results by rank.

    Args:
        count: number of processes.
        folder: empty folder, in which they meet.
        work: function of a module; one process imports the module and is forked, so this takes milliseconds per process.
    """
    # A fork of this process would inherit the threads of torch, which a fork does not survive.
    context = multiprocessing.get_context("forkserver")
    _start_server(work.__module__)
    pipes = [context.Pipe(duplex=False) for _ in range(count)]
    children = [
        context.Process(target=_child, args=(rank, count, folder, sending, work, arguments))
        for rank, (_, sending) in enumerate(pipes)
    ]
    for child, (_, sending) in zip(children, pipes, strict=True):
        child.start()
        sending.close()  # so that a child that dies ends the reading
    try:
        # Not `recv`: torch would pass its tensors through files of a process that has ended by then.
        found = [pickle.loads(receiving.recv_bytes()) for receiving, _ in pipes]
    finally:
        for child in children:
            child.join(60)
            child.kill()
    errors = [error for _, error in found if error]
    assert not errors, "\n".join(errors)
    return [result for result, _ in found]


def _start_server(module: str) -> None:
    """Start the process that is forked, unless it runs, and let it import the module once."""
    forkserver.set_forkserver_preload([module])
    before = os.environ.get("PYTHONPATH")
    # Python 3.11 does not pass its path on to that process, and an import that fails there is repeated in every child.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)


def _child(rank: int, count: int, folder: Path, sending: Connection, work: Work, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    result, error = None, ""
    try:
        distributed.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=count)
        result = work(TorchProcessGroup(), *arguments)
        distributed.barrier()
        distributed.destroy_process_group()
    except Exception:
        error = traceback.format_exc()
    sending.send_bytes(pickle.dumps((result, error)))
