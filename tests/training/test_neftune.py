from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import tiny_models
from selfeval.backbone.adapters import BASE
from selfeval.training.neftune import embedding_noise, neftune_noise


def test_the_noise_is_uniform_with_the_scale_of_the_paper() -> None:
    noise = neftune_noise(5.0, "seed")(0, 100, 400)
    largest = 5.0 / math.sqrt(100 * 400)
    assert noise.abs().max().item() <= largest
    # 40,000 draws: the mean of u is within 5 standard errors (1/sqrt(3)/200) of 0, that of u^2 within 5 (0.298/200) of 1/3.
    unit = noise / largest
    assert unit.mean().item() == pytest.approx(0.0, abs=0.015)
    assert unit.square().mean().item() == pytest.approx(1 / 3, abs=0.0075)


def test_the_noise_depends_on_the_seed_and_the_document() -> None:
    first = neftune_noise(5.0, "a")
    assert torch.equal(first(3, 4, 8), neftune_noise(5.0, "a")(3, 4, 8))
    assert not torch.equal(first(3, 4, 8), first(2, 4, 8))
    assert not torch.equal(first(3, 4, 8), neftune_noise(5.0, "b")(3, 4, 8))


def test_each_document_gets_its_own_noise_and_padding_none() -> None:
    backbone = tiny_models.backbone()
    embedding, ids = backbone.model.get_input_embeddings(), torch.tensor([[3, 4, 5, 6], [7, 0, 0, 0]])
    seen: list[Tensor] = []

    def ones(number: int, length: int, width: int) -> Tensor:
        return torch.full((length, width), 1.0 + number)

    plain = embedding(ids)
    with embedding_noise(backbone, [[(0, 1), (1, 3)], [(2, 1)]], ones):
        seen.append(embedding(ids) - plain)
    expected = torch.tensor([[1.0, 2.0, 2.0, 2.0], [3.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(seen[0], expected[..., None].expand_as(plain))
    assert torch.equal(embedding(ids), plain), "none outside of the block"
    with backbone.acting_as(BASE), embedding_noise(backbone, [[(0, 4)], [(1, 1)]], None):
        assert torch.equal(embedding(ids), plain)
