"""Memory footprint of a forward or backward pass, traced on shapes only: no weights are allocated, nothing is computed.

A model is built on torch's meta device and given its roles. The very code of the loop runs on it, on the meta device, while
`Footprint` counts the bytes of every living storage. Where several devices share the layers, each storage is
booked on the one that would hold it; no such device need be here. The workspace of kernels and memory cached by the
allocator are not counted.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from selfeval.backbone.adapters import BASE
from selfeval.backbone.load import LoadedModel
from selfeval.backbone.output_head import OutputHead
from selfeval.backbone.placement import DeviceMap
from selfeval.backbone.role_set import RoleSet
from selfeval.backbone.roles import Backbone
from selfeval.backbone.shared_prefixes import FAILURES, LayoutBlock, may_share, uniform_layout
from selfeval.config import LoraConfig
from selfeval.errors import ModelError

__all__ = ["Footprint", "Peaks", "ShapeBackbone", "computes", "fullest"]

_ATEN = torch.ops.aten


Peaks = dict[str, Counter[str]]
"""Device -> kind -> bytes, at the moment when that device held most."""


def fullest(found: Iterable[Peaks]) -> Peaks:
    """Of several things done one after the other: per device, the one during which it holds most."""
    most: Peaks = {}
    for peaks in found:
        for device, peak in peaks.items():
            if device not in most or peak.total() > most[device].total():
                most[device] = peak
    return most


class Footprint(TorchDispatchMode):
    """Counts, by device and kind, the bytes of all storages that live inside the block, and keeps each device's fullest moment.

    New tensors are `activations`, those whose last dimension is the vocabulary `logits`. A tensor is where the first tensor is
    that it was made of (streamed weights come to it), else on the main device. Tensors have no values: a mask picks
    everything, a yes or no is no, and a number is 0.

    Args:
        known: tensors that are there already, by kind, on the main device; `know` names those of other devices.
        vocabulary: entries of the output layer.
        main: name of the main device.
        on_shapes: whether all tensors are on the meta device. Default: False, for a pass that is really computed.

    Attributes:
        peaks: bytes by kind at the moment when their sum was largest, for each device.
    """

    def __init__(
        self, known: Mapping[str, Iterable[Tensor]], vocabulary: int, main: str = "cpu", *, on_shapes: bool = False
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.vocabulary, self.main, self.on_shapes = vocabulary, main, on_shapes
        self.peaks: Peaks = {}
        self._now: Peaks = {}
        self._live: dict[int, tuple[str, str, int]] = {}
        self._total: Counter[str] = Counter()
        self._forced: str | None = None
        for kind, tensors in known.items():
            self.know(tensors, kind, main)

    @property
    def peak(self) -> Counter[str]:
        """That of the main device."""
        return self.peaks.get(self.main, Counter())

    def know(self, tensors: Iterable[Tensor], kind: str, device: str) -> None:
        """Count tensors that are there already."""
        for tensor in tensors:
            self._see(tensor, kind, device)

    def device_of(self, tensor: Tensor) -> str:
        """The device of a known tensor, `""` of any other."""
        return self._live.get(tensor.untyped_storage()._cdata, ("", "", 0))[1]

    @contextmanager
    def on(self, device: str) -> Iterator[None]:
        """Assign tensors created inside the block to this device, regardless of their inputs: a copy between devices."""
        outer, self._forced = self._forced, device
        try:
            yield
        finally:
            self._forced = outer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = _on_meta(kwargs or {}) if self.on_shapes else kwargs or {}
        out = self._without_values(func, args) if self.on_shapes else None
        if out is None:
            out = (_computed_once if self.on_shapes else _computed)(func, args, kwargs)
        inputs = list(_tensors(args))
        device = self._forced or self._made_on(inputs)
        for tensor in inputs:  # those made from Python's numbers are new here
            self._see(tensor, "activations", self.main)
        for tensor in _tensors(out):
            self._see(tensor, "logits" if tensor.shape[-1:] == (self.vocabulary,) else "activations", device)
        return out

    def _made_on(self, inputs: Sequence[Tensor]) -> str:
        devices = (self.device_of(tensor) for tensor in inputs)
        return next((device for device in devices if computes(device, self.main)), self.main)

    def _without_values(self, func: Any, args: Any) -> Any:
        """The result of the operations that would have to look at values, None for all others."""
        if func is _ATEN._grouped_mm.default:
            return _grouped_product(*args[:3])
        if func is _ATEN.nonzero.default:
            return args[0].new_empty((args[0].numel(), args[0].ndim), dtype=torch.int64)
        if func is _ATEN.index.Tensor and _is_mask(args[1]):
            (mask,) = (part for part in args[1] if part is not None)
            whole = len(args[1]) - 1
            rest = args[0].shape[whole + mask.ndim :]
            return args[0].new_empty((*args[0].shape[:whole], mask.numel(), *rest))
        if func in (_ATEN.index_put_.default, _ATEN._index_put_impl_.default) and _is_mask(args[1]):
            return args[0]
        if func is _ATEN._local_scalar_dense.default and args[0].dtype == torch.bool:
            return False
        if func is _ATEN._local_scalar_dense.default and args[0].is_floating_point():
            return 0.0
        return None

    def _see(self, tensor: Tensor, kind: str, device: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        # Views share a storage, which counts once.
        if key in self._live:
            return
        size = storage.nbytes()
        self._live[key] = (kind, device, size)
        now = self._now.setdefault(device, Counter())
        now[kind] += size
        self._total[device] += size
        if device not in self.peaks or self._total[device] > self.peaks[device].total():
            self.peaks[device] = now.copy()
        # The storage also lives while only autograd holds it, so saved activations count until the backward pass frees them.
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        kind, device, size = self._live.pop(key)
        self._now[device][kind] -= size
        self._total[device] -= size

    def label(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Say that these living tensors are of another kind than it seemed."""
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            before, device, size = self._live[key]
            self._live[key] = (kind, device, size)
            self._now[device][before] -= size
            self._now[device][kind] += size
            # The peak may be the moment at which the tensor was made, under its first kind.
            if self._total[device] == self.peaks[device].total():
                self.peaks[device] = self._now[device].copy()


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors among the arguments or the results of an operation."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)


