"""Forward passes of the first layers of a decoder alone, for roles that read an earlier layer.

The decoder's list of layers is shortened during a pass. The hidden states are those after the last remaining layer and the
model's final norm, as if the model had only these layers: later ones are not computed, and a merged role is a smaller model of
the same class.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from torch import nn

from selfeval.backbone.body import text_body
from selfeval.errors import ConfigError, ModelError

__all__ = ["check_depth", "decoder_layers", "first_layers", "shortened_config"]


def decoder_layers(model: Any) -> nn.ModuleList:
    """Return the list of the decoder's layers, the first one with as many entries as the config has layers.

    Raises:
        ModelError: there is none.
    """
    count = int(model.config.get_text_config().num_hidden_layers)
    for module in text_body(model).modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    _refuse_family(model)


def _refuse_family(model: Any) -> NoReturn:
    raise ModelError(
        f"models of type {model.config.model_type} do not compute their layers one after the other from a list, so a role "
        "cannot read an earlier layer; leave `layer` out of evaluator.inputs"
    )


def check_depth(model: Any, layer: int) -> int | None:
    """Return the number of layers of a role that reads `layer`, counted from 1; None for the last one, so for all layers.

    Raises:
        ConfigError: the model has fewer layers.
        ModelError: its layers are not in a list.
    """
    count = len(decoder_layers(model))
    if not 1 <= layer <= count:
        raise ConfigError(f"evaluator.inputs: layer = {layer}, but this model has layers 1 to {count}; choose one of these")
    return layer if layer < count else None


@contextmanager
def first_layers(model: Any, depth: int | None) -> Iterator[None]:
    """Shorten the decoder to its first `depth` layers inside the block; None leaves it as it is.

    Raises:
        ModelError: the family does not compute its layers one after the other from the list.
    """
    if depth is None:
        yield
        return
    layers = decoder_layers(model)
    whole = layers._modules
    # A family that keeps another list would compute all layers, and score with plausible numbers.
    guard = layers[depth].register_forward_pre_hook(lambda *_: _refuse_family(model))
    # The entries, not the list: families hold it under different names, and iterate over it or over a slice of it.
    layers._modules = dict(list(whole.items())[:depth])
    try:
        yield
    except IndexError as error:
        # Of a list of modules. An embedding says "index out of range in self".
        if "is out of range" not in str(error):
            raise
        _refuse_family(model)
    finally:
        layers._modules = whole
        guard.remove()


def shortened_config(config: Any, depth: int) -> Any:
    """Return a copy of a config with the first `depth` layers, its lists with one entry per layer included."""
    short = copy.deepcopy(config)
    text = short.get_text_config()
    count = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        # Token ids may be as many as the layers.
        if isinstance(value, list | tuple) and len(value) == count and not name.endswith(("_id", "_ids")):
            setattr(text, name, value[:depth])
    text.num_hidden_layers = depth
    return short
