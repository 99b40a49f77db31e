from __future__ import annotations

import pytest
import torch
from torch import Tensor

import tiny_models
from scarce import no_memory
from selfeval.backbone.adapters import BASE
from selfeval.backbone.sequences import final_scores, pad_sequences, reply_logprobs
from token_prompts import as_prompts

PROMPTS = [(5, 9, 2), (7,), (30, 31, 32, 33, 34, 35), (11, 12)]
REPLIES = [(17, 30, 1), (8, 8, 8, 8, 21, 4, 1), (6,), (13, 1)]


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_padding_changes_nothing_and_the_score_reads_the_last_real_token(family: str) -> None:
    backbone = tiny_models.backbone(family)
    backbone.roles.add("evaluator-0", head=True)
    tiny_models.scramble(backbone, "evaluator-0")
    with torch.no_grad(), backbone.acting_as("evaluator-0"):
        together = final_scores(backbone, "evaluator-0", pad_sequences(backbone, as_prompts(PROMPTS), REPLIES))
        for row, (prompt, reply) in enumerate(zip(PROMPTS, REPLIES, strict=True)):
            alone = final_scores(backbone, "evaluator-0", pad_sequences(backbone, as_prompts([prompt]), [reply]))
            close(together[row : row + 1], alone)
            states = backbone.model.base_model(input_ids=torch.tensor([[*prompt, *reply]])).last_hidden_state[0]
            head = backbone.roles.heads["evaluator-0"]
            scores = states @ head.weight[0] + head.bias
            close(alone[0], scores[-1])
            assert (scores[-1] - scores[-2]).abs() > 1e-3  # another position would have been seen


def test_pad_sequences_lays_out_prompt_reply_padding() -> None:
    batch = pad_sequences(tiny_models.backbone(), as_prompts([(5, 6), (7,)]), [(8,), (9, 10, 11)])
    assert batch.ids_BT.tolist() == [[5, 6, 8, 0], [7, 9, 10, 11]]
    assert batch.attention_BT.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch.prompt_lengths_B.tolist() == [2, 1]
    assert batch.reply_BR.tolist() == [[8, 0, 0], [9, 10, 11]]
    assert batch.mask_BR.tolist() == [[True, False, False], [True, True, True]]


def test_each_reply_may_have_its_temperature() -> None:
    """Two of them the same, against log-softmax of logits / t, one reply at a time."""
    backbone, temperatures = tiny_models.backbone(), [0.5, 1.0, 2.0, 0.5]
    with torch.no_grad(), backbone.acting_as(BASE):
        found = reply_logprobs(backbone, as_prompts(PROMPTS), REPLIES, batch_tokens=4096, temperature=temperatures)
        for prompt, reply, temperature, row in zip(PROMPTS, REPLIES, temperatures, found, strict=True):
            logits = backbone.model(input_ids=torch.tensor([[*prompt, *reply]])).logits[0, len(prompt) - 1 : -1]
            expected = (logits / temperature).log_softmax(-1).gather(1, torch.tensor(reply)[:, None])[:, 0]
            assert row == pytest.approx(expected.tolist(), abs=1e-5)


def test_reply_logprobs_are_the_same_when_memory_is_short() -> None:
    backbone = tiny_models.backbone()
    prompts, replies = PROMPTS * 4, REPLIES * 4
    with backbone.acting_as(BASE):
        expected = reply_logprobs(backbone, as_prompts(prompts), replies, batch_tokens=4096)
        with no_memory(backbone, tokens=30) as failed:
            found = reply_logprobs(backbone, as_prompts(prompts), replies, batch_tokens=4096)
    assert len(failed) == 2
    assert [len(row) for row in found] == [len(reply) for reply in replies]
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    assert {(e.phase.value, e.kind.value) for e in backbone.budget.take_events()} == {("score", "out_of_memory")}
