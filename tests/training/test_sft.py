from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_models
from selfeval.backbone.adapters import BASE
from selfeval.backbone.roles import Backbone
from selfeval.config import TuningConfig
from selfeval.errors import LoopError
from selfeval.training import sft
from selfeval.training.checkpoint import Checkpoints
from selfeval.training.documents import Document, Row, pack_documents, whole_text
from selfeval.training.neftune import neftune_noise
from selfeval.training.sft import documents_loss, pack, text_logprobs, tune_on_documents, tune_on_text

ROLE = "reader"
CONFIG = TuningConfig(steps=40, batch=4, learning_rate=1e-2, checkpoint_every=3)
Rows = list[tuple[int, ...]]


def counting(count: int, seed: int) -> Rows:
    """Rows that count upwards from a random word, and start again at the end of the words."""
    rng = random.Random(seed)
    return [tuple(2 + (start + i) % 38 for i in range(rng.randrange(8, 20))) for start in rng.choices(range(38), k=count)]


def as_rows(rows: Rows) -> list[Row]:
    return [(whole_text(row),) for row in rows]


def fresh(**changes: Any) -> Backbone:
    backbone = tiny_models.backbone(**changes)
    backbone.roles.add(ROLE)
    return backbone


def tune(backbone: Backbone, rows: Rows, folder: Path, config: TuningConfig = CONFIG, **options: Any) -> list[dict[str, float]]:
    lines: list[dict[str, float]] = []

    def checkpoints(optimizers: Mapping[str, Any]) -> Checkpoints:
        return Checkpoints(folder, backbone, [ROLE], optimizers)

    defaults: dict[str, Any] = {"seed": 0, "batch_tokens": 4096, "log": lines.append}
    tune_on_text(backbone, ROLE, rows, config, checkpoints, **{**defaults, **options})
    return lines


def loss(backbone: Backbone, role: str, rows: Rows) -> float:
    with backbone.acting_as(role):
        found = [x for row in text_logprobs(backbone, rows, 64) for x in row]
    return -sum(found) / len(found)


def test_documents_are_packed_one_after_the_other() -> None:
    assert pack([[1, 2, 3], [4], [5, 6]], 2) == [(1, 2), (3, 4), (5, 6)]
    assert pack([[1, 2, 3]], 2) == [(1, 2)]
    assert pack([[1]], 2) == pack([], 2) == []


def test_it_learns_text_that_it_did_not_read(tmp_path: Path) -> None:
    backbone, held_out = fresh(), counting(30, seed=2)
    before = loss(backbone, ROLE, held_out)
    assert before == pytest.approx(loss(backbone, BASE, held_out), abs=1e-6)  # an adapter starts as the bare base
    lines = tune(backbone, counting(60, seed=1), tmp_path)
    assert loss(backbone, ROLE, held_out) < before / 2
    assert loss(backbone, BASE, held_out) == pytest.approx(before, abs=1e-6)
    assert [line["step"] for line in lines] == list(range(1, 41))


def test_the_loss_is_the_mean_over_all_predicted_tokens() -> None:
    backbone, rows = fresh(), counting(3, seed=3)
    tiny_models.scramble(backbone, ROLE)
    with backbone.acting_as(ROLE):
        chosen = [
            tiny_models.full_logprobs(backbone.model, row)[i, row[i + 1]].item() for row in rows for i in range(len(row) - 1)
        ]
        found = text_logprobs(backbone, rows, 64)
    assert len({len(row) for row in rows}) > 1
    assert [len(row) for row in found] == [len(row) - 1 for row in rows]
    assert [x for row in found for x in row] == pytest.approx(chosen, abs=1e-5)
    assert sft._step(backbone, ROLE, as_rows(rows), 4096) == pytest.approx(-sum(chosen) / len(chosen), abs=1e-5)


def test_micro_batches_do_not_change_the_gradient(one_thread: None) -> None:
    backbone, rows = fresh(), counting(6, seed=4)
    tiny_models.scramble(backbone, ROLE)
    gradients = []
    for budget in (1, 40, 4096):
        value = sft._step(backbone, ROLE, as_rows(rows), budget)
        parameters = backbone.roles.parameters(ROLE)
        gradients.append((value, {n: p.grad.clone() for n, p in parameters.items() if p.grad is not None}))
        for parameter in parameters.values():
            parameter.grad = None
    value, whole = gradients[-1]
    assert max(g.abs().max().item() for g in whole.values()) > 1e-2
    for found, parts in gradients[:-1]:
        assert found == pytest.approx(value, abs=1e-5)
        for name, gradient in parts.items():
            torch.testing.assert_close(gradient, whole[name], rtol=0, atol=1e-5)


def test_the_learning_rate_rises_and_falls_to_zero(tmp_path: Path) -> None:
    config = TuningConfig(steps=10, warmup=0.2, learning_rate=1e-2)
    rates = [line["learning_rate"] for line in tune(fresh(), counting(10, seed=1), tmp_path, config)]
    expected = [0.5, 1.0, 1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]
    assert rates == pytest.approx([1e-2 * factor for factor in expected])


