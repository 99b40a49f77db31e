from __future__ import annotations

import math
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny_models
from scarce import no_memory
from selfeval.backbone.roles import Backbone
from selfeval.config import EvaluatorConfig
from selfeval.errors import LoopError, MemoryLimitError
from selfeval.prompt import Prompt
from selfeval.training import evaluator
from selfeval.training.checkpoint import Checkpoints
from selfeval.training.evaluator import EVALUATOR, Preference, score_replies, train_evaluator

LIKED, DISLIKED = 10, 11
CONFIG = EvaluatorConfig(learning_rate=1e-2, epochs=2, batch=16)


def pairs(count: int, seed: int, label: float = 0.95) -> list[Preference]:
    """Replies of random words; the better one of a pair has LIKED somewhere, the other DISLIKED."""
    rng = random.Random(seed)

    def words(count: int) -> list[int]:
        return [rng.randrange(12, 40) for _ in range(count)]

    def reply(token: int) -> tuple[int, ...]:
        ids = words(rng.randrange(2, 6))
        ids[rng.randrange(len(ids))] = token
        return (*ids, tiny_models.EOS)

    return [Preference(Prompt(tuple(words(rng.randrange(1, 4)))), reply(LIKED), reply(DISLIKED), label) for _ in range(count)]


def fresh(reading: Mapping[str, Any] | None = None, **changes: Any) -> Backbone:
    backbone = tiny_models.backbone(**changes)
    backbone.roles.add(EVALUATOR, head=True, **(reading or {}))
    return backbone


OTHER = {"rank": 2, "pooling": "mean"}


def train(
    backbone: Backbone, data: list[Preference], folder: Path, config: EvaluatorConfig = CONFIG, **options: Any
) -> list[dict[str, float]]:
    lines: list[dict[str, float]] = []

    def checkpoints(optimizers: Mapping[str, Any]) -> Checkpoints:
        return Checkpoints(folder, backbone, [EVALUATOR], optimizers)

    defaults: dict[str, Any] = {"seed": 0, "batch_tokens": 4096, "log": lines.append, "resumed": lambda step: None}
    train_evaluator(backbone, data, config, checkpoints, **{**defaults, **options})
    return lines


def accuracy(backbone: Backbone, data: list[Preference]) -> float:
    prompts = [p.prompt for p in data]
    chosen = score_replies(backbone, EVALUATOR, prompts, [p.chosen for p in data], 200)
    rejected = score_replies(backbone, EVALUATOR, prompts, [p.rejected for p in data], 200)
    return sum(a > b for a, b in zip(chosen, rejected, strict=True)) / len(data)


def test_it_learns_what_it_never_saw_the_replies_of(tmp_path: Path) -> None:
    backbone, held_out = fresh(), pairs(100, seed=2)
    assert accuracy(backbone, held_out) == 0.0  # the head is zero: no reply is better than another
    lines = train(backbone, pairs(320, seed=1), tmp_path)
    assert accuracy(backbone, held_out) > 0.9
    assert lines[0]["loss"] == pytest.approx(math.log(2))
    assert lines[-1]["loss"] < 0.45
    assert [line["step"] for line in lines] == list(range(1, 41))


def test_the_mean_over_a_reply_learns_too(tmp_path: Path) -> None:
    backbone, held_out = fresh(OTHER), pairs(100, seed=2)
    train(backbone, pairs(320, seed=1), tmp_path)
    assert accuracy(backbone, held_out) > 0.9


def test_labels_below_a_half_turn_the_preference_around(tmp_path: Path) -> None:
    backbone = fresh()
    train(backbone, pairs(320, seed=1, label=0.05), tmp_path)
    assert accuracy(backbone, pairs(100, seed=2)) < 0.1


def test_hard_labels_train_as_labels_of_one() -> None:
    weights = []
    for label, labels in ((0.8, "hard"), (1.0, "soft"), (0.8, "soft")):
        backbone = fresh()
        tiny_models.scramble(backbone, EVALUATOR)
        config = CONFIG.model_copy(update={"labels": labels, "margin": 0.5})
        found = evaluator._step(backbone, EVALUATOR, pairs(6, seed=3, label=label), config, 4096)
        weights.append((found["loss"], backbone.roles.heads[EVALUATOR].weight.grad))
    (hard, hard_grad), (one, one_grad), (soft, _) = weights
    assert hard == pytest.approx(one, abs=1e-7)
    torch.testing.assert_close(hard_grad, one_grad, rtol=0, atol=1e-7)
    assert abs(hard - soft) > 1e-2


