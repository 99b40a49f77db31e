from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import tiny_models
from selfeval.backbone.facts import ModelFacts, model_facts
from selfeval.backbone.plan import KINDS, PHASES, Plan
from selfeval.cli import app
from selfeval.config import RunConfig
from selfeval.stages.planning import Workload, make_plan, planned_precision, workload

WORK = Workload(reply_prompt=20, grade_prompt=24, judge_prompt=40, reply=16, working=8)


def _config(**changes: Any) -> RunConfig:
    policy = {"questions_per_iteration": 8, "replies_per_question": 4, "minibatch": 16}
    values = {"device": "cpu", "precision": "fp32", "rollout_rows": 32, "batch_tokens": 640, "policy": policy, **changes}
    return RunConfig.model_validate(values)


def _facts(layers: int) -> ModelFacts:
    return ModelFacts("tiny", tiny_models.tiny_config("llama", 400, num_hidden_layers=layers))


def _plan(budget: int | None, layers: int = 2, **changes: Any) -> Plan:
    return make_plan(_config(**changes), _facts(layers), budget, work=WORK)


@pytest.fixture(scope="module")
def free() -> Plan:
    return _plan(None)


def test_without_a_limit_the_wanted_settings_stay(free: Plan) -> None:
    assert free.fits
    assert free.changes == ()
    assert free.settings == {"batch_tokens": 640, "rollout_rows": 32, "checkpointing": False, "micro_batch_rows": 16}
    assert set(free.phases) == set(PHASES)
    assert free.phases["rollout"]["kv_cache"] > 0
    assert free.phases["update"]["gradients"] > 0


def test_a_deep_model_is_planned_from_shallow_ones() -> None:
    """Seven layers from two and three, against all seven run on shapes."""
    from selfeval.stages import planning

    whole = planning._Measured(_facts(7), _config(), "fp32", WORK, False)
    assert whole.depths == (2, 3)
    shallow = {"rollout": whole.rollout(8), **whole.learning(4)}
    whole = planning._Measured(_facts(7), _config(), "fp32", WORK, False)
    whole.depths = (7,)
    deep = {"rollout": whole.rollout(8), **whole.learning(4)}
    for phase, peak in deep.items():
        assert shallow[phase].total() == pytest.approx(peak.total(), rel=0.01), phase


def test_the_more_memory_the_larger_the_settings(free: Plan) -> None:
    plans = [_plan(round(free.peak * share), checkpointing=True) for share in (0.4, 0.7, 1.0)]
    for name in ("micro_batch_rows", "rollout_rows"):
        values = [plan.settings[name] for plan in plans]
        assert values == sorted(values)
        assert values[-1] == free.settings[name]
    assert plans[0].settings["rollout_rows"] < 32
    assert all(plan.peak <= (plan.budget or 0) for plan in plans if plan.fits)
    assert plans[1].fits
    assert plans[-1].changes == ()
    assert "--set " in plans[0].changes[0]


