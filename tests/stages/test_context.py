from __future__ import annotations

from pathlib import Path

import pytest

import tiny_models
from selfeval.backbone.roles import Backbone
from selfeval.config import RunConfig, load_config
from selfeval.stages.context import Context
from selfeval.stages.terminal import Terminal
from selfeval.store import RunStore
from toy import LAB


def loaded_precision(folder: Path, model: Path, precision: str = "auto") -> str:
    store = RunStore(folder)
    try:
        context = Context(
            RunConfig(model=str(model), backbone={"device": "cpu", "precision": precision}), store, Terminal(quiet=True)
        )  # type: ignore[arg-type]
        return context.backbone.loaded.precision
    finally:
        store.close()


def test_a_run_keeps_the_precision_that_was_picked_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a run resumed while memory is scarce would mix the replies of two bases, and no key would show it."""
    model = tiny_models.save_model(tiny_models.model("llama", 384), tiny_models.words_tokenizer(), tmp_path / "model")
    assert loaded_precision(tmp_path / "run", model) == "fp32"
    monkeypatch.setattr("selfeval.backbone.load._sum", lambda memory, device: 150_000)
    assert loaded_precision(tmp_path / "other", model) == "bf16"
    assert loaded_precision(tmp_path / "run", model) == "fp32"
    assert loaded_precision(tmp_path / "run", model, "bf16") == "bf16"
    assert loaded_precision(tmp_path / "run", model) == "bf16"  # a new choice: the old one was asked for, not picked


def test_the_layers_that_evaluators_read_are_checked_when_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[int] = []
    own = Backbone.check_layer

    def check(self: Backbone, layer: int) -> None:
        checked.append(layer)
        own(self, layer)

    monkeypatch.setattr(Backbone, "check_layer", check)
    inputs = ["evaluator.members=3", "evaluator.inputs=[{layer = 2}, {}, {layer = 3}]", "backbone.device=cpu"]
    made = Context(load_config(None, {"model": str(LAB / "word_problems")}, inputs), RunStore(tmp_path), Terminal(quiet=True))
    assert made.backbone.roles.names == ()
    assert checked == [2, 3]
