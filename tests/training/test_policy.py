from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny_models
from policies import CONFIG, DISLIKED, LIKED, LIMIT, PROMPTS, changed, context_of, four_roles, train
from scarce import no_memory
from selfeval.algorithms.masked import aggregation_weights
from selfeval.backbone.adapters import BASE
from selfeval.backbone.budget import MemoryBudget
from selfeval.backbone.roles import Backbone
from selfeval.config import EvaluatorConfig, PolicyConfig
from selfeval.errors import LoopError
from selfeval.prompt import Prompt
from selfeval.rollout import engines
from selfeval.rollout.engine import generate
from selfeval.rollout.guide import Guide
from selfeval.rollout.requests import Request, Rollout
from selfeval.training import policy, policy_updates
from selfeval.training.checkpoint import Checkpoints
from selfeval.training.context import CRITIC, POLICY, REFERENCE, JudgeReading, LearnerContext, Samples, Scores
from selfeval.training.evaluator import EVALUATOR, Preference, score_replies, train_evaluator
from selfeval.training.experience import Experience, RewardScale, build_experience, experience_metrics
from selfeval.training.learners import policy_gradient
from selfeval.training.learners.ppo import PPO
from selfeval.training.watchdogs import Alarm


def share_liked(backbone: Backbone, role: str) -> float:
    with backbone.acting_as(role):
        rollouts = generate(backbone, [Request(p.reply) for p in PROMPTS] * 50, max_new_tokens=LIMIT, seed=77)
    return sum(LIKED in r.ids for r in rollouts) / len(rollouts)


def teach_evaluator(backbone: Backbone, folder: Path) -> None:
    """The evaluator learns, on random replies, that LIKED is better than DISLIKED, wherever it stands."""
    rng = random.Random(5)

    def reply(token: int, length: int) -> tuple[int, ...]:
        ids = [rng.randrange(2, 40) for _ in range(length)]
        ids[rng.randrange(length)] = token
        return tuple(i for i in ids if i != LIKED + DISLIKED - token)

    pairs = [
        Preference(rng.choice(PROMPTS).grade, reply(LIKED, LIMIT), reply(rng.randrange(11, 40), LIMIT), 0.95)
        for _ in range(480)
    ]
    config = EvaluatorConfig(learning_rate=1e-2, epochs=2, batch=16)
    keeper = {"seed": 0, "batch_tokens": 4096, "log": lambda line: None, "resumed": lambda step: None}
    train_evaluator(backbone, pairs, config, lambda o: Checkpoints(folder, backbone, [EVALUATOR], o), **keeper)  # type: ignore[arg-type]
    backbone.roles.freeze(EVALUATOR)


# -- the whole loop -----------------------------------------------------------------------------------------------------


def test_it_raises_what_the_trained_evaluator_likes_and_touches_nothing_else(tmp_path: Path) -> None:
    backbone = tiny_models.backbone("llama", eos=(1, 33, 34))
    backbone.roles.add(EVALUATOR, seed=1, head=True)
    teach_evaluator(backbone, tmp_path / "evaluator")
    backbone.roles.add(POLICY, seed=2)
    tiny_models.scramble(backbone, POLICY, seed=3, size=0.05)
    backbone.roles.add(REFERENCE, copy_of=POLICY, trainable=False)
    backbone.roles.add(CRITIC, copy_of=EVALUATOR, head=True)
    frozen = [*backbone.roles.parameters(REFERENCE).values(), *backbone.roles.parameters(EVALUATOR).values()]
    frozen += [p for n, p in backbone.model.named_parameters() if "lora_" not in n]
    before = [p.detach().clone() for p in frozen]
    start = share_liked(backbone, POLICY)
    lines, alarms = train(backbone, tmp_path / "policy", changed(CONFIG, **{"iterations": 15}))
    assert start < 0.35
    assert share_liked(backbone, POLICY) > start + 0.3
    assert share_liked(backbone, REFERENCE) == start
    assert all(torch.equal(a, b) for a, b in zip(frozen, before, strict=True))
    assert all(line["first_ratio"] < 1e-4 for line in lines)
    assert abs(lines[0]["kl"]) < 1e-4  # the policy is still its reference
    assert all(torch.isfinite(torch.tensor(line["kl"])) for line in lines)
    assert 0.1 < lines[-1]["kl"] < 30
    assert lines[-1]["score"] > lines[0]["score"] + 0.5
    assert not [a for a in alarms if a.name in ("not_finite", "ratio_not_one", "negative_kl")]


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_the_first_ratio_is_one_in_every_family_and_at_any_temperature(family: str, tmp_path: Path) -> None:
    backbone = tiny_models.backbone(family, eos=(1, 33, 34))
    backbone.roles.add(EVALUATOR, seed=1, head=True)
    tiny_models.scramble(backbone, EVALUATOR, size=0.05)
    backbone.roles.add(POLICY)
    backbone.roles.add(REFERENCE, copy_of=POLICY, trainable=False)
    backbone.roles.add(CRITIC, copy_of=EVALUATOR, head=True)
    lines, _ = train(backbone, tmp_path, changed(CONFIG, **{"iterations": 3, "temperature": 0.7}))
    assert [line["first_ratio"] < 1e-4 for line in lines] == [True] * 3
    assert lines[-1]["approximate_kl"] > 1e-5  # the policy did move


