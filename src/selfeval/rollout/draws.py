"""Random numbers for sampling: a separate stream per row, independent of the other rows in the batch.

Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["pick", "row_draws"]


def row_draws(seed: int, rows: Sequence[int], steps: int) -> NDArray[np.float64]:
    """Uniform draws in [0, 1), `[B, T]`, one per token: those of a row depend on the seed and its number alone.

    They are the stream of the counter-based generator Philox whose key is (seed, row): Salmon et al. 2011, section 4,
    https://doi.org/10.1145/2063384.2063405.

    Args:
        seed: from 0 to 2**64 - 1.
        rows: number of each row, from 0 to 2**64 - 1.
        steps: draws per row.
    """
    keys = np.array([(seed, row) for row in rows], dtype=np.uint64)
    raw = np.stack([np.random.Philox(key=key).random_raw(steps) for key in keys])
    # The upper 53 bits fill a double's significand exactly: multiples of 2**-53, always below 1.
    draws_BT: NDArray[np.float64] = (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return draws_BT


def pick(logprobs_BV: Tensor, draws_B: Tensor) -> Tensor:
    """The token at which the cumulative probability of each row passes its draw (inverse transform sampling), `[B]`.

    Args:
        logprobs_BV: of the tokens, minus infinity where a token is not allowed; they need not sum to one.
        draws_B: in [0, 1), fp64.
    """
    # fp64, because the rounding errors of a long fp32 sum would shift the intervals of the later tokens.
    cumulative_BV = logprobs_BV.exp().cumsum(-1, dtype=torch.float64)
    wanted_B = draws_B.clamp_max(1 - 2.0**-40) * cumulative_BV[:, -1]  # rounding must not push it past the last token
    # right=True finds the first sum above the draw, so a token with probability 0 is never picked.
    return torch.searchsorted(cumulative_BV, wanted_B[:, None], right=True)[:, 0]
