"""Every learner, through the loop that trains language models, reaches the exact optimum of a token MDP.

The optimum is computed, not run (algorithms/mdp.py), and the policy is judged by all its replies, so that nothing here depends
on luck but the training itself, whose draws the seed decides.
"""

from __future__ import annotations

from math import log
from pathlib import Path
from typing import Any

import pytest

import token_mdp
from policies import policy_config
from selfeval.backbone.sequences import reply_logprobs
from selfeval.config import LEARNERS, PolicyConfig
from selfeval.prompt import Prompt
from selfeval.report.metrics import METRICS
from selfeval.rollout.guide import Guide
from selfeval.training.context import POLICY, REFERENCE
from selfeval.training.evaluator import Preference
from slow import slow
from token_prompts import as_prompts

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
GRPO_LOSSES: dict[str, dict[str, Any]] = {
    "dr_grpo": {"iterations": 35, "learning_rate": 1e-2},
    "gspo": {"iterations": 25, "learning_rate": 1e-2, "clip": 0.05, "clip_high": 0.05},
    "dapo": {},
}
"""GSPO's own range of 0.0003 is for replies of thousands of tokens; a reply has four here."""
SETTINGS: dict[str, dict[str, Any]] = {
    "ppo": {"iterations": 35},
    "trpo": {"trust_region": 0.05, "iterations": 100},
    "grpo": {"questions_per_iteration": 2, "replies_per_question": 256, "minibatch": 512, "iterations": 40},
    "rloo": {},
    "reinforce_pp": {"replies_per_question": 8, "epochs": 1, "iterations": 45, "learning_rate": 8e-3},
    "remax": {"replies_per_question": 8, "epochs": 1, "iterations": 45},
    "dpo": {"questions_per_iteration": 128, "replies_per_question": 2, "iterations": 80},
    "raft": {"questions_per_iteration": 32, "replies_per_question": 16, "iterations": 56, "kl_coefficient": 1e-3},
    "ilql": {"expectile": 0.9, "questions_per_iteration": 32, "minibatch": 128, "iterations": 45},
    "soft_q": {"questions_per_iteration": 32, "minibatch": 128},
}
"""Differences from the common settings, for every learner there is."""

UNREGULARISED = {"raft", "ilql"}
"""Those that go for the best reply, held by no KL penalty: by imitation, or by values that are decoded greedily."""

DENSE = {"trpo", "soft_q", "ilql"}
"""Those that learn values of tokens and train for 15 CPU seconds or more: they have to reach only the optimum of the dense
reward. The others are held to that of whole replies. TRPO's advantages of tokens are computed by PPO's code, and
learners/test_learners.py checks what each learner makes of rewards of tokens."""

FAST = {"ppo", "dpo"}
"""One learner that learns from scores with a critic, and one that learns from pairs; `make test-slow` trains the others too."""

GREEDY = 1e4


def test_every_learner_is_held_to_the_optimum() -> None:
    assert set(SETTINGS) == set(LEARNERS)


OPTIMA_TO_REACH = [
    *((learner, "sparse") if learner in FAST else slow(learner, "sparse") for learner in SETTINGS if learner not in DENSE),
    *(slow(learner, "dense") for learner in sorted(DENSE)),
]


@pytest.mark.parametrize(("learner", "reward"), OPTIMA_TO_REACH)
def test_it_reaches_the_exact_optimum_within_one_per_cent(learner: str, reward: str, tmp_path: Path) -> None:
    _check_optimum(learner, SETTINGS[learner], reward, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["dr_grpo", "gspo", "dapo"])
def test_every_loss_of_grpo_reaches_the_same_optimum(loss: str, tmp_path: Path) -> None:
    _check_optimum("grpo", {**SETTINGS["grpo"], **GRPO_LOSSES[loss], "loss": loss}, "sparse", tmp_path)


def _check_optimum(learner: str, settings: dict[str, Any], reward: str, folder: Path) -> None:
    beta = BETAS[reward]
    fields = {*PolicyConfig.model_fields, *LEARNERS[learner].config.model_fields}
    common = {name: value for name, value in COMMON.items() if name in fields}
    config = policy_config(**{"learner": learner, "kl_coefficient": beta, **common, **settings})
    mdps = token_mdp.sparse() if reward == "sparse" else token_mdp.dense()
    backbone = token_mdp.make_backbone(LAYERS[reward])
    start = token_mdp.judge(backbone, mdps, beta)
    guide, lines, alarms = token_mdp.train(backbone, config, mdps, folder, steps=reward == "dense")
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
    _check_documented(lines)


