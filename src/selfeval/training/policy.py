"""PPO on one backbone: policy, frozen reference, evaluator and critic are roles; only policy and critic learn.

One iteration: collect -> score -> advantage -> update -> log. The log-probs that enter the ratio are those captured while
sampling, at the one temperature of the policy. The critic starts as a copy of the evaluator (its adapter and head), as in
Huang et al. 2024, https://arxiv.org/abs/2403.17031, and reads what the evaluator reads.

Shapes: B replies, R reply tokens.
"""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from selfeval.algorithms.controllers import adaptive_kl_coefficient
from selfeval.algorithms.kl import k1, kl_shaped_rewards
from selfeval.algorithms.masked import masked_mean, masked_sum, whiten
from selfeval.algorithms.policy_losses import approximate_kl, clip_fraction, ppo_clip_loss
from selfeval.algorithms.returns import gae
from selfeval.algorithms.value_losses import clipped_value_loss, explained_variance
from selfeval.backbone.budget import Phase
from selfeval.backbone.logprobs import TokenLogprobs, token_logprobs
from selfeval.backbone.roles import Backbone
from selfeval.backbone.sequences import Sequences, pad_sequences, reply_hidden
from selfeval.config import PolicyConfig
from selfeval.errors import LoopError
from selfeval.rollout.engine import Request, Rollout, generate
from selfeval.training.checkpoint import Checkpoints, role_optimizer
from selfeval.training.evaluator import EVALUATOR, score_replies
from selfeval.training.gradients import add_gradients
from selfeval.training.watchdogs import Alarm, check_iteration

__all__ = ["CRITIC", "POLICY", "REFERENCE", "Experience", "Prompt", "train_policy"]

POLICY, REFERENCE, CRITIC = "policy", "reference", "critic"


@dataclass(frozen=True)
class Prompt:
    """A training question as the policy reads it and as evaluator and critic read it."""

    question_id: str
    reply: tuple[int, ...]
    grade: tuple[int, ...]


@dataclass(frozen=True)
class Experience:
    """One iteration's replies and what the update needs of them; all `[B, R]` unless said otherwise.

    Attributes:
        policy_batch, critic_batch: the same replies after the reply prompt and after the grade prompt.
        scores_B: raw evaluator scores.
        logprobs, ref_logprobs, values, advantages, returns: per reply token.
        rewards: what the policy is trained on: KL penalty at every token, whitened score at the last.
    """

    policy_batch: Sequences
    critic_batch: Sequences
    scores_B: Tensor
    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    rewards: Tensor

    @property
    def mask(self) -> Tensor:
        return self.policy_batch.mask_BR

    def rows(self, index: Tensor) -> Experience:
        """The experience of some of the replies."""
        per_reply = ("scores_B", "logprobs", "ref_logprobs", "values", "advantages", "returns", "rewards")
        picked = {name: getattr(self, name)[index] for name in per_reply}
        return Experience(_rows(self.policy_batch, index), _rows(self.critic_batch, index), **picked)


def _rows(batch: Sequences, index: Tensor) -> Sequences:
    """Some of the rows, trimmed to the longest of them; reply positions keep their columns."""
    width = int(batch.attention_BT[index].sum(-1).max())
    return Sequences(
        batch.ids_BT[index, :width],
        batch.attention_BT[index, :width],
        batch.prompt_lengths_B[index],
        batch.reply_BR[index],
        batch.mask_BR[index],
    )


def _collect(
    backbone: Backbone, prompts: Sequence[Prompt], config: PolicyConfig, limit: int, rows: int, seed: int
) -> tuple[list[Prompt], list[Rollout]]:
    asked = [p for p in prompts for _ in range(config.replies_per_question)]
    requests = [Request(p.reply, temperature=config.temperature) for p in asked]
    with backbone.acting_as(POLICY):
        return asked, generate(backbone, requests, max_new_tokens=limit, seed=seed, rows=rows)


@torch.no_grad()
def _over_microbatches(
    backbone: Backbone, batch: Sequences, batch_tokens: int, compute: Callable[[Sequences], Tensor]
) -> Tensor:
    """`compute` on micro-batches of rows, put together as `[B, R]`."""
    result = torch.zeros(batch.mask_BR.shape, device=batch.mask_BR.device)

    def fill(group: list[int]) -> None:
        index = torch.tensor(group, device=result.device)
        result[index] = compute(_rows(batch, index))

    for _ in backbone.budget.in_groups(Phase.SCORE, batch.attention_BT.sum(-1).tolist(), batch_tokens, fill):
        pass
    return result