def test_a_killed_tuning_goes_on_bit_for_bit(tmp_path: Path, one_thread: None) -> None:
    rows, config = counting(10, seed=1), CONFIG.model_copy(update={"steps": 8})
    through = fresh()
    expected = tune(through, rows, tmp_path / "a", config)
    seen: list[dict[str, float]] = []

    def stop_after_five(values: dict[str, float]) -> None:
        seen.append(values)
        if len(seen) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(fresh(), rows, tmp_path / "b", config, log=stop_after_five)
    resumed, steps = fresh(), []
    rest = tune(resumed, rows, tmp_path / "b", config, resumed=steps.append)
    assert steps == [3]
    assert [*seen[:3], *rest] == expected
    for one, other in zip(through.roles.parameters(ROLE).values(), resumed.roles.parameters(ROLE).values(), strict=True):
        assert torch.equal(one, other)
    finished, steps = fresh(), []
    assert tune(finished, rows, tmp_path / "b", config, resumed=steps.append) == []  # nothing is left to do
    assert steps == [8]
    assert torch.equal(*(next(iter(b.roles.parameters(ROLE).values())) for b in (finished, through)))


def test_rows_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    backbone = fresh(max_position_embeddings=16)
    long = [tuple(range(2, 19))]
    with pytest.raises(LoopError, match=r"17 tokens, more than this model's context of 16.*context\.rope_scaling"):
        tune(backbone, long, tmp_path)
    with backbone.acting_as(ROLE), pytest.raises(LoopError, match="17 tokens"):
        text_logprobs(backbone, long, 64)
    for rows in ([], [(3,)]):
        with pytest.raises(LoopError, match="at least 2"):
            tune(backbone, rows, tmp_path)


def test_a_loss_that_is_not_finite_stops_before_the_step(tmp_path: Path) -> None:
    backbone = fresh()
    with torch.no_grad():
        next(iter(backbone.roles.parameters(ROLE).values())).fill_(math.nan)
    before = [p.clone() for p in backbone.roles.parameters(ROLE).values()]
    with pytest.raises(LoopError, match=r"reader diverged at step 1: .*lora_A\.reader.*NaN"):
        tune(backbone, counting(4, seed=1), tmp_path)
    for old, new in zip(before, backbone.roles.parameters(ROLE).values(), strict=True):
        torch.testing.assert_close(old, new, rtol=0, atol=0, equal_nan=True)
    assert not list(tmp_path.glob("step-*"))


# -- completions --------------------------------------------------------------------------------------------------------


def answers(count: int, seed: int) -> list[Document]:
    """Documents of a random prompt and a completion that counts upwards; two thirds have a second turn."""
    rng, found = random.Random(seed), []
    for number in range(count):
        parts: list[tuple[int, bool]] = []
        for _ in range(1 + (number % 3 > 0)):
            start = rng.randrange(38)
            parts += [(2 + rng.randrange(38), False) for _ in range(rng.randrange(1, 6))]
            parts += [(2 + (start + i) % 38, True) for i in range(rng.randrange(2, 8))]
        found.append(Document(tuple(i for i, _ in parts), tuple(counts for _, counts in parts)))
    return found


def expected_loss(backbone: Backbone, documents: list[Document]) -> float:
    """The mean loss of the tokens that count: one plain pass for each document, by itself."""
    found = []
    for document in documents:
        logprobs_TV = tiny_models.full_logprobs(backbone.model, document.ids)
        found += [-logprobs_TV[i - 1, document.ids[i]].item() for i, counts in enumerate(document.trained) if counts]
    return sum(found) / len(found)


@pytest.mark.parametrize("packs", [True, False], ids=["packed", "one by one"])
def test_the_loss_of_packed_rows_is_that_of_the_documents_alone(packs: bool) -> None:
    backbone, documents = fresh(), answers(9, seed=3)
    tiny_models.scramble(backbone, ROLE)
    rows = pack_documents(documents, 40)
    assert len(rows) < len(documents) / 2
    with backbone.acting_as(ROLE):
        expected = expected_loss(backbone, documents)
        every_token = expected_loss(backbone, [whole_text(document.ids) for document in documents])
    assert abs(every_token - expected) > 1e-3  # the mask matters
    assert documents_loss(backbone, ROLE, rows, 4096, packs=packs) == pytest.approx(expected, abs=1e-5)
    assert documents_loss(backbone, ROLE, rows, 50) == pytest.approx(expected, abs=1e-5)
    assert sft._step(backbone, ROLE, rows, 4096, packs) == pytest.approx(expected, abs=1e-5)


def test_packing_does_not_change_the_gradient(one_thread: None) -> None:
    backbone, rows = fresh(), pack_documents(answers(9, seed=3), 40)
    tiny_models.scramble(backbone, ROLE)
    gradients = []
    for packs, budget in ((True, 4096), (True, 1), (False, 4096), (False, 30)):
        sft._step(backbone, ROLE, rows, budget, packs)
        parameters = backbone.roles.parameters(ROLE)
        gradients.append({name: p.grad.clone() for name, p in parameters.items() if p.grad is not None})
        for parameter in parameters.values():
            parameter.grad = None
    assert max(g.abs().max().item() for g in gradients[0].values()) > 1e-2
    for found in gradients[1:]:
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, gradients[0][name], rtol=0, atol=1e-5)


