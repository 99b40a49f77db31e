"""One iteration's replies, and what an update needs of them: collect -> score, the first two steps of the loop.

The log-probs that enter the ratio are those captured while sampling, at the one temperature of the policy.

Shapes: B replies, R reply tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from selfeval.algorithms.kl import k1, kl_shaped_rewards
from selfeval.algorithms.masked import masked_mean, zero_padding
from selfeval.algorithms.value_losses import explained_variance
from selfeval.backbone.budget import Phase
from selfeval.backbone.logprobs import Measure, TokenLogprobs, token_logprobs
from selfeval.backbone.roles import Backbone
from selfeval.backbone.sequences import Sequences, pad_sequences, reply_hidden
from selfeval.config import PolicyConfig
from selfeval.rollout.engine import Request, Rollout, generate
from selfeval.rollout.guide import Guide
from selfeval.training.setting import CRITIC, POLICY, REFERENCE, Prompt, Samples, Scores, Setting

__all__ = [
    "Experience",
    "RewardScale",
    "collect",
    "measure",
    "observe",
    "over_microbatches",
    "policy_logprobs",
    "reference_logprobs",
    "rows_of",
    "sample",
    "with_values",
]


@dataclass(frozen=True)
class Experience:
    """One iteration's replies and what the update needs of them; all `[B, R]` unless said otherwise.

    Attributes:
        policy_batch, critic_batch: the same replies after the reply prompt and after the grade prompt.
        groups_B: which replies answer one question.
        scores_B: raw scores.
        logprobs: of the drawn tokens when they were drawn; `ref_logprobs`: under the reference.
        rewards: what the policy is trained on: KL penalty at every token, score in units of the start at the last.
        values, returns: what the critic foresees and what it is to learn; 0 for learners without one.
        advantages: what the policy's gradient is weighted with; 0 until the learner has said.
        kl_coefficient: weight of the KL penalty in the rewards.
    """

    policy_batch: Sequences
    critic_batch: Sequences
    groups_B: Tensor
    scores_B: Tensor
    logprobs: Tensor
    ref_logprobs: Tensor
    rewards: Tensor
    values: Tensor
    returns: Tensor
    advantages: Tensor
    kl_coefficient: float

    @property
    def mask(self) -> Tensor:
        return self.policy_batch.mask_BR

    def rows(self, index: Tensor) -> Experience:
        """The experience of some of the replies."""
        per_reply = ("groups_B", "scores_B", "logprobs", "ref_logprobs", "rewards", "values", "returns", "advantages")
        picked = {name: getattr(self, name)[index] for name in per_reply}
        batches = rows_of(self.policy_batch, index), rows_of(self.critic_batch, index)
        return Experience(*batches, **picked, kl_coefficient=self.kl_coefficient)


@dataclass(frozen=True)
class RewardScale:
    """The units of the reward: scores when the policy was at its start, and how long its replies were.

    Attributes:
        mean, deviation: of the scores; 0 and 1 where rewards are not whitened.
        length: mean tokens of a reply.
    """

    mean: float
    deviation: float
    length: float

    @classmethod
    def of(cls, scores_B: Tensor, samples: Samples, *, whiten: bool) -> RewardScale:
        length = sum(len(r.ids) for r in samples.rollouts) / len(samples.rollouts)
        if not whiten:
            return cls(0.0, 1.0, length)
        # In float64 the mean of equal float32 scores is that score: a rounding error divided by 1e-4 would be a reward.
        exact_B = scores_B.double()
        deviation = float(exact_B.std(correction=0)) if len(scores_B) > 1 else 1.0
        return cls(float(exact_B.mean()), max(deviation, 1e-4), length)

    def units(self, scores: Tensor) -> Tensor:
        """Scores (or values) in units of the start."""
        return (scores - self.mean) / self.deviation

    def reward(self, scores_B: Tensor, finished_B: Tensor, lengths_B: Tensor, config: PolicyConfig) -> Tensor:
        """Reward of whole replies: whitened, clipped, less what an unfinished or an overlong reply costs."""
        reward_B = self.units(scores_B)
        if config.reward_clip:
            reward_B = reward_B.clamp(-config.reward_clip, config.reward_clip)
        reward_B = torch.where(finished_B, reward_B, reward_B - config.unfinished_penalty)
        if config.length_guard:
            reward_B = reward_B - (lengths_B / (config.length_guard * self.length) - 1).clamp_min(0)
        return reward_B

    def as_json(self) -> dict[str, float]:
        return {"mean": self.mean, "deviation": self.deviation, "length": self.length}


def rows_of(batch: Sequences, index: Tensor) -> Sequences:
    """Some of the rows, trimmed to the longest of them; reply positions keep their columns."""
    width = int(batch.attention_BT[index].sum(-1).max())
    return Sequences(
        batch.ids_BT[index, :width],
        batch.attention_BT[index, :width],
        batch.prompt_lengths_B[index],
        batch.reply_BR[index],
        batch.mask_BR[index],
    )


def collect(setting: Setting, prompts: Sequence[Prompt], iteration: int, guide: Guide | None = None) -> Samples:
    """Samples the policy's replies to an iteration's questions.

    Args:
        guide: value functions that bend what the policy samples.
    """
    asked = [p for p in prompts for _ in range(setting.config.replies_per_question)]
    return Samples(asked, sample(setting, asked, setting.sampling_seed(iteration), guide))


def sample(setting: Setting, asked: Sequence[Prompt], seed: int, guide: Guide | None = None) -> list[Rollout]:
    """Samples a reply of the policy to each prompt: one temperature, no top-k, no top-p."""
    requests = [Request(p.reply, temperature=setting.config.temperature) for p in asked]
    with setting.backbone.acting_as(POLICY):
        return generate(setting.backbone, requests, max_new_tokens=setting.limit, seed=seed, rows=setting.rows, guide=guide)


@torch.no_grad()
def over_microbatches(setting: Setting, batch: Sequences, compute: Callable[[Sequences], Tensor]) -> Tensor:
    """`compute` on micro-batches of rows, put together as `[B, R]`."""
    result = torch.zeros(batch.mask_BR.shape, device=batch.mask_BR.device)

    def fill(group: list[int]) -> None:
        index = torch.tensor(group, device=result.device)
        result[index] = compute(rows_of(batch, index))

    budget, sizes = setting.backbone.budget, batch.attention_BT.sum(-1).tolist()
    for _ in budget.in_groups(Phase.SCORE, sizes, setting.batch_tokens, fill):
        pass
    return result


def policy_logprobs(
    backbone: Backbone, batch: Sequences, temperature: float, *, gradient: Sequence[Measure] = ("logprobs",)
) -> TokenLogprobs:
    """Log-probs and entropies of the reply tokens under the acting role."""
    hidden_BRD = reply_hidden(backbone, batch)
    return token_logprobs(
        backbone, hidden_BRD, batch.reply_BR, batch.mask_BR, temperature=temperature, entropy=True, gradient=gradient
    )


def reference_logprobs(setting: Setting, batch: Sequences) -> Tensor:
    """Log-probs of the reply tokens under the reference, at the policy's temperature."""
    backbone, temperature = setting.backbone, setting.config.temperature

    def compute(part: Sequences) -> Tensor:
        hidden_BRD = reply_hidden(backbone, part)
        return token_logprobs(backbone, hidden_BRD, part.reply_BR, part.mask_BR, temperature=temperature).logprobs

    with backbone.acting_as(REFERENCE):
        return over_microbatches(setting, batch, compute)