def _logprobs(backbone: Backbone, batch: Sequences, temperature: float, *, entropy: bool = False) -> TokenLogprobs:
    hidden_BRD = reply_hidden(backbone, batch)
    return token_logprobs(backbone, hidden_BRD, batch.reply_BR, batch.mask_BR, temperature=temperature, entropy=entropy)


def _values(backbone: Backbone, batch: Sequences) -> Tensor:
    return backbone.score(CRITIC, reply_hidden(backbone, batch))


@dataclass(frozen=True)
class _Whitening:
    """Mean and deviation of the evaluator's scores when the policy was at its start; rewards are in these units."""

    mean: float
    deviation: float

    @classmethod
    def of(cls, scores_B: Tensor) -> _Whitening:
        deviation = float(scores_B.std(correction=0)) if len(scores_B) > 1 else 1.0
        return cls(float(scores_B.mean()), max(deviation, 1e-4))

    def reward(self, scores_B: Tensor, finished_B: Tensor, config: PolicyConfig) -> Tensor:
        reward = ((scores_B - self.mean) / self.deviation).clamp(-config.reward_clip, config.reward_clip)
        return torch.where(finished_B, reward, reward - config.unfinished_penalty)


def _experience(
    backbone: Backbone,
    asked: Sequence[Prompt],
    rollouts: Sequence[Rollout],
    whitening: _Whitening | None,
    kl_coefficient: float,
    config: PolicyConfig,
    batch_tokens: int,
) -> tuple[Experience, _Whitening]:
    """Scores, values and advantages of one iteration's rollouts."""
    replies = [r.ids for r in rollouts]
    policy_batch = pad_sequences(backbone, [p.reply for p in asked], replies)
    critic_batch = pad_sequences(backbone, [p.grade for p in asked], replies)
    device, mask = policy_batch.mask_BR.device, policy_batch.mask_BR
    scores_B = torch.tensor(score_replies(backbone, EVALUATOR, [p.grade for p in asked], replies, batch_tokens), device=device)
    whitening = whitening or _Whitening.of(scores_B)
    finished_B = torch.tensor([r.finished for r in rollouts], device=device)
    captured = torch.zeros(mask.shape, device=device)
    captured[mask] = torch.tensor([p for r in rollouts for p in r.logprobs], device=device)
    with backbone.acting_as(REFERENCE):
        ref = _over_microbatches(
            backbone, policy_batch, batch_tokens, lambda b: _logprobs(backbone, b, config.temperature).logprobs
        )
    with backbone.acting_as(CRITIC):
        values = _over_microbatches(backbone, critic_batch, batch_tokens, lambda b: _values(backbone, b))
    values = (values - whitening.mean) / whitening.deviation
    rewards = kl_shaped_rewards(whitening.reward(scores_B, finished_B, config), captured, ref, mask, beta=kl_coefficient)
    raw = gae(rewards, values, mask, gamma=config.gamma, lam=config.gae_lambda)
    returns = torch.where(mask, raw + values, 0.0)
    return Experience(
        policy_batch, critic_batch, scores_B, captured, ref, values, whiten(raw, mask), returns, rewards
    ), whitening


def _update_policy(backbone: Backbone, part: Experience, config: PolicyConfig, batch_tokens: int) -> dict[str, float]:
    """Gradients of the clipped loss for one minibatch; token mean over the whole minibatch whatever the micro-batches."""
    tokens, parameters = int(part.mask.sum()), list(backbone.parameters(POLICY).values())

    def of_group(group: list[int]) -> dict[str, float]:
        rows = part.rows(torch.tensor(group, device=part.mask.device))
        logprobs, entropy, _ = _logprobs(backbone, rows.policy_batch, config.temperature, entropy=True)
        assert entropy is not None
        loss = ppo_clip_loss(logprobs, rows.logprobs, rows.advantages, clip_low=config.clip, clip_high=config.clip)
        summed = masked_sum(loss, rows.mask)
        found = _policy_sums(rows, logprobs.detach(), entropy.detach(), config)
        found["policy_loss"] = summed.item()
        add_gradients(summed / tokens, parameters)
        return found

    sums: dict[str, float] = defaultdict(float)
    with backbone.acting_as(POLICY):
        sizes = part.policy_batch.attention_BT.sum(-1).tolist()
        for _, found in backbone.budget.in_groups(Phase.UPDATE, sizes, batch_tokens, of_group):
            for name, value in found.items():
                sums[name] += value / tokens
    return dict(sums)


