"""The first two steps of the loop, collect and score, and the tensors that an update needs.

The old log-probs of the importance ratio are those captured during sampling, at the sampling temperature. With an engine other
than the backbone's own they are recomputed on the backbone, and the losses get truncated importance weights.

Shapes: B replies, R reply tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from selfeval.algorithms.kl import k1, k3, kl_shaped_rewards
from selfeval.algorithms.masked import masked_mean, zero_padding
from selfeval.algorithms.policy_losses import truncated_importance_weights
from selfeval.algorithms.value_losses import explained_variance
from selfeval.backbone.budget import Phase
from selfeval.backbone.logprobs import Measure, TokenLogprobs, token_logprobs
from selfeval.backbone.roles import Backbone
from selfeval.backbone.sequences import Sequences, pad_sequences, reply_hidden
from selfeval.config import PolicyConfig
from selfeval.quality.bigram_similarity import bigram_similarity
from selfeval.rollout.guide import Guide
from selfeval.rollout.requests import Request, Rollout
from selfeval.training.context import CRITIC, POLICY, REFERENCE, LearnerContext, QuestionPrompts, Samples, Scores

__all__ = [
    "Experience",
    "RewardScale",
    "acting_logprobs",
    "build_experience",
    "collect",
    "experience_metrics",
    "over_microbatches",
    "policy_logprobs",
    "present",
    "reference_logprobs",
    "rows_of",
    "sample",
    "token_values",
    "with_values",
]


@dataclass(frozen=True)
class Experience:
    """The replies of an iteration and the tensors of the update; all `[B, R]` unless stated otherwise.

    Attributes:
        policy_batch, critic_batch: the same replies after the reply prompt and after the grade prompt.
        groups_B: index of each reply's question.
        scores_B: raw scores.
        logprobs: log-probs of the tokens under the policy that sampled them, as the backbone computes them.
        ref_logprobs: log-probs of the tokens under the reference.
        rewards: KL penalty at every token, plus the normalised score at the last token.
        kl_coefficient: weight of the KL penalty in the rewards.
        values, returns: predictions and targets of the critic; None for learners without a critic.
        advantages: weights of the policy gradient; None until the learner has computed them.
        engine_logprobs: log-probs as another engine sampled them; None if the backbone did.
        engine_weights: truncated importance weights of its tokens; None if the backbone sampled them.
    """

    policy_batch: Sequences
    critic_batch: Sequences
    groups_B: Tensor
    scores_B: Tensor
    logprobs: Tensor
    ref_logprobs: Tensor
    rewards: Tensor
    kl_coefficient: float
    values: Tensor | None = None
    returns: Tensor | None = None
    advantages: Tensor | None = None
    engine_logprobs: Tensor | None = None
    engine_weights: Tensor | None = None

    @property
    def mask(self) -> Tensor:
        return self.policy_batch.mask_BR

    def rows(self, index: Tensor) -> Experience:
        """Return the experience of the replies at these indices."""

        def pick(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[index]

        return Experience(
            rows_of(self.policy_batch, index),
            rows_of(self.critic_batch, index),
            self.groups_B[index],
            self.scores_B[index],
            self.logprobs[index],
            self.ref_logprobs[index],
            self.rewards[index],
            self.kl_coefficient,
            values=pick(self.values),
            returns=pick(self.returns),
            advantages=pick(self.advantages),
            engine_logprobs=pick(self.engine_logprobs),
            engine_weights=pick(self.engine_weights),
        )

    def weighted(self, per_token_BR: Tensor) -> Tensor:
        """Multiply a loss or gain per token by the importance weights; without another engine it is unchanged."""
        return per_token_BR if self.engine_weights is None else per_token_BR * self.engine_weights

    def sliced(self, rows: slice) -> Experience:
        """Return the experience of a slice of the replies."""
        return self if rows == slice(None) else self.rows(torch.arange(len(self.scores_B), device=self.mask.device)[rows])


def present(tensor: Tensor | None) -> Tensor:
    """Return an optional tensor of the experience that is known to be set."""
    assert tensor is not None
    return tensor


@dataclass(frozen=True)
class RewardScale:
    """Normalisation of the reward: statistics of the first iteration's scores and lengths.

    Attributes:
        mean, deviation: mean and standard deviation of the scores; 0 and 1 if rewards are not whitened.
        length: mean tokens per reply.
    """

    mean: float
    deviation: float
    length: float

    @classmethod
    def of(cls, scores_B: Tensor, samples: Samples, *, whiten: bool) -> RewardScale:
        length = sum(len(r.ids) for r in samples.rollouts) / len(samples.rollouts)
        if not whiten:
            return cls(0.0, 1.0, length)
        # In float64 the mean of equal float32 scores is exactly that score. In float32 it may be off by a rounding error, which
        # the division by 1e-4 below would turn into a reward.
        exact_B = scores_B.double()
        deviation = float(exact_B.std(correction=0)) if len(scores_B) > 1 else 1.0
        return cls(float(exact_B.mean()), max(deviation, 1e-4), length)

    def units(self, scores: Tensor) -> Tensor:
        """Normalise scores (or values)."""
        return (scores - self.mean) / self.deviation

    def reward(self, scores_B: Tensor, finished_B: Tensor, lengths_B: Tensor, config: PolicyConfig) -> Tensor:
        """Compute the reward of whole replies: whitened, clipped, minus the penalties for unfinished and overlong replies."""
        reward_B = self.units(scores_B)
        if config.reward_clip is not None:
            reward_B = reward_B.clamp(-config.reward_clip, config.reward_clip)
        # The penalties follow the clip: before it, they would vanish for a reply whose score is already clipped from below.
        reward_B = torch.where(finished_B, reward_B, reward_B - config.unfinished_penalty)
        if config.length_guard is not None:
            # One unit of reward for each further multiple of the allowed length, which is relative to the initial mean.
            reward_B = reward_B - (lengths_B / (config.length_guard * self.length) - 1).clamp_min(0)
        return reward_B

    def as_json(self) -> dict[str, float]:
        return {"mean": self.mean, "deviation": self.deviation, "length": self.length}


def rows_of(batch: Sequences, index: Tensor) -> Sequences:
    """Return the rows at these indices, trimmed to the longest of them; reply positions keep their columns."""
    width = int(batch.attention_BT[index].sum(-1).max())
    return Sequences(
        batch.ids_BT[index, :width],
        batch.attention_BT[index, :width],
        batch.prompt_lengths_B[index],
        batch.reply_BR[index],
        batch.mask_BR[index],
        batch.owners_B[index],
    )


def collect(context: LearnerContext, prompts: Sequence[QuestionPrompts], iteration: int, guide: Guide | None = None) -> Samples:
    """Sample the policy's replies to the questions of an iteration.

    Args:
        context: shared context of policy learning.
        prompts: one per question; each is repeated `replies_per_question` times.
        iteration: determines the sampling seed.
        guide: Optional. Value guidance to apply when sampling.
    """
    asked = [p for p in prompts for _ in range(context.config.replies_per_question)]
    return Samples(asked, sample(context, asked, context.sampling_seed(iteration), guide))


def sample(context: LearnerContext, asked: Sequence[QuestionPrompts], seed: int, guide: Guide | None = None) -> list[Rollout]:
    """Sample a reply of the policy to each prompt.

    There is no top-k and no top-p: the captured log-probs must be those of the full distribution, which the update uses.
    """
    requests = [Request(p.reply, temperature=context.config.temperature) for p in asked]
    with context.backbone.acting_as(POLICY):
        return context.engine.generate(
            context.backbone,
            requests,
            max_new_tokens=context.limit,
            seed=seed,
            batch_size=context.batch_size,
            guide=guide,
            thinking=context.thinking,
        )


@torch.no_grad()
def over_microbatches(context: LearnerContext, batch: Sequences, compute: Callable[[Sequences], Tensor]) -> Tensor:
    """Apply `compute` to micro-batches of rows and concatenate the results to `[B, R]`."""
    result = torch.zeros(batch.mask_BR.shape, device=batch.mask_BR.device)

    def of_group(group: list[int]) -> Tensor:
        return compute(rows_of(batch, torch.tensor(group, device=result.device)))

    backbone, numbers = context.backbone, batch.prompt_numbers(context.backbone)
    for group, found in backbone.budget.in_groups(Phase.SCORE, batch.sizes, context.batch_tokens, of_group, numbers):
        result[torch.tensor(group, device=result.device)] = found.to(result)
    return result


def policy_logprobs(
    backbone: Backbone, batch: Sequences, temperature: float, *, gradient: Sequence[Measure] = ("logprobs",)
) -> TokenLogprobs:
    """Compute log-probs and entropies of the reply tokens under the acting role."""
    hidden_BRD = reply_hidden(backbone, batch)
    return token_logprobs(
        backbone, hidden_BRD, batch.reply_BR, batch.mask_BR, temperature=temperature, entropy=True, gradient=gradient
    )


def acting_logprobs(context: LearnerContext, batch: Sequences) -> Tensor:
    """Compute log-probs of the reply tokens of a micro-batch under the acting role, at the policy's temperature."""
    hidden_BRD, temperature = reply_hidden(context.backbone, batch), context.config.temperature
    return token_logprobs(context.backbone, hidden_BRD, batch.reply_BR, batch.mask_BR, temperature=temperature).logprobs


