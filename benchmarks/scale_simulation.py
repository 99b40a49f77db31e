"""A simulation of the parts of a run on workers, in simpy: what the formula of `scale_formula.py` must agree with.

The pool keeps the rules of selfeval/scale/pool.py: two shards per worker, one that it computes and one that waits; an idle
worker takes a shard that waits for another one, and repeats a slow one; the first result counts; the shards of a lost worker
are first in the queue. A training keeps those of selfeval/scale/training.py: all workers meet after every phase, and after a
loss all start again from the last checkpoint.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import simpy
from scale_formula import SHORTEST, Alone, Chance, Map, Part, Training, sigma_of

IN_FLIGHT = 2

Process = Generator[simpy.Event, Any, Any]


@dataclass
class _Random:
    """The random events of a simulation; log-normal variables have mean 1."""

    chance: Chance
    rng: np.random.Generator

    def works(self, count: int) -> list[float]:
        return self._draws(count, self.chance.work)

    def speeds(self, count: int) -> list[float]:
        return self._draws(count, self.chance.machine)

    def until_loss(self, workers: int = 1) -> float:
        rate = self.chance.losses * workers
        return float(self.rng.exponential(1 / rate)) if rate else math.inf

    def _draws(self, count: int, cv: float) -> list[float]:
        sigma = sigma_of(cv)
        found: list[float] = np.exp(sigma * self.rng.standard_normal(count) - sigma**2 / 2).tolist() if sigma else [1.0] * count
        return found


# -- shards -------------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Call:
    """A shard that a worker has; see `_Call` in selfeval/scale/pool.py.

    Attributes:
        begun: when the worker began; None while the shard waits.
        done: whether the worker has computed it.
    """

    task: int
    begun: float | None = None
    done: bool = False


@dataclass(eq=False)
class _Slot:
    calls: deque[_Call] = field(default_factory=deque)
    up: bool = True
    work: simpy.Event | None = None
    process: simpy.Process | None = None


class _Pool:
    """Workers and their driver."""

    def __init__(self, env: simpy.Environment, part: Map, workers: int, random: _Random) -> None:
        self.env, self.part, self.random = env, part, random
        self.work = random.works(part.shards)
        self.waiting, self.seconds = deque(range(part.shards)), list[float]()
        # Calls of the shards that are not done, by shard.
        self.open: dict[int, list[tuple[_Slot, _Call]]] = {task: [] for task in range(part.shards)}
        self.results: simpy.Store = simpy.Store(env)
        self.finished = env.event()
        self.look_at = -1.0
        self.slots = [_Slot() for _ in range(workers)]
        for slot in self.slots:
            slot.process = env.process(self._worker(slot))
            if random.chance.losses:
                env.process(self._losses(slot))
        env.process(self._driver())

    # A worker computes its calls in order, and begins the next one before the driver has taken the last result.

    def _worker(self, slot: _Slot) -> Process:
        while True:
            call = next((call for call in slot.calls if not call.done), None)
            try:
                if call is None:
                    slot.work = self.env.event()
                    yield slot.work
                    continue
                yield from self._compute(slot, call)
            except simpy.Interrupt:
                yield from self._replaced(slot)

    def _compute(self, slot: _Slot, call: _Call) -> Process:
        call.begun = self.env.now
        yield self.env.timeout(self.part.seconds * self.work[call.task] * self.random.speeds(1)[0])
        call.done = True
        self.results.put((slot, call))

    def _losses(self, slot: _Slot) -> Process:
        while True:
            yield self.env.timeout(self.random.until_loss())
            if slot.up and slot.process is not None:
                slot.process.interrupt()

    def _replaced(self, slot: _Slot) -> Process:
        """Give the shards of a lost worker back, and start another one in its place."""
        for call in [call for call in reversed(slot.calls) if not call.done]:
            self._remove(slot, call)
            if call.task in self.open and not self.open[call.task]:
                self.waiting.appendleft(call.task)
        slot.up = False
        self._hand_out(self.slots)
        yield self.env.timeout(self.random.chance.replace)
        slot.up = True
        self._hand_out([slot])

    # The driver takes one result after another.

    def _driver(self) -> Process:
        self._hand_out(self.slots)
        while self.open:
            slot, call = yield self.results.get()
            if self.part.driver and call.task in self.open:
                yield self.env.timeout(self.part.driver)
            self._settle(call)
            self._remove(slot, call)
            self._hand_out([slot])
        self.finished.succeed()

    def _settle(self, call: _Call) -> None:
        """Note the result of a shard, and cancel its copies that wait; a copy in progress runs to its end."""
        if call.task not in self.open:
            return
        assert call.begun is not None
        self.seconds.append(self.env.now - call.begun)
        for slot, copy in self.open.pop(call.task):
            if copy.begun is None:
                slot.calls.remove(copy)

    def _remove(self, slot: _Slot, call: _Call) -> None:
        if call in slot.calls:
            slot.calls.remove(call)
        held = self.open.get(call.task, [])
        if (slot, call) in held:
            held.remove((slot, call))

    def _give(self, slot: _Slot, task: int) -> None:
        call = _Call(task)
        slot.calls.append(call)
        self.open[task].append((slot, call))
        if slot.work is not None and not slot.work.triggered:
            slot.work.succeed()

    def _hand_out(self, slots: list[_Slot]) -> None:
        """Give shards to the workers that may have room, one each before anyone gets a second one."""
        for most in range(1, IN_FLIGHT + 1):
            for slot in slots:
                if slot.up and self.waiting and len(slot.calls) < most:
                    self._give(slot, self.waiting.popleft())
        if not self.waiting:
            self._help_slower_workers()

    def _help_slower_workers(self) -> None:
        """Give idle workers the shards that wait for busy ones, then those that are slow; look again later for others."""
        idle = [slot for slot in self.slots if slot.up and not slot.calls]
        if not idle or not self.open:
            return
        alone = [calls[0] for calls in self.open.values() if len(calls) == 1 and not calls[0][1].done]
        for slot, call in alone:
            if idle and call.begun is None and slot.calls[0] is not call:
                self._remove(slot, call)
                self._give(idle.pop(), call.task)
        self._repeat_slow(idle, [call for _, call in alone if call.begun is not None])

    def _repeat_slow(self, idle: list[_Slot], calls: list[_Call]) -> None:
        if not self.seconds or math.isinf(self.random.chance.slow):
            return
        limit = max(SHORTEST, self.random.chance.slow * statistics.median(self.seconds))
        due = {call.task: (call.begun or 0.0) + limit for call in calls}
        for task in [task for task, at in due.items() if at <= self.env.now][: len(idle)]:
            self._give(idle.pop(), task)
        later = min((at for at in due.values() if at > self.env.now), default=math.inf)
        if idle and not math.isinf(later) and not self.env.now < self.look_at <= later:
            self.look_at = later
            self.env.process(self._look(later))

    def _look(self, at: float) -> Process:
        # Rounding must not bring this look before the moment from which the shard is slow.
        yield self.env.timeout(at - self.env.now + 1e-6)
        self._hand_out([])


def simulate_map(part: Map, workers: int, chance: Chance, seed: int) -> float:
    """Return the seconds of a map stage."""
    if part.shards == 0:
        return 0.0
    env = simpy.Environment()
    pool = _Pool(env, part, workers, _Random(chance, np.random.default_rng(seed)))
    env.run(pool.finished)
    return float(env.now)


# -- training -----------------------------------------------------------------------------------------------------------


def _phases(env: simpy.Environment, part: Training, workers: int, random: _Random) -> Process:
    """Compute an iteration: every worker its share of each phase, then all the common work."""
    for phase in part.phases:
        # A worker per event: the phase ends with the slowest of them.
        yield env.all_of([env.timeout(phase.share * speed) for speed in random.speeds(workers)])
        if phase.common:
            yield env.timeout(phase.common)


def _train(env: simpy.Environment, part: Training, workers: int, random: _Random) -> Process:
    """Compute all iterations; after a loss, restart from the last checkpoint."""
    done = saved = 0
    while done < part.iterations:
        try:
            yield from _phases(env, part, workers, random)
            done += 1
            if done % part.every == 0 and done < part.iterations:
                yield env.timeout(part.checkpoint)
                saved = done
        except simpy.Interrupt:
            done = saved
            yield from _restart(env, random)


def _restart(env: simpy.Environment, random: _Random) -> Process:
    while True:
        try:
            yield env.timeout(random.chance.restart)
            return
        except simpy.Interrupt:  # another loss: the restart begins again
            continue


def _lose(env: simpy.Environment, training: simpy.Process, random: _Random) -> Process:
    """Lose one worker again and again, at the rate of one."""
    while True:
        yield env.timeout(random.until_loss())
        training.interrupt()


def simulate_training(part: Training, workers: int, chance: Chance, seed: int) -> float:
    """Return the seconds of a training."""
    env, random = simpy.Environment(), _Random(chance, np.random.default_rng(seed))
    training = env.process(_train(env, part, workers, random))
    if chance.losses:
        for _ in range(workers):
            env.process(_lose(env, training, random))
    env.run(training)
    return float(env.now)


# -- runs ---------------------------------------------------------------------------------------------------------------


def simulate(part: Part, workers: int, chance: Chance, seed: int) -> float:
    """Return the seconds of a part."""
    if isinstance(part, Map):
        return simulate_map(part, workers, chance, seed)
    return simulate_training(part, workers, chance, seed) if isinstance(part, Training) else _alone(part)


def _alone(part: Alone) -> float:
    return part.seconds


def simulate_run(parts: tuple[Part, ...], workers: int, chance: Chance, seed: int) -> float:
    """Return the seconds of a run."""
    return sum(simulate(part, workers, chance, 1000 * seed + number) for number, part in enumerate(parts))
