"""The agreement judge: sampled replies vote on the answer of a question, and a reply with the majority's answer is better.

It needs neither labels nor a model that can judge, only questions with a short final answer. Self-consistency (Wang et al.
2022, https://arxiv.org/abs/2203.11171): the most frequent answer of many sampled replies is right more often than one reply. As
a label of preference pairs: ScPO (Prasad et al. 2024, https://arxiv.org/abs/2411.04109), which also drops questions without a
majority; as a reward: TTRL (Zuo et al. 2025, https://arxiv.org/abs/2504.16084).

The two replies do not vote themselves: they may come from a file or from beam search, and are chosen because they differ.
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from selfeval.config import AgreementConfig
from selfeval.judging.loops import ends_in_loop
from selfeval.judging.protocol import Comparison, JudgeContext, Judgement
from selfeval.judging.reading import thinking_of
from selfeval.prompt import Prompt
from selfeval.quality.answers import answer_of
from selfeval.quality.statistics import wilson_interval
from selfeval.records import AgreementEvidence, Unreadable
from selfeval.rollout.engine import Request, Rollout, generate

__all__ = ["AgreementJudge", "Vote", "compare_answers"]

_TAIL = 32
"""Number of last tokens of a prompt searched for an opening marker of thinking."""
_SHOWN = 2
"""Number of votes without an answer that are kept as text."""


@dataclass(frozen=True)
class Vote:
    """One vote.

    Attributes:
        answer: final answer in normal form; None without one.
        cause: why it has no answer; None if it has one.
        text: text of the reply.
    """

    answer: str | None
    cause: Unreadable | None
    text: str


class AgreementJudge:
    """Compares two replies by the answer of most of the replies that it samples to the question, under the active role.

    Args:
        context: with one kind of template, the prompt of a reply.
    """

    def __init__(self, context: JudgeContext) -> None:
        settings = context.config.settings
        if not isinstance(settings, AgreementConfig):
            raise TypeError(f"the agreement judge needs its section of settings, got {settings}")
        self._settings, self._limit = settings, context.config.max_new_tokens
        self._backbone, self._templates = context.backbone, context.templates
        self._batch_size, self._seed = context.batch_size, context.seed

    def judge(self, comparisons: Sequence[Comparison], advance: Callable[[int], None] | None = None) -> list[Judgement]:
        """Judge every comparison; comparisons of the same question share its vote."""
        ballots = self._ballots(comparisons, advance)
        return [compare_answers(self._answers(c), ballots[c.question], self._settings.share) for c in comparisons]

    def _answers(self, comparison: Comparison) -> tuple[str | None, str | None]:
        """Return the final answers of both replies. One that was cut off has none: its last number is a step on the way."""
        first = self._answer(comparison.first, finished=not comparison.first_cut)
        return first, self._answer(comparison.second, finished=not comparison.second_cut)

    def _answer(self, text: str, prompt: str = "", *, finished: bool) -> str | None:
        begin = thinking_of(text, prompt).end
        if not finished or begin is None:
            return None
        return answer_of(self._templates.clean(text[begin:]), self._settings.answer, self._settings.pattern)

    # -- votes ----------------------------------------------------------------------------------------------------------

    def _ballots(self, comparisons: Sequence[Comparison], advance: Callable[[int], None] | None) -> dict[str, list[Vote]]:
        """Sample the votes on each distinct question, after the same turns as the replies."""
        prompts = {c.question: self._templates.prompt_after(c.question, c.messages) for c in comparisons}
        fitting = [question for question, prompt in prompts.items() if self._fits(prompt)]
        requests = [self._request(q, prompts[q], n) for q in fitting for n in range(self._settings.votes)]
        rollouts = generate(
            self._backbone,
            requests,
            max_new_tokens=self._limit,
            seed=0,  # each request has its own stream
            batch_size=self._batch_size,
            advance=advance,
        )
        found: dict[str, list[Vote]] = {q: [_no_room(prompt)] for q, prompt in prompts.items() if q not in set(fitting)}
        for number, question in enumerate(fitting):
            group = rollouts[number * self._settings.votes : (number + 1) * self._settings.votes]
            found[question] = [self._vote(prompts[question], rollout) for rollout in group]
        return found

    def _fits(self, prompt: Prompt) -> bool:
        return len(prompt.ids) < (self._backbone.loaded.context_length or sys.maxsize)

    def _request(self, question: str, prompt: Prompt, number: int) -> Request:
        # By the text of the question, so its votes do not depend on the other questions of a shard.
        stream = random.Random(f"{self._seed}/votes/{question}/{number}").getrandbits(64)
        return Request(prompt, self._settings.temperature, self._settings.top_p, stream)

    def _vote(self, prompt: Prompt, rollout: Rollout) -> Vote:
        # With control tokens, because they may mark the thinking.
        text = str(self._templates.tokenizer.decode(list(rollout.ids)))
        opened = str(self._templates.tokenizer.decode(list(prompt.ids[-_TAIL:])))
        answer = self._answer(text, opened, finished=rollout.finished)
        return Vote(answer, None if answer is not None else self._cause(rollout), self._templates.text(rollout.ids))

    def _cause(self, rollout: Rollout) -> Unreadable:
        """Return why a vote has no answer."""
        if rollout.finished:
            return Unreadable.NO_ANSWER
        if ends_in_loop(rollout.ids):
            return Unreadable.LOOP
        # The engine stops at the end of the model's context, before the limit.
        return Unreadable.CUT if len(rollout.ids) >= self._limit else Unreadable.NO_ROOM


def _no_room(prompt: Prompt) -> Vote:
    skipped = f"(skipped: the prompt of {len(prompt.ids)} tokens does not fit the model's context)"
    return Vote(None, Unreadable.NO_ROOM, skipped)


# -- verdict ------------------------------------------------------------------------------------------------------------


def compare_answers(answers: tuple[str | None, str | None], votes: Sequence[Vote], share: float) -> Judgement:
    """Compare two replies by the votes on the answer.

    With n votes for the majority's answer, which one reply has, and m for that of the other one (0 if it has none):

    p = (n + 1) / (n + m + 2)

    This is the mean of Beta(n + 1, m + 1), the posterior of the majority's share of these n + m votes under a uniform prior
    (Laplace's rule of succession). It takes vote shares as probabilities of being right: given that one of both answers is
    right, the majority's is right with probability p. Vote shares correlate with accuracy (Wang et al. 2022, section 3), but a
    model can also agree with itself on a wrong answer.

    If both replies or neither have the majority's answer, it is a tie. Without a majority, the probability is one half. If no
    vote has an answer, there is no probability. A reply without an answer does not have the majority's.

    Args:
        answers: final answers of both replies in normal form; None for a reply without one.
        votes: the votes on the question, at least one.
        share: minimum share of the most frequent answer among all votes, in (0, 1].

    Example:
        >>> votes = [Vote("7", None, "")] * 6 + [Vote("8", None, "")] * 2
        >>> compare_answers(("8", "7"), votes, share=0.5).probability
        0.3
    """
    counts = dict(Counter(vote.answer for vote in votes if vote.answer is not None).most_common())
    evidence = _evidence(answers, counts, votes)
    if not counts:
        return Judgement(None, None, evidence)
    majority = _majority(counts, len(votes), share)
    if majority is None:
        return Judgement(0.5, 0.0, evidence)
    first, second = (answer == majority for answer in answers)
    if first == second:
        return Judgement(0.5, 1.0, evidence)
    ahead, behind = counts[majority], counts.get(answers[1 if first else 0] or "", 0)
    probability = (ahead + 1) / (ahead + behind + 2)
    return Judgement(probability if first else 1.0 - probability, 0.0, evidence)


def _majority(counts: Mapping[str, int], total: int, share: float) -> str | None:
    """Return the most frequent answer; None if its share is too small or another answer is as frequent."""
    [(answer, most), *others] = counts.items()
    return None if most < share * total or (others and others[0][1] == most) else answer


def _evidence(answers: tuple[str | None, str | None], counts: Mapping[str, int], votes: Sequence[Vote]) -> AgreementEvidence:
    most = max(counts.values(), default=0)
    share, low, high = (most / len(votes), *wilson_interval(most, len(votes))) if counts else (None, None, None)
    unanswered = tuple(vote.text for vote in votes if vote.answer is None)[:_SHOWN]
    return AgreementEvidence(answers, counts, share, low, high, tuple(vote.cause for vote in votes), unanswered)
