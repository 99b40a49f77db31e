from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.optim import AdamW

import tiny_models
from policies import CONFIG, LIMIT, PROMPTS, four_roles, setting_of
from selfeval.algorithms.q_learning import td_target
from selfeval.config import PolicyConfig
from selfeval.rollout.engine import Rollout
from selfeval.training.experience import RewardScale, observe
from selfeval.training.learners import action_values
from selfeval.training.learners.action_values import (
    TARGETS,
    TWINS,
    add_twins,
    drawn_values,
    follow,
    lag,
    lower_values,
    q_gradients,
    q_targets,
    soft_values,
    token_values,
)
from selfeval.training.replay import Replay, Replayed
from selfeval.training.setting import POLICY, REFERENCE, Prompt, Samples, Scores, Setting


def pool_of(setting: Setting, prompts: list[Prompt], replies: list[tuple[int, ...]]) -> Replayed:
    """The replies, remembered and drawn in this order."""
    samples = Samples(prompts, [Rollout(r, (0.0,) * len(r), True) for r in replies])
    experience = observe(setting, samples, Scores(torch.zeros(len(replies))), RewardScale(0.0, 1.0, 3.0), 0.0)
    replay = Replay(len(replies))
    replay.add(experience)
    pool = replay.sample(setting.backbone, len(replies), random.Random(0))
    order = [replies.index(tuple(row[kept].tolist())) for row, kept in zip(pool.policy_batch.reply_BR, pool.mask, strict=True)]
    return pool.rows(torch.tensor(order).argsort())


def twins(temperature: float = 1.0) -> tuple[Setting, Replayed]:
    """Target roles with values of their own, and replies of several lengths."""
    setting = setting_of(four_roles(), CONFIG.model_copy(update={"temperature": temperature}))
    add_twins(setting)
    for number, role in enumerate((*TWINS, *TARGETS)):
        tiny_models.scramble(setting.backbone, role, seed=number, size=0.1)
    generator = random.Random(3)
    replies = [tuple(generator.randrange(2, 40) for _ in range(1 + n % LIMIT)) for n in range(6)]
    return setting, pool_of(setting, PROMPTS, replies)


def plain_values(setting: Setting, role: str, prompt: Prompt, reply: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Q of every token before each reply token `[R, V]`, and the reference's log-probs: plain passes over one sequence."""
    backbone, temperature, ids = setting.backbone, setting.config.temperature, (*prompt.reply, *reply)
    before = slice(len(prompt.reply) - 1, len(ids) - 1)
    with backbone.acting_as(REFERENCE):
        ref = tiny_models.full_logprobs(backbone.model, ids, temperature)[before]
    with torch.no_grad(), backbone.acting_as(role):
        ours = tiny_models.full_logprobs(backbone.model, ids, temperature)[before]
        states = backbone.model.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0, before]
    head = backbone.heads[role]
    return (states @ head.weight[0] + head.bias)[:, None] + 0.25 * (ours - ref), ref


def test_values_start_at_zero_and_their_targets_with_them() -> None:
    bare = tiny_models.backbone()
    bare.add_role(POLICY)
    bare.add_snapshot(REFERENCE, of=POLICY)
    for backbone in (bare, four_roles()):  # also where the policy is not the bare base
        setting = setting_of(backbone)
        add_twins(setting)
        pool = pool_of(setting, PROMPTS, [(5 + n, 9, 2) for n in range(6)])
        for role in (*TWINS, *TARGETS):
            with torch.no_grad(), backbone.acting_as(role):
                b, rest = token_values(setting, role, pool)
            assert (b.abs() + rest.abs()).max() < 1e-5


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_of_tokens_equal_the_definition(temperature: float) -> None:
    setting, pool = twins(temperature)
    lower = lower_values(setting, pool)
    for row, (prompt, kept) in enumerate(zip(PROMPTS, pool.mask, strict=True)):
        reply = tuple(pool.policy_batch.reply_BR[row, kept].tolist())
        both = [plain_values(setting, role, prompt, reply)[0] for role in TARGETS]
        taken = [q.gather(1, torch.tensor(reply)[:, None])[:, 0] for q in both]
        assert lower[row, kept].tolist() == pytest.approx(torch.minimum(*taken).tolist(), abs=1e-4)
        assert (taken[0] - taken[1]).abs().max() > 0.05  # the lower of two that differ


@pytest.mark.parametrize("beta", [0.1, 1.5])
def test_soft_values_equal_the_sum_over_the_vocabulary(beta: float, monkeypatch: pytest.MonkeyPatch) -> None:
    setting, pool = twins(0.7)
    monkeypatch.setattr(action_values, "_CHUNK_BYTES", 4 * 8 * 40 * 4)  # four positions of a vocabulary of 40 at a time
    values, taken = soft_values(setting, pool, beta)
    for row, (prompt, kept) in enumerate(zip(PROMPTS, pool.mask, strict=True)):
        reply = tuple(pool.policy_batch.reply_BR[row, kept].tolist())
        (q_0, ref), (q_1, _) = (plain_values(setting, role, prompt, reply) for role in TARGETS)
        lower = torch.minimum(q_0, q_1).double()
        expected = beta * (ref.double().exp() * (lower / beta).exp()).sum(-1).log()
        assert values[row, kept].tolist() == pytest.approx(expected.tolist(), abs=1e-4)
        assert taken[row, kept].tolist() == pytest.approx(
            lower.gather(1, torch.tensor(reply)[:, None])[:, 0].tolist(), abs=1e-4
        )
        assert not values[row, ~kept].any()


