from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny_models
from policies import CONFIG, LIKED, LIMIT, PROMPTS, CallingRecorder, changed, context_of, four_roles
from selfeval.backbone.roles import Backbone
from selfeval.config import PolicyConfig
from selfeval.rollout.engine import generate
from selfeval.rollout.guide import Guide
from selfeval.rollout.requests import Request, Rollout
from selfeval.training.context import CRITIC, POLICY, REFERENCE, LearnerContext, Samples, Scores
from selfeval.training.experience import Experience, RewardScale, build_experience
from selfeval.training.learners import make_learner
from selfeval.training.learners.action_values import Q_ROLES, TARGET_ROLES, UNIT, VALUE_ROLE, chosen_token_values, soft_values
from selfeval.training.learners.value_learner import ValueLearner
from selfeval.training.policy import train_policy
from selfeval.training.replay import Replayed

VALUES = changed(CONFIG, **{"learner": "soft_q", "iterations": 12, "epochs": 3, "replay": 200})
FEW = {"questions_per_iteration": 3, "replies_per_question": 5, "minibatch": 8}
"""Settings for tests that need no progress."""
BOTH = pytest.mark.parametrize("name", ["ilql", "soft_q"])


@dataclass(frozen=True)
class Likes:
    """Pays 1 for a reply with a certain token."""

    def __call__(self, samples: Samples) -> Scores:
        return Scores(torch.tensor([float(LIKED in r.ids) for r in samples.rollouts]))


def context_for(backbone: Backbone, config: PolicyConfig) -> LearnerContext:
    return replace(context_of(backbone, config), scorer=Likes())


def train(backbone: Backbone, folder: Path, config: PolicyConfig, **options: Any) -> tuple[Guide, list[dict[str, float]]]:
    recorder = CallingRecorder(folder, backbone, **options)
    guide = train_policy(context_for(backbone, config), PROMPTS, recorder)
    assert guide is not None
    return guide, recorder.lines


def share_liked(backbone: Backbone, guide: Guide | None) -> float:
    with backbone.acting_as(POLICY):
        rollouts = generate(backbone, [Request(p.reply) for p in PROMPTS] * 40, max_new_tokens=LIMIT, seed=77, guide=guide)
    return sum(LIKED in r.ids for r in rollouts) / len(rollouts)


def weights(backbone: Backbone, roles: Sequence[str]) -> dict[str, Tensor]:
    return {f"{role}/{n}": p.detach().clone() for role in roles for n, p in backbone.roles.parameters(role).items()}


# -- the whole loop -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@BOTH
def test_the_guide_raises_what_is_paid_for_and_leaves_every_weight_of_the_policy(name: str, tmp_path: Path) -> None:
    backbone = four_roles()
    untouched = weights(backbone, (POLICY, REFERENCE))
    base = {n: p.detach().clone() for n, p in backbone.model.named_parameters() if "lora_" not in n}
    start = share_liked(backbone, None)
    guide, lines = train(
        backbone, tmp_path, changed(VALUES, **{"learner": name, "iterations": 8, "epochs": 2, "learning_rate": 2e-2})
    )
    assert start < 0.35
    assert share_liked(backbone, guide) > start + 0.2  # 0.03 is the standard error of a share
    assert share_liked(backbone, None) == start
    assert all(torch.equal(p, untouched[n]) for n, p in weights(backbone, (POLICY, REFERENCE)).items())
    assert all(torch.equal(p, base[n]) for n, p in backbone.model.named_parameters() if "lora_" not in n)
    assert abs(lines[0]["kl"]) < 1e-4  # values are 0 still: the policy is its reference
    assert {"q_loss", "state_loss", "q", "entropy", "grad_norm", "kl_coefficient", "learning_rate"} <= lines[0].keys()


@BOTH
def test_a_killed_training_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    config = changed(VALUES, **{"learner": name, "iterations": 4, "replay": 40, "epochs": 1, **FEW})
    others = [CRITIC] if name == "ilql" else []
    roles = (*Q_ROLES, VALUE_ROLE, *TARGET_ROLES.values(), *others)
    through = four_roles()
    expected, lines = train(through, tmp_path / "a", config)

    def killed(iteration: int, *_: Any) -> None:
        if iteration == 4:  # after the checkpoint at 3, when the replay has forgotten some replies
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(four_roles(), tmp_path / "b", config, keep=killed)
    resumed = four_roles()
    began: list[int] = []
    guide, again = train(resumed, tmp_path / "b", config, resume=began.append)
    assert began == [3]
    assert again == lines[3:]
    assert guide == expected
    assert all(torch.equal(p, weights(through, roles)[n]) for n, p in weights(resumed, roles).items())


