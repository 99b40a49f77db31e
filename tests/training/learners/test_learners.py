from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import tiny_models
from policies import CONFIG, LIMIT, PROMPTS, changed, context_of, four_roles, train
from selfeval.backbone.roles import Backbone
from selfeval.config import LEARNERS
from selfeval.rollout.engine import generate
from selfeval.rollout.requests import Request
from selfeval.training.context import CRITIC, POLICY, REFERENCE, LearnerContext, Samples, Scores
from selfeval.training.evaluator import EVALUATOR, Preference, score_replies
from selfeval.training.experience import Experience, RewardScale, build_experience, collect, present
from selfeval.training.learners import make_learner
from selfeval.training.learners.learner import Learner
from selfeval.training.learners.policy_gradient import KLAdaptiveStepSize
from slow import slow

BETA = 0.3


def token_rewards(ids: Sequence[int]) -> list[float]:
    """Rewards of the tokens of a reply, in addition to the evaluator's score of the whole."""
    return [0.1 * (i % 3) for i in ids]


def with_token_rewards(scorer: Callable[[Samples], Scores]) -> Callable[[Samples], Scores]:
    def scored(samples: Samples) -> Scores:
        steps = [torch.tensor(token_rewards(r.ids)) for r in samples.rollouts]
        return Scores(scorer(samples).whole_B, pad_sequence(steps, batch_first=True))

    return scored


def collected(name: str, **changes: Any) -> tuple[Learner, LearnerContext, Samples, Experience, RewardScale]:
    """A learner, and what it made of replies of a policy that has left its reference; their tokens have rewards, too."""
    backbone = four_roles()
    tiny_models.scramble(backbone, POLICY, seed=9, size=0.06)
    plain = context_of(backbone, changed(CONFIG, **{"learner": name, **changes}))
    context = replace(plain, scorer=with_token_rewards(plain.scorer))
    learner = make_learner(context)
    samples = learner.collect(PROMPTS[:3], 1)
    scores = context.scorer(samples)
    scale = RewardScale.of(scores.whole_B, samples, whiten=True)
    return (
        learner,
        context,
        samples,
        learner.advantages(samples, build_experience(context, samples, scores, scale, BETA), scale),
        scale,
    )


def totals(experience: Experience) -> list[float]:
    """Reward of each whole reply, KL penalty included, summed token by token."""
    rows = zip(experience.rewards.tolist(), experience.mask.tolist(), strict=True)
    return [sum(r for r, kept in zip(reward, mask, strict=True) if kept) for reward, mask in rows]


def by_question(samples: Samples) -> dict[str, list[int]]:
    rows = defaultdict(list)
    for row, prompt in enumerate(samples.asked):
        rows[prompt.question_id].append(row)
    return rows


def of_tokens(experience: Experience, row: int) -> list[float]:
    return [float(a) for a in present(experience.advantages)[row][experience.mask[row]]]


def length(experience: Experience, row: int) -> int:
    return int(experience.mask[row].sum())


@pytest.mark.parametrize("name", LEARNERS)
def test_the_registry_tells_the_truth_about_a_learner(name: str) -> None:
    backbone = tiny_models.backbone("llama", eos=(1, 33, 34))
    backbone.roles.add(POLICY)
    backbone.roles.add_snapshot(REFERENCE, of=POLICY)
    before = set(backbone.roles.names)
    learner, spec = make_learner(context_of(backbone, changed(CONFIG, learner=name))), LEARNERS[name]
    assert set(backbone.roles.names) - before == set(spec.extra_roles)
    assert set(learner.roles) == {*spec.extra_roles, *([POLICY] if spec.changes_policy else [])}
    guide = learner.guidance()
    assert (guide is None) == spec.changes_policy
    assert spec.outputs == (guide.roles if guide else ())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grpo_makes_no_advantage_of_rounding(dtype: torch.dtype) -> None:
    backbone = four_roles(dtype)  # the policy is its reference
    with torch.no_grad():
        for parameter in backbone.roles.heads[EVALUATOR].parameters():
            parameter.zero_()  # all scores are equal
    context = context_of(backbone, changed(CONFIG, **{"learner": "grpo"}))
    learner = make_learner(context)
    samples = learner.collect(PROMPTS, 1)
    scores = context.scorer(samples)
    scale = RewardScale.of(scores.whole_B, samples, whiten=True)
    experience = learner.advantages(samples, build_experience(context, samples, scores, scale, BETA), scale)
    assert experience.advantages is not None
    assert experience.rewards.abs().max() > 0  # sampled and scored in passes of different shapes
    assert experience.advantages.abs().max() == 0


