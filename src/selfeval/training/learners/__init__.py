"""The learners by the name that `policy.learner` gives."""

from __future__ import annotations

from collections.abc import Callable

from selfeval.training.learners.dpo import DPO
from selfeval.training.learners.grpo import grpo
from selfeval.training.learners.ilql import ILQL
from selfeval.training.learners.learner import Learner
from selfeval.training.learners.ppo import PPO
from selfeval.training.learners.raft import RAFT
from selfeval.training.learners.reinforce_pp import reinforce_pp
from selfeval.training.learners.remax import ReMax
from selfeval.training.learners.rloo import rloo
from selfeval.training.learners.soft_q import SoftQ
from selfeval.training.learners.trpo import TRPO
from selfeval.training.setting import Setting

__all__ = ["LEARNERS", "make_learner"]

LEARNERS: dict[str, Callable[[Setting], Learner]] = {
    "ppo": PPO,
    "trpo": TRPO,
    "grpo": grpo,
    "rloo": rloo,
    "reinforce_pp": reinforce_pp,
    "remax": ReMax,
    "dpo": DPO,
    "raft": RAFT,
    "ilql": ILQL,
    "soft_q": SoftQ,
}


def make_learner(setting: Setting) -> Learner:
    """The learner that the configuration names, with the roles that it needs added to the backbone."""
    return LEARNERS[setting.config.learner](setting)