def test_micro_batches_do_not_change_the_gradient() -> None:
    backbone, data = fresh(), pairs(12, seed=3)
    tiny_models.scramble(backbone, EVALUATOR)
    gradients = []
    for budget in (1, 60, 100_000):  # one pair at a time, a few, all at once
        values = evaluator._step(backbone, EVALUATOR, data, CONFIG, budget)
        parameters = backbone.roles.parameters(EVALUATOR)
        gradients.append((values, {n: p.grad.clone() for n, p in parameters.items() if p.grad is not None}))
        for parameter in parameters.values():
            parameter.grad = None
    values, whole = gradients[-1]
    assert max(g.abs().max().item() for g in whole.values()) > 1e-2
    assert len(whole) == len(backbone.roles.parameters(EVALUATOR))
    for found, parts in gradients[:-1]:
        assert found == pytest.approx(values, abs=1e-5)
        for name, gradient in parts.items():
            torch.testing.assert_close(gradient, whole[name], rtol=0, atol=1e-6)


def step_gradients(data: list[Preference], **scarcity: Any) -> tuple[dict[str, float], dict[str, Tensor], list[Any], Backbone]:
    """Metrics and gradients of one step over all the pairs, the passes that failed in it, and the backbone."""
    backbone = fresh()
    tiny_models.scramble(backbone, EVALUATOR)
    with no_memory(backbone, **scarcity) as failed:
        values = evaluator._step(backbone, EVALUATOR, data, CONFIG, 100_000)
    gradients = {n: p.grad for n, p in backbone.roles.parameters(EVALUATOR).items() if p.grad is not None}
    return values, gradients, failed, backbone


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_out_of_memory_does_not_change_the_gradient(backward: bool, one_thread: None) -> None:
    data = pairs(12, seed=3)
    values, whole, nothing, _ = step_gradients(data)
    found, parts, failed, backbone = step_gradients(data, tokens=60, backward=backward)
    assert nothing == []
    prompts = {p.prompt for p in data}
    assert failed[0] == (1, sum(len(p.ids) for p in prompts) + sum(len(p.chosen) + len(p.rejected) for p in data))
    assert len(failed) >= 2
    assert found == pytest.approx(values, abs=1e-5)
    assert parts.keys() == whole.keys() == backbone.roles.parameters(EVALUATOR).keys()
    for name, gradient in parts.items():
        torch.testing.assert_close(gradient, whole[name], rtol=0, atol=1e-6)
    events = backbone.budget.take_events()
    assert {(e.phase.value, e.kind.value) for e in events} == {("update", "out_of_memory")}
    assert sum(e.times for e in events) == len(failed)
    assert not backbone.acting


def test_training_goes_on_through_a_lack_of_memory_and_says_the_same(tmp_path: Path) -> None:
    data = pairs(96, seed=1)
    expected = train(fresh(), data, tmp_path / "a")
    backbone = fresh()
    with no_memory(backbone, tokens=80) as failed:
        found = train(backbone, data, tmp_path / "b")
    assert failed
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, abs=1e-3)


def test_scores_are_the_same_when_memory_is_short() -> None:
    backbone, data = fresh(), pairs(40, seed=5)
    tiny_models.scramble(backbone, EVALUATOR, size=0.05)
    prompts, replies = [p.prompt for p in data], [p.chosen for p in data]
    expected = score_replies(backbone, EVALUATOR, prompts, replies, 100_000)
    done: list[int] = []
    with no_memory(backbone, tokens=70) as failed:
        found = score_replies(backbone, EVALUATOR, prompts, replies, 100_000, done.append)
    assert found == pytest.approx(expected, abs=1e-6)
    assert len(failed) >= 2
    assert sum(done) == 40  # a repeated attempt is counted once


def test_a_pair_that_does_not_fit_alone_is_an_error_that_names_its_size() -> None:
    with pytest.raises(MemoryLimitError, match=r"one sequence or pair \(\d+ tokens\) alone does not fit"):
        step_gradients(pairs(12, seed=3), tokens=10)


