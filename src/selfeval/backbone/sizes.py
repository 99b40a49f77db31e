"""How many bytes each weight of a base takes in a precision: the one rule that loading, placing and planning share.

int8 and nf4 are bitsandbytes' layouts. It packs the matrices that transformers selects: every `nn.Linear` and every
`Conv1D` (GPT-2's linear layer, which stores its matrix transposed), but not the output layer, tied weights, the last module, or
what the family keeps in fp32. Experts that are one fused parameter are no module of theirs, and stay in 16 bits.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from selfeval.backbone.precision import PRECISIONS

__all__ = ["WeightSizes", "weight_sizes"]

_BLOCK, _OUTER_BLOCK = 64, 256
"""nf4: weights that share a scale, and scales that share one (QLoRA, https://arxiv.org/abs/2305.14314, section 3)."""
_TABLES = 4 * (16 + 256 + 1)
"""nf4 keeps for every matrix the 16 values of a weight, the 256 of a scale, and the scales' mean, in fp32."""


@dataclass(frozen=True)
class WeightSizes:
    """Size of a base.

    Attributes:
        bytes: bytes of each parameter and buffer in memory, by name; tied ones count once.
        numbers: number of elements in the parameters; tied ones count once.
        unpacked: bytes of the largest packed matrix while it is unpacked for its product; 0 where nothing is packed.
    """

    bytes: dict[str, int]
    numbers: int
    unpacked: int

    @property
    def total(self) -> int:
        return sum(self.bytes.values())

    def within(self, module: str) -> int:
        """Bytes of one module of the model, by its name."""
        return sum(size for name, size in self.bytes.items() if name.startswith(f"{module}."))


def weight_sizes(model: nn.Module, precision: str) -> WeightSizes:
    """Count the weights of a model, which may be on the meta device and of any precision itself.

    Args:
        model: of transformers.
        precision: fp32, bf16, fp16, int8 or nf4.
    """
    packed = _packed_weights(model) if PRECISIONS[precision].quantised else {}
    plain = PRECISIONS[precision].plain_bytes
    parameters = dict(model.named_parameters())
    fp32 = _kept_in_fp32(model, precision)
    sizes = {
        name: p.numel() * (p.element_size() if not p.is_floating_point() else 4 if name in fp32 else plain)
        for name, p in parameters.items()
    }
    sizes |= {name: _packed_bytes(*shape, precision) for name, shape in packed.items()}
    sizes |= {name: b.numel() * b.element_size() for name, b in model.named_buffers()}
    largest = max((rows * columns for rows, columns in packed.values()), default=0)
    return WeightSizes(sizes, sum(p.numel() for p in parameters.values()), plain * largest)


def _kept_in_fp32(model: Any, precision: str) -> set[str]:
    """Names of the parameters that transformers loads in fp32 whatever was asked for; newer releases add routers of experts."""
    if precision == "fp32":
        return set()
    # Two lists: one for 16 bits of either kind, one for fp16 alone.
    patterns = set(model._keep_in_fp32_modules_strict or ())
    if precision == "fp16":
        patterns |= set(model._keep_in_fp32_modules or ())
    kept = [re.compile(pattern.replace("*", ".*")) for pattern in patterns]
    return {name for name, _ in model.named_parameters() if any(pattern.search(name) for pattern in kept)}


def _packed_weights(model: Any) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of the matrices that bitsandbytes packs, by the weight's name; transformers' own choice of modules."""
    kept = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    found = {}
    for name, module in model.named_modules():
        if (type(module) is nn.Linear or isinstance(module, Conv1D)) and should_convert_module(name, kept):
            weight: Tensor = module.weight
            rows, columns = weight.shape if isinstance(module, nn.Linear) else weight.T.shape
            found[f"{name}.weight"] = (int(rows), int(columns))
    return found


def _packed_bytes(rows: int, columns: int, precision: str) -> int:
    """int8: a byte a weight, an fp32 scale a row (https://arxiv.org/abs/2208.07339, section 3). nf4: half a byte a weight, a
    byte of scale a block, an fp32 scale for 256 of those.
    """
    if precision == "int8":
        return rows * columns + 4 * rows
    # -(-a // b) rounds up.
    blocks = -(-rows * columns // _BLOCK)
    return -(-rows * columns // 2) + blocks + 4 * -(-blocks // _OUTER_BLOCK) + _TABLES
