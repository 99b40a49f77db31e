"""The rule of weight sizes against the bytes that loaded models hold, quantised by bitsandbytes and not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny_models
from selfeval.backbone.load import load_model
from selfeval.backbone.placement import meta_model, plan_placement
from selfeval.backbone.precision import PRECISIONS
from selfeval.backbone.sizes import weight_sizes
from tiny_families import FAMILIES, family_config

# Sizes that leave a last block of 64 half filled; GPT-2 has Conv1D, the mixture has its experts in one parameter.
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 96, "intermediate_size": 137},
    "gpt2": {"n_embd": 96},
    "qwen3_moe": {"hidden_size": 96, "intermediate_size": 136, "moe_intermediate_size": 24},
}


def _held(model: Any) -> dict[str, int]:
    """Return the bytes of every parameter and buffer, with its scales and tables."""
    found = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        beside = [getattr(tensor, "SCB", None)]
        state = getattr(tensor, "quant_state", None)
        if state is not None:
            beside += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
        found[name] = sum(t.numel() * t.element_size() for t in [tensor, *beside] if isinstance(t, Tensor))
    return found


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", SHAPES)
def test_every_weight_takes_what_a_loaded_one_holds(family: str, precision: str, tmp_path: Path) -> None:
    made = tiny_models.model(family, 384, **SHAPES[family])
    loaded = load_model(str(tiny_models.save_model(made, tiny_models.words_tokenizer(), tmp_path)), precision=precision)
    found = weight_sizes(meta_model(made.config), precision)
    assert found.bytes == _held(loaded.model)
    assert found.numbers == sum(p.numel() for p in made.parameters())
    assert (found.unpacked > 0) == PRECISIONS[precision].quantised


def test_a_plan_places_the_bytes_that_are_loaded(tmp_path: Path) -> None:
    made = tiny_models.model("llama", 384, **SHAPES["llama"])
    folder = str(tiny_models.save_model(made, tiny_models.words_tokenizer(), tmp_path))
    for precision in ("int8", "nf4"):
        loaded = load_model(folder, device="cpu", precision=precision)
        plan = plan_placement(meta_model(made.config), {"cpu": 1 << 30}, precision)
        assert sum(plan.bytes.values()) == sum(_held(loaded.model).values())
        assert loaded.placement == plan


@pytest.mark.parametrize("family", FAMILIES)
def test_a_half_takes_two_bytes_in_every_family(family: str) -> None:
    """Against torch's own count of the same model made in bf16."""
    config = family_config(family, 40)
    half: Any = type(meta_model(config))._from_config(config, dtype=torch.bfloat16)
    found = weight_sizes(meta_model(config), "bf16")
    assert found.bytes == _held(half)
    assert found.within(next(n for n, m in half.named_modules() if isinstance(m, torch.nn.ModuleList))) > 0
