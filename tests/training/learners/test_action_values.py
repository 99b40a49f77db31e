from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.optim import AdamW

import tiny_models
from policies import CONFIG, LIMIT, PROMPTS, changed, context_of, four_roles
from selfeval.algorithms.q_learning import huber_loss, td_target
from selfeval.config import PolicyConfig
from selfeval.prompt import Prompt
from selfeval.rollout.requests import Rollout
from selfeval.training.context import POLICY, REFERENCE, LearnerContext, QuestionPrompts, Samples, Scores
from selfeval.training.experience import RewardScale, build_experience
from selfeval.training.learners import action_values
from selfeval.training.learners.action_values import (
    Q_ROLES,
    TARGET_ROLES,
    VALUE_ROLE,
    add_q_roles,
    chosen_token_values,
    gradients,
    log_ratios,
    polyak_update,
    q_targets,
    soft_values,
    state_values,
)
from selfeval.training.replay import Replay, Replayed

LEARNING = (*Q_ROLES, VALUE_ROLE)


def pool_of(context: LearnerContext, prompts: list[QuestionPrompts], replies: list[tuple[int, ...]]) -> Replayed:
    """The replies, remembered and drawn in this order."""
    samples = Samples(prompts, [Rollout(r, (0.0,) * len(r), True) for r in replies])
    experience = build_experience(context, samples, Scores(torch.zeros(len(replies))), RewardScale(0.0, 1.0, 3.0), 0.0)
    replay = Replay(len(replies))
    replay.add(experience)
    pool = replay.sample(context.backbone, len(replies), random.Random(0))
    order = [replies.index(tuple(row[kept].tolist())) for row, kept in zip(pool.policy_batch.reply_BR, pool.mask, strict=True)]
    return pool.rows(torch.tensor(order).argsort())


def twins(temperature: float = 1.0) -> tuple[LearnerContext, Replayed]:
    """Target roles with separate values, and replies of several lengths."""
    context = context_of(four_roles(), changed(CONFIG, **{"temperature": temperature}))
    add_q_roles(context)
    for number, role in enumerate((*LEARNING, *TARGET_ROLES.values())):
        tiny_models.scramble(context.backbone, role, seed=number, size=0.1)
    generator = random.Random(3)
    replies = [tuple(generator.randrange(2, 40) for _ in range(1 + n % LIMIT)) for n in range(6)]
    return context, pool_of(context, PROMPTS, replies)


def plain_ratios(context: LearnerContext, role: str, prompt: QuestionPrompts, reply: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """c (log pi_q - log pi_ref) of every token before each reply token `[R, V]`, and log pi_ref: plain passes, one sequence."""
    backbone, temperature, ids = context.backbone, context.config.temperature, (*prompt.reply.ids, *reply)
    found = []
    for name in (role, REFERENCE):
        with backbone.acting_as(name):
            full = tiny_models.full_logprobs(backbone.model, ids, temperature)
        found.append(full[len(prompt.reply.ids) - 1 : len(ids) - 1])
    return 0.25 * (found[0] - found[1]), found[1]


def plain_states(context: LearnerContext, role: str, prompt: QuestionPrompts, reply: tuple[int, ...]) -> Tensor:
    """b before each reply token `[R]`, after the grade prompt: one sequence, one plain pass."""
    backbone, ids = context.backbone, (*prompt.grade.ids, *reply)
    with torch.no_grad(), backbone.acting_as(role):
        states = backbone.model.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0]
    head = backbone.roles.heads[role]
    return (states @ head.weight[0] + head.bias)[len(prompt.grade.ids) - 1 : len(ids) - 1]


def replies_of(pool: Replayed) -> list[tuple[int, ...]]:
    return [tuple(row[kept].tolist()) for row, kept in zip(pool.policy_batch.reply_BR, pool.mask, strict=True)]


def test_values_start_at_zero_and_their_targets_with_them() -> None:
    bare = tiny_models.backbone()
    bare.roles.add(POLICY)
    bare.roles.add_snapshot(REFERENCE, of=POLICY)
    for backbone in (bare, four_roles()):  # also where the policy is not the bare base
        context = context_of(backbone)
        add_q_roles(context)
        pool = pool_of(context, PROMPTS, [(5 + n, 9, 2) for n in range(6)])
        for role in (*LEARNING, *TARGET_ROLES.values()):
            assert chosen_token_values(context, role, pool).abs().max() < 1e-5
        soft = soft_values(context, pool, 0.3)
        assert max(float(x.abs().max()) for x in soft) < 1e-5


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_what_is_said_of_drawn_tokens_equals_the_definition(temperature: float) -> None:
    context, pool = twins(temperature)
    for role in (*LEARNING, *TARGET_ROLES.values()):
        found = chosen_token_values(context, role, pool)
        for row, (prompt, reply) in enumerate(zip(PROMPTS, replies_of(pool), strict=True)):
            if role in context.backbone.roles.heads:
                expected = plain_states(context, role, prompt, reply)
            else:
                expected = plain_ratios(context, role, prompt, reply)[0].gather(1, torch.tensor(reply)[:, None])[:, 0]
            assert found[row, pool.mask[row]].tolist() == pytest.approx(expected.tolist(), abs=1e-4)