def test_a_fixed_temperature_stays(tmp_path: Path) -> None:
    fixed = changed(VALUES, **{"kl_control": "fixed", "kl_coefficient": 0.4, "iterations": 2})
    guide, lines = train(four_roles(), tmp_path / "a", fixed)
    assert [line["kl_coefficient"] for line in lines] == [0.4, 0.4]
    assert guide.strength == UNIT / 0.4


# -- its parts ----------------------------------------------------------------------------------------------------------


def learner_of(backbone: Backbone, **changes: Any) -> ValueLearner:
    learner = make_learner(context_for(backbone, changed(VALUES, **changes)))
    assert isinstance(learner, ValueLearner)
    return learner


def experienced(learner: ValueLearner) -> tuple[Samples, Experience, RewardScale]:
    context = learner.context
    samples = learner.collect(PROMPTS[:3], 1)
    scores = context.scorer(samples)
    scale = RewardScale.of(scores.whole_B, samples, whiten=True)
    return samples, build_experience(context, samples, scores, scale, 0.0), scale


def test_the_temperature_moves_the_kl_to_its_target() -> None:
    # Q functions that no longer change: only the temperature does.
    backbone = four_roles()
    learner = learner_of(backbone, kl_target=2.0)
    for number, role in enumerate(Q_ROLES):
        tiny_models.scramble(backbone, role, seed=number, size=0.08)
    found = []
    for iteration in range(1, 40):
        samples = learner.collect(PROMPTS, iteration)
        experience = build_experience(learner.context, samples, Scores(torch.zeros(48)), RewardScale(0.0, 1.0, 6.0), 0.0)
        found.append(learner._follow_kl(experience, iteration)["kl"])
    assert abs(found[0] - 2.0) > 0.7
    assert sum(found[-15:]) / 15 == pytest.approx(2.0, rel=0.15)


def test_the_reported_kl_and_entropy_are_those_of_the_guided_replies() -> None:
    for name in ("ilql", "soft_q"):
        backbone = four_roles()
        learner = learner_of(backbone, learner=name)
        for number, role in enumerate(Q_ROLES):
            tiny_models.scramble(backbone, role, seed=number, size=0.08)
        samples, experience, _ = experienced(learner)
        guided = [row for row in range(len(samples.asked)) if name == "soft_q" or row % 2]
        logprobs = [samples.rollouts[row].logprobs for row in guided]
        kls, tokens = [], [p for row in logprobs for p in row]
        for row, ours in zip(guided, logprobs, strict=True):
            prompt, ids = samples.asked[row].reply.ids, samples.rollouts[row].ids
            with backbone.acting_as(REFERENCE):
                full = tiny_models.full_logprobs(backbone.model, (*prompt, *ids))
            kls.append(sum(ours) - sum(full[len(prompt) - 1 + t, token].item() for t, token in enumerate(ids)))
        found = learner._follow_kl(experience.sliced(learner.own_rows), 1)
        assert found["kl"] == pytest.approx(sum(kls) / len(kls), abs=1e-3)
        assert found["entropy"] == pytest.approx(-sum(tokens) / len(tokens), abs=1e-4)


def test_ilql_explores_with_the_reference_in_every_second_reply() -> None:
    backbone = four_roles()
    learner = learner_of(backbone, learner="ilql")
    for role in Q_ROLES:
        tiny_models.scramble(backbone, role, size=0.1)
    samples, experience, _ = experienced(learner)
    assert [p.question_id for p in samples.asked] == [p.question_id for p in PROMPTS[:3] for _ in range(8)]
    apart_B = ((experience.logprobs - experience.ref_logprobs) * experience.mask).abs().sum(-1)
    assert apart_B[::2].max() < 1e-3
    assert apart_B[1::2].min() > 0.05
    pairs = zip(samples.rollouts[::2], samples.rollouts[1::2], strict=True)
    assert sum(a.ids == b.ids for a, b in pairs) < 4  # drawn independently


def test_what_soft_q_is_to_learn() -> None:
    backbone = four_roles()
    learner = learner_of(backbone, gamma=0.9, gae_lambda=0.7)
    for number, role in enumerate(TARGET_ROLES.values()):
        tiny_models.scramble(backbone, role, seed=number, size=0.1)
    _, experience, _ = experienced(learner)
    learner.replay.add(experience)
    pool = learner.with_targets(_drawn(learner))
    values, taken = soft_values(learner.context, pool, learner.beta)
    logprobs = pool.ref_logprobs + (taken - values) / learner.beta  # of the guided policy
    ratios = torch.minimum(torch.ones(()), (logprobs - pool.logprobs).exp())
    assert pool.weights[pool.mask].tolist() == pytest.approx(ratios[pool.mask].tolist(), abs=1e-5)
    assert ratios[pool.mask].min() < 0.9
    _check_targets(pool, values, taken, 0.7 * ratios)


