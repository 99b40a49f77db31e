"""Filters of the sampling distribution, with settings per row: repetition penalty, temperature, top-k, top-p and min-p.

They act in this order, which is that of transformers' `generate`.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from selfeval.rollout.requests import Request

__all__ = ["Filters", "min_p", "nucleus", "penalized", "top_k"]

_NEVER = float("-inf")


class Filters:
    """The sampling settings of the rows of a batch.

    Args:
        requests: one per row.
        device: device of the settings.

    Attributes:
        greedy_B: rows at temperature 0.
        divisor_B1: temperatures; 1 instead of 0 for greedy rows, whose token is the argmax at any temperature.
        samples: whether some row is not greedy.
        penalizes: whether some row has a repetition penalty.
    """

    def __init__(self, requests: Sequence[Request], device: torch.device) -> None:
        temperature_B = torch.tensor([r.temperature for r in requests], device=device)
        self.greedy_B = temperature_B == 0
        self.divisor_B1 = torch.where(self.greedy_B, 1.0, temperature_B)[:, None]
        self._top_k_B = torch.tensor([r.top_k for r in requests], device=device)
        self._top_p_B = torch.tensor([r.top_p for r in requests], device=device)
        self._min_p_B = torch.tensor([r.min_p for r in requests], device=device)
        self._penalty_B = torch.tensor([r.repetition_penalty for r in requests], device=device)
        # Decided on the host, once: a filter that no request uses costs nothing.
        self.samples = any(r.temperature for r in requests)
        self._uses_top_k = any(r.top_k for r in requests)
        self._uses_top_p = any(r.top_p < 1 for r in requests)
        self._uses_min_p = any(r.min_p for r in requests)
        self.penalizes = any(r.repetition_penalty != 1 for r in requests)

    def select(self, rows_B: Tensor) -> None:
        """Keep the settings of these rows, in this order."""
        self.greedy_B, self.divisor_B1 = self.greedy_B[rows_B], self.divisor_B1[rows_B]
        # Those of a filter that no row uses are not read.
        self._top_k_B = self._top_k_B[rows_B] if self._uses_top_k else self._top_k_B
        self._top_p_B = self._top_p_B[rows_B] if self._uses_top_p else self._top_p_B
        self._min_p_B = self._min_p_B[rows_B] if self._uses_min_p else self._min_p_B
        self._penalty_B = self._penalty_B[rows_B] if self.penalizes else self._penalty_B

    def penalized(self, logits_BV: Tensor, seen_BV: Tensor) -> Tensor:
        """Apply the repetition penalties to logits."""
        return penalized(logits_BV, seen_BV, self._penalty_B)

    def allowed(self, logprobs_BV: Tensor) -> Tensor:
        """Set the log-probs of tokens that are not sampled to minus infinity."""
        if self._uses_top_k:
            logprobs_BV = top_k(logprobs_BV, self._top_k_B)
        if self._uses_top_p:
            normalised_BV = logprobs_BV
            if self._uses_top_k:
                # Not those of a row without top-k: its last bits would depend on the other rows.
                normalised_BV = torch.where(self._top_k_B[:, None] > 0, logprobs_BV.log_softmax(-1), logprobs_BV)
            logprobs_BV = nucleus(normalised_BV, self._top_p_B)
        if self._uses_min_p:
            logprobs_BV = min_p(logprobs_BV, self._min_p_B)
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
    # A probability that is 0 in fp32 would leave out that one as well.
    least_B = top_p_B.clamp_min(torch.finfo(top_p_B.dtype).tiny)
    outside_BV = (before_BV >= least_B[:, None]) & (top_p_B < 1)[:, None]
    # Back to the order of the vocabulary, in which a gather would need a second sort.
    return torch.empty_like(sorted_BV).scatter_(1, index_BV, sorted_BV.masked_fill(outside_BV, _NEVER))


def min_p(logprobs_BV: Tensor, min_p_B: Tensor) -> Tensor:
    """Set log-probs to minus infinity where a token has less than a share of the probability of the likeliest token.

    Nguyen et al. 2024, https://arxiv.org/abs/2407.01082.

    Args:
        logprobs_BV: log-probs, up to a constant per row.
        min_p_B: the share, in [0, 1]; 0 keeps all.
    """
    least_B = logprobs_BV.amax(-1) + min_p_B.log()
    return logprobs_BV.masked_fill(logprobs_BV < least_B[:, None], _NEVER)