def test_recomputed_layers_give_the_same_gradient_of_packed_rows_with_noise(one_thread: None) -> None:
    rows, noise, gradients = pack_documents(answers(9, seed=3), 40), neftune_noise(5.0, "seed"), []
    for recomputes in (False, True):
        backbone = fresh()
        tiny_models.scramble(backbone, ROLE)
        if recomputes:
            backbone.recompute_layers()
        sft._step(backbone, ROLE, rows, 4096, True, noise)
        gradients.append([p.grad for p in backbone.roles.parameters(ROLE).values()])
    for kept, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(kept, recomputed, rtol=0, atol=1e-6)


def tune_answers(
    backbone: Backbone, folder: Path, config: TuningConfig, held_out: list[Row], **options: Any
) -> tuple[list[dict[str, float]], Any]:
    lines: list[dict[str, float]] = []

    def checkpoints(optimizers: Mapping[str, Any]) -> Checkpoints:
        return Checkpoints(folder, backbone, [ROLE], optimizers)

    defaults: dict[str, Any] = {"seed": 0, "batch_tokens": 4096, "log": lines.append}
    rows = pack_documents(answers(20, seed=1), 40)
    measured = tune_on_documents(backbone, ROLE, rows, config, checkpoints, held_out=held_out, **{**defaults, **options})
    return lines, measured


def test_the_weights_with_the_lowest_held_out_loss_are_kept(tmp_path: Path, one_thread: None) -> None:
    # Their completions have a word that no other document has, so that their loss rises from step 3 on.
    found = [
        replace(document, ids=tuple(1 if counts else word for word, counts in zip(document.ids, document.trained, strict=True)))
        for document in answers(6, seed=2)
    ]
    held_out = pack_documents(found, 40)
    config, backbone = CONFIG.model_copy(update={"steps": 11, "learning_rate": 0.03}), fresh()
    lines, measured = tune_answers(backbone, tmp_path, config, held_out)
    seen = {int(line["step"]): line["held_out_loss"] for line in lines if "held_out_loss" in line}
    assert list(seen) == [0, 3, 6, 9, 11]
    best = min((step for step in seen if step), key=lambda step: seen[step])
    assert best != 11, "otherwise nothing had to be restored"
    assert (measured.before, measured.best) == (seen[0], (best, seen[best]))
    assert documents_loss(backbone, ROLE, held_out, 4096) == pytest.approx(seen[best], abs=1e-6)
    assert seen[0] == pytest.approx(documents_loss(fresh(), ROLE, held_out, 4096), abs=1e-6)


def test_a_killed_tuning_with_noise_and_held_out_loss_is_resumed_bit_for_bit(tmp_path: Path, one_thread: None) -> None:
    config = CONFIG.model_copy(update={"steps": 8, "learning_rate": 0.3, "neftune_alpha": 5.0})
    held_out = pack_documents(answers(6, seed=2), 40)
    through = fresh()
    expected, measured = tune_answers(through, tmp_path / "a", config, held_out)
    for last in (3, 4, 7, 8):  # right before and after a checkpoint, and at the end
        seen: list[dict[str, float]] = []

        def stop(values: dict[str, float], last: int = last, seen: list[dict[str, float]] = seen) -> None:
            seen.append(values)
            if values["step"] == last:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            tune_answers(fresh(), tmp_path / str(last), config, held_out, log=stop)
        resumed, steps = fresh(), []
        rest, again = tune_answers(resumed, tmp_path / str(last), config, held_out, resumed=steps.append)
        assert steps == [(last - 1) // 3 * 3]
        assert [*(line for line in seen if steps[0] and line["step"] <= steps[0]), *rest] == expected
        assert (again.before, again.best) == (measured.before, measured.best)
        for one, other in zip(through.roles.parameters(ROLE).values(), resumed.roles.parameters(ROLE).values(), strict=True):
            assert torch.equal(one, other)


def test_noise_changes_the_training_but_not_the_held_out_loss(tmp_path: Path, one_thread: None) -> None:
    held_out = pack_documents(answers(6, seed=2), 40)
    config = CONFIG.model_copy(update={"steps": 2})
    plain, _ = tune_answers(fresh(), tmp_path / "plain", config, held_out)
    noisy, _ = tune_answers(fresh(), tmp_path / "noisy", config.model_copy(update={"neftune_alpha": 20.0}), held_out)
    assert noisy[0] == plain[0]
    assert abs(noisy[1]["loss"] - plain[1]["loss"]) > 1e-3


def test_documents_without_a_loss_are_refused(tmp_path: Path) -> None:
    silent = (Document((3, 4, 5), (False, False, False)),)
    with pytest.raises(LoopError, match="a token whose loss counts"):
        tune_answers(fresh(), tmp_path, CONFIG, [silent])
