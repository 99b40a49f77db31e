from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, MistralConfig

import tiny_models
from chi_square import chi_square_p
from scarce import no_memory
from selfeval.backbone.adapters import BASE
from selfeval.backbone.load import LoadedModel, load_model
from selfeval.backbone.logprobs import token_logprobs
from selfeval.backbone.roles import Backbone
from selfeval.backbone.sequences import pad_sequences, reply_hidden, reply_logprobs
from selfeval.config import LoraConfig
from selfeval.errors import LoopError, MemoryLimitError, ModelError, RoleError
from selfeval.prompt import Image, Prompt
from selfeval.rollout.beams import beam_search
from selfeval.rollout.engine import by_length, generate
from selfeval.rollout.requests import Request, Rollout
from selfeval.rollout.rows import Rows, _distinct
from token_prompts import as_prompts

STORIES = Path(__file__).resolve().parents[2].parent / "shared" / "models" / "stories260K"
PROMPTS = [(5, 9, 2), (7,), (30, 31, 32, 33, 34, 35), (11, 12), (5, 9, 2, 14)]
LIMIT = 12
SHARED_SHAPE = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "pad_token_id", "bos_token_id", "eos_token_id", "initializer_range",
)  # fmt: skip


def sample(backbone: Backbone, requests: list[Request], *, role: str = BASE, seed: int = 0, **options: Any) -> list[Rollout]:
    with backbone.acting_as(role):
        return generate(backbone, requests, max_new_tokens=options.pop("limit", LIMIT), seed=seed, **options)


def trained(family: str, vocabulary: int = 40, **changes: Any) -> Backbone:
    backbone = tiny_models.backbone(family, vocabulary, **changes)
    backbone.roles.add("policy")
    tiny_models.scramble(backbone, "policy", size=0.1)
    return backbone


# -- limits -------------------------------------------------------------------------------------------------------------


def test_a_request_may_have_a_lower_limit_and_keeps_the_tokens_of_its_stream() -> None:
    backbone = trained("llama")
    backbone.loaded.eos_ids = ()
    limits = [3, None, 1, 40, 12]
    whole = sample(backbone, [Request(p) for p in as_prompts(PROMPTS)], role="policy")
    cut = sample(backbone, [Request(p, limit=n) for p, n in zip(as_prompts(PROMPTS), limits, strict=True)], role="policy")
    # 40 is above the limit of the call, which is 12.
    assert [len(rollout.ids) for rollout in cut] == [3, LIMIT, 1, LIMIT, LIMIT]
    assert [a.ids for a in cut] == [b.ids[: len(a.ids)] for a, b in zip(cut, whole, strict=True)]


# -- greedy -------------------------------------------------------------------------------------------------------------


def theirs(backbone: Backbone, prompt: tuple[int, ...], limit: int) -> tuple[int, ...]:
    """Transformers' greedy search on one prompt alone."""
    out = backbone.model.generate(
        input_ids=torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        max_new_tokens=limit,
        pad_token_id=backbone.loaded.pad_id,
        eos_token_id=list(backbone.loaded.eos_ids) or None,
    )
    return tuple(out[0, len(prompt) :].tolist())


@pytest.mark.parametrize("role", [BASE, "policy"])
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_greedy_equals_transformers_token_for_token(family: str, role: str) -> None:
    # Three end tokens, to make rows end at different steps and leave the batch.
    backbone = trained(family, eos=(1, 3, 20, 21, 22, 23, 24, 25))
    rollouts = sample(backbone, [Request(Prompt(p), temperature=0.0) for p in PROMPTS], role=role, limit=24)
    with backbone.acting_as(role):
        expected = [theirs(backbone, p, 24) for p in PROMPTS]
    assert [r.ids for r in rollouts] == expected
    assert len({len(r.ids) for r in rollouts}) > 1


