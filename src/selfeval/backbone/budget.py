"""Adaptive group sizes that keep the backbone's passes within memory.

An out-of-memory error does not end the run. The failed group (a micro-batch, or a batch of sampled replies) is split in half
and retried, later groups start smaller, and after a while they grow back. Results do not depend on the group size: a logical
batch is a sum over its groups, and every reply has a separate random stream.

For the same reason a batch can be divided among the processes of a training (`processes`), each of which has a backbone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, TypeVar

from selfeval.backbone.meters import CpuMeter, Meter
from selfeval.backbone.process_group import SINGLE_PROCESS, ProcessGroup, gather_outcomes, refuse_gaps, shares
from selfeval.errors import MemoryLimitError, is_out_of_memory
from selfeval.texts import format_bytes

__all__ = ["CPU_PASS_TOKENS", "EventKind", "MemoryBudget", "MemoryEvent", "Phase", "prompt_pass_tokens"]

R = TypeVar("R")

CPU_PASS_TOKENS = 4096
"""Tokens of a pass without gradients on a CPU, whose caches then hold the activations: for the embedded model, passes of 16,384
tokens took 1.4 times as long. A run measures whether fewer are faster (`backbone.pass_size`)."""

_PROMPT_PASS_TOKENS = {"cpu": 2048}
_MOST_PROMPT_PASS_TOKENS = 16384

_PATIENCE, _MOST_PATIENCE = 16, 1024
"""Successful groups required before the limit doubles; doubled after each premature increase."""
_FIRST_SHARE = 16
"""If the system does not enforce the budget, a phase starts with this fraction of its limit, to measure memory use."""


class Phase(StrEnum):
    """Type of work in a group; memory use differs between types, so each has a separate limit."""

    ROLLOUT = "rollout"
    BEAMS = "beams"
    SCORE = "score"
    UPDATE = "update"
    CURVATURE = "curvature"

    @property
    def unit(self) -> str:
        """Unit of the limit."""
        return "rows" if self in (Phase.ROLLOUT, Phase.BEAMS) else "tokens"


def prompt_pass_tokens(device: str) -> int:
    """Return the maximum tokens of a pass over prompts alone on a type of device, such as `cpu`.

    On a CPU fewer than `CPU_PASS_TOKENS`: with 8,192 tokens, which do not fit its caches, passes took 1.6 times as long.
    """
    return _PROMPT_PASS_TOKENS.get(device, _MOST_PROMPT_PASS_TOKENS)


class EventKind(StrEnum):
    """Why a limit changed."""

    OUT_OF_MEMORY = "out_of_memory"
    OVER_BUDGET = "over_budget"
    LITTLE_FREE = "little_free"
    GROWN = "grown"


@dataclass(frozen=True)
class MemoryEvent:
    """A limit that changed, and why.

    Attributes:
        before, after: the limit, in the phase's unit.
        free_bytes: free memory at the last of the `times` occurrences, after the failed group was released.
    """

    phase: Phase
    kind: EventKind
    before: int
    after: int
    free_bytes: int
    times: int = 1

    def as_json(self) -> dict[str, Any]:
        return {
            "phase": self.phase.value,
            "kind": self.kind.value,
            "unit": self.phase.unit,
            "from": self.before,
            "to": self.after,
            "free_bytes": self.free_bytes,
            "times": self.times,
        }


@dataclass
class _Gauge:
    """Measurements and limit of a phase.

    Attributes:
        cap: maximum units per group, or None if only the caller's limit applies.
        patience: successful groups required before the cap doubles.
        well: successful groups since the cap last changed that the cap made smaller.
        grew: whether the cap has doubled since it last shrank.
        refused: number of consecutive times that the budget prevented doubling.
        units, used: size of a recent large group and the bytes it took.
    """

    phase: Phase
    cap: int | None = None
    patience: int = _PATIENCE
    well: int = 0
    grew: bool = False
    refused: int = 0
    units: int = 0
    used: int = 0
    begun: bool = False

    def within(self, limit: int) -> int:
        return limit if self.cap is None else min(self.cap, limit)

    def need(self, units: int) -> int:
        """Estimate the bytes for this many units; 0 before the first measurement."""
        return self.used * units // self.units if self.units else 0

    def note_use(self, units: int, used: int) -> None:
        if 2 * units >= self.units:  # in a small group, fixed costs would be mistaken for costs per unit
            self.units, self.used = units, max(0, used)


class MemoryBudget:
    """Run work in groups that fit in memory; one instance per backbone.

    Args:
        meter: optional meter of the memory that the backbone's passes use. Default: resident memory of this process.
        notify: optional callback that receives a message when a limit shrinks for a new reason.
        pass_tokens: Optional. Maximum tokens of a pass without gradients, if it is lower than the caller's limit.
        shorter: what makes sequences shorter, for messages; a command that reads other sequences than a run sets it.
        processes: the processes that share the work of `in_groups`. Default: this one alone.
    """

    def __init__(
        self, meter: Meter | None = None, notify: Callable[[str], None] | None = None, *, pass_tokens: int | None = None
    ) -> None:
        self.meter: Meter = meter or CpuMeter()
        self.pass_tokens = pass_tokens
        self.notify, self.shorter = notify, "lower replies.max_new_tokens"
        self.processes: ProcessGroup = SINGLE_PROCESS
        self._gauges = {phase: _Gauge(phase) for phase in Phase}
        self._phase: Phase | None = None
        self._events: dict[tuple[Phase, EventKind, int, int], MemoryEvent] = {}

    def take_events(self) -> list[MemoryEvent]:
        """Return and clear the events since the last call, in order of first occurrence."""
        events = list(self._events.values())
        self._events.clear()
        return events

    def in_groups(
        self,
        phase: Phase,
        sizes: Sequence[int],
        limit: int,
        work: Callable[[list[int]], R],
        prompts: Sequence[int] | None = None,
        turns: int = 1,
    ) -> Iterator[tuple[list[int], R]]:
        """Call `work` on groups of similar size; split a group in half if it runs out of memory.

        With several processes, each calls `work` on its share of the items and all receive all results; they must all make the
        same call. Side effects of `work`, such as gradients, cover the own share only.

        Args:
            phase: type of work; free memory is measured again when the phase changes.
            sizes: size of each item in the phase's unit: padded tokens, or 1 for a row.
            limit: maximum units per group, including padding (a group has at least one item).
            work: function of the indices of a group. It may fail midway and be called again with fewer items, so it must have
                no side effects before it succeeds, or remember which items it has finished. With several processes its
                result is pickled.
            prompts: optional number of the prompt of each item; items with the same prompt stay next to each other, because
                they share its pass. Default: items are ordered by size alone.
            turns: how many times the limit a group may have, if `work` has no more than `within(phase, limit)` in memory at a
                time. Default: 1.

        Yields:
            Each group and its result; the groups cover every index once.

        Raises:
            MemoryLimitError: a single item does not fit.
            ProcessGroupError: another process made another call.
        """
        if not sizes:
            return
        if self.processes.size == 1:
            yield from self._own_groups(phase, sizes, limit, work, prompts, turns)
            return
        mine = shares(_order(sizes, prompts), sizes, self.processes.size)[self.processes.rank]
        own_prompts = None if prompts is None else [prompts[i] for i in mine]
        found, failed = None, None
        try:
            groups = self._own_groups(
                phase, [sizes[i] for i in mine], limit, lambda group: work([mine[i] for i in group]), own_prompts, turns
            )
            found = [([mine[i] for i in group], result) for group, result in groups]
        except Exception as error:  # raised again below, in all processes
            failed = error
        name = f"{phase.value} of {len(sizes)} items, {sum(sizes)} {phase.unit}"
        everything = [pair for of_process in gather_outcomes(self.processes, name, found, failed) for pair in of_process]
        refuse_gaps(name, [i for group, _ in everything for i in group], len(sizes))
        yield from everything

    def _own_groups(
        self,
        phase: Phase,
        sizes: Sequence[int],
        limit: int,
        work: Callable[[list[int]], R],
        prompts: Sequence[int] | None,
        turns: int,
    ) -> Iterator[tuple[list[int], R]]:
        """Yield the groups of the items of this process; see `in_groups`."""
        if not sizes:
            return
        gauge, start = self._gauges[phase], 0
        if phase is Phase.SCORE:
            limit = self.scored_at_once(limit)
        order = _order(sizes, prompts)
        self._begin(gauge, limit, len(sizes), max(sizes, default=0))
        while start < len(order):
            # The groups that measure the memory use have no further turns, so that the limit doubles after each of them.
            measures = gauge.cap is not None and gauge.patience == 1
            group = _next_group(order, sizes, start, (1 if measures else turns) * gauge.within(limit))
            if prompts is not None:
                group = _whole_prompts(group, order[start + len(group) :], prompts)
            largest = max(sizes[i] for i in group)
            units = whole = len(group) * largest
            if turns > 1:
                units = min(whole, max(largest, gauge.within(limit)))
            more, alone = start + len(group) < len(order) or whole > units, units == largest
            results = self._attempt(gauge, group, units, work, alone=alone)
            if results:
                self._went_well(gauge, units, limit, turns=whole // units if more else 0, alone=alone)
                start += len(group)
                yield group, results[0]

    def scored_at_once(self, limit: int) -> int:
        """Return the maximum tokens of a pass without gradients under the caller's limit."""
        return limit if self.pass_tokens is None else min(limit, self.pass_tokens)

    def within(self, phase: Phase, limit: int) -> int:
        """Return the units that a group of this phase may have in memory now.

        Args:
            phase: type of work.
            limit: the caller's own limit.
        """
        return self._gauges[phase].within(limit)

    def note_failure(self, phase: Phase, units: int, *, alone: bool) -> None:
        """Release memory and halve the limit of a phase, after work outside of `in_groups` ran out of memory.

        Args:
            phase: type of work.
            units: units that the work had in memory.
            alone: whether it cannot be done in smaller groups.

        Raises:
            MemoryLimitError: it cannot.
        """
        if alone:
            raise self._too_big(phase, units)
        self.meter.release()
        self._shrink_after_failure(self._gauges[phase], EventKind.OUT_OF_MEMORY, units)

    def _begin(self, gauge: _Gauge, limit: int, items: int, largest: int) -> None:
        """Measure free memory, and start smaller if it is less than this phase needed before."""
        if gauge.phase is not self._phase:
            self._phase = gauge.phase
            self.meter.between_phases()
        # The first groups measure the memory use: start small, and double after every group that went well (patience 1).
        if self.meter.limit is not None and not gauge.begun:
            gauge.cap, gauge.patience = max(largest, limit // _FIRST_SHARE), 1
        gauge.begun = True
        planned = min(gauge.within(limit), items * largest)
        free = self.meter.free() if gauge.need(planned) else 0
        if gauge.need(planned) <= free:
            return
        # Halve in advance, as a failure would, but not below the largest item.
        fitting = planned
        while fitting // 2 >= largest and gauge.need(fitting) > free:
            fitting //= 2
        if fitting < planned:
            # Which is scarcer: the budget, or the free memory of the machine?
            over = self.meter.limit is not None and self.meter.limit - self.meter.used() <= free
            self._shrink(gauge, EventKind.OVER_BUDGET if over else EventKind.LITTLE_FREE, planned, fitting)

    def _attempt(self, gauge: _Gauge, group: list[int], units: int, work: Callable[[list[int]], R], *, alone: bool) -> list[R]:
        """The result in a list, or an empty one when there was no memory for it."""
        if self.meter.limit is not None:
            self.meter.release()  # memory cached by the allocator would hide the group's use
        before = self.meter.used()
        self.meter.restart()
        try:
            result = work(group)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if alone:
                raise self._too_big(gauge.phase, units) from error
        else:
            gauge.note_use(units, self.meter.peak() - before)
            return [result]
        # Outside the except block, because the traceback would keep the tensors of the failed pass alive.
        self.meter.release()
        self._shrink_after_failure(gauge, EventKind.OUT_OF_MEMORY, units)
        return []

    def _went_well(self, gauge: _Gauge, units: int, limit: int, *, turns: int, alone: bool) -> None:
        """Check whether the budget was kept, and let the limit grow after so many turns that left items out."""
        peak, budget = self.meter.peak(), self.meter.limit
        if budget is not None and peak > budget:
            if alone:
                raise self._too_big(gauge.phase, units, peak)
            self.meter.release()
            self._shrink_after_failure(gauge, EventKind.OVER_BUDGET, units)
            return
        gauge.well += turns
        if turns and gauge.cap is not None and gauge.well >= gauge.patience:
            self._grow(gauge, gauge.cap, limit)

    def _grow(self, gauge: _Gauge, cap: int, limit: int) -> None:
        """Doubles the limit, unless it is known that there is no room."""
        gauge.well, wider = 0, min(2 * cap, limit)
        if gauge.need(wider) > self.meter.free():
            gauge.refused += 1
            if gauge.refused == 2 and self.meter.limit is not None:  # the first time, what is loaded once was counted in
                self._record(gauge.phase, EventKind.OVER_BUDGET, wider, cap)
            return
        # At the caller's limit the cap has no effect, so remove it.
        gauge.cap, gauge.grew, gauge.refused = wider if wider < limit else None, True, 0
        # Doubling while the first groups are measured (patience 1) is not worth an event.
        if gauge.patience >= _PATIENCE and wider > cap:
            self._record(gauge.phase, EventKind.GROWN, cap, wider)

    def _shrink_after_failure(self, gauge: _Gauge, kind: EventKind, units: int) -> None:
        gauge.patience = max(_PATIENCE, min(2 * gauge.patience, _MOST_PATIENCE) if gauge.grew else gauge.patience)
        self._shrink(gauge, kind, units, units // 2)

    def _shrink(self, gauge: _Gauge, kind: EventKind, before: int, after: int) -> None:
        gauge.cap, gauge.well, gauge.grew, gauge.refused = after, 0, False, 0
        self.meter.save_memory()
        self._record(gauge.phase, kind, before, after)

    def _record(self, phase: Phase, kind: EventKind, before: int, after: int) -> None:
        key, free = (phase, kind, before, after), self.meter.free()
        seen = self._events.get(key)
        self._events[key] = (
            MemoryEvent(*key, free) if seen is None else replace(seen, free_bytes=free, times=seen.times + 1)
        )  # fmt: skip
        if seen is None and self.notify is not None and kind is not EventKind.GROWN:
            self.notify(f"{phase.value}: {_REASONS[kind]}; continuing with {after} {phase.unit} at a time instead of {before}")

    def _too_big(self, phase: Phase, units: int, peak: int | None = None) -> MemoryLimitError:
        what, advice = _SMALLEST[phase]
        if peak is None:
            used, free = format_bytes(self.meter.used()), format_bytes(self.meter.free())
            shown = f"there is not enough memory (in use {used}, free {free})"
        else:
            limit = format_bytes(self.meter.limit or 0)
            shown = f"this process then uses {format_bytes(peak)}, and backbone.memory_budget is {limit}"
        return MemoryLimitError(
            f"{what.format(units=units)} alone does not fit: {shown}. Free some memory, raise --memory-budget if you gave one, "
            f"{advice.format(shorter=self.shorter)}, or use a smaller model"
        )


_REASONS = {
    EventKind.OUT_OF_MEMORY: "out of memory",
    EventKind.OVER_BUDGET: "the memory budget is too small for more",
    EventKind.LITTLE_FREE: "less memory is free than before",
}

_SMALLEST = {
    Phase.ROLLOUT: ("sampling one reply", "lower max_new_tokens or shorten the prompts"),
    Phase.BEAMS: ("beam search for one reply", "lower replies.beams or replies.max_new_tokens"),
    Phase.SCORE: ("scoring one sequence of {units} tokens", "{shorter}"),
    Phase.CURVATURE: (
        "a second derivative of one sequence ({units} tokens)",
        "{shorter} or lower backbone.lora.rank",
    ),
    Phase.UPDATE: (
        "a micro-batch of one sequence or pair ({units} tokens)",
        "{shorter} or lower backbone.lora.rank",
    ),
}


def _order(sizes: Sequence[int], prompts: Sequence[int] | None) -> list[int]:
    """Return the items by size; those with the same prompt are together, at the size of the largest of them."""
    if prompts is None:
        return sorted(range(len(sizes)), key=lambda i: (sizes[i], i))
    largest: dict[int, int] = {}
    for prompt, size in zip(prompts, sizes, strict=True):
        largest[prompt] = max(size, largest.get(prompt, 0))
    return sorted(range(len(sizes)), key=lambda i: (largest[prompts[i]], prompts[i], sizes[i], i))


def _whole_prompts(group: list[int], rest: Sequence[int], prompts: Sequence[int]) -> list[int]:
    """Leave to the next group all items of the prompt that it would begin with, so that the prompt is read once.

    A group of a single prompt stays as it is.
    """
    if not rest or prompts[group[-1]] != prompts[rest[0]]:
        return group
    whole = [item for item in group if prompts[item] != prompts[rest[0]]]
    return whole or group


def _next_group(order: Sequence[int], sizes: Sequence[int], start: int, limit: int) -> list[int]:
    """The longest run of `order` from `start` that is within the limit when all are padded to the largest (one at least)."""
    end, widest = start + 1, sizes[order[start]]
    while end < len(order):
        widest = max(widest, sizes[order[end]])
        if (end + 1 - start) * widest > limit:
            break
        end += 1
    return list(order[start:end])
