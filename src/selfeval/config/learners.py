"""The policy learners: the settings of each, and the registry of the facts that the rest of the package needs about it.

A new learner is one file in `training/learners/`, one section class and one row of `LEARNERS` here, its oracle test, and its
row in the docs; CONTRIBUTING.md lists all places. The implementations are given as strings and imported on demand, because this
package must not import torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, model_validator

from selfeval.config.fields import Count, FractionOrNone, Positive, PositiveOrNone, Section, Share, ShareOrNone

__all__ = [
    "LEARNERS",
    "ClippedConfig",
    "CriticConfig",
    "DPOConfig",
    "EntropyFloorConfig",
    "GRPOConfig",
    "ILQLConfig",
    "LearnerConfig",
    "LearnerSpec",
    "PPOConfig",
    "PolicyGradientConfig",
    "RAFTConfig",
    "RLOOConfig",
    "ReMaxConfig",
    "ReinforcePPConfig",
    "SoftQConfig",
    "TRPOConfig",
    "ValueLearnerConfig",
]


class LearnerConfig(Section):
    """Base class of the learners' sections."""

    @property
    def reads_kept_pairs(self) -> bool:
        """Whether the learner trains on the pairs labelled by the judge instead of the replies that it samples."""
        return False


class EntropyFloorConfig(LearnerConfig):
    """Shared by learners with an optional entropy bonus."""

    entropy_floor: ShareOrNone = None
    """Share of the initial entropy below which an entropy bonus is added; none: no bonus."""


class PolicyGradientConfig(EntropyFloorConfig):
    """Shared by learners that take several gradient steps per iteration."""

    step_kl: PositiveOrNone = 5e-3
    """Approximate KL per iteration, in nats per token, above which the following steps are shortened; none: no limit."""


class ClippedConfig(PolicyGradientConfig):
    """Shared by learners with a clipped surrogate loss."""

    clip: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    """Clip range of the probability ratio (PPO's epsilon)."""
    clip_high: PositiveOrNone = None
    """Upper half-width of the clip range (DAPO's clip-higher uses 0.28); none: same as `clip`."""
    dual_clip: PositiveOrNone = None
    """Bound on the loss of tokens with a negative advantage, in units of the ratio (usually 3); none: no bound."""
    advantage_clip: PositiveOrNone = None
    """Absolute value to which advantages are clipped; none: no clipping."""

    @property
    def clip_range(self) -> tuple[float, float]:
        """Lower and upper half-width of the range of the ratio."""
        return self.clip, self.clip if self.clip_high is None else self.clip_high


class CriticConfig(LearnerConfig):
    """Shared by learners with a critic."""

    critic_learning_rate: Positive = 1e-3
    """Peak learning rate of the critic adapter and head."""
    gamma: Share = 1.0
    """Discount factor per token."""
    gae_lambda: Share = 0.95
    """Lambda of generalised advantage estimation."""
    value_clip: PositiveOrNone = 0.2
    """Clip range of the value update, in units of the whitened reward; none: no clipping."""
    whiten_advantages: bool = True
    """Normalise advantages to mean 0 and variance 1 over the tokens of an iteration."""


class ValueLearnerConfig(LearnerConfig):
    """Shared by learners that train value functions and leave the policy's weights unchanged."""

    critic_learning_rate: Positive = 1e-3
    """Peak learning rate of the state-value roles; the Q roles use `policy.learning_rate`."""
    gamma: Share = 1.0
    """Discount factor per token."""
    gae_lambda: Share = 0.95
    """Trace decay of the multi-step Q targets; 0 means one-step targets."""
    replay: Count = 2048
    """Capacity of the replay buffer, in replies."""
    target_share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.1
    """Polyak coefficient tau of the target networks."""


class PPOConfig(ClippedConfig, CriticConfig):
    """Settings of `learner = "ppo"`."""


class TRPOConfig(EntropyFloorConfig, CriticConfig):
    """Settings of `learner = "trpo"`."""

    trust_region: Positive = 0.01
    """Bound on the exact KL of a policy step, in nats per token, at the peak of the learning rate schedule."""
    advantage_clip: PositiveOrNone = None
    """Absolute value to which advantages are clipped; none: no clipping."""


