from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from selfeval.backbone.roles import Backbone
from selfeval.cli import app
from selfeval.config import RunConfig, load_config
from selfeval.judging.templates import Templates, templates_folder
from selfeval.planner.stage_times import Lengths, Tokens, estimate, probe_speed, stage_tokens
from selfeval.stages.running import new_config

LENGTHS = Lengths(ask=100, reply_prompt=20, grade=30, grade_alone=22, judge=60, question=10, reply=5, reasoning=4)
STAGES = ["questions", "replies", "verdicts", "evaluator", "policy", "evaluation"]


def _config(*assignments: str) -> RunConfig:
    sizes = ("questions.train=10", "questions.test=6", "evaluation.questions=6", "evaluator.held_out=0.1", "evaluator.epochs=3")
    return load_config(None, {}, [*sizes, *assignments])


def test_tokens_of_the_first_stages_by_hand() -> None:
    found = stage_tokens(_config(), LENGTHS, reference=False, layers=2)
    assert list(found) == STAGES
    assert (found["questions"].written, found["questions"].read) == (16 * 10, 16 * 100)
    assert (found["replies"].written, found["replies"].read) == (16 * 2 * 5, 16 * 2 * 20)
    assert (found["verdicts"].written, found["verdicts"].read) == (2 * 16 * 4, 2 * 16 * 60)
    # Nine pairs of 35 + 35 tokens in three epochs, and the scores of six test pairs.
    assert found["evaluator"].learned == pytest.approx(9 * 3 * 70)
    assert found["evaluator"].read == 6 * 70
    assert found["evaluation"].written == 6 * 2 * (5 + 4)
    # Prompts of replies and judge, and both replies of each question, a reply and ten attacks, read by the evaluator.
    assert found["evaluation"].read == 6 * 2 * (20 + 60 + 35) + 6 * 11 * 35


def test_options_of_the_evaluator_change_the_number_of_its_pairs() -> None:
    fewer = stage_tokens(
        _config("evaluator.bag=0.5", "evaluator.mismatched=0.1", "evaluator.attacks=0.1"), LENGTHS, reference=False, layers=2
    )
    assert fewer["evaluator"].learned == pytest.approx(9 * 0.5 * 1.2 * 3 * 70)


def test_members_that_read_less_take_less_time() -> None:
    varied = _config("evaluator.members=3", "evaluator.inputs=[{}, {layer = 1}, {reference_answer = false}]")
    found = stage_tokens(varied, LENGTHS, reference=True, layers=2)
    # A reply after the whole prompt (30 + 5), after half of the layers, and after the prompt without the reference (22 + 5).
    scored = 35 + 35 / 2 + 27
    assert found["evaluator"].read == 6 * 2 * scored
    assert found["evaluator"].learned == pytest.approx(9 * 3 * 2 * scored)
    assert found["evaluation"].read == 6 * 2 * (20 + 60 + scored) + 6 * 11 * scored


def test_tokens_of_a_policy_by_hand() -> None:
    sizes = ("policy.iterations=2", "policy.questions_per_iteration=3", "policy.replies_per_question=4", "policy.epochs=2")
    with_critic = stage_tokens(_config(*sizes), LENGTHS, reference=False, layers=2)["policy"]
    # 24 replies: written; prompts, reference, one evaluator and the critic read; policy and critic learn twice.
    assert with_critic.written == 24 * 5
    assert with_critic.read == 24 * (20 + 25 + 2 * 35)
    assert with_critic.learned == 24 * 2 * (25 + 35)
    without = stage_tokens(_config(*sizes, "policy.learner=rloo"), LENGTHS, reference=False, layers=2)["policy"]
    assert without.learned == 24 * 2 * 25


def test_tokens_of_the_steps_by_hand() -> None:
    assert "steps" not in stage_tokens(_config(), LENGTHS, reference=False, layers=2)
    config = _config("steps.enabled=true", "steps.questions=4", "steps.votes=6", "steps.completions=8", "steps.epochs=3")
    lengths = replace(LENGTHS, steps=3.0)
    found = stage_tokens(config, lengths, reference=False, layers=2)
    assert list(found) == [*STAGES[:4], "steps", *STAGES[4:]]
    # 24 votes, and 8 completions of the first two of three steps of 8 replies, each of half a reply on average.
    assert found["steps"].written == (24 + 8 * 2 * 8 / 2) * 5
    assert found["steps"].read == 24 * 20 + 8 * 2 * 8 * (20 + 2.5)
    assert found["steps"].learned == 8 * 3 * 35
    # In policy training, the evaluator of steps reads every reply once more.
    dense = _config("steps.enabled=true", "policy.steps=dense", "policy.learner=rloo")
    without = stage_tokens(_config("policy.learner=rloo"), lengths, reference=False, layers=2)["policy"].read
    replies = dense.policy.iterations * dense.policy.questions_per_iteration * dense.policy.replies_per_question
    assert stage_tokens(dense, lengths, reference=False, layers=2)["policy"].read == without + replies * 35