def test_greedy_equals_transformers_on_a_trained_model() -> None:
    if not STORIES.is_dir():
        pytest.skip("the small story model is not on this machine")
    backbone = Backbone(load_model(str(STORIES), device="cpu", precision="fp32"), LoraConfig(), "stories260K")
    tokenizer = backbone.loaded.tokenizer
    texts = ("Once upon a time", "Lily and Ben went to", "The", "One day, a big dog saw a red ball and")
    prompts = [(1, *tokenizer.encode(t, add_special_tokens=False)) for t in texts]
    rollouts = sample(backbone, [Request(Prompt(p), temperature=0.0) for p in prompts], limit=48)
    with backbone.acting_as(BASE):
        expected = [theirs(backbone, p, 48) for p in prompts]
    assert [r.ids for r in rollouts] == expected
    assert "little" in tokenizer.decode(list(rollouts[0].ids))  # it did write a story


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_rows_that_share_a_prompt_equal_rows_of_their_own(family: str) -> None:
    backbone = trained(family, eos=(1, 20, 21, 22))
    alone = [sample(backbone, [Request(Prompt(p), temperature=0.0)])[0] for p in PROMPTS]
    shared = sample(backbone, [Request(Prompt(p), temperature=0.0) for p in [*PROMPTS, *PROMPTS[::-1], PROMPTS[0]]])
    for found, expected in zip(shared, [*alone, *alone[::-1], alone[0]], strict=True):
        assert (found.ids, found.finished) == (expected.ids, expected.finished)
        assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-5)


def test_batches_of_any_size_give_the_same_greedy_replies() -> None:
    backbone = trained("llama", eos=(1, 20, 21, 22))
    requests = [Request(Prompt(p), temperature=0.0) for p in PROMPTS * 2]
    finished: list[int] = []
    small = sample(backbone, requests, batch_size=3, advance=finished.append)
    assert [r.ids for r in small] == [r.ids for r in sample(backbone, requests)]
    assert sum(finished) == len(requests)


def test_requests_that_join_a_running_batch_get_the_replies_of_a_batch_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = trained("llama", eos=(1, 20, 21, 22))
    requests = [Request(Prompt(p), 1.1) for p in PROMPTS * 20]
    expected = [sample(backbone, [request], seed=3, first=i)[0] for i, request in enumerate(requests)]
    joined: list[int] = []
    join = Rows.join
    monkeypatch.setattr(Rows, "join", lambda self, rows, width: (joined.append(len(rows)), join(self, rows, width))[1])
    found = sample(backbone, requests, seed=3, batch_size=8)
    assert joined[0] == 8  # then whenever an eighth of the places is free
    assert len(joined) > 20
    assert sum(joined) == len(requests)
    assert [(r.ids, r.finished) for r in found] == [(r.ids, r.finished) for r in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


def test_prompts_are_read_in_passes_of_limited_size(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = trained("llama")
    requests = [Request(Prompt(p), 0.0) for p in PROMPTS for _ in range(3)]
    expected = sample(backbone, requests)
    seen: list[tuple[int, ...]] = []
    backbone.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    monkeypatch.setattr("selfeval.backbone.budget._PROMPT_PASS_TOKENS", {"cpu": 8})
    assert [r.ids for r in sample(backbone, requests)] == [r.ids for r in expected]
    # The longest alone; those of 4 and 3 tokens share a pass of 2 x 4, those of 2 and 1 one of 2 x 2.
    assert seen[:3] == [(1, 6), (2, 4), (2, 2)]


# -- log-probs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.5])
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_captured_logprobs_are_those_that_training_recomputes(family: str, temperature: float) -> None:
    backbone = trained(family, eos=(1, 3, 20, 21))
    prompts = [p for p in PROMPTS for _ in range(6)]
    rollouts = sample(backbone, [Request(Prompt(p), temperature) for p in prompts], role="policy", seed=3)
    with torch.no_grad(), backbone.acting_as("policy"):
        batch = pad_sequences(backbone, as_prompts(prompts), [r.ids for r in rollouts])
        hidden = reply_hidden(backbone, batch)
        now = token_logprobs(backbone, hidden, batch.reply_BR, batch.mask_BR, temperature=temperature).logprobs
    then = torch.tensor([p for r in rollouts for p in r.logprobs])
    torch.testing.assert_close(then, now[batch.mask_BR], rtol=0, atol=1e-4)
    assert len({len(r.ids) for r in rollouts}) > 1


def test_a_nucleus_does_not_change_the_logprobs_that_are_noted() -> None:
    backbone = trained("llama", eos=())
    (rollout,) = sample(backbone, [Request(Prompt((5, 9)), 0.8, top_p=0.5)], seed=1)
    ids = (5, 9, *rollout.ids)
    with backbone.acting_as(BASE):
        full = tiny_models.full_logprobs(backbone.model, ids, 0.8)
    assert rollout.logprobs == pytest.approx([full[1 + i, t].item() for i, t in enumerate(rollout.ids)], abs=1e-4)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_watched_logprobs_equal_a_full_pass_at_temperature_1(temperature: float) -> None:
    backbone = trained("qwen3", eos=(1, 20))
    watch = (3, 17, 1)
    for rollout, prompt in zip(
        sample(backbone, [Request(Prompt(p), temperature) for p in PROMPTS], watch=watch, seed=5), PROMPTS, strict=True
    ):
        with backbone.acting_as(BASE):
            full = tiny_models.full_logprobs(backbone.model, (*prompt, *rollout.ids))
        assert len(rollout.watched) == len(rollout.ids)
        for step, row in enumerate(rollout.watched):
            assert row == pytest.approx(full[len(prompt) - 1 + step, list(watch)].tolist(), abs=1e-4)
    assert sample(backbone, [Request(Prompt((5,)))])[0].watched == ()


# -- sampling -----------------------------------------------------------------------------------------------------------


def draws(backbone: Backbone, request: Request, count: int, seed: int = 0) -> torch.Tensor:
    """Return how often each pair of first and second token was drawn, `[V, V]`."""
    size = backbone.model.config.vocab_size
    rollouts = sample(backbone, [request] * count, limit=2, seed=seed, batch_size=4096)
    pairs = torch.tensor([r.ids[0] * size + r.ids[1] for r in rollouts])
    return torch.bincount(pairs, minlength=size * size).view(size, size).double()


def exact(backbone: Backbone, prompt: tuple[int, ...], temperature: float) -> torch.Tensor:
    """Return the probability of each pair of first and second token, `[V, V]`, from plain passes."""
    size = backbone.model.config.vocab_size
    with backbone.acting_as(BASE):
        first = tiny_models.full_logprobs(backbone.model, prompt, temperature)[-1]
        second = torch.stack([tiny_models.full_logprobs(backbone.model, (*prompt, t), temperature)[-1] for t in range(size)])
    return (first[:, None] + second).exp().double()


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.4])
def test_sampling_has_the_exact_distribution(temperature: float) -> None:
    backbone = tiny_models.backbone("llama", 8, eos=())
    counts = draws(backbone, Request(Prompt((5, 2, 3)), temperature), 8000)
    assert chi_square_p(counts, exact(backbone, (5, 2, 3), temperature)) > 1e-4
    # The same draws would not pass for another temperature, nor for another prompt.
    assert chi_square_p(counts, exact(backbone, (5, 2, 3), temperature * 1.15)) < 1e-6
    assert chi_square_p(counts, exact(backbone, (5, 2, 4), temperature)) < 1e-6


