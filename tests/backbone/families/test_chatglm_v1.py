"""Features of ChatGLM-6B alone: 2-D positions, bidirectional attention in the context, and the answer start in the cache."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

import chatglm
from selfeval.backbone.families.cache import CACHE_FIELD, cache_of, empty_cache
from selfeval.backbone.families.chatglm_v1 import (
    AnswerStart,
    ChatGLMConfig,
    ChatGLMForCausalLM,
    answer_start,
    inverse_frequencies,
    layout,
)

SOP, GMASK, MASK, PAD = 304, 301, 300, 3


@cache
def load() -> Any:
    return AutoModelForCausalLM.from_pretrained(str(chatglm.golden("chatglm1")[0]), dtype=torch.float32).eval()


@pytest.fixture(autouse=True, scope="module")
def _let_go() -> Iterator[None]:
    """A model that stays alive would be counted as a copy of the weights by the tests of the loop."""
    yield
    load.cache_clear()


def golden() -> dict[str, Tensor]:
    return chatglm.golden("chatglm1")[1]


def config(**changes: Any) -> ChatGLMConfig:
    ids = {"mask_token_id": MASK, "gmask_token_id": GMASK, "bos_token_id": SOP, "eos_token_id": 305, "pad_token_id": PAD}
    sizes = {"vocab_size": 320, "hidden_size": 32, "num_layers": 2, "num_attention_heads": 4, "inner_hidden_size": 48}
    return ChatGLMConfig(**{**ids, **sizes, **changes})


@pytest.mark.parametrize("case", ["single", "infill", "batch", "generate", "generate_batch"])
def test_positions_and_mask_follow_from_ids_and_mask(case: str) -> None:
    numbers = golden()
    ids = numbers[f"{case}.input_ids"]
    attention = numbers.get(f"{case}.attention_mask_2d", torch.ones_like(ids))
    positions, allowed = layout(answer_start(ids, attention, config()), attention, ids.shape[1])
    real = attention.bool()
    expected = ~numbers[f"{case}.attention_mask"]  # there True means hidden
    assert torch.equal(allowed.transpose(1, 2)[real], expected.transpose(1, 2)[real])
    assert torch.equal(positions.transpose(1, 2)[real], numbers[f"{case}.position_ids"].transpose(1, 2)[real])


def test_positions_of_the_published_example() -> None:
    """Hello as the published tokenizer and model have it: see position_ids in the golden cases."""
    case = chatglm.tokenizer_cases("1")
    ids = torch.tensor([case["encode"][0]["ids"]])
    positions, _ = layout(answer_start(ids, torch.ones_like(ids), ChatGLMConfig()), torch.ones_like(ids), 4)
    assert positions[0].tolist() == case["position_ids_for_你好"]


def test_which_mask_token_and_which_beginning_count() -> None:
    """[gMASK] before [MASK] whatever their order, the first of each, and the first <sop>; tokens of the answer do not."""
    rows = [[10, MASK, 11, GMASK, SOP, 12], [GMASK, 10, MASK, SOP, GMASK, SOP], [PAD, MASK, 10, MASK, SOP, GMASK]]
    attention = torch.tensor([[1] * 6, [1] * 6, [0] + [1] * 5])
    assert answer_start(torch.tensor(rows), attention, config()).tolist() == [[4, 3], [3, 0], [3, 0]]


@torch.no_grad()
def test_a_mask_inside_the_context() -> None:
    numbers = golden()
    out = load()(input_ids=numbers["infill.input_ids"])
    assert float((out.logits - numbers["infill.logits"]).abs().max()) < 5e-5


def test_rotary_frequencies_are_rounded_to_fp16() -> None:
    numbers = golden()
    assert torch.equal(inverse_frequencies(8), numbers["rotary.inv_freq"].float())
    angles = torch.arange(10)[:, None] * torch.cat([inverse_frequencies(8)] * 2)
    assert torch.allclose(angles.cos(), numbers["rotary.cos"], atol=1e-6)
    assert torch.allclose(angles.sin(), numbers["rotary.sin"], atol=1e-6)


@torch.no_grad()
def test_the_residual_scale_is_that_of_the_config() -> None:
    numbers, model = golden(), load()
    for layer in model.transformer.layers:
        layer.alpha = 56**0.5
    try:
        found = model(input_ids=numbers["single.input_ids"]).logits
    finally:
        for layer in model.transformer.layers:
            layer.alpha = 6**0.5
    # The published file with its fixed 28 layers; the golden numbers of the 28-layer folder hold both rules.
    assert float((found - numbers["single.logits_alpha28"]).abs().max()) < 5e-5
    assert {layer.alpha for layer in ChatGLMForCausalLM(config(num_layers=28)).transformer.layers} == {56**0.5}


@torch.no_grad()
def test_without_an_answer_it_is_plain_causal() -> None:
    ids = torch.tensor([[10, 11, 12, 13, 14, 15]])
    start = answer_start(ids, torch.ones_like(ids), config())
    positions, allowed = layout(start, torch.ones_like(ids), 6)
    assert positions.tolist() == [[[0, 1, 2, 3, 4, 5], [0] * 6]]
    assert torch.equal(allowed[0, 0], torch.ones(6, 6).tril().bool())
    whole = load()(input_ids=ids).logits
    out = load()(input_ids=ids[:, :2], use_cache=True)
    out = load()(input_ids=ids[:, 2:5], **{CACHE_FIELD: cache_of(out)})
    assert torch.allclose(out.logits, whole[:, 2:5], atol=5e-5)
    out = load()(input_ids=ids[:, 5:], **{CACHE_FIELD: cache_of(out)})
    assert torch.allclose(out.logits, whole[:, 5:], atol=5e-5)


@torch.no_grad()
def test_no_row_of_the_mask_is_empty() -> None:
    """A padded token before everything else may see nothing but itself, and a softmax over nothing is NaN."""
    ids = torch.tensor([[PAD, PAD, 10, 11], [10, 11, 12, 13], [PAD, PAD, GMASK, SOP]])
    attention = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 1, 1]])
    _, allowed = layout(answer_start(ids, attention, config()), attention, 4)
    assert bool(allowed.any(-1).all())
    logits = load()(input_ids=ids, attention_mask=attention).logits
    assert bool(torch.isfinite(logits).all())
    assert torch.allclose(logits[0, 2:], load()(input_ids=ids[:1, 2:]).logits[0], atol=5e-5)


@torch.no_grad()
def test_an_answer_may_come_in_pieces_and_a_context_may_not() -> None:
    numbers = golden()
    ids = numbers["single.input_ids"]
    start = int((ids[0] == SOP).nonzero()[0])
    out = load()(input_ids=ids[:, : start + 1], use_cache=True)
    out = load()(input_ids=ids[:, start + 1 :], **{CACHE_FIELD: cache_of(out)})
    assert float((out.logits - numbers["single.logits"][:, start + 1 :]).abs().max()) < 5e-5
    out = load()(input_ids=ids[:, : start - 1], use_cache=True)
    with pytest.raises(ValueError, match="in one forward pass"):
        load()(input_ids=ids[:, start - 1 :], **{CACHE_FIELD: cache_of(out)})


@torch.no_grad()
def test_the_cache_carries_its_memory_with_its_rows() -> None:
    numbers = golden()
    ids, attention = numbers["batch.input_ids"], numbers["batch.attention_mask_2d"]
    length = int(numbers["decode_batch.prefill_len"])
    filled = cache_of(load()(input_ids=ids[:, :length], attention_mask=attention[:, :length], use_cache=True))
    starts = AnswerStart.of(filled)
    assert starts is not None
    assert starts.start_B2[0].tolist() != starts.start_B2[1].tolist()
    rows = torch.tensor([1, 0, 1])
    filled.batch_select_indices(rows)
    out = load()(
        input_ids=ids[rows, length : length + 1], attention_mask=attention[rows, : length + 1], **{CACHE_FIELD: filled}
    )
    expected = numbers["decode_batch.step_logits"][rows, 0]
    assert float((out.logits[:, 0] - expected).abs().max()) < 5e-5
    emptied = empty_cache(load().config)  # `reset` empties layers in newer releases of transformers only
    starts.put_in(emptied)
    again = load()(input_ids=ids[:1], attention_mask=attention[:1], **{CACHE_FIELD: emptied}).logits
    real = attention[:1].bool()
    assert float((again - numbers["batch.logits"][:1])[real].abs().max()) < 5e-5
    assert sum(isinstance(layer, AnswerStart) for layer in emptied.layers) == 1


def test_half_precision_rounds_its_angles_as_published() -> None:
    """fp16(t) * fp16(frequency) rounded to fp16 is what the published model turns by; fp32 angles are not rounded."""
    from selfeval.backbone.families.chatglm_v1 import _rotary

    positions = torch.tensor([[[1500], [3]]])
    frequencies = inverse_frequencies(32)
    exact = 1500 * frequencies.double()
    published = (torch.tensor(1500.0).half() * frequencies.half()).double()
    assert float((exact - published).abs().max()) > 0.2
    half, _ = _rotary(positions, 32, torch.float16)
    assert torch.allclose(half[0, 0, 0, 0, :16].double(), published.cos(), atol=1e-3)
    full, _ = _rotary(positions, 32, torch.float32)
    assert torch.allclose(full[0, 0, 0, 0, :16].double(), exact.cos(), atol=1e-3)


def test_what_it_refuses() -> None:
    ids = torch.tensor([[10, 11, SOP, 12]])
    with pytest.raises(ValueError, match=r"\[gMASK\] nor \[MASK\]"):
        load()(input_ids=ids)
    with pytest.raises(ValueError, match="3 dimensions"):
        load()(input_ids=ids, attention_mask=torch.ones(1, 4, 4))
    foreign = DynamicCache()
    foreign.update(torch.zeros(1, 4, 2, 16), torch.zeros(1, 4, 2, 16), 0)
    with pytest.raises(ValueError, match="not created by ChatGLM"):
        load()(input_ids=ids[:, :1], **{CACHE_FIELD: foreign})


def test_pickles_are_not_opened_by_the_model_itself(tmp_path: Path) -> None:
    """The file names of a hub id are not known in advance."""
    torch.save(ChatGLMForCausalLM(config()).state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        ChatGLMForCausalLM.from_pretrained(str(tmp_path), config=config())


def test_the_loss_of_labels() -> None:
    model = ChatGLMForCausalLM(config()).eval()
    ids = torch.tensor([[10, 11, GMASK, SOP, 12, 13, 14]])
    labels = torch.where(torch.arange(7) > 3, ids, -100)
    out = model(input_ids=ids, labels=labels)
    expected = torch.nn.functional.cross_entropy(out.logits[0, 3:6], ids[0, 4:])
    assert torch.allclose(out.loss, expected)
