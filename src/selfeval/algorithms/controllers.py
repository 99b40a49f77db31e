"""Controllers: coefficients that are adapted to the measurements of the last step. Plain floats, no tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

__all__ = [
    "AdamState",
    "adam_update",
    "adaptive_kl_coefficient",
    "direct_temperature",
    "dual_kl_coefficient",
    "dual_temperature",
]

_SMALLEST, _LARGEST = 1e-300, 1e300
"""Bounds of all coefficients: they stay positive, and a product with a moderate factor does not overflow."""


def adaptive_kl_coefficient(
    coefficient: float, kl: float, *, target: float, horizon: int, samples: int, error_clip: float = 0.2
) -> float:
    """Adjust the KL penalty coefficient to move the KL towards its target.

    e = clip(KL / target − 1, ± error_clip),   β ← β (1 + e · min(1, samples / horizon))

    A proportional controller in log β: it raises the penalty if the policy is too far from the reference, and lowers it if it
    is too close. One update changes β by at most the factor 1 ± error_clip. Without the limit on samples / horizon, a horizon
    shorter than samples · error_clip would make β negative and reward the policy for leaving its reference. Ziegler et al.
    2019, section 2.2 (https://arxiv.org/abs/1909.08593), whose gain K_β is samples / horizon here.

    Args:
        coefficient: current β in reward per nat, > 0.
        kl: measured KL(π‖π_ref) per reply in nats; a small negative estimate is allowed.
        target: target KL per reply in nats, > 0.
        horizon: number of replies in which β can change by a factor of about exp(error_clip), > 0; 10000 is usual.
        samples: number of replies of this measurement (not 1 per update), >= 0.
        error_clip: bound on the relative error, in (0, 1). Default: 0.2, as in the paper.

    Returns:
        The new coefficient, within [1e-300, 1e300].

    Raises:
        ValueError: coefficient, target or horizon is not positive, samples is negative, error_clip is outside (0, 1), or
            the KL is not finite.

    Example:
        >>> adaptive_kl_coefficient(0.1, 12.0, target=6.0, horizon=1000, samples=100)
        0.10200000000000001
    """
    if target <= 0 or horizon <= 0:
        raise ValueError(f"target and horizon must be positive, got target {target} and horizon {horizon}")
    if not (coefficient > 0 and samples >= 0 and 0 < error_clip < 1):
        raise ValueError(
            f"coefficient must be > 0, samples >= 0 and error_clip in (0, 1), got {coefficient}, {samples} and {error_clip}"
        )
    if not math.isfinite(kl):
        raise ValueError(f"the measured KL must be finite, got {kl}: look for NaN in the log-probs")
    # Clip the relative error: a single noisy KL estimate must not move the coefficient far.
    error = max(-error_clip, min(kl / target - 1, error_clip))
    return _held(coefficient * (1 + error * min(1.0, samples / horizon)))


def dual_kl_coefficient(coefficient: float, kl: float, *, target: float, learning_rate: float) -> float:
    """Update the KL coefficient as the Lagrange multiplier of the constraint KL <= target.

    log β ← log β + lr (KL − target)

    Gradient ascent on the dual, in log β to keep β positive. Unlike in `adaptive_kl_coefficient`, the step is proportional to
    the distance from the target in nats, without a clip. Abdolmaleki et al. 2018 (https://arxiv.org/abs/1806.06920).

    Args:
        coefficient: current β in reward per nat, > 0.
        kl: measured KL(π‖π_ref) in nats.
        target: target KL in nats, > 0.
        learning_rate: change of log β per nat of excess, > 0.

    Returns:
        The new coefficient, within [1e-300, 1e300].

    Raises:
        ValueError: coefficient, target or learning_rate is not positive, or the KL is not finite.

    Example:
        >>> round(dual_kl_coefficient(0.1, 8.0, target=6.0, learning_rate=0.05), 6)
        0.110517
    """
    if coefficient <= 0 or target <= 0:
        raise ValueError(f"coefficient and target must be positive, got {coefficient} and {target}")
    return _exp(math.log(coefficient) + _step(kl - target, learning_rate))


def dual_temperature(
    temperature: float, entropy: float, *, target: float, learning_rate: float, parameter: Literal["log", "exp"] = "log"
) -> float:
    """Adjust the temperature of soft Q-learning or SAC to move the entropy towards its target.

    log:  log α ← log α − lr (H − H̄)            gradient of log α · (H − H̄)
    exp:  log α ← log α − lr α (H − H̄)          gradient of α · (H − H̄) with α = exp(log α)

    If the entropy is too low, α increases. "exp" is the paper's objective; its steps are proportional to α, so a small
    temperature hardly changes. Public code uses both. To regularise towards a reference, pass −KL as the entropy and −(target
    KL) as the target. Haarnoja et al. 2018, eq. 18 (https://arxiv.org/abs/1812.05905).

    Args:
        temperature: current α in reward per nat, > 0.
        entropy: measured entropy H in nats.
        target: target entropy H̄ in nats.
        learning_rate: change of log α per nat, > 0.
        parameter: "log" or "exp".

    Returns:
        The new temperature, within [1e-300, 1e300].

    Raises:
        ValueError: temperature or learning_rate is not positive, the entropy is not finite, or the name is unknown.
    """
    if temperature <= 0 or parameter not in ("log", "exp"):
        raise ValueError(f"temperature must be > 0 and parameter 'log' or 'exp', got {temperature} and {parameter!r}")
    _step(target - entropy, learning_rate)  # validates the arguments
    # Chain rule: α · (H − H̄) as a function of log α has the additional factor dα / d log α = α.
    scale = temperature if parameter == "exp" else 1.0
    return _exp(math.log(temperature) + learning_rate * (scale * (target - entropy)))


def direct_temperature(temperature: float, entropy: float, *, target: float, learning_rate: float) -> float:
    """Update the temperature itself instead of its logarithm: α ← max(0, α − lr (H − H̄)).

    This is the projected dual step. Unlike in log α, the temperature can reach 0 and leave it again. Haarnoja et al. 2018, eq.
    17 (https://arxiv.org/abs/1812.05905).

    Args:
        temperature: current α in reward per nat, >= 0.
        entropy: measured entropy H in nats.
        target: target entropy H̄ in nats.
        learning_rate: change of α per nat, > 0.

    Returns:
        The new temperature, within [0, 1e300].

    Raises:
        ValueError: temperature is negative, learning_rate is not positive, or the entropy is not finite.
    """
    if temperature < 0:
        raise ValueError(f"temperature must be >= 0, got {temperature}")
    return min(max(0.0, temperature + _step(target - entropy, learning_rate)), _LARGEST)


@dataclass(frozen=True)
class AdamState:
    """Adam state of a scalar: moving averages of the gradient and its square, and the number of updates."""

    mean: float = 0.0
    square: float = 0.0
    updates: int = 0


def adam_update(
    parameter: float,
    gradient: float,
    state: AdamState,
    *,
    learning_rate: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> tuple[float, AdamState]:
    """Take an Adam step on a scalar, such as log α with the gradient H − H̄ (or α (H − H̄) for "exp").

    m ← β1 m + (1 − β1) g,   v ← β2 v + (1 − β2) g²,   x ← x − lr m̂ / (√v̂ + eps),   m̂ = m / (1 − β1ᵗ), v̂ = v / (1 − β2ᵗ)

    The size of a step is about lr, whatever the scale of the gradient. Kingma and Ba 2015, algorithm 1
    (https://arxiv.org/abs/1412.6980).

    Args:
        parameter: current x.
        gradient: gradient of the minimised objective with respect to x; clipped to ±1e150, whose square is finite.
        state: state returned by the previous update; `AdamState()` initially.
        learning_rate: lr in units of x, > 0.
        betas: decay rates of the two moving averages, each in [0, 1).
        eps: added to the square root, > 0.

    Returns:
        The new parameter and the new state.

    Raises:
        ValueError: learning_rate is not positive, or the gradient is not finite.
    """
    _step(gradient, learning_rate)  # validates before a NaN can enter the state
    gradient = min(max(gradient, -1e150), 1e150)
    updates = state.updates + 1
    mean = betas[0] * state.mean + (1 - betas[0]) * gradient
    square = betas[1] * state.square + (1 - betas[1]) * gradient**2
    # Bias correction: both averages start at 0, and are too small by the factor 1 − βᵗ after t updates.
    step = mean / (1 - betas[0] ** updates) / (math.sqrt(square / (1 - betas[1] ** updates)) + eps)
    return parameter - learning_rate * step, AdamState(mean, square, updates)


def _exp(logarithm: float) -> float:
    """Compute exp clipped to [1e-300, 1e300]; `math.exp` raises OverflowError above 709.8 and returns 0 below −745.1."""
    return math.exp(min(max(logarithm, math.log(_SMALLEST)), math.log(_LARGEST)))


def _held(weight: float) -> float:
    return min(max(weight, _SMALLEST), _LARGEST)


def _step(amount: float, learning_rate: float) -> float:
    """Return the step after validating its factors."""
    if learning_rate <= 0:
        raise ValueError(f"learning_rate must be positive, got {learning_rate}")
    if not math.isfinite(amount):
        raise ValueError(f"the measured difference must be finite, got {amount}: look for NaN in the log-probs")
    return learning_rate * amount
