"""How many replies the token limit cut off, and how much the replies to the same question differ.

A judge that reads half of a reply compares something else, and it can only prefer one of two replies that differ.
"""

from __future__ import annotations

from collections.abc import Sequence

from selfeval.quality.reply_diversity import measure_diversity
from selfeval.quality.statistics import mean_figure, proportion
from selfeval.records import Reply
from selfeval.report.schema import Replies, RepliesPerQuestion

__all__ = ["measure_replies"]


def measure_replies(
    limit: int,
    replies: Sequence[Reply],
    before: Sequence[bool],
    after: Sequence[bool],
    same_question: Sequence[Sequence[str]] = (),
) -> Replies:
    """Compute the shares of replies without an end-of-sequence token, and the diversity of the replies to the same question.

    Args:
        limit: token limit of the replies.
        replies: the replies of the stage; those from a file have no limit and are left out.
        before: whether each reply before training was finished.
        after: the same after training.
        same_question: Optional. Texts of the replies to each training question. Default: none, so no diversity.
    """
    by_question: dict[str, list[bool]] = {}
    for reply in replies:
        if reply.sampling_method != "file":
            by_question.setdefault(reply.question_id, []).append(not reply.finished)
    # Replies to one question are dependent (hard questions get long replies), so the cases are questions.
    shares = [sum(cut) / len(cut) for cut in by_question.values()]
    return Replies(
        limit=limit,
        unfinished=mean_figure(shares),
        unfinished_before=proportion([not finished for finished in before]),
        unfinished_after=proportion([not finished for finished in after]),
        per_question=_per_question(same_question),
    )


def _per_question(texts: Sequence[Sequence[str]]) -> RepliesPerQuestion | None:
    found = measure_diversity(texts)
    return RepliesPerQuestion(**vars(found)) if found.identical.n else None