def test_grpo_compares_the_replies_to_one_question_in_units_of_their_deviation() -> None:
    _, _, samples, experience, _ = collected("grpo")
    rewards = totals(experience)
    for rows in by_question(samples).values():
        assert len(rows) == CONFIG.replies_per_question
        centre, spread = mean(rewards[r] for r in rows), stdev(rewards[r] for r in rows)
        for row in rows:
            assert of_tokens(experience, row) == pytest.approx(
                [(rewards[row] - centre) / spread] * length(experience, row), abs=1e-4
            )


def test_rloo_compares_each_reply_with_the_others() -> None:
    _, _, samples, experience, _ = collected("rloo")
    rewards = totals(experience)
    for rows in by_question(samples).values():
        for row in rows:
            others = mean(rewards[r] for r in rows if r != row)
            assert of_tokens(experience, row) == pytest.approx([rewards[row] - others] * length(experience, row), abs=1e-4)


def test_reinforce_pp_whitens_the_rewards_to_come_over_all_tokens() -> None:
    _, _, _, experience, _ = collected("reinforce_pp", gamma=0.9)
    to_come: list[list[float]] = []
    for reward, mask in zip(experience.rewards.tolist(), experience.mask.tolist(), strict=True):
        following, row = 0.0, []
        for r in [r for r, kept in zip(reward, mask, strict=True) if kept][::-1]:
            following = r + 0.9 * following
            row.append(following)
        to_come.append(row[::-1])
    flat = [g for row in to_come for g in row]
    for index, row in enumerate(to_come):
        assert of_tokens(experience, index) == pytest.approx([(g - mean(flat)) / stdev(flat) for g in row], abs=1e-4)


def test_remax_subtracts_what_the_greedy_reply_gets() -> None:
    _, context, samples, experience, scale = collected("remax", reward_clip=None)
    backbone = context.backbone
    for row, prompt in enumerate(samples.asked):
        with backbone.acting_as(POLICY):
            (greedy,) = generate(backbone, [Request(prompt.reply, temperature=0.0)], max_new_tokens=LIMIT, seed=1)
        with backbone.acting_as(REFERENCE):
            full = tiny_models.full_logprobs(backbone.model, (*prompt.reply.ids, *greedy.ids))
        reference = [full[len(prompt.reply.ids) - 1 + t, token].item() for t, token in enumerate(greedy.ids)]
        (score,) = score_replies(backbone, EVALUATOR, [prompt.grade], [greedy.ids], 300)
        reward = (score - scale.mean + sum(token_rewards(greedy.ids))) / scale.deviation
        baseline = reward - BETA * (sum(greedy.logprobs) - sum(reference))
        tokens = [float(r) for r in experience.rewards[row][experience.mask[row]]]
        expected = [sum(tokens[t:]) - baseline for t in range(len(tokens))]
        assert of_tokens(experience, row) == pytest.approx(expected, abs=1e-3)


def test_remax_keeps_to_the_question_where_one_is_asked_twice_and_to_the_temperature() -> None:
    """A window of questions that spans two passes over them asks some of them twice."""
    backbone = four_roles()
    tiny_models.scramble(backbone, POLICY, seed=9, size=0.06)
    context = context_of(backbone, changed(CONFIG, **{"learner": "remax", "reward_clip": None, "temperature": 1.5}))
    learner = make_learner(context)
    samples = learner.collect([PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[2]], 1)
    scale = RewardScale(0.0, 1.0, 1.0)
    observed = build_experience(context, samples, context.scorer(samples), scale, BETA)
    experience = learner.advantages(samples, observed, scale)
    for row, prompt in enumerate(samples.asked):
        with backbone.acting_as(POLICY):
            (greedy,) = generate(backbone, [Request(prompt.reply, temperature=0.0)], max_new_tokens=LIMIT, seed=1)
        kl = 0.0
        for role, sign in ((POLICY, 1), (REFERENCE, -1)):
            with backbone.acting_as(role), torch.no_grad():
                ids = torch.tensor([[*prompt.reply.ids, *greedy.ids]])
                logits = backbone.logits(backbone.hidden(ids, torch.ones_like(ids)))[0] / 1.5
            said = logits.log_softmax(-1)[len(prompt.reply.ids) - 1 : -1]
            kl += sign * float(said.gather(-1, torch.tensor(greedy.ids)[:, None]).sum())
        (score,) = score_replies(backbone, EVALUATOR, [prompt.grade], [greedy.ids], 300)
        tokens = [float(r) for r in experience.rewards[row][experience.mask[row]]]
        assert of_tokens(experience, row)[0] == pytest.approx(sum(tokens) - (score - BETA * kl), abs=1e-3)