def test_the_loss_is_bradley_terry_with_soft_labels_and_centering() -> None:
    backbone, data = fresh(), pairs(5, seed=4, label=0.8)
    tiny_models.scramble(backbone, EVALUATOR)
    scores = [
        [score_replies(backbone, EVALUATOR, [p.prompt], [reply], 1)[0] for reply in (p.chosen, p.rejected)] for p in data
    ]  # fmt: skip
    expected = 0.0
    for a, b in scores:
        bradley_terry = -0.8 * math.log(1 / (1 + math.exp(b - a))) - 0.2 * math.log(1 / (1 + math.exp(a - b)))
        expected += (bradley_terry + 0.5 * (a + b) ** 2) / 5
    found = evaluator._step(backbone, EVALUATOR, data, EvaluatorConfig(centering=0.5), 4096)
    assert found["loss"] == pytest.approx(expected, abs=1e-5)
    assert found["accuracy"] == sum(a > b for a, b in scores) / 5


def test_the_margin_is_subtracted_from_the_difference_and_scaled_by_the_label() -> None:
    backbone, data = fresh(), pairs(5, seed=4, label=0.8)
    tiny_models.scramble(backbone, EVALUATOR)
    expected = 0.0
    for p in data:
        a, b = (score_replies(backbone, EVALUATOR, [p.prompt], [reply], 1)[0] for reply in (p.chosen, p.rejected))
        delta = a - b - 0.5 * (2 * 0.8 - 1)
        expected += (0.8 * math.log1p(math.exp(-delta)) + 0.2 * math.log1p(math.exp(delta))) / 5
    found = evaluator._step(backbone, EVALUATOR, data, EvaluatorConfig(margin=0.5, centering=0.0), 4096)
    assert found["loss"] == pytest.approx(expected, abs=1e-5)


STOPPED = EvaluatorConfig(learning_rate=2e-2, epochs=2, batch=8, checkpoint_every=2, early_stopping=True)


def test_early_stopping_keeps_the_weights_with_the_lowest_held_out_loss(tmp_path: Path) -> None:
    """Held-out labels contradict the training pairs, so the loss on them rises and the last weights are not the best."""
    backbone, contrary = fresh(), pairs(24, seed=2, label=0.05)
    seen: dict[int, list[Tensor]] = {}
    lines: list[dict[str, float]] = []

    def log(values: dict[str, float]) -> None:
        lines.append(values)
        seen[int(values["step"])] = [p.detach().clone() for p in backbone.roles.parameters(EVALUATOR).values()]

    train(backbone, pairs(64, seed=1), tmp_path, STOPPED, log=log, held_out=contrary)
    losses = {int(line["step"]): line["held_out_loss"] for line in lines if "held_out_loss" in line}
    assert list(losses) == [0, 2, 4, 6, 8, 10, 12, 14, 16]
    assert losses[0] == pytest.approx(math.log(2))
    best = min((loss, step) for step, loss in losses.items() if step)[1]
    assert best < 16
    for kept, expected in zip(backbone.roles.parameters(EVALUATOR).values(), seen[best], strict=True):
        assert torch.equal(kept, expected)
    scores = [score_replies(backbone, EVALUATOR, [p.prompt for p in contrary], [getattr(p, who) for p in contrary], 4096)
              for who in ("chosen", "rejected")]  # fmt: skip
    by_hand = [
        0.05 * math.log1p(math.exp(b - a)) + 0.95 * math.log1p(math.exp(a - b)) + STOPPED.centering * (a + b) ** 2
        for a, b in zip(*scores, strict=True)
    ]
    assert sum(by_hand) / len(by_hand) == pytest.approx(losses[best], abs=1e-5)


def test_a_killed_training_with_early_stopping_goes_on_bit_for_bit(tmp_path: Path) -> None:
    data, contrary = pairs(64, seed=1), pairs(24, seed=2, label=0.05)
    through, resumed = fresh(), fresh()
    train(through, data, tmp_path / "a", STOPPED, held_out=contrary)
    seen: list[dict[str, float]] = []

    def stop(values: dict[str, float]) -> None:
        seen.append(values)
        if len(seen) == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(fresh(), data, tmp_path / "b", STOPPED, log=stop, held_out=contrary)
    train(resumed, data, tmp_path / "b", STOPPED, held_out=contrary)
    for one, other in zip(
        through.roles.parameters(EVALUATOR).values(), resumed.roles.parameters(EVALUATOR).values(), strict=True
    ):
        assert torch.equal(one, other)


