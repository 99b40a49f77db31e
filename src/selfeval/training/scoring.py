"""The evaluator or an ensemble of evaluators as the scorer of replies.

Members of an ensemble are adapters on the one base that differ in their first weights and in the order of their pairs. Their
scores are put into common units (each member's own mean and deviation over replies that it was trained on) before they are
combined: as a mean, or pessimistically, so that a policy cannot gain where one member alone is wrong (Coste et al. 2023,
https://arxiv.org/abs/2310.02743).

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
from selfeval.prompt import Prompt
from selfeval.training.context import Samples, Scores
from selfeval.training.evaluator import EVALUATOR, score_replies

__all__ = ["EvaluatorScorer", "Member", "Pessimism"]

Pessimism = Literal["mean", "worst", "uncertainty"]


@dataclass(frozen=True)
class Member:
    """One evaluator: its role, and the mean and deviation that normalise its scores; 0 and 1 leave them unchanged."""

    role: str = EVALUATOR
    mean: float = 0.0
    deviation: float = 1.0


@dataclass(frozen=True)
class EvaluatorScorer:
    """Score replies after the grade prompt of the evaluators.

    Attributes:
        backbone: holds the members' roles.
        batch_tokens: tokens of a micro-batch.
        members: one or more.
        pessimism: how their scores are combined.
        weight: of the variance, with `uncertainty`.
    """

    backbone: Backbone
    batch_tokens: int
    members: Sequence[Member] = (Member(),)
    pessimism: Pessimism = "mean"
    weight: float = 0.5

    def __call__(self, samples: Samples) -> Scores:
        return self.of([p.grade for p in samples.asked], [r.ids for r in samples.rollouts])

    def of(self, prompts: Sequence[Prompt], replies: Sequence[Sequence[int]]) -> Scores:
        """Score replies after their grade prompts."""
        scores_KB = self.each(prompts, replies)
        if len(scores_KB) == 1:
            return Scores(scores_KB[0])
        return Scores(self._combined(scores_KB))

    def each(
        self,
        prompts: Sequence[Prompt],
        replies: Sequence[Sequence[int]],
        advance: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Return the normalised scores `[K, B]` of all members; `advance` receives the progress of the first."""
        rows = []
        for number, member in enumerate(self.members):
            told = advance if number == 0 else None
            scores = score_replies(self.backbone, member.role, prompts, replies, self.batch_tokens, told)
            rows.append((torch.tensor(scores, device=self.backbone.loaded.device) - member.mean) / member.deviation)
        return torch.stack(rows)

    def _combined(self, scores_KB: Tensor) -> Tensor:
        if self.pessimism == "worst":
            return worst_case(scores_KB)
        if self.pessimism == "uncertainty":
            return uncertainty_weighted(scores_KB, weight=self.weight)
        return ensemble_mean(scores_KB)
