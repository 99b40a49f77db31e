"""Value guidance: value functions in separate roles that modify the sampling distribution of an unchanged role.

Shapes: B rows, V vocabulary, K guiding roles.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from selfeval.algorithms.q_learning import guided_logprobs

__all__ = ["Guide"]


@dataclass(frozen=True)
class Guide:
    """Value functions over the next token, and how far they may lead away from the role that acts.

    Role k says log pi_k of the next token, and its log-ratio to the acting role is the value of that token up to a number
    that is the same for all tokens. The sampling distribution is

        log pi = log pi_acting + strength * mean_k (log pi_k - log pi_acting),  normalised

    so that roles that say what the acting role says change nothing, and at strength 1 it is their geometric mean.

    Attributes:
        roles: the guiding roles, one or more.
        strength: an inverse temperature, > 0; large is greedy for the values.
    """

    roles: tuple[str, ...]
    strength: float

    def logprobs(self, acting_BV: Tensor, roles_KBV: Tensor) -> Tensor:
        """The distribution that is sampled from, `[B, V]`, from those of the acting and of the guiding roles."""
        return guided_logprobs(acting_BV, (roles_KBV - acting_BV).mean(0), beta=1 / self.strength)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)
