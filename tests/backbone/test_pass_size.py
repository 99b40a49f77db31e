from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import tiny_models
from selfeval.backbone import pass_size
from selfeval.backbone.load import load_model
from selfeval.backbone.pass_size import fastest_size, measures_passes, pick_pass_tokens
from selfeval.backbone.roles import Backbone
from selfeval.config import LoraConfig


def in_turn(*times: float) -> Callable[[], float]:
    values: Iterator[float] = iter(times)
    return lambda: next(values)


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({1024: 1.0, 2048: 0.8, 4096: 1.0}, 2048),
        ({1024: 0.7, 2048: 0.8, 4096: 1.0}, 1024),
        ({1024: 0.95, 2048: 0.92, 4096: 1.0}, 4096),  # less than a tenth is noise
        ({1024: 1.5, 2048: 1.2, 4096: 1.0}, 4096),
    ],
)
def test_a_smaller_size_is_taken_only_if_it_saves_a_tenth(times: dict[int, float], expected: int) -> None:
    assert fastest_size({size: in_turn(seconds) for size, seconds in times.items()}, 1) == expected


def test_the_shortest_time_counts() -> None:
    # Means would be 1.5 for both, and the last round alone would favour the small size.
    assert fastest_size({1024: in_turn(2.0, 1.0), 4096: in_turn(1.0, 2.0)}, 2) == 4096
    assert fastest_size({1024: in_turn(9.0, 0.8), 4096: in_turn(1.0, 1.0)}, 2) == 1024


@pytest.fixture
def backbone(tmp_path: Path) -> Backbone:
    folder = tiny_models.save_model(tiny_models.model("llama", 384), tiny_models.words_tokenizer(), tmp_path / "model")
    return Backbone(load_model(str(folder), device="cpu"), LoraConfig(rank=2), "tiny")


def test_every_size_reads_the_same_tokens(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    assert measures_passes(backbone)
    read: list[int] = []
    hidden = backbone.hidden

    def counted(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        read.append(ids.numel())
        return hidden(ids, mask)

    monkeypatch.setattr(backbone, "hidden", counted)
    assert pick_pass_tokens(backbone, 16384) in (1024, 2048, 4096)
    # A pass of the smallest size first, then 4,096 tokens in each size, twice.
    assert read == [1024, *(2 * [*(4 * [1024]), *(2 * [2048]), 4096])]


def test_no_size_exceeds_the_limit(backbone: Backbone) -> None:
    assert pick_pass_tokens(backbone, 600) == 600
    assert pick_pass_tokens(backbone, 2047) == 2047
    assert pick_pass_tokens(backbone, 2500) in (1024, 2048)


def test_large_models_are_not_measured(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(pass_size, "_seconds", lambda backbone, size, tokens: (calls.append(size), 1.1)[1])
    assert pick_pass_tokens(backbone, 16384) == 4096
    assert calls == [1024]


def test_a_memory_budget_decides_by_itself(tmp_path: Path) -> None:
    folder = tiny_models.save_model(tiny_models.model("llama", 384), tiny_models.words_tokenizer(), tmp_path / "model")
    assert not measures_passes(Backbone(load_model(str(folder), device="cpu"), LoraConfig(rank=2), "tiny", 1 << 40))