def reference_logprobs(context: LearnerContext, batch: Sequences) -> Tensor:
    """Compute log-probs of the reply tokens under the reference, at the policy's temperature."""
    with context.backbone.acting_as(REFERENCE):
        return over_microbatches(context, batch, lambda part: acting_logprobs(context, part))


def build_experience(
    context: LearnerContext, samples: Samples, scores: Scores, scale: RewardScale, kl_coefficient: float
) -> Experience:
    """Build the experience of an iteration, with the normalised score and the KL penalty of every token as rewards."""
    backbone, config, replies = context.backbone, context.config, [r.ids for r in samples.rollouts]
    # The replies are the same in both, so their reply columns agree and one mask fits tensors computed from either.
    policy_batch = pad_sequences(backbone, [p.reply for p in samples.asked], replies)
    critic_batch = pad_sequences(backbone, [p.grade for p in samples.asked], replies)
    mask, device = policy_batch.mask_BR, policy_batch.mask_BR.device
    finished_B = torch.tensor([r.finished for r in samples.rollouts], device=device)
    captured = torch.zeros(mask.shape, device=device)
    # Boolean indexing fills the mask row by row, which is the order of this flat list.
    captured[mask] = torch.tensor([p for r in samples.rollouts for p in r.logprobs], device=device)
    logprobs, engine_weights = captured, None
    if (limit := context.engine.max_weight) is not None:
        with backbone.acting_as(POLICY):
            logprobs = over_microbatches(context, policy_batch, lambda part: acting_logprobs(context, part))
        engine_weights = truncated_importance_weights(logprobs, captured, limit=limit)
    ref = reference_logprobs(context, policy_batch)
    whole_B = scale.reward(scores.whole_B, finished_B, mask.sum(-1), config)
    rewards = kl_shaped_rewards(whole_B, logprobs, ref, mask, beta=kl_coefficient)
    if scores.steps_BR is not None:
        # Divided by the deviation but not centred: the mean was subtracted once, from the score of the whole reply.
        rewards = rewards + zero_padding(scores.steps_BR / scale.deviation, mask)
    return Experience(
        policy_batch,
        critic_batch,
        torch.tensor(samples.groups, device=device),
        scores.whole_B,
        logprobs,
        ref,
        rewards,
        kl_coefficient=kl_coefficient,
        engine_logprobs=None if engine_weights is None else captured,
        engine_weights=engine_weights,
    )


