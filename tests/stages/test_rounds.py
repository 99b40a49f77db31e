from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_models
from selfeval.backbone.adapters import BASE
from selfeval.backbone.role_files import save_role
from selfeval.backbone.sequences import reply_logprobs
from selfeval.config import RunConfig
from selfeval.errors import RunFolderError
from selfeval.evaluation.evaluator import JudgedPair
from selfeval.judging.templates import Templates, templates_folder
from selfeval.records import Pair, Question, ReferenceAnswer, Reply, Split, Verdict, VerdictState
from selfeval.rollout import engines
from selfeval.rollout.engine import generate
from selfeval.rollout.requests import Request, Rollout
from selfeval.runs.reader import round_folder
from selfeval.stages import evaluation, questions, replies
from selfeval.stages.context import Context
from selfeval.stages.evaluation_work import kl_to_start
from selfeval.stages.graph import stage_keys
from selfeval.stages.policy import add_roles
from selfeval.stages.shards import START
from selfeval.stages.terminal import Terminal
from selfeval.store import RunStore, write_json
from selfeval.training.context import POLICY, REFERENCE
from selfeval.training.evaluator import EVALUATOR
from stage_world import STAGES, World
from token_prompts import as_prompts


def later(number: int, stages: Sequence[str] = STAGES) -> list[str]:
    return [f"{number} {stage}" for stage in stages]


def from_(stage: str) -> list[str]:
    return list(STAGES[STAGES.index(stage) :])


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path / "world", monkeypatch)


def status(world: World, number: int = 1) -> str:
    found: str = json.loads((round_folder(world.run_folder, number) / "run.json").read_text())["status"]
    return found


# -- what runs ----------------------------------------------------------------------------------------------------------


def test_the_rounds_run_one_after_another_and_the_report_tells_of_each(world: World) -> None:
    assert world.run("rounds=3") == [*STAGES, *later(2), "report", *later(3), "report"]
    assert [status(world, number) for number in (1, 2, 3)] == ["finished"] * 3
    assert sorted(path.name for path in (world.run_folder / "rounds").iterdir()) == ["02", "03"]
    assert world.run("rounds=3") == []
    assert not list(world.run_folder.rglob("replaced"))


def test_a_finished_run_goes_on_with_more_rounds_and_back_without_losing_them(world: World) -> None:
    assert world.run() == list(STAGES)
    assert world.run("rounds=2") == ["report", *later(2), "report"]
    assert world.run() == ["report"]
    assert world.run("rounds=3") == ["report", *later(3), "report"]
    assert not list(world.run_folder.rglob("replaced"))


class Recorder:
    """An executor that notes when it is made and closed."""

    def __init__(self, context: Context, events: list[str]) -> None:
        self.round, self.events = context.round, events
        events.append(f"made {self.round}")

    def map(self, work: Any, batches: Sequence[Any]) -> Iterator[Any]:
        yield from ()

    def close(self) -> None:
        self.events.append(f"closed {self.round}")


def test_every_round_uses_the_chosen_executor_and_closes_it_after_each_stage_even_a_failed_one(world: World) -> None:
    events: list[str] = []
    world.executor_of = lambda context: Recorder(context, events)
    world.fails["2 replies"] = RuntimeError("no network")
    with pytest.raises(RuntimeError, match="no network"):
        world.run("rounds=2")
    assert events == ["made 1", "closed 1"] * 4 + ["made 2", "closed 2"] * 2  # four stages of this world write shards


def test_until_names_a_stage_of_one_round(world: World) -> None:
    assert world.run("rounds=2", until="pairs") == list(STAGES[:4])
    assert world.run("rounds=2", until="report") == from_("evaluator")
    assert (status(world), world.run("rounds=2", until="report")) == ("partial", [])
    assert world.run("rounds=2", until="evaluator", round=2) == later(2, STAGES[:5])
    assert (status(world), status(world, 2)) == ("partial", "partial")
    assert world.run("rounds=2") == [*later(2, STAGES[5:]), "report"]
    assert status(world) == "finished"
    with pytest.raises(RunFolderError, match="there is no round 3; rounds = 2"):
        world.run("rounds=2", until="pairs", round=3)


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_an_interrupted_round_goes_on_where_it_was(world: World, error: BaseException) -> None:
    world.fails["2 verdicts"] = error
    with pytest.raises(type(error)):
        world.run("rounds=2")
    assert (status(world), status(world, 2)) == ("interrupted", "interrupted")
    world.fails.clear()
    assert world.run("rounds=2") == [*later(2, STAGES[2:]), "report"]
    assert world.redone[0] == "verdicts 1"  # the shard before the exception was kept
    assert (status(world), status(world, 2)) == ("finished", "finished")


