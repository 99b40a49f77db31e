"""The cost of the answers of a server."""

from __future__ import annotations

from dataclasses import dataclass

from selfeval.config import EndpointConfig
from selfeval.judging.server.cache import AnswerCache
from selfeval.judging.server.chat import Answer

__all__ = ["Spending", "spending_of"]

_MILLION = 1_000_000


@dataclass(frozen=True)
class Spending:
    """Numbers of answers and of their tokens.

    Attributes:
        answers: number of answers.
        read: prompt tokens.
        written: completion tokens.
        uncounted: number of answers whose tokens the server did not count.
    """

    answers: int = 0
    read: int = 0
    written: int = 0
    uncounted: int = 0

    def plus(self, answer: Answer) -> Spending:
        """Return the sum with one more answer."""
        read, written = answer.read or 0, answer.written or 0
        uncounted = self.uncounted + (answer.read is None or answer.written is None)
        return Spending(self.answers + 1, self.read + read, self.written + written, uncounted)

    def cost(self, settings: EndpointConfig) -> float | None:
        """Return the price of the tokens, (read price_read + written price_written) / 10^6; None if it is unknown."""
        if settings.price_read is None or settings.price_written is None or self.uncounted:
            return None
        return (self.read * settings.price_read + self.written * settings.price_written) / _MILLION


def spending_of(answers: AnswerCache) -> Spending:
    """Return the sum over all kept answers, those of earlier settings and of stages that were rerun included."""
    total = Spending()
    for answer in answers.all():
        total = total.plus(answer)
    return total
