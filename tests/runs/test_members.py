"""The temperature of the confidence: fitted on enough held-out pairs, or not at all with a note."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

import tiny_models
from selfeval.config import RunConfig
from selfeval.errors import RunFolderError
from selfeval.prompt import Prompt
from selfeval.quality.margin_signals import MarginCalibration
from selfeval.runs.members import Temperature, confidence_of, load_members, reads_reference, temperature_of
from selfeval.stages import evaluator
from selfeval.stages.context import Context
from selfeval.stages.terminal import Terminal
from selfeval.store import RunStore, write_json
from selfeval.training.evaluator import EVALUATOR, Preference


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [(0, Temperature(1.0, 0)), (10, Temperature(1.0, 0)), (49, Temperature(1.0, 0))],
)
def test_few_held_out_pairs_fit_no_temperature(pairs: int, expected: Temperature, tmp_path: Path) -> None:
    held_out = [Preference(Prompt((5,)), (6,), (7,), 1.0)] * pairs
    run = Context(RunConfig(), RunStore(tmp_path / "run"), Terminal(quiet=True))
    assert evaluator._temperature(run, held_out) == expected  # no model is asked


def test_fifty_separable_pairs_do_not_make_the_evaluator_sure_of_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Context(RunConfig(), RunStore(tmp_path / "run"), Terminal(quiet=True))
    monkeypatch.setattr(evaluator, "margins", lambda context, pairs: [0.02 * (i + 1) for i in range(len(pairs))])
    found = evaluator._temperature(run, [Preference(Prompt((5,)), (6,), (7,), 1.0)] * 50)
    assert found.pairs == 50
    # Without the prior it is 0.01, and a margin of 0.5 has a confidence of 1.00.
    assert 0.15 < found.value < 1.0


def test_an_older_run_does_not_say_how_its_temperature_was_fitted(tmp_path: Path) -> None:
    write_json(tmp_path / EVALUATOR / "evaluator.json", {"temperature": 0.032, "mean": 0.0, "deviation": 1.0})
    assert temperature_of(tmp_path) == Temperature(0.032, 0)
    write_json(tmp_path / EVALUATOR / "evaluator.json", {"temperature": 1.3, "temperature_pairs": 400})
    assert temperature_of(tmp_path) == Temperature(1.3, 400)


@pytest.mark.parametrize("value", [0, "false", None])
def test_a_member_says_yes_or_no_to_the_reference_answer(value: object, tmp_path: Path) -> None:
    write_json(tmp_path / "evaluator.json", {"mean": 0.0, "deviation": 1.0, "reference_answer": value})
    with pytest.raises(RunFolderError, match="instead of true or false"):
        reads_reference(tmp_path)


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), "1", None, [1], True])
@pytest.mark.parametrize("key", ["deviation", "temperature"])
def test_a_scale_that_makes_scores_meaningless_is_refused(key: str, value: object, tmp_path: Path) -> None:
    backbone = tiny_models.backbone("llama", 384)
    backbone.roles.add(EVALUATOR, head=True)
    path = tmp_path / EVALUATOR / "evaluator.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"temperature": 1.0, "mean": 0.0, "deviation": 1.0, key: value}))
    with pytest.raises(RunFolderError, match=r"evaluator\.json"):
        temperature_of(tmp_path) if key == "temperature" else load_members(backbone, tmp_path, RunConfig())


def test_the_confidence_is_read_as_it_was_written_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / EVALUATOR / "evaluator.json"
    write_json(path, {"temperature": 1.0})
    assert confidence_of(tmp_path) is None
    weights = {"choice": 0.1, "margin": 0.5, "disagreement": -0.25}
    write_json(path, {"confidence": asdict(MarginCalibration(weights, 0.9, ((0.0, 0.5), (2.0, 0.95))))})
    assert confidence_of(tmp_path) == MarginCalibration(weights, 0.9, ((0.0, 0.5), (2.0, 0.95)))
    good = {"weights": weights, "scale": 0.9, "steps": []}
    for change in (
        {"weights": {"margin": 1.0}},
        {"steps": [[1.0]]},
        {"steps": [[1.0, 0.9], [0.0, 0.5]]},
        {"steps": [[1.0, 1.5]]},
        {"scale": "1"},
        {"more": 1},
    ):
        write_json(path, {"confidence": {**good, **change}})
        with pytest.raises(RunFolderError, match=r"evaluator\.json is damaged"):
            confidence_of(tmp_path)
