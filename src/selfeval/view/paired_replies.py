"""The replies of several policies to the test questions that their runs share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from selfeval.evaluation.policy import CREDITS
from selfeval.evaluation.run_comparison import shared_questions
from selfeval.records import ComparedReplies
from selfeval.view.compared_runs import ComparedRun

__all__ = ["FILTERS", "PairedReplies", "paired_replies"]

FILTERS = {"all": "all", "gold": "differ in gold", "a": "A better than B", "b": "B better than A"}
"""Filters of the replies by their names in addresses."""


@dataclass(frozen=True)
class Shared:
    """Judges that the runs of a comparison have in common.

    Attributes:
        gold: A and B have the same gold.
        gold_of_all: all runs have it.
        referee: A and B have the same referee.
    """

    gold: bool
    gold_of_all: bool
    referee: bool


@dataclass(frozen=True)
class PairedReplies:
    """A question with the reply of each run after training.

    Attributes:
        question: its text.
        ids: its id in each run.
        replies: the replies after training, with scores, gold and outcome.
        shares: judges that the runs share.
    """

    question: str
    ids: tuple[str, ...]
    replies: tuple[ComparedReplies, ...]
    shares: Shared

    @property
    def differs_in_gold(self) -> bool:
        """Whether some replies are right and others wrong by the same gold."""
        return self.shares.gold_of_all and {True, False} <= {reply.gold_after for reply in self.replies}

    @property
    def lead(self) -> float:
        """Credit of A minus that of B: by gold if it can judge both, otherwise by the outcomes against their own starts.

        It is 0 if neither can be used; gold and referee have to be the same for both.
        """
        a, b = self.replies[:2]
        if self.shares.gold and a.gold_after is not None and b.gold_after is not None:
            return float(a.gold_after) - float(b.gold_after)
        if not self.shares.referee:
            return 0.0
        credits: Mapping[str, float] = {str(outcome): credit for outcome, credit in CREDITS.items()}
        if a.outcome in credits and b.outcome in credits:
            return credits[a.outcome] - credits[b.outcome]
        return 0.0

    def passes(self, name: str) -> bool:
        """Return whether a filter shows it."""
        return {"gold": self.differs_in_gold, "a": self.lead > 0, "b": self.lead < 0}.get(name, True)


def paired_replies(runs: Sequence[ComparedRun]) -> list[PairedReplies]:
    """Return the test questions that all runs share and replied to, in the order of the first run."""
    by_text = [_by_text(run) for run in runs]
    first, *others = runs
    shared = shared_questions(first.evidence, others[0].evidence)
    for other in others[1:]:
        known = set(shared_questions(first.evidence, other.evidence))
        shared = [text for text in shared if text in known]
    judges = _shared_judges(runs)
    found = []
    for text in shared:
        replies = tuple(one[text] for one in by_text if text in one)
        if len(replies) == len(runs):
            found.append(PairedReplies(text, tuple(reply.question_id for reply in replies), replies, judges))
    return found


def _shared_judges(runs: Sequence[ComparedRun]) -> Shared:
    a, b = runs[:2]
    return Shared(a.gold == b.gold, all(run.gold == a.gold for run in runs), a.referee == b.referee)


def _by_text(run: ComparedRun) -> dict[str, ComparedReplies]:
    questions = run.evidence.questions
    return {questions[row.question_id]: row for row in run.evidence.compared if row.question_id in questions}