def test_raft_imitates_the_best_reply_to_each_question_alone() -> None:
    learner, context, samples, experience, scale = collected("raft", epochs=1, minibatch=100)
    rewards = totals(experience)
    best = [max(rows, key=lambda row: rewards[row]) for rows in by_question(samples).values()]
    assert [row for row in range(len(rewards)) if any(of_tokens(experience, row))] == sorted(best)
    backbone = context.backbone
    start = {n: p.detach().clone() for n, p in backbone.roles.parameters(POLICY).items()}
    expected = plain_gradients(backbone, lambda: -sum(sequence_logprob(context, samples, r) for r in best))  # type: ignore[arg-type, return-value]
    learner.update(experience, scale, 1)
    assert moved_along(backbone, start, expected)


def sequence_logprob(context: LearnerContext, samples: Samples, row: int) -> Tensor:
    """Log-prob of one reply under the acting role: one sequence, one plain pass."""
    prompt, reply = samples.asked[row].reply, samples.rollouts[row].ids
    logits = context.backbone.model(input_ids=torch.tensor([[*prompt.ids, *reply]])).logits[0, len(prompt.ids) - 1 : -1]
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(reply)[:, None]).sum()


def plain_gradients(backbone: Backbone, loss: Any) -> dict[str, Tensor]:
    parameters = backbone.roles.parameters(POLICY)
    with backbone.acting_as(POLICY):
        found = torch.autograd.grad(loss(), list(parameters.values()))
    return dict(zip(parameters, found, strict=True))


def moved_along(backbone: Backbone, start: dict[str, Tensor], gradients: dict[str, Tensor]) -> bool:
    """Whether the first step of Adam went against the sign of each gradient that is not tiny."""
    agree = total = 0
    for name, parameter in backbone.roles.parameters(POLICY).items():
        clear = gradients[name].abs() > 1e-3 * gradients[name].abs().max()
        agree += int(((parameter.detach() - start[name]).sign() == -gradients[name].sign())[clear].sum())
        total += int(clear.sum())
    return total > 100 and agree == total


@pytest.mark.parametrize("pairs", ["sampled", "kept"])
def test_the_gradient_of_dpo_is_that_of_the_plain_loss(pairs: str) -> None:
    learner, context, samples, experience, scale = collected("dpo", epochs=1, minibatch=100, pairs=pairs)
    backbone = context.backbone
    rewards = context.scorer(samples).whole_B
    finished = torch.tensor([r.finished for r in samples.rollouts])
    scored = scale.reward(rewards, finished, experience.mask.sum(-1), context.config).tolist()
    steps = [sum(token_rewards(r.ids)) / scale.deviation for r in samples.rollouts]
    whole = [one + other for one, other in zip(scored, steps, strict=True)]
    chosen, rejected, labels = [], [], []
    for rows in by_question(samples).values():
        best, worst = max(rows, key=lambda r: whole[r]), min(rows, key=lambda r: whole[r])
        chosen.append(best)
        rejected.append(worst)
        labels.append(1 / (1 + 2.718281828459045 ** (whole[worst] - whole[best])))
    if pairs == "kept":
        labels = [0.9, 0.7, 0.55]
        kept = kept_pairs(samples, chosen, rejected, labels)
        learner.context = LearnerContext(**{**vars(context), "pairs": kept})  # type: ignore[attr-defined]
        experience = experience.rows(torch.arange(2 * len(kept)))  # as many replies as there are rows in the pairs
    with torch.no_grad(), backbone.acting_as(REFERENCE):
        ref = [sequence_logprob(context, samples, r).item() for r in range(len(samples.asked))]

    def loss() -> Tensor:
        total = torch.zeros(())
        for c, r, y in zip(chosen, rejected, labels, strict=True):
            h = sequence_logprob(context, samples, c) - ref[c] - sequence_logprob(context, samples, r) + ref[r]
            total = total - y * torch.nn.functional.logsigmoid(BETA * h) - (1 - y) * torch.nn.functional.logsigmoid(-BETA * h)
        return total / len(chosen)

    expected = plain_gradients(backbone, loss)
    start = {n: p.detach().clone() for n, p in backbone.roles.parameters(POLICY).items()}
    values = learner.update(experience, scale, 1)
    assert moved_along(backbone, start, expected)
    norm = sum(float(g.square().sum()) for g in expected.values()) ** 0.5
    assert values["grad_norm"] == pytest.approx(norm, rel=1e-3)


def kept_pairs(samples: Samples, chosen: list[int], rejected: list[int], labels: list[float]) -> list[Any]:
    rows = zip(chosen, rejected, labels, strict=True)
    return [Preference(samples.asked[c].reply, samples.rollouts[c].ids, samples.rollouts[r].ids, y) for c, r, y in rows]


