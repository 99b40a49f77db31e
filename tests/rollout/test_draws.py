from __future__ import annotations

import math

import numpy as np
import torch

from selfeval.rollout.draws import pick, row_draws


def test_a_rows_draws_depend_on_the_seed_and_its_number_alone() -> None:
    together = row_draws(3, [0, 1, 2, 7], 20)
    assert together.shape == (4, 20)
    assert np.array_equal(row_draws(3, [7, 1], 20), together[[3, 1]])
    assert np.array_equal(row_draws(3, [2], 5), together[2:3, :5])
    others = np.concatenate([row_draws(4, [0, 1, 2, 7], 20), together, row_draws(2**48 - 1, [0], 20)]).flatten()
    assert len(np.unique(others)) == len(others)  # no draw is used twice


def test_draws_are_uniform_and_independent_between_rows_and_steps() -> None:
    draws = torch.from_numpy(row_draws(1, range(400), 100))
    assert 0 <= draws.min() < 1e-3
    assert 1 - 1e-3 < draws.max() < 1
    cells = torch.histc(draws.float(), bins=20, min=0, max=1).double()
    statistic = float(((cells - 2000) ** 2 / 2000).sum())
    assert torch.special.gammaincc(torch.tensor(9.5), torch.tensor(statistic / 2)) > 1e-4  # chi-square, 19 degrees of freedom
    centred = draws - 0.5
    for first, second in ((centred[:-1], centred[1:]), (centred[:, :-1], centred[:, 1:])):
        correlation = float((first * second).mean() * 12)
        assert abs(correlation) < 5 / math.sqrt(first.numel())


def test_the_draws_are_philoxs() -> None:
    # Philox4x64-10 from the definition: ten rounds on the counter (1, 0, 0, 0) with the key (seed, row).
    mask = 2**64 - 1
    counter, key = [1, 0, 0, 0], [12345, 6]
    for _ in range(10):
        first, second = 0xD2E7470EE14C6C93 * counter[0], 0xCA5A826395121157 * counter[2]
        counter = [(second >> 64) ^ counter[1] ^ key[0], second & mask, (first >> 64) ^ counter[3] ^ key[1], first & mask]
        key = [(key[0] + 0x9E3779B97F4A7C15) & mask, (key[1] + 0xBB67AE8584CAA73B) & mask]
    expected = [(word >> 11) / 2**53 for word in counter]
    assert row_draws(12345, [6], 4)[0].tolist() == expected


def test_the_token_is_where_the_cumulative_probability_passes_the_draw() -> None:
    logprobs = torch.tensor([0.5, 0.0, 0.25, 0.25, 0.0]).log()
    draws = torch.tensor([0.0, 0.4999, 0.5, 0.7499, 0.75, 1 - 2.0**-53], dtype=torch.float64)
    assert pick(logprobs.expand(6, 5), draws).tolist() == [0, 0, 2, 2, 3, 3]  # never a token of probability zero
    # They need not sum to one: here is what a nucleus leaves of it.
    cut = torch.tensor([float("-inf"), float("-inf"), math.log(0.25), math.log(0.05), float("-inf")])
    assert pick(cut.expand(6, 5), draws).tolist() == [2, 2, 2, 2, 2, 3]
    assert pick(cut.expand(1, 5), torch.tensor([0.84], dtype=torch.float64)).tolist() == [3]


def test_a_large_vocabulary_is_drawn_from_to_its_end() -> None:
    size = 200_000
    flat = torch.full((3, size), -math.log(size))
    draws = torch.tensor([0.0, 0.500001, 1 - 1e-6], dtype=torch.float64)
    assert pick(flat, draws).tolist() == [0, 100_000, size - 1]
