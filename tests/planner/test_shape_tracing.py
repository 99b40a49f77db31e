from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from transformers import Gemma3TextConfig

import tiny_models
from selfeval.backbone.logprobs import token_logprobs
from selfeval.backbone.sequences import pad_sequences, reply_hidden
from selfeval.config import LoraConfig
from selfeval.planner import shape_tracing
from selfeval.planner.shape_tracing import Footprint, ShapeBackbone
from token_prompts import as_prompts

LORA = LoraConfig(rank=4, alpha=8.0)
PROMPTS, REPLIES = [(5, 9, 2, 7, 6), (7, 8, 9)], [(3, 4, 5, 6), (9, 9, 8)]


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def shapes(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> ShapeBackbone:
    roles = {"policy": False, "evaluator-0": True}
    made = ShapeBackbone(tiny_models.tiny_config(family, 40, **changes), dtype, LORA, roles)
    made._shares_prefixes = False  # a layout is computed from values; test_phase_peaks.py has passes with layouts
    return made


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_weights_are_counted_exactly(family: str) -> None:
    real = tiny_models.backbone(family, rank=4)
    own_base = real.census.base_bytes + _bytes(real.model.buffers())
    real.roles.add("policy")
    real.roles.add("evaluator-0", head=True)
    found = shapes(family).footprint().peak
    assert found == {"base": own_base, "adapters": real.census.adapter_bytes}


def test_tied_weights_count_once_and_adapters_are_fp32() -> None:
    tied, untied = (shapes("llama", torch.bfloat16, tie_word_embeddings=tie).footprint().peak for tie in (True, False))
    assert untied["base"] - tied["base"] == 40 * 32 * 2
    assert untied["adapters"] == shapes("llama").footprint().peak["adapters"]


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_a_pass_on_shapes_holds_what_a_real_one_holds(family: str) -> None:
    """The same lines with real and with fake weights: forward, log-probs and backward."""

    def peak(backbone: Any, meter: Footprint, batch: Any) -> int:
        with meter, backbone.acting_as("policy"):
            hidden = reply_hidden(backbone, batch)
            token_logprobs(backbone, hidden, batch.reply_BR, batch.mask_BR)[0].sum().backward()
        return meter.peak.total()

    real, fake = tiny_models.backbone(family, rank=4), shapes(family)
    real._shares_prefixes = False
    real.roles.add("policy")
    real.roles.add("evaluator-0", head=True)
    own = [p for role in real.roles.names for p in real.roles.parameters(role).values()]
    base = [p for n, p in real.model.named_parameters() if "lora_" not in n] + list(real.model.buffers())
    batch = pad_sequences(real, as_prompts(PROMPTS), REPLIES)
    measured = peak(real, Footprint({"base": base, "adapters": own}, 40), batch)
    with fake.shapes:
        imagined = pad_sequences(fake, as_prompts(PROMPTS), REPLIES)
        planned = peak(fake, fake.footprint(), imagined)
    # A mask picks all 8 places of the fake batch and 7 of the real one.
    assert planned == pytest.approx(measured, rel=0.02)


def test_peaks_are_those_of_shapes_that_are_computed_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def peaks() -> list[Any]:
        found = []
        for dtype in (torch.float32, torch.bfloat16):
            for replies in (REPLIES, [reply[:2] for reply in REPLIES]):
                fake = shapes("llama", dtype)
                with fake.shapes:
                    batch = pad_sequences(fake, as_prompts(PROMPTS), replies)
                    with fake.footprint() as meter, fake.acting_as("policy"):
                        hidden = reply_hidden(fake, batch)
                        token_logprobs(fake, hidden, batch.reply_BR, batch.mask_BR)[0].sum().backward()
                found.append(meter.peaks)
        return found

    known = peaks()
    monkeypatch.setattr(shape_tracing, "_computed_once", shape_tracing._computed)
    assert known == peaks()
    assert all(one != other for one, other in itertools.combinations(known, 2))


def test_an_operation_that_returns_a_view_or_writes_is_computed_each_time() -> None:
    with shapes("llama").footprint():
        for _ in range(2):
            base = torch.empty(4, 6, device="meta")
            views = [base.T, base.view(24), torch.ops.aten._unsafe_view(base, [24]), base.add_(1), *base.unbind()]
            assert {view.untyped_storage()._cdata for view in views} == {base.untyped_storage()._cdata}
            assert (base > 0).dtype == torch.bool
            assert [(base + one).dtype for one in (1, 1.0, True)] == [torch.float32] * 3
            whole = torch.zeros(4, dtype=torch.int64, device="meta")
            assert [(whole * one).dtype for one in (2, 1, 1.0, True)] == [torch.int64, torch.int64, torch.float32, torch.int64]


def test_a_model_with_sliding_layers_has_a_footprint() -> None:
    config = Gemma3TextConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, sliding_window=8, layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    fake = ShapeBackbone(config, torch.float32, LORA, {"policy": False})
    meter = fake.footprint()
    with fake.shapes, meter, fake.acting_as("policy"), torch.no_grad():
        fake.hidden(torch.zeros(2, 12, dtype=torch.int64), torch.ones(2, 12, dtype=torch.int64))
    assert meter.peak["activations"] > 2 * 12 * 32 * 4