def test_rows_with_different_temperatures_share_a_batch() -> None:
    backbone = tiny_models.backbone("llama", 8, eos=())
    requests = [Request(Prompt((5, 2, 3)), 0.7), Request(Prompt((5, 2, 3)), 1.4), Request(Prompt((5, 2, 3)), 0.0)] * 4000
    first = torch.tensor([r.ids[0] for r in sample(backbone, requests, limit=1, batch_size=12000)])
    for offset, temperature in enumerate((0.7, 1.4)):
        counts = torch.bincount(first[offset::3], minlength=8).double()
        assert chi_square_p(counts, exact(backbone, (5, 2, 3), temperature).sum(1)) > 1e-4
        assert chi_square_p(counts, exact(backbone, (5, 2, 3), 1.0).sum(1)) < 1e-6
    assert first[2::3].unique().tolist() == [int(exact(backbone, (5, 2, 3), 1.0).sum(1).argmax())]


@pytest.mark.parametrize("top_p", [0.3, 0.6, 0.9])
def test_a_nucleus_is_never_left_and_is_filled_in_proportion(top_p: float) -> None:
    backbone = tiny_models.backbone("llama", 12, eos=())
    with backbone.acting_as(BASE):
        probabilities = tiny_models.full_logprobs(backbone.model, (5, 2, 3))[-1].exp().double()
    nucleus: list[int] = []  # the likeliest tokens, until their sum reaches top_p
    for token in probabilities.argsort(descending=True).tolist():
        nucleus.append(token)
        if probabilities[nucleus].sum() >= top_p:
            break
    assert 1 < len(nucleus) < 12 or top_p == 0.3
    # A wide row next to it: each row has its own nucleus.
    rollouts = sample(
        backbone, [Request(Prompt((5, 2, 3)), 1.0, top_p), Request(Prompt((5, 2, 3)))] * 6000, limit=1, batch_size=12000
    )
    counts = torch.bincount(torch.tensor([r.ids[0] for r in rollouts[::2]]), minlength=12).double()
    assert set(counts.nonzero()[:, 0].tolist()) == set(nucleus)
    inside = torch.zeros(12, dtype=torch.float64)
    inside[nucleus] = probabilities[nucleus]
    assert len(nucleus) == 1 or chi_square_p(counts[nucleus], inside[nucleus]) > 1e-4
    wide = torch.bincount(torch.tensor([r.ids[0] for r in rollouts[1::2]]), minlength=12).double()
    assert chi_square_p(wide, probabilities) > 1e-4


