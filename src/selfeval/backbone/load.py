"""Load any Hugging Face causal language model, frozen, together with its tokenizer."""

from __future__ import annotations

import inspect
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers.utils import is_flash_attn_2_available

from selfeval.backbone.body import hidden_width
from selfeval.backbone.check import errors_of_model, read_parts
from selfeval.backbone.digests import check_finite
from selfeval.backbone.placement import DISK, DeviceMap, free_memory, plan_placement, usable_memory
from selfeval.backbone.precision import (
    PRECISIONS,
    OverflowGuard,
    load_arguments,
    pick_precision,
    settle_quantised,
    sixteen_bits,
)
from selfeval.backbone.rope import Stretch, check_stretch
from selfeval.backbone.sizes import weight_sizes
from selfeval.backbone.tokens import end_of_turn
from selfeval.backbone.weights import check_report
from selfeval.config import ContextConfig, PlacementConfig
from selfeval.errors import ModelError

__all__ = [
    "LoadedModel",
    "Wanted",
    "load_model",
    "memory_within",
    "pick_attention",
    "pick_device",
    "place_base",
]


@dataclass
class LoadedModel:
    """A frozen model, its tokenizer, and the facts that generation needs.

    Attributes:
        device: device of batches and heads.
        eos_ids: tokens that end a reply; empty if the model has none.
        pad_id: padding token. Padding is always masked, so any valid id works.
        notes: messages for the user about automatic choices and missing features.
        files: safetensors files of the weights; empty for a model created in memory.
        stretch: context extension (RoPE scaling), or None if the context is the trained one.
        placement: device of each part of the model, or None if no placement was planned.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    precision: str
    eos_ids: tuple[int, ...]
    pad_id: int
    notes: list[str] = field(default_factory=list)
    files: tuple[Path, ...] = ()
    stretch: Stretch | None = None
    placement: DeviceMap | None = None

    @property
    def hidden_size(self) -> int:
        return hidden_width(self.model)

    @property
    def context_length(self) -> int | None:
        if self.stretch:
            return self.stretch.reach
        config: Any = self.model.config.get_text_config()  # type: ignore[operator, union-attr]
        return next((int(n) for key in ("max_position_embeddings", "n_positions") if (n := getattr(config, key, None))), None)

    def forward_accepts(self, argument: str) -> bool:
        return argument in inspect.signature(self.model.forward).parameters


def pick_device(wanted: str) -> torch.device:
    """Resolve `wanted` (auto, cpu or cuda) to a device of this machine."""
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ModelError("backbone.device = cuda, but torch sees no CUDA device here; use backbone.device = auto or cpu")
    return torch.device(wanted)


def memory_within(free: Mapping[str, int], room: int | None) -> dict[str, int]:
    """Return the free bytes of every device that may hold the base, limited to `room` on all devices except disk."""
    return {name: size if room is None or name == DISK else min(size, room) for name, size in free.items()}


def _sum(memory: Mapping[str, int], device: torch.device) -> int:
    """Sum the bytes of all devices of the same type as `device`."""
    return sum(size for name, size in memory.items() if name.startswith(device.type))


def pick_attention(wanted: str, device: torch.device, precision: str) -> str | None:
    """Return the `attn_implementation` for transformers; None selects the default of the model family.

    Raises:
        ModelError: flash attention cannot run on this device, in this precision, or without its package.
    """
    if wanted == "flash_attention_2":
        problem = (
            "runs on a CUDA device only"
            if device.type != "cuda"
            else "takes bf16 or fp16 only"
            if precision == "fp32"
            else None
            if is_flash_attn_2_available()
            else "needs the package flash-attn (2.3.3 or later), which is not installed"
        )
        if problem:
            raise ModelError(
                f"backbone.context.attention = flash_attention_2 {problem} (device {device.type}, {precision}); use sdpa or "
                "auto"
            )
    return None if wanted == "auto" else wanted


def load_model(
    name: str,
    *,
    device: str = "auto",
    precision: str = "auto",
    trust_remote_code: bool = False,
    context: ContextConfig | None = None,
    placement: PlacementConfig | None = None,
    room: int | None = None,
) -> LoadedModel:
    """Load a model folder or hub id, frozen and in eval mode, onto the devices with enough memory.

    Args:
        name: model folder or hub id.
        device: auto, cpu or cuda. Default: auto.
        precision: precision of the base. Default: auto, which picks one that fits.
        trust_remote_code: run code that ships with the model. Default: False.
        context: optional context length and attention settings.
        placement: optional settings of the devices that may hold the model.
        room: optional limit in bytes per device. Default: all free memory.

    Raises:
        ModelError: the model is not found, is not a causal language model, has damaged files, does not support the
            requested context, or fits on no device.
    """
    target = pick_device(device)
    context, placement = context or ContextConfig(), placement or PlacementConfig()
    parts = read_parts(name, trust_remote_code=trust_remote_code, context=context)
    memory = memory_within(free_memory(target), room)
    # This reads all weight files; the fingerprint reuses the hashes.
    check_finite(parts.files, name)
    with errors_of_model(name):
        picked, why, plan = place_base(Wanted(name, parts.shell, device, precision, placement, memory), target)
        # The plan makes the CPU the main device if no GPU can hold the embeddings and the largest layer.
        target = target if plan is None else torch.device(plan.main)
        model, report = _from_files(
            name,
            plan,
            placement,
            config=parts.config,
            attn_implementation=pick_attention(context.attention, target, picked),
            **load_arguments(picked, target),
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
        )
        check_report(report, model, name)
    _settle(model, target, picked, whole=plan is None or plan.is_whole)
    loaded = _described(model, parts.tokenizer, target, picked, plan)
    loaded.files, loaded.stretch = parts.files, parts.stretch
    loaded.notes += parts.notes + ([why] if why else [])
    loaded.notes += _stretch_notes(model, parts.stretch, name) if parts.stretch else []
    return loaded


def _stretch_notes(model: Any, stretch: Stretch, name: str) -> list[str]:
    """Check that the model applies the context extension, and describe it."""
    note = check_stretch(model, stretch, name)
    return [
        f"context of {stretch.reach} tokens, trained on {stretch.trained} (RoPE scaling {stretch})",
        *([note] if note else []),
    ]


def _settle(model: Any, device: torch.device, precision: str, *, whole: bool) -> None:
    """Freeze the model, switch it to eval mode, move it to its device, and guard fp16 against overflow."""
    model.requires_grad_(False)
    model.eval()
    # Quantised and spread models were put on their devices by from_pretrained; only a whole plain one has to be moved.
    if PRECISIONS[precision].quantised:
        settle_quantised(model)
    elif whole:
        model.to(device)
    if precision == "fp16":
        OverflowGuard(model)


@dataclass(frozen=True)
class Wanted:
    """Inputs to the choice of precision and placement.

    Attributes:
        name: name of the model, for messages.
        model: the model on the meta device.
        device: auto, cpu or cuda.
        precision: a precision, or auto.
        placement: devices that may hold the model.
        memory: free bytes by device, in order of preference.
    """

    name: str
    model: nn.Module
    device: str
    precision: str
    placement: PlacementConfig
    memory: Mapping[str, int]

    def size(self, precision: str) -> int:
        return weight_sizes(self.model, precision).total

    def plan(self, precision: str) -> DeviceMap | None:
        """Plan the placement, or return None if the model must be on a single device."""
        if self.placement.mode == "single":
            return None
        plan = plan_placement(self.model, usable_memory(self.memory, self.placement), precision)
        if self.device == "cuda" and plan.main == "cpu":
            raise ModelError(
                "backbone.device = cuda, but no card has room for even one layer of this model; free memory or use "
                "backbone.device = auto"
            )
        return plan


def place_base(wanted: Wanted, target: torch.device) -> tuple[str, str | None, DeviceMap | None]:
    """Choose precision and placement; used by both loading and dry-run planning.

    Args:
        wanted: the model and the memory available for it.
        target: type of the compute device.

    Returns:
        The precision, the reason if it was chosen automatically, and the placement.

    Raises:
        ModelError: the model does not fit.
    """
    picked, why = pick_precision(wanted.precision, target, wanted.size, _sum(wanted.memory, target))
    plan = wanted.plan(picked)
    if _can_hold(picked, plan):
        return picked, why, plan
    picked, why = _spread_instead(wanted.name, wanted.precision, picked, target)
    return picked, why, wanted.plan(picked)


def _can_hold(precision: str, plan: DeviceMap | None) -> bool:
    """Whether the placement supports the precision: quantised weights need one whole device or GPUs only."""
    if plan is None or plan.is_whole or not PRECISIONS[precision].quantised:
        return True
    return all(device.startswith("cuda") for device in plan.devices)


def _spread_instead(name: str, wanted: str, precision: str, device: torch.device) -> tuple[str, str]:
    """Fall back to a precision that can be spread over RAM and disk.

    Raises:
        ModelError: the user requested the quantised precision explicitly.
    """
    if wanted != "auto":
        raise ModelError(
            f"{name} in {precision} fits on no device as a whole; use backbone.precision = bf16, which can be spread over "
            "several"
        )
    other = sixteen_bits(device)
    return other, f"precision {other} was picked: not even {precision} fits on one device, and only plain weights can be spread"


def _from_files(name: str, plan: DeviceMap | None, placement: PlacementConfig, **options: Any) -> tuple[Any, dict[str, Any]]:
    """Load the model and transformers' report; offloaded weights are read from the model's own files where possible."""
    folder = None
    if plan is not None and not plan.is_whole:
        options["device_map"] = plan.for_transformers()
    if plan is not None and DISK in plan.devices:
        if placement.folder:
            Path(placement.folder).mkdir(parents=True, exist_ok=True)
        folder = tempfile.mkdtemp(prefix="selfeval-weights-", dir=placement.folder or None)
        options["offload_folder"] = folder
    try:
        model, report = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **options)
    except BaseException:
        # Also on Ctrl-C, because offloaded weights are large.
        if folder is not None:
            shutil.rmtree(folder)
        raise
    if folder is not None:
        # The offloaded files are read as long as the model exists.
        weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)
    return model, report


def _described(
    model: Any, tokenizer: PreTrainedTokenizerBase, device: torch.device, precision: str, plan: DeviceMap | None
) -> LoadedModel:
    notes = [] if plan is None or plan.is_whole else [plan.sentence()]
    eos = _eos_ids(model, tokenizer, notes)
    if not eos:
        notes.append("this model has no end-of-sequence token; replies end only at the token limit")
    pad = tokenizer.pad_token_id
    if pad is None or pad >= model.get_input_embeddings().weight.shape[0]:
        problem = "this tokenizer has no padding token" if pad is None else f"this model has no padding token {pad}"
        pad = eos[0] if eos else 0
        notes.append(f"{problem}; token {pad} is used for padding instead (it is masked everywhere)")
    return LoadedModel(model, tokenizer, device, precision, eos, int(pad), notes, placement=plan)


def _eos_ids(model: Any, tokenizer: PreTrainedTokenizerBase, notes: list[str]) -> tuple[int, ...]:
    """Collect the tokens that end a reply, with the token the model itself writes in first position."""
    generation = getattr(model, "generation_config", None)
    turn = None if hasattr(tokenizer, "stop_ids") else end_of_turn(tokenizer)
    found: list[int] = [] if turn is None or turn.id is None else [turn.id]
    for value in (
        tokenizer.eos_token_id,
        getattr(generation, "eos_token_id", None),
        getattr(model.config, "eos_token_id", None),
        list(getattr(tokenizer, "stop_ids", ())),
    ):
        found += [] if value is None else value if isinstance(value, list) else [value]
    # Configs may name tokens for which the embedding has no row.
    size = model.get_input_embeddings().weight.shape[0]
    ids = tuple(dict.fromkeys(int(i) for i in found if 0 <= int(i) < size))
    if turn is not None and turn.id is None:
        notes.append(
            f"the chat template ends a reply with {turn.text}, which is not a token of this tokenizer; replies end only at "
            f"{', '.join(map(repr, tokenizer.convert_ids_to_tokens(list(ids)))) or 'the token limit'}"
        )
    return ids