def test_the_folder_of_a_round_is_no_run_to_go_on_with(world: World) -> None:
    world.run("rounds=2")
    before = world.files()
    run_folder = world.run_folder
    World.run_folder = property(lambda self: run_folder / "rounds" / "02")  # type: ignore[assignment, misc]
    try:
        with pytest.raises(RunFolderError, match=r"is round 2 of a run; pass the folder of the run .*world/run\)"):
            world.run("rounds=2")
    finally:
        World.run_folder = property(lambda self: self.folder / "run")  # type: ignore[assignment, misc]
    assert world.files() == before


# -- what depends on what -----------------------------------------------------------------------------------------------


def test_a_changed_policy_redoes_the_rounds_after_it_and_says_so_at_once(world: World) -> None:
    world.run("rounds=3")
    assert world.run("rounds=3", "policy.ppo.clip=0.1", until="policy") == ["policy"]
    for number in (2, 3):  # before a stage of theirs has begun
        assert f"round {number}, questions: the configuration has changed" in world.said.getvalue()
        assert not (round_folder(world.run_folder, number) / "questions" / "shard-00000.jsonl").exists()
        assert list((round_folder(world.run_folder, number) / "replaced").rglob("shard-00000.jsonl"))
        assert status(world, number) == "partial"
    again = ["evaluation", "report", *later(2), "report", *later(3), "report"]
    assert world.run("rounds=3", "policy.ppo.clip=0.1") == again


def test_a_changed_evaluation_redoes_that_of_every_round_and_nothing_else(world: World) -> None:
    world.run("rounds=2")
    evidence = ("evaluation", "report")
    assert world.run("rounds=2", "evaluation.questions=7") == [*evidence, *later(2, evidence), "report"]


def test_a_lost_shard_that_comes_out_otherwise_redoes_later_rounds_too(world: World) -> None:
    world.run("rounds=2")
    (world.run_folder / "replies" / "shard-00001.jsonl").unlink()
    world.text["replies"] = "another text"
    assert world.run("rounds=2") == [*from_("replies"), *later(2), "report"]
    assert "round 2, questions: the results it was computed from have changed" in world.said.getvalue()
    assert world.run("rounds=2") == []


def test_a_lost_shard_that_comes_out_the_same_leaves_later_rounds_alone(world: World) -> None:
    world.run("rounds=2")
    before = world.files()
    (world.run_folder / "pairs" / "shard-00001.jsonl").unlink()
    assert [label for label in world.run("rounds=2") if label != "report"] == ["pairs"]
    assert world.files() == before


def test_the_keys_of_a_round_hang_on_the_policy_of_the_one_before_and_on_its_number() -> None:
    config = RunConfig()
    first, second, third = (stage_keys(config, [], number) for number in (1, 2, 3))
    assert len({keys[stage] for keys in (first, second, third) for stage in STAGES}) == 3 * len(STAGES)
    other = stage_keys(RunConfig(evaluation={"questions": 7}), [], 2)
    assert [stage for stage in STAGES if other[stage] != second[stage]] == from_("evaluation")
    assert stage_keys(RunConfig(policy={"ppo": {"clip": 0.1}}), [], 2)["questions"] != second["questions"]


# -- what a round starts from -------------------------------------------------------------------------------------------

SEEDS = ["How many marbles has Ann after a long and windy day outside with Ben?"]


def question(name: str, number: int) -> str:
    return f"{name} has {number} pens and some coins in the old box at home so how many pens has {name} got?"


FIRST = [
    Question("q000000", question("Tom", 3), Split.TRAIN, "self"),
    Question("q000001", question("Mia", 4), Split.TEST, "self"),
    Question("q000002", question("Sam", 5), Split.TEST, "self"),
]


def rounds(folder: Path, **changes: Any) -> tuple[Context, Context]:
    """Two rounds of a run; the second has a tiny backbone, and the policy of the first as its start."""
    (folder / "seeds.txt").write_text("\n".join(SEEDS))
    config = RunConfig(seeds=str(folder / "seeds.txt"), rounds=2, **changes)
    terminal = Terminal(quiet=True)
    first = Context(config, RunStore(folder / "run"), terminal)
    first.store.write_shard("questions", 0, FIRST)
    trained = tiny_models.backbone("llama", 384)
    trained.roles.add(POLICY)
    tiny_models.scramble(trained, POLICY, size=0.1)
    save_role(trained, POLICY, first.role_folder(POLICY))
    second = Context(config, RunStore(round_folder(first.store.root, 2)), terminal, earlier=(first.store,))
    vars(second)["backbone"] = backbone = tiny_models.backbone("llama", 384)
    vars(second)["templates"] = Templates.load(templates_folder("no such model"), backbone.loaded.tokenizer)
    return first, second


