"""Score judged pairs with the evaluator. This module never reads gold; evaluation passes the gold answers in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from selfeval.evaluation.evaluator import JudgedPair
from selfeval.records import Question, Verdict
from selfeval.stages.context import Context
from selfeval.store import RunStore

__all__ = ["RightOf", "score_pairs"]

RightOf = Callable[[str, tuple[str, str]], tuple[bool | None, bool | None] | None]
"""Returns whether each of two replies to a question is right; None if nothing is known about them."""


def score_pairs(
    context: Context,
    verdicts: Sequence[Verdict],
    questions: Mapping[str, Question],
    *,
    right_of: RightOf = lambda question, replies: None,
    advance: Callable[[int], None] | None = None,
    store: RunStore | None = None,
) -> list[JudgedPair]:
    """Return judged pairs with the evaluator's margin.

    Args:
        context: context of the round, whose evaluators score.
        verdicts: verdicts on the pairs.
        questions: questions by id.
        right_of: Optional. Gold of a pair. Default: there is none.
        advance: Optional. Callback that advances the progress bar.
        store: Optional. Folder of the round with the replies. Default: this round.
    """
    if not verdicts:
        return []
    replies = context.replies(store)
    both = [(replies[v.first], replies[v.second]) for v in verdicts]
    texts = [questions[v.question_id].text for v in verdicts]
    prompts = [context.grade_prompt(v.question_id, text) for v, text in zip(verdicts, texts, strict=True)]
    ids = [a.ids for a, _ in both] + [b.ids for _, b in both]
    # One call scores all first replies, then all second ones; `both` has the same order.
    scores_KB = context.scorer().each(prompts * 2, ids, advance)
    margins_KN = scores_KB[:, : len(both)] - scores_KB[:, len(both) :]
    # The spread over members is a population deviation; with a single member it is 0 rather than undefined.
    margins, deviations = margins_KN.mean(0).tolist(), margins_KN.std(0, correction=0).tolist()
    right = [right_of(text, (a.text, b.text)) for text, (a, b) in zip(texts, both, strict=True)]
    return [JudgedPair(*row) for row in zip(verdicts, both, margins, deviations, right, strict=True)]
