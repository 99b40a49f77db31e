"""The body of a causal language model: everything below the output layer, from tokens to hidden states."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["hidden_width", "text_body"]


def text_body(model: Any) -> nn.Module:
    """The module whose `last_hidden_state` the output layer reads.

    transformers' `base_model` is the model itself where a family's prefix names no attribute of it (Llama 4, mllama); then it
    is the child that holds the input embedding.
    """
    whole: nn.Module = model
    body: nn.Module = model.base_model
    if body is not whole:
        return body
    embedding: nn.Module = model.get_input_embeddings()
    holders = (child for child in whole.children() if embedding in set(child.modules()) and child is not embedding)
    return next(holders, body)


def hidden_width(model: Any) -> int:
    """Numbers in a hidden state as the output layer reads it.

    Not always `hidden_size`: OPT-350m projects 1,024 to 512 before its output layer.
    """
    width = getattr(model.get_output_embeddings(), "in_features", None)
    return int(width or model.config.get_text_config().hidden_size)
