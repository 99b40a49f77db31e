"""The formula of docs/concepts/scale.md: expected seconds of a run on W workers, part by part.

A run is a list of parts (`scale_work.py` counts them from a configuration), and its time is the sum of theirs:

- `Alone`: one process works, and the others wait. It takes as long on any number of workers.
- `Map`: shards that a pool of workers computes. Limited by the last wave, and by the process of the command.
- `Training`: phases at whose end every worker waits for the slowest; all resume from a checkpoint if one is lost.

Times are in seconds, sizes in bytes, rates in bytes per second. Nothing here is random; `scale_simulation.py` draws the same
parts at random.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri

Array = NDArray[np.float64]

SHORTEST = 1.0
"""Seconds below which the pool calls no shard slow (`_SHORTEST` in selfeval/scale/pool.py)."""
_GRID, _STARTS, _NODES = 1001, 24, 15
"""Points of integrals: over time, over the starts of shards, over their work."""


@dataclass(frozen=True)
class Alone:
    """Work of one process."""

    name: str
    seconds: float


@dataclass(frozen=True)
class Map:
    """Shards for a pool of workers.

    Attributes:
        shards: number of shards.
        seconds: mean time of a shard on one worker.
        driver: time of the process of the command for a shard: receive the result, write it, hand out the next one.
    """

    name: str
    shards: int
    seconds: float
    driver: float = 0.0


@dataclass(frozen=True)
class Phase:
    """Work between two meetings of all workers.

    Attributes:
        share: mean time of the largest share of a batch on one worker.
        common: time that is the same on all workers: messages, and the control that each computes.
    """

    share: float
    common: float = 0.0


@dataclass(frozen=True)
class Training:
    """Iterations of the same phases, with a checkpoint after every few of them, but none after the last.

    Attributes:
        iterations: number of iterations (steps, for the evaluator).
        phases: phases of an iteration.
        every: iterations between checkpoints.
        checkpoint: time of a checkpoint.
    """

    name: str
    iterations: int
    phases: tuple[Phase, ...]
    every: int
    checkpoint: float = 0.0


Part = Alone | Map | Training


@dataclass(frozen=True)
class Chance:
    """The random events of a run.

    Attributes:
        work: coefficient of variation of the work of a shard: other texts. A repeat of the shard has the same work.
        machine: that of the speed of a worker, drawn for every attempt at a shard and every phase of a training.
        slow: multiple of the median time after which an idle worker repeats a shard (`scale.slow`); infinite: never.
        losses: lost workers per worker and second.
        replace: seconds until a lost worker of a pool is replaced.
        restart: seconds until all workers of a training work again after one was lost.
    """

    work: float = 0.0
    machine: float = 0.0
    slow: float = math.inf
    losses: float = 0.0
    replace: float = 0.0
    restart: float = 0.0

    @property
    def shard(self) -> float:
        """Coefficient of variation of the time of a shard: the product of two log-normal variables."""
        return math.sqrt((1 + self.work**2) * (1 + self.machine**2) - 1)


NONE = Chance()


# -- the largest of several ---------------------------------------------------------------------------------------------


def sigma_of(cv: float) -> float:
    """Return the standard deviation of the logarithm of a log-normal variable: sqrt(log(1 + cv^2))."""
    return math.sqrt(math.log1p(cv * cv))


def longest(count: int, cv: float) -> float:
    """Return the mean of the largest of `count` independent log-normal variables with mean 1.

    E max = integral of count phi(z) Phi(z)^(count - 1) exp(sigma z - sigma^2 / 2) dz.
    """
    sigma = sigma_of(cv)
    if sigma == 0.0 or count == 1:
        return 1.0
    z = np.linspace(-10.0, 10.0 + sigma, 20001)
    density = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    below = ndtr(z) ** (count - 1)
    return float(np.trapezoid(count * density * below * np.exp(sigma * z - sigma**2 / 2), z))


def _survival(times: Array, cv: float) -> Array:
    """Return P(X > t) of a log-normal variable with mean 1."""
    sigma = sigma_of(cv)
    if sigma == 0.0:
        return (times < 1.0).astype(float)
    with np.errstate(divide="ignore"):
        return 1 - ndtr((np.log(times) + sigma**2 / 2) / sigma)


# -- shards -------------------------------------------------------------------------------------------------------------


def map_seconds(part: Map, workers: int, chance: Chance = NONE) -> float:
    """Return the expected time of a map stage.

    Of n shards of c seconds, the last wave has r = n - (K - 1) W, with K = ceil(n / W) waves. If all take the same time,

        T = c + (K - 1) max(c, W d) + r d

    because results queue up at the driver, which takes d for each. If they do not, the last wave ends with the longest of r
    sums (`_in_step`). After some waves the workers are out of step, and the stage ends with the longest rest of a shard
    (`_out_of_step`). The weight of the first is exp(-2 pi^2 cv^2 (K - 1)), the first Fourier coefficient of the phases of the
    workers.
    """
    c, d, n = part.seconds, part.driver, part.shards
    if n == 0:
        return 0.0
    waves = math.ceil(n / workers)
    last = n - (waves - 1) * workers
    in_step = math.exp(-2 * math.pi**2 * chance.shard**2 * (waves - 1))
    working = _in_step(part, last, waves, workers, chance)
    if in_step < 1.0:
        working = in_step * working + (1 - in_step) * min(working, _out_of_step(part, workers, chance))
    queued = (waves - 1) * max(0.0, workers * d - c) + d * (in_step * last + 1 - in_step)
    return working * _slowed(c, chance) + queued + _lost_at_the_end(c, min(n, workers), chance)


def _in_step(part: Map, last: int, waves: int, workers: int, chance: Chance) -> float:
    """Return the time of waves that begin together.

    The shards of the last wave go to the r workers that are first after K - 1 waves. The sum of their time so far, a log-normal
    variable cut off at its quantile r / W, and of one more shard is taken as log-normal too.
    """
    c, cv = part.seconds, chance.shard
    if waves == 1:
        return _longest_tail(c, last, chance)
    before = cv / math.sqrt(waves - 1)
    mean, square = _lower_moments(before, last / workers)
    total = (waves - 1) * mean + 1
    variance = (waves - 1) ** 2 * max(0.0, square - mean**2) + cv**2
    others = (waves - 1) * longest(workers, before) if last < workers else 0.0
    return c * max(total * longest(last, math.sqrt(variance) / total), others)


def _lower_moments(cv: float, share: float) -> tuple[float, float]:
    """Return mean and mean square of a log-normal variable with mean 1, given that it is among its lowest share."""
    sigma = sigma_of(cv)
    if sigma == 0.0 or share == 1.0:
        return 1.0, 1.0 + cv**2
    z = float(ndtri(share))
    return float(ndtr(z - sigma)) / share, (1 + cv**2) * float(ndtr(z - 2 * sigma)) / share


def _longest_tail(seconds: float, count: int, chance: Chance) -> float:
    """Return the mean of the longest of `count` shards that begin together, the slow ones of which idle workers repeat."""
    if math.isinf(chance.slow) or chance.machine == 0.0:
        return seconds * longest(count, chance.shard)
    times = _ages(seconds, chance)
    alive = _survival_with_repeats(times, _slow_after(seconds, chance), seconds, chance)
    return float(np.trapezoid(1 - (1 - alive) ** count, times))


def _out_of_step(part: Map, workers: int, chance: Chance) -> float:
    """Return the time if the workers end their shards at independent moments.

    W shards begin at 0, and the others at any time until the last one is handed out at t. All workers are busy until then, so

        W t = W E min(X, t) + (n - W) / t integral from 0 to t of E min(X, u) du

    determines t, and the stage ends with the last of n independent shards: P(T <= x) = product of P(X <= x - start).
    """
    c, others = part.seconds, part.shards - workers
    times = _ages(c, chance)
    handed_out = _handed_out(part, workers, times, chance)
    # Shards that began long before the last one are done by then.
    window = min(handed_out, 6 * c * math.exp(3 * sigma_of(chance.shard)))
    late = handed_out - window + (np.arange(_STARTS) + 0.5) / _STARTS * window
    starts = np.concatenate([[0.0], late])
    weights = np.concatenate([[workers], np.full(_STARTS, others * window / handed_out / _STARTS)])
    ends = handed_out + times
    log_done = np.zeros_like(ends)
    for start, weight in zip(starts, weights, strict=True):
        # Nobody is idle, and nothing is repeated, before the last shard is handed out.
        limit = max(_slow_after(c, chance), handed_out - start)
        log_done += weight * np.log(np.maximum(1 - _survival_with_repeats(ends - start, limit, c, chance), 1e-300))
    return handed_out + float(np.trapezoid(1 - np.exp(log_done), ends))


def _handed_out(part: Map, workers: int, times: Array, chance: Chance) -> float:
    """Return the time at which the last shard is handed out; see `_out_of_step`.

    Later than any shard takes, the integral is c t - E X^2 / 2, and t is the root of a quadratic equation.
    """
    c, others = part.seconds, part.shards - workers
    worked = _integral(_survival(times / c, chance.shard), times)
    after = times[1:]
    excess = workers * worked[1:] + others / after * _integral(worked, times)[1:] - workers * after
    if excess[-1] > 0:
        square = (1 + chance.shard**2) * c**2
        whole = part.shards * c
        return (whole + math.sqrt(whole**2 - 2 * workers * others * square)) / (2 * workers)
    end = int(np.argmax(excess < 0))
    # Between two points of the grid, the excess is nearly linear.
    return float(np.interp(0.0, -excess[max(end - 1, 0) : end + 1], after[max(end - 1, 0) : end + 1]))


def _ages(seconds: float, chance: Chance) -> Array:
    """Return a grid of times, from 0 to one that a shard practically never takes, fine near 0."""
    top = 8 * seconds * math.exp(8 * sigma_of(chance.shard))
    return np.concatenate([[0.0], np.geomspace(1e-3 * seconds, top, _GRID)])


def _integral(values: Array, times: Array) -> Array:
    """Return the integral of values from the first time to each."""
    return np.concatenate([[0.0], np.cumsum(np.diff(times) * (values[1:] + values[:-1]) / 2)])


def _slow_after(seconds: float, chance: Chance) -> float:
    """Return the time from which a shard is slow: a multiple of the median."""
    return math.inf if math.isinf(chance.slow) else max(SHORTEST, chance.slow * seconds * _median(chance.shard))


def _survival_with_repeats(ages: Array, limit: float, seconds: float, chance: Chance) -> Array:
    """Return the probability that a shard has no result at an age, if it is repeated at an age `limit`.

    A repeat has the same work w and another speed: E_w [ S(age / w) S((age - limit) / w) ].
    """
    ages = np.maximum(ages, 1e-12)
    if math.isinf(limit) or chance.machine == 0.0:
        return _survival(ages / seconds, chance.shard)
    nodes, weights = np.polynomial.hermite_e.hermegauss(_NODES)
    sigma, alive, late = sigma_of(chance.work), np.zeros_like(ages), ages > limit
    for node, weight in zip(nodes, weights / weights.sum(), strict=True):
        work = seconds * math.exp(sigma * node - sigma**2 / 2)
        found = _survival(ages / work, chance.machine)
        found[late] *= _survival((ages[late] - limit) / work, chance.machine)
        alive += weight * found
    return alive


def _median(cv: float) -> float:
    return math.exp(-(sigma_of(cv) ** 2) / 2)


def _slowed(seconds: float, chance: Chance) -> float:
    """Return the factor of lost work: a loss costs the shard in progress, in its middle on average, and the replacement."""
    return 1 + chance.losses * (seconds * (1 + chance.shard**2) / 2 + chance.replace)


def _lost_at_the_end(seconds: float, workers: int, chance: Chance) -> float:
    """Return the delay by losses in the last wave: of k losses at random moments, the latest is at k / (k + 1) of it."""
    mean = chance.losses * workers * seconds
    return seconds * (1 - (1 - math.exp(-mean)) / mean) if mean else 0.0


# -- training -----------------------------------------------------------------------------------------------------------


def all_reduce_seconds(size: float, workers: int, bandwidth: float, latency: float) -> float:
    """Return the time of a ring all-reduce: 2 (W - 1) messages of size / W (Patarasuk and Yuan 2009).

    T = 2 (W - 1) / W size / bandwidth + 2 (W - 1) latency

    Args:
        size: bytes of the gradients.
        workers: number of workers.
        bandwidth: bytes per second of a worker in one direction.
        latency: seconds of a message without content.
    """
    return 2 * (workers - 1) / workers * size / bandwidth + 2 * (workers - 1) * latency


def iteration_seconds(part: Training, workers: int, chance: Chance = NONE) -> float:
    """Return the expected time of an iteration: the slowest worker of each phase, and the common work."""
    slowest = longest(workers, chance.machine)
    return sum(phase.share * slowest + phase.common for phase in part.phases)


def training_seconds(part: Training, workers: int, chance: Chance = NONE) -> float:
    """Return the expected time of a training, with checkpoints and losses (Daly 2006, equation 20 for every segment)."""
    one, segments = iteration_seconds(part, workers, chance), math.ceil(part.iterations / part.every)
    last = part.iterations - (segments - 1) * part.every
    whole = part.every * one + part.checkpoint
    return (segments - 1) * segment_seconds(whole, workers, chance) + segment_seconds(last * one, workers, chance)


def segment_seconds(work: float, workers: int, chance: Chance) -> float:
    """Return the expected time of work that is repeated as a whole after the loss of a worker.

    E T = M exp(R / M) (exp(work / M) - 1), M = 1 / (losses W) seconds between losses, R seconds of the restart. Workers are
    also lost during the restart, which then begins again.
    """
    rate = chance.losses * workers
    return math.exp(chance.restart * rate) * math.expm1(work * rate) / rate if rate else work


def young_interval(checkpoint: float, between: float) -> float:
    """Return the best work between checkpoints to first order, sqrt(2 checkpoint between) (Young 1974)."""
    return math.sqrt(2 * checkpoint * between)


def daly_interval(checkpoint: float, between: float) -> float:
    """Return the best work between checkpoints to higher order (Daly 2006, equation 37).

    sqrt(2 d M) (1 + sqrt(d / (2 M)) / 3 + d / (18 M)) - d for d < 2 M, else M

    Args:
        checkpoint: seconds d of a checkpoint.
        between: mean seconds M between losses of a worker.
    """
    if checkpoint >= 2 * between:
        return between
    ratio = checkpoint / (2 * between)
    return young_interval(checkpoint, between) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - checkpoint


# -- runs ---------------------------------------------------------------------------------------------------------------


def seconds_of(part: Part, workers: int, chance: Chance = NONE) -> float:
    """Return the expected time of a part."""
    if isinstance(part, Map):
        return map_seconds(part, workers, chance)
    return training_seconds(part, workers, chance) if isinstance(part, Training) else part.seconds


def run_seconds(parts: tuple[Part, ...], workers: int, chance: Chance = NONE) -> float:
    """Return the expected time of a run."""
    return sum(seconds_of(part, workers, chance) for part in parts)


def amdahl(serial: float, workers: float) -> float:
    """Return the largest speed-up on W workers of work of which a share is serial: 1 / (s + (1 - s) / W) (Amdahl 1967)."""
    return 1 / (serial + (1 - serial) / workers)
