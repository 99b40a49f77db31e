"""An executor that computes shards in a second process. In a module of its own, because that process imports it by name."""

from __future__ import annotations

import dataclasses
import os
import pickle
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from processes import context
from selfeval.backbone.roles import Backbone
from selfeval.config import RunConfig
from selfeval.runs.templates import templates_of_run
from selfeval.stages.shards import Batch, ModelHandle, ReportProgress, ShardOutput, Work

_MODEL: list[ModelHandle] = []
"""The model of this process, once it is loaded."""


def _load(config: RunConfig, folder: Path, threads: int) -> None:
    """Load the model in a worker process, from the files of the model and of the run alone."""
    torch.set_num_threads(threads)
    backbone = Backbone.load(config.model, config.backbone)
    _MODEL.append(ModelHandle(backbone, templates_of_run(folder, backbone.loaded.tokenizer, config.verdicts)))


def _call(pickled: bytes) -> tuple[int, ShardOutput]:
    work, batch = pickle.loads(pickled)
    return os.getpid(), work(_MODEL[0], batch)


@dataclasses.dataclass
class OtherProcess:
    """Executor that calls the work in another process, which shares no memory with this one."""

    config: RunConfig
    folder: Path
    pids: set[int] = dataclasses.field(default_factory=set)
    closed: bool = False
    _pool: ProcessPoolExecutor | None = None

    def map(
        self, work: Work[Any], batches: Sequence[Batch[Any]], report_progress: ReportProgress | None = None
    ) -> Iterator[tuple[Batch[Any], ShardOutput]]:
        if self._pool is None:
            loading = (self.config, self.folder, torch.get_num_threads())
            self._pool = ProcessPoolExecutor(1, context(), _load, loading)
        for batch, (pid, output) in zip(
            batches, self._pool.map(_call, [pickle.dumps((work, b)) for b in batches]), strict=True
        ):
            self.pids.add(pid)
            yield batch, output

    def close(self) -> None:
        self.closed = True
        if self._pool is not None:
            self._pool.shutdown()
