"""The judge of a run, read back: its random numbers are those of the round."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import tiny_models
from selfeval.config import RunConfig
from selfeval.judging.templates import Templates, templates_folder
from selfeval.runs import judge
from selfeval.runs.judge import Judge
from selfeval.stages.context import Context
from selfeval.stages.terminal import Terminal
from selfeval.store import RunStore


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_judge_has_the_seed_of_its_round(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, seeds = RunConfig(seed=7), list[int]()
    made = judge.make_judge

    def making(*arguments: Any, **options: Any) -> Any:
        seeds.append(options["seed"])
        return made(*arguments, **options)

    monkeypatch.setattr(judge, "make_judge", making)
    backbone = tiny_models.backbone()
    templates = Templates.load(templates_folder("none"), backbone.loaded.tokenizer)
    model: Any = SimpleNamespace(
        backbone=backbone, templates=templates, config=config, reader=SimpleNamespace(folder=tmp_path, round=number)
    )
    Judge.of_run(model).compare_all([])
    context = Context(config, RunStore(tmp_path), Terminal(quiet=True))
    context.earlier = tuple(RunStore(tmp_path / str(earlier)) for earlier in range(1, number))
    assert seeds == [context.round_seed]
