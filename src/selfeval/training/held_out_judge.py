"""A held-out judge that monitors the policy during training: the base model with a prompt that labelled no training pair.

It compares replies of the policy and of the initial policy to questions that are not trained on, in both orders. Its readings
feed the metrics and a watchdog, never a reward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from selfeval.backbone.adapters import BASE
from selfeval.backbone.roles import Backbone
from selfeval.judging.protocol import Comparison, Judge
from selfeval.judging.templates import Templates
from selfeval.records import Question
from selfeval.rollout.engine import generate
from selfeval.rollout.guide import Guide
from selfeval.rollout.requests import Request
from selfeval.rollout.thinking import ThinkingTokens
from selfeval.training.context import POLICY, JudgeReading

__all__ = ["HeldOutJudge"]


@dataclass(frozen=True)
class _Said:
    """A reply, and whether it ended before the token limit."""

    text: str
    finished: bool


@dataclass
class HeldOutJudge:
    """Compare the policy with the initial policy on held-out questions.

    Attributes:
        judge: judge that compares the replies, under the base.
        questions: the questions.
        limit: maximum tokens of a reply.
        batch_size: batch size of sampling.
        seed: sampling seed. It is the same for all readings, so that two of them differ by the policy alone.
        start: Optional. Role of the initial policy. Default: the base.
        temperature, top_p: temperature and nucleus of the sampling. Default: 1.
        thinking: Optional. Markers and limit of the thinking before a reply, which the judge does not read. Default: none.
    """

    backbone: Backbone
    templates: Templates
    judge: Judge
    questions: Sequence[Question]
    limit: int
    batch_size: int
    seed: int
    start: str = BASE
    temperature: float = 1.0
    top_p: float = 1.0
    thinking: ThinkingTokens | None = None

    def __call__(self, guide: Guide | None) -> JudgeReading | None:
        """Return a reading of the current policy, or None if most verdicts could not be parsed.

        Args:
            guide: value guidance to apply when sampling, or None.
        """
        pairs = zip(self.questions, self._replies(POLICY, guide), self._start, strict=True)
        comparisons = [
            Comparison(question.text, ours.text, theirs.text, not ours.finished, not theirs.finished, question.messages)
            for question, ours, theirs in pairs
        ]
        with self.backbone.acting_as(BASE):
            judged = self.judge.judge(comparisons)
        wins = [j.probability for j in judged if j.probability is not None]
        # The standard error of a reading needs two verdicts, and a mean over a minority of the questions is not comparable.
        if len(wins) < max(2, len(judged) / 2):
            return None
        return JudgeReading(tuple(j.probability for j in judged))

    @cached_property
    # Cached: the initial policy and the seed never change. A resumed training samples the same replies again.
    def _start(self) -> list[_Said]:
        return self._replies(self.start)

    def _replies(self, role: str, guide: Guide | None = None) -> list[_Said]:
        prompts = [self.templates.reply_prompt(q) for q in self.questions]
        requests = [Request(prompt, self.temperature, self.top_p) for prompt in prompts]
        with self.backbone.acting_as(role):
            rollouts = generate(
                self.backbone,
                requests,
                max_new_tokens=self.limit,
                seed=self.seed,
                batch_size=self.batch_size,
                guide=guide,
                thinking=self.thinking,
            )
        return [_Said(self.templates.text(r.reply_ids), r.finished) for r in rollouts]
