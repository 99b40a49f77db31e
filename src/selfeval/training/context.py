"""Shared context of policy learning: role names, questions, the scorer and the limits of a forward pass."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, pstdev
from typing import Protocol

from torch import Tensor

from selfeval.backbone.roles import Backbone
from selfeval.config import PolicyConfig
from selfeval.prompt import Prompt
from selfeval.rollout.engines import OwnEngine, RolloutEngine
from selfeval.rollout.guide import Guide
from selfeval.rollout.requests import Rollout
from selfeval.rollout.thinking import ThinkingTokens
from selfeval.training.evaluator import Preference

__all__ = ["CRITIC", "POLICY", "REFERENCE", "JudgeReading", "LearnerContext", "QuestionPrompts", "Samples", "Scorer", "Scores"]

POLICY, REFERENCE, CRITIC = "policy", "reference", "critic"


@dataclass(frozen=True)
class QuestionPrompts:
    """The prompts of a training question: that of the policy, and that of evaluator and critic."""

    question_id: str
    reply: Prompt
    grade: Prompt


@dataclass(frozen=True)
class Samples:
    """The replies of an iteration with their prompts; replies to the same question are adjacent.

    Attributes:
        asked: one prompt per reply.
        rollouts: the replies.
        baselines: Optional. One additional reply per question; its reward is the baseline of the question (ReMax).
    """

    asked: Sequence[QuestionPrompts]
    rollouts: Sequence[Rollout]
    baselines: Samples | None = None

    @property
    def groups(self) -> list[int]:
        """Index of each reply's question within the iteration."""
        numbers: dict[str, int] = {}
        return [numbers.setdefault(p.question_id, len(numbers)) for p in self.asked]


@dataclass(frozen=True)
class Scores:
    """Scores of replies. Shapes: B replies, R reply tokens.

    Attributes:
        whole_B: one score per reply, in the scorer's own units.
        steps_BR: Optional. Additional reward per token in the same units, such as process rewards.
    """

    whole_B: Tensor
    steps_BR: Tensor | None = None


@dataclass(frozen=True)
class JudgeReading:
    """The policy's win rate by a held-out judge, whose verdicts never enter a reward.

    Attributes:
        outcomes: probability per question that the policy's reply beats that of the initial policy; None if the verdict
            could not be parsed. All readings use the same questions.
    """

    outcomes: tuple[float | None, ...]

    @property
    def _read(self) -> list[float]:
        return [outcome for outcome in self.outcomes if outcome is not None]

    @property
    def win_rate(self) -> float:
        """Mean over the questions with a parsed verdict; a tie counts as half a win."""
        return fmean(self._read)

    @property
    def error(self) -> float:
        """Standard error of the win rate."""
        return pstdev(self._read) / math.sqrt(len(self._read))

    @property
    def unparsed(self) -> float:
        """Share of the questions whose verdict could not be parsed."""
        return 1 - len(self._read) / len(self.outcomes)


class Scorer(Protocol):
    """Score replies; the policy is trained to maximise the score."""

    def __call__(self, samples: Samples) -> Scores: ...


@dataclass(frozen=True)
class LearnerContext:
    """Context of a policy learner.

    Attributes:
        backbone: has the roles `policy` and `reference`, and those that the scorer needs.
        scorer: computes the reward.
        seed: seed of all random choices.
        limit: maximum tokens of a reply.
        batch_size: batch size of sampling.
        batch_tokens: maximum tokens of a micro-batch.
        evaluator: role that critics and state values start from; None to start them from the base.
        pairs: labelled pairs with the policy's prompts, for learners that train on them.
        judge: Optional. Takes the value guidance of the policy, if any, and returns a reading by the held-out judge, or None
            if most verdicts could not be parsed. Default: no readings.
        thinking: Optional. Markers and limit of the thinking before a reply. It is sampled and trained on; the scorer does not
            read it. Default: all tokens are the reply.
        engine: samples the policy's replies. Default: the engine on the backbone's own weights.
    """

    backbone: Backbone
    config: PolicyConfig
    scorer: Scorer
    seed: int
    limit: int
    batch_size: int
    batch_tokens: int
    evaluator: str | None
    pairs: Sequence[Preference] = ()
    judge: Callable[[Guide | None], JudgeReading | None] | None = None
    thinking: ThinkingTokens | None = None
    engine: RolloutEngine = field(default_factory=OwnEngine)

    def sampling_seed(self, iteration: int) -> int:
        """Return the seed for sampling the replies of an iteration."""
        return random.Random(f"{self.seed}/rollout/{iteration}").getrandbits(48)