def test_what_ilql_is_to_learn() -> None:
    backbone = four_roles()
    learner = learner_of(backbone, learner="ilql", gamma=0.9, gae_lambda=0.7)
    for number, role in enumerate((*TARGET_ROLES.values(), CRITIC)):
        tiny_models.scramble(backbone, role, seed=number, size=0.1)
    _, experience, _ = experienced(learner)
    learner.replay.add(experience)
    pool = learner.with_targets(_drawn(learner))
    assert pool.taken.abs().max() > 0.01
    both = [chosen_token_values(learner.context, TARGET_ROLES[role], pool) for role in Q_ROLES]
    taken = chosen_token_values(learner.context, TARGET_ROLES[VALUE_ROLE], pool) + torch.minimum(*both)
    values = chosen_token_values(learner.context, CRITIC, pool)
    assert torch.equal(pool.taken, taken)
    assert bool((pool.weights == 1).all())
    _check_targets(pool, values, pool.taken, torch.full_like(values, 0.7))


def _drawn(learner: ValueLearner) -> Replayed:
    return learner.replay.sample(learner.context.backbone, 10, random.Random(0))


def _check_targets(pool: Replayed, values: Tensor, taken: Tensor, traces: Tensor) -> None:
    for row, kept in enumerate(pool.mask):
        v, q, r, c = (x[row, kept].tolist() for x in (values, taken, pool.rewards, traces))
        y = 0.0
        expected: list[float] = []
        for t in reversed(range(len(r))):
            y = r[t] + (0.9 * (v[t + 1] + c[t + 1] * (y - q[t + 1])) if t + 1 < len(r) else 0.0)
            expected.insert(0, y)
        assert pool.targets[row, kept].tolist() == pytest.approx(expected, abs=2e-3)


def test_the_expectile_of_ilql_learns_the_upper_values() -> None:
    # One state, whose two tokens are worth -1 and +1 equally often: the 0.9 expectile solves 0.9 (1 - v) = 0.1 (1 + v).
    backbone = four_roles()
    learner = learner_of(backbone, learner="ilql", expectile=0.9, max_grad_norm=None)
    samples = Samples([PROMPTS[0]] * 2, [_one(5), _one(6)])
    experience = build_experience(learner.context, samples, Scores(torch.zeros(2)), RewardScale(0.0, 1.0, 1.0), 0.0)
    learner.replay.add(experience)
    pool = _drawn(learner)
    pool = replace(pool, taken=torch.where(pool.policy_batch.reply_BR == 5, 1.0, -1.0))
    for _ in range(150):
        learner.step_others(pool, 1)
    values = chosen_token_values(learner.context, CRITIC, pool)
    assert values[:, 0].tolist() == pytest.approx([0.8, 0.8], abs=0.03)


@BOTH
def test_what_is_kept_and_measured_is_what_the_policy_said(name: str, tmp_path: Path) -> None:
    """ilql also samples the reference's replies, which are nobody's news."""
    kept: list[tuple[Samples, Scores]] = []
    config = changed(VALUES, **{"learner": name, "iterations": 1})
    keep = {"keep": lambda iteration, samples, scores: kept.append((samples, scores))}
    _, lines = train(four_roles(), tmp_path, config, **keep)
    [(samples, scores)] = kept
    asked = config.questions_per_iteration * config.replies_per_question
    assert len(samples.asked) == len(samples.rollouts) == len(scores.whole_B) == (asked // 2 if name == "ilql" else asked)
    assert lines[0]["score"] == pytest.approx(float(scores.whole_B.mean()))


def _one(token: int) -> Rollout:
    return Rollout((token,), (0.0,), True)


def test_each_role_is_to_say_what_the_others_do_not() -> None:
    backbone = four_roles()
    learner = learner_of(backbone)
    for number, role in enumerate((*Q_ROLES, VALUE_ROLE)):
        tiny_models.scramble(backbone, role, seed=number, size=0.1)
    _, experience, _ = experienced(learner)
    learner.replay.add(experience)
    pool = learner.with_targets(_drawn(learner))
    said = {role: chosen_token_values(learner.context, role, pool)[pool.mask].tolist() for role in (*Q_ROLES, VALUE_ROLE)}
    targets, shares, weights = pool.targets[pool.mask].tolist(), learner._shares(pool), pool.weights[pool.mask].tolist()
    assert min(weights) < 0.9
    for role in Q_ROLES:
        rest = [y - b for y, b in zip(targets, said[VALUE_ROLE], strict=True)]
        errors = [r - own for r, own in zip(rest, said[role], strict=True)]
        behind = sum(w * e for w, e in zip(weights, errors, strict=True)) / sum(weights)
        assert abs(behind) > 1e-3
        assert shares[role][pool.mask].tolist() == pytest.approx([r - behind for r in rest], abs=1e-4)
    expected = [y - (one + other) / 2 for y, one, other in zip(targets, said["q-0"], said["q-1"], strict=True)]
    assert shares[VALUE_ROLE][pool.mask].tolist() == pytest.approx(expected, abs=1e-4)
