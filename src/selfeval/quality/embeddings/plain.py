"""The embedder for distances to a domain: pooled hidden states that are neither centred nor whitened.

A whitening that is fitted to the domain hides a text from elsewhere. It stretches the directions in which the texts of the
domain differ until these are as far from each other as from anything else. See docs/concepts/questions.md.
"""

from __future__ import annotations

import numpy as np

from selfeval.backbone.adapters import BASE
from selfeval.backbone.roles import Backbone
from selfeval.quality.embeddings.backbone import BackboneEmbedder
from selfeval.quality.embeddings.states import Pool, layer_count
from selfeval.quality.embeddings.whitening import Whitening

__all__ = ["plain_embedder"]


def plain_embedder(backbone: Backbone, role: str = BASE, *, batch_tokens: int = 16_384) -> BackboneEmbedder:
    """Return the embedder of the mean states of the middle layer, x / ||x||.

    Args:
        backbone: the model.
        role: role that acts. Default: the base.
        batch_tokens: maximum tokens of a pass, padding included. Default: 16,384.
    """
    width = backbone.loaded.hidden_size
    unchanged = Whitening(np.zeros(width), np.zeros((0, width)), np.zeros(0), rest=1.0)
    pool = Pool(max(1, layer_count(backbone) // 2), "mean")
    return BackboneEmbedder(backbone, pool, unchanged, "plain", role=role, batch_tokens=batch_tokens)
