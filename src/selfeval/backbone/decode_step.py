"""A forward pass over one new token per row, without the overhead of modules.

In a small batch most of the time of such a pass is Python: module calls, hooks, keyword arguments in every layer. `DecodeStep`
computes the same operations on the same weights in the same order, so on a CPU its logits are bit for bit those of the model's
own pass. It knows the layer of Llama and of families that share it; other models keep their own pass.

Shapes: B rows, T tokens so far, D hidden, V vocabulary.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from selfeval.backbone.adapters import BASE, Acting, AdapterStack
from selfeval.backbone.body import text_body
from selfeval.backbone.families.cache import PreallocatedLayer, preallocated_cache, state_arguments
from selfeval.backbone.load import LoadedModel

__all__ = ["DecodeStep"]

_FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Model types with the layer that `_Layer` computes: norm, attention with rotary positions, norm, gated MLP."""

_Linear = Callable[[Tensor], Tensor]


class DecodeStep:
    """The pass over one new token per row of a Llama-like model.

    Args:
        loaded: a model that `fits`.
        stack: decides which adapters act.
    """

    def __init__(self, loaded: LoadedModel, stack: AdapterStack) -> None:
        model: Any = loaded.model
        body: Any = text_body(model)
        self._model, self._loaded, self._stack = model, loaded, stack
        self._embed, self._rotary, self._norm = body.embed_tokens.forward, body.rotary_emb.forward, body.norm.forward
        rotate = sys.modules[type(model).__module__].apply_rotary_pos_emb
        attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
        layers = body.layers[: body.config.num_hidden_layers]
        self._layers = [_Layer(layer, lambda module: _linear(module, stack), rotate, attend) for layer in layers]
        self._head = _linear(model.lm_head, stack)

    @staticmethod
    def fits(loaded: LoadedModel, stack: AdapterStack) -> bool:
        """Return whether this model computes what a `DecodeStep` does, and nothing else is attached to its modules."""
        model: Any = loaded.model
        kind = model.config.model_type
        return (
            kind in _FAMILIES
            and type(model).__module__ == f"transformers.models.{kind}.modeling_{kind}"
            and type(model).__name__.endswith("ForCausalLM")
            and model.config._attn_implementation == "sdpa"
            and loaded.device.type != "meta"  # the planner follows the model's own pass
            and not (loaded.placement and loaded.placement.streamed)
            and not model.training
            and all(_is_plain(module, stack) for module in text_body(model).modules())
            and _is_plain(model.lm_head, stack)
        )

    @staticmethod
    def fits_cache(cache: Any) -> bool:
        """Return whether all layers of the cache keep everything that they are given."""
        return all(type(layer) is PreallocatedLayer for layer in cache.layers)

    @torch.no_grad()
    def agrees(self) -> bool:
        """Return whether the logits of one step equal those of the model's own pass; a release of transformers may differ."""
        # With padding, and without: attention then has no mask.
        return self._agrees_on([[0, 1, 1, 1], [1, 1, 1, 1]]) and self._agrees_on([[1, 1, 1, 1]])

    def _agrees_on(self, mask: list[list[int]]) -> bool:
        model, device = self._model, self._loaded.device
        attention = torch.tensor(mask, device=device)
        ids = torch.tensor([[0, 1, 2], [1, 2, 0]][: len(mask)], device=device)
        positions = (attention.cumsum(-1) - 1).clamp_min(0)
        cache = preallocated_cache(model.config, 1)
        with self._stack.block(Acting.of(BASE)):
            model(
                ids, position_ids=positions[:, :3], use_cache=True, **state_arguments(self._loaded, cache, attention[:, :3], 3)
            )
            if not self.fits_cache(cache):
                return False
            last = ids[:, -1:]
            arguments = state_arguments(self._loaded, cache, attention, 1)
            expected = model(last, position_ids=positions[:, 3:], use_cache=True, **arguments).logits[:, -1]
            for layer in cache.layers:
                layer.length -= 1
            found = self.logits(last, attention, cache)
        # Equal on a CPU. Kernels of a GPU may sum in another order, which moves the last bits.
        tolerance = 4 * torch.finfo(expected.dtype).eps * float(expected.abs().max())
        return torch.allclose(found, expected, rtol=0, atol=tolerance)

    def logits(self, ids_B1: Tensor, attention_BT: Tensor, cache: Any) -> Tensor:
        """Compute next-token logits `[B, V]`, and add keys and values to the cache.

        Args:
            ids_B1: the new token of each row.
            attention_BT: 1 at real tokens, for those in the cache and the new one; padding is on the left.
            cache: of the tokens so far.
        """
        states = self._embed(ids_B1)
        positions = attention_BT.sum(-1, keepdim=True) - 1
        position_embeddings = self._rotary(states, positions)
        # Without padding there is nothing to mask, and attention takes a faster kernel.
        mask = None if bool(attention_BT.all()) else attention_BT.bool()[:, None, None]
        for layer, layer_cache in zip(self._layers, cache.layers, strict=True):
            states = layer(states, position_embeddings, mask, layer_cache)
        logits: Tensor = self._head(self._norm(states))
        return logits[:, -1]


