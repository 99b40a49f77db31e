"""The combined judge: several judges vote on the better reply, each with the weight of its estimated accuracy.

The accuracies are estimated without labels, from the agreement of the judges on the first pairs of a run
(`quality/dawid_skene.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean

from selfeval.config import CombinedConfig, VerdictsConfig
from selfeval.judging.judges import make_judge
from selfeval.judging.protocol import Comparison, JudgeContext, Judgement, state_of
from selfeval.quality.dawid_skene import fit_accuracies, vote_probability
from selfeval.records import CombinedEvidence, VerdictState

__all__ = ["CombinedJudge", "fit_members", "pool_members", "vote_of"]


class CombinedJudge:
    """Asks several judges about every comparison, under the active role, and pools their votes.

    Args:
        context: with the accuracies of the judges, or without: then they are estimated from the comparisons of each call.
    """

    def __init__(self, context: JudgeContext) -> None:
        if not isinstance(context.config.settings, CombinedConfig):
            raise TypeError(f"the combined judge needs its section of settings, got {context.config.settings}")
        self._config, self._names, self._accuracies = context.config, context.config.settings.judges, context.fit.accuracies
        self._members = [
            make_judge(
                *(context.backbone, context.templates, member),
                batch_size=context.batch_size,
                role=context.role,
                seed=context.seed,
                temperature=context.temperature,
            )
            for member in context.config.members
        ]

    def judge(self, comparisons: Sequence[Comparison], advance: Callable[[int], None] | None = None) -> list[Judgement]:
        """Judge every comparison with every member."""
        columns = [member.judge(comparisons, advance) for member in self._members]
        found = [self._evidence(row) for row in zip(*columns, strict=True)]
        accuracies = self._accuracies or fit_members(found)
        return [pool_members(evidence, accuracies, self._config) for evidence in found]

    def _evidence(self, row: Sequence[Judgement]) -> CombinedEvidence:
        members = tuple(j.evidence if not isinstance(j.evidence, CombinedEvidence) else None for j in row)
        probabilities, ties = tuple(j.probability for j in row), tuple(j.tie for j in row)
        votes = tuple(vote_of(judgement, self._config) for judgement in row)
        return CombinedEvidence(self._names, probabilities, ties, votes, (), members)


def vote_of(judgement: Judgement, config: VerdictsConfig) -> int:
    """Return the vote of a member: 1 for the first reply, -1 for the second; 0 if it abstains.

    A member abstains if it has no verdict, if its probability of a tie is above `config.tie`, or if it prefers neither reply.
    Whether it reaches `config.keep` does not matter: its accuracy says what its votes are worth.
    """
    probability = judgement.probability
    if probability is None or probability == 0.5 or state_of(judgement, config) == VerdictState.TIE:
        return 0
    return 1 if probability > 0.5 else -1


def fit_members(found: Sequence[CombinedEvidence]) -> tuple[float, ...]:
    """Estimate the accuracies of the members from their votes on some pairs."""
    return fit_accuracies([evidence.votes for evidence in found])


def pool_members(evidence: CombinedEvidence, accuracies: Sequence[float], config: VerdictsConfig) -> Judgement:
    """Return the judgement of all members together.

    With votes v_j in {-1, 0, 1} and accuracies a_j of the members:

    probability that the first reply is better = σ(Σ_j v_j log(a_j / (1 − a_j)))
    tie = mean of the members' probabilities of a tie, without the members that have none

    If every member abstains, the judgement has the most frequent of their reasons: no probability, a tie, or one half.

    Args:
        evidence: judgements of the members.
        accuracies: accuracies of the members, in (0, 1).
        config: settings of the verdicts.
    """
    found, ties = replace(evidence, accuracies=tuple(accuracies)), [tie for tie in evidence.ties if tie is not None]
    if any(evidence.votes):
        return Judgement(vote_probability(evidence.votes, accuracies), fmean(ties) if ties else None, found)
    reasons = [state_of(Judgement(*one), config) for one in zip(evidence.probabilities, evidence.ties, strict=True)]
    ((reason, _),) = Counter(reasons).most_common(1)
    if reason == VerdictState.UNPARSABLE:
        return Judgement(None, None, found)
    return Judgement(0.5, max(ties) if reason == VerdictState.TIE else 0.0, found)
