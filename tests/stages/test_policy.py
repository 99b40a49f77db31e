"""The policy stage with a learner that does not change the policy's weights: the files it writes, and who samples with it."""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tiny_models
from full_disk import FullDisk
from selfeval.backbone.role_files import save_role
from selfeval.backbone.sequences import pad_sequences
from selfeval.config import RunConfig
from selfeval.errors import ExportError, InputError, LoopError, StorageError
from selfeval.judging.protocol import Judgement
from selfeval.judging.templates import Templates, templates_folder
from selfeval.prompt import Prompt
from selfeval.records import Question, Reply, Sampled, Split
from selfeval.rollout.requests import Rollout
from selfeval.rollout.thinking import ThinkingTokens
from selfeval.runs.export import export_role
from selfeval.runs.model import RunModel
from selfeval.runs.policy import Policy
from selfeval.runs.reader import RunReader
from selfeval.stages import evaluation, evaluation_work, policy
from selfeval.stages.context import Context
from selfeval.stages.evaluation_work import sample_replies
from selfeval.stages.policy import add_roles, ensure_policy, run
from selfeval.stages.terminal import Terminal
from selfeval.store import RUN_SCHEMA, RunStore, content_hash, read_metrics, write_json
from selfeval.training import experience
from selfeval.training.context import POLICY, Samples, Scores
from selfeval.training.evaluator import EVALUATOR
from selfeval.training.recorder import Recorder
from selfeval.training.watchdogs import Alarm

SETTINGS: Mapping[str, Any] = {
    "policy": {
        "gate": "off", "learner": "soft_q", "iterations": 3, "questions_per_iteration": 4, "replies_per_question": 2,
        "epochs": 1, "warmup_iterations": 0, "learning_rate": 0.03, "minibatch": 8,
    },
    "replies": {"max_new_tokens": 8},
    "evaluation": {"questions": 4},
}  # fmt: skip


def answer(run: Context, asked: Sequence[Prompt], guide: Any, *, seed: int) -> list[Rollout]:
    return sample_replies(run.model, run.config, asked, guide, limit=run.reply_limit, seed=seed)


def context(folder: Path, config: Mapping[str, Any] = SETTINGS) -> Context:
    """A run whose evaluator is trained, on a tiny model; its prompts and questions are there."""
    made = Context(RunConfig(**config), RunStore(folder), Terminal(quiet=True))
    backbone = tiny_models.backbone("llama", 384)
    made.__dict__.update(backbone=backbone, templates=Templates.load(templates_folder("none"), backbone.loaded.tokenizer))
    if not (folder / "roles").is_dir():
        backbone.roles.add(EVALUATOR, head=True)
        tiny_models.scramble(backbone, EVALUATOR, size=0.1)
        save_role(backbone, EVALUATOR, made.role_folder(EVALUATOR))
        write_json(made.role_folder(EVALUATOR) / "evaluator.json", {"temperature": 1.0, "mean": 0.0, "deviation": 1.0})
        splits = [Split.TRAIN] * 8 + [Split.TEST] * 4
        made.store.update_run(schema=RUN_SCHEMA)
        made.store.write_shard("questions", 0, [Question(f"q{i}", f"What is {i}?", s, "self") for i, s in enumerate(splits)])
        before = [Reply(f"q{i}-r0", f"q{i}", "7", (7, 1), "sample", 1.0, 1.0, -1.0, True) for i in range(12)]
        made.store.write_shard("replies", 0, before)
    return made


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def again(made: Context) -> Context:
    """The same run as another process finds it: a copy of its files, and a fresh backbone."""
    copy = Path(tempfile.mkdtemp(dir=made.store.root.parent)) / "run"
    shutil.copytree(made.store.root, copy, ignore=shutil.ignore_patterns(".lock"))
    return context(copy)


@pytest.fixture(scope="module")
def guided(tmp_path_factory: pytest.TempPathFactory) -> Context:
    made = context(tmp_path_factory.mktemp("guided") / "run")
    run(made)
    return made


