"""The phases on shapes against the loop itself, its storages counted while it runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_models
from selfeval.backbone import logprobs
from selfeval.backbone.footprint import Footprint, Peaks, ShapeBackbone, fullest
from selfeval.backbone.logprobs import token_logprobs
from selfeval.backbone.placement import DeviceMap, meta_model, plan_placement
from selfeval.config import LoraConfig, PolicyConfig
from selfeval.rollout.engine import Request, generate
from selfeval.training.checkpoint import role_optimizer
from selfeval.training.context import LearnerContext, Prompt
from selfeval.training.phases import LEARNING, POLICY_ROLES, Shape, optimizer_bytes, rollout_peak, score_peak, update_peaks
from selfeval.training.policy import train_policy
from selfeval.training.recorder import CheckpointRecorder
from selfeval.training.scoring import EvaluatorScorer

LORA = LoraConfig(rank=4, alpha=8.0)
SHAPE = Shape(rows=8, prompt=10, reply=12)
GRADE = 14


def _real() -> Any:
    real = tiny_models.backbone("llama", rank=4, eos=())
    for role, head in POLICY_ROLES.items():
        real.add_role(role, head=head, trainable=role in LEARNING)
    real.add_snapshot("reference", of="policy")
    return real


@pytest.fixture(scope="module")
def shapes() -> ShapeBackbone:
    return ShapeBackbone(tiny_models.tiny_config("llama", 40), torch.float32, LORA, POLICY_ROLES)


def _meter(real: Any) -> Footprint:
    own = [p for role in real.roles for p in real.parameters(role).values()]
    base = [p for n, p in real.model.named_parameters() if "lora_" not in n] + list(real.model.buffers())
    return Footprint({"base": base, "adapters": own}, 40)


def test_the_cache_is_counted_exactly(shapes: ShapeBackbone) -> None:
    found = rollout_peak(shapes, SHAPE, prompts=8, nucleus=False, role="policy")["cpu"]
    layers, kinds, heads, size = 2, 2, 2, 8
    assert found["kv_cache"] == layers * kinds * heads * size * SHAPE.rows * SHAPE.length * 4


@pytest.mark.parametrize("nucleus", [False, True])
def test_sampling_on_shapes_holds_what_the_engine_holds(shapes: ShapeBackbone, nucleus: bool) -> None:
    real = _real()
    requests = [Request(tuple(range(2 + i, 12 + i)), top_p=0.5 if nucleus else 1.0) for i in range(SHAPE.rows)]
    meter = _meter(real)
    with meter, real.acting_as("policy"):
        generate(real, requests, max_new_tokens=SHAPE.reply, seed=0)
    planned = rollout_peak(shapes, SHAPE, prompts=8, nucleus=nucleus, role="policy")["cpu"]
    assert planned.total() == pytest.approx(meter.peak.total(), rel=0.03)


def test_tiles_left_out_on_shapes_do_not_change_the_peak(shapes: ShapeBackbone, monkeypatch: pytest.MonkeyPatch) -> None:
    def peaks() -> Peaks:
        meter = shapes.footprint()
        with torch.no_grad(), shapes.fake, meter:
            tokens = torch.zeros(1, 61, dtype=torch.long)  # 60 of them fill tiles, the last tile is smaller
            mask = torch.ones(1, 61, dtype=torch.bool)
            token_logprobs(shapes, torch.empty(1, 61, 32), tokens, mask, entropy=True, chunk_bytes=5000)
        return meter.peaks

    made: list[int] = []
    whole = logprobs._slices

    def every(length: int, step: int, *, on_shapes: bool) -> Iterator[slice]:
        assert on_shapes
        made.append(-(-length // step))
        return whole(length, step, on_shapes=False)

    few = peaks()
    monkeypatch.setattr(logprobs, "_slices", every)
    assert peaks() == few
    assert max(made) > 10


def test_the_optimizer_is_counted_exactly(shapes: ShapeBackbone) -> None:
    real = _real()
    size = 0
    for role in LEARNING:
        parameters = real.parameters(role)
        optimizer = role_optimizer(parameters, 1e-3)
        for parameter in parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        size += sum(t.numel() * t.element_size() for state in optimizer.state.values() for t in state.values())
    assert optimizer_bytes(shapes, LEARNING) == {"cpu": size}


def _train(real: Any, folder: Path) -> None:
    # One prompt is a token shorter: the plan assumes that there is padding to mask.
    ends = [12, 12, 12, 11]
    prompts = [Prompt(f"q{i}", tuple(range(2, end)), tuple(range(2, end + GRADE - 10))) for i, end in enumerate(ends)]
    config = PolicyConfig(
        iterations=2, questions_per_iteration=4, replies_per_question=2, minibatch=8, epochs=1, kl_target=1e6, kl_horizon=10**9
    )

    tokens = 8 * (GRADE + SHAPE.reply)
    context = LearnerContext(
        real, config, EvaluatorScorer(real, tokens), seed=0, limit=SHAPE.reply, rows=8, batch_tokens=tokens
    )
    train_policy(context, prompts, CheckpointRecorder(folder, real))


def test_an_iteration_on_shapes_holds_what_the_loop_holds(shapes: ShapeBackbone, tmp_path: Path) -> None:
    real = _real()
    meter = _meter(real)
    with meter:
        _train(real, tmp_path)
    planned = _update(shapes)
    assert planned.total() == pytest.approx(meter.peak.total(), rel=0.05)
    assert planned["adapters"] == real.adapter_bytes


def _fullest_update(backbone: ShapeBackbone) -> Peaks:
    return fullest(update_peaks(backbone, SHAPE, grade_prompt=GRADE, minibatch=8, replies=8, evaluator_rows=0))


def _update(backbone: ShapeBackbone) -> Counter[str]:
    return _fullest_update(backbone)["cpu"]


def test_scoring_holds_less_than_learning_and_no_gradients(shapes: ShapeBackbone) -> None:
    scored = score_peak(shapes, SHAPE, grade_prompt=GRADE, replies=8)["cpu"]
    assert scored["gradients"] == 0
    assert scored["activations"] < _update(shapes)["activations"]


def test_the_update_holds_what_entropy_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a vocabulary so wide that the logits are most of it, the plan has as many of them as the loop."""
    wide = ShapeBackbone(tiny_models.tiny_config("llama", 20_000), torch.float32, LORA, POLICY_ROLES)
    asked = []

    def noted(*arguments: Any, **options: Any) -> Any:
        asked.append(options.get("entropy", False))
        return token_logprobs(*arguments, **options)

    monkeypatch.setattr("selfeval.training.phases.token_logprobs", noted)
    with_entropy = _update(wide)
    assert asked == [True]  # as `_update_policy` asks
    monkeypatch.setattr(
        "selfeval.training.phases.token_logprobs", lambda *a, **o: token_logprobs(*a, **{**o, "entropy": False})
    )
    assert with_entropy.total() > _update(wide).total()


