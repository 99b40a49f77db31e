"""Read the label probabilities of a verdict in the answers of a server: from the log-probs of one answer, or from votes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from selfeval.judging.labels import Labels
from selfeval.judging.pooling import Reading
from selfeval.judging.reading import is_refusal, thinking_of
from selfeval.judging.server.chat import Answer
from selfeval.judging.server.parsing import bare, verdict_in
from selfeval.records import Unreadable

__all__ = ["cause_of", "read_logprobs", "read_votes", "vote_of"]


def read_logprobs(answer: Answer, labels: Labels, least_mass: float) -> Reading:
    """Return the probabilities of the labels at the position of the verdict.

    A label has the sum of the probabilities of the tokens that begin it and no other label; it is 0 if none of them is among
    the alternatives that the server returned.

    Args:
        answer: an answer with log-probs.
        labels: the words of a verdict.
        least_mass: probability of all labels together below which there is no reading.
    """
    if answer.at_verdict is None:
        return Reading(None, answer.text, cause_of(answer))
    shares = [0.0] * len(labels.all)
    for text, logprob in answer.at_verdict.items():
        if (label := _label_of(text, labels)) is not None:
            shares[label] += math.exp(min(logprob, 0.0))
    mass = math.fsum(shares)
    if mass < least_mass or mass <= 0:
        return Reading(None, answer.text, Unreadable.LABEL_MASS, mass)
    return Reading(tuple(shares), answer.text, None, mass)


def _label_of(token: str, labels: Labels) -> int | None:
    """Return the label that a token begins, or that begins it; None if there are none or several."""
    text = bare(token).casefold()
    names = [bare(label).casefold() for label in labels.all]
    if text in names:
        return names.index(text)
    found = [n for n, name in enumerate(names) if text and name.startswith(text)]
    return found[0] if len(found) == 1 else None


def read_votes(answers: Sequence[Answer], labels: Labels, least_share: float) -> Reading:
    """Return the probabilities of the labels from sampled answers.

    With n_l of n readable answers for label l of L, its probability is (n_l + 1) / (n + L): the mean of the Dirichlet posterior
    of its share under a uniform prior (Laplace's rule of succession), so that few votes are not certain.

    Args:
        answers: the votes.
        labels: the words of a verdict.
        least_share: share of readable votes below which there is no reading.
    """
    votes = Counter(vote for answer in answers if (vote := vote_of(answer, labels)) is not None)
    readable = sum(votes.values())
    share, text = readable / len(answers), answers[0].text
    if not readable or share < least_share:
        causes = Counter(cause_of(answer) for answer in answers if vote_of(answer, labels) is None)
        return Reading(None, text, causes.most_common(1)[0][0], share)
    total = readable + len(labels.all)
    return Reading(tuple((votes[n] + 1) / total for n in range(len(labels.all))), text, None, share)


def vote_of(answer: Answer, labels: Labels) -> int | None:
    """Return the label that an answer names; None if it names none."""
    if answer.ending in ("refused", "no_room"):
        return None
    place = verdict_in(answer.text, labels, finished=answer.ending == "stop")
    if place is None:
        return None
    # The longest one that fits, as a label may begin with another.
    rest, names = bare(answer.text[place.label :]).casefold(), [bare(label).casefold() for label in labels.all]
    fitting = [n for n, name in enumerate(names) if rest.startswith(name)]
    return max(fitting, key=lambda n: len(names[n]), default=None)


_CAUSES: Mapping[str, Unreadable] = {
    "refused": Unreadable.REFUSED,
    "no_room": Unreadable.NO_ROOM,
    "cut": Unreadable.CUT,
}


def cause_of(answer: Answer) -> Unreadable:
    """Return why an answer names no label."""
    if answer.ending in _CAUSES:
        return _CAUSES[answer.ending]
    begin = thinking_of(answer.text).end
    return Unreadable.REFUSED if is_refusal(answer.text[begin or 0 :]) else Unreadable.NO_LEAD
