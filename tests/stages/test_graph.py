from __future__ import annotations

import itertools
import json
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from selfeval.config import RunConfig
from selfeval.judging.kinds import kinds_of_run
from selfeval.judging.sources import prompt_sources
from selfeval.judging.templates import templates_folder
from selfeval.runs.reader import round_folder
from selfeval.stages import STAGE_NAMES
from selfeval.stages.graph import STAGES, Edge, stage_keys
from selfeval.store import fingerprint, write_sealed
from stage_world import World

NAMES = [stage.name for stage in STAGES]


def test_every_stage_reads_earlier_stages_of_its_round_or_those_of_other_rounds() -> None:
    assert tuple(NAMES) == STAGE_NAMES
    for number, stage in enumerate(STAGES):
        own = [NAMES.index(edge.stage) for edge in stage.reads if edge.rounds == "this"]
        assert own == ([number - 1] if number else []), "of its own round, the nearest one"
    others = {stage.name: [edge for edge in stage.reads if edge.rounds != "this"] for stage in STAGES}
    assert {name: edges for name, edges in others.items() if edges} == {
        "questions": [Edge("policy", "previous")],
        "report": [Edge("evaluation", "later")],
    }


def test_the_keys_are_those_of_existing_run_folders() -> None:
    """The chain of fingerprints, computed apart: another rule would rerun every run that there is."""
    config, day = RunConfig(), date(2026, 1, 31)
    first, second = (stage_keys(config, [], number, day) for number in (1, 2))
    values = config.model_dump(mode="json")
    for keys in (first, second):
        pairs = fingerprint([keys["verdicts"], "pairs", {}, {}])
        assert keys["pairs"] == pairs
        assert keys["report"] == fingerprint([keys["evaluation"], "report", {"name": values["name"]}, {}])
        assert keys["policy"] == fingerprint([keys["evaluator"], "policy", {"policy": values["policy"]}, {}])
    sections = {name: values[name] for name in ("precision", "context", "seed", "rollout_rows")}
    sections["questions"] = {name: value for name, value in values["questions"].items() if name != "file"}
    ask = _ask_sources(config, day)
    assert second["questions"] == fingerprint([["round", 2, first["policy"]], "questions", sections, {"ask": ask}])


def _ask_sources(config: RunConfig, day: date) -> Any:
    folder = templates_folder(config.model, config.templates)
    return prompt_sources(folder, day, kinds_of_run(config.verdicts))["ask"]


def _content(folder: Path, stage: str) -> str:
    manifest = json.loads((folder / stage / "manifest.json").read_text())
    return fingerprint([manifest["inputs"], manifest["files"]])


def test_the_inputs_are_those_of_existing_run_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The chain of contents, computed apart from the manifests."""
    world = World(tmp_path / "world", monkeypatch)
    world.run("rounds=2")
    first, second = (round_folder(world.run_folder, number) for number in (1, 2))
    for folder in (first, second):
        for before, stage in itertools.pairwise(NAMES[:-1]):
            assert json.loads((folder / stage / "manifest.json").read_text())["inputs"] == _content(folder, before)

    def inputs(folder: Path, stage: str) -> str:
        found: str = json.loads((folder / stage / "key.json").read_text())["inputs"]
        return found

    assert inputs(first, "questions") == ""
    assert inputs(second, "questions") == _content(first, "policy")
    assert inputs(second, "report") == _content(second, "evaluation")
    assert inputs(first, "report") == fingerprint([_content(first, "evaluation"), 2, _content(second, "evaluation")])


def test_a_key_json_of_a_stage_that_never_ran_is_no_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was killed as the stage began, before it wrote anything."""
    world = World(tmp_path / "world", monkeypatch)
    world.run(until="replies")
    (world.run_folder / "verdicts").mkdir()
    write_sealed(world.run_folder / "verdicts" / "key.json", {"key": "of an earlier configuration", "inputs": ""})
    assert world.run(restart=False) == NAMES[2:]
    assert not list(world.run_folder.rglob("replaced"))