def test_a_killed_training_goes_on_bit_for_bit(tmp_path: Path) -> None:
    through, config = four_roles(), changed(CONFIG, **{"iterations": 5})
    expected, _ = train(through, tmp_path / "a", config)
    seen: list[int] = []

    def killed(iteration: int, *_: Any) -> None:
        seen.append(iteration)
        if iteration == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(four_roles(), tmp_path / "b", config, keep=killed)
    resumed, steps = four_roles(), []
    rest, _ = train(resumed, tmp_path / "b", config, resume=steps.append)
    assert steps == [3]
    assert rest == expected[3:]
    for role in (POLICY, CRITIC, REFERENCE):
        for one, other in zip(through.roles.parameters(role).values(), resumed.roles.parameters(role).values(), strict=True):
            assert torch.equal(one, other)


def test_a_score_that_is_not_a_number_stops_the_training_by_name(tmp_path: Path) -> None:
    backbone = four_roles()
    with torch.no_grad():
        backbone.roles.heads[EVALUATOR].bias.fill_(float("nan"))
    back: list[int] = []
    where = r"reward, score, value is NaN or infinite \(first in head.bias of evaluator-0\)"
    with pytest.raises(LoopError, match=rf"stopped at iteration 1: {where}.*after 3 rollbacks"):
        train(backbone, tmp_path, roll_back=lambda step, alarms: back.append(step))
    assert back == [0, 0, 0]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-000000.2",
        "step-000000.3",
    ]  # the start, and nothing broken


def test_weights_that_broke_before_sampling_are_named(tmp_path: Path) -> None:
    backbone, kept = four_roles(), []
    with torch.no_grad():
        # torch's attention on a CPU makes finite numbers of NaN queries
        next(p for n, p in backbone.roles.parameters(POLICY).items() if "down_proj.lora_B" in n).fill_(float("nan"))
    where = r"token 1 of a reply are NaN or infinite \(first in .*down_proj.* of policy\)"
    with pytest.raises(LoopError, match=rf"stopped at iteration 1: the logits for {where}.*after 3 rollbacks"):
        train(backbone, tmp_path, keep=lambda *found: kept.append(found))
    assert [list(samples.asked) for _, samples, _ in kept] == [[]] * 4  # nothing was sampled


def break_once(name: str, monkeypatch: pytest.MonkeyPatch, backbone: Backbone, iteration: int) -> None:
    """In this iteration, and only the first time that it comes, the policy's weights of that name become NaN in an update."""
    broken: list[int] = []
    original = policy_updates.policy_gradients

    def breaking(context: LearnerContext, *arguments: Any, **options: Any) -> dict[str, float]:
        found = original(context, *arguments, **options)
        broken.append(1)
        if len(broken) == iteration * 4 - 3:  # four minibatches an iteration
            gradient = context.backbone.roles.parameters(POLICY)[name].grad
            assert gradient is not None
            gradient[0, 0] = float("nan")
        return found

    monkeypatch.setattr(policy_gradient, "policy_gradients", breaking)


