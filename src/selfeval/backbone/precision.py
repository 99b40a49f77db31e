"""The precision of the frozen base: which there are, which one fits, and what goes wrong in half precision.

Adapters, heads, optimizer states and log-prob sums are fp32 whatever the base is. `int8` is LLM.int8() (Dettmers et al. 2022,
https://arxiv.org/abs/2208.07339) and `nf4` is 4-bit NormalFloat with double quantisation (QLoRA, Dettmers et al. 2023,
https://arxiv.org/abs/2305.14314), both from bitsandbytes: the decoder's linear layers are quantised; embeddings, norms and the
output layer stay in 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import is_bitsandbytes_available

from selfeval.backbone.body import text_body
from selfeval.errors import LoopError, ModelError
from selfeval.texts import format_bytes

__all__ = [
    "DTYPES",
    "PRECISIONS",
    "OverflowGuard",
    "Precision",
    "compute_dtype",
    "load_arguments",
    "pick_precision",
    "settle_quantised",
    "sixteen_bits",
]


@dataclass(frozen=True)
class Precision:
    """One way to hold the base.

    Attributes:
        plain_bytes: of a number in a weight that is not packed.
        quantised: whether linear layers are packed by bitsandbytes (`sizes.py` says which, and what they take then).
    """

    name: str
    plain_bytes: int
    quantised: bool = False


PRECISIONS = {
    p.name: p
    for p in (
        Precision("fp32", 4),
        Precision("bf16", 2),
        Precision("fp16", 2),
        Precision("int8", 2, quantised=True),
        Precision("nf4", 2, quantised=True),
    )
}
"""All precisions, by name."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Of the plain precisions, in which weights are numbers."""
_ROOM = 1.25
"""A base fits when so many times its bytes are free: activations, adapters and the cache need room as well."""


def compute_dtype(precision: str) -> torch.dtype:
    """Return the dtype of hidden states, assuming a device with bf16: quantised weights are dequantised to 16 bits."""
    return DTYPES.get(precision, torch.bfloat16)


def sixteen_bits(device: torch.device) -> str:
    """The plain half precision of a device: bf16, or fp16 on a card that is too old for it."""
    old = device.type == "cuda" and torch.cuda.is_available() and not torch.cuda.is_bf16_supported()
    return "fp16" if old else "bf16"


def _preferred(device: torch.device) -> Sequence[str]:
    """Best first; quantised ones last, for they are slower."""
    return (*(["fp32"] if device.type != "cuda" else []), sixteen_bits(device), "int8", "nf4")


def pick_precision(wanted: str, device: torch.device, size: Callable[[str], int], free: int) -> tuple[str, str | None]:
    """The precision to load with, and a sentence about why when it was picked.

    Args:
        wanted: a precision, or `auto`: the first of fp32 (not on a GPU), bf16 (fp16 on an old GPU), int8, nf4 that fits.
        device: where the base will be.
        size: bytes that the base takes in a precision; asked only where there is a choice.
        free: bytes that are free there.
    """
    if wanted != "auto":
        return wanted, None
    preferred = _preferred(device)
    usable = [n for n in preferred if not PRECISIONS[n].quantised or is_bitsandbytes_available()]
    # If none fits, take the last: the placement may still spread it over several devices.
    fitting = next((n for n in usable if size(n) * _ROOM <= free), usable[-1])
    if fitting == preferred[0]:
        return fitting, None
    sizes = ", ".join(f"{format_bytes(size(n))} in {n}" for n in preferred)
    return fitting, f"precision {fitting} was picked: {format_bytes(free)} are free on {device}, the base takes {sizes}"


def load_arguments(precision: str, device: torch.device) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` for this precision.

    Raises:
        ModelError: a quantised one without bitsandbytes.
    """
    if not PRECISIONS[precision].quantised:
        return {"dtype": DTYPES[precision]}
    if not is_bitsandbytes_available():
        raise ModelError(
            f"backbone.precision = {precision} needs bitsandbytes: pip install 'self-evaluator[quantised]', or use bf16"
        )
    dtype = DTYPES[sixteen_bits(device)]
    quantisation = BitsAndBytesConfig(
        load_in_8bit=precision == "int8",
        load_in_4bit=precision == "nf4",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"dtype": dtype, "quantization_config": quantisation, "device_map": {"": device}}


def settle_quantised(model: Any) -> None:
    """Keep 4-bit weights as they were loaded.

    On some CPUs bitsandbytes would repack them in the first pass without gradients: into a layout that needs sizes divisible
    by 32 and that a later pass with gradients would have to undo.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


class OverflowGuard:
    """Stops a pass whose hidden states left the range of fp16, and names the layer where it happened.

    Each decoder layer's result is looked at without waiting for it; only the end of the pass waits, once.
    """

    def __init__(self, model: Any) -> None:
        self._finite: dict[str, Tensor] = {}
        for name, module in model.named_modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.register_forward_hook(self._watch(name))
        text_body(model).register_forward_hook(self._check)

    def _watch(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            states = output[0] if isinstance(output, tuple) else output
            self._finite[name] = states.detach().isfinite().all()

        return hook

    def _check(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if bool(output.last_hidden_state.detach().isfinite().all()):
            return
        where = next((name for name, finite in self._finite.items() if not finite), "the final norm")
        raise LoopError(
            f"numbers overflowed fp16 (largest 65504) in {where}; this base needs a wider range: use "
            "backbone.precision = bf16 or fp32"
        )