# -- shape functions ----------------------------------------------------------------------------------------------------

_Layout = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]
"""Shape, strides and type of a tensor."""

_LAYOUTS: dict[Any, tuple[bool, list[_Layout]] | None] = {}
"""Layouts of the results of an operation on inputs of certain shapes, and whether it returns a tuple; None: call it."""

_META = torch.device("meta")


def _computed(func: Any, args: Any, kwargs: Any) -> Any:
    return func(*args, **kwargs)


def _computed_once(func: Any, args: Any, kwargs: Any) -> Any:
    """Return what an operation makes of tensors on the meta device.

    Many shape functions are slow Python code, and a plan calls them thousands of times with the same shapes: layers are alike.
    """
    if not _makes_tensors(func) or (key := _key((func, args, kwargs))) is None:
        return func(*args, **kwargs)
    if key not in _LAYOUTS:
        out = func(*args, **kwargs)
        _LAYOUTS[key] = _layouts(out, [*args, *kwargs.values()])
        return out
    known = _LAYOUTS[key]
    if known is None:
        return func(*args, **kwargs)
    is_tuple, layouts = known
    made = [_ATEN.empty_strided.default(shape, strides, dtype=dtype, device=_META) for shape, strides, dtype in layouts]
    return tuple(made) if is_tuple else made[0]


@cache
def _makes_tensors(func: Any) -> bool:
    """Whether an operation returns tensors, writes to none of its inputs and returns no view of them, by its schema."""
    schema = func._schema
    parts = [*schema.arguments, *schema.returns]
    return bool(schema.returns) and all(part.alias_info is None for part in parts)


def _key(value: Any) -> Any:
    """A hashable description of the arguments of an operation, None if one is of an unknown kind."""
    if isinstance(value, Tensor):
        return (value.shape, value.stride(), value.dtype, value.storage_offset()) if value.is_meta else None
    if isinstance(value, dict):
        value = tuple(value.items())
    if isinstance(value, (tuple, list)):
        parts = [_key(part) for part in value]
        return None if None in parts else tuple(parts)
    # With their types: 1, 1.0 and True are equal, and give results of different types.
    return (type(value), value) if value is None or isinstance(value, _PLAIN) else None


