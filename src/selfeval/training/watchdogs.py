"""Watchdogs: small checks of one iteration's numbers that name what went wrong and what to do about it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from selfeval.config import PolicyConfig
from selfeval.errors import NotFiniteError

__all__ = ["Alarm", "check_iteration", "not_finite", "refuse_broken"]


@dataclass(frozen=True)
class Alarm:
    """What a watchdog saw; `action` is `warn`, `roll_back` (to the last good checkpoint) or `stop`."""

    step: int
    name: str
    message: str
    action: str

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def refuse_broken(values: Mapping[str, float]) -> None:
    """Refuses numbers that broke.

    Raises:
        NotFiniteError: some are NaN or infinite; `explained_variance` may be, where returns do not vary.
    """
    broken = sorted(name for name, value in values.items() if name != "explained_variance" and not math.isfinite(value))
    if broken:
        raise NotFiniteError(", ".join(broken))


def not_finite(step: int, what: str) -> Alarm:
    """The alarm about numbers that broke."""
    return Alarm(step, "not_finite", f"{what} is NaN or infinite; lower the learning rates", "roll_back")


def check_iteration(values: Mapping[str, float], first: Mapping[str, float], config: PolicyConfig) -> list[Alarm]:
    """The warnings that one iteration's metrics give.

    Args:
        values: metrics of this iteration.
        first: metrics of the first one.
        config: the targets.
    """
    step, found = int(values["step"]), []
    try:
        refuse_broken(values)
    except NotFiniteError as error:
        found.append(not_finite(step, str(error)))
    kl, gap = values["kl"], values["first_ratio"]
    if gap > 0.02:
        message = (
            f"before any update the policy's probabilities are {gap:.3f} off the sampled ones; sampling and scoring disagree"
        )
        found.append(Alarm(step, "ratio_not_one", message, "warn"))
    if kl < -0.5:
        message = f"KL to the reference is {kl:.2f}; the sampled and the scored distribution differ"
        found.append(Alarm(step, "negative_kl", message, "warn"))
    if kl > 5 * config.kl_target:
        message = f"KL {kl:.1f} is more than 5 times its target {config.kl_target}"
        found.append(Alarm(step, "kl_runaway", message, "warn"))
    ratio = values["length"] / max(1.0, first["length"])
    if not 0.5 <= ratio <= 2.0:
        found.append(Alarm(step, "length_drift", f"replies are {ratio:.2f} times as long as at the start", "warn"))
    if values["entropy"] < 0.02 * max(first["entropy"], 1e-9):
        found.append(Alarm(step, "entropy_collapse", f"entropy fell to {values['entropy']:.4f} nats per token", "warn"))
    return found
