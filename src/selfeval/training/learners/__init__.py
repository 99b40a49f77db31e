"""The learners by the name that `policy.learner` gives."""

from __future__ import annotations

from collections.abc import Callable

from selfeval.training.learners.learner import Learner
from selfeval.training.learners.ppo import PPO
from selfeval.training.setting import Setting

__all__ = ["LEARNERS", "make_learner"]

LEARNERS: dict[str, Callable[[Setting], Learner]] = {
    "ppo": PPO,
}


def make_learner(setting: Setting) -> Learner:
    """The learner that the configuration names, with the roles that it needs added to the backbone."""
    return LEARNERS[setting.config.learner](setting)