def test_what_a_run_does_not_do_takes_no_time(tmp_path: Path) -> None:
    given = stage_tokens(_config(f"questions.file={tmp_path}"), LENGTHS, reference=False, layers=2)
    assert given["questions"].written == 0
    assert stage_tokens(_config(f"pairs.file={tmp_path}"), LENGTHS, reference=False, layers=2)["verdicts"].read == 0
    votes = stage_tokens(_config("verdicts.judge=agreement", "verdicts.agreement.votes=8"), LENGTHS, reference=False, layers=2)
    assert votes["verdicts"].written == 16 * 8 * 5
    pairwise, pointwise = (
        stage_tokens(_config(f"verdicts.judge={name}"), LENGTHS, reference=False, layers=2)["verdicts"]
        for name in ("pairwise", "pointwise")
    )
    assert pairwise.written == pointwise.written
    assert pairwise.read - pointwise.read == 2 * 16 * LENGTHS.reply  # two prompts a pair, with one reply less
    both = stage_tokens(
        _config("verdicts.judge=combined", 'verdicts.combined.judges=["pairwise", "pointwise"]'),
        LENGTHS,
        reference=False,
        layers=2,
    )["verdicts"]
    # All 16 pairs are among the first ones, which are judged twice.
    assert both == Tokens(written=2 * (pairwise.written + pointwise.written), read=2 * (pairwise.read + pointwise.read))
    sampled = stage_tokens(_config("verdicts.votes=3"), LENGTHS, reference=False, layers=2)["verdicts"]
    assert (sampled.written, sampled.read) == (3 * pairwise.written, pairwise.read)  # votes share the reading of their prompt
    plain, with_reference = (stage_tokens(_config(), LENGTHS, reference=shown, layers=2)["replies"] for shown in (False, True))
    assert with_reference.written == 1.5 * plain.written


def test_a_probe_measures_the_embedded_model_and_leaves_no_role() -> None:
    config = new_config(assignments=["backbone.rollout_batch_size=16", "steps.enabled=true"])
    backbone = Backbone.load(config.model, config.backbone)
    templates = Templates.load(templates_folder(config.model, ""), backbone.loaded.tokenizer)
    probe = probe_speed(backbone, templates, config)
    assert min(probe.write, probe.read, probe.learn) > 0
    assert probe.write > probe.read, "tokens that are written one at a time take longer than those that are read together"
    assert 5 < probe.lengths.reply < 64
    assert 1 < probe.lengths.steps < 4  # the sum, and the sentence with the answer
    assert backbone.roles.names == ()


def test_twice_as_slow_takes_twice_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    from selfeval.planner import stage_times

    config = new_config(assignments=["backbone.rollout_batch_size=8"])
    measured: list[Any] = []

    def once(*arguments: Any) -> Any:
        measured.append(measured[0] if measured else probe_speed(*arguments))
        found = measured[0]
        factor = len(measured)
        return replace(found, write=factor * found.write, read=factor * found.read, learn=factor * found.learn)

    monkeypatch.setattr(stage_times, "probe_speed", once)
    first, second = estimate(config), estimate(config)
    assert second.seconds == pytest.approx(2 * first.seconds)


def test_the_command_prints_minutes_per_stage() -> None:
    found = CliRunner().invoke(app, ["plan", "--time", "--json", "--set", "backbone.rollout_batch_size=16"])
    assert found.exit_code == 0, found.output
    time = json.loads(found.stdout)["time"]
    assert [stage["stage"] for stage in time["stages"]] == STAGES
    assert time["seconds"] == pytest.approx(sum(stage["seconds"] for stage in time["stages"]), abs=0.5)


@pytest.mark.parametrize("option", [("--config", "config.json"), ("--device", "cuda:0=8GiB")])
def test_the_speed_of_another_machine_is_refused(option: tuple[str, str]) -> None:
    found = CliRunner().invoke(app, ["plan", "--time", *option])
    assert found.exit_code == 2
    assert f"--time measures the model on this machine, and {option[0]} plans for another" in found.stderr