def test_the_start_writes_new_training_questions_and_the_test_questions_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, run = rounds(tmp_path, questions={"train": 2, "test": 5, "shard": 6})
    written = [question("Tom", 3), question("Mia", 4), question("Tom", 3).upper(), question("Eve", 6), question("Eve", 7)]
    acting: list[str | None] = []

    def write(backbone: Any, requests: Sequence[Request], **_: Any) -> list[Rollout]:
        acting.append(backbone.acting)
        texts = [*written, question("Eve", 8)]
        return [Rollout(tuple(run.templates.tokenizer.encode(" " + text)), (), True) for text in texts]

    monkeypatch.setattr(questions, "generate", write)
    counts = questions.run(run)
    assert acting == [START]
    found = run.store.read("questions", Question)
    assert found[:2] == FIRST[1:]  # test questions with their ids, however many the configuration wants
    assert found[2:] == [
        Question("r2q000002", question("Eve", 6), Split.TRAIN, "self"),
        Question("r2q000003", question("Eve", 7), Split.TRAIN, "self"),
    ]
    drops = [(d.reason, d.detail["of"]) for d in run.store.read_dropped("questions")]
    assert drops == [("near_duplicate", name) for name in ("q000000", "q000001", "q000000")]
    assert counts == {"train": 2, "test": 2, "dropped_near_duplicate": 3}
    again = run.store.shards("questions")[1]
    again.unlink()
    assert questions.run(run) == counts  # as a kill after the first shard leaves it


def test_the_start_replies_and_the_base_gives_the_reference_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, run = rounds(tmp_path, replies={"beam_share": 1.0, "max_new_tokens": 3, "beams": 2})
    run.store.write_shard("questions", 0, [*FIRST[1:], Question("r2q000002", question("Eve", 6), Split.TRAIN, "self")])
    seen: list[tuple[str | None, set[float]]] = []

    def sampled(backbone: Any, requests: Sequence[Request], **options: Any) -> list[Rollout]:
        seen.append((backbone.acting, {r.temperature for r in requests}))
        return generate(backbone, requests, **options)

    monkeypatch.setattr(engines, "generate", sampled)
    monkeypatch.setattr(
        replies,
        "beam_search",
        lambda backbone, prompts, **_: seen.append((backbone.acting, set())) or [Rollout((5,), (-1.0,), True) for _ in prompts],
    )
    monkeypatch.setattr(Templates, "grades_with_reference_answer", True)
    first.store.write_shard("reference_answers", 0, [ReferenceAnswer(q.id, "of round 1") for q in FIRST])
    replies.run(run)
    assert [who for who, _ in seen] == [START, START, BASE]
    assert seen[2][1] == {0.0}
    assert 1.0 in seen[0][1]  # plain samples to test questions
    assert len(run.store.read("replies", Reply)) == 6
    assert [w.question_id for w in run.store.read("reference_answers", ReferenceAnswer)] == ["r2q000002"]
    assert {run._reference_answers[q.id] for q in FIRST} == {"of round 1"}


def test_the_policy_starts_as_a_copy_of_the_start_and_the_reference_stays_there(tmp_path: Path) -> None:
    _, run = rounds(tmp_path)
    run.backbone.roles.add(EVALUATOR, head=True)
    write_json(run.role_folder(EVALUATOR) / "evaluator.json", {"mean": 0.0, "deviation": 1.0})
    add_roles(run)
    saved = run.backbone.roles.parameters(START)
    assert any(bool(p.any()) for name, p in saved.items() if "lora_B" in name)
    for role in (POLICY, REFERENCE):
        for own, theirs in zip(run.backbone.roles.parameters(role).values(), saved.values(), strict=True):
            assert torch.equal(own, theirs)
    assert {
        role: any(p.requires_grad for p in run.backbone.roles.parameters(role).values()) for role in (POLICY, REFERENCE, START)
    } == {
        POLICY: True,
        REFERENCE: False,
        START: False,
    }
    tiny_models.scramble(run.backbone, POLICY, size=0.2)
    for own, theirs in zip(run.backbone.roles.parameters(REFERENCE).values(), saved.values(), strict=True):
        assert torch.equal(own, theirs)


def test_kl_is_measured_to_the_start_and_not_to_the_base(tmp_path: Path) -> None:
    _, run = rounds(tmp_path)
    run.ensure_start()
    run.backbone.roles.add(POLICY, copy_of=START)
    prompts = as_prompts([(5, 9, 2), (7,), (30, 31, 32, 33)])
    with run.backbone.acting_as(POLICY):
        rollouts = generate(run.backbone, [Request(p) for p in prompts], max_new_tokens=6, seed=3)
    assert kl_to_start(run.model, run.config, prompts, rollouts) == pytest.approx([0.0] * 3, abs=1e-5)
    with run.backbone.acting_as(BASE):
        from_base = reply_logprobs(run.backbone, prompts, [r.ids for r in rollouts], batch_tokens=100)
    assert max(abs(sum(r.logprobs) - sum(b)) for r, b in zip(rollouts, from_base, strict=True)) > 0.01


