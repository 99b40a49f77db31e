from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from selfeval.config import BackboneConfig, RunConfig, load_config
from selfeval.judging.kinds import kinds_of_run
from selfeval.judging.sources import prompt_sources
from selfeval.judging.templates import templates_folder
from selfeval.runs.reader import round_folder
from selfeval.stages import STAGE_NAMES
from selfeval.stages.graph import STAGES, Edge, stage_keys
from selfeval.store import fingerprint, write_sealed
from stage_world import STAGES as WORLD_STAGES
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
        policy = {name: value for name, value in values["policy"].items() if name != "gate"}
        assert keys["policy"] == fingerprint([keys["evaluator"], "policy", {"policy": policy}, {}])
    sections = {f"backbone.{name}": values["backbone"][name] for name in ("precision", "context", "rollout_batch_size")}
    sections["seed"] = values["seed"]
    sections["chat.arguments"] = {}
    later = ("file", "paraphrase", "off_domain", "coverage", "sketch_above")
    sections["questions"] = {name: value for name, value in values["questions"].items() if name not in later}
    ask = _ask_sources(config, day)
    assert second["questions"] == fingerprint([["round", 2, first["policy"]], "questions", sections, {"ask": ask}])


def test_settings_that_were_added_later_leave_the_keys_of_earlier_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The keys of the default configuration before there were filters by meaning, loops, the map and embedders.

    A change of the embedded model or of the built-in prompts changes them too, and is the only other reason to adapt them.
    """
    monkeypatch.chdir(tmp_path)  # the default model is the current folder, whose files are part of the first key
    day = date(2026, 1, 31)
    keys = stage_keys(RunConfig(), [], 1, day)
    assert keys == {
        "questions": "d22c7562d4ebe6ea",
        "replies": "1974aba72c368a8a",
        "verdicts": "57053bfc9ec882ee",
        "pairs": "0acd84c609ab82b7",
        "evaluator": "cf31ae52bcabd25e",
        "steps": "cf31ae52bcabd25e",
        "policy": "c02609f0422b3ec4",
        "evaluation": "80d42a4fc25b25bc",
        "report": "712328b48aa89cff",
    }
    for added in ("questions.sketch_above=9", "questions.coverage=true", "replies.loops=keep", "evaluation.map_points=9"):
        other = stage_keys(load_config(None, {}, [added]), [], 1, day)
        first = added.partition(".")[0]
        assert [name for name in NAMES if keys[name] != other[name]] == NAMES[NAMES.index(first) :], added


def test_a_map_of_the_default_size_leaves_the_key_of_earlier_runs_and_another_one_evaluates_again() -> None:
    day = date(2026, 1, 31)
    earlier = RunConfig().model_dump(mode="json")["evaluation"]
    assert earlier.pop("map_points") == 1000
    keys = stage_keys(RunConfig(), [], 1, day)
    sections = {"domain": None, "gold": "", "evaluation": earlier}
    sources = prompt_sources(templates_folder("", ""), day, kinds_of_run(RunConfig().verdicts))
    prompts = {kind: sources[kind] for kind in RunConfig().verdicts.kinds("referee")}
    assert keys["evaluation"] == fingerprint([keys["policy"], "evaluation", sections, prompts])
    other = stage_keys(RunConfig.model_validate({"evaluation": {"map_points": 0}}), [], 1, day)
    assert [name for name in NAMES if keys[name] != other[name]] == ["evaluation", "report"]
    static = {"embeddings": {"embedder": "static"}}
    other = stage_keys(RunConfig.model_validate(static), [], 1, day)
    assert [name for name in NAMES if keys[name] != other[name]] == ["evaluation", "report"]
    without = {"evaluation": {"map_points": 0}}
    same = [stage_keys(RunConfig.model_validate(one), [], 1, day) for one in (without, {**without, **static})]
    assert same[0] == same[1], "nothing is embedded"


SETTINGS_OF_THE_BACKBONE = [
    ("device=cpu", None),
    ("precision=bf16", "questions"),
    ("checkpointing=true", None),
    ("memory_budget=2GiB", None),
    ("batch_tokens=100", "evaluator"),
    ("pass_tokens=100", None),
    ("rollout_batch_size=8", "questions"),
    ("engine=vllm", "replies"),
    ("context.rope_scaling=linear", "questions"),
    ("context.rope_factor=2", "questions"),
    ("context.attention=eager", "questions"),
    ("placement.mode=single", None),
    ('placement.max_memory={cpu="1GiB"}', None),
    ("placement.reserve=0.5", None),
    ("placement.folder=weights", None),
    ("lora.rank=4", "evaluator"),
    ("lora.alpha=8", "evaluator"),
    ("lora.rslora=true", "evaluator"),
    ("lora.targets=q_proj", "evaluator"),
    ("vllm.memory_share=0.2", None),
    ("vllm.max_length=64", "replies"),
    ("vllm.sleep=false", None),
    ("vllm.max_weight=3", "policy"),
    ("vllm.max_difference=0.2", None),
]


@pytest.mark.parametrize(("setting", "first"), SETTINGS_OF_THE_BACKBONE)
def test_a_setting_of_the_backbone_changes_the_keys_of_the_stages_that_depend_on_it(setting: str, first: str | None) -> None:
    given = ["backbone.context.rope_scaling=yarn"]
    if "vllm" in setting:  # which does not scale positions
        given = [] if setting.startswith("engine") else ["backbone.engine=vllm"]
    before, after = (stage_keys(load_config(None, {}, [*given, *more]), []) for more in ([], [f"backbone.{setting}"]))
    changed = [name for name in NAMES if before[name] != after[name]]
    assert changed == ([] if first is None else NAMES[NAMES.index(first) :])


def test_how_a_server_is_asked_changes_no_key_and_whom_changes_those_that_depend_on_it() -> None:
    def changed(section: str, setting: str, *given: str) -> list[str]:
        url = f"{section}.url=http://localhost:1"
        before, after = (stage_keys(load_config(None, {}, [url, *given, *more]), []) for more in ([], [f"{section}.{setting}"]))
        return [name for name in STAGE_NAMES if before[name] != after[name]]

    judge = "verdicts.judge=endpoint"
    for setting in ("budget_tokens=9", "in_flight=9", "key_variable=A_API_KEY", "price_read=2", "timeout=9", "retries=0"):
        assert changed("verdicts.endpoint", setting, judge) == changed("evaluation.referee", setting) == []
        assert changed("embeddings.endpoint", setting, "embeddings.embedder=endpoint") == []
    assert changed("embeddings.endpoint", "batch_size=9", "embeddings.embedder=endpoint") == []
    assert changed("embeddings.endpoint", "model=m", "embeddings.embedder=endpoint") == ["evaluation", "report"]
    assert changed("verdicts.endpoint", "model=m", judge) == list(STAGE_NAMES)[2:]
    assert changed("evaluation.referee", "model=m") == ["evaluation", "report"]
    assert changed("evaluation.referee", "model=m", "policy.judge_every=1") == ["policy", "evaluation", "report"]


def test_the_settings_above_are_all_that_the_backbone_has() -> None:
    def names(model: Any, prefix: str = "") -> Iterator[str]:
        for name, field in model.model_fields.items():
            inner = hasattr(field.annotation, "model_fields")
            yield from names(field.annotation, f"{prefix}{name}.") if inner else [f"{prefix}{name}"]

    assert [setting.partition("=")[0] for setting, _ in SETTINGS_OF_THE_BACKBONE] == list(names(BackboneConfig))


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
        for before, stage in itertools.pairwise(WORLD_STAGES[:-1]):
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
    assert world.run(restart=False) == list(WORLD_STAGES[2:])
    assert not list(world.run_folder.rglob("replaced"))
