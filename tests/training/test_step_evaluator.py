"""The step evaluator: what it learns, where it reads, and that its training resumes exactly."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_models
from selfeval.backbone.roles import Backbone
from selfeval.config import StepsConfig
from selfeval.prompt import Prompt
from selfeval.training import step_evaluator
from selfeval.training.checkpoint import Checkpoints
from selfeval.training.step_evaluator import STEP_EVALUATOR, LabelledReply, score_steps, train_step_evaluator, training_steps

GOOD, BAD = 10, 11
CONFIG = StepsConfig(learning_rate=1e-2, epochs=2, batch=16, checkpoint_every=5)


def replies(count: int, seed: int) -> list[LabelledReply]:
    """Steps of random words with GOOD in each, until a BAD one makes it and all after it wrong; labels are soft."""
    rng = random.Random(seed)

    def reply() -> LabelledReply:
        ids, ends, labels, label = list[int](), list[int](), list[float](), 0.9
        for _ in range(rng.randrange(1, 5)):
            mark = BAD if rng.random() < 0.3 else GOOD
            label = 0.1 if mark == BAD else label
            ids += [mark, *(rng.randrange(12, 40) for _ in range(rng.randrange(0, 3)))]
            ends.append(len(ids))
            labels.append(label)
        prompt = Prompt(tuple(rng.randrange(12, 40) for _ in range(rng.randrange(1, 4))))
        return LabelledReply(prompt, (*ids, tiny_models.EOS), (*ends[:-1], len(ids) + 1), tuple(labels))

    return [reply() for _ in range(count)]


def fresh() -> Backbone:
    backbone = tiny_models.backbone()
    backbone.roles.add(STEP_EVALUATOR, head=True)
    return backbone


def train(backbone: Backbone, data: list[LabelledReply], folder: Path, **options: Any) -> list[dict[str, float]]:
    lines: list[dict[str, float]] = []

    def checkpoints(optimizers: Mapping[str, Any]) -> Checkpoints:
        return Checkpoints(folder, backbone, [STEP_EVALUATOR], optimizers)

    defaults: dict[str, Any] = {"seed": 0, "batch_tokens": 4096, "log": lines.append, "resumed": lambda step: None}
    train_step_evaluator(backbone, data, CONFIG, checkpoints, **{**defaults, **options})
    return lines


def scores(backbone: Backbone, data: list[LabelledReply], batch_tokens: int = 200) -> list[list[float]]:
    arguments = [r.prompt for r in data], [r.ids for r in data], [r.ends for r in data]
    return score_steps(backbone, STEP_EVALUATOR, *arguments, batch_tokens)


def test_it_learns_soft_labels_of_steps_that_it_never_saw(tmp_path: Path) -> None:
    backbone, held_out = fresh(), replies(100, seed=2)
    lines = train(backbone, replies(320, seed=1), tmp_path)
    assert lines[0]["loss"] == pytest.approx(math.log(2))
    assert [line["step"] for line in lines] == list(range(1, training_steps(320, CONFIG) + 1))
    cases = [
        (score, label)
        for row, reply in zip(scores(backbone, held_out), held_out, strict=True)
        for score, label in zip(row, reply.labels, strict=True)
    ]
    assert len(cases) > 200
    assert sum((score > 0) == (label > 0.5) for score, label in cases) / len(cases) > 0.9
    # The optimum is the log-odds of the label, 2.2, not infinity.
    assert sum(abs(score) for score, _ in cases) / len(cases) == pytest.approx(math.log(9), abs=0.7)


def test_scores_are_read_at_the_last_token_of_each_step() -> None:
    backbone, data = fresh(), replies(20, seed=3)
    tiny_models.scramble(backbone, STEP_EVALUATOR, size=0.05)
    expected = []
    for reply in data:
        row = []
        for end in reply.ends:  # a pass per step, which ends where the step ends
            ids = torch.tensor([[*reply.prompt.ids, *reply.ids[:end]]])
            with torch.no_grad(), backbone.acting_as(STEP_EVALUATOR):
                row.append(float(backbone.score(STEP_EVALUATOR, backbone.hidden(ids, torch.ones_like(ids))[:, -1])))
        expected.append(row)
    for budget in (1, 60, 10_000):
        for found, wanted in zip(scores(backbone, data, budget), expected, strict=True):
            assert found == pytest.approx(wanted, abs=1e-5)


def test_micro_batches_do_not_change_the_gradient() -> None:
    backbone, data = fresh(), replies(12, seed=3)
    tiny_models.scramble(backbone, STEP_EVALUATOR)
    found = []
    for budget in (1, 60, 100_000):
        values = step_evaluator._gradients(backbone, STEP_EVALUATOR, data, budget)
        parameters = backbone.roles.parameters(STEP_EVALUATOR)
        found.append((values, torch.cat([p.grad.flatten() for p in parameters.values() if p.grad is not None])))
        for parameter in parameters.values():
            parameter.grad = None
    assert found[-1][1].abs().max() > 1e-2
    for values, gradient in found[:-1]:
        assert values == pytest.approx(found[-1][0], abs=1e-5)
        torch.testing.assert_close(gradient, found[-1][1], rtol=0, atol=1e-6)


def test_a_resumed_training_ends_with_the_same_weights(tmp_path: Path, one_thread: None) -> None:
    data = replies(96, seed=1)
    whole, parted = fresh(), fresh()
    lines = train(whole, data, tmp_path / "whole")

    class Killed(Exception):
        pass

    def kill(values: dict[str, float]) -> None:
        if values["step"] == 8:
            raise Killed

    with pytest.raises(Killed):
        train(parted, data, tmp_path / "parted", log=kill)
    parted, first = fresh(), list[int]()
    again = train(parted, data, tmp_path / "parted", resumed=first.append)
    assert first == [5]
    assert again == lines[5:]
    for name, weight in whole.roles.parameters(STEP_EVALUATOR).items():
        assert torch.equal(weight, parted.roles.parameters(STEP_EVALUATOR)[name])
