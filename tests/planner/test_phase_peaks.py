"""The peaks of the phases on shapes against those of the engine and the loop, whose storages are counted while they run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_models
from policies import policy_config
from selfeval.backbone import logprobs
from selfeval.backbone.logprobs import token_logprobs
from selfeval.backbone.placement import DeviceMap, meta_model, plan_placement
from selfeval.config import LEARNERS, EvaluatorConfig, RunConfig
from selfeval.planner.phase_peaks import (
    UNFILTERED,
    Shape,
    ShapeLoop,
    add_optimizer,
    evaluator_peak,
    label_peak,
    optimizer_bytes,
    rollout_peak,
    score_peaks,
    update_peaks,
)
from selfeval.planner.shape_tracing import Footprint, Peaks, ShapeBackbone, fullest
from selfeval.prompt import Prompt
from selfeval.rollout.engine import generate
from selfeval.rollout.next_tokens import next_logprobs
from selfeval.rollout.requests import Request
from selfeval.training.checkpoint import role_optimizer
from selfeval.training.context import LearnerContext, QuestionPrompts
from selfeval.training.policy import train_policy
from selfeval.training.recorder import CheckpointRecorder
from selfeval.training.scoring import EvaluatorScorer
from slow import slow

GRADE = 14
SHAPE = Shape(rows=8, prompt=10, reply=12, grade=GRADE, per_prompt=2)
LEARNING = ("policy", "critic")
SETTINGS: dict[str, Any] = {
    "iterations": 2, "questions_per_iteration": 4, "replies_per_question": 2, "minibatch": 8, "epochs": 1,
    "kl_target": 1e6, "kl_horizon": 10**9, "watchdogs": "warn",
}  # fmt: skip


def _real() -> Any:
    real = tiny_models.backbone("llama", rank=4, eos=())
    real.roles.add("evaluator-0", head=True, trainable=False)
    real.roles.add("policy")
    real.roles.add_snapshot("reference", of="policy")
    return real


def _config(learner: str = "ppo", **settings: Any) -> RunConfig:
    lora = {"rank": 4, "alpha": 8.0}
    policy = policy_config(learner, **SETTINGS, **settings).model_dump()
    return RunConfig.model_validate({"backbone": {"lora": lora}, "policy": policy})


def _loop(config: RunConfig | None = None, placed: DeviceMap | None = None, vocabulary: int = 40, **changes: Any) -> ShapeLoop:
    model = tiny_models.tiny_config("llama", vocabulary, **changes)
    placed = placed or plan_placement(meta_model(model), {"cpu": 1 << 30}, "fp32")
    return ShapeLoop.of(config or _config(), model, torch.float32, placed, None)


@pytest.fixture(scope="module")
def loop() -> ShapeLoop:
    return _loop()


@pytest.fixture(scope="module")
def shapes(loop: ShapeLoop) -> ShapeBackbone:
    return loop.backbone


def _meter(real: Any) -> Footprint:
    own = [p for role in real.roles.names for p in real.roles.parameters(role).values()]
    base = [p for n, p in real.model.named_parameters() if "lora_" not in n] + list(real.model.buffers())
    return Footprint({"base": base, "adapters": own}, 40)


def test_the_cache_is_counted_exactly(shapes: ShapeBackbone) -> None:
    # Replies so long that the peak is in their last steps and not in the pass over the prompts.
    shape = replace(SHAPE, reply=200)
    found = rollout_peak(shapes, shape, prompts=8, role="policy")["cpu"]
    layers, kinds, heads, size = 2, 2, 2, 8
    tokens = shape.prompt + shape.reply  # room for them all
    assert found["kv_cache"] == layers * kinds * heads * size * shape.rows * tokens * 4
    # With requests that wait there is room for an eighth more, so that columns rarely move to the front.
    found = rollout_peak(shapes, shape, prompts=8, role="policy", waiting=True)["cpu"]
    assert found["kv_cache"] == layers * kinds * heads * size * shape.rows * (tokens + tokens // 8) * 4


@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_sampling_on_shapes_holds_what_the_engine_holds(shapes: ShapeBackbone, top_p: float) -> None:
    real = _real()
    real.roles.add("critic", head=True)
    requests = [Request(Prompt(tuple(range(2 + i, 12 + i))), top_p=top_p) for i in range(SHAPE.rows)]
    meter = _meter(real)
    with meter, real.acting_as("policy"):
        generate(real, requests, max_new_tokens=SHAPE.reply, seed=0)
    planned = rollout_peak(shapes, SHAPE, prompts=8, role="policy", settings=replace(UNFILTERED, top_p=top_p))["cpu"]
    assert planned.total() == pytest.approx(meter.peak.total(), rel=0.03)


def test_reading_labels_on_shapes_holds_what_the_engine_holds(shapes: ShapeBackbone) -> None:
    real = _real()
    real.roles.add("critic", head=True)
    prompts = [Prompt(tuple(range(2 + i, 12 + i))) for i in range(SHAPE.rows)]
    meter = _meter(real)
    with meter, real.acting_as("base"):
        next_logprobs(real, prompts, [5, 6], batch_size=SHAPE.rows)
    planned = label_peak(shapes, SHAPE.prompt, SHAPE.rows, role="base")["cpu"]
    assert planned["kv_cache"] == 0, "nothing is sampled after the prompts"
    assert planned.total() == pytest.approx(meter.peak.total(), rel=0.03)


def test_requests_that_wait_for_a_place_are_counted_with_the_columns_that_their_batch_has(shapes: ShapeBackbone) -> None:
    real = _real()
    real.roles.add("critic", head=True)
    settings = replace(UNFILTERED, min_p=0.1, repetition_penalty=1.3)
    requests = [
        replace(settings, prompt=Prompt(tuple(2 + (i + j * (1 + i // 38)) % 38 for j in range(10))))
        for i in range(5 * SHAPE.rows)
    ]
    meter = _meter(real)
    with meter, real.acting_as("policy"):
        generate(real, requests, max_new_tokens=SHAPE.reply, seed=0, batch_size=SHAPE.rows)
    planned = rollout_peak(shapes, SHAPE, prompts=8, role="policy", settings=settings, waiting=True)["cpu"]
    # The random numbers of waiting requests are drawn in advance, which the plan leaves out.
    assert planned.total() == pytest.approx(meter.peak.total(), rel=0.05)


def test_tiles_left_out_on_shapes_do_not_change_the_peak(shapes: ShapeBackbone, monkeypatch: pytest.MonkeyPatch) -> None:
    def peaks() -> Peaks:
        meter = shapes.footprint()
        with torch.no_grad(), shapes.shapes, meter:
            tokens = torch.zeros(1, 61, dtype=torch.long)  # 60 of them fill tiles, the last tile is smaller
            mask = torch.ones(1, 61, dtype=torch.bool)
            token_logprobs(shapes, torch.empty(1, 61, 32), tokens, mask, entropy=True, chunk_bytes=5000)
        return meter.peaks

    made: list[int] = []
    whole = logprobs.slices

    def every(length: int, step: int, *, on_shapes: bool) -> Iterator[slice]:
        assert on_shapes
        made.append(-(-length // step))
        return whole(length, step, on_shapes=False)

    few = peaks()
    monkeypatch.setattr(logprobs, "slices", every)
    assert peaks() == few
    assert max(made) > 10


def test_the_optimizer_is_counted_exactly(shapes: ShapeBackbone) -> None:
    real = _real()
    real.roles.add("critic", head=True)
    size = 0
    for role in LEARNING:
        parameters = real.roles.parameters(role)
        optimizer = role_optimizer(parameters, 1e-3)
        for parameter in parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        size += sum(t.numel() * t.element_size() for state in optimizer.state.values() for t in state.values())
    assert optimizer_bytes(shapes, LEARNING) == {"cpu": size}


def _train(real: Any, folder: Path, config: RunConfig) -> None:
    # One prompt is a token shorter, so that there is padding to mask, as the plan assumes.
    ends = [12, 12, 12, 11]
    prompts = [
        QuestionPrompts(f"q{i}", Prompt(tuple(range(2 + i, end + i))), Prompt(tuple(range(2 + i, end + i + GRADE - 10))))
        for i, end in enumerate(ends)
    ]
    tokens = 8 * (GRADE + SHAPE.reply)
    scorer = EvaluatorScorer(real, tokens)
    context = LearnerContext(
        real, config.policy, scorer, seed=0, limit=SHAPE.reply, batch_size=24, batch_tokens=tokens, evaluator="evaluator-0"
    )
    train_policy(context, prompts, CheckpointRecorder(folder, real))


VARIANTS = {
    **{name: _config(name) for name in LEARNERS},
    "entropy_floor": _config("grpo", entropy_floor=0.5),
    "simpo": _config("dpo", loss="simpo"),
    "gspo": _config("grpo", loss="gspo"),
}
FAST = ("ppo", "dpo", "entropy_floor")


@pytest.mark.parametrize("name", [name if name in FAST else slow(name) for name in VARIANTS])
def test_an_iteration_on_shapes_holds_what_the_loop_holds(name: str, tmp_path: Path) -> None:
    """The fullest moment of training with each learner, over all phases."""
    config = VARIANTS[name]
    real, loop = _real(), _loop(config)
    meter = _meter(real)
    with meter:
        _train(real, tmp_path, config)
    guide = loop.learner.guidance()
    sampled = rollout_peak(loop.backbone, SHAPE, prompts=4, role="policy", guide=guide)
    add_optimizer(sampled, loop.backbone, loop.trained)
    phases = {
        "rollout": sampled,
        "score": score_peaks(loop, SHAPE, replies=8),
        "update": fullest(update_peaks(loop, SHAPE, replies=8)),
    }
    planned = fullest(phases.values())["cpu"]
    # A plan counts no shared prompts among replies from a buffer; this buffer is so small that there are some.
    above = 1.3 if name in ("ilql", "soft_q") else 1.05
    assert 0.95 * meter.peak.total() <= planned.total() <= above * meter.peak.total()
    assert planned["adapters"] == real.census.adapter_bytes
    assert set(loop.backbone.roles.names) == set(real.roles.names)


def test_the_evaluator_in_training_has_no_other_role_in_memory(loop: ShapeLoop) -> None:
    alone = evaluator_peak(loop.backbone, SHAPE, RunConfig().evaluator)["cpu"]
    own = sum(p.numel() * 4 for p in loop.backbone.roles.parameters("evaluator-0").values())
    assert alone["adapters"] == alone["gradients"] == own
    assert alone["optimizer"] < _update(loop)["optimizer"]


def test_members_are_planned_with_their_ranks() -> None:
    inputs = [{"rank": 4}, {"rank": 8, "pooling": "mean"}, {"rank": 8, "pooling": "mean"}]
    config = _config().model_copy(update={"evaluator": EvaluatorConfig(members=3, inputs=inputs)})
    varied = _loop(config)
    # One trace per kind of member; rank 4 is that of the backbone.
    assert varied.members == ("evaluator-0", "evaluator-1")
    small, large = (evaluator_peak(varied.backbone, SHAPE, config.evaluator, role)["cpu"] for role in varied.members)
    head = 4 * (32 + 1)
    assert large["adapters"] - head == 2 * (small["adapters"] - head)
    assert large["optimizer"] - small["optimizer"] == 2 * (large["adapters"] - small["adapters"])
    # The critic is a copy of the first member.
    shapes = {name: p.shape for name, p in varied.backbone.roles.adapter("critic").items()}
    assert shapes == {
        n.replace("evaluator-0", "critic"): p.shape for n, p in varied.backbone.roles.adapter("evaluator-0").items()
    }
    scored = score_peaks(varied, SHAPE, replies=8)["cpu"]
    more = 2 * (large["adapters"] - small["adapters"])
    alone = _loop(config.model_copy(update={"evaluator": EvaluatorConfig(members=3)}))
    assert scored["adapters"] - score_peaks(alone, SHAPE, replies=8)["cpu"]["adapters"] == more


def _fullest_update(loop: ShapeLoop) -> Peaks:
    return fullest(update_peaks(loop, SHAPE, replies=8))


def _update(loop: ShapeLoop) -> Counter[str]:
    return _fullest_update(loop)["cpu"]


def test_scoring_holds_less_than_learning_and_no_gradients(loop: ShapeLoop) -> None:
    scored = score_peaks(loop, SHAPE, replies=8)["cpu"]
    assert scored["gradients"] == 0
    assert scored["activations"] < _update(loop)["activations"]


def test_a_plan_of_scoring_shares_no_prompts_and_one_of_updates_does(loop: ShapeLoop) -> None:
    apart = replace(SHAPE, per_prompt=1)
    assert score_peaks(loop, SHAPE, replies=8) == score_peaks(loop, apart, replies=8)
    alone = fullest(update_peaks(loop, apart, replies=8))["cpu"]
    assert _update(loop)["activations"] < alone["activations"]


def test_an_entropy_floor_adds_a_gradient_to_the_update() -> None:
    """A vector per token for the gradient of the entropy, 8 x 12 tokens of 32 numbers, while the loss is computed."""
    update = [_update(_loop(_config("grpo", entropy_floor=floor))) for floor in (None, 0.5)]
    assert update[1]["activations"] >= update[0]["activations"] + 8 * 12 * 32 * 4


# -- several devices ------------------------------------------------------------------------------------------------------


def _map(*devices: str, main: str = "cuda:0") -> DeviceMap:
    made = meta_model(tiny_models.tiny_config("llama", 40, num_hidden_layers=len(devices)))
    whole = plan_placement(made, {main: 1 << 30}, "fp32")
    return replace(whole, devices=devices, bytes={})


def _spread(*devices: str) -> ShapeLoop:
    return _loop(placed=_map(*devices), num_hidden_layers=len(devices))


@pytest.fixture(scope="module")
def on_one() -> ShapeLoop:
    return _spread(*["cuda:0"] * 6)


def test_every_device_holds_the_base_caches_and_adapters_of_its_own_layers(on_one: ShapeLoop) -> None:
    one, two = on_one, _spread(*["cuda:0"] * 2, *["cuda:1"] * 4)
    for trial in (
        # Replies so long that the caches are part of every peak.
        lambda loop: rollout_peak(loop.backbone, replace(SHAPE, reply=200), prompts=8, role="policy"),
        lambda loop: _fullest_update(loop),
    ):  # fmt: skip
        whole, parts = trial(one)["cuda:0"], trial(two)
        assert set(parts) == {"cuda:0", "cuda:1"}
        for kind in ("base", "adapters", "optimizer", "kv_cache"):
            assert parts["cuda:0"][kind] + parts["cuda:1"][kind] == whole[kind], kind
    layers = {device: sum(t.numel() * 4 for t in held) for device, held in two.backbone.base().items()}
    assert parts["cuda:1"]["base"] == layers["cuda:1"]
    # The heads of two roles (32 weights and a bias) are on the main card; the rest of the adapters is where the layers are.
    heads = 2 * (32 + 1) * 4
    assert 2 * (parts["cuda:0"]["adapters"] - heads) == parts["cuda:1"]["adapters"]
    # Activations of learning: layers keep tensors for the backward on their device, more for four layers than for two.
    assert 1.5 * parts["cuda:0"]["activations"] < parts["cuda:1"]["activations"] < whole["activations"]
    assert sum(peak.total() for peak in parts.values()) == pytest.approx(whole.total(), rel=0.15)


def test_a_streamed_layer_is_kept_elsewhere_and_computed_on_the_main_device(on_one: ShapeLoop) -> None:
    shared = _spread(*["cuda:0"] * 2, *["cpu"] * 4)
    whole, parts = on_one, _fullest_update(shared)
    kept = _fullest_update(whole)["cuda:0"]
    assert set(parts["cpu"]) == {"base"}
    assert parts["cuda:0"]["base"] + parts["cpu"]["base"] == kept["base"]
    assert parts["cuda:0"]["adapters"] == kept["adapters"]  # where they are computed
    assert parts["cuda:0"]["activations"] < kept["activations"]  # they are computed again in the backward


def test_recomputed_layers_hold_less() -> None:
    kept = _loop(num_hidden_layers=6)
    before = _update(kept)
    kept.backbone.recompute_layers()
    assert _update(kept)["activations"] < 0.5 * before["activations"]