# -- what evaluators learn from and are measured on ---------------------------------------------------------------------


def pair(name: str, split: Split) -> Pair:
    return Pair(name, f"question {name}", "a", "b", 0.9, (5, 1), (6, 1), split)


def test_evaluators_learn_from_the_training_pairs_of_all_rounds(tmp_path: Path) -> None:
    first, run = rounds(tmp_path)
    for store, trained in ((first.store, "q000000"), (run.store, "r2q000002")):
        store.write_shard("pairs/train", 0, [pair(trained, Split.TRAIN)])
        store.write_shard("pairs/test", 0, [pair("q000001", Split.TEST)])
    assert [p.question_id for p in run.training_pairs()] == ["q000000", "r2q000002"]
    assert [p.question_id for p in first.training_pairs()] == ["q000000"]
    first.store.write_shard("reference_answers", 0, [ReferenceAnswer("q000000", "of round 1")])
    run.store.write_shard("reference_answers", 0, [ReferenceAnswer("r2q000002", "of round 2")])
    assert run._reference_answers == {"q000000": "of round 1", "r2q000002": "of round 2"}


class Gold:
    name = "letters"

    def is_right(self, question: str, reply: str) -> bool | None:
        return reply == "right"


def judged(names: Sequence[str], margins: Sequence[float]) -> list[JudgedPair]:
    """Pairs whose first reply is right, with these margins of the evaluator."""
    found = []
    for name, margin in zip(names, margins, strict=True):
        both = [
            Reply(f"{name}-r{n}", name, text, (5,), "sample", 1.0, 1.0, -1.0, True) for n, text in enumerate(("right", "no"))
        ]
        said = Verdict(name, Split.TEST, both[0].id, both[1].id, VerdictState.KEPT, 0.9, 0.0, None)
        found.append(JudgedPair(said, (both[0], both[1]), margin, 0.0, (True, False)))
    return found


NO_SCORE: Any = None


def test_every_rounds_evaluator_is_measured_on_round_ones_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, run = rounds(tmp_path)
    names = [f"q{i}" for i in range(10)]
    asked = {name: Question(name, name, Split.TEST, "self") for name in names}
    # Round 1 is right on 6 of 10; round 2 on 8 of the same 10: it gains three and loses one.
    then, now = [1.0] * 6 + [-1.0] * 4, [-1.0] + [1.0] * 8 + [-1.0]
    by_gold = judged(names, then)
    found = evaluation._first_pairs(first, by_gold, asked, Gold(), NO_SCORE)
    assert found.accuracy_gold is not None
    assert (found.accuracy_gold.value, found.accuracy_gold.n, found.gain) == (0.6, 10, None)
    measured: list[RunStore] = []

    def scored(context: Any, questions: Any, gold: Any, score: Any, store: RunStore) -> list[JudgedPair]:
        measured.append(store)
        return judged(names, now)

    monkeypatch.setattr(evaluation, "_judged_test_pairs", scored)
    own = judged(names[:2], [1.0, 1.0])
    found = evaluation._first_pairs(run, own, asked, Gold(), NO_SCORE)
    assert measured == [first.store]
    assert found.accuracy_gold is not None
    assert (found.accuracy_gold.value, found.accuracy_gold.n) == (0.8, 10)
    assert found.gain is not None
    assert (found.gain.value, found.gain.n) == (pytest.approx(0.2), 10)
    assert (found.gain.ci_low or 0) < 0 < 0.2 < (found.gain.ci_high or 0)


# -- one process, one base ----------------------------------------------------------------------------------------------


def test_a_released_backbone_leaves_the_memory(tmp_path: Path) -> None:
    _, run = rounds(tmp_path)
    run.ensure_start()
    model = weakref.ref(run.backbone.model)
    gc.disable()  # the release itself must ensure this
    try:
        run.release()
    finally:
        gc.enable()
    assert model() is None


def test_rounds_draw_otherwise_from_one_seed(tmp_path: Path) -> None:
    first, second = rounds(tmp_path, seed=3)
    assert first.round_seed == 3
    assert first.seed("questions", 0) == Context(first.config, first.store, first.terminal).seed("questions", 0)
    third = Context(first.config, second.store, first.terminal, earlier=(first.store, second.store))
    assert len({run.seed("questions", 0) for run in (first, second, third)}) == 3
    assert second.name == "run, round 2"
