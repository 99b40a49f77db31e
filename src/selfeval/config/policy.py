"""The section `[policy]`: the settings that all learners share, and the section of the chosen learner."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    Field,
    SerializeAsAny,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from selfeval.config.choices import check_name, read_settings
from selfeval.config.fields import Count, CountOrNone, Positive, PositiveOrNone, Section, ShareOrNone
from selfeval.config.learners import LEARNERS, LearnerConfig, LearnerSpec, PPOConfig

__all__ = ["PolicyConfig"]

_DEFAULT = "ppo"
_SETTINGS = "settings of the learner"
"""Alias of the field that holds the learner's section. Not a recipe key: recipes use the learner's name."""

SettingsT = TypeVar("SettingsT", bound=LearnerConfig)


class PolicyConfig(Section):
    """Policy learning against the evaluator. Settings of a single learner are in its own section, `[policy.LEARNER]`."""

    learner: str = _DEFAULT
    """The algorithm; docs/algorithms/learners.md compares them."""
    settings: SerializeAsAny[LearnerConfig] = Field(default=PPOConfig(), validation_alias=_SETTINGS)
    gate: Literal["evidence", "off"] = "evidence"
    """`evidence`: train only if the evaluator beats chance and trivial rules on held-out pairs; `off`: always train."""
    iterations: Count = 30
    """Number of iterations of sampling and updating."""
    questions_per_iteration: Count = 32
    """Training questions sampled for each iteration."""
    replies_per_question: Count = 4
    """Replies sampled for each question."""
    epochs: Count = 2
    """Passes over an iteration's replies."""
    minibatch: Count = 64
    """Replies per gradient step."""
    learning_rate: Positive = 1e-3
    """Peak learning rate of the policy adapter; for value learners, of the Q roles."""
    warmup_iterations: Annotated[int, Field(ge=0)] = 2
    """Warmup: iterations with a rising learning rate."""
    temperature: Positive = 1.0
    """Sampling temperature of the policy, also used for its log-probs."""
    kl_target: Positive = 4.0
    """Target KL divergence from the reference, in nats per reply."""
    kl_coefficient: Positive = 0.05
    """Initial weight of the KL penalty."""
    kl_control: Literal["dual", "adaptive", "fixed"] = "dual"
    """Controller of the KL penalty's weight: a damped Lagrange multiplier, a slow proportional controller, or none."""
    kl_rate: Positive = 0.5
    """Dual control: change of the log weight in an iteration whose KL misses the target by its full value."""
    kl_horizon: Count = 2000
    """Adaptive control: samples over which the weight changes by at most 20% (Ziegler et al. 2019)."""
    whiten_rewards: bool = True
    """Normalise scores by mean and standard deviation of the first iteration's scores."""
    reward_clip: PositiveOrNone = 4.0
    """Absolute value to which whitened scores are clipped; none: no clipping."""
    unfinished_penalty: Annotated[float, Field(ge=0.0)] = 2.0
    """Penalty, in units of the whitened reward, for a reply that reaches the token limit before its end-of-sequence token."""
    length_guard: PositiveOrNone = None
    """Multiple of the initial mean length above which a reply loses reward in proportion to the excess; none: no penalty."""
    reference_ema: ShareOrNone = None
    """EMA rate of the reference: share of its distance to the policy that it moves per iteration; none: a fixed reference."""
    pessimism: Literal["mean", "worst", "uncertainty"] = "mean"
    """How the scores of several evaluators are combined: mean, minimum, or mean minus weighted variance."""
    uncertainty_weight: Annotated[float, Field(ge=0.0)] = 0.5
    """Weight of the variance over the evaluators, with `pessimism = "uncertainty"`."""
    steps: Literal["off", "dense", "reply"] = "off"
    """Use of the step evaluator: `dense` adds rewards at the ends of steps, `reply` scores whole replies by their steps."""
    step_weight: Positive = 1.0
    """Weight of the rewards of `steps = "dense"`, in units of the evaluator's score."""
    watchdogs: Literal["act", "warn"] = "act"
    """Whether watchdogs may roll back, finish or stop training, or only warn; NaN always triggers an action."""
    judge_every: CountOrNone = None
    """Iterations between readings of the held-out judge, which stops training that exploits the evaluator; none: never."""
    judge_questions: Count = 64
    """Training questions held out for the readings of the held-out judge."""
    max_grad_norm: PositiveOrNone = 1.0
    """Gradient norm above which gradients are scaled down; none: no clipping."""
    checkpoint_every: Count = 5
    """Iterations between checkpoints."""

    @property
    def spec(self) -> LearnerSpec:
        """The registry entry of the chosen learner."""
        return LEARNERS[self.learner]

    def settings_as(self, kind: type[SettingsT]) -> SettingsT:
        """Return the learner's section as an instance of the class that the caller expects.

        Raises:
            TypeError: the chosen learner's section is of another class.
        """
        if not isinstance(self.settings, kind):
            raise TypeError(f"the settings of {self.learner} are {type(self.settings).__name__}, not {kind.__name__}")
        return self.settings

    @field_validator("learner")
    @classmethod
    def _is_registered(cls, value: str) -> str:
        return check_name(value, LEARNERS, "learner")

    @model_validator(mode="before")
    @classmethod
    def _read_settings(cls, values: Any) -> Any:
        """Validate the chosen learner's section and store it in the field. Other learners' sections remain, as unknown keys."""
        return read_settings(values, "learner", _DEFAULT, LEARNERS, _SETTINGS)

    @model_validator(mode="after")
    def _learner_can_learn(self) -> PolicyConfig:
        compares = self.spec.compares_replies and not self.settings.reads_kept_pairs
        if compares and self.replies_per_question < 2:
            raise ValueError(f"{self.learner} compares replies to the same question; replies_per_question must be at least 2")
        if self.minibatch < self.spec.least_minibatch:
            raise ValueError(
                f"{self.learner} learns from pairs, and minibatch counts replies; it must be at least "
                f"{self.spec.least_minibatch}, "
                f"got {self.minibatch}"
            )
        return self

    @model_serializer(mode="wrap")
    def _with_settings_by_name(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Serialise the fields as in a recipe: the learner's section under its name, and no other learner's."""
        values: dict[str, Any] = handler(self)
        # So run.json and a recipe have the same form, and one can be read as the other.
        values[self.learner] = values.pop("settings")
        return values
