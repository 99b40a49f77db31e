"""The embedders: the registry of their sections of settings, and the section `[embeddings]`.

A new embedder is one file in `quality/embeddings/`, one row of `EMBEDDERS` here and one branch of
`quality.embeddings.registry.embedder_of`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    Field,
    SerializeAsAny,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from selfeval.config.choices import check_name, read_settings
from selfeval.config.fields import Count, CountOrAuto, CountOrNone, Section
from selfeval.config.servers import ServerConfig

__all__ = [
    "EMBEDDERS",
    "BackboneEmbedderConfig",
    "EmbedderConfig",
    "EmbedderSpec",
    "EmbeddingEndpointConfig",
    "EmbeddingsConfig",
    "SentenceTransformersConfig",
    "StaticEmbedderConfig",
]


class EmbedderConfig(Section):
    """Base class of the embedders' sections."""


class BackboneEmbedderConfig(EmbedderConfig):
    """Settings of `embedder = "backbone"`."""

    layer: CountOrAuto = "auto"
    """Layer whose hidden states are pooled, counted from 1; `auto` chooses it without labels (docs/concepts/embeddings.md)."""
    pooling: Literal["auto", "mean", "last"] = "auto"
    """Pooling of the states of a text's tokens: their `mean`, the `last` one, or the better one (`auto`), without labels."""
    dimensions: CountOrNone = 256
    """Optional. Maximum number of dimensions of a vector, those in which the texts differ most; none keeps all of them."""
    fit_texts: Annotated[int, Field(ge=2, le=100_000, strict=True)] = 2048
    """Maximum number of texts that the whitening is fitted to."""
    select_texts: Annotated[int, Field(ge=2, le=100_000, strict=True)] = 128
    """Maximum number of texts by which layer and pooling are chosen."""


class StaticEmbedderConfig(EmbedderConfig):
    """Settings of `embedder = "static"`, which needs the extra `data`, except for GloVe."""

    method: Literal["subword", "skip-gram", "cbow", "glove"] = "subword"
    """How word vectors are trained on the run's text: `subword` is fastText's skip-gram, with a vector for unseen words."""
    pooling: Literal["sif", "mean"] = "sif"
    """Vector of a text: the mean of its words weighted by rarity, without the common direction (`sif`), or the plain `mean`."""
    dimensions: Count = 100
    """Dimensions of the vectors."""
    window: Count = 5
    """Words on each side of a word that are its context."""
    epochs: Count = 20
    """Passes over the text."""
    least_count: Count = 2
    """Words that occur less often have no vector (with `subword`, one from their parts)."""


class SentenceTransformersConfig(EmbedderConfig):
    """Settings of `embedder = "sentence-transformers"`, which needs the extra of this name."""

    model: str = ""
    """Model folder or hub id. Required. Code that comes with a model is not run."""
    prompt: str = ""
    """Optional. Text that is put before each text, which some models need, such as `query: `."""
    batch_size: Count = 32
    """Texts per pass."""


class EmbeddingEndpointConfig(ServerConfig, EmbedderConfig):
    """Settings of `embedder = "endpoint"`: a server with the OpenAI embeddings protocol. Needs the extra `endpoint`."""

    WITHOUT_EFFECT: ClassVar[frozenset[str]] = frozenset({
        *("key_variable", "in_flight", "requests_per_minute", "timeout", "retries", "batch_size"),
        *("price_read", "budget", "budget_tokens"),
    })  # fmt: skip
    """Settings on which no vector depends."""

    dimensions: CountOrNone = None
    """Optional. Number of dimensions requested from the server. Default: the model's own."""
    batch_size: Annotated[int, Field(ge=1, le=2048, strict=True)] = 64
    """Texts per request."""

    @model_validator(mode="after")
    def _budget_has_a_price(self) -> EmbeddingEndpointConfig:
        if self.budget is not None and self.price_read is None:
            raise ValueError("budget needs price_read; set it, or use budget_tokens")
        return self


@dataclass(frozen=True)
class EmbedderSpec:
    """Facts about an embedder that are needed before it is imported.

    Attributes:
        name: value of `embeddings.embedder`, and name of its section, `[embeddings.NAME]`.
        config: class of its section.
        summary: one line for the documentation.
        needs_backbone: whether it uses the model of the run.
        is_remote: whether texts are sent to a server.
    """

    name: str
    config: type[EmbedderConfig]
    summary: str
    needs_backbone: bool = False
    is_remote: bool = False


_BACKBONE = EmbedderSpec(
    "backbone",
    BackboneEmbedderConfig,
    "Pooled hidden states of the model of the run, centred and whitened. No second model.",
    needs_backbone=True,
)
_STATIC = EmbedderSpec("static", StaticEmbedderConfig, "Word vectors trained on the run's own text, pooled.")
_SENTENCES = EmbedderSpec(
    "sentence-transformers", SentenceTransformersConfig, "A model that was trained to embed, from a folder or the hub's cache."
)
_ENDPOINT = EmbedderSpec("endpoint", EmbeddingEndpointConfig, "A server with the OpenAI embeddings protocol.", is_remote=True)
EMBEDDERS: dict[str, EmbedderSpec] = {spec.name: spec for spec in (_BACKBONE, _STATIC, _SENTENCES, _ENDPOINT)}
"""The embedders by name."""

_SETTINGS = "settings of the embedder"
"""Alias of the field that holds the embedder's section. Not a recipe key: recipes use the embedder's name."""


class EmbeddingsConfig(Section):
    """Vectors of texts, for search and the map. Settings of one embedder: `[embeddings.EMBEDDER]`."""

    embedder: str = "backbone"
    """The embedder (docs/concepts/embeddings.md)."""
    settings: SerializeAsAny[EmbedderConfig] = Field(default=BackboneEmbedderConfig(), validation_alias=_SETTINGS)

    @property
    def spec(self) -> EmbedderSpec:
        """The registry entry of the embedder."""
        return EMBEDDERS[self.embedder]

    @field_validator("embedder")
    @classmethod
    def _is_registered(cls, value: str) -> str:
        return check_name(value, EMBEDDERS, "embedder")

    @model_validator(mode="before")
    @classmethod
    def _read_settings(cls, values: Any) -> Any:
        """Validate the chosen embedder's section. Those of others remain, as unknown keys."""
        return read_settings(values, "embedder", "backbone", EMBEDDERS, _SETTINGS)

    @model_serializer(mode="wrap")
    def _with_settings_by_name(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Serialise the fields as in a recipe: the embedder's section under its name."""
        values: dict[str, Any] = handler(self)
        values[self.embedder] = values.pop("settings")
        return values