def _check_documented(lines: list[dict[str, float]]) -> None:
    """Check that docs/metrics.md, which is generated from METRICS, explains everything that was logged."""
    assert {name for line in lines for name in line} - {metric.name for metric in METRICS["policy"]} == set()


# -- losses of pairs, whose optimum is known for the log-probs of the two replies ---------------------------------------


def logit(share: float) -> float:
    return log(share / (1 - share))


CHOSEN, REJECTED = (0, 3, 1, 2), (2, 2, 0)
"""Of different lengths, so that a mean over tokens is no sum. Chosen does not begin with the token of the first prompt: with no
first token of another kind, one layer of attention cannot tell (1,) from (1, 1), and could not make the reply certain."""
OPTIMA: dict[str, tuple[dict[str, Any], float, float]] = {
    # Settings; confidence of the labels; h, the lead of chosen over rejected, that of the reference subtracted.
    "sigmoid": ({"beta": 0.5, "label_smoothing": 0.1}, 0.9, logit(0.1 + 0.8 * 0.9) / 0.5),
    "ipo": ({"beta": 0.5}, 1.0, 1 / (2 * 0.5)),
    # Seven of ten labels are right; with one in ten flipped that is 0.75 of clean ones.
    "robust": ({"beta": 0.5, "flip_rate": 0.1}, 0.7, logit((0.7 - 0.1) / 0.8) / 0.5),
    # No reference, and means over tokens: beta (c - r) - gamma = logit.
    "simpo": ({"beta": 2.0, "simpo_gamma": 0.5}, 0.8, (logit(0.8) + 0.5) / 2.0),
}


def _train_on_pairs(
    loss: str, settings: dict[str, Any], confidence: float, folder: Path
) -> tuple[float, list[dict[str, float]]]:
    """The lead of chosen over rejected after the training (mean over the prompts), in the units of the loss, and metrics."""
    config = policy_config(
        learner="dpo", loss=loss, pairs="kept", iterations=110, questions_per_iteration=20, replies_per_question=2,
        minibatch=40, epochs=2, learning_rate=4e-3, warmup_iterations=0, whiten_rewards=False, kl_control="fixed",
        watchdogs="warn", checkpoint_every=1000, **settings,
    )  # fmt: skip
    label, right = (1.0, round(10 * confidence)) if loss == "robust" else (confidence, 10)
    ordered = [(CHOSEN, REJECTED)] * right + [(REJECTED, CHOSEN)] * (10 - right)
    pairs = [Preference(Prompt(prompt), *replies, label) for prompt in token_mdp.TASKS.values() for replies in ordered]
    backbone = token_mdp.make_backbone(1)
    _, lines, _ = token_mdp.train(backbone, config, token_mdp.sparse(), folder, steps=False, pairs=pairs)
    leads = []
    for prompt in token_mdp.TASKS.values():
        found = {}
        for role in (POLICY, REFERENCE):
            with backbone.acting_as(role):
                rows = reply_logprobs(backbone, as_prompts([prompt, prompt]), [CHOSEN, REJECTED], batch_tokens=100)
            found[role] = [sum(row) / (len(row) if loss in ("simpo", "orpo") else 1) for row in rows]
        (chosen, rejected), (ref_chosen, ref_rejected) = found[POLICY], found[REFERENCE]
        leads.append(chosen - rejected - (0.0 if loss in ("simpo", "orpo") else ref_chosen - ref_rejected))
    _check_documented(lines)
    return sum(leads) / len(leads), lines


@pytest.mark.slow
@pytest.mark.parametrize("loss", OPTIMA)
def test_a_loss_of_pairs_reaches_its_exact_optimum(loss: str, tmp_path: Path) -> None:
    settings, confidence, optimum = OPTIMA[loss]
    lead, lines = _train_on_pairs(loss, settings, confidence, tmp_path)
    assert lead == pytest.approx(optimum, rel=0.01)
    assert lines[-1]["policy_loss"] < lines[0]["policy_loss"]


@pytest.mark.slow
@pytest.mark.parametrize(("loss", "settings"), [("kto", {"beta": 0.5}), ("orpo", {})])
def test_a_loss_of_pairs_without_a_finite_optimum_goes_to_its_infimum(
    loss: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    """Both fall to 0 as chosen replies become certain (ORPO) or ever likelier than under the reference (KTO)."""
    lead, lines = _train_on_pairs(loss, settings, 1.0, tmp_path)
    assert lines[-1]["policy_loss"] < 0.1 * lines[0]["policy_loss"]
    assert lines[-1]["pair_accuracy"] == 1.0
    assert lead > 3.0