_PLAIN = (bool, int, float, str, torch.dtype, torch.device, torch.layout, torch.memory_format, torch._ops.OpOverload)


def _layouts(out: Any, inputs: Any) -> tuple[bool, list[_Layout]] | None:
    """Describe new tensors; None if one of them is a view, or not all that it is can be told by its layout."""
    made = list(out) if isinstance(out, tuple) else [out]
    if not all(isinstance(tensor, Tensor) and tensor.is_meta for tensor in made):
        return None
    storages = [tensor.untyped_storage()._cdata for tensor in _tensors([made, *inputs])]
    layouts = [(tuple(tensor.shape), tensor.stride(), tensor.dtype) for tensor in made]
    whole = all(
        tensor.storage_offset() == 0 and tensor.untyped_storage().nbytes() == _bytes_of(layout)
        for tensor, layout in zip(made, layouts, strict=True)
    )
    alone = len(set(storages[: len(made)])) == len(made) and not set(storages[: len(made)]) & set(storages[len(made) :])
    return (isinstance(out, tuple), layouts) if whole and alone else None


def _bytes_of(layout: _Layout) -> int:
    """Bytes of the storage of a new tensor."""
    shape, strides, dtype = layout
    last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    return (last + 1) * dtype.itemsize if 0 not in shape else 0


# -- operations that torch cannot trace, or traces otherwise than a CPU computes them --------------------------------------


def _grouped_product(left: Tensor, right: Tensor, ends_G: Tensor | None) -> Tensor:
    """Return the shape of `torch._grouped_mm`, whose own shape function refuses fp32, in which a CPU computes it.

    Args:
        left: matrix, or a stack of G matrices.
        right: matrix, or a stack of G matrices.
        ends_G: ends of the groups along the dimension that the stack does not have.
    """
    if left.ndim == right.ndim == 2:
        assert ends_G is not None
        return left.new_empty((len(ends_G), left.shape[0], right.shape[1]))
    rows = left.shape[:-1] if left.ndim == 2 or right.ndim == 3 else left.shape[1:2]
    return left.new_empty((*rows, right.shape[-1]))


_UNFUSED = functional.scaled_dot_product_attention


