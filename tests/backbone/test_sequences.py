from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig

import tiny_models
from scarce import no_memory
from selfeval.backbone import sequences
from selfeval.backbone.load import LoadedModel
from selfeval.backbone.roles import BASE, Backbone
from selfeval.backbone.sequences import final_scores, pad_sequences, reply_hidden, reply_logprobs, token_logprobs
from selfeval.config import LoraConfig

PROMPTS = [(5, 9, 2), (7,), (30, 31, 32, 33, 34, 35), (11, 12)]
REPLIES = [(17, 30, 1), (8, 8, 8, 8, 21, 4, 1), (6,), (13, 1)]


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def reference_logprobs(backbone: Backbone, prompt: tuple[int, ...], reply: tuple[int, ...], temperature: float = 1.0) -> Tensor:
    """One sequence, one plain pass of the whole model with the acting role: log-softmax and gather."""
    logits = backbone.model(input_ids=torch.tensor([[*prompt, *reply]])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits / temperature, dim=-1).gather(1, torch.tensor(reply)[:, None])[:, 0]


def reference_entropy(backbone: Backbone, prompt: tuple[int, ...], reply: tuple[int, ...], temperature: float) -> Tensor:
    logits = backbone.model(input_ids=torch.tensor([[*prompt, *reply]])).logits[0, len(prompt) - 1 : -1]
    return torch.distributions.Categorical(logits=logits / temperature).entropy()


