"""The families that this package brings itself: those that transformers does not know by their `model_type`.

A family's module registers its models with transformers' Auto classes when it is imported, so that they load the way every
other model does. It is imported for its own models alone: all others stay independent of what such a module needs from
transformers and from SentencePiece. Only tokenizers need a separate function, because the published ones are code.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.tokenization_auto import get_tokenizer_config

__all__ = ["FAMILIES", "family_tokenizer", "register_family"]


def _chatglm() -> ModuleType:
    from selfeval.backbone.families import chatglm

    return chatglm


FAMILIES: dict[str, Callable[[], ModuleType]] = {"chatglm": _chatglm}
"""model_type -> imports the module of such models; its `load_tokenizer(name)` loads the tokenizer of a folder or hub id."""

_SAVED = {"ChatGLM1Tokenizer": "chatglm", "ChatGLM2Tokenizer": "chatglm", "ChatGLM3Tokenizer": "chatglm"}
"""Tokenizers that these families save with a model that may have become one of transformers' own."""


def register_family(model_type: Any) -> None:
    """Import the module of this type of model, if it is one of `FAMILIES`; transformers' Auto classes know it from then on."""
    if model_type in FAMILIES:
        FAMILIES[model_type]()


def family_tokenizer(name: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a model folder or hub id of one of these families; None for every other model."""
    kind = PreTrainedConfig.get_config_dict(name)[0].get("model_type")
    family = kind if kind in FAMILIES else _SAVED.get(get_tokenizer_config(name).get("tokenizer_class", ""))
    if family is None:
        return None
    tokenizer: PreTrainedTokenizerBase = FAMILIES[family]().load_tokenizer(name)
    return tokenizer
