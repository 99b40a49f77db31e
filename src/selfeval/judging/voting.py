"""Votes on the answer of a question: sampled replies, or sampled completions of the beginning of a reply."""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from selfeval.backbone.roles import Backbone
from selfeval.config import AgreementConfig
from selfeval.judging.loops import ends_in_loop
from selfeval.judging.reading import thinking_of
from selfeval.judging.templates import Templates
from selfeval.prompt import Prompt
from selfeval.quality.answers import answer_of
from selfeval.records import Unreadable
from selfeval.rollout.engine import generate
from selfeval.rollout.requests import Request, Rollout

__all__ = ["Ballot", "Vote", "Voter", "count_votes", "majority_of"]

_TAIL = 32
"""Number of last tokens of a prompt searched for an opening marker of thinking."""


@dataclass(frozen=True)
class Vote:
    """One vote.

    Attributes:
        answer: final answer in normal form; None without one.
        cause: why it has no answer; None if it has one.
        text: text of the reply.
    """

    answer: str | None
    cause: Unreadable | None
    text: str


@dataclass(frozen=True)
class Ballot:
    """A vote to hold.

    Attributes:
        prompt: prompt of a reply.
        begun: tokens with which every reply begins. Default: none.
    """

    prompt: Prompt
    begun: tuple[int, ...] = ()


class Voter:
    """Samples replies under the active role, and reads their final answers.

    Args:
        backbone: the model.
        templates: clean the texts.
        settings: form of the answers, and how the votes are sampled.
        limit: maximum number of tokens that are sampled for a vote.
        batch_size: maximum number of votes that are sampled at once.
        seed: seed of the votes.
    """

    def __init__(
        self, backbone: Backbone, templates: Templates, settings: AgreementConfig, *, limit: int, batch_size: int, seed: int
    ) -> None:
        self._backbone, self._templates, self._settings = backbone, templates, settings
        self._limit, self._batch_size, self._seed = limit, batch_size, seed

    def hold(
        self, ballots: Mapping[str, Ballot], votes: int, advance: Callable[[int], None] | None = None
    ) -> dict[str, list[Vote]]:
        """Hold votes. Each depends on its name and the seed, not on the others.

        Args:
            ballots: what is voted on, by name.
            votes: number of votes on each.
            advance: Optional. Called with the number of votes that were just sampled.

        Returns:
            The votes by name. One whose prompt fills the model's context has a single vote without an answer.
        """
        fitting = {name: ballot for name, ballot in ballots.items() if self._fits(ballot)}
        requests = [self._request(name, ballot, n) for name, ballot in fitting.items() for n in range(votes)]
        rollouts = generate(
            self._backbone,
            requests,
            max_new_tokens=self._limit,
            seed=0,  # each request has its own stream
            batch_size=self._batch_size,
            advance=advance,
        )
        found = {name: [_no_room(ballot)] for name, ballot in ballots.items() if name not in fitting}
        for number, (name, ballot) in enumerate(fitting.items()):
            found[name] = [self._vote(ballot, rollout) for rollout in rollouts[number * votes : (number + 1) * votes]]
        return found

    def answer(self, text: str, prompt: str = "", *, finished: bool) -> str | None:
        """Return the final answer of a reply. One that was cut off has none: its last number is a step on the way.

        Args:
            text: text of the reply, thinking included.
            prompt: text before it; only its end is read. Default: empty.
            finished: whether the reply ended by itself.
        """
        begin = thinking_of(text, prompt).end
        if not finished or begin is None:
            return None
        return answer_of(self._templates.clean(text[begin:]), self._settings.answer, self._settings.pattern)

    def _fits(self, ballot: Ballot) -> bool:
        return len(ballot.prompt.ids) + len(ballot.begun) < (self._backbone.loaded.context_length or sys.maxsize)

    def _request(self, name: str, ballot: Ballot, number: int) -> Request:
        # By name, so the votes do not depend on the other ballots of a shard.
        stream = random.Random(f"{self._seed}/votes/{name}/{number}").getrandbits(64)
        return Request(ballot.prompt.followed_by(ballot.begun), self._settings.temperature, self._settings.top_p, stream)

    def _vote(self, ballot: Ballot, rollout: Rollout) -> Vote:
        whole = (*ballot.begun, *rollout.ids)
        # With control tokens, because they may mark the thinking.
        text = str(self._templates.tokenizer.decode(list(whole)))
        opened = str(self._templates.tokenizer.decode(list(ballot.prompt.ids[-_TAIL:])))
        answer = self.answer(text, opened, finished=rollout.finished)
        return Vote(answer, None if answer is not None else self._cause(rollout), self._templates.text(whole))

    def _cause(self, rollout: Rollout) -> Unreadable:
        """Return why a vote has no answer."""
        if rollout.finished:
            return Unreadable.NO_ANSWER
        if ends_in_loop(rollout.ids):
            return Unreadable.LOOP
        # The engine stops at the end of the model's context, before the limit.
        return Unreadable.CUT if len(rollout.ids) >= self._limit else Unreadable.NO_ROOM


def _no_room(ballot: Ballot) -> Vote:
    length = len(ballot.prompt.ids) + len(ballot.begun)
    return Vote(None, Unreadable.NO_ROOM, f"(skipped: the prompt of {length} tokens does not fit the model's context)")


def count_votes(votes: Sequence[Vote]) -> dict[str, int]:
    """Return the number of votes for each answer, most frequent first."""
    return dict(Counter(vote.answer for vote in votes if vote.answer is not None).most_common())


def majority_of(votes: Sequence[Vote], share: float) -> str | None:
    """Return the most frequent answer; None if there is none, its share is too small, or another answer is as frequent.

    Args:
        votes: the votes, those without an answer included.
        share: minimum share of the answer among all votes.

    Example:
        >>> majority_of([Vote("7", None, ""), Vote("7", None, ""), Vote("8", None, "")], share=0.5)
        '7'
    """
    counts = count_votes(votes)
    if not counts:
        return None
    [(answer, most), *others] = counts.items()
    return None if most < share * len(votes) or (others and others[0][1] == most) else answer
