"""Write questions about passages with the model, and accept or drop each of them.

Sample number i asks about the i-th passage of an order that visits the documents in turn, and begins again at its end. Its
random numbers depend on the seed and on i alone, so a sample is the same in any batch and after a resume.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import zip_longest
from typing import Any

from selfeval.backbone.adapters import BASE
from selfeval.backbone.roles import Backbone
from selfeval.config import QuestionsConfig
from selfeval.documents.chunks import Chunk
from selfeval.errors import InputError
from selfeval.grounding import is_chinese
from selfeval.judging.templates import Templates
from selfeval.prompt import Prompt
from selfeval.quality.dedupe import NearDuplicates, normalise, units
from selfeval.quality.passage_questions import (
    LEAST_RELATED,
    LEAST_SUPPORT,
    first_question,
    passage_reason,
    says_unanswered,
    share_in,
    support,
)
from selfeval.quality.question_filters import QuestionFilters
from selfeval.rollout.engine import generate
from selfeval.rollout.requests import Request, Rollout
from selfeval.stages.draws import Draws

__all__ = ["REPLY_TOKENS", "Accepted", "Outcome", "QuestionWriter", "complete_reply", "in_turn"]

REPLY_TOKENS = 96
"""Token limit of the reply that is compared with the passage."""
_FEWEST_UNITS = 8
"""Passages with fewer words, or Chinese characters, are not asked about."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of a sample.

    Attributes:
        number: number of the sample, from 0.
        question: the text that the model wrote.
        reason: why it was dropped; None for a seed.
        values: further fields of its record.
    """

    number: int
    question: str
    reason: str | None
    values: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return the line of the file of seeds or, with its reason, of dropped questions."""
        reason = {} if self.reason is None else {"reason": self.reason}
        return {**reason, "question": self.question, **self.values}


def in_turn(chunks: Sequence[Chunk], draws: Draws) -> list[Chunk]:
    """Return the chunks that are long enough to ask about, one of each document in turn, in random order within a document.

    Any first N of them are spread over the documents as evenly as the documents' numbers of chunks allow.
    """
    by_document: dict[str, list[Chunk]] = {}
    for chunk in chunks:
        if len(units(chunk.text)) >= _FEWEST_UNITS:
            by_document.setdefault(chunk.document, []).append(chunk)
    for name, found in by_document.items():
        draws.random("passages", name).shuffle(found)
    turns = zip_longest(*by_document.values())
    return [chunk for turn in turns for chunk in turn if chunk is not None]


class Accepted:
    """The questions that were accepted so far, for the check for near-duplicates.

    Args:
        threshold: overlap from which two questions are near-duplicates (`questions.near_duplicate`).
    """

    def __init__(self, threshold: float) -> None:
        self._index, self.count = NearDuplicates(threshold), 0

    def add(self, question: str) -> None:
        self._index.add(question, question)
        self.count += 1

    def twin(self, question: str) -> str | None:
        """Return the accepted question that this one is a near-duplicate of."""
        return self._index.find(question)


