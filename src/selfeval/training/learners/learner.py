"""What a learner is: how replies are collected, what they are worth, and how the roles that it trains follow.

Everything else of policy learning (scoring, KL control, watchdogs, checkpoints, metrics) is the loop's, the same for all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from selfeval.training.experience import Experience, RewardScale
from selfeval.training.setting import Prompt, Samples
from selfeval.training.steps import Optimizers

__all__ = ["Learner"]


class Learner(Protocol):
    """One way to learn from scored replies.

    Attributes:
        roles: all roles whose weights it changes; a checkpoint holds them.
        optimizers: of those that follow a gradient.
    """

    roles: tuple[str, ...]
    optimizers: Optimizers

    def collect(self, prompts: Sequence[Prompt], iteration: int) -> Samples:
        """Samples the replies of an iteration."""
        ...

    def advantages(self, experience: Experience, scale: RewardScale) -> Experience:
        """The experience with what each token was worth (and what the critic is to learn)."""
        ...

    def update(self, experience: Experience, scale: RewardScale, iteration: int) -> dict[str, float]:
        """Changes the weights; returns metrics, `first_ratio` and `entropy` among them.

        Raises:
            NotFiniteError: a number on the way is NaN or infinite.
        """
        ...

    def state(self) -> dict[str, Any]:
        """What it carries from iteration to iteration: JSON values, and tensors anywhere among them."""
        ...

    def load(self, state: Mapping[str, Any]) -> None:
        """Takes them back from a checkpoint."""
        ...