def ours(backbone: Backbone, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    batch = pad_sequences(backbone, PROMPTS, REPLIES)
    logprobs, entropy = token_logprobs(
        backbone, reply_hidden(backbone, batch), batch.reply_BR, batch.mask_BR, temperature=temperature
    )
    return logprobs, entropy, batch.mask_BR


def trained(family: str) -> Backbone:
    backbone = tiny_models.backbone(family)
    backbone.add_role("policy")
    tiny_models.scramble(backbone, "policy")
    return backbone


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_logprobs_and_entropies_equal_a_plain_pass_of_each_sequence_alone(family: str, temperature: float) -> None:
    backbone = trained(family)
    with torch.no_grad(), backbone.acting_as("policy"):
        logprobs, entropy, mask = ours(backbone, temperature)
        for row, (prompt, reply) in enumerate(zip(PROMPTS, REPLIES, strict=True)):
            close(logprobs[row, : len(reply)], reference_logprobs(backbone, prompt, reply, temperature))
            close(entropy[row, : len(reply)], reference_entropy(backbone, prompt, reply, temperature))
    assert mask.sum() == sum(len(r) for r in REPLIES)
    assert bool((logprobs[~mask] == 0).all())
    assert bool((entropy[~mask] == 0).all())


@pytest.mark.parametrize("chunk", [None, 40 * 3])  # the second: three tokens at a time, through checkpointing
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_gradients_equal_those_of_a_plain_pass(family: str, chunk: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if chunk is not None:
        monkeypatch.setattr(sequences, "_CHUNK_ELEMENTS", chunk)
    backbone = trained(family)
    weights = [0.3, -1.0, 2.0, 0.7]
    parameters = backbone.parameters("policy")
    with backbone.acting_as("policy"):
        logprobs, entropy, _ = ours(backbone)
        loss = sum(w * (logprobs[i].sum() + 0.1 * entropy[i].sum()) for i, w in enumerate(weights))
        found = torch.autograd.grad(loss, list(parameters.values()))
        expected_loss = sum(
            w * (reference_logprobs(backbone, p, r).sum() + 0.1 * reference_entropy(backbone, p, r, 1.0).sum())
            for w, p, r in zip(weights, PROMPTS, REPLIES, strict=True)
        )
        expected = torch.autograd.grad(expected_loss, list(parameters.values()))
    close(loss.detach(), expected_loss.detach())
    largest = max(g.abs().max().item() for g in expected)
    assert largest > 0.1
    for ours_, theirs in zip(found, expected, strict=True):
        close(ours_, theirs, 1e-5 * max(1.0, largest))


def test_masked_tokens_get_zero_and_no_gradient() -> None:
    backbone = trained("llama")
    batch = pad_sequences(backbone, PROMPTS[:1], REPLIES[:1])
    mask = torch.tensor([[True, False, True]])
    with backbone.acting_as("policy"):
        hidden = reply_hidden(backbone, batch).detach().requires_grad_()
        logprobs, entropy = token_logprobs(backbone, hidden, batch.reply_BR, mask)
        (logprobs.sum() + entropy.sum()).backward()
    assert logprobs[0, 1].item() == entropy[0, 1].item() == 0.0
    assert hidden.grad is not None
    assert hidden.grad[0, 1].abs().max() == 0
    assert hidden.grad[0, 0].abs().max() > 0


def test_nothing_to_count_gives_zeros() -> None:
    backbone = trained("llama")
    batch = pad_sequences(backbone, PROMPTS[:1], REPLIES[:1])
    with torch.no_grad(), backbone.acting_as("policy"):
        logprobs, _ = token_logprobs(
            backbone, reply_hidden(backbone, batch), batch.reply_BR, torch.zeros(1, 3, dtype=torch.bool)
        )
    assert logprobs.tolist() == [[0.0, 0.0, 0.0]]


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
    backbone = Backbone(
        LoadedModel(model, tiny_models.words_tokenizer(), torch.device("cpu"), "fp32", (1,), 0), LoraConfig(), kind
    )
    with torch.no_grad(), backbone.acting_as(BASE):
        logprobs, _, _ = ours(backbone)
        for row, (prompt, reply) in enumerate(zip(PROMPTS, REPLIES, strict=True)):
            close(logprobs[row, : len(reply)], reference_logprobs(backbone, prompt, reply))


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_padding_changes_nothing_and_the_score_reads_the_last_real_token(family: str) -> None:
    backbone = tiny_models.backbone(family)
    backbone.add_role("evaluator-0", head=True)
    tiny_models.scramble(backbone, "evaluator-0")
    with torch.no_grad(), backbone.acting_as("evaluator-0"):
        together = final_scores(backbone, "evaluator-0", pad_sequences(backbone, PROMPTS, REPLIES))
        for row, (prompt, reply) in enumerate(zip(PROMPTS, REPLIES, strict=True)):
            alone = final_scores(backbone, "evaluator-0", pad_sequences(backbone, [prompt], [reply]))
            close(together[row : row + 1], alone)
            states = backbone.model.base_model(input_ids=torch.tensor([[*prompt, *reply]])).last_hidden_state[0]
            head = backbone.heads["evaluator-0"]
            scores = states @ head.weight[0] + head.bias
            close(alone[0], scores[-1])
            assert (scores[-1] - scores[-2]).abs() > 1e-3  # another position would have been seen


def test_pad_sequences_lays_out_prompt_reply_padding() -> None:
    batch = pad_sequences(tiny_models.backbone(), [(5, 6), (7,)], [(8,), (9, 10, 11)])
    assert batch.ids_BT.tolist() == [[5, 6, 8, 0], [7, 9, 10, 11]]
    assert batch.attention_BT.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch.prompt_lengths_B.tolist() == [2, 1]
    assert batch.reply_BR.tolist() == [[8, 0, 0], [9, 10, 11]]
    assert batch.mask_BR.tolist() == [[True, False, False], [True, True, True]]


def test_reply_logprobs_are_the_same_when_memory_is_short() -> None:
    backbone = tiny_models.backbone()
    prompts, replies = PROMPTS * 4, REPLIES * 4
    with backbone.acting_as(BASE):
        expected = reply_logprobs(backbone, prompts, replies, batch_tokens=4096)
        with no_memory(backbone, tokens=30) as failed:
            found = reply_logprobs(backbone, prompts, replies, batch_tokens=4096)
    assert len(failed) == 2
    assert [len(row) for row in found] == [len(reply) for reply in replies]
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, abs=1e-6)
    assert {(e.phase.value, e.kind.value) for e in backbone.budget.take_events()} == {("score", "out_of_memory")}
