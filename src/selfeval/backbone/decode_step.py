"""A forward pass over a few new tokens per row, without the overhead of modules.

In a small batch most of the time of such a pass is Python: module calls, hooks, keyword arguments in every layer. `DecodeStep`
computes the same operations on the same weights, in fewer calls: queries and keys are rotated together, grouped queries read
their keys without a copy per query head, and the mask is converted once per token and not once per layer. On a CPU in fp32 its
logits are those of the model's own pass up to the order of sums in attention and norms. It knows the layer of
Llama and of families that share it; other models keep their own pass.

Shapes: B rows, T tokens so far, N new tokens, H query heads, K key heads, D hidden, V vocabulary.
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
    """The pass over one new token per row of a Llama-like model, or over a few.

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
        attention = torch.tensor(mask, device=self._loaded.device)
        ids = torch.tensor([[0, 1, 2, 2], [1, 2, 0, 0]][: len(mask)], device=attention.device)
        with self._stack.block(Acting.of(BASE)):
            whole, _ = self._model_logits(ids, attention, preallocated_cache(self._model.config, 0))
            _, cache = self._model_logits(ids[:, :3], attention[:, :3], preallocated_cache(self._model.config, 1))
            if not self.fits_cache(cache):
                return False
            expected, _ = self._model_logits(ids[:, 3:], attention, cache)
            for layer in cache.layers:
                layer.length -= 1
            found = self.logits(ids[:, 3:], attention, cache)[:, -1]
        # Often equal. Kernels for padding or of a GPU may sum in another order, which moves the last bits; a deep model makes
        # more of that. It differs as much from itself: between the whole sequence and its last token.
        noise = float((whole - expected).abs().max())
        tolerance = max(4 * torch.finfo(expected.dtype).eps * float(expected.abs().max()), 2 * noise)
        return torch.allclose(found, expected, rtol=0, atol=tolerance)

    def _model_logits(self, ids: Tensor, attention: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """Return the logits after the last token by the model's own pass, and the cache."""
        new = ids.shape[1]
        positions = (attention.cumsum(-1) - 1).clamp_min(0)[:, -new:]
        arguments = state_arguments(self._loaded, cache, attention, new)
        return self._model(ids, position_ids=positions, use_cache=True, **arguments).logits[:, -1], cache

    def logits(self, ids_BN: Tensor, attention_BT: Tensor, cache: Any) -> Tensor:
        """Compute the logits after each new token, `[B, N, V]`, and add keys and values to the cache.

        Args:
            ids_BN: the new tokens of each row, none of them padding.
            attention_BT: 1 at real tokens, for those in the cache and the new ones; padding is on the left.
            cache: of the tokens so far.
        """
        new = ids_BN.shape[1]
        states = self._embed(ids_BN)
        positions = attention_BT.sum(-1, keepdim=True) - new
        if new > 1:
            positions = positions + torch.arange(new, device=positions.device)
        rotation = _Rotation.of(*self._rotary(states, positions))
        mask = _mask(attention_BT, new, states.dtype)
        for layer, layer_cache in zip(self._layers, cache.layers, strict=True):
            states = layer(states, rotation, mask, layer_cache)
        logits: Tensor = self._head(self._norm(states))
        return logits


def _mask(attention_BT: Tensor, new: int, dtype: torch.dtype) -> Tensor | None:
    """Return what attention adds to its scores `[B, 1, N, T]`: minus infinity at padding and at later tokens.

    A single token without padding has nothing to mask, and attention takes a faster kernel.
    """
    if new == 1 and bool(attention_BT.all()):
        return None
    hidden_BNT = (attention_BT == 0)[:, None]
    if new > 1:
        later_NT = torch.ones(new, attention_BT.shape[1], dtype=torch.bool, device=attention_BT.device)
        hidden_BNT = hidden_BNT | later_NT.triu(attention_BT.shape[1] - new + 1)
    zeros = torch.zeros(hidden_BNT.shape, dtype=dtype, device=attention_BT.device)
    return zeros.masked_fill_(hidden_BNT, float("-inf"))[:, None]


@dataclass(frozen=True)
class _Rotation:
    """Rotary positions of the new tokens: x cos + rotate_half(x) sin, the sign moved to the sine."""

    cos: Tensor
    signed_sin: Tensor

    @classmethod
    def of(cls, cos_BND: Tensor, sin_BND: Tensor) -> _Rotation:
        half = sin_BND.shape[-1] // 2
        signed = torch.cat((-sin_BND[..., :half], sin_BND[..., half:]), dim=-1)
        return cls(cos_BND[:, :, None], signed[:, :, None])

    def __call__(self, heads_BNHD: Tensor) -> Tensor:
        first, second = heads_BNHD.chunk(2, dim=-1)
        return heads_BNHD * self.cos + torch.cat((second, first), dim=-1) * self.signed_sin


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
        """Compute attention of the new tokens `[B, N, H D]` over the cache, which keeps their keys and values."""
        heads = (*inputs.shape[:2], -1, self._size)
        query_BNHD = self._query_norm(self._query(inputs).view(heads))
        key_BNKD = self._key_norm(self._key(inputs).view(heads))
        value_BNKD = self._value(inputs).view(heads)
        query_BNHD, key_BNKD = rotation(torch.cat((query_BNHD, key_BNKD), dim=2)).split(
            (query_BNHD.shape[2], key_BNKD.shape[2]), dim=2
        )
        keys, values = layer_cache.update(key_BNKD.transpose(1, 2), value_BNKD.transpose(1, 2))
        return _attend(query_BNHD.transpose(1, 2), keys, values, mask, self._scale, packed=inputs.device.type != "cpu")


def _attend(
    query_BHND: Tensor, keys_BKTD: Tensor, values_BKTD: Tensor, mask: Tensor | None, scale: float, *, packed: bool
) -> Tensor:
    """Attention of the new queries over keys that groups of heads share, `[B, N, H D]`.

    Args:
        packed: the heads of a group are the queries of one head. On a GPU, a mask together with `enable_gqa` falls back to a
            kernel that copies the keys per query head; on a CPU `enable_gqa` is faster.
    """
    batch, heads, new, size = query_BHND.shape
    groups = keys_BKTD.shape[1]
    query = query_BHND
    if packed:
        query = query_BHND.reshape(batch, groups, heads // groups * new, size)
        mask = mask.repeat(1, 1, heads // groups, 1) if mask is not None and new > 1 else mask
    output = nn.functional.scaled_dot_product_attention(
        query, keys_BKTD, values_BKTD, attn_mask=mask, scale=scale, enable_gqa=not packed and groups != heads
    )
    return output.reshape(batch, heads, new, size).transpose(1, 2).reshape(batch, new, heads * size)


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
