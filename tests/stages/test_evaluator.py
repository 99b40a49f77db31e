"""The stage that trains evaluators, on a tiny model with random pairs."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from jinja2 import Environment

import tiny_models
from selfeval.backbone.load import LoadedModel
from selfeval.backbone.roles import Backbone
from selfeval.config import RunConfig
from selfeval.judging.templates import Settings, Templates, templates_folder
from selfeval.quality.margin_signals import fit_margin_signals
from selfeval.records import Pair, Split
from selfeval.runs.members import confidence_of
from selfeval.stages import evaluator
from selfeval.stages.added_pairs import CONFIDENCE
from selfeval.stages.context import Context
from selfeval.stages.garbled_pairs import GARBLED_CONFIDENCE
from selfeval.stages.terminal import Terminal
from selfeval.store import RunStore
from selfeval.training import evaluator as training
from selfeval.training.evaluator import Preference, score_replies, train_evaluator

QUESTIONS = 24


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny_models.backbone("llama", 384)


def run_of(folder: Path, backbone: Backbone, **settings: Any) -> Context:
    """A run with two training pairs for each of its questions."""
    made = Context(RunConfig(evaluator={"epochs": 1, "batch": 8, **settings}), RunStore(folder / "run"), Terminal(quiet=True))
    for role in backbone.roles.names:
        backbone.roles.remove(role)
    made.__dict__.update(backbone=backbone, templates=Templates.load(templates_folder("none"), backbone.loaded.tokenizer))
    made.store.write_shard("pairs/train", 0, [_pair(i, n) for i in range(QUESTIONS) for n in (0, 1)])
    return made


def _pair(i: int, n: int) -> Pair:
    draw = random.Random(f"{i}/{n}")
    chosen, rejected = (tuple(draw.randrange(10, 300) for _ in range(4)) for _ in range(2))
    return Pair(f"q{i}", f"What is {i} and {i}?", f"good {i}/{n}", "bad", 0.9, chosen, rejected, Split.TRAIN)


def trained_on(run: Context, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], Mapping[str, list[Preference]]]:
    """Run the stage; return its counts and the pairs that each member was trained on."""
    seen: dict[str, list[Preference]] = {}

    def watched(backbone: Any, pairs: Any, *args: Any, role: str, **options: Any) -> None:
        seen[role] = list(pairs)
        train_evaluator(backbone, pairs, *args, role=role, **options)

    monkeypatch.setattr(evaluator, "train_evaluator", watched)
    return evaluator.run(run), seen


def test_mismatched_pairs_are_trained_on_and_made_of_training_questions_only(
    tmp_path: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(tmp_path, backbone, mismatched=0.5)
    counts, seen = trained_on(run, monkeypatch)
    kept, held = evaluator._split(run)
    assert counts["trained"] == len(kept)
    assert counts["held_out"] == len(held)
    assert counts["added"] == round(0.5 * len(kept))
    added = seen["evaluator-0"][len(kept) :]
    assert len(added) == counts["added"]
    assert {p.rejected for p in added} <= {p.chosen_ids for p in kept}
    assert not {p.rejected for p in added} & {p.chosen_ids for p in held}


def test_garbled_pairs_are_made_of_training_questions_only(
    tmp_path: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(tmp_path, backbone, garbled=1.0)
    counts, seen = trained_on(run, monkeypatch)
    kept, held = evaluator._split(run)
    added = seen["evaluator-0"][len(kept) :]
    assert 0 < counts["added"] == len(added) <= len(kept)
    replies = {ids for pair in kept for ids in (pair.chosen_ids, pair.rejected_ids)}
    assert {pair.chosen for pair in added} & {pair.rejected_ids for pair in kept}  # a garbled text is worse than these too
    assert not {pair.chosen for pair in added} & {ids for pair in held for ids in (pair.chosen_ids, pair.rejected_ids)}
    # A text that is no reply is garbled, or a rejected reply in another style with the label of its pair.
    labels = {pair.label for pair in added if pair.rejected not in replies}
    assert labels == {GARBLED_CONFIDENCE, *(pair.confidence for pair in kept)}


def test_the_confidence_of_margin_and_disagreement_is_saved_with_the_run(tmp_path: Path, backbone: Backbone) -> None:
    run = run_of(tmp_path, backbone, members=2, confidence="temperature", held_out=0.49)
    run.store.write_shard("pairs/train", 1, [_pair(i, n) for i in range(QUESTIONS, 4 * QUESTIONS) for n in (0, 1)])
    evaluator.run(run)
    held = evaluator.preferences(run, evaluator._split(run)[1])
    assert len(held) >= evaluator.FEWEST_FOR_TEMPERATURE
    found = confidence_of(run.store.root / "roles")
    assert found is not None
    assert not found.steps
    replies = [p.chosen for p in held] + [p.rejected for p in held]
    scores_KN = run.scorer().each([p.prompt for p in held] * 2, replies)
    margins_KN = scores_KN[:, : len(held)] - scores_KN[:, len(held) :]
    apart = (margins_KN[0] - margins_KN[1]).abs() / 2  # the population deviation of two numbers
    questions = [pair.question_id for pair in evaluator._split(run)[1]]  # two pairs of each
    assert len(set(questions)) < len(held)
    expected = fit_margin_signals(
        *(margins_KN.mean(0).tolist(), apart.tolist(), [0.9] * len(held), "temperature"), prior=0.5, groups=questions
    )
    assert found.scale == pytest.approx(expected.scale, rel=1e-3)
    assert list(found.weights.values()) == pytest.approx(list(expected.weights.values()), rel=1e-3, abs=1e-4)


def test_without_the_setting_nothing_is_added(tmp_path: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(tmp_path, backbone)
    counts, seen = trained_on(run, monkeypatch)
    assert seen["evaluator-0"] == evaluator.preferences(run, evaluator._split(run)[0])
    assert "added" not in counts


def test_attack_pairs_are_encoded_as_typed_replies(tmp_path: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(tmp_path, backbone, attacks=0.5)
    counts, seen = trained_on(run, monkeypatch)
    kept = evaluator._split(run)[0]
    added, end = seen["evaluator-0"][len(kept) :], backbone.loaded.eos_ids[:1]
    assert counts["added"] == len(added) == round(0.5 * len(kept))
    questions = {run.grade_prompt(p.question_id, p.prompt): p.prompt for p in kept}
    echoes = [p for p in added if p.rejected == (*run.templates.reply_ids(questions[p.prompt]), *end)]
    assert echoes
    assert {p.rejected[-1:] for p in added} == {end}
    assert {p.label for p in added} == {CONFIDENCE}


def test_long_attacks_are_shortened_to_the_context(tmp_path: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(tmp_path, backbone, attacks=1.0)
    prompt = run.grade_prompt("q0", "What is 0 and 0?")
    monkeypatch.setattr(LoadedModel, "context_length", len(prompt.ids) + 30)
    _, seen = trained_on(run, monkeypatch)
    sizes = [len(p.prompt.ids) + len(p.rejected) for p in seen["evaluator-0"]]
    assert max(sizes) == len(prompt.ids) + 30
    assert {p.rejected[-1:] for p in seen["evaluator-0"][-5:]} == {backbone.loaded.eos_ids[:1]}


def test_each_member_is_trained_on_a_bag_of_questions(
    tmp_path: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(tmp_path, backbone, members=2, bag=0.6)
    _, seen = trained_on(run, monkeypatch)
    every = evaluator.preferences(run, evaluator._split(run)[0])
    prompts = {role: {p.prompt for p in pairs} for role, pairs in seen.items()}
    assert prompts["evaluator-0"] != prompts["evaluator-1"]
    for role, pairs in seen.items():
        assert 0.3 * len(every) < len(pairs) < 0.9 * len(every)
        # By question: all pairs of a question or none.
        assert pairs == [p for p in every if p.prompt in prompts[role]]
    steps = [line["step"] for line in run.store.read_metrics("evaluator")]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) == sum(-(-len(pairs) // 8) for pairs in seen.values())


def test_members_read_different_layers_and_prompts(tmp_path: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [{}, {"layer": 1, "reference_answer": False}]
    run = run_of(tmp_path, backbone, members=3, inputs=inputs)
    with_reference = Environment(autoescape=False).from_string("{{ reference_answer }}: {{ question }}")
    monkeypatch.setattr(Templates, "_rendered", lambda templates, kind, values: with_reference.render(values))
    run.__dict__["templates"] = replace(run.templates, settings=Settings(grade_reference_answer=True))
    run.__dict__["_reference_answers"] = {f"q{i}": "A guess" for i in range(QUESTIONS)}
    _, seen = trained_on(run, monkeypatch)
    whole = evaluator.preferences(run, evaluator._split(run)[0])
    alone = [
        replace(p, prompt=run.templates.grade_prompt(q.prompt, ""))
        for p, q in zip(whole, evaluator._split(run)[0], strict=True)
    ]
    assert seen == {"evaluator-0": whole, "evaluator-1": alone, "evaluator-2": whole}
    assert backbone.roles.depths == {"evaluator-1": 1}
    # From the role folders alone, as the report and the Python API load them.
    for role in seen:
        backbone.roles.remove(role)
    members = run.load_evaluators()
    assert [m.reference_answer for m in members] == [True, False, True]
    assert backbone.roles.depths == {"evaluator-1": 1}
    prompt, reply = run.grade_prompt("q0", "What is 0 and 0?"), (20, 30, 1)
    scores = run.scorer().each([prompt], [reply])[:, 0].tolist()
    expected = [
        (score_replies(backbone, m.role, [read], [reply], 64)[0] - m.mean) / m.deviation
        for m, read in zip(members, [prompt, run.templates.grade_prompt("What is 0 and 0?", ""), prompt], strict=True)
    ]
    assert scores == pytest.approx(expected, abs=1e-5)


def test_members_of_other_ranks_and_poolings_are_trained_scored_and_loaded(tmp_path: Path, backbone: Backbone) -> None:
    run = run_of(tmp_path, backbone, members=2, inputs=[{"rank": 2}, {"pooling": "mean"}])
    evaluator.run(run)
    assert (backbone.roles.ranks, backbone.roles.poolings) == ({"evaluator-0": 2}, {"evaluator-1": "mean"})
    prompt, reply = run.grade_prompt("q0", "What is 0 and 0?"), (20, 30, 40, 1)
    before = run.scorer().each([prompt], [reply])[:, 0].tolist()
    for role in backbone.roles.names:
        backbone.roles.remove(role)
    # The settings of the run are not read: a member is loaded from its folder alone.
    plain = replace(run, config=RunConfig(evaluator={"members": 2}))
    plain.__dict__.update(backbone=backbone, templates=run.templates)
    assert plain.scorer().each([prompt], [reply])[:, 0].tolist() == pytest.approx(before, abs=1e-6)
    # As PPO makes its critic.
    backbone.roles.add("critic", copy_of="evaluator-0", head=True)
    assert backbone.roles.ranks == {"evaluator-0": 2, "critic": 2}
    assert abs(before[0] - before[1]) > 1e-3


def test_early_stopping_measures_the_held_out_pairs(
    tmp_path: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(tmp_path, backbone, early_stopping=True, checkpoint_every=2)
    seen: list[list[Preference]] = []
    monkeypatch.setattr(training, "_mean_loss", lambda backbone, role, pairs, *rest: seen.append(list(pairs)) or 0.5)
    evaluator.run(run)
    held = evaluator.preferences(run, evaluator._split(run)[1])
    assert held
    assert seen == [held] * len(seen)
    measured = [line["step"] for line in run.store.read_metrics("evaluator") if "held_out_loss" in line]
    assert measured[:2] == [2, 4]
