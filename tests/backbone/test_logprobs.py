"""Compare with the plain version: all logits at once, log-softmax, gather, autograd."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from accelerate import cpu_offload
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig

import tiny_models
from selfeval.backbone import logprobs as module
from selfeval.backbone.adapters import BASE
from selfeval.backbone.load import LoadedModel
from selfeval.backbone.logprobs import Measure, TokenLogprobs, token_logprobs
from selfeval.backbone.output_head import OutputHead
from selfeval.backbone.roles import Backbone
from selfeval.backbone.sequences import pad_sequences, reply_hidden
from selfeval.config import LoraConfig
from selfeval.errors import ConfigError
from token_prompts import as_prompts

MEASURES: tuple[Measure, ...] = ("logprobs", "entropy", "kl")
PROMPTS = [(5, 9, 2), (7,), (30, 31, 32, 33, 34, 35), (11, 12)]
REPLIES = [(17, 30, 1), (8, 8, 8, 8, 21, 4, 1), (6,), (13, 1)]


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


class HeadOnly:
    """The part of a backbone that `token_logprobs` uses: its output head."""

    def __init__(self, head: OutputHead) -> None:
        self.output_head = head


class Wrapped(nn.Module):
    """A head whose weight cannot be read: like a quantised one, it can only be called."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner, self.out_features = inner, inner.out_features

    def forward(self, hidden: Tensor) -> Tensor:
        return self.inner(hidden).clone()


def head(
    vocabulary: int = 97,
    width: int = 16,
    *,
    bias: bool = False,
    scale: float = 1.0,
    cap: float | None = None,
    wrapped: bool = False,
    dtype: torch.dtype = torch.float32,
) -> HeadOnly:
    generator = torch.Generator().manual_seed(3)
    linear = nn.Linear(width, vocabulary, bias=bias)
    linear.weight.data.copy_(torch.randn(vocabulary, width, generator=generator) * 0.5)
    if bias:
        linear.bias.data.copy_(torch.randn(vocabulary, generator=generator))
    linear.requires_grad_(False).to(dtype)
    return HeadOnly(OutputHead(Wrapped(linear) if wrapped else linear, vocabulary, scale, cap))


