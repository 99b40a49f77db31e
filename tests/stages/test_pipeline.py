from __future__ import annotations

import dataclasses
import itertools
import json
import re
import shutil
from datetime import date
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch

from full_disk import FullDisk
from killed_steps import killed_at
from selfeval.config import BackboneConfig, ChatConfig, RunConfig
from selfeval.errors import ConfigError, LoopError, LostWorkError, RunFolderError, StorageError
from selfeval.stages import evaluation, gold, pipeline
from selfeval.stages.context import Context, in_process
from selfeval.stages.gold import load_gold
from selfeval.stages.judge_probe import PROBE_FILE
from selfeval.stages.restore import restore
from selfeval.stages.shards import Executor
from selfeval.stages.terminal import Terminal
from selfeval.store import Archive, RunStore, write_json
from stage_world import FILES, SHARDS, STAGES, World


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path / "world", monkeypatch)


def from_(stage: str) -> list[str]:
    return list(STAGES[STAGES.index(stage) :])


# -- what depends on what -----------------------------------------------------------------------------------------------

DEPENDING = [
    ("questions.temperature=0.9", "questions"),
    ("seed=1", "questions"),
    ("backbone.rollout_batch_size=8", "questions"),
    ('backbone.context={rope_scaling="yarn", rope_factor=2}', "questions"),
    ('backbone.precision="fp32"', "questions"),
    ("chat.arguments={enable_thinking=false}", "questions"),
    ("chat.system=Be brief.", "replies"),
    ("evaluation.temperature=0.5", "replies"),
    ("evaluation.top_p=0.5", "replies"),
    ("replies.beams=5", "replies"),
    ("replies.max_new_tokens=7", "replies"),
    ("verdicts.keep=0.7", "verdicts"),
    ("verdicts.reasoning=false", "verdicts"),
    ("evaluator.epochs=3", "evaluator"),
    ("backbone.lora.rank=8", "evaluator"),
    ("backbone.batch_tokens=100", "evaluator"),
    ("policy.ppo.clip=0.1", "policy"),
    ("evaluation.questions=7", "evaluation"),
    ('domain="word-problems"', "evaluation"),
    ('name="another"', "report"),
]


@pytest.mark.parametrize(("setting", "first"), DEPENDING)
def test_a_changed_value_redoes_the_stages_that_depend_on_it_and_later_ones(world: World, setting: str, first: str) -> None:
    assert world.run() == list(STAGES)
    keys = world.keys()
    assert world.run(setting) == from_(first)
    changed = world.keys()
    assert [stage for stage in STAGES if changed[stage] != keys[stage]] == from_(first)
    assert world.run(setting) == []


@pytest.mark.parametrize("setting", ['backbone.device="cpu"', "backbone.memory_budget=2GiB", "scale.slow=5.0"])
def test_where_a_run_works_is_no_reason_to_begin_anew(world: World, setting: str) -> None:
    world.run()
    assert world.run(setting) == []


def test_every_value_is_a_reason_for_some_stage_or_known_to_be_none() -> None:
    named = {section for stage in pipeline.STAGES for section in stage.sections}
    by_content = {"model", "seeds", "templates", "pairs"}  # the content of these files counts, not their location
    places = ("device", "memory_budget", "placement", "checkpointing", "pass_tokens")
    same_results = {*(f"backbone.{name}" for name in places), "trackers", "scale"}
    how_far = {"rounds"}  # tests/stages/test_rounds.py
    other_command = {"tuning"}  # selfeval tune
    replies_too = {"evaluation.temperature", "evaluation.top_p"}  # the replies before training are those of the replies stage
    # tests/stages/test_graph.py: the own engine and the default embedder add nothing to a key.
    own_rule = {"backbone.engine", "backbone.vllm", "embeddings"}
    sections = {"backbone": BackboneConfig, "chat": ChatConfig}
    inner = {f"{section}.{name}" for section, kind in sections.items() for name in kind.model_fields}
    settings = {*RunConfig.model_fields, *inner, *replies_too} - sections.keys()
    assert named | by_content | same_results | how_far | other_command | own_rule == settings
    assert not by_content & named


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("seeds.txt", "What is 1 + 1?\nWhat is 3 + 3?\n"),
        ("model/templates/ask.jinja", "Ask."),
        ("model/chat_template.jinja", "{{ messages }}"),
        ("model/templates/chat_template.jinja", "{{ messages }}"),
        ("model/additional_chat_templates/tools.jinja", "{{ tools }}"),
        ("model/merges.txt", "a b"),
        ("model/vocab.txt", "a"),
        ("model/tokenizer.model", "a"),
        ("model/qwen.tiktoken", "a"),
        ("model/config.json", '{"model_type": "other"}'),
    ],
)
def test_changed_seeds_templates_or_model_redo_everything(world: World, path: str, text: str) -> None:
    world.run()
    keys = world.keys()
    (world.folder / path).parent.mkdir(exist_ok=True)
    (world.folder / path).write_text(text)
    assert world.run() == list(STAGES)
    assert all(world.keys()[stage] != keys[stage] for stage in STAGES)


