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
    """

    answers: int = 0
    read: int = 0
    written: int = 0

    def plus(self, answer: Answer) -> Spending:
        """Return the sum with one more answer."""
        return Spending(self.answers + 1, self.read + answer.read, self.written + answer.written)

    def cost(self, settings: EndpointConfig) -> float | None:
        """Return the price of the tokens, (read price_read + written price_written) / 10^6; None without both prices."""
        if settings.price_read is None or settings.price_written is None:
            return None
        return (self.read * settings.price_read + self.written * settings.price_written) / _MILLION


def spending_of(answers: AnswerCache) -> Spending:
    """Return the sum over all kept answers, those of earlier settings and of stages that were rerun included."""
    total = Spending()
    for answer in answers.all():
        total = total.plus(answer)
    return total
