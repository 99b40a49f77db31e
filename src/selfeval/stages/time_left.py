"""Estimate how long the rest of a stage takes, from the units that were finished recently."""

from __future__ import annotations

import math

__all__ = ["TimeLeft", "in_words"]

_MEMORY = 60.0
"""Seconds after which the weight of a finished unit has fallen to 1/e."""
_MEMORY_UNITS = 5.0
"""The same in units, for those that take so long that few of them would be remembered."""
_FIRST = 3.0
"""Seconds before the first estimate: the first units are rarely typical."""
_STEPS = ((60.0, 10.0), (600.0, 60.0), (3600.0, 300.0), (36_000.0, 600.0), (math.inf, 3600.0))
"""Below so many seconds, a time is rounded to so many."""
_CHANGE = 0.75
"""Steps by which an estimate has to differ from the one that is shown before it replaces it."""


class TimeLeft:
    """Estimates the time left of `total` units. Times are in seconds, on any clock that does not go backwards.

    seconds left = units left · Σᵢ wᵢ secondsᵢ / Σᵢ wᵢ unitsᵢ, where wᵢ = exp(−age of i / memory)

    So a burst of other work on the machine moves the estimate gradually, and is forgotten a few minutes later. Between two
    units the estimate counts down, and it grows if the next one is late.

    Args:
        total: number of units.
        done: those that are already finished, which say nothing about the speed.
        now: current time.
    """

    def __init__(self, total: float, done: float, now: float) -> None:
        self._total, self._done, self._started, self._last = total, done, now, now
        self._units = self._seconds = self._events = 0.0
        self._shown: float | None = None

    @property
    def rate(self) -> float:
        """Units per second, lately; 0 before the first unit."""
        return self._units / self._seconds if self._seconds else 0.0

    def update(self, done: float, now: float) -> None:
        """Take note of the number of units that are finished now."""
        units, seconds = done - self._done, now - self._last
        self._done = done
        if units < 0:  # rolled back: the time since the last unit belongs to none
            self._last = now
        if units <= 0:
            return
        kept = math.exp(-seconds / max(_MEMORY, _MEMORY_UNITS * self._interval))
        self._units, self._seconds = self._units * kept + units, self._seconds * kept + seconds
        self._events, self._last = self._events * kept + 1, now

    @property
    def _interval(self) -> float:
        """Seconds between two updates, lately."""
        return self._seconds / self._events if self._events else 0.0

    def seconds(self, now: float) -> float | None:
        """Return the estimate; None if it is too early for one."""
        if not self.rate or now - self._started < _FIRST:
            return None
        waited = now - self._last
        # A unit that is late counts as slower ones; until then the clock just runs down.
        late = max(0.0, waited - self._interval)
        left = max(0.0, self._total - self._done) * (self._seconds + late) / self._units
        return max(0.0, left - min(waited, self._interval))

    def words(self, now: float) -> str:
        """Return the estimate in words, such as `about 3 min`, or nothing. They change only if the estimate differs clearly."""
        found = self.seconds(now)
        if found is None:
            return ""
        if self._shown is None or abs(found - self._shown) > _CHANGE * _step(self._shown):
            self._shown = _rounded(found)
        return in_words(self._shown)


def _step(seconds: float) -> float:
    return next(step for below, step in _STEPS if seconds < below)


def _rounded(seconds: float) -> float:
    step = _step(seconds)
    return max(step, round(seconds / step) * step)


def in_words(seconds: float) -> str:
    """Return a time in words, rounded: to 10 seconds, from 1 minute on to minutes, and later to 5, 10 and 60 minutes.

    Example:
        >>> in_words(4), in_words(170), in_words(5000), in_words(200_000)
        ('about 10 s', 'about 3 min', 'about 1 h 20 min', 'about 56 h')
    """
    rounded = _rounded(seconds)
    if rounded < 60:
        return f"about {rounded:.0f} s"
    hours, minutes = divmod(round(rounded / 60), 60)
    parts = [f"{hours} h"] * bool(hours) + [f"{minutes} min"] * bool(minutes)
    return f"about {' '.join(parts)}"