_GRPO_CLIPS = {"grpo": (0.2, 0.2), "dr_grpo": (0.2, 0.2), "gspo": (3e-4, 4e-4), "dapo": (0.2, 0.28)}
"""Lower and upper half-width of the clip range of each loss, as in its paper."""


class GRPOConfig(ClippedConfig):
    """Settings of `learner = "grpo"`."""

    loss: Literal["grpo", "dr_grpo", "gspo", "dapo"] = "grpo"
    """Variant of the loss (docs/algorithms/learners.md)."""
    # Wider than the field it overrides: None stands for the range of the loss's paper.
    clip: FractionOrNone = None  # type: ignore[assignment]
    """Clip range of the probability ratio; none: that of the loss's paper, 0.2, or 0.0003 for gspo."""
    clip_high: PositiveOrNone = None
    """Upper half-width of the clip range; none: same as `clip` if that is given, else 0.2, 0.0004 for gspo, 0.28 for dapo."""

    @property
    def clip_range(self) -> tuple[float, float]:
        """Lower and upper half-width of the range of the ratio.

        Resolved here rather than stored, so a run that is resumed with another loss gets the range of that loss.
        """
        own_low, own_high = _GRPO_CLIPS[self.loss]
        low = own_low if self.clip is None else self.clip
        high = self.clip_high or (own_high if self.clip is None else low)
        return low, high

    @model_validator(mode="after")
    def _gspo_has_no_dual_clip(self) -> GRPOConfig:
        if self.loss == "gspo" and self.dual_clip is not None:
            raise ValueError('loss = "gspo" clips the ratio per reply and does not support dual_clip; set it to none')
        return self


class RLOOConfig(ClippedConfig):
    """Settings of `learner = "rloo"`."""


class ReinforcePPConfig(ClippedConfig):
    """Settings of `learner = "reinforce_pp"`."""

    gamma: Share = 1.0
    """Discount factor per token."""


class ReMaxConfig(ClippedConfig):
    """Settings of `learner = "remax"`."""


_DPO_SETTINGS = {"label_smoothing": ("sigmoid", "simpo"), "flip_rate": ("robust",), "simpo_gamma": ("simpo",)}
"""Settings that only some losses read, with those losses."""
_REFERENCE_FREE = {"simpo": 2.0, "orpo": 0.1}
"""Losses without a reference, with their default of `beta`."""


class DPOConfig(LearnerConfig):
    """Settings of `learner = "dpo"`."""

    pairs: Literal["sampled", "kept"] = "sampled"
    """Training pairs: best and worst of the replies sampled in the iteration, or the pairs labelled by the judge."""
    loss: Literal["sigmoid", "ipo", "kto", "simpo", "orpo", "robust"] = "sigmoid"
    """Loss of a pair (docs/algorithms/preference-losses.md); sigmoid is DPO with soft labels."""
    beta: PositiveOrNone = None
    """Beta of the loss; none: the KL penalty's weight, or without a reference the paper's 2.0 (simpo) or 0.1 (orpo)."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.0
    """Label smoothing: share by which labels move towards their opposite, for sigmoid (cDPO) and simpo."""
    flip_rate: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.0
    """Assumed share of wrong labels, for robust."""
    simpo_gamma: Annotated[float, Field(ge=0.0)] = 0.5
    """Target margin between chosen and rejected, in units of reward, for simpo."""

    @property
    def reads_kept_pairs(self) -> bool:
        return self.pairs == "kept"

    @property
    def has_reference(self) -> bool:
        """Whether the loss needs the reference's log-probs."""
        return self.loss not in _REFERENCE_FREE

    def beta_of(self, kl_coefficient: float) -> float:
        """Return beta at the current weight of the KL penalty."""
        return self.beta if self.beta is not None else _REFERENCE_FREE.get(self.loss, kl_coefficient)

    @model_validator(mode="after")
    def _settings_are_read(self) -> DPOConfig:
        for name, losses in _DPO_SETTINGS.items():
            # Compared with the default, because a resumed run passes all values, also those that nobody set.
            if self.loss not in losses and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f'{name} is a setting of loss = {" or ".join(losses)}, but loss is "{self.loss}"')
        return self


