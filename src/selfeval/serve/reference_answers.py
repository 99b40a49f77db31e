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

_Waiter = Callable[[Exception | None], None]


class ReferenceAnswers:
    """Sample reference answers, each once, and give them to the evaluator. All calls must come from the worker's thread.

    Args:
        run: the models.
        room: tokens of a prompt with its reply in the batch; longer ones are left to the evaluator's own pass.
        sample: adds a reply to the batch of its role.
    """

    def __init__(self, run: ServedRun, room: int, sample: Callable[[Sampling], None]) -> None:
        self._run, self._room, self._sample = run, room, sample
        self._waiting: dict[Question, list[_Waiter]] = {}

    def need(self, questions: Sequence[AnyQuestion], then: _Waiter) -> None:
        """Call a function when the evaluator has all reference answers that it reads, or with the error of one of them.

        Raises:
            InputError: a conversation is malformed.
        """
        left = set(self._missing(questions))
        if not left:
            then(None)
            return

        def one_ended(question: Question) -> _Waiter:
            def ended(error: Exception | None) -> None:
                if question in left:  # not after an error, which ended the request
                    left.clear() if error is not None else left.remove(question)
                    if not left:
                        then(error)

            return ended

        for question in tuple(left):
            self._ask(question, one_ended(question))

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
        is_asked = question in self._waiting
        self._waiting.setdefault(question, []).append(waiter)
        if not is_asked:
            self._sample(self._sampling(question))

    def _sampling(self, question: Question) -> Sampling:
        model, evaluator = self._run.model, self._run.evaluator
        assert evaluator is not None, "without an evaluator, no answer is missing"

        def ended(rollout: Rollout) -> None:
            evaluator.remember_answer(question, model.templates.text(rollout.reply_ids))
            self._tell(question, None)

        return Sampling(
            BASE,
            model.reference_request(question),
            seed=0,
            limit=model.reply_limit,
            top=0,
            thinks=False,
            on_token=None,
            on_end=ended,
            on_error=lambda error: self._tell(question, error),
        )

    def _tell(self, question: Question, error: Exception | None) -> None:
        for waiter in self._waiting.pop(question, []):
            waiter(error)