def test_the_same_seed_gives_the_same_rollouts() -> None:
    backbone = trained("llama")
    requests = [Request(Prompt(p)) for p in PROMPTS * 3]
    first = sample(backbone, requests, seed=11)
    assert sample(backbone, requests, seed=11) == first
    assert sample(backbone, requests, seed=12) != first
    torch.manual_seed(99)  # the global generator has no effect
    assert sample(backbone, requests, seed=11) == first


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_what_is_sampled_does_not_depend_on_the_rows_beside_it(family: str) -> None:
    # A long prompt among short ones: other rows, other padding. (Sums in another order differ in their last bits, and rarely
    # that is enough for another token: not here.)
    backbone = trained(family, eos=(1, 20, 21, 22))
    ways = [(0.8, 1.0), (1.3, 0.7), (0.0, 1.0), (1.0, 1.0)]
    requests = [Request(Prompt(p), *ways[i % 4]) for i, p in enumerate(PROMPTS * 20)]
    whole = sample(backbone, requests, seed=5, batch_size=64)
    for batch_size in (4, 200):
        found = sample(backbone, requests, seed=5, batch_size=batch_size)
        assert [(r.ids, r.finished) for r in found] == [(r.ids, r.finished) for r in whole], batch_size
        for one, other in zip(found, whole, strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    alike = {r.ids for r in sample(backbone, [Request(Prompt(PROMPTS[0]), 1.3)] * 30, seed=5)}
    assert len(alike) > 20  # the replies to one prompt are drawn independently


@pytest.mark.parametrize("scarcity", [{"rows": 9}, {"tokens": 20}, {"rows": 9, "written": 12}], ids=lambda s: "-".join(s))
def test_out_of_memory_changes_no_token(scarcity: dict[str, int]) -> None:
    requests = [Request(Prompt(p), 1.0 + 0.1 * (i % 3)) for i, p in enumerate(PROMPTS * 8)]
    expected = sample(trained("llama", eos=(1, 20)), requests, seed=5, watch=(3, 17))
    backbone = trained("llama", eos=(1, 20))
    finished: list[int] = []
    with no_memory(backbone, **scarcity) as failed:
        found = sample(backbone, requests, seed=5, watch=(3, 17), advance=finished.append)
    assert failed
    assert (failed[0][1] > 1) == ("tokens" in scarcity)  # at the prompts; the others in the middle of the replies
    assert [(r.ids, r.finished) for r in found] == [(r.ids, r.finished) for r in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
        assert len(one.watched) == len(other.watched)
    assert sum(finished) == len(requests)
    assert {(e.phase.value, e.kind.value) for e in backbone.budget.take_events()} == {("rollout", "out_of_memory")}


def test_a_reply_for_which_there_is_no_memory_is_an_error() -> None:
    backbone = trained("llama", eos=())
    with no_memory(backbone, rows=0), pytest.raises(MemoryLimitError, match=r"sampling one reply alone does not fit"):
        sample(backbone, [Request(Prompt(p)) for p in PROMPTS])


# -- ends ---------------------------------------------------------------------------------------------------------------


def test_the_end_is_part_of_the_reply_and_flagged() -> None:
    backbone = trained("llama", eos=(1, 20, 21, 22))
    rollouts = sample(backbone, [Request(Prompt(p)) for p in PROMPTS * 20], seed=2, limit=10)
    ended = [r for r in rollouts if r.finished]
    assert 0 < len(ended) < len(rollouts)
    for rollout in rollouts:
        ends = [i for i, token in enumerate(rollout.ids) if token in (1, 20, 21, 22)]
        assert ends == ([len(rollout.ids) - 1] if rollout.finished else [])
        assert rollout.finished or len(rollout.ids) == 10
        assert len(rollout.logprobs) == len(rollout.ids)


def test_stop_ids_end_rows_too() -> None:
    backbone = trained("llama", eos=())
    (free,) = sample(backbone, [Request(Prompt((5, 9)), 0.0)])
    stop = free.ids[4]
    cut = free.ids[: free.ids.index(stop) + 1]
    (stopped,) = sample(backbone, [Request(Prompt((5, 9)), 0.0)], stop=[stop])
    assert (stopped.ids, stopped.finished) == (cut, True)
    assert (len(free.ids), free.finished) == (LIMIT, False)


def test_a_limit_of_one_token_and_no_requests() -> None:
    backbone = trained("gpt2")
    assert [len(r.ids) for r in sample(backbone, [Request(Prompt((5, 9))), Request(Prompt((4,)))], limit=1)] == [1, 1]
    assert sample(backbone, []) == []


def test_sampling_outside_of_a_role_is_refused() -> None:
    with pytest.raises(RoleError):
        generate(trained("llama"), [Request(Prompt((5,)))], max_new_tokens=1, seed=0)


# -- limits of the model ------------------------------------------------------------------------------------------------


def test_greedy_equals_transformers_with_a_sliding_window() -> None:
    # Prompts shorter and longer than the window side by side; rows leave the batch before and after it is full.
    config = {k: v for k, v in tiny_models.tiny_config("llama", 40).to_dict().items() if k in SHARED_SHAPE}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MistralConfig(**config, sliding_window=4)).eval()
    loaded = LoadedModel(model, tiny_models.words_tokenizer(), torch.device("cpu"), "fp32", (1, 3, 20, 21, 22), 0)
    backbone = Backbone(loaded, LoraConfig(), "tiny-mistral")
    rollouts = sample(backbone, [Request(Prompt(p), temperature=0.0) for p in PROMPTS], limit=16)
    with backbone.acting_as(BASE):
        assert [r.ids for r in rollouts] == [theirs(backbone, p, 16) for p in PROMPTS]
    assert len({len(r.ids) for r in rollouts}) > 1


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_context_of_the_model_is_not_left(family: str) -> None:
    size = {"n_positions": 8} if family == "gpt2" else {"max_position_embeddings": 8}
    backbone = trained(family, eos=(), **size)
    (rollout,) = sample(backbone, [Request(Prompt((5, 9, 2, 4, 4)))], limit=50)
    assert (len(rollout.ids), rollout.finished) == (3, False)
    with pytest.raises(LoopError, match="context of 8"):
        sample(backbone, [Request(Prompt((5,) * 8))])


def test_the_output_layer_is_not_multiplied_row_by_row() -> None:
    """A view of the last position would make torch copy the output layer for every prompt (bf16 on a CPU)."""
    backbone = tiny_models.backbone(dtype=torch.bfloat16)
    seen = []
    backbone.model.get_output_embeddings().register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    sample(backbone, [Request(Prompt(prompt)) for prompt in PROMPTS], limit=2)
    assert tuple(seen[0].shape[:2]) == (len(PROMPTS), 1)
    assert all(hidden.is_contiguous() for hidden in seen)


def test_two_images_under_equal_placeholder_ids_never_share_a_prefix() -> None:
    one, other = (Prompt((5, 9), (Image(data),)) for data in (b"one", b"two"))
    plain = Prompt((5, 9))
    distinct, owners = _distinct([one, other, plain, one, other])
    assert distinct == [one, other, plain]
    assert owners == [0, 1, 2, 0, 1]
    ordered = sorted([other, plain, one, other, one], key=by_length)
    assert [ordered.count(p) for p in dict.fromkeys(ordered)] == [1, 2, 2]
    assert all(a == b for a, b in (ordered[1:3], ordered[3:]))  # equal prompts are neighbours, so they share a batch


def test_an_image_is_refused_by_every_pass_with_the_models_name() -> None:
    backbone, prompt = tiny_models.backbone("llama"), Prompt((5, 9), (Image(b"one"),))
    with backbone.acting_as(BASE):
        for refused in (
            lambda: generate(backbone, [Request(Prompt((5, 9))), Request(prompt)], max_new_tokens=1, seed=0),
            lambda: beam_search(backbone, [prompt], beams=2, max_new_tokens=1),
            lambda: reply_logprobs(backbone, [prompt], [(3,)], batch_tokens=100),
        ):
            with pytest.raises(ModelError, match="tiny-llama-0: a prompt contains an image, but models of type llama"):
                refused()
