from __future__ import annotations

import pytest
import torch

import tiny_models
from selfeval.algorithms.kl import categorical_kl
from selfeval.backbone import curvature
from selfeval.backbone.curvature import self_kl

FAMILIES = ("llama", "gemma2", "cohere", "gpt2")
"""Gemma 2 caps its logits, Cohere scales them."""


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows", [100, 2], ids=["at once", "two rows at a time"])
def test_its_second_derivative_is_that_of_the_exact_kl(family: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny_models.backbone(family)
    head = backbone.output_head.module
    head.bias = torch.nn.Parameter(torch.linspace(-1, 1, head.out_features), requires_grad=False)  # type: ignore[operator, arg-type]
    monkeypatch.setattr(curvature, "_rows", lambda *_: rows)
    generator = torch.Generator().manual_seed(3)
    hidden = (2 * torch.randn(2, 4, backbone.loaded.hidden_size, generator=generator)).requires_grad_()
    mask = torch.tensor([[True, True, True, False], [True, True, False, False]])
    directions = torch.randn(2, 4, backbone.loaded.hidden_size, generator=generator)
    weights = torch.tensor([1.0, 0.5, 2.0, 1.5, 0.25])  # of the tokens in a loss

    def product(kl: torch.Tensor) -> torch.Tensor:
        (gradient,) = torch.autograd.grad((kl * weights).sum(), hidden, create_graph=True)
        return torch.autograd.grad((gradient * directions).sum(), hidden)[0]

    logits = backbone.logits(hidden[mask]) / 0.7
    expected = product(categorical_kl(logits.detach(), logits))  # plain autograd through plain logits
    found = product(self_kl(backbone, hidden, mask, temperature=0.7))
    assert expected[mask].abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))
    assert bool((found[~mask] == 0).all())


def test_value_and_gradient_are_zero() -> None:
    backbone = tiny_models.backbone()
    hidden = torch.randn(1, 3, backbone.loaded.hidden_size, requires_grad=True)
    kl = self_kl(backbone, hidden, torch.ones(1, 3, dtype=torch.bool))
    (gradient,) = torch.autograd.grad(kl.sum(), hidden)
    assert kl.tolist() == [0.0, 0.0, 0.0]
    assert not gradient.any()
    with pytest.raises(ValueError, match="temperature must be > 0, got 0"):
        self_kl(backbone, hidden, torch.ones(1, 3, dtype=torch.bool), temperature=0)
