"""Controllers of the KL coefficient: fixed, adaptive, or the Lagrange multiplier of a constraint on the KL."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from selfeval.algorithms.controllers import adaptive_kl_coefficient, dual_kl_coefficient
from selfeval.config import PolicyConfig

__all__ = ["KLControl"]

_GAIN = 1.0
"""Proportional gain of the dual controller: change of log beta at a relative error of 1."""


class KLControl:
    """Adapt the KL coefficient to hold the KL to the reference at its target.

    With the relative error e = clip(KL / target - 1, -1, 1/2) of an iteration:

        adaptive   beta <- beta (1 + clip(e, -0.2, 0.2) min(1, samples / kl_horizon))
        dual       log lambda <- log lambda + kl_rate e,   beta = lambda exp(e)

    The upper end of the clip limits integral windup: the KL is heavy-tailed, and a few outlier replies would drive the
    multiplier up. The multiplier alone (integral control) oscillates, because the policy responds with a lag of some
    iterations; the proportional factor exp(e) responds at once and damps the oscillation, as in Stooke et al. 2020, section 5
    (https://arxiv.org/abs/2007.03964). lambda is frozen until the KL first reaches its target, or for a third of the training
    at most: while the KL is still rising from 0 the negative error would wind lambda down, and the KL would overshoot. The
    initial lambda makes beta equal to `kl_coefficient` at a KL of 0.

    Args:
        config: controller, target and rates.
    """

    def __init__(self, config: PolicyConfig) -> None:
        self.config = config
        self.coefficient = config.kl_coefficient
        # At a KL of 0 the error is -1, so beta = lambda exp(-gain); this makes it equal to `kl_coefficient`.
        self.multiplier = config.kl_coefficient * math.exp(_GAIN)
        # A third of the iterations, rounded up.
        self.waiting = -(-config.iterations // 3)

    def update(self, kl: float, samples: int) -> None:
        """Update the coefficient with an iteration's mean KL in nats per reply over `samples` replies."""
        config = self.config
        if config.kl_control == "adaptive":
            self.coefficient = adaptive_kl_coefficient(
                self.coefficient, kl, target=config.kl_target, horizon=config.kl_horizon, samples=samples
            )
        elif config.kl_control == "dual":
            self._update_multiplier(max(-1.0, min(kl / config.kl_target - 1, 0.5)))

    def _update_multiplier(self, error: float) -> None:
        target, rate = self.config.kl_target, self.config.kl_rate
        self.waiting = 0 if error >= 0 else max(0, self.waiting - 1)
        if not self.waiting:
            # The clipped error is passed as a KL: (target (1 + e) - target) rate / target = rate e.
            self.multiplier = dual_kl_coefficient(
                self.multiplier, target * (1 + error), target=target, learning_rate=rate / target
            )
        self.coefficient = self.multiplier * math.exp(_GAIN * error)

    def as_json(self) -> dict[str, float]:
        return {"coefficient": self.coefficient, "multiplier": self.multiplier, "waiting": self.waiting}

    def load(self, state: Mapping[str, Any]) -> None:
        self.coefficient, self.multiplier = float(state["coefficient"]), float(state["multiplier"])
        self.waiting = int(state["waiting"])
