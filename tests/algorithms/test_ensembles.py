from __future__ import annotations

import pytest
import torch
from torch import Tensor

from golden_numbers import golden
from selfeval.algorithms.ensembles import disagreement, ensemble_mean, uncertainty_weighted, worst_case


def f64(numbers: object) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def close(actual: Tensor, expected: object) -> None:
    if actual.dtype == torch.float32:
        torch.testing.assert_close(actual.double(), f64(expected), rtol=1e-5, atol=1e-6)
    else:
        torch.testing.assert_close(actual, f64(expected), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "dtype"), [("ensemble", torch.float64), ("ensemble_lam", torch.float64), ("ensemble_lam", torch.float32)]
)
def test_what_members_say_together_matches_golden(name: str, dtype: torch.dtype) -> None:
    entry = golden("6_reward_model")[name]
    scores_KN, expected = torch.tensor(entry["inputs"]["rewards"], dtype=dtype), entry["expected"]
    close(ensemble_mean(scores_KN), expected["mean"])
    close(worst_case(scores_KN), expected["wco"])
    close(uncertainty_weighted(scores_KN, weight=entry["params"]["uwo_coef"]), expected["uwo"])
    close(disagreement(scores_KN).square(), expected["var"])


def test_one_member_cannot_disagree() -> None:
    scores_KN = f64([[1.0, -2.0]])
    for combine in (ensemble_mean, worst_case, lambda s: uncertainty_weighted(s, weight=3.0)):
        close(combine(scores_KN), [1.0, -2.0])
    close(disagreement(scores_KN), [0.0, 0.0])


def test_pessimism_turns_a_preference_round_where_members_disagree() -> None:
    # Reply 0 is better on average, 2 against 1, but for one member alone: scores (6, 0, 0) against (1, 1, 1).
    # Variance of the first: (16 + 4 + 4) / 3 = 8, so any λ above 1/8 prefers the second.
    scores_KN = f64([[6.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    close(ensemble_mean(scores_KN), [2.0, 1.0])
    close(worst_case(scores_KN), [0.0, 1.0])
    close(uncertainty_weighted(scores_KN, weight=0.25), [0.0, 1.0])
    close(uncertainty_weighted(scores_KN, weight=0.0), [2.0, 1.0])
    close(disagreement(scores_KN), [8**0.5, 0.0])


def test_a_member_that_has_no_score_is_not_averaged_away() -> None:
    assert ensemble_mean(f64([[1.0], [float("nan")]])).isnan().all()
    assert worst_case(f64([[1.0], [float("nan")]])).isnan().all()


@pytest.mark.parametrize("shape", [(3,), (0, 4), (2, 3, 4)])
def test_scores_that_are_not_members_by_replies_are_refused(shape: tuple[int, ...]) -> None:
    for combine in (ensemble_mean, worst_case, lambda s: uncertainty_weighted(s, weight=1.0), disagreement):
        with pytest.raises(ValueError, match=r"\[members, replies\] with at least one member"):
            combine(torch.zeros(shape))


def test_a_reward_for_disagreement_is_refused() -> None:
    with pytest.raises(ValueError, match=r"weight must be >= 0, got -0.1"):
        uncertainty_weighted(torch.zeros(2, 3), weight=-0.1)


def test_members_that_agree_do_not_disagree_by_a_rounding_error() -> None:
    # The float32 mean of three times 100.1 is off by one bit, and a square root amplifies that.
    scores_KN = torch.full((3, 2), 100.1)
    assert disagreement(scores_KN).tolist() == [0.0, 0.0]
    torch.testing.assert_close(uncertainty_weighted(scores_KN, weight=1e6), scores_KN[0])
