"""The protocol of a policy learner: how it collects replies, values them and updates its roles.

The loop in `training/policy.py` does everything else, in the same way for all learners: scoring, KL control, watchdogs,
checkpoints and metrics.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from selfeval.rollout.guide import Guide
from selfeval.training.context import QuestionPrompts, Samples
from selfeval.training.experience import Experience, RewardScale
from selfeval.training.policy_updates import Optimizers

__all__ = ["Learner"]


class Learner(Protocol):
    """A way to learn from scored replies; subclasses inherit the defaults of a learner that trains the policy's weights.

    Attributes:
        roles: all roles whose weights it changes, for the checkpoints.
        optimizers: the optimizers of the roles that it trains by gradient.
        own_rows: the rows of an iteration that the trained policy sampled; the others are left out of metrics and records.
    """

    roles: tuple[str, ...]
    optimizers: Optimizers
    own_rows: slice = slice(None)

    def guidance(self) -> Guide | None:
        """Return the value guidance to apply when sampling, or None if the learner updates the policy's weights."""
        return None

    @abstractmethod
    def collect(self, prompts: Sequence[QuestionPrompts], iteration: int) -> Samples:
        """Sample the replies of an iteration."""
        ...

    def advantages(self, samples: Samples, experience: Experience, scale: RewardScale) -> Experience:
        """Return the experience with advantages (and values and returns if there is a critic); unchanged by default."""
        return experience

    @abstractmethod
    def update(self, experience: Experience, scale: RewardScale, iteration: int) -> dict[str, float]:
        """Update the weights and return metrics, `entropy` among them.

        Raises:
            NotFiniteError: a number of the computation is NaN or infinite.
        """
        ...

    def state(self) -> dict[str, Any]:
        """Return the state to checkpoint besides weights and optimizers: JSON values and tensors; empty by default."""
        return {}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore the state from a checkpoint."""
        return
