from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3TextConfig

import tiny_models
from selfeval.backbone import load
from selfeval.backbone.adapters import BASE
from selfeval.backbone.families.cache import cache_of
from selfeval.backbone.load import LoadedModel, load_model
from selfeval.backbone.role_files import load_role, save_role
from selfeval.backbone.roles import Backbone
from selfeval.backbone.rope import Stretch, check_stretch, stretch_positions
from selfeval.backbone.sequences import reply_logprobs
from selfeval.config import ContextConfig, LoraConfig, load_config
from selfeval.errors import ConfigError, LoopError, ModelError, RunFolderError
from selfeval.prompt import Prompt
from selfeval.rollout.engine import generate
from selfeval.rollout.requests import Request, Rollout
from token_prompts import as_prompts

METHODS = ("linear", "dynamic", "yarn")
TRAINED = 16


def asked(method: str, factor: float = 4.0, attention: str = "auto") -> ContextConfig:
    return ContextConfig.model_validate({"rope_scaling": method, "rope_factor": factor, "attention": attention})


def folder(path: Path, family: str = "llama", **changes: Any) -> Path:
    made = tiny_models.model(family, 400, **{"max_position_embeddings": TRAINED, **changes})
    return tiny_models.save_model(made, tiny_models.words_tokenizer(), path / family)


def loaded(path: Path, context: ContextConfig | None = None) -> LoadedModel:
    return load_model(str(path), device="cpu", context=context)


def backbone(path: Path, context: ContextConfig | None = None) -> Backbone:
    model = loaded(path, context)
    model.eos_ids = ()  # replies run to their limit
    return Backbone(model, LoraConfig(rank=4), path.name)


# -- angles, each by the formula of its paper in double precision ---------------------------------------------------------


