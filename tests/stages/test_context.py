from __future__ import annotations

from pathlib import Path

import pytest

import tiny_models
from selfeval.backbone.budget import CPU_PASS_TOKENS
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


def context_of(folder: Path, model: Path, *settings: str) -> Context:
    config = load_config(None, {"model": str(model)}, ["backbone.device=cpu", *settings])
    return Context(config, RunStore(folder), Terminal(quiet=True))


def test_a_run_measures_the_size_of_its_scoring_passes_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(variable, raising=False)
    measured = iter([2048, 1024])
    monkeypatch.setattr("selfeval.stages.context.pick_pass_tokens", lambda backbone, limit: next(measured))
    model = tiny_models.save_model(tiny_models.model("llama", 384), tiny_models.words_tokenizer(), tmp_path / "model")

    def pass_tokens(folder: str, *settings: str) -> int | None:
        context = context_of(tmp_path / folder, model, *settings)
        try:
            return context.backbone.budget.pass_tokens
        finally:
            context.store.close()

    assert pass_tokens("run") == 2048
    assert pass_tokens("run") == 2048  # resumed: recorded in run.json
    assert pass_tokens("run", "backbone.pass_tokens=3000") == 3000
    # A user who sets the number of threads repeats runs bit for bit: nothing is measured, now and when the run is resumed.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert pass_tokens("fixed") == CPU_PASS_TOKENS
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert pass_tokens("fixed") == CPU_PASS_TOKENS
    assert pass_tokens("other") == 1024
