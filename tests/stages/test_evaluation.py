"""The edge of the stage evaluation: the records, replies and scores that it collects; tests/evaluation has the figures."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_models
from evidence_records import QUESTIONS, TIE, UNPARSABLE, UNSURE, Gold, judgement, reply, verdict
from selfeval.backbone.adapters import BASE
from selfeval.config import RunConfig
from selfeval.evaluation.over_optimisation import predict
from selfeval.evaluation.policy import Answered
from selfeval.judging.protocol import Comparison, Judge, Judgement
from selfeval.judging.templates import Templates, templates_folder
from selfeval.prompt import Prompt
from selfeval.records import Question, Split
from selfeval.rollout.engine import generate
from selfeval.rollout.requests import Request, Rollout
from selfeval.stages import evaluation, evaluation_work
from selfeval.stages.context import Context
from selfeval.stages.evaluation_work import kl_to_start, scores_of
from selfeval.stages.policy import Sampled
from selfeval.stages.shards import ModelHandle
from selfeval.stages.terminal import Terminal
from selfeval.store import RunStore, write_json
from selfeval.training.context import POLICY
from selfeval.training.evaluator import EVALUATOR
from slow import slow
from token_prompts import as_prompts


def context(folder: Path, **changes: Any) -> Context:
    return Context(RunConfig(**changes), RunStore(folder / "run"), Terminal(quiet=True))


def test_the_judged_test_pairs_are_all_of_the_test_split_with_their_margins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = context(tmp_path)
    replies = [reply(f"q{i}-r{n}", "x" if i or n else "0", ids=[9] * (2 * i + 3 * n + 1)) for i in range(5) for n in range(2)]
    verdicts = [
        verdict("q0", 0.9), verdict("q1", 0.2, UNSURE), verdict("q2", None, UNPARSABLE), verdict("q3", 0.0, TIE),
        verdict("q4", 0.9, split=Split.TRAIN),
    ]  # fmt: skip
    run.store.write_shard("replies", 0, replies)
    run.store.write_shard("verdicts", 0, verdicts)
    prompts: list[Sequence[int]] = []

    def two(asked: Sequence[Any], ids: Sequence[Any]) -> torch.Tensor:
        """Two evaluators: one scores a reply by its length, the other by twice that."""
        prompts.extend(asked)
        return torch.tensor([[float(len(i)) for i in ids], [2.0 * len(i) for i in ids]])

    monkeypatch.setattr(Context, "grade_prompt", lambda self, question_id, question: (question_id, question), raising=False)
    _give(run, "backbone", None)
    found = evaluation._judged_test_pairs(run, QUESTIONS, Gold(), two)
    assert [p.verdict.question_id for p in found] == ["q0", "q1", "q2", "q3"]
    # Of question i, reply 0 has 2i + 1 tokens and reply 1 has 2i + 4: the margins are -3 and -6.
    assert [p.margin for p in found] == [-4.5] * 4
    assert [p.disagreement for p in found] == [1.5] * 4
    assert [p.right for p in found] == [(i == 0, False) for i in range(4)]  # the first reply to question 0 is "0"
    # As the evaluator was trained; once for each reply of a pair.
    assert prompts == [(f"q{i}", f"What is {i}?") for i in (0, 1, 2, 3) for _ in range(2)]


def _give(run: Context, name: str, value: Any) -> None:
    """Replace the object that a context would load."""
    vars(run)[name] = value


def test_labels_are_checked_where_the_judge_kept_them(tmp_path: Path) -> None:
    run = context(tmp_path)
    verdicts = [verdict("q1", 0.9), verdict("q2", 0.1), verdict("q3", 0.6, UNSURE), verdict("love", 0.9)]
    names = [v.question_id for v in verdicts]
    replies = [reply(f"{n}-r0", n.removeprefix("q")) for n in names] + [reply(f"{n}-r1", "99") for n in names]
    run.store.write_shard("replies", 0, replies)
    run.store.write_shard("verdicts", 0, verdicts)
    found = evaluation._verdicts(run, QUESTIONS, Gold())
    assert found.label_accuracy_gold is not None
    assert (found.label_accuracy_gold.value, found.label_accuracy_gold.n) == (0.5, 2)  # q1 right, q2 wrong; love has no gold
    assert evaluation._verdicts(run, QUESTIONS, None).label_accuracy_gold is None


def sampled(step: int, question: str, text: str, score: float = 0.0) -> Sampled:
    return Sampled(step, question, text, score, True)


def _stepped(run: Context, *steps: int) -> None:
    """Only these iterations count; the others were rolled back."""
    for step in steps:
        run.store.add_metrics("policy", {"step": step, "kl": 1.0})


def _curve(run: Context) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.store.metrics_path("evaluation").read_text().splitlines()]


def test_the_gold_curve_has_a_share_per_iteration_of_the_questions_with_gold(tmp_path: Path) -> None:
    run = context(tmp_path, evaluation={"gold_replies": 4})
    run.store.write_shard("policy", 2, [sampled(2, "q1", "1"), sampled(2, "q2", "2"), sampled(2, "love", "7")])
    run.store.write_shard("policy", 1, [sampled(1, "q1", "1"), sampled(1, "q2", "9"), sampled(1, "q3", "9")])
    run.store.write_shard("policy", 3, [sampled(3, "love", "7")])  # no question that gold can check
    # Of six only the first four with gold are checked: right, wrong, right, wrong.
    many = ["love", "q1", "q1", "q1", "q1", "q1", "q1"]
    run.store.write_shard("policy", 10, [sampled(10, q, t) for q, t in zip(many, "1171777", strict=True)])
    run.store.write_shard("policy", 11, [sampled(11, "q1", "1")])  # the policy was rolled back from there and finished
    _stepped(run, 1, 2, 3, 10)
    evaluation._write_gold_curve(run, predict(evaluation._checked_replies(run, QUESTIONS, Gold())))
    # All scores are equal, so they predict the share of the first iteration: 1 of 3, with half a case added to each side.
    predicted = pytest.approx(1.5 / 4, abs=1e-6)
    assert _curve(run) == [
        {"step": 1, "gold": pytest.approx(1 / 3, abs=1e-6), "expected": predicted, "n": 3},
        {"step": 2, "gold": 1.0, "expected": predicted, "n": 2},
        {"step": 10, "gold": 0.5, "expected": predicted, "n": 4},
    ]


def test_without_gold_there_is_no_curve(tmp_path: Path) -> None:
    run = context(tmp_path)
    run.store.write_shard("policy", 1, [sampled(1, "q1", "1")])
    evaluation._write_gold_curve(run, {})
    assert not run.store.metrics_path("evaluation").exists()


# -- the policy ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def answering(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Context, dict[str, Any]]:
    """A run with a policy whose replies and judge are scripted; `seen` records their inputs and roles."""
    run = context(tmp_path, evaluation={"questions": 3, "samples": 2}, backbone={"batch_tokens": 64})
    backbone = tiny_models.backbone("llama", 384)
    backbone.roles.add(EVALUATOR, head=True)
    write_json(run.role_folder(EVALUATOR) / "evaluator.json", {"temperature": 1.0, "mean": 0.0, "deviation": 1.0})
    backbone.roles.add(POLICY)
    _give(run, "backbone", backbone)
    _give(run, "templates", Templates.load(templates_folder("no such model"), backbone.loaded.tokenizer))
    train = Question("t", "What is 9?", Split.TRAIN, "self")
    run.store.write_shard("questions", 0, [train, *(QUESTIONS[f"q{i}"] for i in range(4))])
    before = [reply(f"q{i}-r{n}", f"before {i} {n}", ids=[7] * 8) for i in range(4) for n in range(2)]
    run.store.write_shard("replies", 0, [reply("t-r0", "x"), *before])
    seen: dict[str, Any] = {}

    def policy(backbone: Any, requests: Sequence[Request], **_: Any) -> list[Rollout]:
        seen.update({"policy acts": backbone.acting, "asked": [r.prompt for r in requests]})
        seen["sampled at"] = {(r.temperature, r.top_p) for r in requests}
        return [Rollout((*_spell(run, f"after {i}"), 1), (-1.0,), i != 2) for i in range(len(requests))]

    class Scripted(Judge):
        def judge(self, comparisons: Sequence[Comparison], advance: Any = None) -> list[Judgement]:
            seen.update({"judge acts": backbone.acting, "comparisons": list(comparisons)})
            # For the policy's replies: sure of the first, torn between the orders on the second, not to be read on the third.
            opinions = [(0.9, 0.8), (0.7, 0.2), (None, None)]
            ours = [c.first.startswith("after") for c in comparisons]
            said = [
                o if is_first else tuple(None if p is None else 1 - p for p in o)
                for o, is_first in zip(opinions, ours, strict=True)
            ]
            return [judgement(*o) for o in said]

    def scripted(*_: Any, role: str = "judge", **__: Any) -> Judge:
        seen["role"] = role
        return Scripted()

    def kl(model: Any, config: Any, prompts: Sequence[Any], rollouts: Sequence[Rollout]) -> list[float]:
        return [0.25] * len(rollouts)

    monkeypatch.setattr(evaluation_work, "generate", policy)
    monkeypatch.setattr(evaluation_work, "make_judge", scripted)
    monkeypatch.setattr(evaluation_work, "kl_to_start", kl)
    return run, seen


def answer_and_judge(run: Context, gold: Gold | None) -> tuple[list[Answered], list[Any]]:
    with run.terminal.bar("evaluation", 9) as bar:
        return evaluation._answer_and_judge(run, gold, bar)


def _spell(run: Context, text: str) -> list[int]:
    ids: list[int] = run.templates.tokenizer.encode(text, add_special_tokens=False)
    return ids


def test_the_referee_compares_the_policys_reply_with_the_first_one_before(answering: tuple[Context, dict[str, Any]]) -> None:
    run, seen = answering
    found, rows = answer_and_judge(run, Gold())
    asked = [QUESTIONS[f"q{i}"] for i in range(3)]  # test questions only, and as many as were configured
    assert [a.question for a in found] == [q.text for q in asked]
    assert seen["asked"] == [run.templates.prompt("reply", question=q.text) for q in asked]
    assert (seen["policy acts"], seen["judge acts"], seen["role"]) == (POLICY, BASE, "referee")
    assert seen["sampled at"] == {(1.0, 1.0)}  # as the replies before were sampled
    assert seen["comparisons"] == [
        Comparison(q.text, f"after {i}", f"before {i} 0", first_cut=i == 2) for i, q in enumerate(asked)
    ]
    assert [(a.after, a.before) for a in found] == [(f"after {i}", f"before {i} 0") for i in range(3)]
    # The judge is sure of the first, torn between the orders on the second, and cannot be read on the third.
    assert [a.outcome for a in found] == ["win", "tie", "unparsable"]
    assert [(a.tokens_before, a.tokens_after) for a in found] == [(8, len(_spell(run, f"after {i}")) + 1) for i in range(3)]
    assert [(row.question, row.before.id) for row in rows] == [(q, f"{q.id}-r0") for q in asked]
    assert [row.probability for row in rows] == [pytest.approx(0.85), pytest.approx(0.45), None]


def test_replies_that_the_limit_cut_off_are_counted_before_and_after_training(
    answering: tuple[Context, dict[str, Any]],
) -> None:
    run, _ = answering
    run.store.write_shard("replies", 1, [replace(reply(f"q{i}-r0", f"before {i} 0"), finished=False) for i in (0, 1)])
    answered, _ = answer_and_judge(run, None)
    found = evaluation._replies(run, answered, run.store.read("questions", Question))
    assert found.limit == run.config.replies.max_new_tokens
    assert (found.unfinished_before.value, found.unfinished_before.n) == (pytest.approx(2 / 3), 3)
    assert (found.unfinished_after.value, found.unfinished_after.n) == (pytest.approx(1 / 3), 3)
    assert found.unfinished.n == 5, "the questions of the stage: one for training, four for testing"
    assert found.per_question is None, "the training question has one reply"
    run.store.write_shard("replies", 2, [reply("t-r1", "x")])
    found = evaluation._replies(run, answered, run.store.read("questions", Question))
    assert found.per_question is not None
    assert (found.per_question.identical.value, found.per_question.identical.n) == (1.0, 1), "replies to test questions differ"


def test_the_policy_is_sampled_as_evaluation_is_configured(answering: tuple[Context, dict[str, Any]]) -> None:
    run, seen = answering
    evaluation_config = run.config.evaluation.model_copy(update={"temperature": 0.5, "top_p": 0.75})
    _give(run, "config", run.config.model_copy(update={"evaluation": evaluation_config}))
    answer_and_judge(run, None)
    assert seen["sampled at"] == {(0.5, 0.75)}


def test_gold_checks_each_side_of_an_answer(answering: tuple[Context, dict[str, Any]]) -> None:
    run, _ = answering

    class Likes(Gold):
        def is_right(self, question: str, reply: str) -> bool | None:
            return reply in ("after 0", "after 1", "before 2 0")

    found, _ = answer_and_judge(run, Likes())
    assert [(a.gold_before, a.gold_after) for a in found] == [(False, True), (False, True), (True, False)]
    without, _ = answer_and_judge(run, None)
    assert {(a.gold_before, a.gold_after) for a in without} == {(None, None)}


def test_samples_are_drawn_from_the_answers_and_scored(answering: tuple[Context, dict[str, Any]]) -> None:
    run, _ = answering
    answered, rows = answer_and_judge(run, Gold())
    with run.terminal.bar("evaluation", 6) as bar:
        scores = evaluation._scores_of_replies(run, rows, scores_of(run, bar))
    samples = evaluation._samples(run, answered, scores)
    verdicts = {"What is 0?": "win", "What is 1?": "tie", "What is 2?": "unparsable"}
    assert len(samples) == 2
    for sample in samples:
        number = sample.question[8]
        assert (sample.after, sample.before) == (f"after {number}", f"before {number} 0")
        assert sample.verdict == verdicts[sample.question]
        row = rows[int(number)]
        prompt = run.grade_prompt(row.question.id, row.question.text)
        alone = [run.scorer().of([prompt], [ids]).whole_B.item() for ids in (row.before.ids, row.after_ids)]
        assert [sample.evaluator_before, sample.evaluator_after] == pytest.approx(alone, abs=1e-4)


# -- KL to the start ----------------------------------------------------------------------------------------------------

NO_TEMPLATES: Any = None


@pytest.mark.parametrize("batch_tokens", [slow(1), 30, slow(10_000)])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_kl_is_the_policys_log_prob_minus_the_bases(family: str, batch_tokens: int, tmp_path: Path) -> None:
    run = context(tmp_path, backbone={"batch_tokens": batch_tokens})
    backbone = tiny_models.backbone(family, eos=(1, 20, 21))
    backbone.roles.add(POLICY)
    tiny_models.scramble(backbone, POLICY, size=0.1)
    _give(run, "backbone", backbone)
    prompts = as_prompts([(5, 9, 2), (7,), (30, 31, 32, 33), (11, 12)]) * 4
    with backbone.acting_as(POLICY):
        rollouts = generate(backbone, [Request(p) for p in prompts], max_new_tokens=9, seed=3)
    found = kl_to_start(ModelHandle(backbone, NO_TEMPLATES), run.config, prompts, rollouts)
    expected = [
        _summed(backbone, POLICY, prompt, rollout.ids) - _summed(backbone, BASE, prompt, rollout.ids)
        for prompt, rollout in zip(prompts, rollouts, strict=True)
    ]
    assert found == pytest.approx(expected, abs=1e-4)  # sums of up to nine fp32 log-probs, cached and plain passes
    assert min(found) < 0 < sum(found) / len(found)  # single samples may be below zero; their mean estimates a KL, which is not
    assert sum(found) / len(found) > 0.1


def _summed(backbone: Any, role: str, prompt: Prompt, ids: tuple[int, ...]) -> float:
    """One sequence, one plain pass."""
    with backbone.acting_as(role):
        full = tiny_models.full_logprobs(backbone.model, (*prompt.ids, *ids))
    return sum(full[len(prompt.ids) - 1 + t, token].item() for t, token in enumerate(ids))


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_a_policy_at_its_start_has_no_kl(temperature: float, tmp_path: Path) -> None:
    run, prompts = context(tmp_path, evaluation={"temperature": temperature}), as_prompts([(5, 9, 2), (7,)])
    backbone = tiny_models.backbone("llama")
    backbone.roles.add(POLICY)
    _give(run, "backbone", backbone)
    with backbone.acting_as(POLICY):
        rollouts = generate(backbone, [Request(p, temperature) for p in prompts], max_new_tokens=6, seed=3)
    assert kl_to_start(ModelHandle(backbone, NO_TEMPLATES), run.config, prompts, rollouts) == pytest.approx(
        [0.0, 0.0], abs=1e-5
    )


# -- references ---------------------------------------------------------------------------------------------------------


def _with_references(tmp_path: Path) -> tuple[Context, list[Answered], list[Any]]:
    """A run whose file has a reference for each of its twelve test questions but the last, and answers to all of them."""
    file = tmp_path / "questions.jsonl"
    lines = [{"question": f"What is {n}?", "split": "test", **({"reply": f"It is {n}."} if n < 11 else {})} for n in range(12)]
    others = [{"question": f"How many {word} are there?", "split": "train"} for word in ("cats", "dogs", "hens", "cows")]
    file.write_text("".join(json.dumps(line) + "\n" for line in [*lines, *others]))
    run = context(tmp_path, questions={"file": str(file)})
    assert run.given is not None
    questions = [question for question in run.given.questions if question.split == Split.TEST]
    answered = [
        Answered(q.text, "No idea.", f"It is {n}.", 3, 4, True, True, 0.0, "win", None, None) for n, q in enumerate(questions)
    ]
    return run, answered, [evaluation._Row(q, reply(f"{q.id}-r0", "No idea."), (5,), None) for q in questions]


def test_replies_are_compared_with_the_references_of_the_file(tmp_path: Path) -> None:
    run, answered, rows = _with_references(tmp_path)
    found = evaluation._references(run, answered, rows)
    assert found is not None
    longest = next(row for row in found.metrics if row.name == "rougeL")
    assert (longest.before.value, longest.after.value, longest.difference.n) == (0.0, 1.0, 11)
    assert evaluation._references(context(tmp_path / "other"), answered, rows) is None


def test_without_the_libraries_a_run_says_that_references_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, answered, rows = _with_references(tmp_path)
    notes: list[str] = []
    monkeypatch.setattr(run.terminal, "note", notes.append)
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    assert evaluation._references(run, answered, rows) is None
    [note] = notes
    assert "not compared with the references" in note
    assert "pip install 'self-evaluator[data]'" in note