def inputs(rows: int = 3, width: int = 16, vocabulary: int = 97, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Hidden states of two roles, targets, and a mask with gaps, `rows` by 7."""
    generator = torch.Generator().manual_seed(5)
    hidden, other = (torch.randn(rows, 7, width, generator=generator).to(dtype) for _ in range(2))
    targets = torch.randint(vocabulary, (rows, 7), generator=generator)
    targets[0, 0], targets[0, 1] = 0, vocabulary - 1
    mask = torch.rand(rows, 7, generator=generator) > 0.3
    mask[0, :2] = True
    return hidden.requires_grad_(), other, targets, mask


def plain(backbone: HeadOnly, hidden: Tensor, other: Tensor, targets: Tensor, mask: Tensor, temperature: float) -> list[Tensor]:
    """Compute the reference in fp64, with the head's formula written out."""
    made = backbone.output_head
    linear = made.module.inner if isinstance(made.module, Wrapped) else made.module
    assert isinstance(linear, nn.Linear)

    def distribution(states: Tensor) -> Tensor:
        logits = states.double() @ linear.weight.double().T + (0.0 if linear.bias is None else linear.bias.double())
        logits = logits * made.scale
        if made.cap is not None:
            logits = made.cap * torch.tanh(logits / made.cap)
        return torch.log_softmax(logits / temperature, dim=-1)

    p, q = distribution(hidden), distribution(other)
    found = [p.gather(-1, targets[..., None])[..., 0], -(p.exp() * p).sum(-1), (p.exp() * (p - q)).sum(-1)]
    return [torch.where(mask, values, 0.0) for values in found]


def present(found: TokenLogprobs) -> list[Tensor]:
    return [values for values in found if values is not None]


# A budget of some thousand bytes makes tiles of a few rows by a few columns; 97 and 21 are divided by neither.
@pytest.mark.parametrize("budget", [3000, 20000, None])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.5, None), (1.0, 3.0), (2.0, 3.0)])
@pytest.mark.parametrize("wrapped", [False, True], ids=["linear", "called"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_values_and_gradients_equal_the_plain_version(
    bias: bool, wrapped: bool, scale: float, cap: float | None, temperature: float, budget: int | None
) -> None:
    backbone = head(bias=bias, scale=scale, cap=cap, wrapped=wrapped)
    hidden, other, targets, mask = inputs()
    expected = plain(backbone, hidden, other, targets, mask, temperature)
    found = token_logprobs(
        backbone, hidden, targets, mask, temperature=temperature, entropy=True, other_BRD=other, gradient=MEASURES,
        chunk_bytes=budget,
    )  # fmt: skip
    weights = torch.randn(3, 3, 7, generator=torch.Generator().manual_seed(9))
    for ours, theirs, weight in zip(present(found), expected, weights, strict=True):
        close(ours, theirs.float())
        (gradient,) = torch.autograd.grad((ours * weight).sum(), hidden, retain_graph=True)
        (should_be,) = torch.autograd.grad((theirs * weight).sum(), hidden, retain_graph=True)
        assert should_be.abs().max() > 0.1
        close(gradient, should_be)
    (together,) = torch.autograd.grad(sum((v * w).sum() for v, w in zip(present(found), weights, strict=True)), hidden)
    (should_be,) = torch.autograd.grad(sum((v * w).sum() for v, w in zip(expected, weights, strict=True)), hidden)
    close(together, should_be)


@given(
    count=st.integers(1, 30), vocabulary=st.integers(2, 60), budget=st.integers(1, 30000), wrapped=st.booleans(),
    seed=st.integers(0, 1000),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_any_tiling_gives_the_same(count: int, vocabulary: int, budget: int, wrapped: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    backbone = head(vocabulary, 8, cap=4.0, wrapped=wrapped)
    hidden = torch.randn(1, count, 8, generator=generator).requires_grad_()
    other = torch.randn(1, count, 8, generator=generator)
    targets = torch.randint(vocabulary, (1, count), generator=generator)
    mask = torch.ones(1, count, dtype=torch.bool)
    found = present(
        token_logprobs(
            backbone, hidden, targets, mask, entropy=True, other_BRD=other, gradient=MEASURES, chunk_bytes=budget
        )
    )  # fmt: skip
    expected = plain(backbone, hidden, other, targets, mask, 1.0)
    for ours, theirs in zip(found, expected, strict=True):
        close(ours, theirs.float())
    (gradient,) = torch.autograd.grad(sum(v.sum() for v in found), hidden)
    close(gradient, torch.autograd.grad(sum(v.sum() for v in expected), hidden)[0])


@pytest.mark.parametrize("asked", MEASURES)
def test_each_output_alone_has_its_own_gradient(asked: Measure) -> None:
    backbone = head()
    hidden, other, targets, mask = inputs()
    found = token_logprobs(
        backbone, hidden, targets, mask, entropy=True, other_BRD=other, gradient=(asked,), chunk_bytes=3000
    )  # fmt: skip
    for name, ours, theirs in zip(MEASURES, present(found), plain(backbone, hidden, other, targets, mask, 1.0), strict=True):
        assert ours.requires_grad == (name == asked)
        if name == asked:
            close(*(torch.autograd.grad((v * torch.arange(7)).sum() / 7, hidden)[0] for v in (ours, theirs)))


def test_what_is_not_asked_is_not_computed() -> None:
    backbone, (hidden, _, targets, mask) = head(), inputs()
    found = token_logprobs(backbone, hidden, targets, mask)
    assert found.entropy is None
    assert found.kl is None
    for gradient in (("entropy",), ("logprobs", "kl")):
        with pytest.raises(ValueError, match="are computed"):
            token_logprobs(backbone, hidden, targets, mask, gradient=gradient)
    with pytest.raises(ValueError, match="must be > 0"):
        token_logprobs(backbone, hidden, targets, mask, temperature=0.0)


def test_the_other_role_is_held_fixed_and_equal_roles_are_at_distance_zero() -> None:
    backbone, (hidden, other, targets, mask) = head(), inputs()
    other.requires_grad_()
    found = token_logprobs(backbone, hidden, targets, mask, other_BRD=other, gradient=("kl",))
    assert found.kl is not None
    found.kl.sum().backward()
    assert other.grad is None
    same = token_logprobs(backbone, hidden, targets, mask, other_BRD=hidden, gradient=("kl",), chunk_bytes=3000)
    assert same.kl is not None
    close(same.kl, torch.zeros_like(same.kl), 1e-6)
    close(torch.autograd.grad(same.kl.sum(), hidden)[0], torch.zeros_like(hidden), 1e-6)


def test_masked_tokens_give_zero_and_get_no_gradient_whatever_their_target() -> None:
    backbone, (hidden, other, targets, mask) = head(), inputs()
    spoiled = torch.where(mask, targets, -100)
    found = present(token_logprobs(backbone, hidden, spoiled, mask, entropy=True, other_BRD=other, gradient=MEASURES))
    sum(v.sum() for v in found).backward()
    assert hidden.grad is not None
    for values in (*found, hidden.grad.abs().sum(-1)):
        assert bool((values[~mask] == 0).all())
        assert bool((values[mask] != 0).all())


def test_nothing_to_count_gives_zeros() -> None:
    backbone, (hidden, other, targets, mask) = head(), inputs()
    found = token_logprobs(backbone, hidden, targets, torch.zeros_like(mask), entropy=True, other_BRD=other)
    for values in present(found):
        assert values.tolist() == torch.zeros(mask.shape).tolist()
    found.logprobs.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.abs().max() == 0


def test_extreme_logits_stay_finite() -> None:
    """Logits of some hundreds: without the running maximum every exponential would overflow."""
    backbone, (hidden, other, targets, mask) = head(bias=True), inputs()
    large, larger = (300.0 * hidden).detach().requires_grad_(), 300.0 * other
    found = present(
        token_logprobs(backbone, large, targets, mask, entropy=True, other_BRD=larger, gradient=MEASURES, chunk_bytes=3000)
    )
    for ours, theirs in zip(found, plain(backbone, large, larger, targets, mask, 1.0), strict=True):
        torch.testing.assert_close(ours, theirs.float(), rtol=1e-5, atol=1e-4)  # fp32 logits of 1000 are exact to 6e-5
    (gradient,) = torch.autograd.grad(sum(v.sum() for v in found), large)
    assert bool(gradient.isfinite().all())


# -- 16-bit heads -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_fp32_on_a_16_bit_head(dtype: torch.dtype) -> None:
    """40000 equal tokens: a 16-bit sum stops growing long before it."""
    backbone = head(40000, 16, dtype=dtype)
    backbone.output_head.module.weight.data.zero_()  # type: ignore[union-attr, operator]
    hidden, _, targets, mask = inputs(dtype=dtype)
    found = token_logprobs(backbone, hidden, targets, mask, entropy=True)
    assert found.entropy is not None
    close(found.logprobs[mask], torch.full((int(mask.sum()),), -math.log(40000)))
    close(found.entropy[mask], torch.full((int(mask.sum()),), math.log(40000)), 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wrapped", [False, True], ids=["linear", "called"])
def test_gradients_of_confident_tokens_survive_a_16_bit_head(wrapped: bool, dtype: torch.dtype) -> None:
    """A token of probability 0.999 has a small gradient; not less exact than by autograd on that head."""
    backbone = head(dtype=dtype, wrapped=wrapped)
    linear = backbone.output_head.module.inner if wrapped else backbone.output_head.module  # type: ignore[union-attr]
    assert isinstance(linear, nn.Linear)
    _, _, targets, mask = inputs()
    sure = linear.weight[targets].float() * 4.0  # points at its target
    hidden = sure.to(dtype).requires_grad_()
    other = (sure * 0.5).to(dtype)
    found = present(
        token_logprobs(backbone, hidden, targets, mask, entropy=True, other_BRD=other, gradient=MEASURES, chunk_bytes=3000)
    )
    exact = plain(backbone, hidden, other, targets, mask, 1.0)
    assert 0.9 < exact[0][mask].exp().median() < 0.99999
    logp, logq = (torch.log_softmax(backbone.output_head.logits(states), -1) for states in (hidden, other))
    same_head = [
        logp.gather(-1, targets[..., None])[..., 0],
        -(logp.exp() * logp).sum(-1),
        (logp.exp() * (logp - logq)).sum(-1),
    ]

    def error(values: Tensor, should_be: Tensor) -> float:
        gradient, right = (torch.autograd.grad(v[mask].sum(), hidden, retain_graph=True)[0][mask] for v in (values, should_be))
        return ((gradient - right).float().norm(dim=-1) / right.float().norm(dim=-1)).median().item()

    for ours, theirs, should_be in zip(found, same_head, exact, strict=True):
        assert error(ours, should_be) < 1.2 * error(theirs, should_be) + 1e-3


# -- through a real backbone --------------------------------------------------------------------------------------------


def trained(family: str) -> Backbone:
    backbone = tiny_models.backbone(family)
    for seed, role in enumerate(("policy", "reference")):
        backbone.roles.add(role, trainable=role == "policy")
        tiny_models.scramble(backbone, role, seed=seed)
    return backbone


def reference_distribution(backbone: Backbone, prompt: Sequence[int], reply: Sequence[int], temperature: float) -> Tensor:
    """One sequence, one plain pass of the whole model with the acting role."""
    logits = backbone.model(input_ids=torch.tensor([[*prompt, *reply]])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits / temperature, dim=-1)


def check_against_plain_passes(backbone: Backbone, temperature: float, budget: int | None) -> None:
    """Values, and gradients to the LoRA weights of the policy, for all outputs."""
    batch = pad_sequences(backbone, as_prompts(PROMPTS), REPLIES)
    parameters = list(backbone.roles.parameters("policy").values())
    with torch.no_grad(), backbone.acting_as("reference"):
        other = reply_hidden(backbone, batch)
        q = [reference_distribution(backbone, p, r, temperature) for p, r in zip(PROMPTS, REPLIES, strict=True)]
    with backbone.acting_as("policy"):
        found = present(
            token_logprobs(
                backbone, reply_hidden(backbone, batch), batch.reply_BR, batch.mask_BR, temperature=temperature, entropy=True,
                other_BRD=other, gradient=MEASURES, chunk_bytes=budget,
            )
        )  # fmt: skip
        p = [reference_distribution(backbone, p, r, temperature) for p, r in zip(PROMPTS, REPLIES, strict=True)]
    expected = [
        [d.gather(1, torch.tensor(r)[:, None])[:, 0] for d, r in zip(p, REPLIES, strict=True)],
        [-(d.exp() * d).sum(-1) for d in p],
        [(d.exp() * (d - e)).sum(-1) for d, e in zip(p, q, strict=True)],
    ]
    for ours, theirs in zip(found, expected, strict=True):
        close(ours[batch.mask_BR], torch.cat(theirs))
        gradients = torch.autograd.grad(ours.square().sum(), parameters, retain_graph=True)
        should_be = torch.autograd.grad(torch.cat(theirs).square().sum(), parameters, retain_graph=True)
        largest = max(g.abs().max().item() for g in should_be)
        assert largest > 0.01
        for mine, other_ in zip(gradients, should_be, strict=True):
            close(mine, other_, 1e-5 * max(1.0, largest))


@pytest.mark.parametrize("budget", [3000, None])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_a_role_gets_the_gradients_of_plain_passes(family: str, temperature: float, budget: int | None) -> None:
    check_against_plain_passes(trained(family), temperature, budget)


@pytest.mark.parametrize("kind", ["granite", "cohere", "gemma2"])
def test_families_that_scale_or_cap_their_logits(kind: str) -> None:
    shape = {
        "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1,
        "initializer_range": 0.25,
    }  # fmt: skip
    kinds = {
        "granite": lambda: GraniteConfig(**shape, logits_scaling=4.0),
        "cohere": lambda: CohereConfig(**shape, logit_scale=0.25),
        "gemma2": lambda: Gemma2Config(**shape, final_logit_softcapping=3.0, query_pre_attn_scalar=8),
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kinds[kind](), attn_implementation="eager").eval()
    loaded = LoadedModel(model, tiny_models.words_tokenizer(), torch.device("cpu"), "fp32", (1,), 0)
    backbone = Backbone(loaded, LoraConfig(rank=4), kind)
    for seed, role in enumerate(("policy", "reference")):
        backbone.roles.add(role, trainable=role == "policy")
        tiny_models.scramble(backbone, role, seed=seed)
    check_against_plain_passes(backbone, 0.8, 3000)


def test_an_offloaded_head_is_called_and_not_read() -> None:
    backbone = trained("llama")
    before, (hidden, other, targets, mask) = backbone.output_head, inputs(width=32, vocabulary=40)
    assert before.can_be_sliced
    states = {"temperature": 0.8, "entropy": True, "other_BRD": other, "gradient": MEASURES}
    expected = present(token_logprobs(backbone, hidden, targets, mask, **states))
    should_be = torch.autograd.grad(sum(v.sum() for v in expected), hidden)[0]
    cpu_offload(before.module)
    assert backbone.model.get_output_embeddings().weight.device.type == "meta"
    assert not backbone.output_head.can_be_sliced
    found = present(token_logprobs(backbone, hidden, targets, mask, **states, chunk_bytes=3000))
    for ours, theirs in zip(found, expected, strict=True):
        close(ours, theirs)
    close(torch.autograd.grad(sum(v.sum() for v in found), hidden)[0], should_be)


def test_an_adapter_on_the_output_layer_is_refused() -> None:
    """Its gradient would be lost: the head is taken to be frozen."""
    made = tiny_models.model("llama")
    loaded = LoadedModel(made, tiny_models.words_tokenizer(), torch.device("cpu"), "fp32", (1,), 0)
    backbone = Backbone(loaded, LoraConfig(targets=("q_proj", "lm_head")), "tiny")
    with pytest.raises(ConfigError, match="output layer"):
        backbone.roles.add("policy")


def test_log_probs_of_the_bare_base_need_no_gradient() -> None:
    backbone = trained("llama")
    batch = pad_sequences(backbone, as_prompts(PROMPTS), REPLIES)
    with torch.no_grad(), backbone.acting_as(BASE):
        found = token_logprobs(backbone, reply_hidden(backbone, batch), batch.reply_BR, batch.mask_BR)
        for row, (prompt, reply) in enumerate(zip(PROMPTS, REPLIES, strict=True)):
            expected = reference_distribution(backbone, prompt, reply, 1.0)
            close(found.logprobs[row, : len(reply)], expected.gather(1, torch.tensor(reply)[:, None])[:, 0])
    assert not found.logprobs.requires_grad


# -- memory -------------------------------------------------------------------------------------------------------------


def peak_bytes(run: object) -> int:
    """Highest sum of live tensor bytes that the allocator saw while `run` ran, above what lived before."""
    assert callable(run)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        run()
    events = watched.profiler.kineto_results.events()  # type: ignore[union-attr]
    live = highest = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        live += event.nbytes()
        highest = max(highest, live)
    return highest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("gradient", "cap", "wrapped"),
    [
        (MEASURES, 3.0, False),
        (MEASURES, 3.0, True),
        (("logprobs",), None, False),
        (("logprobs",), None, True),
        ((), None, False),
    ],
)
def test_memory_stays_within_the_budget(
    gradient: tuple[Measure, ...], cap: float | None, wrapped: bool, dtype: torch.dtype
) -> None:
    """All logits would be 12.8 MB in fp32 (400 tokens, vocabulary 8000); the budget is 1 MiB, whatever is asked."""
    budget = 1 << 20
    backbone = head(8000, 32, bias=True, cap=cap, wrapped=wrapped, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(4, 100, 32, generator=generator).to(dtype).requires_grad_(bool(gradient))
    other = torch.randn(4, 100, 32, generator=generator).to(dtype)
    targets = torch.randint(8000, (4, 100), generator=generator)
    mask = torch.ones(4, 100, dtype=torch.bool)

    def run() -> None:
        found = present(
            token_logprobs(
                backbone, hidden, targets, mask, temperature=0.9, entropy=True, other_BRD=other, gradient=gradient,
                chunk_bytes=budget,
            )
        )  # fmt: skip
        if gradient:
            sum(v.sum() for v in found if v.requires_grad).backward()

    outside = (len(gradient) + 2) * hidden.numel() * hidden.element_size() + 40 * mask.numel() * 8
    assert peak_bytes(run) <= budget + outside


def test_the_memory_test_sees_logits_that_are_held() -> None:
    backbone, (hidden, _, targets, mask) = head(8000, 16), inputs(rows=100, vocabulary=8000)

    def run() -> None:
        torch.log_softmax(backbone.output_head.logits(hidden), -1).gather(-1, targets[..., None])[mask].sum().backward()

    assert peak_bytes(run) >= 2 * 700 * 8000 * 4


def test_the_default_budget_holds_at_a_vocabulary_of_128k() -> None:
    """Tile and sums as planned for 16k tokens of width 4096 in bf16, for every output and its gradient."""
    with torch.device("meta"):
        linear = nn.Linear(4096, 131072, dtype=torch.bfloat16)
        hidden, tokens = torch.empty(16384, 4096, dtype=torch.bfloat16), torch.empty(16384, dtype=torch.long)
    made = OutputHead(linear, 131072, 1.0, 30.0)
    job = module._Job(made, tokens, tokens, 1.0, MEASURES, MEASURES, 64 << 20)
    rows, columns = module._tile(job, hidden)
    assert rows * columns * module._bytes_per_logit(job, torch.bfloat16) <= 64 << 20
    assert rows >= 1
