"""The default embedder: pooled and whitened hidden states of the model that is in memory. It needs no second model.

The layer and the pooling are chosen without labels: two views of each text, with different words dropped, must recognise each
other among those of other texts (`selection`). Then the vectors are centred and whitened on texts of the domain.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from random import Random

import numpy as np

from selfeval.backbone.adapters import BASE
from selfeval.backbone.roles import Backbone
from selfeval.config import BackboneEmbedderConfig
from selfeval.errors import ConfigError
from selfeval.quality.embeddings.protocol import Vectors, unit_rows
from selfeval.quality.embeddings.selection import drop_words, evenly_spaced, view_agreement
from selfeval.quality.embeddings.states import Pool, layer_count, pooled_states, token_rows
from selfeval.quality.embeddings.whitening import Whitening, fit_whitening
from selfeval.store import fingerprint

__all__ = ["BackboneEmbedder", "agreement_of_pools", "corpus_name", "model_name", "select_pool"]


class BackboneEmbedder:
    """Embeds texts by the hidden states of a role of the backbone.

    A text that is longer than the model's context is cut at its end.

    Args:
        backbone: the model.
        pool: layer and pooling.
        whitening: map of the pooled states.
        corpus: identifier of the texts that the whitening was fitted to; part of the name.
        role: role that acts. Default: the base.
        batch_tokens: maximum tokens of a pass, padding included. Default: 16,384.
    """

    def __init__(
        self,
        backbone: Backbone,
        pool: Pool,
        whitening: Whitening,
        corpus: str,
        *,
        role: str = BASE,
        batch_tokens: int = 16_384,
    ) -> None:
        self.backbone, self.pool, self.whitening = backbone, pool, whitening
        self.role, self.batch_tokens = role, batch_tokens
        self._name = f"backbone-{model_name(backbone, role)}-{pool}-{corpus}"

    @classmethod
    def fit(
        cls,
        backbone: Backbone,
        texts: Sequence[str],
        settings: BackboneEmbedderConfig | None = None,
        *,
        role: str = BASE,
        batch_tokens: int = 16_384,
    ) -> BackboneEmbedder:
        """Choose the layer and the pooling, if they are not given, and fit the whitening.

        Args:
            backbone: the model.
            texts: texts of the domain, such as the seeds; duplicates and blank ones are ignored. With fewer than 2, vectors are
                neither centred nor whitened.
            settings: Optional. Default: chosen layer and pooling, at most 256 dimensions.
            role: role that acts. Default: the base.
            batch_tokens: maximum tokens of a pass, padding included. Default: 16,384.

        Raises:
            ConfigError: the model has no such layer.
        """
        settings = settings or BackboneEmbedderConfig()
        pool = select_pool(backbone, texts, settings, role=role, batch_tokens=batch_tokens)
        corpus = evenly_spaced(texts, settings.fit_texts)
        pooled_ND = _pooled(backbone, role, corpus, [pool], batch_tokens)[pool]
        whitening = fit_whitening(pooled_ND, settings.dimensions)
        return cls(backbone, pool, whitening, corpus_name(texts, settings), role=role, batch_tokens=batch_tokens)

    @property
    def name(self) -> str:
        """Identifier of the weights, the layer, the pooling and the texts of the whitening."""
        return self._name

    def embed(self, texts: Sequence[str]) -> Vectors:
        """Return `[N, D]` whitened vectors of length 1; a blank text has a row of zeros.

        Equal texts are embedded once. The order of the texts changes the last bits only.

        Raises:
            MemoryLimitError: a single text does not fit in memory.
        """
        distinct = [text for text in dict.fromkeys(texts) if text.strip()]
        pooled_ND = _pooled(self.backbone, self.role, distinct, [self.pool], self.batch_tokens)[self.pool]
        vectors_ND = unit_rows(self.whitening.apply(pooled_ND))
        rows = {text: row for row, text in enumerate(distinct)}
        found = np.zeros((len(texts), vectors_ND.shape[1]), np.float32)
        for number, text in enumerate(texts):
            if text in rows:
                found[number] = vectors_ND[rows[text]]
        return found


def select_pool(
    backbone: Backbone,
    texts: Sequence[str],
    settings: BackboneEmbedderConfig,
    *,
    role: str = BASE,
    batch_tokens: int = 16_384,
) -> Pool:
    """Choose the layer and the pooling with the highest agreement of views; the middle layer and the mean below 2 texts.

    Args:
        backbone, texts, role, batch_tokens: see `BackboneEmbedder.fit`.
        settings: the layer and the pooling, if they are given.

    Raises:
        ConfigError: the model has no such layer.
    """
    count = layer_count(backbone)
    if settings.layer != "auto" and settings.layer > count:
        raise ConfigError(
            f"embeddings.backbone.layer = {settings.layer}, but this model has layers 1 to {count}; choose one of these"
        )
    layers = range(1, count + 1) if settings.layer == "auto" else [settings.layer]
    pools = [Pool(n, p) for n in layers for p in ("mean", "last") if settings.pooling in ("auto", p)]
    chosen = evenly_spaced(texts, settings.select_texts)
    if len(pools) == 1 or len(chosen) < 2:
        return (
            pools[0]
            if len(pools) == 1
            else Pool(layers[len(layers) // 2], "mean" if settings.pooling == "auto" else settings.pooling)
        )
    agreement = agreement_of_pools(backbone, chosen, pools, role=role, batch_tokens=batch_tokens)
    return max(pools, key=lambda pool: agreement[pool])


def agreement_of_pools(
    backbone: Backbone, texts: Sequence[str], pools: Sequence[Pool], *, role: str = BASE, batch_tokens: int = 16_384
) -> dict[Pool, float]:
    """Return the agreement of two views of each text under each layer and pooling, after whitening on both views.

    Args:
        texts: distinct texts that are not blank.
        pools: layers and poolings.
    """
    random = Random(0)
    views = [drop_words(text, random) for _ in range(2) for text in texts]
    pooled, half = _pooled(backbone, role, views, pools, batch_tokens), len(texts)
    found = {}
    for pool in pools:
        vectors_ND = unit_rows(fit_whitening(pooled[pool]).apply(pooled[pool]))
        found[pool] = view_agreement(vectors_ND[:half], vectors_ND[half:])
    return found


def _pooled(
    backbone: Backbone, role: str, texts: Sequence[str], pools: Sequence[Pool], batch_tokens: int
) -> dict[Pool, Vectors]:
    """Return the pooled states of texts; zeros for one without tokens."""
    rows = token_rows(backbone, texts)
    read = [number for number, row in enumerate(rows) if row]
    pooled = pooled_states(backbone, role, [rows[number] for number in read], pools, batch_tokens)
    if len(read) == len(rows) and rows:
        return pooled
    return {pool: _scattered(vectors, read, len(rows), backbone.loaded.hidden_size) for pool, vectors in pooled.items()}


def _scattered(vectors: Vectors, places: Sequence[int], count: int, width: int) -> Vectors:
    found = np.zeros((count, vectors.shape[1] if places else width), np.float32)
    found[list(places)] = vectors if places else 0
    return found


def corpus_name(texts: Sequence[str], settings: BackboneEmbedderConfig) -> str:
    """Return an identifier of the texts that the whitening is fitted to, and of its dimensions."""
    return fingerprint([evenly_spaced(texts, settings.fit_texts), settings.dimensions])[:8]


def model_name(backbone: Backbone, role: str) -> str:
    """Return an identifier of the weights of a role: that of the base, and a hash of the adapter."""
    base = backbone.fingerprint[:8]
    adapter = {} if role == BASE else backbone.roles.adapter(role)
    if not adapter:
        return base
    found = hashlib.sha256()
    for name, parameter in sorted(adapter.items()):
        found.update(name.encode())
        found.update(parameter.detach().float().cpu().contiguous().numpy().tobytes())
    return f"{base}-{role}-{found.hexdigest()[:8]}"