@pytest.mark.parametrize("beta", [0.1, 1.5])
def test_soft_values_equal_the_sum_over_the_vocabulary(beta: float, monkeypatch: pytest.MonkeyPatch) -> None:
    context, pool = twins(0.7)
    monkeypatch.setattr(action_values, "_CHUNK_BYTES", 4 * 8 * 40 * 4)  # four positions of a vocabulary of 40 at a time
    values, taken = soft_values(context, pool, beta)
    differ = 0.0
    for row, (prompt, reply) in enumerate(zip(PROMPTS, replies_of(pool), strict=True)):
        (one, ref), (other, _) = (plain_ratios(context, TARGET_ROLES[role], prompt, reply) for role in Q_ROLES)
        lower = (plain_states(context, TARGET_ROLES[VALUE_ROLE], prompt, reply)[:, None] + torch.minimum(one, other)).double()
        expected = beta * (ref.double().exp() * (lower / beta).exp()).sum(-1).log()
        assert values[row, pool.mask[row]].tolist() == pytest.approx(expected.tolist(), abs=1e-4)
        its = lower.gather(1, torch.tensor(reply)[:, None])[:, 0]
        assert taken[row, pool.mask[row]].tolist() == pytest.approx(its.tolist(), abs=1e-4)
        differ = max(differ, float((one - other).abs().max()))
    assert differ > 0.05  # the lower of two that are not alike
    assert not values[~pool.mask].any()


def test_micro_batches_change_neither_values_nor_gradients() -> None:
    context, pool = twins()
    targets = torch.linspace(-1, 1, pool.mask.numel()).view(pool.mask.shape)
    pool = replace(pool, weights=torch.linspace(1, 0.2, pool.mask.numel()).view(pool.mask.shape))
    found = []
    for tokens in (100_000, 1):
        parts = replace(context, batch_tokens=tokens)
        losses = [gradients(parts, role, pool, targets, huber_loss) for role in ("q-0", VALUE_ROLE)]
        named = {**context.backbone.roles.parameters("q-0"), **context.backbone.roles.parameters(VALUE_ROLE)}
        collected = {n: p.grad.clone() for n, p in named.items() if p.grad is not None}
        for parameter in named.values():
            parameter.grad = None
        found.append((torch.stack([*soft_values(parts, pool, 0.3)])[:, pool.mask], losses, collected, set(named)))
    (values, losses, one, names), (other_values, other_losses, other, _) = found
    torch.testing.assert_close(values, other_values, rtol=0, atol=2e-5)
    assert losses == pytest.approx(other_losses, abs=1e-5)
    assert one.keys() == other.keys() == names  # the head's too
    for name, gradient in one.items():
        torch.testing.assert_close(gradient, other[name], rtol=1e-4, atol=1e-6)
    still = [role for role in context.backbone.roles.names if role not in ("q-0", VALUE_ROLE)]
    assert all(p.grad is None for role in still for p in context.backbone.roles.parameters(role).values())