class RAFTConfig(PolicyGradientConfig):
    """Settings of `learner = "raft"`."""


class ILQLConfig(ValueLearnerConfig):
    """Settings of `learner = "ilql"`."""

    expectile: Annotated[float, Field(ge=0.5, lt=1.0)] = 0.8
    """Expectile of the token values that V estimates: 0.5 is their mean, values near 1 approach their maximum."""


class SoftQConfig(ValueLearnerConfig):
    """Settings of `learner = "soft_q"`."""


@dataclass(frozen=True)
class LearnerSpec:
    """Facts that the rest of the package needs about a learner before it is imported.

    Attributes:
        name: value of `policy.learner`, and name of the learner's section, `[policy.NAME]`.
        config: class of that section.
        implementation: `module:object` in `training/learners/`; the object takes a `LearnerContext` and returns a `Learner`.
        summary: one line for the documentation.
        compares_replies: whether it needs at least two replies to each question. Default: False.
        changes_policy: whether it trains the policy's weights; False if it trains value functions that guide decoding.
        extra_roles: roles that it adds to policy, reference and evaluator; all of them are checkpointed.
        outputs: roles besides `policy` that the trained policy needs, and that the stage saves.
        least_minibatch: minimum number of replies per gradient step.
    """

    name: str
    config: type[LearnerConfig]
    implementation: str
    summary: str
    compares_replies: bool = False
    changes_policy: bool = True
    extra_roles: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    least_minibatch: int = 1


_Q = ("q-0", "q-1")
_VALUES = (*_Q, "q-state", "q-0-target", "q-1-target", "q-state-target")


def _registry(*specs: LearnerSpec) -> dict[str, LearnerSpec]:
    return {spec.name: spec for spec in specs}


LEARNERS: dict[str, LearnerSpec] = _registry(
    LearnerSpec("ppo", PPOConfig, "ppo:PPO", "Clipped policy gradient with a critic.", extra_roles=("critic",)),
    LearnerSpec(
        "trpo",
        TRPOConfig,
        "trpo:TRPO",
        "One natural-gradient step per iteration within a KL trust region, with a critic.",
        extra_roles=("critic",),
    ),
    LearnerSpec(
        "grpo",
        GRPOConfig,
        "grpo:GRPO",
        "Clipped policy gradient with group-relative advantages, without a critic; also Dr. GRPO, GSPO and DAPO.",
        compares_replies=True,
    ),
    LearnerSpec("rloo", RLOOConfig, "rloo:RLOO", "Policy gradient with a leave-one-out baseline.", compares_replies=True),
    LearnerSpec(
        "reinforce_pp",
        ReinforcePPConfig,
        "reinforce_pp:ReinforcePP",
        "Policy gradient with returns that are normalised over the batch.",
    ),
    LearnerSpec("remax", ReMaxConfig, "remax:ReMax", "Policy gradient with the reward of a greedy reply as baseline."),
    LearnerSpec(
        "dpo",
        DPOConfig,
        "dpo:DPO",
        "Direct preference optimisation on sampled or judged pairs; also IPO, KTO, SimPO, ORPO and robust DPO.",
        compares_replies=True,
        least_minibatch=2,
    ),
    LearnerSpec(
        "raft",
        RAFTConfig,
        "raft:RAFT",
        "Best-of-n distillation: imitation of each question's best reply.",
        compares_replies=True,
    ),
    LearnerSpec(
        "ilql",
        ILQLConfig,
        "ilql:ILQL",
        "Implicit Q-learning; the Q functions guide decoding.",
        changes_policy=False,
        extra_roles=(*_VALUES, "critic"),
        outputs=_Q,
    ),
    LearnerSpec(
        "soft_q",
        SoftQConfig,
        "soft_q:SoftQ",
        "Soft Q-learning near the reference; the Q functions guide decoding.",
        changes_policy=False,
        extra_roles=_VALUES,
        outputs=_Q,
    ),
)
"""The learners by name. Registering a learner here is enough to configure, train and document it."""
