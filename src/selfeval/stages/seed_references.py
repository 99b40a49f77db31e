"""Replies to the seeds that have a `reply`, before and after training, compared with it.

The seeds are shown as examples when training questions are written, so they are no held-out questions: the figures say how
close the policy comes to the user's own replies, and nothing about new questions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from selfeval.errors import MissingPackageError
from selfeval.evaluation.reference_scores import check_packages, compare_with_references
from selfeval.prompt import Prompt
from selfeval.records import Question, Split
from selfeval.report.schema import ReferenceScores
from selfeval.rollout.guide import Guide
from selfeval.stages.context import Context
from selfeval.stages.evaluation_work import sample_replies
from selfeval.stages.seeds import replied_seeds

__all__ = ["compare_seed_replies", "seed_passes"]

MOST_SEEDS = 200
"""Seeds that are asked at most; the first ones."""


def seed_passes(context: Context) -> int:
    """Return the number of replies to seeds that the evaluation samples; 0 if a library is missing."""
    rows = _asked(context)
    return 2 * len(rows) if rows and _missing_package() is None else 0


def compare_seed_replies(context: Context, guide: Guide | None, advance: Callable[[int], None]) -> ReferenceScores | None:
    """Sample replies to the seeds before and after training, and compare them with the replies of the file.

    Args:
        context: context of the round.
        guide: Optional. Value guidance of the policy.
        advance: called with the number of replies finished since the last call.

    Returns:
        The scores. None if no seed has a reply; None, with a note, if a library is not installed.
    """
    rows = _asked(context)
    if not rows:
        return None
    if error := _missing_package():
        context.terminal.note(f"evaluation: replies to the seeds are not compared with those of the file, because {error}")
        return None
    prompts, limit = [prompt for prompt, _ in rows], context.reply_limit
    sampled = partial(sample_replies, context.model, context.config, prompts, limit=limit, advance=advance)
    before, after = (
        [context.templates.text(r.reply_ids) for r in replies]
        for replies in (
            sampled(guide=None, seed=context.seed("seed-replies-before"), role=context.ensure_start()),
            sampled(guide=guide, seed=context.seed("seed-replies-after")),
        )
    )
    return compare_with_references(before, after, [[reference] for _, reference in rows])


def _missing_package() -> MissingPackageError | None:
    """Return the error of the libraries of the metrics; None if they are installed."""
    try:
        check_packages()
    except MissingPackageError as error:
        return error
    return None


def _asked(context: Context) -> Sequence[tuple[Prompt, str]]:
    """Return prompt and reference of each seed with a reply, without those that leave no room for a reply."""
    length, limit = (
        context.backbone.loaded.context_length,
        context.reply_limit + (context.config.replies.max_thinking_tokens or 0),
    )
    rows = [
        (context.templates.reply_prompt(Question(f"seed-{number}", question, Split.TEST, "seed")), reply)
        for number, (question, reply) in enumerate(replied_seeds(context.config, context.seeds)[:MOST_SEEDS])
    ]
    return [row for row in rows if length is None or len(row[0].ids) + limit <= length]
