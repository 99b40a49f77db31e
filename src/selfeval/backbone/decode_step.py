"""A forward pass over one new token per row, without the overhead of modules.

In a small batch most of the time of such a pass is Python: module calls, hooks, keyword arguments in every layer. `DecodeStep`
computes the same operations on the same weights, in fewer calls: queries and keys are rotated together, grouped queries read
their keys without a copy per query head, and the mask is converted once per token and not once per layer. On a CPU in fp32 its
logits are those of the model's own pass up to the order of sums in attention and norms. It knows the layer of
Llama and of families that share it; other models keep their own pass.

Shapes: B rows, T tokens so far, H query heads, K key heads, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

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
        self._embed, self._rotary, self._norm = body.embed_tokens.forward, body.rotary_emb.forward, _norm(body.norm)
        layers = body.layers[: body.config.num_hidden_layers]
        self._layers = [_Layer(layer, lambda module: _linear(module, stack)) for layer in layers]
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
        rotation = _Rotation.of(*self._rotary(states, positions))
        mask = _mask(attention_BT, states.dtype)
        for layer, layer_cache in zip(self._layers, cache.layers, strict=True):
            states = layer(states, rotation, mask, layer_cache)
        logits: Tensor = self._head(self._norm(states))
        return logits[:, -1]


def _mask(attention_BT: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Return what attention adds to its scores `[B, 1, 1, T]`: minus infinity at padding.

    Without padding there is nothing to mask, and attention takes a faster kernel.
    """
    if bool(attention_BT.all()):
        return None
    zeros = torch.zeros(attention_BT.shape, dtype=dtype, device=attention_BT.device)
    return zeros.masked_fill_(attention_BT == 0, float("-inf"))[:, None, None]


@dataclass(frozen=True)
class _Rotation:
    """Rotary positions of one token per row: x cos + rotate_half(x) sin, the sign moved to the sine."""

    cos: Tensor
    signed_sin: Tensor

    @classmethod
    def of(cls, cos_B1D: Tensor, sin_B1D: Tensor) -> _Rotation:
        half = sin_B1D.shape[-1] // 2
        signed = torch.cat((-sin_B1D[..., :half], sin_B1D[..., half:]), dim=-1)
        return cls(cos_B1D, signed)

    def __call__(self, heads_BHD: Tensor) -> Tensor:
        first, second = heads_BHD.chunk(2, dim=-1)
        return heads_BHD * self.cos + torch.cat((second, first), dim=-1) * self.signed_sin


class _Layer:
    """One layer: `linear` makes a function of a linear module."""

    def __init__(self, layer: Any, linear: Callable[[Any], _Linear]) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._attention_norm, self._mlp_norm = _norm(layer.input_layernorm), _norm(layer.post_attention_layernorm)
        self._size, self._scale = attention.head_dim, attention.scaling
        self._query, self._key, self._value, self._output = (
            linear(module) for module in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        )
        self._gate, self._up, self._down = (linear(module) for module in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
        self._activation = mlp.act_fn.forward
        # Qwen 3 normalises each head's queries and keys.
        self._query_norm, self._key_norm = (
            _norm(norm) if (norm := getattr(attention, name, None)) is not None else _unchanged for name in ("q_norm", "k_norm")
        )

    def __call__(self, states: Tensor, rotation: _Rotation, mask: Tensor | None, layer_cache: PreallocatedLayer) -> Tensor:
        inputs = self._attention_norm(states)
        states = states + self._output(self._attended(inputs, rotation, mask, layer_cache))
        inputs = self._mlp_norm(states)
        return states + self._down(self._activation(self._gate(inputs)) * self._up(inputs))

    def _attended(self, inputs: Tensor, rotation: _Rotation, mask: Tensor | None, layer_cache: PreallocatedLayer) -> Tensor:
        """Compute attention of the new token `[B, 1, H D]` over the cache, which keeps its key and value."""
        heads = (len(inputs), -1, self._size)
        query_BHD = self._query_norm(self._query(inputs).view(heads))
        key_BKD = self._key_norm(self._key(inputs).view(heads))
        value_BKD = self._value(inputs).view(heads)
        query_BHD, key_BKD = rotation(torch.cat((query_BHD, key_BKD), dim=1)).split(
            (query_BHD.shape[1], key_BKD.shape[1]), dim=1
        )
        keys, values = layer_cache.update(key_BKD[:, :, None], value_BKD[:, :, None])
        return _attend(query_BHD, keys, values, mask, self._scale, packed=inputs.device.type != "cpu")[:, None]


def _attend(
    query_BHD: Tensor, keys_BKTD: Tensor, values_BKTD: Tensor, mask: Tensor | None, scale: float, *, packed: bool
) -> Tensor:
    """Attention of one query per head over keys that groups of heads share, `[B, H D]`.

    Args:
        packed: the heads of a group are the queries of one head. On a GPU, a mask together with `enable_gqa` falls back to a
            kernel that copies the keys per query head; on a CPU `enable_gqa` is faster.
    """
    batch, heads, size = query_BHD.shape
    groups = keys_BKTD.shape[1]
    query = query_BHD.reshape(batch, groups, heads // groups, size) if packed else query_BHD[:, :, None]
    output = nn.functional.scaled_dot_product_attention(
        query, keys_BKTD, values_BKTD, attn_mask=mask, scale=scale, enable_gqa=not packed and groups != heads
    )
    return output.reshape(batch, heads * size)


def _norm(module: Any) -> _Linear:
    """Return the RMS norm of a module in one call; in 16 bits that of the module, which rounds in another place."""
    weight, eps = module.weight, module.variance_epsilon
    if weight.dtype != torch.float32:
        forward: _Linear = module.forward
        return forward
    return lambda x: nn.functional.rms_norm(x, weight.shape, weight, eps)


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
