"""Every learner, through the loop that trains language models, reaches the exact optimum of a token MDP.

The optimum is computed, not run (algorithms/mdp.py), and the policy is judged by all its replies, so that nothing here depends
on luck but the training itself, whose draws the seed decides.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import token_mdp
from policies import policy_config
from selfeval.config import LEARNERS, PolicyConfig
from selfeval.rollout.guide import Guide

BETAS, LAYERS = {"sparse": 0.1, "dense": 0.15}, {"sparse": 1, "dense": 2}
COMMON: dict[str, Any] = {
    # The optimum is exact for the reward as it is, at one weight of the KL penalty.
    "whiten_rewards": False, "reward_clip": None, "unfinished_penalty": 0.0, "kl_control": "fixed",
    # A discount per token or a lambda below 1 would be another objective, or a bias of the critic's.
    "gamma": 1.0, "gae_lambda": 1.0, "value_clip": None,
    # Questions are copies of two prompts, their best replies the same: what a watchdog takes for a collapse is right here.
    "watchdogs": "warn",
    "warmup_iterations": 0, "step_kl": None, "checkpoint_every": 1000,
    "questions_per_iteration": 64, "replies_per_question": 4, "epochs": 2, "minibatch": 256,
    "iterations": 60, "learning_rate": 4e-3, "critic_learning_rate": 1e-2,
}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "ppo": {},
    "trpo": {"trust_region": 0.05, "iterations": 120},
    "grpo": {"questions_per_iteration": 2, "replies_per_question": 256, "minibatch": 512},
    "rloo": {},
    "reinforce_pp": {"replies_per_question": 8, "epochs": 1, "iterations": 120},
    "remax": {"replies_per_question": 8, "epochs": 1, "iterations": 90},
    "dpo": {"questions_per_iteration": 128, "replies_per_question": 2, "iterations": 80},
    "raft": {"questions_per_iteration": 32, "replies_per_question": 16, "iterations": 40, "kl_coefficient": 1e-3},
    "ilql": {"expectile": 0.9},
    "soft_q": {},
}
"""What differs from the common settings, for every learner there is."""

UNREGULARISED = {"raft", "ilql"}
"""Those that go for the best reply, held by no KL penalty: by imitation, or by values that are decoded greedily."""

GREEDY = 1e4


def test_every_learner_is_held_to_the_optimum() -> None:
    assert set(SETTINGS) == set(LEARNERS)


@pytest.mark.parametrize("reward", BETAS)
@pytest.mark.parametrize("learner", SETTINGS)
def test_it_reaches_the_exact_optimum_within_one_per_cent(learner: str, reward: str, tmp_path: Path) -> None:
    beta = BETAS[reward]
    fields = {*PolicyConfig.model_fields, *LEARNERS[learner].config.model_fields}
    common = {name: value for name, value in COMMON.items() if name in fields}
    config = policy_config(**{"learner": learner, "kl_coefficient": beta, **common, **SETTINGS[learner]})
    mdps = token_mdp.sparse() if reward == "sparse" else token_mdp.dense()
    backbone = token_mdp.make_backbone(LAYERS[reward])
    start = token_mdp.judge(backbone, mdps, beta)
    guide, lines, alarms = token_mdp.train(backbone, config, mdps, tmp_path, steps=reward == "dense")
    if guide is not None and learner in UNREGULARISED:
        guide = Guide(guide.roles, GREEDY)
    end = token_mdp.judge(backbone, mdps, beta, guide)
    assert start.objective < 0.1 * start.best  # far from the optimum, or there would be nothing to learn
    if learner in UNREGULARISED:
        assert end.reward >= 0.99 * end.best_reward
    else:
        assert end.objective >= 0.99 * end.best
    assert not {a.name for a in alarms} & {"not_finite", "ratio_not_one", "negative_kl"}
    assert len(lines) == config.iterations
