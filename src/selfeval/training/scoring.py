"""The evaluator, or an ensemble of them, as the scorer of a policy's replies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from selfeval.backbone.roles import Backbone
from selfeval.training.evaluator import EVALUATOR, score_replies
from selfeval.training.setting import Samples, Scores

__all__ = ["EvaluatorScorer"]


@dataclass(frozen=True)
class EvaluatorScorer:
    """Scores replies with the evaluator, as it reads them after the grade prompt.

    Attributes:
        backbone: holds the evaluator's role.
        batch_tokens: tokens of a micro-batch.
        roles: the members.
    """

    backbone: Backbone
    batch_tokens: int
    roles: Sequence[str] = (EVALUATOR,)

    def __call__(self, samples: Samples) -> Scores:
        prompts, replies = [p.grade for p in samples.asked], [r.ids for r in samples.rollouts]
        scores = score_replies(self.backbone, self.roles[0], prompts, replies, self.batch_tokens)
        return Scores(torch.tensor(scores, device=self.backbone.loaded.device))