def linear_angles(base: float, size: int, length: int, factor: float, trained: int) -> tuple[list[float], float]:
    """Chen et al. 2023, section 2.3: position m is read as m / s."""
    return [base ** (-2 * i / size) / factor for i in range(size // 2)], 1.0


def dynamic_angles(base: float, size: int, length: int, factor: float, trained: int) -> tuple[list[float], float]:
    """Peng et al. 2023: base' = base s^(d / (d - 2)), with s = max(1, l / L) for a pass of l tokens."""
    grown = base * max(1.0, length / trained) ** (size / (size - 2))
    return [grown ** (-2 * i / size) for i in range(size // 2)], 1.0


def yarn_angles(base: float, size: int, length: int, factor: float, trained: int) -> tuple[list[float], float]:
    """Peng et al. 2023 with alpha = 1, beta = 32, and the ramp of the authors' code: straight over the pair's index.

    A pair turns L base^(-2i/d) / (2 pi) times within L tokens; solved for i at beta and alpha turns, rounded outwards.
    """

    def pair_of(turns: float) -> float:
        return size * math.log(trained / (2 * math.pi * turns)) / (2 * math.log(base))

    first, last = max(0, math.floor(pair_of(32))), min(size - 1, math.ceil(pair_of(1)))
    angles = []
    for i in range(size // 2):
        scaled = min(1.0, max(0.0, (i - first) / (last - first)))
        angles.append(base ** (-2 * i / size) * ((1 - scaled) + scaled / factor))
    return angles, 0.1 * math.log(factor) + 1


FORMULAS = {"linear": linear_angles, "dynamic": dynamic_angles, "yarn": yarn_angles}


def tables(model: Any, positions: Tensor, *kind: str) -> tuple[Tensor, Tensor]:
    """Return the factors that the model itself applies to queries and keys, `[T, rotated size]`."""
    cos, sin = model.model.rotary_emb(torch.zeros(1, 1, 1), positions[None], *kind)
    return cos[0], sin[0]


SHAPES = (("llama", {}, 8), ("qwen3", {"head_dim": 64, "max_position_embeddings": 2048}, 64), ("glm4", {"head_dim": 64}, 32))


@pytest.mark.parametrize("factor", [2.0, 8.0])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("family", "changes", "rotated"), SHAPES)
def test_cos_and_sin_are_those_of_the_paper(
    tmp_path: Path, family: str, changes: dict[str, Any], rotated: int, method: str, factor: float
) -> None:
    """glm4 rotates half of each head: that half is the size in the formulas."""
    path = folder(tmp_path, family, rope_parameters={"rope_type": "default", "rope_theta": 50_000.0}, **changes)
    model = loaded(path, asked(method, factor))
    trained = changes.get("max_position_embeddings", TRAINED)
    length = int(trained * factor)
    assert model.context_length == length
    positions = torch.arange(length)
    angles, scale = FORMULAS[method](50_000.0, rotated, length, factor, trained)
    turned = positions.double()[:, None] * torch.tensor(angles * (2 if family != "glm4" else 1), dtype=torch.float64)
    if family == "glm4":  # its pairs are neighbours
        turned = turned.repeat(1, 2)
    cos, sin = tables(model.model, positions)
    # positions up to 16,384 in fp32: an angle is exact to about 1e-3 turns at worst
    torch.testing.assert_close(cos.double(), turned.cos() * scale, rtol=0, atol=4e-3)
    torch.testing.assert_close(sin.double(), turned.sin() * scale, rtol=0, atol=4e-3)
    torch.testing.assert_close(cos.double()[:256], (turned.cos() * scale)[:256], rtol=0, atol=1e-4)
    plain = torch.tensor([50_000.0 ** (-2 * i / rotated) for i in range(rotated // 2)], dtype=torch.float64)
    assert (torch.tensor(angles, dtype=torch.float64) / plain).min() < 0.6  # the test would see a scaling that was left out


def test_yarn_keeps_fast_pairs_and_interpolates_slow_ones(tmp_path: Path) -> None:
    """The ends of the paper's ramp (section 3.2), however the middle is blended: many turns kept, under one scaled."""
    path = folder(tmp_path, "qwen3", head_dim=128, max_position_embeddings=4096)
    found = loaded(path, asked("yarn", 4.0)).model.model.rotary_emb.inv_freq.double()  # type: ignore[union-attr, operator]
    plain = torch.tensor([10_000.0 ** (-2 * i / 128) for i in range(64)], dtype=torch.float64)
    turns = 4096 * plain / (2 * math.pi)
    kept, scaled = turns > 40, turns < 0.9
    assert (int(kept.sum()), int(scaled.sum())) == (20, 18)
    torch.testing.assert_close(found[kept], plain[kept], rtol=1e-5, atol=0)
    torch.testing.assert_close(found[scaled], plain[scaled] / 4, rtol=1e-5, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_factor_one_changes_nothing(tmp_path: Path, method: str) -> None:
    path = folder(tmp_path)
    plain, same = loaded(path), loaded(path, asked(method, 1.0))
    ids = torch.arange(2, 34)[None]
    assert torch.equal(plain.model(input_ids=ids).logits, same.model(input_ids=ids).logits)
    assert (same.context_length, same.stretch, same.notes) == (TRAINED, None, plain.notes)


@pytest.mark.parametrize("method", METHODS)
def test_the_context_grows_and_is_told(tmp_path: Path, method: str) -> None:
    model = loaded(folder(tmp_path), asked(method, 2.5))
    assert model.context_length == 40
    assert model.stretch == Stretch(method, 2.5, TRAINED)
    assert "context of 40 tokens, trained on 16" in model.notes[0]
    assert [("use yarn or linear" in note) for note in model.notes[1:]] == [True] * (method == "dynamic")


# -- families -----------------------------------------------------------------------------------------------------------

SIZES = {
    "vocab_size": 40, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": TRAINED, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
    "initializer_range": 0.25,
}  # fmt: skip
ROTARY = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "glm", "glm4", "gpt_neox", "phi", "phi3", "olmo2", "starcoder2",
          "cohere", "stablelm", "granite", "falcon", "smollm3")  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ROTARY)
def test_families_with_rope_follow_it(family: str, method: str) -> None:
    logits = []
    for context in (ContextConfig(), asked(method)):
        config = AutoConfig.for_model(family, **SIZES)
        before = dict(config.rope_parameters)
        stretch = stretch_positions(config, context, family)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config).eval()
        if stretch:
            check_stretch(model, stretch, family)
            assert {k: config.rope_parameters[k] for k in before if k != "rope_type"} == {
                k: v for k, v in before.items() if k != "rope_type"
            }
        with torch.no_grad():
            logits.append(model(input_ids=torch.arange(2, 40)[None]).logits)
    assert (logits[0] - logits[1]).abs().max() > 1e-3


def test_only_layers_that_see_everything_are_stretched_where_types_differ() -> None:
    for method in METHODS:
        config = Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=8, layer_types=["sliding_attention", "full_attention"])
        local = dict(config.rope_parameters["sliding_attention"])
        base = config.rope_parameters["full_attention"]["rope_theta"]
        stretch = stretch_positions(config, asked(method), "gemma")
        assert stretch is not None
        model = AutoModelForCausalLM.from_config(config).eval()
        check_stretch(model, stretch, "gemma")
        assert config.rope_parameters["sliding_attention"] == local
        positions = torch.arange(64)
        for kind, theta, formula in (
            ("full_attention", base, FORMULAS[method]),
            ("sliding_attention", local["rope_theta"], None),
        ):
            plain = [theta ** (-2 * i / 8) for i in range(4)], 1.0
            angles, scale = formula(theta, 8, 64, 4.0, TRAINED) if formula else plain
            turned = positions.double()[:, None] * torch.tensor(angles * 2, dtype=torch.float64)
            torch.testing.assert_close(tables(model, positions, kind)[0].double(), turned.cos() * scale, rtol=0, atol=1e-4)


def refused(config: Any, *words: str) -> None:
    with pytest.raises(ModelError) as caught:
        stretch_positions(config, asked("yarn"), "the model")
    for word in ("the model", *words):
        assert word in str(caught.value), str(caught.value)


@pytest.mark.parametrize("family", ["gpt2", "bloom", "opt", "gptj", "mamba"])
def test_families_without_rope_are_refused(family: str) -> None:
    refused(AutoConfig.for_model(family), family, "no rotary positions", "rope_scaling = none")


def test_rope_parameters_that_a_model_does_not_use_are_refused() -> None:
    refused(AutoConfig.for_model("falcon", alibi=True), "falcon", "no rotary positions")


def test_a_model_without_rope_is_refused_when_it_is_loaded(tmp_path: Path) -> None:
    path = tiny_models.save_model(tiny_models.model("gpt2", 40), tiny_models.words_tokenizer(), tmp_path / "gpt2")
    with pytest.raises(ModelError, match="gpt2 have no rotary positions"):
        loaded(path, asked("linear"))


def test_a_model_that_does_not_follow_its_config_is_refused() -> None:
    with pytest.raises(ModelError, match="gpt2 do not follow RoPE scaling"):
        check_stretch(tiny_models.model("gpt2"), Stretch("yarn", 2.0, 512), "the model")
    with pytest.raises(ModelError, match="llama do not follow"):  # made before its config was changed
        check_stretch(tiny_models.model("llama"), Stretch("yarn", 2.0, 512), "the model")


def test_a_context_that_is_stretched_already_is_refused_but_loads_as_it_is(tmp_path: Path) -> None:
    own = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
    path = folder(tmp_path, rope_parameters=own, max_position_embeddings=64)
    with pytest.raises(ModelError, match=r"already has RoPE scaling \(linear x4, for 64 tokens\).*rope_scaling = none"):
        loaded(path, asked("yarn"))
    assert (loaded(path).context_length, loaded(path).stretch) == (64, None)


def test_rope_of_another_kind_is_refused() -> None:
    refused(AutoConfig.for_model("gemma4_text"), "proportional")
    refused(AutoConfig.for_model("deepseek_v4"), "main, compress", "full_attention")
    refused(AutoConfig.for_model("recurrent_gemma"), "max_position_embeddings")


# -- writing beyond the trained length ------------------------------------------------------------------------------------

LONG = tuple(2 + (7 * i) % 38 for i in range(20))  # already longer than the model was trained on


def greedy(made: Backbone, limit: int = 30) -> list[Rollout]:
    with made.acting_as(BASE):
        return generate(
            made,
            [Request(Prompt(LONG), temperature=0.0), Request(Prompt(LONG[:5]), temperature=0.0)],
            max_new_tokens=limit,
            seed=0,
        )


@pytest.mark.parametrize("family", ["llama", "glm4"])
@pytest.mark.parametrize("method", ["linear", "yarn"])
def test_cached_decoding_equals_the_whole_pass_beyond_the_trained_length(tmp_path: Path, family: str, method: str) -> None:
    path = folder(tmp_path, family)
    made = backbone(path, asked(method))
    rollouts = greedy(made)
    assert [len(r.ids) for r in rollouts] == [30, 30]
    with made.acting_as(BASE):
        for prompt, rollout in zip((LONG, LONG[:5]), rollouts, strict=True):
            whole = tiny_models.full_logprobs(made.model, [*prompt, *rollout.ids])[len(prompt) - 1 : -1]
            assert whole.argmax(-1).tolist() == list(rollout.ids)
            chosen = whole.gather(1, torch.tensor(rollout.ids)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(rollout.logprobs), chosen, rtol=0, atol=1e-4)


def test_dynamic_decoding_is_exact_up_to_the_trained_length_and_not_beyond(tmp_path: Path) -> None:
    """Cached keys keep the angles of the pass that made them; a full pass uses the angles of its length for all keys."""
    made = backbone(folder(tmp_path), asked("dynamic"))
    with made.acting_as(BASE):
        found = generate(made, [Request(Prompt(LONG[:5]), temperature=0.0)], max_new_tokens=40, seed=0)[0]
        short = found.ids[: TRAINED - 5]
        whole = [reply_logprobs(made, as_prompts([LONG[:5]]), [ids], batch_tokens=64)[0] for ids in (short, found.ids)]
    within = max(abs(a - b) for a, b in zip(found.logprobs[: len(short)], whole[0], strict=True))
    beyond = max(abs(a - b) for a, b in zip(found.logprobs, whole[1], strict=True))
    assert within < 1e-4
    assert beyond > 1e-2


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_dynamic_does_not_depend_on_what_was_read_before(kind: str) -> None:
    """By default, transformers keeps the angles of the longest pass so far."""
    sizes = {**SIZES, "head_dim": 8}
    config = (
        AutoConfig.for_model("llama", **sizes)
        if kind == "llama"
        else Gemma3TextConfig(**sizes, layer_types=["full_attention"] * 2)
    )
    stretch = stretch_positions(config, asked("dynamic"), kind)
    assert stretch is not None
    model = AutoModelForCausalLM.from_config(config).eval()
    check_stretch(model, stretch, kind)
    texts = [torch.tensor([[2 + i % 38 for i in range(n)]]) for n in (24, 60, 10)]
    with torch.no_grad():
        alone = [model(input_ids=ids).logits for ids in texts]
        again = [model(input_ids=ids).logits for ids in reversed(texts)][::-1]
    for one, other in zip(alone, again, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("method", METHODS)
def test_rollouts_and_scores_go_beyond_the_old_limit(tmp_path: Path, method: str) -> None:
    path = folder(tmp_path)
    plain = backbone(path)
    with plain.acting_as(BASE), pytest.raises(LoopError, match="context of 16"):
        generate(plain, [Request(Prompt(LONG))], max_new_tokens=8, seed=0)
    made = backbone(path, asked(method))
    with made.acting_as(BASE):
        rollouts = generate(made, [Request(Prompt(LONG[:10])), Request(Prompt(LONG))], max_new_tokens=100, seed=0)
        assert [len(r.ids) for r in rollouts] == [54, 44]  # 64 is the new end of each
        scored = reply_logprobs(made, as_prompts([LONG[:10]]), [rollouts[0].ids], batch_tokens=64)[0]
        assert all(math.isfinite(x) for x in scored)
        with pytest.raises(LoopError, match="context of 64"):
            reply_logprobs(made, as_prompts([LONG]), [(*rollouts[0].ids, 3)], batch_tokens=64)


def test_a_role_belongs_to_the_stretched_base(tmp_path: Path) -> None:
    path = folder(tmp_path)
    made = backbone(path, asked("yarn"))
    made.roles.add("policy")
    save_role(made, "policy", tmp_path / "role")
    load_role(backbone(path, asked("yarn")), "policy", tmp_path / "role")
    with pytest.raises(RunFolderError, match=r"trained on llama \(yarn x4\) .*, not on llama \(weights"):
        load_role(backbone(path), "policy", tmp_path / "role")
    with pytest.raises(RunFolderError, match=r"not on llama \(linear x4\)"):
        load_role(backbone(path, asked("linear")), "policy", tmp_path / "role")


# -- attention ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["auto", "sdpa", "eager"])
@pytest.mark.parametrize("method", ["none", "yarn"])
def test_grouped_queries_stay_grouped_in_the_cache(tmp_path: Path, method: str, attention: str) -> None:
    model = loaded(folder(tmp_path), asked(method, 1.0 if method == "none" else 4.0, attention)).model
    assert model.config._attn_implementation == ("sdpa" if attention == "auto" else attention)  # type: ignore[union-attr]
    with torch.no_grad():
        cache = cache_of(model(input_ids=torch.arange(2, 12)[None], use_cache=True))
    for layer in cache.layers:
        assert layer.keys.shape == layer.values.shape == (1, 2, 10, 8)  # 2 of the 4 heads have keys
    assert sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values)) == 2 * 2 * (2 * 10 * 8) * 4


def test_attention_implementations_agree(tmp_path: Path) -> None:
    path, ids = folder(tmp_path), torch.arange(2, 40)[None]
    eager, sdpa = (loaded(path, asked("yarn", 4.0, a)).model(input_ids=ids).logits for a in ("eager", "sdpa"))
    torch.testing.assert_close(eager, sdpa, rtol=0, atol=1e-4)


def test_flash_attention_where_it_cannot_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match=r"CUDA device only \(device cpu, fp32\); use sdpa or auto"):
        loaded(folder(tmp_path), asked("none", 1.0, "flash_attention_2"))
    cuda = torch.device("cuda")
    with pytest.raises(ModelError, match="bf16 or fp16 only"):
        load.pick_attention("flash_attention_2", cuda, "fp32")
    monkeypatch.setattr(load, "is_flash_attn_2_available", lambda: False)
    with pytest.raises(ModelError, match=r"flash-attn .* not installed"):
        load.pick_attention("flash_attention_2", cuda, "bf16")
    monkeypatch.setattr(load, "is_flash_attn_2_available", lambda: True)
    assert load.pick_attention("flash_attention_2", cuda, "bf16") == "flash_attention_2"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="flash attention needs a CUDA device")
def test_flash_attention_agrees_with_sdpa(tmp_path: Path) -> None:
    pytest.importorskip("flash_attn", reason="the package flash-attn is not installed")
    path, ids = folder(tmp_path), torch.arange(2, 40, device="cuda")[None]
    flash, sdpa = (
        load_model(str(path), device="cuda", precision="bf16", context=asked("yarn", 4.0, a))
        .model(input_ids=ids)
        .logits.float()
        for a in ("flash_attention_2", "sdpa")
    )
    torch.testing.assert_close(flash, sdpa, rtol=0, atol=0.05 * float(sdpa.abs().max()))


# -- configuration ------------------------------------------------------------------------------------------------------


def test_a_factor_needs_a_method() -> None:
    with pytest.raises(ConfigError, match="rope_factor 4 needs a rope_scaling"):
        load_config(None, {}, ["backbone.context.rope_factor=4"])
    with pytest.raises(ConfigError, match=r"context\.rope_factor"):
        load_config(None, {}, ["backbone.context.rope_scaling=yarn", "backbone.context.rope_factor=0.5"])
    assert load_config(None, {}, ["backbone.context.rope_scaling=none"]).backbone.context == ContextConfig()
    assert load_config(
        None, {}, ["backbone.context.rope_scaling=yarn", "backbone.context.rope_factor=4"]
    ).backbone.context == asked("yarn")
