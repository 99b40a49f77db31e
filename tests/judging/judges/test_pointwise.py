"""The pointwise judge: two grades compared by hand, grades of real models, and a run that is labelled by them."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import tiny_models
from judge_engine import judges_generate_with
from selfeval.backbone.adapters import BASE
from selfeval.backbone.roles import Backbone
from selfeval.cli.app import app
from selfeval.config import VerdictsConfig, load_config
from selfeval.judging.judges import make_judge
from selfeval.judging.judges.pointwise import compare_grades
from selfeval.judging.kinds import kinds_of_run
from selfeval.judging.labels import verdict_tokens
from selfeval.judging.pooling import Reading
from selfeval.judging.protocol import Comparison, Judgement
from selfeval.judging.templates import Templates, templates_folder
from selfeval.lab.corpus import draw_reply
from selfeval.lab.domain import draw_problem
from selfeval.records import PointwiseEvidence, Unreadable, VerdictState
from selfeval.rollout.engine import generate
from selfeval.rollout.requests import Request, Rollout
from selfeval.runs.judge import Judge as LoadedJudge
from selfeval.runs.reader import RunReader
from toy import FEW, LAB, copy_lab, toy_arguments

SETTINGS = ("verdicts.judge=pointwise", "verdicts.reasoning=false")


def settings(**changes: Any) -> VerdictsConfig:
    return VerdictsConfig(judge="pointwise", **{"reasoning": False, **changes})


def templates() -> Templates:
    return Templates.load(templates_folder("none"), tiny_models.words_tokenizer(), kinds=kinds_of_run(settings()))


def evidence(judgement: Judgement) -> PointwiseEvidence:
    assert isinstance(judgement.evidence, PointwiseEvidence)
    return judgement.evidence


# -- two grades ---------------------------------------------------------------------------------------------------------


def test_two_grades_are_compared_as_independent_draws() -> None:
    # Values 1, 2, 5. Higher: 0.5 * 0.4 (2 over 1) + 0.3 * (0.4 + 0.6) (5 over both); equal: 0.2 * 0.4 + 0.5 * 0.6.
    found = compare_grades(Reading((0.1, 0.25, 0.15), "a", label_mass=0.5), Reading((0.4, 0.6, 0.0), "b"), (1, 2, 5))
    assert found.tie == pytest.approx(0.38)
    assert found.probability == pytest.approx(0.5 + 0.19)
    assert evidence(found).grades == (pytest.approx(0.2 + 1.0 + 1.5), pytest.approx(1.6))
    assert evidence(found).distributions == (pytest.approx((0.2, 0.5, 0.3)), pytest.approx((0.4, 0.6, 0.0)))
    assert (evidence(found).raw_output, evidence(found).label_masses) == (("a", "b"), (0.5, None))


def test_a_reply_without_a_grade_leaves_no_verdict() -> None:
    found = compare_grades(Reading(None, "?", Unreadable.CUT), Reading((0.5, 0.5), ""), (0, 1))
    assert (found.probability, found.tie) == (None, None)
    assert (evidence(found).grades, evidence(found).distributions) == ((None, 0.5), ((), (0.5, 0.5)))
    assert evidence(found).causes == (Unreadable.CUT, None)


chances = st.lists(st.floats(1e-6, 1.0), min_size=4, max_size=4)


@given(chances, chances, st.permutations([0.0, 1.0, 2.5, 7.0]))
def test_the_other_order_has_the_complement_and_the_same_tie(p: list[float], q: list[float], values: list[float]) -> None:
    one, other = (compare_grades(Reading(tuple(a), ""), Reading(tuple(b), ""), values) for a, b in ((p, q), (q, p)))
    assert one.probability is not None
    assert other.probability is not None
    assert one.probability + other.probability == pytest.approx(1.0)
    assert one.tie == pytest.approx(other.tie)
    assert 0.0 <= one.probability <= 1.0


# -- grades of a model --------------------------------------------------------------------------------------------------


def test_a_grade_is_read_as_a_plain_forward_pass_reads_it() -> None:
    backbone, own = tiny_models.backbone("llama", 400, max_position_embeddings=4096), templates()
    comparison = Comparison("What is 2 + 3?", "five", "four", second_cut=True)
    assert own.rubric is not None
    with backbone.acting_as(BASE):
        (found,) = make_judge(backbone, own, settings(label_mass=0.0), batch_size=8).judge([comparison])
        for index, (reply, cut) in enumerate((("five", False), ("four", True))):
            prompt = own.prompt("pointwise", question=comparison.question, reply=reply, cut=cut, **own.rubric.shown).ids
            expected = [_chance(backbone, own, prompt, label) for label in (" yes", " no")]
            assert evidence(found).distributions[index] == pytest.approx([p / sum(expected) for p in expected], rel=1e-3)
    assert evidence(found).grades[0] != evidence(found).grades[1]


def _chance(backbone: Backbone, own: Templates, prompt: Sequence[int], label: str) -> float:
    """Probability of a label after the prompt and the lead: the product of those of its tokens up to the first that differs."""
    lead = own.tokenizer.encode("Good reply:", add_special_tokens=False)
    ids = own.tokenizer.encode("Good reply:" + label, add_special_tokens=False)[len(lead) :]
    other = {" yes": " no", " no": " yes"}[label]
    others = own.tokenizer.encode("Good reply:" + other, add_special_tokens=False)[len(lead) :]
    length = next(i for i, (a, b) in enumerate(zip(ids, others, strict=False)) if a != b) + 1
    logprobs = tiny_models.full_logprobs(backbone.model, (*prompt, *lead, *ids[:length]))
    places = range(len(prompt) + len(lead), len(prompt) + len(lead) + length)
    return float(torch.stack([logprobs[place - 1, ids[i]] for i, place in enumerate(places)]).sum().exp())


def test_a_reply_is_graded_once_however_often_it_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Request] = []

    def counting(backbone: Any, requests: Sequence[Request], **options: Any) -> list[Rollout]:
        asked.extend(requests)
        return generate(backbone, requests, **options)

    judges_generate_with(monkeypatch, counting)
    backbone, own = tiny_models.backbone("llama", 400, max_position_embeddings=4096), templates()
    replies = ("one", "two", "three")
    pairs = [Comparison("Which?", a, b) for a in replies for b in replies if a != b]
    with backbone.acting_as(BASE):
        found = make_judge(backbone, own, settings(label_mass=0.0), batch_size=8).judge(pairs)
    forks = verdict_tokens(own, own.labels("pointwise")).forks
    assert len(asked) == len(replies) * len(forks)  # six pairs have twelve replies
    assert [evidence(found[i]).grades[0] for i in (0, 2, 4)] == [evidence(found[i]).grades[1] for i in (2, 0, 1)]
    assert len({evidence(judgement).grades[0] for judgement in found}) == 3


@cache
def embedded() -> tuple[Backbone, Templates, VerdictsConfig]:
    model = str(LAB / "word_problems")
    config = load_config(None, {"model": model}, SETTINGS)
    backbone = Backbone.load(model, config.backbone)
    kinds = kinds_of_run(config.verdicts)
    return backbone, Templates.load(templates_folder(model), backbone.loaded.tokenizer, kinds=kinds), config.verdicts


def test_the_embedded_model_grades_right_replies_higher() -> None:
    backbone, own, config = embedded()
    rng, pairs = random.Random(5), []
    for problem in (draw_problem(rng) for _ in range(24)):
        replies = [draw_reply(problem, rng, right=right).text for right in (True, False)]
        pairs.append(Comparison(problem.question, *replies))
    with backbone.acting_as(BASE):
        found = make_judge(backbone, own, config, batch_size=48).judge(pairs)
    assert sum((judgement.probability or 0.0) > 0.5 for judgement in found) >= 22


def test_a_grade_is_found_after_a_chain_of_thought_and_says_why_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    own = templates()
    words = {"five": "It is right.\nGood reply: yes", "four": "No, 2 + 3 is"}

    def engine(backbone: Any, requests: Sequence[Request], **options: Any) -> list[Rollout]:
        return [_said(own, request, options, words) for request in requests]

    judges_generate_with(monkeypatch, engine)
    backbone = tiny_models.backbone("llama", 400, max_position_embeddings=4096)
    config = settings(reasoning=True, max_new_tokens=64)
    (found,) = make_judge(backbone, own, config, batch_size=8).judge([Comparison("What is 2 + 3?", "five", "four")])
    assert evidence(found).causes == (None, Unreadable.NO_ROOM)  # not finished, although the limit was not reached
    assert evidence(found).grades[0] == pytest.approx(0.5)
    assert found.probability is None


def _said(own: Templates, request: Request, options: Any, words: dict[str, str]) -> Rollout:
    prompt = own.tokenizer.decode(list(request.prompt.ids))
    said = next(text for reply, text in words.items() if f"Reply: {reply}" in prompt)
    finished = said.endswith("yes")
    ids = own.tokenizer.encode(said, add_special_tokens=False) + [tiny_models.EOS] * finished
    ids = ids[: options["max_new_tokens"]]
    watched = ((-0.7,) * len(options["watch"]),) * len(ids)
    return Rollout(tuple(ids), (0.0,) * len(ids), finished, watched)


# -- a run --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_is_labelled_by_grades(tmp_path: Path) -> None:
    recipe = copy_lab(tmp_path / "lab")
    (tmp_path / "lab" / "word_problems" / "templates" / "judge.jinja").unlink()  # not needed
    rubric = tmp_path / "mine.toml"
    rubric.write_text((LAB / "word_problems" / "templates" / "rubric.toml").read_text().replace("value = 1", "value = 10"))
    more = [part for setting in (*SETTINGS, f"verdicts.pointwise.rubric={rubric}") for part in ("--set", setting)]
    done = CliRunner().invoke(app, toy_arguments(recipe, tmp_path / "run", *more, sizes=FEW))
    assert done.exit_code == 0, done.output
    assert "probability of the labels" in done.output
    reader = RunReader(tmp_path / "run")
    verdicts = reader.records("verdicts")
    assert {verdict.state for verdict in verdicts} >= {VerdictState.KEPT, VerdictState.TIE}
    for verdict in verdicts:
        assert isinstance(verdict.evidence, PointwiseEvidence)
        assert max(verdict.evidence.distributions[0]) <= 1.0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert 1.0 < report["verdicts"]["mean_grade"]["value"] < 10.0
    assert report["verdicts"]["label_accuracy_gold"]["value"] > 0.7
    assert "Mean grade of the replies" in (tmp_path / "run" / "index.html").read_text()
    assert (tmp_path / "run" / "templates" / "rubric.toml").read_text() == rubric.read_text()
    rubric.unlink()  # the run has a copy
    asked = reader.records("questions")[0].text
    found = LoadedJudge.load(tmp_path / "run").compare(asked, "The answer is 5.", "The answer is 5.")
    assert found.judgement is not None
    grades = evidence(found.judgement).grades
    assert grades[0] == grades[1]
    assert dataclasses.asdict(found.judgement)["probability"] == 0.5
