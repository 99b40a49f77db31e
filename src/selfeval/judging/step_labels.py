"""Label the steps of replies without humans: complete the reply from the end of each step, and compare the final answers.

Wang et al. 2024, Math-Shepherd, section 3.3 (https://arxiv.org/abs/2312.08935): a step is good if a reply continued from it
reaches the right answer. There the right answer is known. Here it is the answer of most replies that are sampled to the
question, as in the judge `agreement`, or any reference that the caller gives, such as gold for a measurement.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from selfeval.judging.voting import Ballot, Vote, Voter
from selfeval.prompt import Prompt

__all__ = ["SteppedReply", "complete_steps", "share_of", "step_label"]


@dataclass(frozen=True)
class SteppedReply:
    """A finished reply and its steps.

    Attributes:
        question: identifies the question.
        prompt: prompt of the reply.
        ids: token ids of the reply.
        ends: number of tokens up to the end of each step (`step_ends`).
        answer: final answer of the reply in normal form; None without one.
    """

    question: str
    prompt: Prompt
    ids: tuple[int, ...]
    ends: tuple[int, ...]
    answer: str | None


def complete_steps(
    voter: Voter, replies: Sequence[SteppedReply], completions: int, advance: Callable[[int], None] | None = None
) -> list[list[list[str | None]]]:
    """Complete replies from the end of each step but the last, under the active role.

    Replies to a question that begin with the same tokens share the completions of that beginning.

    Args:
        voter: samples the completions.
        replies: replies, split into steps.
        completions: number of completions of each step.
        advance: Optional. Called with the number of completions that were just sampled.

    Returns:
        For each reply and each step, the final answers of the completed replies; None for one without an answer. The last step
        ends the reply, so all of its answers are the reply's own.
    """
    ballots: dict[str, Ballot] = {}
    for reply in replies:
        ballots.update({_name(reply, end): Ballot(reply.prompt, reply.ids[:end]) for end in reply.ends[:-1]})
    found = voter.hold(ballots, completions, advance)
    return [_answers(reply, found, completions) for reply in replies]


def _answers(reply: SteppedReply, found: Mapping[str, Sequence[Vote]], completions: int) -> list[list[str | None]]:
    sampled = [[vote.answer for vote in found[_name(reply, end)]] for end in reply.ends[:-1]]
    return [*sampled, [reply.answer] * completions]


def _name(reply: SteppedReply, end: int) -> str:
    return f"{reply.question}/{' '.join(map(str, reply.ids[:end]))}"


def share_of(answers: Sequence[str | None], reference: str) -> float:
    """Return the share of completions with the reference answer; one without an answer does not have it."""
    return sum(answer == reference for answer in answers) / len(answers)


def step_label(share: float, kind: Literal["soft", "hard"]) -> float:
    """Return the label of a step: the share of its completions that have the reference answer, or whether any has it.

    Wang et al. 2024, eq. 3 (`hard`) and 4 (`soft`).

    Args:
        share: share of the completions with the reference answer.
        kind: `soft` or `hard`.

    Example:
        >>> step_label(0.25, "soft"), step_label(0.25, "hard"), step_label(0.0, "hard")
        (0.25, 1.0, 0.0)
    """
    return share if kind == "soft" else float(share > 0)
