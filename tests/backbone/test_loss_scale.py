from __future__ import annotations

import pytest
import torch
from torch import nn

from selfeval.backbone.loss_scale import LossScale, Origin, mark, name_of, scale_of


def test_it_is_halved_down_to_one_and_grows_back_after_200_passes() -> None:
    said: list[str] = []
    scale = LossScale(said.append)
    assert scale.value == 65536
    assert all(scale.halve() for _ in range(16))
    assert scale.value == 1
    assert not scale.halve()
    assert len(said) == 16
    for _ in range(199):
        scale.went_well()
    assert scale.value == 1
    scale.went_well()
    assert scale.value == 2
    assert scale.halve()
    assert len(said) == 16  # that it does not go below 1 was said already
    for _ in range(200 * 30):
        scale.went_well()
    assert scale.value == 2**24  # gradients that are all zero never overflow


def test_an_overflow_begins_the_count_anew() -> None:
    scale = LossScale(lambda sentence: None)
    for _ in range(199):
        scale.went_well()
    scale.halve()
    scale.went_well()
    assert scale.value == 2**15


def test_a_checkpoint_brings_it_back() -> None:
    said: list[str] = []
    scale, other = LossScale(lambda sentence: None), LossScale(said.append)
    scale.halve()
    scale.went_well()
    other.load(scale.state())
    assert other.state() == scale.state() == {"value": 32768.0, "well": 1}
    other.went_well()
    other.halve()
    assert said == ["gradients overflowed fp16 at a loss scale of 32768; continuing with 16384"]


@pytest.mark.parametrize("position", [0, 1])
def test_weights_know_their_name_and_scale(position: int) -> None:
    scale = LossScale(lambda sentence: None)
    weights = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    assert scale_of(weights) is name_of(weights[0]) is None
    mark(weights[position], Origin("layer.weight", scale))
    assert scale_of(weights) is scale
    assert name_of(weights[position]) == "layer.weight"
