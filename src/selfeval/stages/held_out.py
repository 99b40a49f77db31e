"""Score judged pairs with the evaluator. This module never reads gold; evaluation passes the gold answers in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from selfeval.evaluation.evaluator import JudgedPair
from selfeval.records import Question, Verdict
from selfeval.stages.context import Context
from selfeval.stages.evaluation_work import Score
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
    score: Score | None = None,
    store: RunStore | None = None,
) -> list[JudgedPair]:
    """Return judged pairs with the evaluator's margin.

    Args:
        context: context of the round, whose evaluators score.
        verdicts: verdicts on the pairs.
        questions: questions by id.
        right_of: Optional. Gold of a pair. Default: there is none.
        score: Optional. Scores replies. Default: the evaluators of the context, in this process.
        store: Optional. Folder of the round with the replies. Default: this round.
    """
    if not verdicts:
        return []
    replies = context.replies(store)
    both = [(replies[v.first], replies[v.second]) for v in verdicts]
    texts = [questions[v.question_id].text for v in verdicts]
    prompts = [context.grade_prompt(v.question_id, text) for v, text in zip(verdicts, texts, strict=True)]
    # The replies of a pair are next to each other, so that they share the pass over their prompt.
    doubled, ids = [prompt for prompt in prompts for _ in range(2)], [reply.ids for pair in both for reply in pair]
    scores_KB = (score or context.scorer().each)(doubled, ids)
    margins_KN = scores_KB[:, 0::2] - scores_KB[:, 1::2]
    # The spread over members is a population deviation; with a single member it is 0 rather than undefined.
    margins, deviations = margins_KN.mean(0).tolist(), margins_KN.std(0, correction=0).tolist()
    right = [right_of(text, (a.text, b.text)) for text, (a, b) in zip(texts, both, strict=True)]
    return [JudgedPair(*row) for row in zip(verdicts, both, margins, deviations, right, strict=True)]
