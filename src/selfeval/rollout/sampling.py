"""Filters of the sampling distribution, with settings per row: repetition penalty, temperature, top-k, top-p and min-p.

They act in this order, which is that of transformers' `generate`.

Shapes: B active rows, N requests, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from selfeval.rollout.requests import Request

__all__ = ["Filters", "min_p", "nucleus", "penalized", "top_k"]

_NEVER = float("-inf")


class Filters:
    """The sampling settings of the requests of a batch.

    Args:
        requests: one per row of the batch at its start.
        device: device of the settings.
    """

    def __init__(self, requests: Sequence[Request], device: torch.device) -> None:
        self.temperature_N = torch.tensor([r.temperature for r in requests], device=device)
        self._top_k_N = torch.tensor([r.top_k for r in requests], device=device)
        self._top_p_N = torch.tensor([r.top_p for r in requests], device=device)
        self._min_p_N = torch.tensor([r.min_p for r in requests], device=device)
        self._penalty_N = torch.tensor([r.repetition_penalty for r in requests], device=device)
        # Decided on the host, once: a filter that no request uses costs nothing.
        self._uses_top_k = any(r.top_k for r in requests)
        self._uses_top_p = any(r.top_p < 1 for r in requests)
        self._uses_min_p = any(r.min_p for r in requests)
        self.penalizes = any(r.repetition_penalty != 1 for r in requests)

    def penalized(self, logits_BV: Tensor, seen_BV: Tensor, rows_B: Tensor) -> Tensor:
        """Apply the repetition penalty of these requests to logits."""
        return penalized(logits_BV, seen_BV, self._penalty_N[rows_B])

    def allowed(self, logprobs_BV: Tensor, rows_B: Tensor) -> Tensor:
        """Set the log-probs of tokens that these requests do not sample to minus infinity."""
        if self._uses_top_k:
            logprobs_BV = top_k(logprobs_BV, self._top_k_N[rows_B])
        if self._uses_top_p:
            logprobs_BV = nucleus(logprobs_BV.log_softmax(-1) if self._uses_top_k else logprobs_BV, self._top_p_N[rows_B])
        if self._uses_min_p:
            logprobs_BV = min_p(logprobs_BV, self._min_p_N[rows_B])
        return logprobs_BV


def penalized(logits_BV: Tensor, seen_BV: Tensor, penalty_B: Tensor) -> Tensor:
    """Divide the positive logits of seen tokens by a penalty, and multiply the negative ones by it.

    Keskar et al. 2019, CTRL, section 4.1, https://arxiv.org/abs/1909.05858; for negative logits as in transformers, because a
    division would make those tokens likelier.

    Args:
        logits_BV: logits.
        seen_BV: True at tokens that the row has already.
        penalty_B: penalties, > 0; 1 changes nothing.
    """
    penalty_B1 = penalty_B[:, None]
    changed_BV = torch.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
    return torch.where(seen_BV, changed_BV, logits_BV)


def top_k(logprobs_BV: Tensor, k_B: Tensor) -> Tensor:
    """Set log-probs to minus infinity except for the k likeliest tokens of each row, and those as likely as the last of them.

    Fan et al. 2018, https://arxiv.org/abs/1805.04833.

    Args:
        logprobs_BV: log-probs.
        k_B: number of tokens, >= 0; 0 keeps all.
    """
    size = logprobs_BV.shape[-1]
    last_B = torch.where(k_B > 0, k_B, size).clamp_max(size) - 1
    sorted_BV = logprobs_BV.sort(dim=-1, descending=True).values
    return logprobs_BV.masked_fill(logprobs_BV < sorted_BV.gather(1, last_B[:, None]), _NEVER)


def nucleus(logprobs_BV: Tensor, top_p_B: Tensor) -> Tensor:
    """Set log-probs outside of each row's nucleus to minus infinity: the likeliest tokens that together have probability p.

    Holtzman et al. 2020, https://arxiv.org/abs/1904.09751.

    Args:
        logprobs_BV: normalised log-probs.
        top_p_B: probability of the nucleus, in (0, 1]; 1 keeps all.
    """
    sorted_BV, index_BV = logprobs_BV.sort(dim=-1, descending=True)
    # Probability of all likelier tokens. It is exactly 0 for the first, which therefore always stays.
    before_BV = sorted_BV.exp().cumsum(-1) - sorted_BV.exp()
    outside_BV = (before_BV >= top_p_B[:, None]) & (top_p_B < 1)[:, None]
    # The argsort of a permutation is its inverse: back to the order of the vocabulary.
    return sorted_BV.masked_fill(outside_BV, _NEVER).gather(1, index_BV.argsort(-1))


def min_p(logprobs_BV: Tensor, min_p_B: Tensor) -> Tensor:
    """Set log-probs to minus infinity where a token has less than a share of the probability of the likeliest token.

    Nguyen et al. 2024, https://arxiv.org/abs/2407.01082.

    Args:
        logprobs_BV: log-probs, up to a constant per row.
        min_p_B: the share, in [0, 1]; 0 keeps all.
    """
    least_B = logprobs_BV.amax(-1) + min_p_B.log()
    return logprobs_BV.masked_fill(logprobs_BV < least_B[:, None], _NEVER)
