"""The agreement judge: sampled replies vote on the answer of a question, and a reply with the majority's answer is better.

It needs neither labels nor a model that can judge, only questions with a short final answer. Self-consistency (Wang et al.
2022, https://arxiv.org/abs/2203.11171): the most frequent answer of many sampled replies is right more often than one reply. As
a label of preference pairs: ScPO (Prasad et al. 2024, https://arxiv.org/abs/2411.04109), which also drops questions without a
majority; as a reward: TTRL (Zuo et al. 2025, https://arxiv.org/abs/2504.16084).

The two replies do not vote themselves: they may come from a file or from beam search, and are chosen because they differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from selfeval.config import AgreementConfig
from selfeval.judging.protocol import Comparison, JudgeContext, Judgement
from selfeval.judging.voting import Ballot, Vote, Voter, count_votes, majority_of
from selfeval.quality.statistics import wilson_interval
from selfeval.records import AgreementEvidence

__all__ = ["AgreementJudge", "compare_answers"]

_SHOWN = 2
"""Number of votes without an answer that are kept as text."""


class AgreementJudge:
    """Compares two replies by the answer of most of the replies that it samples to the question, under the active role.

    Args:
        context: with one kind of template, the prompt of a reply.
    """

    def __init__(self, context: JudgeContext) -> None:
        settings = context.config.settings
        if not isinstance(settings, AgreementConfig):
            raise TypeError(f"the agreement judge needs its section of settings, got {settings}")
        self._settings, self._templates = settings, context.templates
        limit, size = context.config.max_new_tokens, context.batch_size
        self._voter = Voter(context.backbone, context.templates, settings, limit=limit, batch_size=size, seed=context.seed)

    def judge(self, comparisons: Sequence[Comparison], advance: Callable[[int], None] | None = None) -> list[Judgement]:
        """Judge every comparison; comparisons of the same question share its vote."""
        # After the same turns as the replies.
        ballots = {c.question: Ballot(self._templates.prompt_after(c.question, c.messages)) for c in comparisons}
        votes = self._voter.hold(ballots, self._settings.votes, advance)
        return [compare_answers(self._answers(c), votes[c.question], self._settings.share) for c in comparisons]

    def _answers(self, comparison: Comparison) -> tuple[str | None, str | None]:
        """Return the final answers of both replies."""
        first = self._voter.answer(comparison.first, finished=not comparison.first_cut)
        return first, self._voter.answer(comparison.second, finished=not comparison.second_cut)


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
    counts = count_votes(votes)
    evidence = _evidence(answers, counts, votes)
    if not counts:
        return Judgement(None, None, evidence)
    majority = majority_of(votes, share)
    if majority is None:
        return Judgement(0.5, 0.0, evidence)
    first, second = (answer == majority for answer in answers)
    if first == second:
        return Judgement(0.5, 1.0, evidence)
    ahead, behind = counts[majority], counts.get(answers[1 if first else 0] or "", 0)
    probability = (ahead + 1) / (ahead + behind + 2)
    return Judgement(probability if first else 1.0 - probability, 0.0, evidence)


def _evidence(answers: tuple[str | None, str | None], counts: Mapping[str, int], votes: Sequence[Vote]) -> AgreementEvidence:
    most = max(counts.values(), default=0)
    share, low, high = (most / len(votes), *wilson_interval(most, len(votes))) if counts else (None, None, None)
    unanswered = tuple(vote.text for vote in votes if vote.answer is None)[:_SHOWN]
    return AgreementEvidence(answers, counts, share, low, high, tuple(vote.cause for vote in votes), unanswered)