def test_balanced_lengths_are_trained_on_in_more_steps(tmp_path: Path) -> None:
    data = pairs(64, seed=1)
    longer = sum(len(p.chosen) > len(p.rejected) for p in data)
    shorter = sum(len(p.chosen) < len(p.rejected) for p in data)
    assert longer
    assert shorter
    config = EvaluatorConfig(epochs=1, batch=8, length_balanced=True)
    lines = train(fresh(), data, tmp_path, config)
    assert len(lines) == math.ceil((2 * max(longer, shorter) + 64 - longer - shorter) / 8)


@pytest.mark.parametrize("reading", [{}, OTHER], ids=["last token", "mean"])
def test_scores_come_in_the_order_given_whatever_the_batches(reading: dict[str, Any]) -> None:
    backbone, data = fresh(reading), pairs(9, seed=5)
    tiny_models.scramble(backbone, EVALUATOR)
    prompts, replies = [p.prompt for p in data], [p.chosen for p in data]
    alone = [score_replies(backbone, EVALUATOR, [p], [r], 1)[0] for p, r in zip(prompts, replies, strict=True)]
    done: list[int] = []
    assert score_replies(backbone, EVALUATOR, prompts, replies, 20, done.append) == pytest.approx(alone, abs=1e-5)
    assert sum(done) == 9
    assert len(done) > 1
    assert backbone.acting is None


@pytest.mark.parametrize("reading", [{}, OTHER], ids=["default", "other rank and pooling"])
def test_a_killed_training_goes_on_bit_for_bit(reading: dict[str, Any], tmp_path: Path) -> None:
    data, config = pairs(64, seed=1), EvaluatorConfig(learning_rate=1e-2, epochs=2, batch=16, checkpoint_every=3)
    through = fresh(reading)
    expected = train(through, data, tmp_path / "a", config)
    seen: list[dict[str, float]] = []

    def stop_after_five(values: dict[str, float]) -> None:
        seen.append(values)
        if len(seen) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(fresh(reading), data, tmp_path / "b", config, log=stop_after_five)
    resumed, steps = fresh(reading), []
    rest = train(resumed, data, tmp_path / "b", config, resumed=steps.append)
    assert steps == [3]
    assert [*seen[:3], *rest] == expected
    for one, other in zip(
        through.roles.parameters(EVALUATOR).values(), resumed.roles.parameters(EVALUATOR).values(), strict=True
    ):
        assert torch.equal(one, other)


def test_a_killed_training_on_fp16_goes_on_at_its_loss_scale(tmp_path: Path) -> None:
    """Another scale would round other gradients to zero."""
    data, config = pairs(64, seed=1), EvaluatorConfig(learning_rate=1e-2, epochs=1, batch=16, checkpoint_every=2)
    through, resumed = fresh(dtype=torch.float16), fresh(dtype=torch.float16)
    assert through.loss_scale is not None
    assert resumed.loss_scale is not None
    through.loss_scale.load({"value": 4.0, "well": 197.0})  # as after overflows; doubles in the third step
    expected = train(through, data, tmp_path / "a", config)
    newest = max((tmp_path / "a").glob("step-*"))
    shutil.move(newest, tmp_path / "b" / newest.name)
    rest = train(resumed, data, tmp_path / "b", config)
    assert rest == expected[2:]
    assert through.loss_scale.state() == resumed.loss_scale.state() == {"value": 8.0, "well": 1}
    for one, other in zip(
        through.roles.parameters(EVALUATOR).values(), resumed.roles.parameters(EVALUATOR).values(), strict=True
    ):
        assert torch.equal(one, other)


def test_a_loss_that_is_not_finite_stops_before_the_step(tmp_path: Path) -> None:
    backbone = fresh()
    with torch.no_grad():
        backbone.roles.heads[EVALUATOR].bias.fill_(float("nan"))
    before = {n: p.detach().clone() for n, p in backbone.roles.parameters(EVALUATOR).items()}
    with pytest.raises(LoopError, match=r"diverged at step 1: .* is NaN or infinite \(30 of 30 .*evaluator\.learning_rate"):
        train(backbone, pairs(16, seed=1), tmp_path)
    for name, parameter in backbone.roles.parameters(EVALUATOR).items():
        assert torch.equal(torch.nan_to_num(parameter), torch.nan_to_num(before[name])), name
