"""The arithmetic of a memory plan: bytes by phase and kind, what quantised weights take, and the most that fits a budget.

A peak is `base + adapters + gradients + optimizer + KV cache + activations + logits` at a phase's fullest moment.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from selfeval.backbone.facts import ModelFacts

__all__ = ["DTYPES", "KINDS", "PHASES", "Plan", "Weights", "at_depth", "largest_fitting", "weigh"]

PHASES = ("load", "rollout", "score", "update")
KINDS = ("base", "adapters", "gradients", "optimizer", "kv_cache", "activations", "logits")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.bfloat16, "nf4": torch.bfloat16}
"""Precision -> what hidden states are computed in."""


@dataclass(frozen=True)
class Weights:
    """What a base takes.

    Attributes:
        parameters: numbers, tied ones once.
        bytes: of weights and buffers as they lie in memory.
        unpacked: of the largest quantised matrix once it is unpacked for its product; 0 where nothing is quantised.
    """

    parameters: int
    bytes: int
    unpacked: int


def weigh(facts: ModelFacts, precision: str) -> Weights:
    """Counts a model's weights on the meta device.

    int8 and nf4 hold the decoder's linear layers (not embeddings, not the output layer) as bitsandbytes does: int8 with one
    fp32 scale a row (Dettmers et al. 2022, https://arxiv.org/abs/2208.07339); nf4 with half a byte a weight, one byte of scale
    per 64 of them and one fp32 scale per 256 of those (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314). The rest is
    bf16.
    """
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(facts.config, dtype=DTYPES[precision])
    head = model.get_output_embeddings()
    packed = {id(m.weight): m.weight for m in model.modules() if isinstance(m, nn.Linear) and m is not head}
    packed = packed if precision in ("int8", "nf4") else {}
    parameters = list(model.parameters())
    plain = sum(t.numel() * t.element_size() for t in [*parameters, *model.buffers()] if id(t) not in packed)
    small = sum(_packed_bytes(w.shape[0], w.shape[1], precision) for w in packed.values())
    unpacked = max((w.numel() * w.element_size() for w in packed.values()), default=0)
    return Weights(sum(p.numel() for p in parameters), plain + small, unpacked)


def _packed_bytes(rows: int, columns: int, precision: str) -> int:
    if precision == "int8":
        return rows * columns + 4 * rows
    blocks = -(-rows * columns // 64)
    return -(-rows * columns // 2) + blocks + 4 * -(-blocks // 256)


def at_depth(small: Mapping[str, int], large: Mapping[str, int], depths: tuple[int, int], depth: int) -> Counter[str]:
    """Bytes by kind of a model with `depth` equal layers, from those of two shallower ones: they grow by so much a layer."""
    low, high = depths
    slope = {kind: (large.get(kind, 0) - small.get(kind, 0)) / (high - low) for kind in {*small, *large}}
    return Counter({kind: round(small.get(kind, 0) + slope[kind] * (depth - low)) for kind in slope})


def largest_fitting(measure: Callable[[int], int], wanted: int, budget: int | None) -> int:
    """The largest n <= wanted with measure(n) <= budget; 0 where even one is too much.

    Args:
        measure: bytes that n rows take; grows with n.
        wanted: at least 1.
        budget: bytes, None for no limit.
    """
    if budget is None or measure(wanted) <= budget:
        return wanted
    low, high = 1, wanted
    if measure(low) > budget:
        return 0
    while high - low > 1:
        share = (budget - measure(low)) / (measure(high) - measure(low))
        guess = min(max(low + int(share * (high - low)), low + 1), high - 1)
        if measure(guess) > budget:
            high = guess
        elif measure(guess + 1) > budget:
            return guess
        else:
            low = guess + 1
    return low


@dataclass(frozen=True)
class Plan:
    """What a run would take, and with which settings.

    Attributes:
        device: `cpu` or `cuda`; the figures are of its memory.
        budget: bytes that may be taken there, None where nothing limits them.
        phases: phase -> kind -> bytes at that phase's fullest moment, with these settings.
        settings: values of the configuration that the plan has chosen.
        workload: tokens and rows that it was made for.
        fits: every phase is within the budget.
        changes: sentences: what was changed to make it fit, or what would have to change.
    """

    model: str
    parameters: int
    precision: str
    device: str
    budget: int | None
    phases: Mapping[str, Mapping[str, int]]
    settings: Mapping[str, Any]
    workload: Mapping[str, int]
    fits: bool
    changes: tuple[str, ...]

    def total(self, phase: str) -> int:
        return sum(self.phases[phase].values())

    @property
    def peak(self) -> int:
        """Bytes of the fullest phase."""
        return max(self.total(phase) for phase in self.phases)

    def as_json(self) -> dict[str, Any]:
        """The plan as JSON: schema 1, sizes in bytes."""
        rows = {p: {**{k: int(self.phases[p].get(k, 0)) for k in KINDS}, "total": self.total(p)} for p in PHASES}
        return {
            "schema": 1,
            "model": self.model,
            "parameters": self.parameters,
            "precision": self.precision,
            "fits": self.fits,
            "devices": [{"device": self.device, "budget_bytes": self.budget, "peak_bytes": self.peak, "phases": rows}],
            "settings": dict(self.settings),
            "workload": dict(self.workload),
            "changes": list(self.changes),
        }