def observe(setting: Setting, samples: Samples, scores: Scores, scale: RewardScale, kl_coefficient: float) -> Experience:
    """Rewards of one iteration's replies: the score in units of the start, and the KL penalty of every token."""
    backbone, config, replies = setting.backbone, setting.config, [r.ids for r in samples.rollouts]
    policy_batch = pad_sequences(backbone, [p.reply for p in samples.asked], replies)
    critic_batch = pad_sequences(backbone, [p.grade for p in samples.asked], replies)
    mask, device = policy_batch.mask_BR, policy_batch.mask_BR.device
    finished_B = torch.tensor([r.finished for r in samples.rollouts], device=device)
    captured = torch.zeros(mask.shape, device=device)
    captured[mask] = torch.tensor([p for r in samples.rollouts for p in r.logprobs], device=device)
    ref = reference_logprobs(setting, policy_batch)
    whole_B = scale.reward(scores.whole_B, finished_B, mask.sum(-1), config)
    rewards = kl_shaped_rewards(whole_B, captured, ref, mask, beta=kl_coefficient)
    if scores.steps_BR is not None:
        rewards = rewards + zero_padding(scores.steps_BR / scale.deviation, mask)
    nothing = torch.zeros_like(captured)
    return Experience(
        policy_batch,
        critic_batch,
        torch.tensor(samples.groups, device=device),
        scores.whole_B,
        captured,
        ref,
        rewards,
        values=nothing,
        returns=nothing,
        advantages=nothing,
        kl_coefficient=kl_coefficient,
    )


def with_values(setting: Setting, experience: Experience, scale: RewardScale) -> Experience:
    """The experience with what the critic foresees, in units of the start."""
    backbone = setting.backbone
    with backbone.acting_as(CRITIC):
        raw = over_microbatches(
            setting, experience.critic_batch, lambda part: backbone.score(CRITIC, reply_hidden(backbone, part))
        )
    return replace(experience, values=scale.units(raw))


def measure(experience: Experience) -> dict[str, float]:
    """What is logged of an iteration before its update."""
    mask = experience.mask
    kl_B = zero_padding(k1(experience.logprobs, experience.ref_logprobs), mask).sum(-1)
    found = {
        "score": float(experience.scores_B.mean()),
        "reward": float(experience.rewards.sum(-1).mean()),
        "kl": float(kl_B.mean()),
        "kl_coefficient": experience.kl_coefficient,
        "length": float(mask.sum(-1).float().mean()),
        "repeated": _repeated(experience),
    }
    if bool(experience.returns.any()):
        found["value"] = float(masked_mean(experience.values, mask))
        found["explained_variance"] = float(explained_variance(experience.values, experience.returns, mask))
    return found


def _repeated(experience: Experience) -> float:
    """Share of the iteration's questions that the most common reply answers."""
    rows = zip(experience.policy_batch.reply_BR.tolist(), experience.mask.sum(-1).tolist(), strict=True)
    answered = {(tuple(ids[:length]), group) for (ids, length), group in zip(rows, experience.groups_B.tolist(), strict=True)}
    questions = len({group for _, group in answered})
    return max(Counter(reply for reply, _ in answered).values()) / questions
