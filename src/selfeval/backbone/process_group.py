"""Processes that train together: each has a copy of the base and does a share of every batch.

All processes run the same program on the same data. Only the passes through the model are divided: `MemoryBudget.in_groups`
gives each process a share of the items, and every process receives all results, in the same order. Gradients are summed before
each step (`training/gradient_accumulation.py`). See docs/concepts/data-parallel-training.md.

Objects travel pickled between the processes of one training, which trust each other: the network between them must not be
open to others.
"""

from __future__ import annotations

import io
import pickle
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import reduce
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from selfeval.errors import ProcessGroupError, portable

__all__ = [
    "SINGLE_PROCESS",
    "ProcessGroup",
    "SingleProcess",
    "TorchProcessGroup",
    "by_first",
    "gather_outcomes",
    "refuse_gaps",
    "shares",
    "sum_in_place",
]

T = TypeVar("T")

_DISAGREE = (
    "the processes of this training disagree about their work: {}. Use the same versions, hardware and number of CPU threads "
    "for all of them, and repeat the command to resume from the last checkpoint"
)


class ProcessGroup(Protocol):
    """The processes of one training. Every method must be called by all of them, in the same order.

    Attributes:
        rank: number of this process, from 0. Process 0 alone writes to the run folder.
        size: number of processes.
    """

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, by rank. Tensors arrive on the CPU."""
        ...

    def broadcast(self, value: T) -> T:
        """Return the value of process 0."""
        ...

    def sum(self, tensor: Tensor) -> None:
        """Replace a contiguous tensor by its sum over all processes, which is the same in all of them bit for bit."""
        ...


class SingleProcess:
    """A training in one process."""

    rank, size = 0, 1

    def gather(self, value: T) -> list[T]:
        return [value]

    def broadcast(self, value: T) -> T:
        return value

    def sum(self, tensor: Tensor) -> None:
        """Leave the tensor unchanged."""


SINGLE_PROCESS = SingleProcess()


class TorchProcessGroup:
    """The processes of `torch.distributed`, which must be initialised: gloo on CPUs, nccl on GPUs.

    Objects are exchanged by gloo in either case, so that they need no memory of a GPU.

    Args:
        patience: Optional. Limit of the wait for another process when objects are exchanged on GPUs. Default: that of torch.
    """

    def __init__(self, patience: timedelta | None = None) -> None:
        from torch import distributed

        self._distributed = distributed
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
        self._objects = None if distributed.get_backend() == "gloo" else distributed.new_group(backend="gloo", timeout=patience)

    def gather(self, value: T) -> list[T]:
        found: list[Any] = [None] * self.size
        self._distributed.all_gather_object(found, _dumped(value), group=self._objects)
        return [pickle.loads(each) for each in found]

    def broadcast(self, value: T) -> T:
        sent = [_dumped(value) if self.rank == 0 else None]
        self._distributed.broadcast_object_list(sent, src=0, group=self._objects)
        received = sent[0]
        assert received is not None
        return pickle.loads(received)  # type: ignore[no-any-return]

    def sum(self, tensor: Tensor) -> None:
        self._distributed.all_reduce(tensor)


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            # A view would be pickled with all of the tensor that it is a part of; a GPU of another process does not exist here.
            return value.detach().cpu().clone().__reduce_ex__(pickle.HIGHEST_PROTOCOL)
        return NotImplemented


def _dumped(value: Any) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, pickle.HIGHEST_PROTOCOL).dump(value)
    return buffer.getvalue()


def shares(order: Sequence[int], sizes: Sequence[int], count: int) -> list[list[int]]:
    """Divide items among processes: contiguous parts of `order` with about equal sums of sizes.

    Items of similar length, or with the same prompt, are neighbours in `order` and mostly stay together. A part differs from an
    equal share by less than its largest item. With fewer items than processes, some parts are empty.

    Args:
        order: the items.
        sizes: size of each item.
        count: number of parts.

    Example:
        >>> shares([0, 1, 2, 3], [1, 1, 2, 4], 2)
        [[0, 1, 2], [3]]
    """
    total, before = sum(sizes[i] for i in order), 0
    parts: list[list[int]] = [[] for _ in range(count)]
    for item in order:
        # An item belongs to the part in which its middle is; in integers, so that all processes agree.
        middle = 2 * before + sizes[item]
        parts[min(count - 1, middle * count // max(1, 2 * total))].append(item)
        before += sizes[item]
    return parts


def gather_outcomes(group: ProcessGroup, work: str, result: T | None, error: Exception | None) -> list[T]:
    """Return the results of all processes, or raise the error of the first that failed, in all of them.

    Without this, the processes that succeeded would wait for the failed one forever.

    Args:
        group: the processes.
        work: description of the work; all processes must be at the same one.
        result: result of this process, if it succeeded.
        error: its error, if it failed.

    Raises:
        ProcessGroupError: the processes are not at the same work.
    """
    if error is not None:
        error.add_note(f"in process {group.rank} of {group.size}:\n{''.join(traceback.format_exception(error))}")
    outcomes = group.gather((work, result, None if error is None else portable(error)))
    if len({work for work, _, _ in outcomes}) > 1:
        raise ProcessGroupError(_DISAGREE.format("; ".join(work for work, _, _ in outcomes)))
    for rank, (_, _, failed) in enumerate(outcomes):
        if failed is not None:
            raise error if rank == group.rank and error is not None else failed
    return [found for _, found, _ in outcomes]  # type: ignore[misc]


def refuse_gaps(work: str, items: Sequence[int], count: int) -> None:
    """Refuse results that do not cover every item once, because the processes did not divide the items in the same way.

    Raises:
        ProcessGroupError: an item is missing or was computed twice.
    """
    if sorted(items) != list(range(count)):
        raise ProcessGroupError(_DISAGREE.format(f"{work}, of which {len(set(items))} were computed, {len(items)} times"))


def by_first(group: ProcessGroup, work: str, compute: Callable[[], T]) -> T:
    """Let process 0 compute a value, and return it in all processes; its error is raised in all of them.

    Args:
        group: the processes.
        work: description of the work.
        compute: returns the value.
    """
    result, failed = None, None
    if group.rank == 0:
        try:
            result = compute()
        except Exception as error:
            if group.size == 1:
                raise
            failed = error
    gather_outcomes(group, work, None, failed)
    return group.broadcast(result)  # type: ignore[return-value]


def sum_in_place(group: ProcessGroup, tensors: Sequence[Tensor]) -> None:
    """Replace tensors by their sums over all processes, in one message.

    Args:
        group: the processes.
        tensors: tensors of the same shapes in the same order in all processes. They may be on several devices, which need not
            be the same in another process: each places its base by its own free memory.

    Raises:
        ProcessGroupError: another process sums other tensors, or is at other work.
    """
    if group.size == 1:
        return
    kind = reduce(torch.promote_types, {tensor.dtype for tensor in tensors})
    flat = torch.cat([tensor.reshape(-1).to(tensors[0].device, kind) for tensor in tensors])
    # Before the sum, which would wait for a process at other work, and add other numbers without an error.
    gather_outcomes(group, f"sum of {flat.numel()} numbers", None, None)
    group.sum(flat)
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
