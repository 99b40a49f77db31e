"""The pointwise judge: a language model prompted to grade one reply at a time; the reply with the higher grade is better.

Each prompt shows one reply, so there is no order and no position bias. The grade is not the word that the model wrote but the
distribution over all grades of the rubric at the position of that word (as in G-Eval, Liu et al. 2023, section 2,
https://arxiv.org/abs/2303.16634).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from selfeval.judging.label_reader import LabelReader
from selfeval.judging.pooling import Reading
from selfeval.judging.protocol import Comparison, JudgeContext, Judgement
from selfeval.prompt import Prompt
from selfeval.records import PointwiseEvidence, SampledPointwiseEvidence

__all__ = ["PointwiseJudge", "compare_grades"]


class PointwiseJudge:
    """Grades both replies of every comparison under the active role: greedily, or by `verdicts.votes` sampled votes.

    Args:
        context: with one kind of template, which shows a question, a reply and the rubric of the templates.
    """

    def __init__(self, context: JudgeContext) -> None:
        (self._kind,) = context.kinds
        if context.templates.rubric is None:
            raise TypeError(f"the pointwise judge needs templates that were loaded with the kind {self._kind} and its rubric")
        self._templates, self._rubric = context.templates, context.templates.rubric
        self._reasoning, self._reader = context.config.reasoning, LabelReader(context, self._kind)

    def judge(self, comparisons: Sequence[Comparison], advance: Callable[[int], None] | None = None) -> list[Judgement]:
        """Judge every comparison. A reply to a question is graded once, in however many comparisons it occurs."""
        prompts = [self._prompt(c.question, c.first, cut=c.first_cut) for c in comparisons]
        prompts += [self._prompt(c.question, c.second, cut=c.second_cut) for c in comparisons]
        readings, half = self._reader.read(prompts, advance), len(comparisons)  # equal prompts are read once
        return [compare_grades(a, b, self._rubric.values) for a, b in zip(readings[:half], readings[half:], strict=True)]

    def _prompt(self, question: str, reply: str, *, cut: bool) -> Prompt:
        shown = self._rubric.shown
        return self._templates.prompt(self._kind, question=question, reply=reply, cut=cut, reasoning=self._reasoning, **shown)


def compare_grades(first: Reading, second: Reading, values: Sequence[float]) -> Judgement:
    """Compare two replies by the distributions of their grades.

    With p_i and q_j the probabilities that the first reply has the grade with value v_i and the second one that with v_j:

    probability that the first is better = Σ_{v_i > v_j} p_i q_j + tie / 2
    tie = Σ_i p_i q_i

    These are the probabilities that a grade sampled for the first reply is higher than one sampled for the second, or equal to
    it. The samples are independent, because no prompt shows both replies. With two grades, the first probability is
    1/2 + (p_1 - q_1) / 2. A tie is an equal grade rather than a small difference of the expected grades (`evidence.grades`),
    because such a difference may come from two confident equal grades or from two uniform distributions, and only the first
    case has a high probability of a tie. If either reply has no grade, there is no probability.

    Args:
        first, second: probabilities of the grades of each reply, in the order of `values`; they need not add up to 1.
        values: number that each grade stands for.

    Example:
        >>> found = compare_grades(Reading((0.1, 0.9), ""), Reading((0.6, 0.4), ""), (0.0, 1.0))
        >>> round(found.probability, 3), round(found.tie, 3)
        (0.75, 0.42)
    """
    p, q = _distribution(first), _distribution(second)
    evidence = _evidence((first, second), (p, q), values)
    if not p or not q:
        return Judgement(None, None, evidence)
    tie = math.fsum(a * b for a, b in zip(p, q, strict=True))
    pairs = [(a * b, v > w) for a, v in zip(p, values, strict=True) for b, w in zip(q, values, strict=True)]
    higher = math.fsum(chance for chance, is_higher in pairs if is_higher)
    return Judgement(min(higher + tie / 2, 1.0), min(tie, 1.0), evidence)


def _evidence(
    readings: tuple[Reading, Reading], distributions: tuple[tuple[float, ...], tuple[float, ...]], values: Sequence[float]
) -> PointwiseEvidence:
    (first, second), (p, q) = readings, distributions
    found = PointwiseEvidence(
        (_mean(p, values), _mean(q, values)),
        distributions,
        (first.raw_output, second.raw_output),
        (first.cause, second.cause),
        (first.label_mass, second.label_mass),
    )
    if first.spread is None or second.spread is None:
        return found
    readable, entropies = (first.spread.readable, second.spread.readable), (first.spread.entropy, second.spread.entropy)
    return SampledPointwiseEvidence(**vars(found), readable_votes=readable, vote_entropies=entropies)


def _distribution(reading: Reading) -> tuple[float, ...]:
    if reading.probabilities is None:
        return ()
    total = math.fsum(reading.probabilities)
    return tuple(probability / total for probability in reading.probabilities)


def _mean(distribution: Sequence[float], values: Sequence[float]) -> float | None:
    """Return the expected grade; None if the reply has none."""
    return math.fsum(p * v for p, v in zip(distribution, values, strict=True)) if distribution else None