def test_what_watchdogs_did_stays_on_record_when_the_loop_goes_back_and_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice back to the same iteration, then a kill, then on to the end from there."""
    made = context(tmp_path / "run", {**SETTINGS, "policy": {"gate": "off", "learner": "rloo", "iterations": 5}})
    values = {"reward": 0.0, "kl": 0.0, "length": 1.0}
    nan = [Alarm(step, "not_finite", "broken", "roll_back") for step in (4, 5)]

    def training(_: Any, __: Any, recorder: Recorder) -> None:
        log, resumed, rolled_back = recorder.metrics, recorder.resumed, recorder.rolled_back
        resumed(0)
        for step, alarms in ((1, []), (2, []), (3, []), (4, nan[:1])):
            log({"step": step, **values}, alarms)
        rolled_back(2, nan[:1])
        for step, alarms in ((3, []), (4, []), (5, nan[1:])):
            log({"step": step, **values}, alarms)
        rolled_back(2, nan[1:])
        log({"step": 3, **values}, [Alarm(3, "length_drift", "long", "warn")])
        resumed(2)  # it was killed
        for step in (3, 4, 5):
            log({"step": step, **values}, [])

    monkeypatch.setattr(policy, "train_policy", training)
    assert run(made)["iterations"] == 5
    noted = [(line["name"], line["step"], line["seen_at"]) for line in made.store.read_metrics("watchdogs")]
    assert noted == [("not_finite", 2, 4), ("not_finite", 2, 5)]
    assert [line["step"] for line in made.store.read_metrics("policy")] == [1, 2, 3, 4, 5]


def test_the_metrics_end_at_the_iteration_of_the_policy_that_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The held-out judge ends the training: metrics of later iterations are removed, and their samples stay."""
    made = context(tmp_path / "run", {**SETTINGS, "policy": {"gate": "off", "learner": "rloo", "iterations": 3}})
    finish = [Alarm(3, "judge_disagrees", "the judge's win rate fell", "finish")]
    samples: list[Path] = []

    def training(_: Any, __: Any, recorder: Recorder) -> None:
        keeper = recorder.checkpoints((POLICY,), {})
        best = keeper.beside("best")
        recorder.resumed(0)
        for step in (1, 2, 3):
            recorder.samples(step, Samples([], []), Scores(torch.zeros(0)))
            recorder.metrics({"step": step, "reward": 0.0, "kl": 0.0, "length": 1.0}, finish if step == 3 else [])
            if step == 2:
                best.save(step, {})
        samples.extend(made.store.shards("policy"))
        assert best.restore() is not None
        assert [line["step"] for line in made.store.read_metrics("policy")] == [1, 2, 3], "restore leaves them alone"
        recorder.rolled_back(2, finish)

    monkeypatch.setattr(policy, "train_policy", training)
    assert run(made)["iterations"] == 2
    assert [line["step"] for line in made.store.read_metrics("policy")] == [1, 2]
    assert [(line["step"], line["seen_at"]) for line in made.store.read_metrics("watchdogs")] == [(2, 3)]
    assert made.store.shards("policy") == samples
    assert len(samples) == 3


def prompts(made: Context) -> list[Prompt]:
    return [made.templates.prompt("reply", question=q.text) for q in made.questions(Split.TEST)] * 5


def test_the_saved_policy_is_byte_for_byte_that_of_the_start(guided: Context, tmp_path: Path) -> None:
    start = again(guided)
    add_roles(start)
    save_role(start.backbone, POLICY, tmp_path / POLICY)
    expected, found = hashes(tmp_path / POLICY), hashes(guided.role_folder(POLICY))
    assert found.keys() - expected.keys() == {"guide.json"}
    assert {name: found[name] for name in expected} == expected
    for role in ("q-0", "q-1"):
        assert {"adapter_model.safetensors", "role.json"} <= hashes(guided.role_folder(role)).keys()


def test_another_process_samples_with_the_same_guide(guided: Context) -> None:
    other = again(guided)
    guide = ensure_policy(other)
    assert guide is not None
    assert guide.roles == ("q-0", "q-1")
    assert guide == ensure_policy(guided)
    for role in guide.roles:
        for one, its in zip(
            other.backbone.roles.parameters(role).values(), guided.backbone.roles.parameters(role).values(), strict=True
        ):
            assert torch.equal(one, its)
    found = answer(other, prompts(other), guide, seed=3)
    assert found == answer(guided, prompts(guided), guide, seed=3)
    assert sum(a.ids != b.ids for a, b in zip(found, answer(other, prompts(other), None, seed=3), strict=True)) > 5