@torch.no_grad()
def _policy_sums(rows: Experience, logprobs: Tensor, entropy: Tensor, config: PolicyConfig) -> dict[str, float]:
    """What is logged of one micro-batch, summed over its tokens."""
    count = int(rows.mask.sum())
    clipped = clip_fraction(logprobs, rows.logprobs, rows.advantages, rows.mask, clip_low=config.clip, clip_high=config.clip)
    return {
        "entropy": float(masked_sum(entropy, rows.mask)),
        "clip_fraction": float(clipped) * count,
        "approximate_kl": float(approximate_kl(logprobs, rows.logprobs, rows.mask)) * count,
        "ratio_gap": float(masked_sum((logprobs - rows.logprobs).exp().sub(1).abs(), rows.mask)),
    }


def _update_critic(
    backbone: Backbone, part: Experience, whitening: _Whitening, config: PolicyConfig, batch_tokens: int
) -> dict[str, float]:
    tokens, parameters = int(part.mask.sum()), list(backbone.parameters(CRITIC).values())

    def of_group(group: list[int]) -> float:
        rows = part.rows(torch.tensor(group, device=part.mask.device))
        values = (_values(backbone, rows.critic_batch) - whitening.mean) / whitening.deviation
        loss = masked_sum(clipped_value_loss(values, rows.values, rows.returns, clip=config.value_clip), rows.mask)
        found = loss.item()
        add_gradients(loss / tokens, parameters)
        return found

    total = 0.0
    with backbone.acting_as(CRITIC):
        sizes = part.critic_batch.attention_BT.sum(-1).tolist()
        for _, found in backbone.budget.in_groups(Phase.UPDATE, sizes, batch_tokens, of_group):
            total += found / tokens
    return {"value_loss": total}


def _learning_rate_factor(iteration: int, config: PolicyConfig) -> float:
    rising = min(1.0, iteration / max(1, config.warmup_iterations + 1))
    falling = 1.0 - 0.9 * (iteration - 1) / max(1, config.iterations)
    return min(rising, falling)


class _Loop:
    """What one policy training carries from iteration to iteration."""

    def __init__(self, backbone: Backbone, config: PolicyConfig, seed: int, batch_tokens: int) -> None:
        self.backbone, self.config, self.seed, self.batch_tokens = backbone, config, seed, batch_tokens
        self.parameters = {role: backbone.parameters(role) for role in (POLICY, CRITIC)}
        rates = {POLICY: config.learning_rate, CRITIC: config.critic_learning_rate}
        self.rates = rates
        self.optimizers = {role: role_optimizer(p, rates[role]) for role, p in self.parameters.items()}
        self.kl_coefficient = config.kl_coefficient
        self.whitening: _Whitening | None = None
        self.first: dict[str, float] = {}

    def state(self) -> dict[str, Any]:
        assert self.whitening is not None
        scale = {"mean": self.whitening.mean, "deviation": self.whitening.deviation}
        return {"kl_coefficient": self.kl_coefficient, "whitening": scale, "first": self.first}

    def load(self, state: Mapping[str, Any]) -> None:
        self.kl_coefficient = float(state["kl_coefficient"])
        self.whitening = _Whitening(**state["whitening"])
        self.first = dict(state["first"])

    def update(self, experience: Experience, iteration: int) -> dict[str, float]:
        """Epochs of minibatch steps; mean metrics, and the ratio gap of the very first minibatch."""
        assert self.whitening is not None
        factor = _learning_rate_factor(iteration, self.config)
        rows: list[dict[str, float]] = []
        for epoch in range(self.config.epochs):
            order = list(range(len(experience.scores_B)))
            random.Random(f"{self.seed}/policy/{iteration}/{epoch}").shuffle(order)
            for start in range(0, len(order), self.config.minibatch):
                part = experience.rows(
                    torch.tensor(order[start : start + self.config.minibatch], device=experience.mask.device)
                )
                values = _update_policy(self.backbone, part, self.config, self.batch_tokens)
                values["grad_norm"] = self._apply(POLICY, factor)  # before the critic's, so that one role's gradients are held
                values |= _update_critic(self.backbone, part, self.whitening, self.config, self.batch_tokens)
                self._apply(CRITIC, factor)
                rows.append(values)
        means = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0] if name != "ratio_gap"}
        return {**means, "first_ratio": rows[0]["ratio_gap"], "learning_rate": self.config.learning_rate * factor}

    def _apply(self, role: str, factor: float) -> float:
        """One optimizer step of a role; returns the norm of its gradient."""
        optimizer = self.optimizers[role]
        for group in optimizer.param_groups:
            group["lr"] = self.rates[role] * factor
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters[role].values(), self.config.max_grad_norm))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm


