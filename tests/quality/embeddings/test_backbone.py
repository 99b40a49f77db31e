"""The embedder of the backbone: order, batches, context, roles, and the choice of a layer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import selfeval
from selfeval.backbone.adapters import BASE
from selfeval.backbone.budget import MemoryBudget
from selfeval.backbone.meters import CpuMeter
from selfeval.backbone.roles import Backbone
from selfeval.config import BackboneConfig, BackboneEmbedderConfig
from selfeval.errors import ConfigError
from selfeval.quality.embeddings.backbone import BackboneEmbedder, select_pool
from selfeval.quality.embeddings.states import Pool, pooled_states, token_rows
from tiny_models import backbone, scramble

TEXTS = [
    "Tom has 3 apples. How many are left?",
    "Anna buys 12 pens and loses 4. How many pens does she have?",
    "小明有三个苹果，吃了一个，还剩几个？",
    "A train travels 60 km in one hour. How far does it travel in 3 hours?",
    "Tom has 3 apples.",
]
BOTH = BackboneEmbedderConfig(layer=1, pooling="mean")


@pytest.fixture(scope="module")
def tiny() -> Backbone:
    return backbone("llama", vocabulary=384)


@pytest.fixture(scope="module")
def embedder(tiny: Backbone) -> BackboneEmbedder:
    return BackboneEmbedder.fit(tiny, TEXTS, BOTH)


def test_order_and_batches_change_nothing(embedder: BackboneEmbedder, tiny: Backbone) -> None:
    whole = embedder.embed(TEXTS)
    assert np.linalg.norm(whole, axis=1) == pytest.approx(np.ones(5), abs=1e-5)
    assert embedder.embed(TEXTS[::-1])[::-1] == pytest.approx(whole, abs=1e-5)
    alone = BackboneEmbedder(tiny, embedder.pool, embedder.whitening, "same", batch_tokens=1)
    assert alone.embed(TEXTS) == pytest.approx(whole, abs=1e-5)


def test_blank_texts_are_zero_and_equal_texts_equal(embedder: BackboneEmbedder) -> None:
    found = embedder.embed(["", TEXTS[0], " \n", TEXTS[0]])
    assert not found[[0, 2]].any()
    assert (found[1] == found[3]).all()
    assert embedder.embed([]).shape == (0, found.shape[1])


def test_pooled_states_are_those_of_a_plain_pass(tiny: Backbone) -> None:
    rows = token_rows(tiny, TEXTS)
    pools = [Pool(1, "mean"), Pool(1, "last"), Pool(2, "mean")]
    found = pooled_states(tiny, BASE, rows, pools, 4096)
    with torch.no_grad(), tiny.acting_as(BASE):
        for number, row in enumerate(rows):
            # The states before the layers, after layer 1, and after layer 2 with the final norm.
            states = tiny.model(input_ids=torch.tensor([row]), output_hidden_states=True).hidden_states
            for pool in pools:
                units = torch.nn.functional.normalize(states[pool.layer][0], dim=-1)
                expected = units[-1] if pool.pooling == "last" else units.mean(0)
                assert found[pool][number] == pytest.approx(expected.numpy(), abs=1e-5)


def test_a_text_longer_than_the_context_is_cut() -> None:
    short = backbone("llama", vocabulary=384, max_position_embeddings=16)
    embedder = BackboneEmbedder.fit(short, TEXTS, BOTH)
    assert len(token_rows(short, ["a b c " * 100])[0]) == 16
    first, second = embedder.embed(["a b c " * 100, "a b c " * 200])
    assert first == pytest.approx(second, abs=1e-6)


def test_roles_have_other_vectors_and_names() -> None:
    trained = backbone("llama", vocabulary=384)
    trained.roles.add("policy")
    before = BackboneEmbedder.fit(trained, TEXTS, BOTH, role="policy")
    scramble(trained, "policy")
    policy = BackboneEmbedder.fit(trained, TEXTS, BOTH, role="policy")
    base = BackboneEmbedder.fit(trained, TEXTS, BOTH)
    assert len({before.name, policy.name, base.name}) == 3
    assert np.abs(policy.embed(TEXTS) - base.embed(TEXTS)).max() > 0.01


def test_other_texts_of_the_whitening_are_another_name(tiny: Backbone, embedder: BackboneEmbedder) -> None:
    assert BackboneEmbedder.fit(tiny, TEXTS, BOTH).name == embedder.name
    assert BackboneEmbedder.fit(tiny, TEXTS[:3], BOTH).name != embedder.name


def test_a_missing_layer_is_named(tiny: Backbone) -> None:
    with pytest.raises(ConfigError, match="layer = 9, but this model has layers 1 to 2"):
        BackboneEmbedder.fit(tiny, TEXTS, BackboneEmbedderConfig(layer=9))


def test_fixed_settings_limit_the_choice(tiny: Backbone) -> None:
    assert select_pool(tiny, TEXTS, BackboneEmbedderConfig(pooling="last")).pooling == "last"
    assert select_pool(tiny, TEXTS, BackboneEmbedderConfig(layer=2)).layer == 2
    assert select_pool(tiny, [], BackboneEmbedderConfig()) == Pool(2, "mean")


def test_passes_stay_within_the_limit_of_tokens(tiny: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    hidden = tiny.hidden
    monkeypatch.setattr(tiny, "hidden", lambda ids, mask: seen.append(ids.shape) or hidden(ids, mask))
    rows = token_rows(tiny, TEXTS * 4)
    pooled_states(tiny, BASE, rows, [Pool(1, "mean")], 64)
    longest = max(map(len, rows))
    assert sum(rows for rows, _ in seen) == 20
    assert all(rows == 1 or rows * width <= 64 for rows, width in seen)
    assert max(width for _, width in seen) == longest


def test_memory_that_runs_out_halves_the_pass(tiny: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    embedder = BackboneEmbedder.fit(tiny, TEXTS, BOTH)
    expected = embedder.embed(TEXTS)
    hidden = tiny.hidden

    def scarce(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        if len(ids) > 1:
            raise MemoryError
        return hidden(ids, mask)

    monkeypatch.setattr(tiny, "budget", MemoryBudget(CpuMeter()))
    monkeypatch.setattr(tiny, "hidden", scarce)
    assert embedder.embed(TEXTS) == pytest.approx(expected, abs=1e-5)


def test_the_default_model_groups_paraphrases() -> None:
    folder = Path(selfeval.__file__).parent / "lab" / "word_problems"
    loaded = Backbone.load(str(folder), BackboneConfig())
    pairs = [
        (
            "Tom has 3 apples and buys 4 more. How many apples does he have?",
            "Tom has 3 apples. He buys 4 more apples. How many now?",
        ),
        (
            "Anna has 12 pens. She loses 5. How many pens are left?",
            "Anna loses 5 of her 12 pens. How many pens does she have left?",
        ),
        ("A box holds 6 eggs. How many eggs are in 4 boxes?", "There are 4 boxes with 6 eggs each. How many eggs are there?"),
    ]
    texts = [text for pair in pairs for text in pair]
    embedder = BackboneEmbedder.fit(loaded, texts)
    vectors = embedder.embed(texts)
    similar = vectors @ vectors.T
    # The corpus has hardly any texts, so whitening alone would make all of them orthogonal, at -1 / 5.
    pairs_alike = similar[[0, 2, 4], [1, 3, 5]]
    others = similar[np.triu_indices(6, 1)].sum() - pairs_alike.sum()
    assert pairs_alike.mean() > others / 12 + 0.2
    assert pairs_alike.min() > others / 12
