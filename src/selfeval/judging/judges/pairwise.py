"""The pairwise judge: a language model prompted to compare two replies, in both orders, and to abstain.

A verdict is read at the position where the judge names the better reply: the probabilities of the three labels (first,
second, neither) there, not the sampled word alone. An unparsable answer has no probability, never a default.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from selfeval.judging.label_reader import LabelReader
from selfeval.judging.orders import combine
from selfeval.judging.protocol import Comparison, JudgeContext, Judgement
from selfeval.prompt import Prompt

__all__ = ["PairwiseJudge"]


class PairwiseJudge:
    """Compares two replies in both orders under the active role: greedily, or by `verdicts.votes` sampled votes per order.

    Args:
        context: with one kind of template, which shows a question and two replies and has verdict labels.
    """

    def __init__(self, context: JudgeContext) -> None:
        (self._kind,) = context.kinds
        self._templates, self._reader = context.templates, LabelReader(context, self._kind)

    def judge(self, comparisons: Sequence[Comparison], advance: Callable[[int], None] | None = None) -> list[Judgement]:
        """Judge every comparison in both orders; each order is one prompt."""
        prompts = [self._prompt(c) for c in comparisons]
        # Second half: the same comparisons in the other order. `read` returns the readings in the order of the prompts.
        prompts += [self._prompt(c.swapped) for c in comparisons]
        readings = self._reader.read(prompts, advance)
        half = len(comparisons)
        return [combine(a, b) for a, b in zip(readings[:half], readings[half:], strict=True)]

    def _prompt(self, comparison: Comparison) -> Prompt:
        shown = {name: getattr(comparison, name) for name in ("question", "first", "second", "first_cut", "second_cut")}
        return self._templates.prompt(self._kind, **shown)
