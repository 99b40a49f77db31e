"""Watchdogs: small checks of one iteration's numbers that name what went wrong and what to do about it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from selfeval.config import PolicyConfig

__all__ = ["Alarm", "check_iteration"]


@dataclass(frozen=True)
class Alarm:
    """What a watchdog saw; `action` is `warn` or `stop`."""

    step: int
    name: str
    message: str
    action: str

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def check_iteration(values: Mapping[str, float], first: Mapping[str, float], config: PolicyConfig) -> list[Alarm]:
    """The warnings that one iteration's metrics give.

    Args:
        values: metrics of this iteration.
        first: metrics of the first one.
        config: the targets.
    """
    step = int(values["step"])
    found = []
    broken = sorted(name for name, value in values.items() if not math.isfinite(value))
    if broken:
        found.append(Alarm(step, "not_finite", f"{', '.join(broken)} is NaN or infinite; lower the learning rates", "stop"))
    if values["first_ratio"] > 0.02:
        gap = values["first_ratio"]
        found.append(
            Alarm(step, "ratio_not_one", f"before any update the policy's probabilities differ from the sampled ones by {gap:.3f}; sampling and scoring disagree", "warn")
        )
    if values["kl"] < -0.5:
        found.append(Alarm(step, "negative_kl", f"KL to the reference is {values['kl']:.2f}; sampled and scored distributions differ", "warn"))
    if values["kl"] > 5 * config.kl_target:
        found.append(Alarm(step, "kl_runaway", f"KL {values['kl']:.1f} is more than 5 times its target {config.kl_target}", "warn"))
    ratio = values["length"] / max(1.0, first["length"])
    if not 0.5 <= ratio <= 2.0:
        found.append(Alarm(step, "length_drift", f"replies are {ratio:.2f} times as long as at the start", "warn"))
    if values["entropy"] < 0.02 * max(first["entropy"], 1e-9):
        found.append(Alarm(step, "entropy_collapse", f"entropy fell to {values['entropy']:.4f} nats per token", "warn"))
    return found