def test_the_policy_of_the_api_samples_with_its_guide(guided: Context) -> None:
    other = again(guided)
    other.store.update_run(config=other.config.model_dump(mode="json"))
    loaded = Policy(RunModel(RunReader(other.store.root), other.backbone, other.templates))
    found = loaded.reply([question.text for question in other.questions(Split.TEST)], n=5, seed=3)
    asked = [prompt for prompt in prompts(other)[:4] for _ in range(5)]
    with_guide, without = (
        [other.templates.text(rollout.ids) for rollout in answer(other, asked, guide, seed=3)]
        for guide in (ensure_policy(other), None)
    )
    assert [text for replies in found for text in replies] == with_guide
    assert with_guide != without


def test_the_policy_of_the_api_samples_as_the_run_evaluates(guided: Context) -> None:
    other = again(guided)
    config = {**other.config.model_dump(mode="json"), "evaluation": {"temperature": 0.5, "top_p": 0.75}}
    other.store.update_run(config=config)
    loaded = Policy(RunModel(RunReader(other.store.root), other.backbone, other.templates))
    asked = [question.text for question in other.questions(Split.TEST)]
    found = loaded.reply(asked, n=3, seed=3)
    assert found == loaded.reply(asked, n=3, seed=3, temperature=0.5, top_p=0.75)
    assert found != loaded.reply(asked, n=3, seed=3, temperature=1.0)
    assert found != loaded.reply(asked, n=3, seed=3, top_p=1.0)
    for top_p in (0.0, 1.5, float("nan")):
        with pytest.raises(InputError, match="top_p must be above 0 and at most 1"):
            loaded.reply(asked, top_p=top_p)