def test_the_same_seeds_and_model_elsewhere_redo_nothing(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world.run()
    world.folder.rename(tmp_path / "moved")
    assert World(tmp_path / "moved", monkeypatch).run() == []


def test_what_another_configuration_produced_is_kept_aside(world: World) -> None:
    world.run()
    role = (world.run_folder / FILES["policy"][0]).read_bytes()
    world.text["policy"] = "changed"
    world.run("policy.ppo.clip=0.1")
    assert (world.run_folder / FILES["policy"][0]).read_bytes() != role
    kept = list((world.run_folder / "replaced").rglob("adapter_model.safetensors"))
    assert [path.read_bytes() for path in kept] == [role]


# -- what runs ----------------------------------------------------------------------------------------------------------


def test_the_stages_run_in_the_order_of_the_road(world: World) -> None:
    assert tuple(stage.name for stage in pipeline.STAGES if stage.wanted(RunConfig())) == STAGES
    assert world.run() == list(STAGES)
    assert world.info()["status"] == "finished"
    assert world.states() == dict.fromkeys(STAGES, "finished")


def test_a_finished_stage_is_skipped_and_an_unfinished_one_run(world: World) -> None:
    assert world.run(until="verdicts") == ["questions", "replies", "verdicts"]
    assert world.info()["status"] == "partial"
    assert world.run(until="verdicts") == []
    assert world.run() == ["pairs", "evaluator", "policy", "evaluation", "report"]
    assert world.run() == []
    (world.run_folder / "pairs" / "manifest.json").unlink()  # as a kill before the last write leaves it
    assert world.run()[0] == "pairs"
    assert world.redone == []  # its shards were all there


def test_a_stage_keeps_its_number_of_threads(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(variable, raising=False)
    numbers = iter([3, 2, 4, 1])
    monkeypatch.setattr(pipeline, "usable_cores", lambda: 4)
    monkeypatch.setattr(pipeline, "pick_threads", lambda cores: next(numbers))
    used, set_threads = list[int](), torch.set_num_threads
    monkeypatch.setattr(torch, "set_num_threads", lambda number: (used.append(number), set_threads(number))[1])
    before = torch.get_num_threads()
    world.run(until="pairs")

    def recorded() -> dict[str, int | None]:
        return {name: row.get("threads") for name, row in world.info()["stages"].items()}

    assert recorded() == {"questions": 3, "replies": 2, "verdicts": 4, "pairs": None}  # pairs are made without the model
    assert used[::2] == [3, 2, 4, before]
    (world.run_folder / "replies" / "manifest.json").unlink()
    used.clear()
    world.run(until="pairs")
    assert used[0] == 2
    assert recorded()["replies"] == 2
    # With fewer cores, and with a number of the user.
    monkeypatch.setattr(pipeline, "usable_cores", lambda: 1)
    (world.run_folder / "replies" / "manifest.json").unlink()
    used.clear()
    world.run(until="pairs")
    assert used[0] == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (world.run_folder / "verdicts" / "manifest.json").unlink()
    used.clear()
    world.run(until="pairs")
    assert used[0] == before


def test_an_optional_stage_runs_between_its_neighbours_only_if_it_is_wanted(world: World) -> None:
    later = from_("policy")
    assert world.run() == list(STAGES)
    keys = world.keys()
    assert world.run("steps.completions=8") == []  # a setting of a stage that does not run
    with pytest.raises(
        RunFolderError, match='no stage "steps"; stages: questions, replies, verdicts, pairs, evaluator, policy'
    ):
        world.run(until="steps")
    enabled = "steps.enabled=true"
    assert world.run(enabled) == ["steps", *later]
    assert world.run(enabled) == []
    assert world.states() == dict.fromkeys((*STAGES, "steps"), "finished")
    assert world.run(enabled, "steps.completions=8") == ["steps", *later]
    assert world.run(enabled, "steps.completions=8", "policy.epochs=3") == later
    assert world.run() == later
    assert world.keys() == keys


def test_an_unknown_last_stage_is_refused_before_anything_is_done(world: World) -> None:
    with pytest.raises(RunFolderError, match='no stage "policies"'):
        world.run(until="policies")
    assert world.ran == []
    assert not (world.run_folder / "run.json").exists()


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_an_exception_leaves_an_interrupted_run_that_goes_on(world: World, error: BaseException) -> None:
    world.fails["verdicts"] = error
    with pytest.raises(type(error)):
        world.run()
    assert world.ran == ["questions", "replies", "verdicts"]
    assert world.info()["status"] == "interrupted"
    assert world.states() == {"questions": "finished", "replies": "finished", "verdicts": "interrupted"}
    manifests = [stage for stage in STAGES if (world.run_folder / stage / "manifest.json").exists()]
    assert manifests == ["questions", "replies"]
    del world.fails["verdicts"]
    assert world.run() == from_("verdicts")
    assert world.redone == ["verdicts 1", "pairs 0", "pairs 1"]  # the shard before the exception was kept
    assert world.states() == dict.fromkeys(STAGES, "finished")


def _is_refused(world: World, disk: FullDisk) -> bool:
    """Run the world; return whether the disk became full, after checking the message."""
    try:
        world.run(restart=False)
    except StorageError as error:
        message = str(error)
    else:
        return False
    assert disk.refused is not None
    written = re.sub(r"/\.([^/]+)\.part.*", r"/\1", disk.refused)
    assert re.search(rf"cannot write {re.escape(written)}\b.*free some space and rerun the same command", message), message
    return True


def test_a_full_disk_at_any_write_is_named_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    undisturbed = World(tmp_path / "undisturbed", monkeypatch)
    undisturbed.run()
    world = World(tmp_path / "world", monkeypatch)
    disk = FullDisk(world.run_folder, monkeypatch)
    while _is_refused(world, disk):
        assert list(world.run_folder.rglob("*.part")) == []
        disk.free()
    assert disk.refused is None
    assert len(disk.kinds) > 50
    assert world.files() == undisturbed.files()
    assert world.states() == dict.fromkeys(STAGES, "finished")


def test_the_error_that_ended_a_run_is_not_hidden_by_a_full_disk(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = FullDisk(world.run_folder, monkeypatch)
    disk.kinds = None

    def fail(context: Context) -> Executor:
        disk.fill()
        raise LoopError("no pairs are left")

    world.executor_of = fail
    with pytest.raises(LoopError, match="no pairs are left"):
        world.run()
    assert world.info()["status"] == "running"  # run.json could not be written
    disk.free()
    world.executor_of = in_process
    assert world.run() == list(STAGES)


# -- what is lost -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["questions", "replies", "verdicts", "pairs"])
def test_a_lost_shard_is_redone_and_nothing_else_where_it_comes_out_the_same(world: World, stage: str) -> None:
    world.run()
    before = world.files()
    (world.run_folder / stage / "shard-00001.jsonl").unlink()
    assert world.run() == [stage]
    assert world.redone == [f"{stage} 1"]
    assert world.files() == before
    assert world.info()["status"] == "finished"
    assert world.run() == []


@pytest.mark.parametrize("stage", ["questions", "replies", "verdicts", "pairs"])
def test_a_lost_shard_that_comes_out_otherwise_redoes_what_was_made_from_it(world: World, stage: str) -> None:
    world.run()
    (world.run_folder / stage / "shard-00001.jsonl").unlink()
    world.text[stage] = "another text"
    assert world.run() == from_(stage)
    expected = {f"{later} {shard}" for later in from_(stage) if later not in FILES for shard in range(SHARDS)}
    assert set(world.redone) == expected - {f"{stage} 0"}
    assert world.run() == []


def test_a_half_done_stage_begins_anew_when_what_it_is_made_from_has_changed(world: World) -> None:
    world.fails["replies"] = RuntimeError("out of memory")
    with pytest.raises(RuntimeError):
        world.run()
    assert (world.run_folder / "replies" / "shard-00000.jsonl").exists()
    (world.run_folder / "questions" / "shard-00000.jsonl").unlink()
    world.fails.clear()
    world.text["questions"], world.text["replies"] = "another text", "made from another text"
    world.run()
    assert world.redone[:3] == ["questions 0", "replies 0", "replies 1"]
    assert "as ever" not in (world.run_folder / "replies" / "shard-00000.jsonl").read_text()


@pytest.mark.parametrize("path", [(stage, path) for stage, paths in FILES.items() for path in paths], ids=lambda p: p[1])
def test_a_lost_file_makes_its_stage_run_again(world: World, path: tuple[str, str]) -> None:
    stage, name = path
    world.run()
    before = world.files()
    (world.run_folder / name).unlink()
    assert world.run() == [stage]
    assert world.files() == before
    assert world.run() == []


@pytest.mark.parametrize("stage", ["evaluator", "policy"])
def test_a_lost_role_folder_makes_its_stage_run_again(world: World, stage: str) -> None:
    world.run()
    shutil.rmtree((world.run_folder / FILES[stage][0]).parent)
    assert world.run() == [stage]
    world.text[stage] = "trained otherwise"
    shutil.rmtree((world.run_folder / FILES[stage][0]).parent)
    assert world.run() == from_(stage)


@pytest.mark.parametrize("name", ["replies/shard-00001.jsonl", FILES["policy"][0], "evaluation/figures.json"])
def test_a_file_that_somebody_changed_is_named_and_nothing_runs(world: World, name: str) -> None:
    world.run()
    with (world.run_folder / name).open("a") as file:
        file.write("x")
    with pytest.raises(
        RunFolderError, match=rf"{name.split('/')[-1]} is damaged: its content does not match its recorded hash"
    ):
        world.run(restart=False)
    assert world.ran == []


# -- the oracle ---------------------------------------------------------------------------------------------------------


class Oracle:
    """A gold domain whose constructor fails."""

    def __init__(self) -> None:
        raise RuntimeError("the oracle was made")


@pytest.fixture
def oracle(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Install a domain `oracle`; the list records when it was loaded."""
    loaded: list[str] = []

    def load(point: EntryPoint) -> type[Oracle]:
        loaded.append(point.name)
        return Oracle

    monkeypatch.setattr(EntryPoint, "load", load)
    point = EntryPoint("oracle", "somewhere:Oracle", "selfeval.domains")
    monkeypatch.setattr(gold, "entry_points", lambda group: [point] if group == "selfeval.domains" else [])
    return loaded


def test_the_oracle_is_not_even_loaded_before_evaluation(world: World, oracle: list[str]) -> None:
    assert world.run('domain="oracle"', until="policy") == list(STAGES[:6])
    assert oracle == []
    with pytest.raises(RuntimeError, match="the oracle was made"):
        load_gold(RunConfig(domain="oracle"))


def test_the_real_evaluation_is_the_first_to_load_the_oracle(
    world: World, oracle: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = next(stage for stage in pipeline.STAGES if stage.name == "evaluation")
    real = dataclasses.replace(real, run=evaluation.run)
    monkeypatch.setattr(pipeline, "STAGES", tuple(real if s.name == "evaluation" else s for s in pipeline.STAGES))
    with pytest.raises(RuntimeError, match="the oracle was made"):
        world.run('domain="oracle"')
    assert world.ran == list(STAGES[:6])
    assert oracle == ["oracle"]
    assert world.states()["evaluation"] == "interrupted"


def test_a_domain_that_is_not_installed_is_refused_at_once(world: World, oracle: list[str]) -> None:
    with pytest.raises(ConfigError, match='domain "oracles" is not installed; did you mean "oracle"'):
        world.run('domain="oracles"')
    assert world.ran == []
    assert oracle == []


# -- work of another configuration ----------------------------------------------------------------------------------------


def test_a_forgotten_setting_is_refused_with_cost_and_difference_and_nothing_is_moved(world: World) -> None:
    world.run("policy.ppo.clip=0.1", "seed=3")
    before = world.files()
    with pytest.raises(RunFolderError) as caught:
        world.run("seed=3", restart=False)
    message = str(caught.value)
    assert "policy.ppo.clip: 0.1, now 0.2." in message
    assert "seed" not in message
    assert re.search(r"policy \(\d\.\d s; shards 2\); evaluation \(\d\.\d s; shards 2\)\. Nothing was moved", message)
    assert f"selfeval run --output {world.run_folder}." in message
    assert "--restart" in message
    assert world.files() == before
    assert not (world.run_folder / "replaced").exists()
    assert world.run("policy.ppo.clip=0.1", "seed=3", restart=False) == []


def test_half_done_work_counts_too(world: World) -> None:
    world.fails["replies"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        world.run()
    with pytest.raises(RunFolderError, match=r"replies\.beams: 4, now 5.*replies \(0\.\d s, not finished\)\. Nothing"):
        world.run("replies.beams=5", restart=False)


def test_the_changed_settings_of_the_backbone_are_named_without_those_that_change_no_result(world: World) -> None:
    world.run()
    given = ("backbone.lora.rank=8", "backbone.context.attention=eager", "backbone.device=cpu", "backbone.memory_budget=2GiB")
    told = (
        r"different configuration: backbone\.context\.attention: auto, now eager, backbone\.lora\.rank: 16, now 8\. Continuing"
    )
    with pytest.raises(RunFolderError, match=told):
        world.run(*given, restart=False)


def test_a_changed_name_only_redraws_the_report_and_asks_nothing(world: World) -> None:
    world.run()
    assert world.run('name="another"', restart=False) == ["report"]


@pytest.mark.parametrize(
    ("path", "text", "told"),
    [
        ("seeds.txt", "What is 1 + 1?\nWhat is 3 + 3?\n", "the seeds changed"),
        ("model/templates/ask.jinja", "Ask.", "the templates changed"),
        ("model/config.json", '{"model_type": "other"}', "the model's files changed"),
    ],
)
def test_a_changed_file_is_named_too(world: World, path: str, text: str, told: str) -> None:
    world.run()
    (world.folder / path).write_text(text)
    with pytest.raises(RunFolderError, match=f"a different configuration: {told}\\. Continuing"):
        world.run(restart=False)


def test_on_a_terminal_the_question_is_asked_and_the_answer_obeyed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.run()
    asked, answers = [], iter([False, True])

    def ask(self: Terminal, question: str) -> bool:
        asked.append(question)
        return next(answers)

    monkeypatch.setattr(Terminal, "ask", ask)
    with pytest.raises(RunFolderError, match="Nothing was moved"):
        world.run("policy.ppo.clip=0.1", restart=False)
    assert world.run("policy.ppo.clip=0.1", restart=False) == from_("policy")
    assert len(asked) == 2
    assert asked[0].endswith("Move them and rerun these stages?")


def test_all_rounds_are_asked_about_at_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.run("rounds=2")
    asked: list[str] = []
    monkeypatch.setattr(Terminal, "ask", lambda self, question: not asked.append(question))
    world.run("rounds=2", "policy.ppo.clip=0.1", restart=False)
    assert len(asked) == 1
    assert "policy (" in asked[0]
    assert "round 2, questions (" in asked[0]


def _restore(world: World, number: int) -> list[str]:
    store = RunStore(world.run_folder)
    try:
        return restore(store, number)
    finally:
        store.close()


def test_replaced_results_are_restored_with_their_configuration_and_nothing_is_lost(world: World) -> None:
    world.run()
    first, config = world.files(), world.info()["config"]
    world.text["policy"] = "changed"
    world.run("policy.ppo.clip=0.1")
    second = world.files()
    assert _restore(world, 1) == from_("policy")
    assert world.files() == first
    assert world.info()["config"] == config
    assert world.states() == dict.fromkeys(STAGES, "finished")
    assert world.run(restart=False) == []  # which is finished
    assert _restore(world, 2) == from_("policy")  # and back again
    assert world.files() == second
    assert world.run("policy.ppo.clip=0.1", restart=False) == []


def test_a_kill_at_any_step_of_a_restore_loses_nothing(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same command, or any other one, completes it: files, configuration and rows of run.json, and the archive."""
    world.run()
    first, config, rows = world.files(), world.info()["config"], world.info()["stages"]
    world.text["policy"] = "changed"
    world.run("policy.ppo.clip=0.1")
    second = world.files()
    for step in itertools.count(1):
        copy = World(Path(shutil.copytree(world.folder, tmp_path / str(step))), monkeypatch)
        if not killed_at(step, lambda copy=copy: _restore(copy, 1)):
            break
        if step % 2:
            RunStore(copy.run_folder).close()
        assert _restore(copy, 1) == from_("policy")  # also if the other command has completed it
        assert copy.files() == first
        assert (copy.info()["config"], copy.info()["stages"]) == (config, rows)
        archive = Archive(copy.run_folder)
        assert archive.numbers() == [2]
        assert list(archive.facts(2)["stages"]) == from_("policy")
        kept = [p.read_text() for p in (copy.run_folder / "replaced").rglob("adapter_model.safetensors")]
        assert kept == ['"roles/policy/adapter_model.safetensors changed"\n']
        assert _restore(copy, 2) == from_("policy")
        assert copy.files() == second
    assert step > 20


def test_the_probe_of_the_judge_moves_with_its_verdicts(world: World) -> None:
    probe = world.run_folder / PROBE_FILE
    world.run()
    probe.write_text("of the first judge")
    world.run("verdicts.reasoning=false")
    assert not probe.exists()
    probe.write_text("of the second")
    _restore(world, 1)
    assert probe.read_text() == "of the first judge"
    assert (world.run_folder / "replaced" / "2" / PROBE_FILE).read_text() == "of the second"


def test_restored_results_are_restored_until_others_replace_them(world: World) -> None:
    world.run()
    world.run("policy.ppo.clip=0.1")
    assert _restore(world, 1) == from_("policy")
    before = world.files()
    assert _restore(world, 1) == from_("policy"), "a second time"
    assert world.files() == before
    world.run("policy.ppo.clip=0.3")
    with pytest.raises(RunFolderError, match=r"no results 1 that can be restored; available: 2, 3"):
        _restore(world, 1)


def test_results_made_from_others_are_not_restored_before_those(world: World) -> None:
    world.run()
    world.run("policy.ppo.clip=0.1")
    world.run("policy.ppo.clip=0.1", "seed=1")
    with pytest.raises(
        RunFolderError, match=r"policy was computed from other results of questions than .* restore those first"
    ):
        _restore(world, 1)
    _restore(world, 2)
    assert _restore(world, 1) == from_("policy")
    assert world.run(restart=False) == []


def test_restored_results_are_not_used_with_other_prompts_than_theirs(world: World) -> None:
    world.run()
    noted = world.info()["templates"]
    path = world.folder / "model" / "templates" / "referee.jinja"
    path.write_text(path.read_text() + "Be fair.")
    world.run()
    assert world.info()["templates"] != noted
    _restore(world, 1)
    assert world.info()["templates"] == noted
    with pytest.raises(RunFolderError, match=r"the templates changed\. Continuing moves these results"):
        world.run(restart=False)


def test_a_number_that_is_not_there_is_refused_with_those_that_are(world: World) -> None:
    world.run()
    world.run("policy.ppo.clip=0.1")
    with pytest.raises(RunFolderError, match=r"no results 7 that can be restored; available: 1"):
        _restore(world, 7)


def test_an_archive_without_a_stage_is_refused(world: World) -> None:
    world.run()
    write_json(world.run_folder / "replaced" / "1" / "archive.json", {"config": {}, "keys": {}, "stages": {}, "paths": []})
    with pytest.raises(RunFolderError, match=r"replaced/1 contains no stage of a run"):
        _restore(world, 1)


def test_an_archive_of_another_version_is_refused(world: World) -> None:
    world.run()
    facts = {"config": {"no such": 1}, "keys": {}, "stages": {"report": {}}, "paths": ["report"]}
    write_json(world.run_folder / "replaced" / "1" / "archive.json", facts)
    before = world.files()
    with pytest.raises(RunFolderError, match=r"replaced was written by another version"):
        _restore(world, 1)
    assert world.files() == before


# -- prompt templates ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "first"),
    [
        ("ask.jinja", "Ask.", "questions"),
        ("reply.jinja", "Answer {{ question }}", "replies"),
        ("judge.jinja", "Which of {{ first }} and {{ second }} answers {{ question }}?", "verdicts"),
        ("grade.jinja", "Grade {{ question }}", "evaluator"),
        ("referee.jinja", "Which of {{ first }} and {{ second }} answers {{ question }}?", "evaluation"),
        ("notes.jinja", "Read by none.", None),
    ],
)
def test_a_changed_template_redoes_the_stages_that_read_it(world: World, name: str, text: str, first: str | None) -> None:
    world.run()
    (world.folder / "model" / "templates" / name).write_text(text)
    assert world.run() == (from_(first) if first else [])
    assert (world.run_folder / "templates" / name).read_text() == text
    assert world.run() == []


@pytest.mark.parametrize(
    ("old", "new", "first"),
    [
        ("ask_stop", "# again\nask_stop", None),
        (r'ask_stop = ["\n"]', 'ask_stop = [";"]', "questions"),
        ("grade_reference_answer = false", "grade_reference_answer = true", "replies"),
        ('lead = "Verdict:"', 'lead = "Choice:"', "verdicts"),
        ('first = " 1"', 'first = " one"', "evaluation"),
    ],
)
def test_a_changed_setting_of_templates_redoes_the_stages_that_read_it(
    world: World, old: str, new: str, first: str | None
) -> None:
    world.run()
    path = world.folder / "model" / "templates" / "templates.toml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    assert world.run() == (from_(first) if first else [])


def test_the_referee_is_read_by_policy_training_that_looks_at_it(world: World) -> None:
    world.run("policy.judge_every=2")
    (world.folder / "model" / "templates" / "referee.jinja").write_text("{{ question }} {{ first }} {{ second }}")
    assert world.run("policy.judge_every=2") == from_("policy")


def test_a_template_that_another_includes_counts_where_that_is_read(world: World) -> None:
    templates = world.folder / "model" / "templates"
    (templates / "head.jinja").write_text("Hello. ")
    (templates / "grade.jinja").write_text("{% include 'head.jinja' %}{{ question }}")
    world.run()
    (templates / "head.jinja").write_text("Good morning. ")
    assert world.run() == from_("evaluator")


def _write_run(world: World, **values: str) -> None:
    store = RunStore(world.run_folder)
    store.update_run(**values)
    store.close()


def test_a_template_that_prints_the_date_is_made_of_the_day_of_the_run(world: World) -> None:
    grade = world.folder / "model" / "templates" / "grade.jinja"
    grade.write_text("{{ strftime_now('%Y') }} {{ question }}")
    world.run()
    info = world.info()
    assert info["date"] == date.today().isoformat()
    assert world.run() == []
    _write_run(world, date="2001-02-03")
    assert world.run() == from_("evaluator"), "another day makes another prompt"
    _write_run(world, date="yesterday")
    with pytest.raises(RunFolderError, match="yesterday"):
        world.run()


def test_the_date_of_a_run_that_prints_none_changes_nothing(world: World) -> None:
    world.run()
    _write_run(world, date="2001-02-03")
    assert world.run() == []
    assert world.info()["date"] == "2001-02-03"


# -- remedies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_a_removed_key_json_discards_nothing(world: World, stage: str) -> None:
    world.run()
    before = world.files()
    (world.run_folder / stage / "key.json").unlink()
    assert world.run(restart=False) == []
    assert world.files().keys() | {f"{stage}/key.json"} == before.keys()


def test_a_removed_run_json_is_rebuilt_by_the_whole_command(world: World) -> None:
    world.run("policy.ppo.clip=0.1")
    (world.run_folder / "run.json").unlink()
    assert world.run("policy.ppo.clip=0.1", restart=False) == []
    assert world.info()["status"] == "finished"
    assert world.info()["config"]["policy"]["ppo"]["clip"] == 0.1
    assert world.states() == dict.fromkeys(STAGES, "finished")


def test_results_whose_run_json_was_lost_are_not_archived_with_other_settings(world: World) -> None:
    world.run()
    (world.run_folder / "run.json").unlink()
    world.run("policy.ppo.clip=0.1")
    archive = json.loads((world.run_folder / "replaced" / "1" / "archive.json").read_text())
    assert archive["config"] is None
    before = world.files()
    with pytest.raises(RunFolderError, match=r"unknown, because run\.json was missing .* move the files you need from"):
        _restore(world, 1)
    assert world.files() == before
    assert world.run("policy.ppo.clip=0.1", restart=False) == []


def test_half_done_work_without_its_key_json_is_not_thrown_away_unasked(world: World) -> None:
    world.fails["replies"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        world.run()
    world.fails.clear()
    (world.run_folder / "replies" / "key.json").unlink()
    with pytest.raises(RunFolderError, match=r"replies/key\.json is missing.*Nothing was moved.*--restart"):
        world.run(restart=False)
    assert (world.run_folder / "replies" / "shard-00000.jsonl").exists()
    assert world.run()[0] == "replies"


@pytest.mark.parametrize("name", [*(path for paths in FILES.values() for path in paths), "replies/shard-00001.jsonl"])
@pytest.mark.parametrize("damage", ["changed", "removed"])
def test_the_remedy_for_a_damaged_or_lost_file_works(world: World, name: str, damage: str) -> None:
    world.run()
    before, path = world.files(), world.run_folder / name
    message = ""
    if damage == "changed":
        path.write_text("changed")
        with pytest.raises(RunFolderError, match="is damaged: its content does not match its recorded hash") as caught:
            world.run(restart=False)
        message = str(caught.value)
        assert world.files() == {**before, name: b"changed"}
    if damage == "removed" or "remove it" in message:
        path.unlink()
        if name.startswith("roles/"):
            with pytest.raises(RunFolderError, match=rf"{name} is missing.*Nothing was moved") as caught:
                world.run(restart=False)
            message = str(caught.value)
    assert len(world.run(restart="--restart" in message)) == 1
    assert world.files() == before
    assert world.run(restart=False) == []


def test_results_are_not_made_again_from_others_unasked(world: World) -> None:
    world.run()
    (world.run_folder / "replies" / "shard-00001.jsonl").unlink()
    world.text["replies"] = "another text"
    with pytest.raises(RunFolderError, match=r"verdicts: the results it was computed from have changed.*--restart"):
        world.run(restart=False)
    assert world.info()["status"] == "interrupted"
    assert world.run() == from_("verdicts")


def test_a_training_that_cannot_resume_starts_again_when_that_is_asked_for(world: World) -> None:
    lost = LostWorkError("no checkpoint can be used. Give --restart")
    world.fails["policy"] = lost
    for _ in range(2):
        with pytest.raises(LostWorkError):
            world.run(restart=False)
    assert not (world.run_folder / "replaced").exists()
    world.recovers.add("policy")
    assert world.run() == ["policy", "policy", "evaluation", "report"]
    assert world.states()["policy"] == "finished"
    assert "policy: no checkpoint can be used; the stage is rerun" in world.said.getvalue()
