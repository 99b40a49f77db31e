"""The protocol of a policy learner: how it collects replies, computes advantages and updates its roles.

Scoring, KL control, watchdogs, checkpoints and metrics are common to all learners and are part of the loop in
`training/policy.py`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from selfeval.rollout.guide import Guide
from selfeval.training.context import Prompt, Samples
from selfeval.training.experience import Experience, RewardScale
from selfeval.training.policy_updates import Optimizers

__all__ = ["Learner"]


class Learner(Protocol):
    """An algorithm that learns from scored replies; the default methods suit learners that train the policy's weights.

    Attributes:
        roles: all roles whose weights change, which are checkpointed.
        optimizers: the optimizers of the roles that are trained by gradient.
        own_rows: rows of an iteration that the trained policy sampled; metrics and records exclude the others. Default: all.
    """

    roles: tuple[str, ...]
    optimizers: Optimizers
    own_rows: slice = slice(None)

    def guidance(self) -> Guide | None:
        """Return the value guidance to apply when sampling, or None if the learner updates the policy's weights."""
        return None

    @abstractmethod
    def collect(self, prompts: Sequence[Prompt], iteration: int) -> Samples:
        """Sample the replies of an iteration."""
        ...

    def advantages(self, samples: Samples, experience: Experience, scale: RewardScale) -> Experience:
        """Return the experience with advantages (and values and returns if there is a critic); unchanged by default."""
        return experience

    @abstractmethod
    def update(self, experience: Experience, scale: RewardScale, iteration: int) -> dict[str, float]:
        """Update the weights and return metrics, `entropy` among them.

        Raises:
            NotFiniteError: a number is NaN or infinite.
        """
        ...

    def state(self) -> dict[str, Any]:
        """Return the state to checkpoint besides weights and optimizers: JSON values and tensors; empty by default."""
        return {}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore the state from a checkpoint."""
        return