def token_values(context: LearnerContext, batch: Sequences) -> Tensor:
    """Compute the critic's raw values before each reply token of a micro-batch; the critic must be acting."""
    return context.backbone.score(CRITIC, reply_hidden(context.backbone, batch))


def with_values(context: LearnerContext, experience: Experience, scale: RewardScale) -> Experience:
    """Return the experience with the critic's values, normalised like the scores."""
    with context.backbone.acting_as(CRITIC):
        raw = over_microbatches(context, experience.critic_batch, lambda part: token_values(context, part))
    return replace(experience, values=scale.units(raw))


def experience_metrics(experience: Experience) -> dict[str, float]:
    """Compute the metrics of an iteration before its update."""
    mask = experience.mask
    # Summed over the reply: nats per reply, as in `kl_target`. The estimate k1 is unbiased but may be negative.
    kl_B = zero_padding(k1(experience.logprobs, experience.ref_logprobs), mask).sum(-1)
    found = {
        "score": float(experience.scores_B.mean()),
        "reward": float(experience.rewards.sum(-1).mean()),
        "kl": float(kl_B.mean()),
        "kl_coefficient": experience.kl_coefficient,
        "length": float(mask.sum(-1).float().mean()),
        **_sameness(experience),
    }
    if experience.values is not None and experience.returns is not None:
        found["value"] = float(masked_mean(experience.values, mask))
        found["explained_variance"] = float(explained_variance(experience.values, experience.returns, mask))
    return found | _engine_metrics(experience)


def _engine_metrics(experience: Experience) -> dict[str, float]:
    """Compare the log-probs of another engine with the backbone's; empty if the backbone sampled the replies."""
    theirs, weights, mask = experience.engine_logprobs, experience.engine_weights, experience.mask
    if theirs is None or weights is None:
        return {}
    difference = zero_padding((theirs - experience.logprobs).abs(), mask)
    ratio = (experience.logprobs - theirs).exp()
    return {
        "engine_difference": float(masked_mean(difference, mask)),
        "engine_max_difference": float(difference.max()),
        "engine_kl": float(masked_mean(k3(theirs, experience.logprobs), mask)),
        "engine_weight": float(masked_mean(weights, mask)),
        "engine_truncated": float(masked_mean((ratio > weights).float(), mask)),
    }


def _sameness(experience: Experience) -> dict[str, float]:
    """Compute how similar the replies to different questions are."""
    rows = zip(experience.policy_batch.reply_BR.tolist(), experience.mask.sum(-1).tolist(), strict=True)
    # Sets: equal replies to the same question count once.
    replies: dict[int, set[tuple[int, ...]]] = {}
    for (ids, length), group in zip(rows, experience.groups_B.tolist(), strict=True):
        replies.setdefault(group, set()).add(tuple(ids[:length]))
    most = max(Counter(reply for group in replies.values() for reply in group).values())
    found = {"repeated": most / len(replies)}
    similarity = bigram_similarity([sorted(group) for group in replies.values()])
    return found if similarity is None else {**found, "similarity": similarity}
