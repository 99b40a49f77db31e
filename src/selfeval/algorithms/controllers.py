"""Numbers that steer a run from what was measured in its last step. Plain floats, no tensors."""

from __future__ import annotations

import math

__all__ = ["adaptive_kl_coefficient"]


def adaptive_kl_coefficient(
    coefficient: float, kl: float, *, target: float, horizon: int, samples: int, error_clip: float = 0.2
) -> float:
    """Move the weight of the KL penalty so that the KL approaches its target.

    e = clip(KL / target − 1, ± error_clip),   β ← β (1 + e · samples / horizon)

    A proportional controller in log β: too far from the reference raises the penalty, too close lowers it. Ziegler et
    al. 2019, section 2.2 (https://arxiv.org/abs/1909.08593).

    Args:
        coefficient: β now, in reward per nat, > 0.
        kl: KL(π‖π_ref) per reply that was just measured, in nats; a small negative estimate is allowed.
        target: the KL per reply to hold, in nats, > 0.
        horizon: replies in which β can change by a factor of about exp(error_clip), > 0; 10000 is usual.
        samples: replies behind this measurement (not 1 per update), >= 0.
        error_clip: largest relative error that counts, > 0.

    Returns:
        The new coefficient, > 0 while samples * error_clip < horizon.

    Raises:
        ValueError: target or horizon is not positive, or the KL is not finite.

    Example:
        >>> adaptive_kl_coefficient(0.1, 12.0, target=6.0, horizon=1000, samples=100)
        0.10200000000000001
    """
    if target <= 0 or horizon <= 0:
        raise ValueError(f"target and horizon must be positive, got target {target} and horizon {horizon}")
    if not math.isfinite(kl):
        raise ValueError(f"the measured KL must be finite, got {kl}: look for NaN in the log-probs")
    error = max(-error_clip, min(kl / target - 1, error_clip))
    return coefficient * (1 + error * samples / horizon)
