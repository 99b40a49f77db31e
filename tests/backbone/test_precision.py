from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ByteSize
from torch import Tensor

import tiny_models
from selfeval.backbone.adapters import BASE
from selfeval.backbone.load import load_model
from selfeval.backbone.logprobs import token_logprobs
from selfeval.backbone.precision import PRECISIONS, OverflowGuard, load_arguments, pick_precision
from selfeval.backbone.role_files import load_role, save_role
from selfeval.backbone.roles import Backbone
from selfeval.backbone.sequences import pad_sequences, reply_hidden
from selfeval.config import LoraConfig, PlacementConfig
from selfeval.errors import LoopError, ModelError, RunFolderError
from selfeval.prompt import Prompt
from selfeval.rollout.engine import generate
from selfeval.rollout.requests import Request
from selfeval.texts import format_bytes
from token_prompts import as_prompts

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GIB = 2**30
IDS = torch.tensor([[5, 9, 22, 17, 30], [7, 7, 33, 21, 4]])
ONES = torch.ones_like(IDS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # awkward sizes for kernels: neither hidden nor intermediate is a multiple of 64
    made = tiny_models.model("llama", 384, hidden_size=96, intermediate_size=136, initializer_range=0.06)
    return tiny_models.save_model(made, tiny_models.words_tokenizer(), tmp_path_factory.mktemp("model"))


def backbone(folder: Path, precision: str) -> Backbone:
    loaded = load_model(str(folder), device="cpu", precision=precision)
    return Backbone(loaded, LoraConfig(rank=4, alpha=8.0), "tiny")


def logprobs(made: Backbone, role: str) -> Tensor:
    with torch.no_grad(), made.acting_as(role):
        return torch.log_softmax(made.logits(made.hidden(IDS, ONES)), -1)


def seven_billion(precision: str) -> int:
    """Bytes of a base of 7e9 numbers."""
    return int(7e9 * {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "int8": 1.0, "nf4": 0.52}[precision])


# -- picking ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "free", "expected"),
    [
        (CPU, 64, "fp32"),
        (CPU, 20, "bf16"),
        (CPU, 10, "int8"),
        (CPU, 6, "nf4"),
        (CPU, 1, "nf4"),
        (CUDA, 24, "bf16"),
        (CUDA, 5, "nf4"),
    ],
)
def test_auto_takes_the_best_that_fits_and_says_so(
    device: torch.device, free: float, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    picked, why = pick_precision("auto", device, seven_billion, int(free * GIB))
    assert picked == expected
    if picked == ("fp32" if device is CPU else "bf16"):
        assert why is None
    else:
        assert why is not None
        assert f"precision {expected}" in why
        assert f"{format_bytes(free * GIB)} are free" in why


def test_an_old_gpu_gets_fp16_and_a_wish_is_a_wish(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    assert pick_precision("auto", CUDA, seven_billion, 1000 * GIB)[0] == "fp16"
    assert pick_precision("int8", CPU, seven_billion, 0) == ("int8", None)


def test_the_pick_is_told_to_the_user(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selfeval.backbone.load._sum", lambda memory, device: 500_000)
    loaded = load_model(str(folder), device="cpu")
    assert loaded.precision == "bf16"
    assert any("precision bf16 was picked" in note for note in loaded.notes)


def test_quantised_without_bitsandbytes_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selfeval.backbone.precision.is_bitsandbytes_available", lambda: False)
    with pytest.raises(ModelError, match=r"self-evaluator\[quantised\]"):
        load_arguments("nf4", CPU)
    assert pick_precision("auto", CPU, seven_billion, 1)[0] == "bf16"


# -- what a base in each precision can do -------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
def test_adapters_heads_and_logprobs_are_fp32_on_every_base(folder: Path, precision: str) -> None:
    made = backbone(folder, precision)
    made.roles.add("policy")
    made.roles.add("critic", head=True)
    optimizer = torch.optim.AdamW(made.roles.parameters("policy").values(), lr=1e-2)
    batch = pad_sequences(made, as_prompts([[5, 9, 22], [7]]), [[17, 30], [33, 21, 4]])
    before = logprobs(made, "policy")
    frozen = {n: p.detach().clone() for n, p in made.model.named_parameters() if "lora_" not in n}
    losses = []
    for _ in range(3):
        with made.acting_as("policy"):
            values = token_logprobs(made, reply_hidden(made, batch), batch.reply_BR, batch.mask_BR).logprobs
            assert values.dtype == torch.float32
            losses.append(-values.sum())
            losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert (logprobs(made, "policy") - before).abs().max() > 1e-3
    assert torch.equal(logprobs(made, BASE), before)
    assert torch.equal(logprobs(made, "critic"), before)
    assert {p.dtype for role in made.roles.names for p in made.roles.parameters(role).values()} == {torch.float32}
    assert all(torch.equal(p, frozen[n]) for n, p in made.model.named_parameters() if n in frozen)
    state = optimizer.state[next(iter(made.roles.parameters("policy").values()))]
    assert state["exp_avg"].dtype == torch.float32


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_base_can_roll_out_and_its_logprobs_are_those_of_training(folder: Path, precision: str) -> None:
    made = backbone(folder, precision)
    made.roles.add("policy")
    tiny_models.scramble(made, "policy", size=0.05)
    prompts = ((5, 9, 22), (7, 33, 21))
    with made.acting_as("policy"):
        rollouts = generate(made, [Request(Prompt(p)) for p in prompts], max_new_tokens=8, seed=0)
        batch = pad_sequences(made, as_prompts(prompts), [r.ids for r in rollouts])
        with torch.no_grad():
            values = token_logprobs(made, reply_hidden(made, batch), batch.reply_BR, batch.mask_BR).logprobs
    sampled = torch.tensor([p for r in rollouts for p in r.logprobs])
    torch.testing.assert_close(values[batch.mask_BR], sampled, rtol=0, atol=1e-4 if precision == "fp32" else 0.15)


def test_bytes_shrink_and_there_is_still_one_copy(folder: Path) -> None:
    sizes = {p: backbone(folder, p).census.base_bytes for p in PRECISIONS}
    assert sizes["fp32"] == 2 * sizes["bf16"] == 2 * sizes["fp16"]
    assert sizes["nf4"] < sizes["int8"] < sizes["bf16"]


@pytest.mark.parametrize(("precision", "drift"), [("bf16", 0.1), ("fp16", 0.02), ("int8", 0.2), ("nf4", 0.6)])
def test_a_role_trained_on_one_precision_loads_on_another(folder: Path, tmp_path: Path, precision: str, drift: float) -> None:
    made = backbone(folder, "fp32")
    made.roles.add("evaluator-0", head=True)
    tiny_models.scramble(made, "evaluator-0", size=0.1)
    save_role(made, "evaluator-0", tmp_path / "role")
    other = backbone(folder, precision)
    load_role(other, "evaluator-0", tmp_path / "role")
    for name, parameter in made.roles.parameters("evaluator-0").items():
        assert torch.equal(other.roles.parameters("evaluator-0")[name], parameter)
    away = (logprobs(made, "evaluator-0") - logprobs(made, BASE)).abs().mean()
    found = (logprobs(made, "evaluator-0") - logprobs(other, "evaluator-0")).abs().mean()
    assert 0 < found < drift
    assert found < away / 2  # the role is unchanged there
    save_role(other, "evaluator-0", tmp_path / "back")
    load_role(made, "again", tmp_path / "back")


def test_a_base_that_differs_in_its_linear_layers_alone_is_another_base(folder: Path, tmp_path: Path) -> None:
    made = backbone(folder, "nf4")
    made.roles.add("policy")
    save_role(made, "policy", tmp_path / "role")
    changed = tiny_models.model("llama", 384, hidden_size=96, intermediate_size=136, initializer_range=0.06)
    with torch.no_grad():
        changed.model.layers[1].mlp.down_proj.weight += 0.01
    other = tiny_models.save_model(changed, tiny_models.words_tokenizer(), tmp_path / "other")
    with pytest.raises(RunFolderError, match="trained on tiny"):
        load_role(backbone(other, "nf4"), "policy", tmp_path / "role")


# -- overflow -----------------------------------------------------------------------------------------------------------


def too_wide(folder: Path, tmp_path: Path) -> Path:
    made: Any = tiny_models.model("llama", 384, hidden_size=96, intermediate_size=136, num_hidden_layers=3)
    with torch.no_grad():
        made.model.layers[1].mlp.down_proj.weight *= 1e5
    return tiny_models.save_model(made, tiny_models.words_tokenizer(), tmp_path / "wide")


def test_fp16_overflow_is_caught_and_its_layer_named(folder: Path, tmp_path: Path) -> None:
    wide = too_wide(folder, tmp_path)
    with pytest.raises(LoopError, match=r"overflowed fp16.*model\.layers\.1;.*bf16"):
        backbone(wide, "fp16")
    assert logprobs(backbone(wide, "bf16"), BASE).isfinite().all()


def test_overflow_while_generating_is_caught_too(folder: Path) -> None:
    made = backbone(folder, "fp16")
    with torch.no_grad():
        made.model.model.layers[0].mlp.down_proj.weight *= 1e6
    with made.acting_as(BASE), pytest.raises(LoopError, match=r"layers\.0"):
        generate(made, [Request(Prompt((5, 9, 22)))], max_new_tokens=4, seed=0)


def test_the_guard_sees_nothing_where_nothing_is_wrong() -> None:
    made = tiny_models.backbone()
    OverflowGuard(made.model)
    with made.acting_as(BASE):
        made.hidden(IDS, ONES)


# -- where a quantised base may be placed --------------------------------------------------------------------------------


def test_a_quantised_base_that_fits_nowhere_as_a_whole_is_spread_in_16_bits_if_nobody_asked_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tiny_models.model("llama", 384, hidden_size=96, intermediate_size=136, num_hidden_layers=8)
    folder = tiny_models.save_model(made, tiny_models.words_tokenizer(), tmp_path / "deep")
    monkeypatch.setattr("selfeval.backbone.load._sum", lambda memory, device: 1)
    small = PlacementConfig(max_memory={"cpu": ByteSize(300_000)}, reserve=0.0)
    loaded = load_model(str(folder), device="cpu", placement=small)
    assert loaded.precision == "bf16"
    assert any("only plain weights can be spread" in note for note in loaded.notes)
    assert loaded.placement is not None
    assert not loaded.placement.is_whole
    with pytest.raises(ModelError, match="precision = bf16, which can be spread"):
        load_model(str(folder), device="cpu", precision="int8", placement=small)