# -- several devices ------------------------------------------------------------------------------------------------------


def _map(*devices: str, main: str = "cuda:0") -> DeviceMap:
    made = meta_model(tiny_models.tiny_config("llama", 40, num_hidden_layers=len(devices)))
    whole = plan_placement(made, {main: 1 << 30}, "fp32")
    return replace(whole, devices=devices, bytes={})


def _spread(*devices: str) -> ShapeBackbone:
    config = tiny_models.tiny_config("llama", 40, num_hidden_layers=len(devices))
    return ShapeBackbone(config, torch.float32, LORA, POLICY_ROLES, _map(*devices))


@pytest.fixture(scope="module")
def on_one() -> ShapeBackbone:
    return _spread(*["cuda:0"] * 6)


def test_every_device_holds_the_base_caches_and_adapters_of_its_own_layers(on_one: ShapeBackbone) -> None:
    one, two = on_one, _spread(*["cuda:0"] * 2, *["cuda:1"] * 4)
    for trial in (
        lambda backbone: rollout_peak(backbone, SHAPE, prompts=8, nucleus=False, role="policy"),
        lambda backbone: _fullest_update(backbone),
    ):  # fmt: skip
        whole, parts = trial(one)["cuda:0"], trial(two)
        assert set(parts) == {"cuda:0", "cuda:1"}
        for kind in ("base", "adapters", "optimizer", "kv_cache"):
            assert parts["cuda:0"][kind] + parts["cuda:1"][kind] == whole[kind], kind
    layers = {device: sum(t.numel() * 4 for t in held) for device, held in two.base().items()}
    assert parts["cuda:1"]["base"] == layers["cuda:1"]
    # The heads of two roles (32 weights and a bias) are on the main card; the rest of the adapters is where the layers are.
    heads = 2 * (32 + 1) * 4
    assert 2 * (parts["cuda:0"]["adapters"] - heads) == parts["cuda:1"]["adapters"]
    # Activations of learning: layers keep tensors for the backward on their device, more for four layers than for two.
    assert 1.5 * parts["cuda:0"]["activations"] < parts["cuda:1"]["activations"] < whole["activations"]
    assert sum(peak.total() for peak in parts.values()) == pytest.approx(whole.total(), rel=0.15)


def test_a_streamed_layer_is_kept_elsewhere_and_computed_on_the_main_device(on_one: ShapeBackbone) -> None:
    shared = _spread(*["cuda:0"] * 2, *["cpu"] * 4)
    whole, parts = on_one, _fullest_update(shared)
    kept = _fullest_update(whole)["cuda:0"]
    assert set(parts["cpu"]) == {"base"}
    assert parts["cuda:0"]["base"] + parts["cpu"]["base"] == kept["base"]
    assert parts["cuda:0"]["adapters"] == kept["adapters"]  # where they are computed
    assert parts["cuda:0"]["activations"] < kept["activations"]  # they are computed again in the backward


def test_recomputed_layers_hold_less() -> None:
    config = tiny_models.tiny_config("llama", 40, num_hidden_layers=6)
    kept = ShapeBackbone(config, torch.float32, LORA, POLICY_ROLES)
    before = _update(kept)
    kept.recompute_layers()
    assert _update(kept)["activations"] < 0.5 * before["activations"]
