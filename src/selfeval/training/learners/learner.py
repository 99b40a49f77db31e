"""The protocol of a policy learner: how it collects replies, computes advantages and updates its roles.

Scoring, KL control, watchdogs, checkpoints and metrics are common to all learners and are part of the loop in
`training/policy.py`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from selfeval.rollout.guide import Guide
from selfeval.training.context import QuestionPrompts, Samples
from selfeval.training.experience import Experience, RewardScale
from selfeval.training.policy_updates import Optimizers

__all__ = ["Learner", "Peak"]


@dataclass(frozen=True)
class Peak:
    """Work on a micro-batch that may hold the most memory of an iteration; the planner runs it on shapes.

    Attributes:
        role: acting role.
        work: takes a micro-batch. In an update it returns the loss whose gradient is accumulated, or None if it does not
            accumulate any.
        replies: number of replies that the micro-batches are taken from.
        in_pairs: whether a micro-batch has an even number of replies. Default: False.
        per_prompt: replies to the same prompt in a micro-batch. Default: all of a question, or 2 in pairs.
    """

    role: str
    work: Callable[[Experience], Tensor | None]
    replies: int
    in_pairs: bool = False
    per_prompt: int | None = None


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
            NotFiniteError: a number is NaN or infinite.
        """
        ...

    def scoring_peaks(self, replies: int) -> Sequence[Peak]:
        """Declare the learner's passes without gradient, in addition to those of reference and evaluator; none by default.

        Args:
            replies: replies of an iteration.
        """
        return ()

    @abstractmethod
    def update_peaks(self, replies: int) -> Sequence[Peak]:
        """Declare the passes of an update with the most memory: at least one for every role that is trained.

        Args:
            replies: replies of an iteration.
        """
        ...

    def state(self) -> dict[str, Any]:
        """Return the state to checkpoint besides weights and optimizers: JSON values and tensors; empty by default."""
        return {}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore the state from a checkpoint."""
        return
