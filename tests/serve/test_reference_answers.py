"""Reference answers of scoring requests: sampled with the other replies, and equal to those of the evaluator."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from selfeval.backbone.adapters import BASE
from selfeval.rollout.requests import Request
from selfeval.runs.evaluator import Evaluator
from selfeval.runs.model import RunModel
from selfeval.serve.api_errors import ApiError
from selfeval.serve.limits import Limits
from selfeval.serve.metrics import Metrics
from selfeval.serve.sampling import Sampling
from selfeval.serve.served_run import ServedRun
from selfeval.serve.service import Service
from selfeval.serve.worker import Worker
from served import wait_for
from toy import ToyRun

QUESTIONS = ["Tom has 3 pens. He buys 2 more. How many pens does Tom have now?", "Mia has 9 cups. 4 break. How many are left?"]
REPLIES = ["3 + 2 = 5. The answer is 5.", "9 - 4 = 5. The answer is 5."]


@pytest.fixture(scope="module")
def served(toy_run: ToyRun) -> ServedRun:
    return ServedRun.load(toy_run.folder)


def test_scores_are_those_of_the_evaluator_without_a_pass_for_the_answers(
    served: ServedRun, toy_run: ToyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions, replies = [*QUESTIONS, QUESTIONS[0]], [*REPLIES, "Five."]
    expected = Evaluator.load(toy_run.folder).score(questions, replies)
    assert served.evaluator is not None
    assert len(served.evaluator.unanswered(questions)) == 2, "the evaluator of this run reads reference answers"

    def refuse(self: RunModel, asked: Any) -> list[str]:
        raise AssertionError("generated in a pass that delays all replies")

    monkeypatch.setattr(RunModel, "reference_answers", refuse)
    worker = Worker(served, Limits())
    first, second = worker.score(questions, replies), worker.score(questions[:1], replies[:1])
    worker.start()
    assert first.result(120) == pytest.approx(expected, abs=1e-5)
    assert second.result(120) == pytest.approx(expected[:1], abs=1e-5)
    assert worker.scoring == 0
    worker.stop(10)
    assert served.evaluator.unanswered(questions) == []


def test_other_replies_continue_while_an_answer_is_sampled(served: ServedRun) -> None:
    """The score comes after the tokens of the answer, and the reply has a token in each of these steps."""
    prompt = served.model.templates.reply_prompt
    events: list[str] = []
    assert served.evaluator is not None
    question = served.evaluator.unanswered(["Ann has 8 hats. She gets 1 more. How many hats does Ann have now?"])[0]
    asked = Request(prompt(question), temperature=1.0)
    reply = Sampling(
        *(BASE, asked, 0, 40, 0, False),
        on_token=lambda token: events.append("token"),
        on_end=lambda rollout: events.append("end"),
        on_error=lambda error: events.append(str(error)),
    )
    worker = Worker(served, Limits())
    worker.sample(reply)
    scored = worker.score([question.text], ["8 + 1 = 9. The answer is 9."])
    scored.add_done_callback(lambda future: events.append("score"))
    worker.start()
    scored.result(120)
    worker.stop(10)
    assert "token" in events[: events.index("score")]


def test_an_answer_without_room_in_the_batch_is_left_to_the_evaluator(served: ServedRun, toy_run: ToyRun) -> None:
    worker = Worker(served, Limits(prompt_tokens=16, reply_tokens=8))
    question = "Joe has 7 nuts. He eats 3. How many nuts does Joe have now?"
    found = worker.score([question], ["7 - 3 = 4. The answer is 4."])
    worker.start()
    expected = Evaluator.load(toy_run.folder).score(question, ["7 - 3 = 4. The answer is 4."])
    assert found.result(120) == pytest.approx(expected, abs=1e-5)
    worker.stop(10)


def test_they_take_places_of_the_queue(served: ServedRun) -> None:
    questions = [f"Eve has {n} figs. She eats 1. How many figs does Eve have now?" for n in (5, 6, 7)]
    limits, may_end = Limits(places=2, queue=2), threading.Event()
    worker = Worker(served, limits)
    service = Service(served, worker, limits, Metrics(worker))
    scored, held = worker.score(questions, ["4"] * 3), worker.call([lambda: may_end.wait(120)])
    with service.admitted(rows=4):
        pass
    worker.start()
    wait_for(lambda: worker.reference_answers == 3)
    with service.admitted(rows=1):
        pass
    with pytest.raises(ApiError, match="the queue is full"), service.admitted(rows=2):
        pass
    may_end.set()
    assert (len(scored.result(120)), held.result(120)) == (3, [True])
    assert worker.reference_answers == 0
    worker.stop(10)


def test_answers_of_a_client_that_left_are_not_sampled(served: ServedRun) -> None:
    """The answers for which another request waits are."""
    assert served.evaluator is not None
    questions = [f"Ned has {n} cups. He buys {n} more. How many cups does Ned have now?" for n in (2, 3, 4)]
    worker = Worker(served, Limits())
    left, stays = worker.score(questions, ["4"] * 3), worker.score(questions[2:], ["8"])
    left.cancel()
    worker.start()
    assert len(stays.result(120)) == 1
    worker.stop(10)
    assert [one.text for one in served.evaluator.unanswered(questions)] == questions[:2]
    assert worker.scoring == 0
