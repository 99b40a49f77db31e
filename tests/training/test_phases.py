"""The phases on shapes against the loop itself, its storages counted while it runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_models
from selfeval.backbone.footprint import Footprint, ShapeBackbone
from selfeval.config import LoraConfig, PolicyConfig
from selfeval.rollout.engine import Request, generate
from selfeval.training.checkpoint import Checkpoints, role_optimizer
from selfeval.training.phases import LEARNING, POLICY_ROLES, Shape, optimizer_bytes, rollout_peak, score_peak, update_peak
from selfeval.training.policy import train_policy
from selfeval.training.scoring import EvaluatorScorer
from selfeval.training.setting import Prompt, Setting

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
    found = rollout_peak(shapes, SHAPE, prompts=8, nucleus=False, role="policy")
    layers, kinds, heads, size = 2, 2, 2, 8
    assert found["kv_cache"] == layers * kinds * heads * size * SHAPE.rows * SHAPE.length * 4


@pytest.mark.parametrize("nucleus", [False, True])
def test_sampling_on_shapes_holds_what_the_engine_holds(shapes: ShapeBackbone, nucleus: bool) -> None:
    real = _real()
    requests = [Request(tuple(range(2 + i, 12 + i)), top_p=0.5 if nucleus else 1.0) for i in range(SHAPE.rows)]
    meter = _meter(real)
    with meter, real.acting_as("policy"):
        generate(real, requests, max_new_tokens=SHAPE.reply, seed=0)
    planned = rollout_peak(shapes, SHAPE, prompts=8, nucleus=nucleus, role="policy")
    assert planned.total() == pytest.approx(meter.peak.total(), rel=0.03)


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
    assert optimizer_bytes(shapes, LEARNING) == size


def _train(real: Any, folder: Path) -> None:
    # One prompt is a token shorter, so that there is padding to mask, as the plan takes for granted.
    ends = [12, 12, 12, 11]
    prompts = [Prompt(f"q{i}", tuple(range(2, end)), tuple(range(2, end + GRADE - 10))) for i, end in enumerate(ends)]
    config = PolicyConfig(
        iterations=2, questions_per_iteration=4, replies_per_question=2, minibatch=8, epochs=1, kl_target=1e6, kl_horizon=10**9
    )

    def checkpoints(roles: Sequence[str], optimizers: Mapping[str, Any]) -> Checkpoints:
        return Checkpoints(folder, real, roles, optimizers)

    tokens = 8 * (GRADE + SHAPE.reply)
    setting = Setting(real, config, EvaluatorScorer(real, tokens), seed=0, limit=SHAPE.reply, rows=8, batch_tokens=tokens)
    train_policy(
        setting, prompts, checkpoints, keep=lambda *_: None, log=lambda *_: None, resumed=lambda _: None,
        rolled_back=lambda *_: None,
    )  # fmt: skip


def test_an_iteration_on_shapes_holds_what_the_loop_holds(shapes: ShapeBackbone, tmp_path: Path) -> None:
    real = _real()
    meter = _meter(real)
    with meter:
        _train(real, tmp_path)
    planned = _update(shapes)
    assert planned.total() == pytest.approx(meter.peak.total(), rel=0.05)
    assert planned["adapters"] == real.adapter_bytes


def _update(backbone: ShapeBackbone) -> Counter[str]:
    return update_peak(backbone, SHAPE, grade_prompt=GRADE, minibatch=8, replies=8, evaluator_rows=0)


def test_scoring_holds_less_than_learning_and_no_gradients(shapes: ShapeBackbone) -> None:
    scored = score_peak(shapes, SHAPE, grade_prompt=GRADE, replies=8)
    assert scored["gradients"] == 0
    assert scored["activations"] < _update(shapes)["activations"]


def test_recomputed_layers_hold_less() -> None:
    config = tiny_models.tiny_config("llama", 40, num_hidden_layers=6)
    kept = ShapeBackbone(config, torch.float32, LORA, POLICY_ROLES)
    before = _update(kept)
    kept.recompute_layers()
    assert _update(kept)["activations"] < 0.5 * before["activations"]