def _measure(experience: Experience, kl_coefficient: float) -> dict[str, float]:
    mask = experience.mask
    kl_B = torch.where(mask, k1(experience.logprobs, experience.ref_logprobs), 0.0).sum(-1)
    return {
        "score": float(experience.scores_B.mean()),
        "reward": float(experience.rewards.sum(-1).mean()),
        "kl": float(kl_B.mean()),
        "kl_coefficient": kl_coefficient,
        "length": float(mask.sum(-1).float().mean()),
        "value": float(masked_mean(experience.values, mask)),
        "explained_variance": float(explained_variance(experience.values, experience.returns, mask)),
    }


def train_policy(
    backbone: Backbone,
    prompts: Sequence[Prompt],
    config: PolicyConfig,
    checkpoints: Callable[[Mapping[str, Any]], Checkpoints],
    *,
    seed: int,
    limit: int,
    rows: int,
    batch_tokens: int,
    keep: Callable[[int, Sequence[Prompt], Sequence[Rollout], Sequence[float]], None],
    log: Callable[[dict[str, float], Sequence[Alarm]], None],
    resumed: Callable[[int], None],
) -> None:
    """Trains the roles `policy` and `critic`, which exist and are at their start, from the last checkpoint if there is one.

    Args:
        prompts: training questions; they are gone through in a fixed random order, again and again.
        limit: token limit of a reply.
        rows: replies side by side while sampling.
        keep: called with each iteration's number, prompts, rollouts and scores.
        log: called with its metrics and what the watchdogs saw.
        resumed: called with the iteration of the checkpoint that training goes on from (0 at a fresh start).

    Raises:
        LoopError: a watchdog stopped the training.
    """
    loop = _Loop(backbone, config, seed, batch_tokens)
    keeper = checkpoints(loop.optimizers)
    state = keeper.restore()
    iteration = int(state["step"]) if state else 0
    if state:
        loop.load(state)
    resumed(iteration)
    while iteration < config.iterations:
        iteration += 1
        started = time.monotonic()
        asked, rollouts = _collect(
            backbone, _next_prompts(prompts, config, seed, iteration), config, limit, rows, _sampling_seed(seed, iteration)
        )
        experience, loop.whitening = _experience(
            backbone, asked, rollouts, loop.whitening, loop.kl_coefficient, config, batch_tokens
        )
        values = {"step": float(iteration), **_measure(experience, loop.kl_coefficient)}
        values |= loop.update(experience, iteration)
        loop.first = loop.first or values
        keep(iteration, asked, rollouts, experience.scores_B.tolist())
        alarms = check_iteration(values, loop.first, config)
        log({**values, "seconds": time.monotonic() - started}, alarms)
        stopping = [a for a in alarms if a.action == "stop"]
        if stopping:
            raise LoopError(f"policy training stopped at iteration {iteration}: {stopping[0].message}")
        loop.kl_coefficient = adaptive_kl_coefficient(
            loop.kl_coefficient, values["kl"], target=config.kl_target, horizon=config.kl_horizon, samples=len(asked)
        )
        if iteration % config.checkpoint_every == 0 and iteration < config.iterations:
            keeper.save(iteration, loop.state())


def _next_prompts(prompts: Sequence[Prompt], config: PolicyConfig, seed: int, iteration: int) -> list[Prompt]:
    """The prompts of one iteration: a window of an endless sequence of shuffles."""
    picked = []
    start = (iteration - 1) * config.questions_per_iteration
    for position in range(start, start + config.questions_per_iteration):
        order = list(range(len(prompts)))
        random.Random(f"{seed}/prompts/{position // len(prompts)}").shuffle(order)
        picked.append(prompts[order[position % len(prompts)]])
    return picked


def _sampling_seed(seed: int, iteration: int) -> int:
    return random.Random(f"{seed}/rollout/{iteration}").getrandbits(48)
