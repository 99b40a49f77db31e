"""The fitted part of the backbone's embedder in the run folder: a resumed command does not fit it again, to other last bits."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from selfeval.backbone.adapters import BASE
from selfeval.backbone.roles import Backbone
from selfeval.config import BackboneEmbedderConfig
from selfeval.errors import StorageError
from selfeval.quality.embeddings.backbone import BackboneEmbedder, corpus_name, model_name
from selfeval.quality.embeddings.states import Pool
from selfeval.quality.embeddings.whitening import Whitening
from selfeval.store import fingerprint, writing

__all__ = ["fit_or_read"]


def fit_or_read(
    folder: Path,
    backbone: Backbone,
    texts: Sequence[str],
    settings: BackboneEmbedderConfig,
    *,
    role: str = BASE,
    batch_tokens: int = 16_384,
    note: Callable[[str], None] = lambda message: None,
) -> BackboneEmbedder:
    """Return the embedder that an earlier command fitted to the same texts, or fit it and keep it.

    Args:
        folder: folder of the fitted parts.
        backbone, texts, settings, role, batch_tokens: see `BackboneEmbedder.fit`.
        note: receives a message if the file is damaged or cannot be written.
    """
    # Without `batch_tokens`: it changes the last bits only, as the batch sizes after running out of memory do.
    key = fingerprint([model_name(backbone, role), settings.model_dump(mode="json"), list(dict.fromkeys(texts))])
    path = folder / f"{key}.safetensors"
    if path.is_file():
        try:
            pool, whitening = _read(path)
        except (OSError, ValueError) as error:
            note(f"{path} is damaged ({error}); the embedder is fitted again")
        else:
            corpus = corpus_name(texts, settings)
            return BackboneEmbedder(backbone, pool, whitening, corpus, role=role, batch_tokens=batch_tokens)
    embedder = BackboneEmbedder.fit(backbone, texts, settings, role=role, batch_tokens=batch_tokens)
    try:
        _write(path, embedder.pool, embedder.whitening)
    except StorageError as error:
        note(f"the fitted embedder is not kept: {error}")
    return embedder


def _write(path: Path, pool: Pool, whitening: Whitening) -> None:
    from safetensors.numpy import save_file

    arrays = {
        "mean": whitening.mean_D,
        "components": np.ascontiguousarray(whitening.components_KD),
        "scales": whitening.scales_K,
        "rest": np.array([] if whitening.rest is None else [whitening.rest], np.float64),
    }
    facts = {"layer": str(pool.layer), "pooling": pool.pooling}
    with writing(path) as temporary:
        save_file(arrays, temporary, {**facts, "hash": _digest(arrays, facts)})


def _read(path: Path) -> tuple[Pool, Whitening]:
    """Read a file.

    Raises:
        ValueError: it is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            facts = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in ("mean", "components", "scales", "rest")}
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    if facts.pop("hash", "") != _digest(arrays, facts):
        raise ValueError("its content does not match its hash")
    rest = float(arrays["rest"][0]) if arrays["rest"].size else None
    pool = Pool(int(facts["layer"]), "last" if facts["pooling"] == "last" else "mean")
    return pool, Whitening(arrays["mean"], arrays["components"], arrays["scales"], rest)


def _digest(arrays: Mapping[str, Any], facts: Mapping[str, str]) -> str:
    found = hashlib.sha256(repr(sorted(facts.items())).encode())
    for name, values in sorted(arrays.items()):
        found.update(f"{name} {values.shape}".encode())
        found.update(values.tobytes())
    return found.hexdigest()
