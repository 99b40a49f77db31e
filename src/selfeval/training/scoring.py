"""Reply scorer: one evaluator or an ensemble.

The members of an ensemble are adapters on one base that differ in their initial weights, in the order of their training
pairs, and with `evaluator.inputs` in what they read and in rank. Scores are normalised by each member's mean and
standard deviation over replies that it was trained on, then combined: by their mean, or pessimistically, so that the policy
cannot exploit the error of a single member (Coste et al. 2023, https://arxiv.org/abs/2310.02743).

Shapes: K members, B replies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from selfeval.algorithms.ensembles import ensemble_mean, uncertainty_weighted, worst_case
from selfeval.backbone.roles import Backbone
from selfeval.errors import LoopError
from selfeval.prompt import GradePrompt, Prompt
from selfeval.rollout.engine import visible_ids
from selfeval.training.context import Samples, Scores
from selfeval.training.evaluator import EVALUATOR, score_replies

__all__ = ["EvaluatorScorer", "Member", "Pessimism", "without_reference"]

Pessimism = Literal["mean", "worst", "uncertainty"]


@dataclass(frozen=True)
class Member:
    """One evaluator: its role, and the mean and standard deviation that normalise its scores (default: 0 and 1).

    `reference_answer` is whether it reads the reference answer of the grade prompt, if the prompt has one.
    """

    role: str = EVALUATOR
    mean: float = 0.0
    deviation: float = 1.0
    reference_answer: bool = True

    def read(self, prompts: Sequence[Prompt]) -> Sequence[Prompt]:
        """Return the prompts as this member reads them."""
        return prompts if self.reference_answer else [without_reference(prompt) for prompt in prompts]


def without_reference(prompt: Prompt) -> Prompt:
    """Return a grade prompt without its reference answer.

    Raises:
        LoopError: the prompt was built for evaluators that all read the reference answer.
    """
    if not isinstance(prompt, GradePrompt) or prompt.without_reference is None:
        raise LoopError(
            "a member of the ensemble reads no reference answer (evaluator.inputs), but the grade prompt has no version "
            "without one; build it with `Context.grade_prompt` or as a `GradePrompt`"
        )
    return prompt.without_reference


@dataclass(frozen=True)
class EvaluatorScorer:
    """Score replies after the grade prompt of the evaluators.

    Attributes:
        backbone: the model that has the members' roles.
        batch_tokens: maximum tokens of a micro-batch.
        members: one or more evaluators. Default: a single one.
        pessimism: how the scores of an ensemble are combined. Default: their mean.
        weight: weight of the variance if `pessimism` is `uncertainty`. Default: 0.5.
    """

    backbone: Backbone
    batch_tokens: int
    members: Sequence[Member] = (Member(),)
    pessimism: Pessimism = "mean"
    weight: float = 0.5

    def __call__(self, samples: Samples) -> Scores:
        # The evaluator reads what a user would see: the reply without the thinking.
        return self.of([p.grade for p in samples.asked], [visible_ids(self.backbone, r) for r in samples.rollouts])

    def of(
        self,
        prompts: Sequence[Prompt],
        replies: Sequence[Sequence[int]],
        advance: Callable[[int], None] | None = None,
    ) -> Scores:
        """Score replies after their grade prompts; see `each` for the arguments."""
        scores_KB = self.each(prompts, replies, advance)
        if len(scores_KB) == 1:
            return Scores(scores_KB[0])
        return Scores(self._combined(scores_KB))

    def each(
        self,
        prompts: Sequence[Prompt],
        replies: Sequence[Sequence[int]],
        advance: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Return the normalised scores `[K, B]` of all members.

        Args:
            prompts: grade prompt of each reply.
            replies: token ids.
            advance: Optional. Called after each micro-batch of the first member with its number of replies, for progress.
        """
        rows = []
        for number, member in enumerate(self.members):
            shown = advance if number == 0 else None
            scores = score_replies(self.backbone, member.role, member.read(prompts), replies, self.batch_tokens, shown)
            rows.append((torch.tensor(scores, device=self.backbone.loaded.device) - member.mean) / member.deviation)
        return torch.stack(rows)

    def _combined(self, scores_KB: Tensor) -> Tensor:
        if self.pessimism == "worst":
            return worst_case(scores_KB)
        if self.pessimism == "uncertainty":
            return uncertainty_weighted(scores_KB, weight=self.weight)
        return ensemble_mean(scores_KB)