@pytest.mark.parametrize("role", ["q-0", VALUE_ROLE])
def test_the_gradient_is_that_of_the_weighted_errors(role: str) -> None:
    # Errors below 1, where Huber's loss is half the square: -w (target - said) d said / dw, times 1 / tokens.
    context, pool = twins()
    named, mask = context.backbone.roles.parameters(role), pool.mask
    errors = torch.linspace(-0.8, 0.8, mask.numel()).view(mask.shape)
    pool = replace(pool, weights=torch.linspace(1, 0.2, mask.numel()).view(mask.shape))
    loss = gradients(context, role, pool, chosen_token_values(context, role, pool) + errors, huber_loss)
    assert loss == pytest.approx(float((pool.weights * errors.square() / 2)[mask].mean()), abs=1e-5)
    with context.backbone.acting_as(role):
        said = state_values(context, role, pool) if role == VALUE_ROLE else log_ratios(context, pool)
        expected = torch.autograd.grad(-(pool.weights * errors * said)[mask].mean(), list(named.values()))
    for parameter, gradient in zip(named.values(), expected, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_the_two_parts_can_say_any_values() -> None:
    # Every token of the vocabulary after each of two prompts, with values that have nothing to do with the model: 32 numbers of
    # mean 0.7. Either part alone would miss them. (A deviation of 0.15 is 0.6 nats; the bounded logits of so small a model do
    # not reach many.)
    backbone = tiny_models.backbone("llama", 16, eos=())
    backbone.roles.add(POLICY)
    backbone.roles.add_snapshot(REFERENCE, of=POLICY)
    context = context_of(backbone, PolicyConfig())
    add_q_roles(context)
    prompts = [QuestionPrompts("a", Prompt((3, 5)), Prompt((3,))), QuestionPrompts("b", Prompt((7, 2, 9)), Prompt((7,)))]
    pools = [pool_of(context, [prompt] * 16, [(token,) for token in range(16)]) for prompt in prompts]
    wanted = 0.7 + 0.15 * torch.randn(2, 16, 1, generator=torch.Generator().manual_seed(1))
    optimizers = {r: AdamW(list(backbone.roles.parameters(r).values()), lr=0.02, weight_decay=0.0) for r in ("q-0", VALUE_ROLE)}
    for step in range(160):
        for role, other in (("q-0", VALUE_ROLE), (VALUE_ROLE, "q-0")):
            for pool, values in zip(pools, wanted, strict=True):
                gradients(context, role, pool, values - chosen_token_values(context, other, pool), huber_loss)
            optimizers[role].param_groups[0]["lr"] = 0.02 * (1 - step / 160)
            optimizers[role].step()
            optimizers[role].zero_grad()
    for pool, values in zip(pools, wanted, strict=True):
        found = chosen_token_values(context, "q-0", pool) + chosen_token_values(context, VALUE_ROLE, pool)
        torch.testing.assert_close(found, values, rtol=0, atol=0.02)


def test_targets_go_a_share_of_the_way_and_only_they() -> None:
    context, _ = twins()
    backbone = context.backbone
    before = {
        role: {n: p.detach().clone() for n, p in backbone.roles.parameters(role).items()} for role in backbone.roles.names
    }
    polyak_update(backbone, 0.3)
    for role, target in TARGET_ROLES.items():
        old, online = list(before[target].values()), list(before[role].values())
        for now, was, theirs in zip(backbone.roles.parameters(target).values(), old, online, strict=True):
            torch.testing.assert_close(now, 0.7 * was + 0.3 * theirs, rtol=1e-6, atol=1e-7)
    assert "head.weight" in before[TARGET_ROLES[VALUE_ROLE]]
    for role in set(before) - set(TARGET_ROLES.values()):
        assert all(torch.equal(p, before[role][n]) for n, p in backbone.roles.parameters(role).items())
    assert not any(p.requires_grad for role in TARGET_ROLES.values() for p in backbone.roles.parameters(role).values())


def test_q_targets_equal_a_slow_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    rewards, taken, values = (torch.randn(5, 7, generator=generator, dtype=torch.float64) for _ in range(3))
    mask = torch.arange(7) < torch.tensor([7, 5, 1, 3, 6])[:, None]
    traces = torch.rand(5, 7, generator=generator, dtype=torch.float64)
    found = q_targets(rewards, taken, values, traces, mask, gamma=0.9)
    for row in range(5):
        following, expected = None, []
        for t in reversed([t for t in range(7) if mask[row, t]]):
            y = rewards[row, t]
            if following is not None:
                y = y + 0.9 * (values[row, t + 1] + traces[row, t + 1] * (following - taken[row, t + 1]))
            following = y
            expected.insert(0, y)
        torch.testing.assert_close(found[row, mask[row]], torch.stack(expected))
    assert not found[~mask].any()
    assert not q_targets(rewards, taken, values.where(mask, torch.nan), traces, mask, gamma=0.9).isnan().any()


def test_q_targets_without_traces_are_the_one_step_ones_and_exact_values_are_their_own() -> None:
    generator = torch.Generator().manual_seed(0)
    rewards, taken, values = (torch.randn(2, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    mask, last = torch.ones(2, 4, dtype=torch.bool), torch.tensor([False, False, False, True]).expand(2, 4)
    one_step = td_target(rewards, last, values.roll(-1, 1), gamma=0.9)
    torch.testing.assert_close(q_targets(rewards, taken, values, 0.0 * taken, mask, gamma=0.9), one_step)
    # Q = r + gamma V' is the fixed point for all traces.
    for trace in (0.5, 1.0):
        torch.testing.assert_close(
            q_targets(rewards, one_step, values, trace * torch.ones_like(taken), mask, gamma=0.9), one_step
        )
    nothing = torch.zeros_like(rewards)
    torch.testing.assert_close(
        q_targets(rewards, nothing, nothing, 1.0 + nothing, mask, gamma=1.0), rewards.flip(-1).cumsum(-1).flip(-1)
    )
