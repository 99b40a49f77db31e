from __future__ import annotations

import math

import pytest
import torch

from selfeval.algorithms.step_scores import combined_score, step_loss, step_progress

LOGITS = torch.tensor([math.log(4.0), 0.0, math.log(9.0)])  # probabilities 0.8, 0.5, 0.9


def test_the_loss_is_the_cross_entropy_with_the_label() -> None:
    # -(0.25 log 0.8 + 0.75 log 0.2), -log 0.5, -log 0.1
    expected = [-0.25 * math.log(0.8) - 0.75 * math.log(0.2), math.log(2), -math.log(0.1)]
    assert step_loss(LOGITS, torch.tensor([0.25, 1.0, 0.0])).tolist() == pytest.approx(expected, abs=1e-6)


def test_the_optimum_of_a_soft_label_is_its_log_odds() -> None:
    logit = torch.tensor([math.log(0.3 / 0.7)], requires_grad=True)
    step_loss(logit, torch.tensor([0.3])).sum().backward()
    assert logit.grad is not None
    assert logit.grad.item() == pytest.approx(0.0, abs=1e-6)


def test_combined_scores_by_hand() -> None:
    found = [float(combined_score(LOGITS, how).exp()) for how in ("min", "product", "last")]  # type: ignore[arg-type]
    assert found == pytest.approx([0.5, 0.36, 0.9], abs=1e-6)


def test_progress_is_the_change_of_probability() -> None:
    progress = step_progress(LOGITS)
    assert progress.tolist() == pytest.approx([0.3, -0.3, 0.4], abs=1e-6)
    assert float(progress.sum()) == pytest.approx(0.9 - 0.5, abs=1e-6)