class _Layer:
    """One layer: `linear` makes a function of a linear module."""

    def __init__(self, layer: Any, linear: Callable[[Any], _Linear], rotate: Any, attend: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._attention, self._rotate, self._attend = attention, rotate, attend
        self._norms = layer.input_layernorm.forward, layer.post_attention_layernorm.forward
        self._query, self._key, self._value, self._output = (
            linear(module) for module in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        )
        self._gate, self._up, self._down = (linear(module) for module in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
        self._activation = mlp.act_fn.forward
        # Qwen 3 normalises each head's queries and keys.
        self._query_norm, self._key_norm = (
            getattr(getattr(attention, name, None), "forward", _unchanged) for name in ("q_norm", "k_norm")
        )

    def __call__(
        self,
        states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        mask: Tensor | None,
        layer_cache: PreallocatedLayer,
    ) -> Tensor:
        attention = self._attention
        inputs = self._norms[0](states)
        heads = (*inputs.shape[:-1], -1, attention.head_dim)
        query = self._query_norm(self._query(inputs).view(heads)).transpose(1, 2)
        key = self._key_norm(self._key(inputs).view(heads)).transpose(1, 2)
        value = self._value(inputs).view(heads).transpose(1, 2)
        query, key = self._rotate(query, key, *position_embeddings)
        keys, values = layer_cache.update(key, value)
        output, _ = self._attend(attention, query, keys, values, mask, dropout=0.0, scaling=attention.scaling)
        states = states + self._output(output.reshape(*inputs.shape[:-1], -1))
        inputs = self._norms[1](states)
        return states + self._down(self._activation(self._gate(inputs)) * self._up(inputs))


def _linear(module: Any, stack: AdapterStack) -> _Linear:
    """Return the product with a linear layer's weights; `stack` adds the adapters of the acting roles."""
    base = module.base_layer if isinstance(module, LoraLayer) else module
    if type(base) is not nn.Linear:
        raise TypeError(f"a {type(base).__name__} may be no product with its weight")
    weight, bias = base.weight, base.bias
    if base is module:
        return lambda x: nn.functional.linear(x, weight, bias)
    return lambda x: stack.add_adapters(module, (x,), nn.functional.linear(x, weight, bias))


def _is_plain(module: nn.Module, stack: AdapterStack) -> bool:
    """Return whether a module does only what its class does, apart from adding adapters."""
    hooks = len(module._forward_hooks) - (isinstance(module, LoraLayer) and module in stack)
    if hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook") or "forward" in vars(module):
        return False
    if isinstance(module, LoraLayer):
        return type(module.get_base_layer()) is nn.Linear
    # Some quantised layers are subclasses; `_linear` refuses the others.
    return type(module) is nn.Linear or not isinstance(module, nn.Linear)


def _unchanged(states: Tensor) -> Tensor:
    return states