def test_a_broken_gradient_is_named_and_never_stepped_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, back = four_roles(), []
    name = next(n for n in backbone.roles.parameters(POLICY) if "layers.1" in n and "down_proj.lora_B" in n)
    break_once(name, monkeypatch, backbone, iteration=4)
    config = changed(CONFIG, **{"iterations": 5, "epochs": 2})
    lines, alarms = train(backbone, tmp_path, config, roll_back=lambda step, alarms: back.append((step, alarms[0].message)))
    assert [step for step, _ in back] == [3]
    assert back[0][1].startswith(f"the gradient of {name} is NaN or infinite (1 of ")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 4, 5]
    assert [a.action for a in alarms] == ["roll_back"]
    assert lines[-1]["learning_rate"] == pytest.approx(
        CONFIG.learning_rate * 0.5 * policy_updates.learning_rate_factor(5, config)
    )
    assert all(bool(torch.isfinite(p).all()) for p in backbone.roles.parameters(POLICY).values())


def test_going_back_is_the_same_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = next(n for n in four_roles().roles.parameters(POLICY) if "lora_B" in n)
    config = changed(CONFIG, **{"iterations": 6, "epochs": 2})
    through = four_roles()
    with monkeypatch.context() as patch:
        break_once(name, patch, through, iteration=5)
        train(through, tmp_path / "a", config)
    seen: list[int] = []

    def killed(iteration: int, *_: Any) -> None:
        seen.append(iteration)
        if seen.count(5) == 2:  # after it went back
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        break_once(name, patch, through, iteration=5)
        with pytest.raises(KeyboardInterrupt):
            train(four_roles(), tmp_path / "b", config, keep=killed)
    resumed = four_roles()
    train(resumed, tmp_path / "b", config)
    for one, other in zip(through.roles.parameters(POLICY).values(), resumed.roles.parameters(POLICY).values(), strict=True):
        assert torch.equal(one, other)


def reading(wins: int) -> JudgeReading:
    """Return a reading of 20 questions, the first of which are won."""
    return JudgeReading((1.0,) * wins + (0.0,) * (20 - wins))


RISING = changed(CONFIG, learning_rate=2e-2, replies_per_question=32, minibatch=96)
"""Large batches, so that the score rises from each reading of the judge to the next."""


@pytest.mark.slow
def test_a_policy_that_exploits_the_evaluator_ends_where_the_judge_liked_it_best(tmp_path: Path) -> None:
    backbone, kept, back = four_roles(), [], []
    readings = iter([reading(12), reading(14), reading(4)])

    def judge(guide: Guide | None) -> JudgeReading:
        assert guide is None  # the policy itself learns
        kept.append({n: p.detach().clone() for n, p in backbone.roles.parameters(POLICY).items()})
        return next(readings)

    config = changed(RISING, **{"iterations": 8, "judge_every": 2})
    lines, alarms = train(backbone, tmp_path, config, judge=judge, roll_back=lambda step, alarms: back.append(step))
    assert [(a.step, a.name, a.action) for a in alarms if a.name == "judge_disagrees"] == [(6, "judge_disagrees", "finish")]
    assert back == [4]
    assert lines[-1]["judge_drop"] == pytest.approx(0.5)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for name, parameter in backbone.roles.parameters(POLICY).items():
        assert torch.equal(parameter, kept[1][name])


def test_the_judge_remembers_what_it_liked_best_when_the_loop_goes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = four_roles()
    break_once(next(n for n in backbone.roles.parameters(POLICY) if "lora_B" in n), monkeypatch, backbone, iteration=5)
    readings = iter([reading(12), reading(16), reading(14)])
    config = changed(CONFIG, **{"iterations": 5, "judge_every": 2, "checkpoint_every": 3, "epochs": 2})
    lines, _ = train(backbone, tmp_path, config, judge=lambda guide: next(readings))
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 4, 5]
    assert lines[-2]["judge_drop"] == pytest.approx(0.1)  # to the 0.8 of the iteration 4 that was given up
    assert sorted(path.name for path in (tmp_path / "best").iterdir()) == ["step-000002", "step-000004"]


