"""What every step of policy learning is given: the roles by name, the questions, the scorer, and the limits of a pass."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from selfeval.backbone.roles import Backbone
from selfeval.config import PolicyConfig
from selfeval.rollout.engine import Rollout
from selfeval.rollout.guide import Guide
from selfeval.training.evaluator import Preference

__all__ = ["CRITIC", "POLICY", "REFERENCE", "JudgeReading", "Prompt", "Samples", "Scorer", "Scores", "Setting"]

POLICY, REFERENCE, CRITIC = "policy", "reference", "critic"


@dataclass(frozen=True)
class Prompt:
    """A training question as the policy reads it and as evaluator and critic read it."""

    question_id: str
    reply: tuple[int, ...]
    grade: tuple[int, ...]


@dataclass(frozen=True)
class Samples:
    """An iteration's replies, each with the prompt that it answers; those to one question stand side by side.

    Attributes:
        asked: one prompt per reply.
        rollouts: the replies.
    """

    asked: Sequence[Prompt]
    rollouts: Sequence[Rollout]

    @property
    def groups(self) -> list[int]:
        """The number of each reply's question within the iteration."""
        numbers: dict[str, int] = {}
        return [numbers.setdefault(p.question_id, len(numbers)) for p in self.asked]


@dataclass(frozen=True)
class Scores:
    """What a scorer says about replies. Shapes: B replies, R reply tokens.

    Attributes:
        whole_B: one score per reply, in the scorer's own units.
        steps_BR: further reward per token in the same units, for example of a reply's steps; None when there is none.
        disagreement_B: standard deviation over the members of an ensemble; None when one alone scores.
    """

    whole_B: Tensor
    steps_BR: Tensor | None = None
    disagreement_B: Tensor | None = None


@dataclass(frozen=True)
class JudgeReading:
    """What a judge that has no part in the training says of the policy.

    Attributes:
        win_rate: against the start, mean over the questions whose verdict could be read; a tie counts half.
        error: its standard error.
        unparsed: share of the questions whose verdict could not be read.
    """

    win_rate: float
    error: float
    unparsed: float = 0.0


class Scorer(Protocol):
    """Says how good replies are; the policy is trained to raise it."""

    def __call__(self, samples: Samples) -> Scores: ...


@dataclass(frozen=True)
class Setting:
    """What a learner is given.

    Attributes:
        backbone: with the roles `policy` and `reference`, and whatever the scorer needs.
        scorer: gives the reward.
        seed: of every random choice.
        limit: token limit of a reply.
        rows: replies side by side while sampling.
        batch_tokens: tokens of a micro-batch.
        pairs: labelled pairs, their prompts as the policy reads them; for learners that learn from those.
        judge: says now and then what a judge outside of the training thinks of the policy, which samples with a guide where
            there is one; None where none is asked. A reading of None says that it cannot tell.
    """

    backbone: Backbone
    config: PolicyConfig
    scorer: Scorer
    seed: int
    limit: int
    rows: int
    batch_tokens: int
    pairs: Sequence[Preference] = ()
    judge: Callable[[Guide | None], JudgeReading | None] | None = None

    def sampling_seed(self, iteration: int) -> int:
        """Of the draws of one iteration's replies."""
        return random.Random(f"{self.seed}/rollout/{iteration}").getrandbits(48)
