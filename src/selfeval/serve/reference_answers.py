"""Reference answers that scoring requests need, sampled in the live batch of the base.

Generated in a pass of their own they would delay all other replies by as long as they take.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from selfeval.backbone.adapters import BASE
from selfeval.records import Question
from selfeval.rollout.requests import Rollout
from selfeval.runs.conversations import AnyQuestion
from selfeval.serve.sampling import Sampling
from selfeval.serve.served_run import ServedRun

__all__ = ["ReferenceAnswers"]


class _Waiter:
    """A scoring request and the questions whose answers it waits for."""

    def __init__(self, left: set[Question], then: Callable[[Exception | None], None]) -> None:
        self.left, self._then = left, then

    def note(self, question: Question, error: Exception | None) -> None:
        """Take note of the end of an answer; not after an error, which ended the request."""
        if question in self.left:
            self.left = set() if error is not None else self.left - {question}
            if not self.left:
                self._then(error)


class ReferenceAnswers:
    """Sample reference answers, each once, and give them to the evaluator. All calls must come from the worker's thread.

    Args:
        run: the models.
        room: tokens of a prompt with its reply in the batch; longer ones are left to the evaluator's own pass.
        sample: adds a reply to the batch of its role.
        cancel: removes one.
    """

    def __init__(
        self, run: ServedRun, room: int, sample: Callable[[Sampling], None], cancel: Callable[[Sampling], None]
    ) -> None:
        self._run, self._room, self._sample, self._cancel = run, room, sample, cancel
        self._waiting: dict[Question, tuple[Sampling, list[_Waiter]]] = {}

    @property
    def count(self) -> int:
        """Number of answers that are sampled or wait for a place; may be read from any thread."""
        return len(self._waiting)

    def need(self, questions: Sequence[AnyQuestion], then: Callable[[Exception | None], None]) -> Callable[[], None]:
        """Call a function when the evaluator has all reference answers that it reads, or with the error of one of them.

        Returns:
            A function that gives up waiting, and cancels the answers for which nobody else waits.

        Raises:
            InputError: a conversation is malformed.
        """
        missing = self._missing(questions)
        waiter = _Waiter(set(missing), then)
        if not missing:
            then(None)
        for question in missing:
            if question in waiter.left:  # not after an error
                self._ask(question, waiter)
        return lambda: self._leave(waiter)

    def _leave(self, waiter: _Waiter) -> None:
        left, waiter.left = waiter.left, set()
        for question in left & self._waiting.keys():
            sampling, waiters = self._waiting[question]
            waiters.remove(waiter)
            if not waiters:
                del self._waiting[question]
                self._cancel(sampling)

    def _missing(self, questions: Sequence[AnyQuestion]) -> list[Question]:
        evaluator = self._run.evaluator
        # The batch does not limit thinking as the run did, so such answers are left to the evaluator's own pass.
        if evaluator is None or BASE not in self._run.guides or self._run.model.templates.thinking() is not None:
            return []
        return [question for question in evaluator.unanswered(questions) if self._fits(question)]

    def _fits(self, question: Question) -> bool:
        model = self._run.model
        return len(model.reference_request(question).prompt.ids) + model.reply_limit <= self._room

    def _ask(self, question: Question, waiter: _Waiter) -> None:
        if question in self._waiting:
            self._waiting[question][1].append(waiter)
            return
        sampling = self._sampling(question)
        self._waiting[question] = sampling, [waiter]
        self._sample(sampling)

    def _sampling(self, question: Question) -> Sampling:
        model, evaluator = self._run.model, self._run.evaluator
        assert evaluator is not None, "without an evaluator, no answer is missing"

        def ended(rollout: Rollout) -> None:
            evaluator.remember_answer(question, model.templates.text(rollout.reply_ids))
            self._note(question, None)

        return Sampling(
            BASE,
            model.reference_request(question),
            seed=0,
            limit=model.reply_limit,
            top=0,
            thinks=False,
            on_token=None,
            on_end=ended,
            on_error=lambda error: self._note(question, error),
        )

    def _note(self, question: Question, error: Exception | None) -> None:
        _, waiters = self._waiting.pop(question)
        for waiter in waiters:
            waiter.note(question, error)
