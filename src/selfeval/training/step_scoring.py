"""Use a step evaluator as the scorer of policy learning: dense rewards, or the score of whole replies.

Shapes: B replies, R reply tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from selfeval.algorithms.step_scores import combined_score, step_progress
from selfeval.backbone.roles import Backbone
from selfeval.config import StepCombination
from selfeval.rollout.engine import visible_ids
from selfeval.training.context import Samples, Scorer, Scores
from selfeval.training.step_evaluator import STEP_EVALUATOR, score_steps

__all__ = ["StepScorer"]


@dataclass(frozen=True)
class StepScorer:
    """Score replies by their steps.

    Attributes:
        backbone: the model that has the role.
        batch_tokens: maximum tokens of a micro-batch.
        ends: returns the number of tokens up to the end of each step of a reply.
        use: `dense`: the score of a whole reply is that of `outcomes`, and the last token of each step has its progress
            (`step_progress`), times `weight`, as an additional reward. `reply`: the score of a whole reply is combined from
            those of its steps, and best of n chooses by it.
        outcomes: scores whole replies.
        combine: how scores of steps are combined.
        weight: weight of the progress, in units of the score of a whole reply.
        role: role of the step evaluator. Default: `steps`.
    """

    backbone: Backbone
    batch_tokens: int
    ends: Callable[[Sequence[int]], tuple[int, ...]]
    use: Literal["dense", "reply"]
    outcomes: Scorer
    combine: StepCombination = "min"
    weight: float = 1.0
    role: str = STEP_EVALUATOR

    def __call__(self, samples: Samples) -> Scores:
        # As the evaluator, it reads the reply without the thinking.
        replies = [visible_ids(self.backbone, rollout) for rollout in samples.rollouts]
        ends = [self.ends(reply) for reply in replies]
        prompts = [asked.grade for asked in samples.asked]
        logits = [torch.tensor(row) for row in score_steps(self.backbone, self.role, prompts, replies, ends, self.batch_tokens)]
        device = self.backbone.loaded.device
        if self.use == "reply":
            return Scores(torch.stack([combined_score(row, self.combine) for row in logits]).to(device))
        steps_BR = torch.zeros(len(replies), max(len(rollout.ids) for rollout in samples.rollouts), device=device)
        for number, (rollout, of_reply, row) in enumerate(zip(samples.rollouts, ends, logits, strict=True)):
            if rollout.reply_ids:  # one that was cut off in its thinking has no step to reward
                last = torch.tensor(of_reply, device=device) + rollout.hidden - 1
                steps_BR[number, last] = self.weight * step_progress(row).to(device)
        return Scores(self.outcomes(samples).whole_B, steps_BR)
