from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from safetensors import safe_open

import chatglm
from selfeval.config import ContextConfig
from selfeval.errors import ModelError
from selfeval.planner.model_configs import ModelFacts, known_models, model_facts, read_facts, weigh

# Published parameter counts (the number of elements in the weight files).
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
    "THUDM/chatglm2-6b": 6_243_584_000,
    "THUDM/chatglm3-6b": 6_243_584_000,
    # 6,173,286,400 with the output layer tied; the files store it next to the embeddings, as does this package.
    "THUDM/chatglm-6b": 6_173_286_400 + 130_528 * 4096,
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
    with pytest.raises(ModelError, match=r"of known size.*Did you mean \"Qwen/Qwen3-8B\"\?.*--config.*Llama-3.1-8B-Instruct"):
        model_facts("Qwen/Qwen3-8")


@pytest.mark.parametrize("values", [{}, {"model_type": "vit"}, {"model_type": "marian", "is_encoder_decoder": True}])
def test_a_config_of_something_else_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(ModelError, match="is not a causal language model known to transformers"):
        read_facts("x", values)


def test_what_run_refuses_is_not_planned() -> None:
    """BERT is in transformers' table of causal models, for a head that its published config does not name."""
    values = {"model_type": "bert", "architectures": ["BertForMaskedLM"]}
    with pytest.raises(ModelError, match="x is a BertForMaskedLM, not a causal language model"):
        read_facts("x", values)


def test_the_model_on_the_meta_device_is_built_once() -> None:
    facts = model_facts("gpt2")
    assert facts.shell is facts.shell
    assert all(parameter.is_meta for parameter in facts.shell.parameters())


def test_the_period_of_layers() -> None:
    assert model_facts("Qwen3-8B").period == 1
    assert model_facts("gpt2").period == 1
    assert model_facts("gemma-3-1b-it").period == 6  # five sliding layers, one full
    assert model_facts("gpt2").with_layers(3).num_hidden_layers == 3


def test_a_config_of_a_few_bytes_cannot_build_billions_of_layers(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 10**12}))
    with pytest.raises(ModelError, match=r"sets num_hidden_layers = 1000000000000, which no model has \(at most 4,096\)"):
        model_facts(str(path))


# -- ChatGLM, whose config.json uses different names ---------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["chatglm1", "chatglm1-28l", "chatglm2", "chatglm3"])
def test_a_published_config_of_chatglm_gives_the_weights_in_its_files(folder: str) -> None:
    path, _ = chatglm.golden(folder)
    facts = model_facts(str(path))
    with safe_open(path / "model.safetensors", "pt") as file:
        sizes = [math.prod(file.get_slice(name).get_shape()) for name in file.keys() if "inv_freq" not in name]  # noqa: SIM118
    assert weigh(facts, "fp32").numbers == sum(sizes)
    assert (facts.context, facts.period) == (512, 1)
    assert weigh(ModelFacts("", facts.with_layers(1)), "fp32").numbers < weigh(facts, "fp32").numbers


def test_a_variant_of_chatglm_that_is_not_computed_is_refused() -> None:
    values = json.loads(known_models()["THUDM/chatglm2-6b"].read_text())["config"]
    with pytest.raises(ModelError, match="rmsnorm = true is supported"):
        read_facts("chatglm2-6b", {**values, "rmsnorm": False})


# -- context ----------------------------------------------------------------------------------------------------------------


def test_a_stretched_context_reaches_further_and_leaves_the_facts_alone() -> None:
    facts = model_facts("Qwen3-8B")
    for method in ("linear", "dynamic", "yarn"):
        context = ContextConfig.model_validate({"rope_scaling": method, "rope_factor": 4.0, "attention": "eager"})
        wide = facts.within(context)
        assert (wide.context, wide.attention) == (4 * 40_960, "eager")
        assert wide.config.rope_parameters["rope_type"] == method
    assert (facts.context, facts.attention) == (40_960, None)
    assert facts.config.rope_parameters["rope_type"] == "default"
    with pytest.raises(ModelError, match="no rotary positions"):
        model_facts("gpt2").within(context)
