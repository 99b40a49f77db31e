"""The families that this package brings itself: what transformers does not know by their `model_type`.

Importing this module registers their models with transformers' Auto classes, so that all of them load the way every other model
does. Only tokenizers need a way of their own, because the published ones are code.
"""

from __future__ import annotations

from collections.abc import Callable

from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from selfeval.backbone.families import chatglm

__all__ = ["FAMILIES", "family_tokenizer"]

FAMILIES: dict[str, Callable[[str], PreTrainedTokenizerBase]] = {"chatglm": chatglm.load_tokenizer}
"""model_type -> what loads the tokenizer of such a folder or hub id."""

_SAVED = {"ChatGLM1Tokenizer": "chatglm", "ChatGLM2Tokenizer": "chatglm", "ChatGLM3Tokenizer": "chatglm"}
"""Tokenizers that these families save, beside a model that may have become one of transformers' own."""


def family_tokenizer(name: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a model folder or hub id of one of these families; None for every other model."""
    kind = PreTrainedConfig.get_config_dict(name)[0].get("model_type")
    family = kind if kind in FAMILIES else _SAVED.get(get_tokenizer_config(name).get("tokenizer_class", ""))
    return FAMILIES[family](name) if family else None