@dataclass(frozen=True)
class QuestionWriter:
    """Samples questions and checks them.

    Attributes:
        backbone: the model.
        templates: templates with the kinds `passage_question` and `passage_answer`.
        config: settings of questions: sampling, limits, near-duplicates.
        chunks: the passages, in the order in which they are asked about; at least one.
        draws: random numbers.
        batch_size: batch size of the sampling.
        instruction: fixed text of the prompts, which is not a question.
        checks_replies: whether the model answers each question, and the reply must be in the passage.
    """

    backbone: Backbone
    templates: Templates
    config: QuestionsConfig
    chunks: Sequence[Chunk]
    draws: Draws
    batch_size: int
    instruction: str
    checks_replies: bool = True

    def check_context(self, limit: int) -> None:
        """Refuse passages that leave no room in the model's context.

        Args:
            limit: the limit of their tokens, for the message.

        Raises:
            InputError: the longest prompt, with the question and the reply, exceeds the context.
        """
        context = self.backbone.loaded.context_length
        longest = max(len(self._question_prompt(chunk).ids) for chunk in self.chunks)
        needed = longest + self.config.max_new_tokens + REPLY_TOKENS
        if context is not None and needed > context:
            raise InputError(
                f"--chunk-tokens {limit}: prompt, question and reply take up to {needed} tokens, and the model's context has "
                f"{context}; lower --chunk-tokens, or use a model with a longer context"
            )

    def outcomes(self, first: int, count: int, accepted: Accepted, wanted: int) -> Iterator[Outcome]:
        """Sample questions and yield the outcome of each, in order, until enough are accepted.

        Args:
            first: number of the first sample.
            count: number of samples.
            accepted: the questions accepted so far; new ones are added.
            wanted: number of accepted questions after which no outcome is yielded.
        """
        chunks = [self.chunks[number % len(self.chunks)] for number in range(first, first + count)]
        samples = self._questions(chunks, first)
        reasons = [self._reason(text, chunk, is_whole) for (text, is_whole), chunk in zip(samples, chunks, strict=True)]
        texts = [text for text, _ in samples]
        usable = [i for i, reason in enumerate(reasons) if reason is None and accepted.twin(texts[i]) is None]
        replies = dict(zip(usable, self._replies([(chunks[i], texts[i]) for i in usable]), strict=True))
        for i, (text, chunk) in enumerate(zip(texts, chunks, strict=True)):
            if accepted.count >= wanted:
                return
            yield self._outcome(first + i, text, chunk, reasons[i], replies.get(i), accepted)

    def _outcome(
        self, number: int, text: str, chunk: Chunk, reason: str | None, answer: tuple[str, bool] | None, accepted: Accepted
    ) -> Outcome:
        values: dict[str, Any] = {"passage": chunk.passage, "source": chunk.source}
        if reason is not None:
            return Outcome(number, text, reason, values)
        # Before the reply is looked at, so that the reason does not depend on which questions were in the same batch.
        if twin := accepted.twin(text):
            return Outcome(number, text, "near_duplicate", {"of": twin, **values})
        if self.checks_replies:
            reply, is_whole = answer or ("", True)
            values = {"reply": reply, **values}
            if reason := _reply_reason(reply, is_whole, chunk.passage, text):
                return Outcome(number, text, reason, values)
        accepted.add(text)
        return Outcome(number, text, None, values)

    # -- questions ------------------------------------------------------------------------------------------------------

    def _question_prompt(self, chunk: Chunk) -> Prompt:
        return self.templates.prompt("passage_question", passage=chunk.passage, chinese=is_chinese(chunk.text))

    def _questions(self, chunks: Sequence[Chunk], first: int) -> list[tuple[str, bool]]:
        """Return a text per chunk, and whether it is complete."""
        config, templates = self.config, self.templates
        requests = [Request(self._question_prompt(chunk), config.temperature, config.top_p) for chunk in chunks]
        rollouts = self._generate(requests, config.max_new_tokens, first, templates.ask_stop_ids)
        found: list[tuple[str, bool]] = []
        for rollout, request in zip(rollouts, requests, strict=True):
            text, is_whole = templates.question_from(rollout.ids, request.prompt), rollout.finished
            if text is None:  # it is nothing but reasoning
                found.append((templates.text(rollout.ids), False))
                continue
            asked = first_question(text)
            found.append((asked, is_whole or templates.has_stop(rollout.ids) or asked != text))
        return found

    def _generate(self, requests: list[Request], limit: int, first: int, stop: Sequence[int] = ()) -> list[Rollout]:
        if not requests:
            return []
        with self.backbone.acting_as(BASE):
            return generate(
                self.backbone,
                requests,
                max_new_tokens=limit,
                seed=self.draws.seed("passage_questions"),
                batch_size=self.batch_size,
                stop=stop,
                first=first,
            )

    def _reason(self, text: str, chunk: Chunk, is_whole: bool) -> str | None:
        """Return the reason to drop a question for its text alone."""
        if not is_whole:
            return "unfinished"
        if len(normalise(text)) < self.config.shortest:
            return "too_short"
        filters = self._filters.get(chunk.document) or QuestionFilters.of([chunk.text], self.instruction)
        if reason := filters.reason(text) or passage_reason(text):
            return reason
        return "unrelated" if share_in(text, chunk.passage) < LEAST_RELATED else None

    @cached_property
    def _filters(self) -> dict[str, QuestionFilters]:
        """The filters of each document: questions are in its scripts and languages."""
        texts: dict[str, list[str]] = {}
        for chunk in self.chunks:
            texts.setdefault(chunk.document, []).append(chunk.text)
        return {name: QuestionFilters.of(["\n".join(found)], self.instruction) for name, found in texts.items()}

    # -- replies --------------------------------------------------------------------------------------------------------

    def _replies(self, asked: Sequence[tuple[Chunk, str]]) -> list[tuple[str, bool]]:
        """Return the model's greedy reply to each question, with its passage in view, and whether it is complete."""
        if not self.checks_replies:
            return [("", True)] * len(asked)
        prompts = [
            self.templates.prompt("passage_answer", passage=chunk.passage, question=text, chinese=is_chinese(text))
            for chunk, text in asked
        ]
        rollouts = self._generate([Request(prompt, 0.0) for prompt in prompts], REPLY_TOKENS, 0)
        templates = self.templates
        texts = [templates.without_thinking(templates.text(rollout.ids)) for rollout in rollouts]
        return [
            complete_reply(text, rollout.finished, is_chat=templates.uses_chat)
            for text, rollout in zip(texts, rollouts, strict=True)
        ]


def complete_reply(text: str, finished: bool, *, is_chat: bool) -> tuple[str, bool]:
    """Return the reply in a text, and whether it is complete.

    Without a chat template, a model rarely ends its reply: it continues after a blank line with a further question.

    Args:
        text: the text that the model wrote.
        finished: whether the model ended it before the token limit.
        is_chat: whether the model has a chat template.

    Example:
        >>> complete_reply("It is 3 euros.\\n\\nQuestion: Wh", False, is_chat=False)
        ('It is 3 euros.', True)
    """
    if is_chat:
        return text.strip(), finished
    reply, blank, _ = text.strip().partition("\n\n")
    return reply.strip(), finished or bool(blank)


def _reply_reason(reply: str, is_whole: bool, passage: str, question: str) -> str | None:
    if says_unanswered(reply):
        return "unanswered"
    if not is_whole:
        return "unfinished_reply"
    return "not_in_passage" if support(reply, passage, question) < LEAST_SUPPORT else None
