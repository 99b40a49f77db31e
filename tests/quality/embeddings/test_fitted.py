"""The fitted embedder in the run folder."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from selfeval.config import BackboneEmbedderConfig
from selfeval.quality.embeddings.backbone import BackboneEmbedder
from selfeval.quality.embeddings.fitted import fit_or_read
from tiny_models import backbone

TEXTS = [f"Tom has {n} apples and {n + 2} pens." for n in range(6)]


@pytest.mark.parametrize("dimensions", [4, None])
def test_a_fitted_embedder_is_read_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dimensions: int | None) -> None:
    model, settings = backbone("llama", vocabulary=384), BackboneEmbedderConfig(dimensions=dimensions)
    first = fit_or_read(tmp_path, model, TEXTS, settings)
    expected = first.embed(TEXTS)
    monkeypatch.delattr(BackboneEmbedder, "fit")
    again = fit_or_read(tmp_path, model, TEXTS, settings)
    assert (again.name, again.pool) == (first.name, first.pool)
    assert (again.embed(TEXTS) == expected).all()
    with pytest.raises(AttributeError):  # other texts are another embedder
        fit_or_read(tmp_path, model, TEXTS[:5], settings)


def test_the_size_of_a_pass_changes_the_last_bits_only(tmp_path: Path) -> None:
    draws, words = random.Random(0), TEXTS[0].split() + [f"word{number}" for number in range(9)]
    texts = [" ".join(draws.choices(words, k=draws.randrange(3, 40))) for _ in range(40)]
    model, settings = backbone("llama", vocabulary=384, max_position_embeddings=1024), BackboneEmbedderConfig()
    first = fit_or_read(tmp_path, model, texts, settings, batch_tokens=16)
    for size in (512, 16_384):
        other = BackboneEmbedder.fit(model, texts, settings, batch_tokens=size)
        assert (other.pool, other.name) == (first.pool, first.name)
        assert other.embed(texts) == pytest.approx(first.embed(texts), abs=2e-6)
        # So the fitted part of another size is read.
        again = fit_or_read(tmp_path, model, texts, settings, batch_tokens=size)
        assert (again.whitening.mean_D == first.whitening.mean_D).all()
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("cut", [3, -1])
def test_a_damaged_file_is_fitted_again(tmp_path: Path, cut: int) -> None:
    model, settings = backbone("llama", vocabulary=384), BackboneEmbedderConfig()
    expected = fit_or_read(tmp_path, model, TEXTS, settings).embed(TEXTS)
    (path,) = tmp_path.glob("*.safetensors")
    data = path.read_bytes()
    path.write_bytes(data[:cut] if cut > 0 else data[:-1] + bytes([data[-1] ^ 1]))
    told: list[str] = []
    assert fit_or_read(tmp_path, model, TEXTS, settings, note=told.append).embed(TEXTS) == pytest.approx(expected, abs=1e-5)
    assert len(told) == 1
    assert "is damaged" in told[0]
    fit_or_read(tmp_path, model, TEXTS, settings, note=told.append)
    assert len(told) == 1
