"""The cost of a verdict: which tokens are counted, by which part, and for which purpose."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import tiny_models
from judge_engine import judges_generate_with
from selfeval.backbone.adapters import BASE
from selfeval.config import RunConfig
from selfeval.judging.templates import Templates, templates_folder
from selfeval.lab import vocabulary
from selfeval.prompt import Prompt
from selfeval.records import Question, Reply, Split
from selfeval.rollout import engine
from selfeval.rollout.engine import count_tokens, generate
from selfeval.rollout.requests import Request, Rollout
from selfeval.stages import verdict_cost
from selfeval.stages.context import Context
from selfeval.stages.terminal import Terminal
from selfeval.stages.verdict_cost import Asked, measure_cost
from selfeval.store import RunStore, write_json
from selfeval.training.evaluator import EVALUATOR

LAB = Path(vocabulary.__file__).parent / "word_problems"


def asked(count: int, shared: str = "") -> list[Asked]:
    def reply(question: str, number: int) -> Reply:
        ids = tuple(range(5, 8 + number))
        return Reply(f"{question}-r{number}", question, f"It is {number}.", ids, "sample", 1.0, 1.0, -1.0, True)

    questions = [Question(f"q{i}", shared or f"What is {i}?", Split.TEST, "self") for i in range(count)]
    return [Asked(q, (reply(q.id, 0), reply(q.id, 1))) for q in questions]


def prepared(folder: Path, templates: str, members: int = 1) -> Context:
    run = Context(
        RunConfig(
            backbone={"batch_tokens": 256},
            verdicts={"max_new_tokens": 6},
            replies={"max_new_tokens": 5},
            evaluator={"members": members},
        ),
        RunStore(folder / "run"),
        Terminal(quiet=True),
    )
    backbone = tiny_models.backbone("llama", 384)
    for number in range(members):
        role = EVALUATOR.replace("0", str(number))
        backbone.roles.add(role, head=True)
        write_json(run.role_folder(role) / "evaluator.json", {"temperature": 1.0, "mean": 0.0, "deviation": 1.0})
    vars(run)["backbone"] = backbone
    vars(run)["templates"] = Templates.load(templates_folder(templates), backbone.loaded.tokenizer)
    return run


@pytest.mark.parametrize("members", [1, 2])
def test_the_evaluator_reads_both_replies_with_every_member_and_writes_nothing(tmp_path: Path, members: int) -> None:
    run, pairs = prepared(tmp_path, "no such model", members), asked(8)
    assert not run.templates.grades_with_reference_answer
    cost = measure_cost(run, pairs)
    assert cost is not None
    prompts = [len(run.templates.prompt("grade", question=a.question.text, reference_answer="").ids) for a in pairs]
    expected = (
        members * sum(2 * p + len(a.replies[0].ids) + len(a.replies[1].ids) for p, a in zip(prompts, pairs, strict=True)) / 8
    )
    tokens = cost.tokens.evaluator
    assert tokens.tokens_read.known == pytest.approx(expected)
    assert tokens.tokens_written.known == 0
    assert cost.tokens.scoring == tokens
    assert cost.tokens.pairs == 8
    assert tokens.tokens_read.n == 2  # batches, of four pairs each


def test_the_judge_reads_and_writes_both_orders_and_its_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, pairs, seen = prepared(tmp_path, "no such model"), asked(4), [0, 0]

    def watched(backbone: Any, requests: Sequence[Request], **options: Any) -> list[Rollout]:
        assert backbone.acting == BASE
        found = generate(backbone, requests, **options)
        seen[0] += sum(len(prompt.ids) for prompt in {request.prompt for request in requests})
        seen[1] += sum(len(rollout.ids) for rollout in found)
        return found

    judges_generate_with(monkeypatch, watched)
    cost = measure_cost(run, pairs)
    assert cost is not None
    both_orders = [
        len(run.templates.prompt("judge", question=a.question.text, first=one.text, second=other.text).ids)
        for a in pairs
        for one, other in (a.replies, a.replies[::-1])
    ]
    found = cost.tokens.judge
    assert (found.tokens_read.known, found.tokens_written.known) == (seen[0] / 4, seen[1] / 4)
    assert seen[0] >= sum(both_orders)
    assert seen[1] >= 2 * len(pairs)


def test_a_reference_answer_is_part_of_a_new_question_and_not_of_the_next_reply(tmp_path: Path) -> None:
    run, pairs = prepared(tmp_path, str(LAB)), asked(4)
    assert run.templates.grades_with_reference_answer
    cost = measure_cost(run, pairs)
    assert cost is not None
    whole, scoring = cost.tokens.evaluator, cost.tokens.scoring
    asking = sum(len(run.templates.prompt("reply", question=a.question.text).ids) for a in pairs) / 4
    assert whole.tokens_read.known - scoring.tokens_read.known == pytest.approx(asking)
    assert 1 <= whole.tokens_written.known <= 5
    assert scoring.tokens_written.known == 0
    seconds = cost.seconds
    assert 0 < seconds.scoring.known < seconds.evaluator.known
    ratio = seconds.judge.known / seconds.evaluator.known
    assert seconds.judge_over_evaluator.known == pytest.approx(ratio, rel=1e-4)
    assert seconds.judge_over_scoring.known > seconds.judge_over_evaluator.known


def test_the_same_pairs_have_the_same_tokens(tmp_path: Path) -> None:
    run, pairs = prepared(tmp_path, "no such model"), asked(verdict_cost.PAIRS + 5)
    first, second = measure_cost(run, pairs), measure_cost(run, pairs)
    assert first is not None
    assert second is not None
    assert first.tokens == second.tokens
    assert first.tokens.pairs == verdict_cost.PAIRS
    assert measure_cost(run, []) is None


def test_tokens_are_counted_inside_of_the_block_alone() -> None:
    backbone = tiny_models.backbone("llama")
    requests = [Request(Prompt((5, 9, 2))), Request(Prompt((5, 9, 2))), Request(Prompt((7,)))]
    with backbone.acting_as(BASE):
        with count_tokens() as tally:
            rollouts = generate(backbone, requests, max_new_tokens=4, seed=1)
        generate(backbone, requests, max_new_tokens=4, seed=2)
    # Two rows share their prompt, which is passed once.
    assert (tally.read, tally.written) == (4, sum(len(r.ids) for r in rollouts))
    assert engine._TALLY.get() is None
