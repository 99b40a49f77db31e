from __future__ import annotations

import json
from pathlib import Path

import pytest

from selfeval.backbone.facts import known_models, model_facts, read_facts
from selfeval.backbone.plan import weigh
from selfeval.errors import ModelError

# What the makers publish (the number of elements in the weight files).
PUBLISHED = {
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "mistralai/Mistral-7B-Instruct-v0.3": 7_248_023_552,
    "THUDM/GLM-4-9B-0414": 9_400_279_040,
    "google/gemma-3-1b-it": 999_885_952,
    "microsoft/Phi-3-mini-4k-instruct": 3_821_079_552,
    "openai-community/gpt2": 124_439_808,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_shipped_facts_give_the_published_size(name: str) -> None:
    facts = model_facts(name)
    weights = weigh(facts, "bf16")
    assert weights.numbers == PUBLISHED[name]
    assert weights.total == pytest.approx(2 * PUBLISHED[name], rel=1e-3)  # buffers on top


def test_every_shipped_file_says_where_its_facts_come_from() -> None:
    for name, path in known_models().items():
        assert name in json.loads(path.read_text())["source"]


def test_quantised_weights_leave_embeddings_and_output_layer_alone() -> None:
    facts = model_facts("Qwen2.5-7B-Instruct")
    embeddings = 2 * 152_064 * 3584  # untied
    layers = 7_615_616_512 - embeddings
    for precision, per_weight in (("int8", 1.0), ("nf4", 0.5 + 1 / 64 + 4 / (64 * 256))):
        assert weigh(facts, precision).total == pytest.approx(2 * embeddings + per_weight * layers, rel=1e-3)
    assert weigh(facts, "nf4").unpacked == 2 * 3584 * 18_944
    assert weigh(facts, "bf16").unpacked == 0


def test_a_short_name_and_a_file_will_do(tmp_path: Path) -> None:
    assert model_facts("qwen3-8b").name == "Qwen/Qwen3-8B"
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(known_models()["Qwen/Qwen3-8B"].read_text())["config"]))
    assert model_facts(str(path)).layers == model_facts(str(tmp_path)).layers == 36


def test_an_unknown_model_names_the_known_ones() -> None:
    with pytest.raises(ModelError, match=r"not known here.*Did you mean \"Qwen/Qwen3-8B\"\?.*--config.*Llama-3.1-8B-Instruct"):
        model_facts("Qwen/Qwen3-8")


@pytest.mark.parametrize("values", [{}, {"model_type": "vit"}, {"model_type": "marian", "is_encoder_decoder": True}])
def test_a_config_of_something_else_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(ModelError, match="is no causal language model that transformers knows"):
        read_facts("x", values)


def test_the_period_of_layers() -> None:
    assert model_facts("Qwen3-8B").period == 1
    assert model_facts("gpt2").period == 1
    assert model_facts("gemma-3-1b-it").period == 6  # five sliding layers, one full
    assert model_facts("gpt2").with_layers(3).num_hidden_layers == 3
