"""Random numbers that depend only on a seed and on names, so that they are the same in any process and after a resume."""

from __future__ import annotations

import random
from dataclasses import dataclass

__all__ = ["Draws"]


@dataclass(frozen=True)
class Draws:
    """The random numbers of one round.

    Attributes:
        root: seed of the round.

    Example:
        >>> Draws(0).seed("replies", 3) == Draws(0).seed("replies", 3)
        True
    """

    root: int

    def random(self, *names: object) -> random.Random:
        """Return a generator seeded only by the round's seed and these names."""
        return random.Random("/".join(str(part) for part in (self.root, *names)))

    def seed(self, *names: object) -> int:
        """Return a seed derived only from the round's seed and these names."""
        return self.random(*names).getrandbits(48)