def roll_back_once(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise a roll-back in this iteration, after the judge was asked, and only the first time that it comes."""
    check, fired = policy.check_iteration, list[int]()

    def checked(values: dict[str, float], *others: Any) -> list[Alarm]:
        alarms = check(values, *others)
        if values["step"] == step and not fired:
            fired.append(step)
            alarms.append(Alarm(step, "kl_runaway", "the KL ran away", "roll_back"))
        return alarms

    monkeypatch.setattr(policy, "check_iteration", checked)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given_up", "every", "wins", "expected"),
    [
        # The best reading comes with a roll-back, with an earlier reading before it or none.
        (4, 2, [12, 20, 13, 1], [3, 4]),
        (1, 1, [20, 14, 1], [0, 1]),
        # Iteration 5 has the best reading until the loop goes back to 3, and then 4 is better.
        (6, 1, [12, 12, 12, 12, 14, 12, 16, 2], [3, 4]),
    ],
)
def test_the_best_reading_always_has_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given_up: int, every: int, wins: list[int], expected: list[int]
) -> None:
    backbone, back, readings, seen = four_roles(), list[int](), iter(wins), list[dict[str, Tensor]]()

    def judge(guide: Guide | None) -> JudgeReading:
        seen.append({n: p.detach().clone() for n, p in backbone.roles.parameters(POLICY).items()})
        return reading(next(readings))

    roll_back_once(given_up, monkeypatch)
    config = changed(RISING, **{"iterations": 8, "judge_every": every})
    _, alarms = train(backbone, tmp_path, config, judge=judge, roll_back=lambda step, alarms: back.append(step))
    assert alarms[-1].action == "finish"
    assert back == expected
    for name, parameter in backbone.roles.parameters(POLICY).items():
        assert torch.equal(parameter, seen[-2][name])  # the last reading is the one that ended the training


def test_minibatches_keep_the_replies_to_a_question_together() -> None:
    groups = [0, 0, 0, 1, 1, 2, 2, 2, 2]
    order = policy_updates._shuffled(groups, random.Random(3))
    assert sorted(order) == list(range(9))
    assert order != sorted(order)
    assert len(list(itertools.groupby(groups[row] for row in order))) == 3


def test_a_judge_that_cannot_tell_is_not_a_reading(tmp_path: Path) -> None:
    config = changed(CONFIG, **{"iterations": 2, "judge_every": 1})
    lines, _ = train(four_roles(), tmp_path, config, judge=lambda guide: None)
    assert not [key for line in lines for key in line if key.startswith("judge")]
    assert not (tmp_path / "best").exists()


def test_a_scoring_that_disagrees_with_sampling_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def warmer(backbone: Backbone, requests: Sequence[Request], **options: Any) -> list[Rollout]:
        return generate(backbone, [Request(r.prompt, 1.3) for r in requests], **options)

    monkeypatch.setattr(engines, "generate", warmer)
    _, alarms = train(four_roles(), tmp_path, changed(CONFIG, **{"iterations": 1}))
    assert "ratio_not_one" in {a.name for a in alarms}


def test_every_reply_is_kept_with_its_question_and_score(tmp_path: Path) -> None:
    kept: list[tuple[int, Samples, Scores]] = []
    backbone = four_roles()
    train(backbone, tmp_path, changed(CONFIG, **{"iterations": 2}), keep=lambda *row: kept.append(row))
    assert [row[0] for row in kept] == [1, 2]
    for _, samples, scores in kept:
        assert Counter(p.question_id for p in samples.asked) == {p.question_id: 8 for p in PROMPTS}
        prompts, replies = [p.grade for p in samples.asked], [r.ids for r in samples.rollouts]
        expected = score_replies(backbone, EVALUATOR, prompts, replies, 64)
        assert scores.whole_B.tolist() == pytest.approx(expected, abs=1e-5)


# -- its parts ----------------------------------------------------------------------------------------------------------


def experience(
    backbone: Backbone, config: PolicyConfig = CONFIG, tokens: int = 300
) -> tuple[Experience, list[Rollout], RewardScale]:
    with backbone.acting_as(POLICY):
        rollouts = generate(backbone, [Request(p.reply) for p in PROMPTS], max_new_tokens=LIMIT, seed=4)
    context, samples = context_of(backbone, config, tokens), Samples(PROMPTS, rollouts)
    scores = context.scorer(samples)
    scale = RewardScale.of(scores.whole_B, samples, whiten=True)
    observed = build_experience(context, samples, scores, scale, 0.3)
    return PPO(context).advantages(Samples([], []), observed, scale), rollouts, scale


def policy_figures(backbone: Backbone, part: Experience, tokens: int) -> dict[str, float]:
    context = context_of(backbone, CONFIG, tokens)
    learner, weights_BR = PPO(context), aggregation_weights(part.mask, "token_mean")
    return policy_updates.policy_gradients(context, part, weights_BR, learner.loss, clip_fraction=learner.clip_fraction)


def critic_figures(backbone: Backbone, part: Experience, scale: RewardScale, tokens: int) -> dict[str, float]:
    return policy_updates.critic_gradients(context_of(backbone, CONFIG, tokens), part, scale)


@torch.no_grad()
def values_of(backbone: Backbone, prompt: Prompt, reply: Sequence[int]) -> Tensor:
    """The critic before each reply token: one sequence, one plain pass."""
    with backbone.acting_as(CRITIC):
        states = backbone.model.base_model(input_ids=torch.tensor([[*prompt.ids, *reply]])).last_hidden_state[0]
    head = backbone.roles.heads[CRITIC]
    return (states @ head.weight[0] + head.bias)[len(prompt.ids) - 1 : -1]


def test_advantages_and_returns_equal_a_slow_loop_over_each_reply() -> None:
    backbone = four_roles()
    tiny_models.scramble(backbone, POLICY, seed=9, size=0.06)  # away from the reference
    tiny_models.scramble(backbone, CRITIC, seed=10)
    config = changed(CONFIG, **{"unfinished_penalty": 1.5, "reward_clip": 0.8, "gamma": 0.9, "gae_lambda": 0.7})
    found, rollouts, _ = experience(backbone, config)
    assert {r.finished for r in rollouts} == {True, False}
    scores = found.scores_B.tolist()
    mean = sum(scores) / len(scores)
    deviation = (sum((s - mean) ** 2 for s in scores) / len(scores)) ** 0.5
    all_advantages: list[float] = []
    all_returns: list[float] = []
    all_rewards: list[float] = []
    for row, (prompt, rollout) in enumerate(zip(PROMPTS, rollouts, strict=True)):
        with backbone.acting_as(REFERENCE):
            full = tiny_models.full_logprobs(backbone.model, (*prompt.reply.ids, *rollout.ids))
        reference = [full[len(prompt.reply.ids) - 1 + t, token].item() for t, token in enumerate(rollout.ids)]
        values = [(v - mean) / deviation for v in values_of(backbone, prompt.grade, rollout.ids).tolist()]
        rewards = [-0.3 * (p - q) for p, q in zip(rollout.logprobs, reference, strict=True)]
        rewards[-1] += max(-0.8, min(0.8, (scores[row] - mean) / deviation)) - (0.0 if rollout.finished else 1.5)
        advantage, advantages = 0.0, []
        for t in reversed(range(len(rewards))):
            following = values[t + 1] if t + 1 < len(values) else 0.0
            advantage = rewards[t] + 0.9 * following - values[t] + 0.9 * 0.7 * advantage
            advantages.insert(0, advantage)
        all_advantages += advantages
        all_returns += [a + v for a, v in zip(advantages, values, strict=True)]
        assert found.ref_logprobs[row, : len(rollout.ids)].tolist() == pytest.approx(reference, abs=1e-4)
        assert found.rewards[row, : len(rollout.ids)].tolist() == pytest.approx(rewards, abs=1e-4)
        all_rewards.append(sum(rewards))
    mask = found.mask
    assert found.returns[mask].tolist() == pytest.approx(all_returns, abs=1e-3)
    raw = torch.tensor(all_advantages, dtype=torch.float64)
    whitened = (raw - raw.mean()) / raw.std(correction=1)  # unbiased, as `whiten` promises
    torch.testing.assert_close(found.advantages[mask].double(), whitened, rtol=1e-5, atol=1e-5)
    assert bool((found.returns[~mask] == 0).all())
    assert experience_metrics(found)["reward"] == pytest.approx(sum(all_rewards) / len(all_rewards), abs=1e-4)


def test_micro_batches_change_neither_experience_nor_gradients(one_thread: None) -> None:
    backbone = four_roles()
    tiny_models.scramble(backbone, CRITIC, seed=10)
    whole, _, whitening = experience(backbone, tokens=100_000)
    parts, _, _ = experience(backbone, tokens=12)
    torch.testing.assert_close(parts.scores_B, whole.scores_B, rtol=0, atol=2e-5)
    for name in ("logprobs", "ref_logprobs", "values", "advantages", "returns", "rewards"):  # garbage where the mask is False
        torch.testing.assert_close(getattr(parts, name)[parts.mask], getattr(whole, name)[whole.mask], rtol=0, atol=2e-5)
    tiny_models.scramble(backbone, POLICY, seed=11, size=0.055)  # ratios must differ from one, some enough to be clipped
    results = []
    for budget in (100_000, 20, 1):
        figures = policy_figures(backbone, whole, budget)
        figures |= critic_figures(backbone, whole, whitening, budget)
        gradients = {}
        for role in (POLICY, CRITIC):
            for name, parameter in backbone.roles.parameters(role).items():
                assert parameter.grad is not None
                gradients[name] = parameter.grad.clone()
                parameter.grad = None
        results.append((figures, gradients))
    (figures, gradients), *others = results
    assert figures["clip_fraction"] > 0
    for other_figures, other_gradients in others:
        assert other_figures == pytest.approx(figures, abs=1e-5, rel=1e-5)
        for name, gradient in other_gradients.items():
            scale = max(1.0, gradients[name].abs().max().item())
            torch.testing.assert_close(gradient, gradients[name], rtol=0, atol=1e-6 * scale)


def both_updates(backward: bool, **scarcity: Any) -> tuple[dict[str, float], dict[str, Tensor], list[Any], Backbone]:
    """Metrics and gradients of one minibatch for policy and critic, the passes that failed, and the backbone."""
    backbone = four_roles()
    tiny_models.scramble(backbone, CRITIC, seed=10)
    part, _, whitening = experience(backbone, tokens=100_000)
    tiny_models.scramble(backbone, POLICY, seed=11, size=0.055)
    with no_memory(backbone, backward=backward, **scarcity) as failed:
        figures = policy_figures(backbone, part, 100_000)
        backbone.budget = MemoryBudget()  # the critic too begins with everything
        figures |= critic_figures(backbone, part, whitening, 100_000)
    named = {**backbone.roles.parameters(POLICY), **backbone.roles.parameters(CRITIC)}
    return figures, {n: p.grad for n, p in named.items() if p.grad is not None}, failed, backbone


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_out_of_memory_changes_neither_gradient(backward: bool, one_thread: None) -> None:
    figures, gradients, nothing, _ = both_updates(backward)
    found, parts, failed, backbone = both_updates(backward, tokens=20)
    assert nothing == []
    assert len(failed) >= 4  # twice or more for the policy, and for the critic
    assert found == pytest.approx(figures, abs=1e-5, rel=1e-5)
    assert parts.keys() == gradients.keys() == {*backbone.roles.parameters(POLICY), *backbone.roles.parameters(CRITIC)}
    for name, gradient in parts.items():
        scale = max(1.0, gradients[name].abs().max().item())
        torch.testing.assert_close(gradient, gradients[name], rtol=0, atol=1e-6 * scale)


def test_an_iteration_with_too_little_memory_samples_and_learns_the_same(tmp_path: Path) -> None:
    config, kept = changed(CONFIG, **{"iterations": 2, "replies_per_question": 4}), []

    def keep(iteration: int, samples: Samples, scores: Scores) -> None:
        kept.append(([p.question_id for p in samples.asked], [r.ids for r in samples.rollouts], scores.whole_B.tolist()))

    expected, _ = train(four_roles(), tmp_path / "a", config, keep=keep, batch_tokens=4096)
    backbone = four_roles()
    with no_memory(backbone, tokens=90, rows=10) as failed:
        lines, _ = train(backbone, tmp_path / "b", config, keep=keep, batch_tokens=4096)
    whole, short = kept[0], kept[2]
    assert short[:2] == whole[:2]  # the same prompt groups, and token for token the same replies
    assert short[2] == pytest.approx(whole[2], abs=1e-5)
    for one, other in zip(lines, expected, strict=True):
        assert one == pytest.approx(other, abs=1e-3, rel=1e-3)
    assert {e.phase.value for e in backbone.budget.take_events()} == {"rollout", "score", "update"}
    assert failed


def test_the_first_policy_gradient_is_that_of_the_plain_objective() -> None:
    # At ratio one the clipped loss has the gradient of -A log pi: plain passes, one reply at a time.
    backbone = four_roles()
    found, rollouts, _ = experience(backbone)
    policy_figures(backbone, found, 300)
    parameters = backbone.roles.parameters(POLICY)
    tokens = sum(len(r.ids) for r in rollouts)
    loss = torch.zeros(())
    with backbone.acting_as(POLICY):
        for row, (prompt, rollout) in enumerate(zip(PROMPTS, rollouts, strict=True)):
            logits = backbone.model(input_ids=torch.tensor([[*prompt.reply.ids, *rollout.ids]])).logits[
                0, len(prompt.reply.ids) - 1 : -1
            ]
            logprobs = torch.log_softmax(logits, -1).gather(1, torch.tensor(rollout.ids)[:, None])[:, 0]
            loss = loss - (logprobs * found.advantages[row, : len(rollout.ids)]).sum() / tokens
        expected = torch.autograd.grad(loss, list(parameters.values()))
    for parameter, gradient in zip(parameters.values(), expected, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-5)


def test_whitening_by_hand() -> None:
    samples = Samples(PROMPTS[:4], [Rollout((5,) * n, (0.0,) * n, True) for n in (1, 2, 3, 6)])
    scale = RewardScale.of(torch.tensor([1.0, 3.0, 5.0, 7.0]), samples, whiten=True)
    assert (scale.mean, scale.deviation, scale.length) == (4.0, pytest.approx(5**0.5), 3.0)
    config = changed(CONFIG, **{"reward_clip": 1.0, "unfinished_penalty": 2.0})
    scores, finished = torch.tensor([4.0, 40.0, -40.0, 5.0]), torch.tensor([True, True, False, False])
    reward = scale.reward(scores, finished, torch.tensor([3, 3, 3, 3]), config)
    assert reward.tolist() == pytest.approx([0.0, 1.0, -3.0, 5**-0.5 - 2.0])
    guarded = changed(config, **{"length_guard": 2.0, "reward_clip": None})  # free up to 6 tokens, then 1 for 6 more
    longer = scale.reward(scores, torch.tensor([True] * 4), torch.tensor([6, 9, 12, 3]), guarded)
    assert longer.tolist() == pytest.approx([0.0, 36 / 5**0.5 - 0.5, -44 / 5**0.5 - 1.0, 5**-0.5])
    assert RewardScale.of(torch.tensor([2.0, 2.0]), samples, whiten=True).deviation == 1e-4
    assert RewardScale.of(torch.tensor([2.0, 8.0]), samples, whiten=False).units(torch.tensor(7.0)) == 7.0


def test_the_learning_rate_rises_then_falls() -> None:
    config = changed(CONFIG, **{"iterations": 10, "warmup_iterations": 2})
    factors = [policy_updates.learning_rate_factor(i, config) for i in range(1, 11)]
    assert factors == pytest.approx([1 / 3, 2 / 3, 0.82, 0.73, 0.64, 0.55, 0.46, 0.37, 0.28, 0.19])


def test_the_base_is_never_the_policy() -> None:
    backbone = four_roles()
    found, rollouts, _ = experience(backbone)
    with backbone.acting_as(BASE):
        full = tiny_models.full_logprobs(backbone.model, (*PROMPTS[0].reply.ids, *rollouts[0].ids))
    bare = [full[2 + t, token].item() for t, token in enumerate(rollouts[0].ids)]
    captured = found.logprobs[0, : len(bare)].tolist()
    assert captured != pytest.approx(bare, abs=1e-2)
    assert captured == pytest.approx(
        found.ref_logprobs[0, : len(bare)].tolist(), abs=1e-4
    )  # the reference is the trained start
