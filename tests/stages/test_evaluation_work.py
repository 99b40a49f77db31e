"""Work of the evaluation is the same in another process, which loads the saved roles, and in any order."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_models
from selfeval.backbone.role_files import save_role
from selfeval.backbone.roles import Backbone
from selfeval.config import RunConfig
from selfeval.judging.protocol import Comparison
from selfeval.judging.templates import Templates, templates_folder
from selfeval.records import Question, Split
from selfeval.stages.context import Context
from selfeval.stages.evaluation_work import answered_by_policy, judged_by_referee, scores_of
from selfeval.stages.shards import Batch, ModelHandle, ReportProgress, ShardOutput, Work
from selfeval.stages.terminal import Bar, Terminal
from selfeval.store import RunStore, write_json
from selfeval.training.context import POLICY

QUESTIONS = [Question(f"q{i}", f"What is {i % 2}?", Split.TEST, "self") for i in range(5)]
"""Every second one is the same."""
SIZES = {
    "replies": {"max_new_tokens": 8, "shard": 2},
    "verdicts": {"max_new_tokens": 6, "shard": 2},
    "evaluator": {"members": 2},
}


def _backbone() -> Backbone:
    return tiny_models.backbone("llama", 384)


class Elsewhere:
    """Executor on a model without roles, which receives what can be pickled, and finishes the last batch first."""

    def __init__(self, run: Context) -> None:
        self.model = ModelHandle(_backbone(), run.templates)

    def map(
        self, work: Work[Any], batches: Sequence[Batch[Any]], report_progress: ReportProgress | None = None
    ) -> Iterator[tuple[Batch[Any], ShardOutput]]:
        for batch in reversed(batches):
            sent = pickle.loads(pickle.dumps((work, batch)))
            output = sent[0](self.model, sent[1])
            yield batch, pickle.loads(pickle.dumps(output))

    def close(self) -> None: ...


@pytest.fixture
def run(tmp_path: Path) -> Context:
    """A run whose policy and evaluators are saved; they are loaded when they are first needed."""
    made = Context(RunConfig(**SIZES), RunStore(tmp_path / "run"), Terminal(quiet=True))
    trained = _backbone()
    for number, role in enumerate(("evaluator-0", "evaluator-1", POLICY)):
        trained.roles.add(role, seed=number, head=role != POLICY)
        tiny_models.scramble(trained, role, size=0.1)
        trained.roles.freeze(role)
        save_role(trained, role, made.role_folder(role))
        write_json(made.role_folder(role) / "evaluator.json", {"mean": 0.5 * number, "deviation": 2.0, "temperature": 1.0})
    backbone = _backbone()
    made.__dict__.update(backbone=backbone, templates=Templates.load(templates_folder("none"), backbone.loaded.tokenizer))
    return made


def results(run: Context, bar: Bar) -> tuple[Any, ...]:
    replies = answered_by_policy(run, QUESTIONS, bar)
    comparisons = [Comparison(q.text, r.text, "x", False, False, ()) for q, r in zip(QUESTIONS, replies, strict=True)]
    prompts = [run.templates.grade_prompt(q.text, "") for q in QUESTIONS]
    scores = scores_of(run, bar)(prompts, [r.ids for r in replies])
    return replies, judged_by_referee(run, comparisons, bar), scores


def test_the_results_are_the_same_elsewhere_and_in_any_order(run: Context) -> None:
    with run.terminal.bar("evaluation", 20) as bar:
        replies, judgements, scores = results(run, bar)
        assert bar.done == 5 + 2 * 5 + 5, "replies, both orders, scores"
        run.executor = Elsewhere(run)
        replies_there, judgements_there, scores_there = results(run, bar)
    assert replies_there == replies
    assert judgements_there == judgements
    assert torch.equal(scores_there, scores)
    assert scores.shape == (2, 5)
    assert not torch.allclose(scores[0], scores[1])
    # As one scorer gives them in one call.
    whole = run.scorer().each([run.templates.grade_prompt(q.text, "") for q in QUESTIONS], [r.ids for r in replies])
    assert torch.allclose(scores, whole.cpu(), atol=1e-5)
    assert all(abs(reply.kl) > 0 for reply in replies if reply.ids)


def test_each_batch_has_its_own_random_numbers(run: Context) -> None:
    with run.terminal.bar("evaluation", 5) as bar:
        replies = answered_by_policy(run, QUESTIONS, bar)
    # q0, q2 and q4 are the same question, each the first one of its batch.
    assert len({replies[number].ids for number in (0, 2, 4)}) == 3


def test_nothing_is_computed_for_no_replies(run: Context) -> None:
    with run.terminal.bar("evaluation", 1) as bar:
        assert answered_by_policy(run, [], bar) == []
        assert judged_by_referee(run, [], bar) == []
        assert scores_of(run, bar)([], []).numel() == 0