@contextmanager
def _shapes() -> Iterator[None]:
    """Let new tensors have a shape only, and compute attention with the kernel that a CPU would choose.

    On the meta device torch always chooses the unfused one, which keeps a matrix of tokens by tokens. The function is replaced,
    because a mode of torch is not active while a backward pass computes layers again.
    """
    before, functional.scaled_dot_product_attention = functional.scaled_dot_product_attention, _attention
    try:
        with torch.device("meta"):
            yield
    finally:
        functional.scaled_dot_product_attention = before


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    shapes = tuple(tuple(t.shape) for t in (query, key, value))
    mask = None if attn_mask is None else (tuple(attn_mask.shape), attn_mask.dtype, attn_mask.requires_grad)
    # A learner that differentiates twice disables the fused kernel.
    enabled = torch.backends.cuda.flash_sdp_enabled()
    if not (query.is_meta and enabled and _is_fused(shapes, query.dtype, mask, dropout_p, is_causal, enable_gqa)):
        return _UNFUSED(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.where(attn_mask, query.new_zeros(()), query.new_full((), float("-inf")))
    fused = _ATEN._scaled_dot_product_flash_attention_for_cpu.default
    return cast(Tensor, fused(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0])


@cache
def _is_fused(
    shapes: Sequence[Sequence[int]],
    dtype: torch.dtype,
    mask: tuple[Sequence[int], torch.dtype, bool] | None,
    dropout: float,
    causal: bool,
    grouped: bool,
) -> bool:
    """Return whether torch chooses the fused kernel on a CPU for tensors of these shapes.

    It is asked with real tensors of at most two rows and tokens, since neither number makes a difference.
    """

    def real(shape: Sequence[int], kind: torch.dtype, kept: Sequence[int]) -> Tensor:
        """Return a tensor of this shape, small in all dimensions but those that are kept, counted from the end."""
        sizes = [size if place - len(shape) in kept else min(size, 2) for place, size in enumerate(shape)]
        return torch.zeros(sizes, dtype=kind, device="cpu")

    with _disable_current_modes():
        query, key, value = (real(shape, dtype, kept=(-1, -3)) for shape in shapes)
        given = None if mask is None else real(*mask[:2], kept=(-3,)).requires_grad_(mask[2])
        choice = torch._fused_sdp_choice(query, key, value, given, dropout, causal, enable_gqa=grouped)
    return int(choice) == SDPBackend.FLASH_ATTENTION.value


def _on_meta(options: dict[str, Any]) -> dict[str, Any]:
    """Let a copy to another device, or a new tensor there, stay a shape."""
    return {**options, "device": torch.device("meta")} if options.get("device") is not None else options


def computes(device: str, main: str) -> bool:
    """Whether anything is computed there; disk, and RAM if there are GPUs, only store weights."""
    return device == main or device.startswith("cuda:")


class _Moved(torch.autograd.Function):
    """A copy on another device, whose gradient is copied back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, meter: Footprint, device: str) -> Tensor:
        ctx.meter, ctx.source = meter, meter.device_of(tensor) or meter.main
        with meter.on(device):
            return tensor.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        with ctx.meter.on(ctx.source):
            return gradients[0].clone(), None, None


def _is_mask(index: Sequence[Tensor | None]) -> bool:
    """Whether a mask picks entries, of the first dimensions or of those after whole ones (`x[:, mask]`)."""
    given = [part for part in index if part is not None]
    return len(given) == 1 and index[-1] is given[0] and given[0].dtype == torch.bool


class ShapeRoles(RoleSet):
    """Roles whose weights are shapes."""

    def is_bare(self, role: str) -> bool:
        """Return True: a new role has no values."""
        return True

    def _copy(self, source: str, target: str) -> None:
        """There are no values to copy."""


class ShapeBackbone(Backbone):
    """A backbone whose weights are shapes.

    Args:
        config: of transformers.
        dtype: of the base weights.
        lora: of every role.
        roles: names; True where the role has a head.
        placement: which device holds which layer; one device holds all unless given. Streamed layers are computed on the main
            device, and again in the backward pass.
        attention: how attention is computed; the family's own way unless given.
        more_roles: adds further roles, as a learner does.

    Raises:
        ModelError: the family cannot compute attention in that way.
    """

    def __init__(
        self,
        config: Any,
        dtype: torch.dtype,
        lora: LoraConfig,
        roles: Mapping[str, bool],
        placement: DeviceMap | None = None,
        attention: str | None = None,
        more_roles: Callable[[ShapeBackbone], None] = lambda backbone: None,
    ) -> None:
        try:
            # Model and roles are built on the meta device; the modules that PEFT and the learner add elsewhere follow.
            with torch.device("meta"):
                model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
        except ValueError as error:
            raise ModelError(f"backbone.context.attention = {attention} is not supported by this model: {error}") from error
        model.requires_grad_(False).eval()
        no_tokenizer = cast(PreTrainedTokenizerBase, None)
        loaded = LoadedModel(model, no_tokenizer, torch.device("meta"), "", (), 0, placement=placement)
        super().__init__(loaded, lora, "shapes")
        self.main = placement.main if placement else "cpu"
        self.meter: Footprint | None = None
        for role, head in roles.items():
            self.roles.add(role, head=head)
        more_roles(self)
        # All tensors are on the meta device; the footprint records the device on which each of them would be.
        self._to_meta()
        if placement is not None and not placement.is_whole:
            self._place(placement)

    role_set = ShapeRoles

    def _check_logits(self) -> None:
        """There are no logits to check."""

    @property
    def output_head(self) -> OutputHead:
        """The output layer as on the main device, where a tile of logits may have another size."""
        return replace(super().output_head, device=self.main.partition(":")[0])

    def _unread_layers(self, role: str) -> tuple[str, ...]:
        return ()

    def _fingerprint(self) -> str:
        return "shapes"

    def _to_meta(self) -> None:
        """Let what PEFT and the learner made elsewhere have shapes only; tied weights stay tied."""
        made: dict[int, Tensor] = {}

        def bare(tensor: Tensor) -> Tensor:
            if id(tensor) not in made:
                shape = tensor.detach().to("meta")
                made[id(tensor)] = nn.Parameter(shape, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else shape
            return made[id(tensor)]

        # Heads are not modules of the model.
        for module in [*self.model.modules(), *self.roles.heads.values()]:
            for held in (module._parameters, module._buffers):
                held.update({name: bare(value) for name, value in held.items() if value is not None and not value.is_meta})

    @property
    def shapes(self) -> AbstractContextManager[Any]:
        """A block in which new tensors have a shape only."""
        return _shapes()

    def _measure_sharing(self) -> bool:
        """Return whether attention reads layouts; the values, which the real backbone compares, do not exist here."""
        if not may_share(self.loaded):
            return False
        meter = self.meter
        with torch.no_grad(), _disable_current_modes(), self.shapes, self.footprint(), self.acting_as(BASE):
            block = LayoutBlock(self.model, uniform_layout(prompts=1, replies=2, prompt=2, reply=2))
            try:
                with block:
                    self._body(input_ids=block.layout.ids_1N, position_ids=block.layout.positions_1N)
            except FAILURES:
                return False
            finally:
                self.meter = meter
        return block.calls > 0

    def _place(self, placement: DeviceMap) -> None:
        """Let every part take its inputs to the device that computes it, as accelerate's hooks do."""
        beside = [name for name in placement.fixed if isinstance(_part(self.model, name), nn.Module)]
        for name in [*beside, *placement.layers]:
            self._move_inputs(self.model.get_submodule(name), self.computes(f"{name}."))

    def _move_inputs(self, part: nn.Module, device: str) -> None:
        def moved(value: Any) -> Any:
            if self.meter is None or not isinstance(value, Tensor) or (self.meter.device_of(value) or self.main) == device:
                return value
            return _Moved.apply(value, self.meter, device)  # type: ignore[no-untyped-call]

        def move(module: nn.Module, arguments: Any, options: Any) -> Any:
            return tree_map(moved, arguments), tree_map(moved, options)

        part.register_forward_pre_hook(move, with_kwargs=True)

    def keeps(self, name: str) -> str:
        """Return the device of a weight of the base."""
        placed = self.loaded.placement
        layers = zip(placed.layers, placed.devices, strict=True) if placed else ()
        return next((device for layer, device in layers if name.startswith(f"{layer}.")), self.main)

    def computes(self, name: str) -> str:
        """The device that computes with a weight and holds its adapters: its layer's, or the main one if that is streamed."""
        kept = self.keeps(name)
        return kept if computes(kept, self.main) else self.main

    @property
    def vocabulary(self) -> int:
        return int(self.model.get_output_embeddings().weight.shape[0])

    def adapters(self, roles: Iterable[str] | None = None) -> dict[str, list[nn.Parameter]]:
        """Weights of these roles (of all unless given), by device."""
        found: dict[str, list[nn.Parameter]] = {self.main: []}
        for role in self.roles.names if roles is None else roles:
            for name, parameter in self.roles.parameters(role).items():
                found.setdefault(self.computes(name), []).append(parameter)
        return found

    def base(self) -> dict[str, list[Tensor]]:
        """Weights and buffers of the base by device, tied ones once."""
        # The adapters are parameters of the model as well: leave them out.
        own = {id(p) for held in self.adapters().values() for p in held}
        found: dict[str, list[Tensor]] = {self.main: []}
        for name, tensor in [*self.model.named_parameters(), *self.model.named_buffers()]:
            if id(tensor) not in own:
                found.setdefault(self.keeps(name), []).append(tensor)
        return found

    def footprint(self) -> Footprint:
        """A counter that knows the weights and the gradients that are there; the newest one is notified of transfers."""
        self.meter = Footprint({}, self.vocabulary, self.main, on_shapes=True)
        for device, tensors in self.base().items():
            self.meter.know(tensors, "base", device)
        for device, adapters in self.adapters().items():
            self.meter.know(adapters, "adapters", device)
            self.meter.know((p.grad for p in adapters if p.grad is not None), "gradients", device)
        return self.meter


def _part(model: Any, name: str) -> Any:
    """The module or the loose tensor of that name."""
    for step in name.split("."):
        model = getattr(model, step)
    return model
