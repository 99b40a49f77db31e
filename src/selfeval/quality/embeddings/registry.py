"""The embedder of a configuration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from selfeval.backbone.adapters import BASE
from selfeval.backbone.roles import Backbone
from selfeval.config import (
    BackboneEmbedderConfig,
    EmbeddingEndpointConfig,
    EmbeddingsConfig,
    RunConfig,
    SentenceTransformersConfig,
    StaticEmbedderConfig,
)
from selfeval.errors import ConfigError
from selfeval.quality.embeddings.cache import CachedEmbedder
from selfeval.quality.embeddings.protocol import Embedder

__all__ = ["check_embedder", "embedder_of"]


def check_embedder(config: EmbeddingsConfig) -> None:
    """Check, without a model or a request, that the packages and the required settings of the embedder are there.

    Args:
        config: the section `[embeddings]`.

    Raises:
        ConfigError: a setting of the embedder is missing.
        MissingPackageError: a package of the embedder is not installed.
    """
    settings = config.settings
    if isinstance(settings, StaticEmbedderConfig):
        from selfeval.quality.embeddings.static import check_static

        check_static(settings)
    elif isinstance(settings, SentenceTransformersConfig):
        from selfeval.quality.embeddings.sentence_transformers import check_sentence_transformers

        check_sentence_transformers(settings)
    elif isinstance(settings, EmbeddingEndpointConfig):
        from selfeval.quality.embeddings.endpoint import check_embedding_server

        check_embedding_server(settings)


def embedder_of(
    config: RunConfig,
    backbone: Backbone | None,
    texts: Sequence[str],
    *,
    role: str = BASE,
    folder: Path | None = None,
    note: Callable[[str], None] = lambda message: None,
) -> Embedder:
    """Return the embedder that `[embeddings]` chooses.

    Args:
        config: configuration of the run.
        backbone: the model of the run; only the embedder `backbone` uses it.
        texts: texts of the domain, such as the seeds. The whitening of `backbone` and the word vectors of `static` are fitted
            to them, so other texts give another embedder with another name.
        role: role that acts, of the embedder `backbone`. Default: the base.
        folder: Optional. Folder in which vectors and fitted parts are kept, such as `RUN/embeddings` (`cache.EMBEDDINGS`).
            Default: not kept.
        note: Optional. Receives a message if a file in the folder is damaged.

    Raises:
        ConfigError: a setting of the embedder is missing, or the backbone is.
        MissingPackageError: a package of the embedder is not installed.
        ModelError: the model of sentence-transformers cannot be loaded.
    """
    settings = config.embeddings.settings
    embedder: Embedder
    if isinstance(settings, BackboneEmbedderConfig):
        embedder = _of_backbone(config, settings, backbone, texts, role, folder, note)
    elif isinstance(settings, StaticEmbedderConfig):
        from selfeval.quality.embeddings.static import StaticEmbedder

        embedder = StaticEmbedder(texts, settings, seed=config.seed)
    elif isinstance(settings, SentenceTransformersConfig):
        from selfeval.quality.embeddings.sentence_transformers import SentenceTransformersEmbedder

        embedder = SentenceTransformersEmbedder(settings)
    elif isinstance(settings, EmbeddingEndpointConfig):
        from selfeval.quality.embeddings.endpoint import EndpointEmbedder

        embedder = EndpointEmbedder(settings, None if folder is None else folder / "spent", note)
    else:
        raise TypeError(f"no embedder has settings of {type(settings).__name__}")
    if folder is None:
        return embedder
    if isinstance(settings, EmbeddingEndpointConfig):
        # Vectors that are paid for are written after each round of requests.
        return CachedEmbedder(embedder, folder, note, group=settings.batch_size * settings.in_flight)
    return CachedEmbedder(embedder, folder, note)


def _of_backbone(
    config: RunConfig,
    settings: BackboneEmbedderConfig,
    backbone: Backbone | None,
    texts: Sequence[str],
    role: str,
    folder: Path | None,
    note: Callable[[str], None],
) -> Embedder:
    from selfeval.quality.embeddings.backbone import BackboneEmbedder
    from selfeval.quality.embeddings.fitted import fit_or_read

    if backbone is None:
        raise ConfigError(
            'embeddings.embedder = "backbone" needs the model of the run, which is not loaded here; use another embedder, such '
            'as "static"'
        )
    most = config.backbone.batch_tokens
    if folder is None:
        return BackboneEmbedder.fit(backbone, texts, settings, role=role, batch_tokens=most)
    return fit_or_read(folder / "fitted", backbone, texts, settings, role=role, batch_tokens=most, note=note)