FAST = {"dpo", "soft_q"}
"""One learner that learns from pairs, and one that learns values of tokens; test_policy.py kills PPO."""


@pytest.mark.parametrize("name", [name if name in FAST else slow(name) for name in sorted(set(LEARNERS) - {"ppo"})])
def test_a_killed_training_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"learner": name, "iterations": 3, "checkpoint_every": 2, "reference_ema": 0.2}
    settings |= {"questions_per_iteration": 3, "replies_per_question": 4, "minibatch": 6, "epochs": 1}
    if "entropy_floor" in LEARNERS[name].config.model_fields:
        settings["entropy_floor"] = 0.999
    config = changed(CONFIG, **settings)
    through = four_roles()
    expected, _ = train(through, tmp_path / "a", config)

    def killed(iteration: int, *_: Any) -> None:
        if iteration == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(four_roles(), tmp_path / "b", config, keep=killed)
    resumed = four_roles()
    rest, _ = train(resumed, tmp_path / "b", config)
    assert rest == expected[2:]
    for role in (*make_learner(context_of(four_roles(), config)).roles, REFERENCE):
        for one, other in zip(through.roles.parameters(role).values(), resumed.roles.parameters(role).values(), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("name", sorted(set(LEARNERS) - {"ppo", "trpo", "ilql", "soft_q"}))
def test_only_ppo_and_trpo_hold_a_critic(name: str) -> None:
    backbone = tiny_models.backbone("llama", eos=(1, 33, 34))
    backbone.roles.add(EVALUATOR, head=True)
    backbone.roles.add(POLICY)
    backbone.roles.add_snapshot(REFERENCE, of=POLICY)
    learner = make_learner(context_of(backbone, changed(CONFIG, **{"learner": name})))
    assert CRITIC not in backbone.roles.names
    assert learner.roles == (POLICY,)


def test_the_samples_of_an_iteration_do_not_depend_on_the_learner() -> None:
    replies = []
    for name in ("ppo", "rloo", "dpo"):
        context = context_of(four_roles(), changed(CONFIG, **{"learner": name}))
        samples = make_learner(context).collect(PROMPTS, 3)
        replies.append([r.ids for r in samples.rollouts])
        assert replies[-1] == [r.ids for r in collect(context, PROMPTS, 3).rollouts]
    assert replies[0] == replies[1] == replies[2]


def test_the_pace_by_hand() -> None:
    pace = KLAdaptiveStepSize(0.004)
    factors = []
    for kl in (0.003, 0.016, 0.4, 0.00625, 0.001, 0.0, 0.0, 0.0):
        pace.update(kl)
        factors.append(pace.factor)
    # the root of 1/4; no more than to half; the root of 0.64; then a tenth more each time, never above 1
    expected = [1.0, 0.5, 0.25, 0.2, 0.22, 0.242, 0.2662, 0.29282]
    assert factors == pytest.approx(expected)
    endless = KLAdaptiveStepSize(None)
    endless.update(9.0)
    assert endless.factor == 1.0


def test_an_iteration_that_went_too_far_shortens_the_steps_after_it(tmp_path: Path) -> None:
    rates, moved = {}, {}
    for limit in (None, 0.001):
        config = changed(CONFIG, **{"iterations": 4, "learning_rate": 0.03, "step_kl": limit})
        lines, _ = train(four_roles(), tmp_path / str(limit), config)
        rates[limit] = [line["learning_rate"] for line in lines]
        moved[limit] = [line["approximate_kl"] for line in lines]
    assert moved[0.001][0] == moved[None][0] > 0.004
    assert rates[0.001][0] == rates[None][0]
    assert rates[0.001][1] == pytest.approx(rates[None][1] / 2)  # more than four times the limit
    assert moved[0.001][-1] < 0.5 * moved[None][-1]


@pytest.mark.parametrize("name", ["ppo", "trpo", "soft_q", "ilql"])
def test_critics_and_state_values_start_from_the_named_evaluator_not_from_the_first_head(name: str) -> None:
    backbone = tiny_models.backbone("llama")
    for number, role in enumerate(("other-head", EVALUATOR)):
        backbone.roles.add(role, seed=number, head=True, trainable=False)
        tiny_models.scramble(backbone, role, seed=number, size=0.05)
    backbone.roles.add(POLICY)
    backbone.roles.add_snapshot(REFERENCE, of=POLICY)
    make_learner(context_of(backbone, changed(CONFIG, **{"learner": name})))
    added = [role for role in backbone.roles.heads if role not in ("other-head", EVALUATOR)]
    assert added
    for role in added:
        for ours, theirs in zip(backbone.roles.adapter(role).values(), backbone.roles.adapter(EVALUATOR).values(), strict=True):
            assert torch.equal(ours, theirs)