def test_evaluation_samples_with_the_guide_that_was_trained(guided: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    other = again(guided)
    unparsable = Judgement(None)
    judge = SimpleNamespace(judge=lambda comparisons, advance: [unparsable] * len(comparisons))
    monkeypatch.setattr(evaluation_work, "make_judge", lambda *_, **__: judge)
    with other.terminal.bar("evaluation", 12) as bar:
        _, rows = evaluation._answer_and_judge(other, None, bar)
    expected = answer(other, prompts(other)[:4], ensure_policy(other), seed=other.seed("evaluation", 0))
    assert [row.after_ids for row in rows] == [reply.ids for reply in expected]
    plain = answer(other, prompts(other)[:4], None, seed=other.seed("evaluation", 0))
    assert [row.after_ids for row in rows] != [reply.ids for reply in plain]


def test_a_policy_whose_weights_learned_has_no_guide(tmp_path: Path) -> None:
    made = context(tmp_path / "run", {**SETTINGS, "policy": {**SETTINGS["policy"], "learner": "rloo"}})
    run(made)
    assert ensure_policy(made) is None
    assert not any("q-" in role for role in made.backbone.roles.names)


def test_a_guided_policy_is_not_exported_as_if_it_had_learned(guided: Context, tmp_path: Path) -> None:
    options: dict[str, Any] = {"merge": False, "precision": "base"}
    with pytest.raises(ExportError, match=r"q-0, q-1 guide its sampling, .*changes the weights \(ppo, trpo, grpo"):
        export_role(guided.config, guided.store.root, POLICY, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


# -- models that think --------------------------------------------------------------------------------------------------


def test_replies_are_trained_on_with_their_thinking_and_recorded_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    thinking = ThinkingTokens(frozenset(range(48, 80)), frozenset(range(80, 150)), 6)
    monkeypatch.setattr(Templates, "thinking", lambda self, limit=None: thinking)
    made = context(tmp_path / "run", {**SETTINGS, "policy": {**SETTINGS["policy"], "learner": "ppo", "iterations": 1}})
    lengths, sampled = [], list[Samples]()
    kept = policy._RunRecorder.samples

    def samples(self: Any, iteration: int, found: Samples, scores: Scores) -> None:
        sampled.append(found)
        kept(self, iteration, found, scores)

    def batches(backbone: Any, prompts: Any, replies: Any) -> Any:
        lengths.append([len(reply) for reply in replies])
        return pad_sequences(backbone, prompts, replies)

    monkeypatch.setattr(policy._RunRecorder, "samples", samples)
    monkeypatch.setattr(experience, "pad_sequences", batches)
    run(made)
    rollouts = sampled[0].rollouts
    assert any(r.hidden for r in rollouts)
    assert [len(r.ids) for r in rollouts] in lengths, "the thinking was sampled, so it is trained on"
    templates, records = made.templates, made.store.read("policy", Sampled)
    assert [r.text for r in records] == [templates.text(r.reply_ids) for r in rollouts]
    assert [r.thinking for r in records] == [templates.thinking_text(r.thinking_ids) for r in rollouts]


def test_judged_pairs_without_their_thinking_are_not_trained_on(tmp_path: Path) -> None:
    made = context(tmp_path / "run", {**SETTINGS, "policy": {"gate": "off", "learner": "dpo", "dpo": {"pairs": "kept"}}})
    assert policy._kept_pairs(made) == []
    made.store.write_shard("replies", 1, [Reply("q0-r1", "q0", "7", (7, 1), "sample", 1.0, 1.0, -1.0, True, thinking="four?")])
    with pytest.raises(LoopError, match=r'policy\.dpo trains on the judged pairs, but the model thinks.*pairs = "sampled"'):
        policy._kept_pairs(made)


# -- a full disk ----------------------------------------------------------------------------------------------------------

TIMES = ("seconds",)
TRAINED: Mapping[str, Any] = {
    **SETTINGS,
    "policy": {
        "gate": "off", "learner": "ppo", "iterations": 3, "questions_per_iteration": 4, "replies_per_question": 2, "epochs": 1,
        "minibatch": 8, "checkpoint_every": 1,
    },
}  # fmt: skip


def outcome_on(folder: Path, disk: FullDisk | None = None) -> bool:
    """Train as another process would; return whether the disk had room, after checking the message."""
    made: Context | None = None
    try:
        made = context(folder, TRAINED)
        run(made)
    except StorageError as error:
        message = str(error)
        assert disk is not None
        assert disk.refused is not None
        names = [re.sub(rf"/\.([^/]+)\.part{rest}", r"/\1", disk.refused) for rest in ("", ".*")]  # the file, or its folder
        assert any(re.search(rf"cannot write {re.escape(name)}\b", message) for name in names), (message, disk.refused)
        assert "free some space and rerun the same command" in message
        return False
    finally:
        if made is not None:
            made.store.close()
    return True


def written(folder: Path) -> dict[str, Any]:
    """The files of the stage; of metrics all that does not depend on time, so not the hash of their copy in a checkpoint."""
    paths = [path for part in ("roles/policy", "policy", "checkpoints") for path in sorted((folder / part).rglob("*"))]
    files: dict[str, Any] = {
        str(p.relative_to(folder)): content_hash(p)
        for p in paths
        if p.is_file() and p.suffix != ".jsonl" and p.name != "manifest.json"
    }
    lines = read_metrics(folder / "metrics" / "policy.jsonl")
    return {**files, "metrics": [{k: v for k, v in line.items() if k not in TIMES} for line in lines]}


def test_a_full_disk_at_any_write_of_a_training_is_named_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert outcome_on(tmp_path / "undisturbed")
    disk = FullDisk(tmp_path / "run", monkeypatch)
    disk.kinds = None
    context(tmp_path / "run", TRAINED).store.close()  # the stages before it
    disk.kinds = set()
    while not outcome_on(tmp_path / "run", disk):
        assert list((tmp_path / "run").rglob("*.part")) == []
        disk.free()
    refused = "\n".join(path for _, path in disk.kinds)
    for path in ("roles/.policy.part/adapter_model.safetensors", "policy/.shard-N.jsonl.part", "metrics/policy.jsonl"):
        assert f"/run/{path}" in refused
    assert "/run/checkpoints/policy/.step-N.part/state.safetensors" in refused
    assert written(tmp_path / "run") == written(tmp_path / "undisturbed")