def test_micro_batches_change_neither_values_nor_gradients() -> None:
    setting, pool = twins()
    pool = replace(pool, targets=torch.linspace(-1, 1, pool.mask.numel()).view(pool.mask.shape))
    found = []
    for tokens in (100_000, 1):
        parts = replace(setting, batch_tokens=tokens)
        figures = q_gradients(parts, "q-0", pool)
        named = setting.backbone.parameters("q-0")
        gradients = {n: p.grad.clone() for n, p in named.items() if p.grad is not None}
        for parameter in named.values():
            parameter.grad = None
        values = torch.stack([*soft_values(parts, pool, 0.3), lower_values(parts, pool)])[:, pool.mask]
        found.append((values, figures, gradients))
    (values, figures, gradients), (other_values, other_figures, other_gradients) = found
    torch.testing.assert_close(values, other_values, rtol=0, atol=2e-5)
    assert figures == pytest.approx(other_figures, abs=1e-5)
    assert gradients.keys() == other_gradients.keys() == setting.backbone.parameters("q-0").keys()  # the head's too
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, other_gradients[name], rtol=1e-4, atol=1e-6)
    assert all(p.grad is None for role in ("q-1", *TARGETS, POLICY) for p in setting.backbone.parameters(role).values())


def test_the_gradient_is_that_of_the_weighted_errors_and_log_ratios_learn_from_centred_ones() -> None:
    # Errors below 1, where Huber's loss is half the square. By hand: the gradient of b is -w (y - Q), that of the log-ratios
    # -w (1 - pi_ref) (y - Q - behind), each times 1 / tokens.
    setting, pool = twins()
    backbone = setting.backbone
    values = drawn_values(setting, "q-0", pool)
    errors = torch.linspace(-0.4, 0.8, values.numel()).view(values.shape)
    weights = torch.linspace(1, 0.2, values.numel()).view(values.shape)
    pool = replace(pool, targets=values + errors, weights=weights)
    behind = lag(setting, "q-0", pool)
    mask = pool.mask
    assert behind == pytest.approx(float((weights * errors)[mask].sum() / weights[mask].sum()), abs=1e-5)
    q_gradients(setting, "q-0", pool, behind=behind)
    named = backbone.parameters("q-0")
    with backbone.acting_as("q-0"):
        b_BR, r_BR = token_values(setting, "q-0", pool)
        linear = -(weights * (errors * b_BR + (1 - pool.ref_logprobs.exp()) * (errors - behind) * r_BR))[mask].sum() / int(
            mask.sum()
        )
        expected = torch.autograd.grad(linear, list(named.values()))
    for parameter, gradient in zip(named.values(), expected, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-6)


def test_a_q_role_can_say_any_values() -> None:
    # Every token of the vocabulary after each of two prompts, with values that have nothing to do with the model: 32 numbers
    # of mean 0.7. A Q that lacked b, or whose log-ratios could not leave the reference, would miss them. (A deviation of 0.15
    # is 0.6 nats; the bounded logits of so small a model do not reach many.)
    backbone = tiny_models.backbone("llama", 16, eos=())
    backbone.add_role(POLICY)
    backbone.add_snapshot(REFERENCE, of=POLICY)
    setting = setting_of(backbone, PolicyConfig(learning_rate=1e-2))
    add_twins(setting)
    prompts = [Prompt("a", (3, 5), (3,)), Prompt("b", (7, 2, 9), (7,))]
    pools = [pool_of(setting, [prompt] * 16, [(token,) for token in range(16)]) for prompt in prompts]
    wanted = 0.7 + 0.15 * torch.randn(2, 16, 1, generator=torch.Generator().manual_seed(1))
    parameters = list(backbone.parameters("q-0").values())
    optimizer = AdamW(parameters, lr=0.02, weight_decay=0.0)
    for step in range(300):
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * (1 - step / 300)
        for pool, targets in zip(pools, wanted, strict=True):
            q_gradients(setting, "q-0", replace(pool, targets=targets))
        optimizer.step()
        optimizer.zero_grad()
    for pool, targets in zip(pools, wanted, strict=True):
        torch.testing.assert_close(drawn_values(setting, "q-0", pool), targets, rtol=0, atol=0.01)


def test_targets_go_a_share_of_the_way_and_only_they() -> None:
    setting, _ = twins()
    backbone = setting.backbone
    before = {role: {n: p.detach().clone() for n, p in backbone.parameters(role).items()} for role in backbone.roles}
    follow(backbone, 0.3)
    for target, role in zip(TARGETS, TWINS, strict=True):
        old, online = list(before[target].values()), list(before[role].values())
        for now, was, theirs in zip(backbone.parameters(target).values(), old, online, strict=True):
            torch.testing.assert_close(now, 0.7 * was + 0.3 * theirs, rtol=1e-6, atol=1e-7)
        assert "head.weight" in before[target]
    for role in set(before) - set(TARGETS):
        assert all(torch.equal(p, before[role][n]) for n, p in backbone.parameters(role).items())
    assert not any(p.requires_grad for role in TARGETS for p in backbone.parameters(role).values())


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