def test_what_does_not_fit_is_refused_with_what_to_change(free: Plan) -> None:
    plan = _plan(free.total("load") // 2)
    assert not plan.fits
    assert plan.settings["checkpointing"]
    text = " ".join(plan.changes)
    assert "does not fit" in text
    assert "precision=bf16" in text
    assert "a smaller model" in text


def test_a_7b_that_is_nowhere_on_this_disk() -> None:
    config = RunConfig.model_validate({"device": "cuda", "precision": "bf16", "rollout_rows": 64, "batch_tokens": 4096})
    plan = make_plan(config, model_facts("Qwen2.5-7B-Instruct"), 80 << 30, work=Workload(100, 200, 400, 128, 64))
    assert plan.parameters == 7_615_616_512
    assert plan.phases["load"]["base"] == pytest.approx(2 * plan.parameters, rel=1e-3)
    # Rank 16 on seven matrices a layer: (in + out) * 16, fp32, three adapters and two heads.
    shapes = [(3584, 3584), (3584, 512), (3584, 512), (3584, 3584), (3584, 18944), (3584, 18944), (18944, 3584)]
    adapter = 28 * 16 * sum(a + b for a, b in shapes) * 4
    assert plan.phases["update"]["adapters"] == 3 * adapter + 2 * (3584 + 1) * 4
    # What four roles hold beside the base at this size: adapters, moments of the two that learn, gradients of one at a time.
    assert 1.05 < 1 + (3 + 4 + 1) * adapter / plan.phases["load"]["base"] <= 1.10
    assert plan.total("update") > plan.total("score") > plan.total("load")


def test_the_workload_comes_from_the_limits_and_stays_in_the_context() -> None:
    config = _config(questions={"max_new_tokens": 64}, replies={"max_new_tokens": 128}, verdicts={"max_new_tokens": 256})
    wide, narrow = workload(config, None), workload(config, 400)
    assert wide.reply == 128
    assert wide.judge_prompt > 64 + 2 * 128
    assert narrow.judge_prompt + narrow.working <= 400
    assert narrow.longest <= 400


# -- the command --------------------------------------------------------------------------------------------------------


def _command(tmp_path: Path, *more: str) -> Any:
    path = tmp_path / "config.json"
    tiny_models.tiny_config("llama", 400).to_json_file(path)
    sizes = ["rollout_rows=8", "batch_tokens=512", "device=cpu", "replies.max_new_tokens=16", "policy.minibatch=8"]
    return CliRunner().invoke(app, ["plan", "--config", str(path), *[p for s in sizes for p in ("--set", s)], *more])


def test_json_of_the_command(tmp_path: Path) -> None:
    found = _command(tmp_path, "--json", "--memory-budget", "1GiB")
    assert found.exit_code == 0, found.output
    plan = json.loads(found.stdout)
    assert plan["schema"] == 1
    assert plan["fits"] is True
    (device,) = plan["devices"]
    assert (device["device"], device["budget_bytes"]) == ("cpu", 1 << 30)
    assert list(device["phases"]) == list(PHASES)
    for row in device["phases"].values():
        assert list(row) == [*KINDS, "total"]
        assert row["total"] == sum(row[kind] for kind in KINDS)
    assert set(plan["settings"]) == {"batch_tokens", "rollout_rows", "checkpointing", "micro_batch_rows"}


def test_the_table_and_the_refusal_of_the_command(tmp_path: Path) -> None:
    found = _command(tmp_path, "--memory-budget", "50KiB", "--set", "precision=fp32")
    assert found.exit_code == 2
    for word in ("rollout", "KV cache", "optimizer", "total", "It does not fit.", "does not fit:", "precision=bf16"):
        assert word in found.stdout
    wrong = CliRunner().invoke(app, ["plan", "--model", "org/nothing", "--set", "device=cpu"])
    assert wrong.exit_code == 2
    assert "not known here" in wrong.stderr


def test_an_automatic_precision_is_planned_as_it_is_loaded() -> None:
    facts = model_facts("Qwen2.5-7B-Instruct")
    config = RunConfig(device="cpu")
    found = {budget: planned_precision(config, "cpu", facts, budget << 30) for budget in (64, 24, 12, 6)}
    assert found == {64: "fp32", 24: "bf16", 12: "int8", 6: "nf4"}
    assert planned_precision(config, "cpu", facts, None) == "fp32"
    assert planned_precision(RunConfig(precision="bf16"), "cpu", facts, 1) == "bf16"


def test_later_rounds_hold_two_adapters_more(free: Plan) -> None:
    # Evaluator, policy and critic, two of them with a head: 3 a + 2 h. Then the start and the reference too: 5 a + 2 h.
    heads = 2 * 4 * (tiny_models.tiny_config("llama", 400).hidden_size + 1)
    one, many = (plan.phases["update"]["adapters"] - heads for plan in (free, _plan(None, rounds=2)))
    assert 3 * many == 5 * one > 0
