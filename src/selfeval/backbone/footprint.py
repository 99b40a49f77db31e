"""What a pass would hold in memory, found by running it on shapes: no weight is made, no number is computed.

A model is built on torch's meta device and given its roles; then its weights become fake tensors that say they are on a
device. The very code of the loop runs on them while `Footprint` counts the bytes of every living storage. What a kernel
takes for itself while it runs is not seen, nor what an allocator keeps back.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from selfeval.backbone.load import LoadedModel
from selfeval.backbone.roles import Backbone
from selfeval.config import LoraConfig

__all__ = ["Footprint", "ShapeBackbone"]

_ATEN = torch.ops.aten


class Footprint(TorchDispatchMode):
    """Counts, by kind, the bytes of all storages that live inside the block, and keeps the moment when they were most.

    New tensors are `activations`, those whose last dimension is the vocabulary `logits`. Fake tensors have no values:
    a mask picks everything.

    Args:
        known: tensors that are there already, by kind.
        vocabulary: entries of the output layer.

    Attributes:
        peak: bytes by kind when their sum was largest.
    """

    def __init__(self, known: Mapping[str, Iterable[Tensor]], vocabulary: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.vocabulary = vocabulary
        self.peak: Counter[str] = Counter()
        self._now: Counter[str] = Counter()
        self._live: dict[int, tuple[str, int]] = {}
        self._total, self._most = 0, 0
        for kind, tensors in known.items():
            for tensor in tensors:
                self._see(tensor, kind)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = self._without_values(func, args) if any(isinstance(a, FakeTensor) for a in args) else None
        if out is None:
            out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._see(leaf, "logits" if leaf.shape[-1:] == (self.vocabulary,) else "activations")
        return out

    def _without_values(self, func: Any, args: Any) -> Any:
        """The result of the operations that would have to look at values, None for all others."""
        if func is _ATEN.nonzero.default:
            return args[0].new_empty((args[0].numel(), args[0].ndim), dtype=torch.int64)
        if func is _ATEN.index.Tensor and _is_mask(args[1]):
            return args[0].new_empty((args[1][0].numel(), *args[0].shape[args[1][0].ndim :]))
        if func in (_ATEN.index_put_.default, _ATEN._index_put_impl_.default) and _is_mask(args[1]):
            return args[0]
        return None

    def _see(self, tensor: Tensor, kind: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        size = storage.nbytes()
        self._live[key] = (kind, size)
        self._now[kind] += size
        self._total += size
        if self._total > self._most:
            self._most, self.peak = self._total, self._now.copy()
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        kind, size = self._live.pop(key)
        self._now[kind] -= size
        self._total -= size

    def label(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Says that these living tensors are of another kind than it seemed."""
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            before, size = self._live[key]
            self._live[key] = (kind, size)
            self._now[before] -= size
            self._now[kind] += size


def _is_mask(index: Sequence[Tensor | None]) -> bool:
    return len(index) == 1 and index[0] is not None and index[0].dtype == torch.bool


class ShapeBackbone(Backbone):
    """A backbone whose weights are shapes.

    Args:
        config: of transformers.
        dtype: of the base weights.
        lora: of every role.
        roles: names; True where the role has a head.
        device: where its tensors say they are.
    """

    def __init__(
        self, config: Any, dtype: torch.dtype, lora: LoraConfig, roles: Mapping[str, bool], device: str = "cpu"
    ) -> None:
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.requires_grad_(False).eval()
        no_tokenizer = cast(PreTrainedTokenizerBase, None)
        super().__init__(LoadedModel(model, no_tokenizer, torch.device("meta"), "", (), 0), lora, "shapes")
        for role, head in roles.items():
            self.add_role(role, head=head)
        self.fake = FakeTensorMode()
        self._to_fake(torch.device(device))

    def _check_logits(self) -> None:
        """There are no logits to check."""

    def _fingerprint(self) -> str:
        return "shapes"

    def _to_fake(self, device: torch.device) -> None:
        """Turns every weight into a fake tensor; tied ones stay tied."""
        made: dict[int, Tensor] = {}

        def fake(tensor: Tensor) -> Tensor:
            if id(tensor) not in made:
                bare = self.fake.fake_tensor_converter.from_meta_and_device(self.fake, tensor.detach().to("meta"), device)
                made[id(tensor)] = nn.Parameter(bare, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else bare
            return made[id(tensor)]

        for module in [*self.model.modules(), *self.heads.values()]:
            for held in (module._parameters, module._buffers):
                held.update({name: fake(value) for name, value in held.items() if value is not None})
        self.loaded.device = device

    @property
    def vocabulary(self) -> int:
        return int(self.model.get_output_embeddings().weight.shape[0])

    def adapters(self) -> list[nn.Parameter]:
        """Weights of all roles."""
        return [p for role in self.roles for p in self.parameters(role).values()]

    def base(self) -> list[Tensor]:
        """Weights and buffers of the base, tied ones once."""
        own = {id(p) for p in self.adapters()}
        found = {id(t): t for t in [*self.model.parameters(), *self.model.buffers()]}
        return [tensor for key, tensor in found.items() if key not in own]

    def footprint(self) -> Footprint:
        """A counter that knows the weights and the gradients that are there."""
        adapters = self.adapters()
        gradients = [p.grad for p in adapters if p.grad is not None]
        known: dict[str, Iterable[Tensor]] = {"base": self.base(), "adapters": adapters, "gradients": gradients}
        return Footprint(known, self.vocabulary)
