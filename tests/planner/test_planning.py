from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import chatglm
import tiny_models
from selfeval.backbone import precision
from selfeval.backbone.meters import kernel_bytes, resident_bytes
from selfeval.backbone.placement import DISK, ENDLESS, meta_model, plan_placement, usable_memory
from selfeval.cli import app
from selfeval.config import JUDGES, LEARNERS, BackboneConfig, PlacementConfig, RunConfig
from selfeval.errors import ConfigError, ModelError
from selfeval.planner import advice, planning
from selfeval.planner.machine import Machine
from selfeval.planner.measurement import Measured
from selfeval.planner.memory_plan import KINDS, PHASES, Plan
from selfeval.planner.model_configs import ModelFacts, model_facts, weigh
from selfeval.planner.planning import make_plan
from selfeval.planner.shape_tracing import Peaks
from selfeval.planner.workload import Workload, workload
from slow import slow

GIB = 1 << 30
WORK = Workload(reply_prompt=20, grade_prompt=24, judge_prompt=40, reply=16, reasoning=8)


def _config(**changes: Any) -> RunConfig:
    """A small configuration with these changes to the backbone or to other sections."""
    policy = {"questions_per_iteration": 8, "replies_per_question": 4, "minibatch": 16}
    backbone = {"device": "cpu", "precision": "fp32", "rollout_batch_size": 32, "batch_tokens": 640}
    backbone |= {name: changes.pop(name) for name in BackboneConfig.model_fields if name in changes}
    return RunConfig.model_validate({"backbone": backbone, "policy": policy, **changes})


def _facts(layers: int) -> ModelFacts:
    return ModelFacts("tiny", tiny_models.tiny_config("llama", 400, num_hidden_layers=layers))


def _plan(budget: int | None, layers: int = 2, **changes: Any) -> Plan:
    machine = Machine({"cpu": budget or ENDLESS, DISK: ENDLESS})
    return make_plan(_config(**changes), _facts(layers), machine, work=WORK)


def _cards(**gib: float) -> Machine:
    """A machine of these GiB: `cuda0`, `cuda1`, `cpu`, `disk`."""
    sizes = {name.replace("cuda", "cuda:"): int(size * GIB) for name, size in gib.items()}
    return Machine({**sizes, DISK: ENDLESS})


@pytest.fixture(scope="module")
def free() -> Plan:
    return _plan(None)


def test_without_a_limit_the_wanted_settings_stay(free: Plan) -> None:
    assert free.fits
    assert free.changes == ()
    assert free.settings == {"batch_tokens": 640, "rollout_batch_size": 32, "checkpointing": False, "micro_batch_rows": 16}
    assert [d.device for d in free.devices] == ["cpu"]
    assert set(free.main.phases) == set(PHASES)
    assert free.main.phases["rollout"]["kv_cache"] > 0
    assert free.main.phases["update"]["gradients"] > 0


@pytest.mark.parametrize(
    "devices",
    [
        slow(["cpu"] * 7),
        slow(["cuda:0"] * 5 + ["cuda:1"] * 4 + ["cpu"]),
    ],
)
def test_a_deep_model_is_planned_from_shallow_ones(devices: list[str]) -> None:
    """Two and three layers of each span, against all of them run on shapes."""
    facts = _facts(len(devices))
    whole = plan_placement(meta_model(facts.config), {devices[0]: GIB}, "fp32")
    placed = replace(whole, devices=tuple(devices), bytes=dict.fromkeys(devices, 0))
    found = []
    for at_once in (False, True):
        measured = Measured(facts, _config(), "fp32", placed, WORK, False, 0)
        measured.whole = at_once
        found.append({"rollout": measured.rollout(8), **measured.learning(4)})
        assert len(measured.loops) == (1 if at_once else 1 + len(set(devices)))
    shallow, deep = found
    for phase, peaks in deep.items():
        for device, peak in peaks.items():
            assert shallow[phase][device].total() == pytest.approx(peak.total(), rel=0.03), (phase, device)


@pytest.mark.slow
def test_the_more_memory_the_larger_the_settings(free: Plan) -> None:
    plans = [_plan(round(free.main.peak * share), checkpointing=True) for share in (0.4, 0.7, 1.0)]
    for name in ("micro_batch_rows", "rollout_batch_size"):
        values = [plan.settings[name] for plan in plans]
        assert values == sorted(values)
        assert values[-1] == free.settings[name]
    assert plans[0].settings["rollout_batch_size"] < 32
    assert all(plan.main.peak <= (plan.main.budget or 0) for plan in plans if plan.fits)
    assert plans[1].fits
    assert plans[-1].changes == ()
    assert "--set backbone." in plans[0].changes[0]


def test_what_does_not_fit_is_refused_with_what_to_change(free: Plan) -> None:
    plan = _plan(free.main.total("load") // 2, placement={"mode": "single"})
    assert not plan.fits
    assert plan.settings["checkpointing"]
    text = " ".join(plan.changes)
    assert "does not fit" in text
    assert "backbone.precision=bf16" in text
    assert "a smaller model" in text


SEVEN = Workload(100, 200, 400, 128, 64)
# Rank 16 on seven matrices a layer of Qwen2.5-7B: (in + out) * 16, fp32.
ADAPTER = 16 * 4 * sum([7168, 4096, 4096, 7168, 22_528, 22_528, 22_528])


def _seven(machine: Machine, **changes: Any) -> Plan:
    backbone = {"device": "auto", "precision": "bf16", "rollout_batch_size": 64, "batch_tokens": 4096, **changes}
    return make_plan(RunConfig.model_validate({"backbone": backbone}), model_facts("Qwen2.5-7B-Instruct"), machine, work=SEVEN)


def test_a_7b_that_is_nowhere_on_this_disk() -> None:
    plan = _seven(_cards(cuda0=80, cpu=64))
    assert plan.parameters == 7_615_616_512
    (card,) = plan.devices
    assert (card.device, card.layers) == ("cuda:0", ("0-27",))
    assert card.phases["load"]["base"] == pytest.approx(2 * plan.parameters, rel=1e-3)
    # Three adapters, two heads. Of a prompt there are more replies in policy training than in the pairs of the evaluator, whose
    # training therefore has the largest update, and no other adapter in memory.
    assert card.phases["score"]["adapters"] == 3 * 28 * ADAPTER + 2 * (3584 + 1) * 4
    assert card.phases["update"]["adapters"] == 28 * ADAPTER + (3584 + 1) * 4
    # Memory of four roles besides the base at this size: adapters, moments of the two that learn, gradients of one at a time.
    assert 1.05 < 1 + (3 + 4 + 1) * 28 * ADAPTER / card.phases["load"]["base"] <= 1.10
    assert card.total("update") > card.total("score") > card.total("load")


@pytest.mark.slow
def test_a_7b_on_two_uneven_cards_and_ram() -> None:
    """The map is that of the loader, and every device has a separate plan."""
    machine = _cards(cuda0=8, cuda1=8.5, cpu=32)
    plan = _seven(machine, checkpointing=True, rollout_batch_size=4, batch_tokens=1)
    assert plan.fits
    model = meta_model(model_facts("Qwen2.5-7B-Instruct").config)
    assert plan.placement == plan_placement(model, usable_memory(machine.memory, PlacementConfig()), "bf16")
    assert [d.device for d in plan.devices] == ["cuda:0", "cuda:1", "cpu"]
    for device in plan.devices:
        assert device.phases["load"]["base"] == plan.placement.bytes[device.device]
        count = plan.placement.devices.count(device.device)
        assert count > 0
        mixed = {kind for phase in PHASES for kind, size in device.phases[phase].items() if size}
        if device.device == "cpu":
            assert mixed == {"base"}  # its layers are streamed: all else of theirs is on the main card
    first, second = plan.devices[:2]
    streamed = plan.placement.devices.count("cpu")
    own = 3 * ADAPTER * (plan.placement.devices.count("cuda:0") + streamed) + 2 * (3584 + 1) * 4
    assert first.phases["update"]["adapters"] == own
    assert second.phases["update"]["adapters"] == 3 * ADAPTER * plan.placement.devices.count("cuda:1")
    # A layer that is brought in is on the main card while it is computed.
    assert first.phases["update"]["base"] > first.phases["load"]["base"]
    assert sum(d.phases["rollout"]["kv_cache"] for d in plan.devices) > 0
    assert not any(second.phases[phase].get("logits", 0) for phase in PHASES)  # logits never travel


@pytest.mark.slow
def test_a_plan_that_lacks_room_beside_the_weights_says_which_reserve_would_make_it() -> None:
    """Weights that just fit on one card leave nothing to an update; moved to the next one in part, they do."""
    wide = tiny_models.tiny_config("llama", 400, hidden_size=256, intermediate_size=1024, num_hidden_layers=3)

    def planned(card: int, reserve: float) -> Plan:
        config = _config(device="cuda", lora={"rank": 4}, rollout_batch_size=2, batch_tokens=1, placement={"reserve": reserve})
        machine = Machine({"cuda:0": card, "cuda:1": card, "cpu": 0, DISK: 0})
        return make_plan(config, ModelFacts("wide", wide), machine, work=WORK)

    base = weigh(ModelFacts("wide", wide), "fp32").total
    tight = planned(base + (1 << 18), 0.0)
    assert not tight.fits
    assert tight.placement.is_whole
    said = next(s for s in tight.changes if "backbone.placement.reserve" in s)
    assert "move layers from cuda:0 to cuda:1" in said
    better = planned(base + (1 << 18), float(said.split("backbone.placement.reserve=")[1].split()[0]))
    assert better.fits
    assert [device.device for device in better.devices] == ["cuda:0", "cuda:1"]


@pytest.mark.slow
def test_weights_too_large_for_all_devices_are_planned_and_refused() -> None:
    plan = _seven(
        Machine({"cuda:0": 4 << 30, "cpu": 2 << 30, DISK: 0}), checkpointing=True, rollout_batch_size=1, batch_tokens=1
    )
    assert not plan.fits
    assert "all devices together lack" in plan.changes[0]
    assert plan.main.phases["load"]["base"] == pytest.approx(2 * plan.parameters, rel=1e-3)


# -- context ----------------------------------------------------------------------------------------------------------------


def test_a_longer_reach_leaves_room_for_longer_texts_and_takes_more() -> None:
    facts = ModelFacts("tiny", tiny_models.tiny_config("llama", 400, max_position_embeddings=300))
    longer = {"replies": {"max_new_tokens": 400}, "rollout_batch_size": 4}
    machine = Machine({"cpu": ENDLESS, DISK: ENDLESS})
    short = make_plan(_config(**longer), facts, machine)
    far = make_plan(_config(**longer, context={"rope_scaling": "yarn", "rope_factor": 8.0}), facts, machine)
    assert short.workload["reply"] + max(short.workload["reply_prompt"], short.workload["grade_prompt"]) == 300
    assert far.workload["reply"] == 400
    for kind in ("kv_cache", "activations"):
        assert far.main.phases["rollout"][kind] > 1.5 * short.main.phases["rollout"][kind]
    assert far.main.phases["load"] == short.main.phases["load"]


def test_eager_attention_keeps_a_matrix_of_tokens_by_tokens() -> None:
    def activations(attention: str, tokens: int) -> int:
        work = replace(WORK, reply_prompt=tokens, grade_prompt=tokens)
        config = _config(context={"attention": attention}, batch_tokens=4 * (tokens + 16))
        plan = make_plan(config, _facts(2), Machine({"cpu": ENDLESS, DISK: ENDLESS}), work=work)
        return plan.main.phases["update"]["activations"] + plan.main.phases["update"].get("logits", 0)

    extra = [activations("eager", t) - activations("sdpa", t) for t in (112, 240)]
    # Two layers keep the weights of 4 rows x 4 heads, 128 and 256 tokens squared, fp32, one at least.
    for more, tokens in zip(extra, (128, 256), strict=True):
        assert more > 2 * 4 * 4 * tokens**2 * 4
    # Squares, not lengths: 4 times as much for twice the tokens, where the fullest moment may be another one.
    assert extra[1] == pytest.approx(4 * extra[0], rel=0.25)


def test_attention_that_loading_would_refuse_is_refused() -> None:
    with pytest.raises(ModelError, match="flash_attention_2 runs on a CUDA device only"):
        _plan(None, context={"attention": "flash_attention_2"})


@pytest.mark.parametrize("folder", ["chatglm1", slow("chatglm1-28l"), slow("chatglm2"), "chatglm3"])
def test_chatglm_is_planned_from_its_published_config(folder: str) -> None:
    path, _ = chatglm.golden(folder)
    plan = make_plan(_config(rollout_batch_size=4), model_facts(str(path)), Machine({"cpu": ENDLESS, DISK: ENDLESS}), work=WORK)
    assert plan.fits
    assert plan.main.phases["rollout"]["kv_cache"] > 0
    assert plan.main.phases["update"]["activations"] > 0


def test_the_workload_comes_from_the_limits_and_stays_in_the_context() -> None:
    config = _config(questions={"max_new_tokens": 64}, replies={"max_new_tokens": 128}, verdicts={"max_new_tokens": 256})
    wide, narrow = workload(config, None), workload(config, 400)
    assert wide.reply == 128
    assert wide.judge_prompt > 64 + 2 * 128
    assert narrow.judge_prompt + narrow.reasoning <= 400
    assert narrow.longest <= 400


def test_a_limit_that_is_not_decided_yet_is_planned_with_its_cap() -> None:
    auto = _config(replies={"max_new_tokens": "auto", "max_new_tokens_cap": 200})
    assert workload(auto, None) == workload(_config(replies={"max_new_tokens": 200}), None)


def test_a_judge_prompt_is_as_long_as_the_replies_that_it_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    config = _config(replies={"max_new_tokens": 128})
    two = workload(config, None).judge_prompt
    monkeypatch.setitem(JUDGES, "pairwise", replace(JUDGES["pairwise"], replies_per_prompt=1))
    assert workload(config, None).judge_prompt == two - 128


def test_the_judge_of_votes_writes_replies_and_the_referee_reads_two() -> None:
    sizes = {"replies": {"max_new_tokens": 128}, "verdicts": {"max_new_tokens": 256, "reasoning": False}}
    compared, voted, graded = (
        workload(_config(**sizes | {"verdicts": {**sizes["verdicts"], "judge": name}}), None)
        for name in ("pairwise", "agreement", "pointwise")
    )
    assert (compared.reasoning, voted.reasoning, graded.reasoning) == (0, 256, 0)
    assert compared.judge_prompt - 32 <= graded.judge_prompt < compared.judge_prompt + 128
    assert voted.judge_prompt >= compared.judge_prompt - 32  # the templates of judge and referee differ by a few words


# -- the command --------------------------------------------------------------------------------------------------------


def _command(tmp_path: Path, *more: str) -> Any:
    path = tmp_path / "config.json"
    tiny_models.tiny_config("llama", 400).to_json_file(path)
    sizes = [
        "backbone.rollout_batch_size=8",
        "backbone.batch_tokens=512",
        "backbone.device=cpu",
        "replies.max_new_tokens=16",
        "policy.minibatch=8",
    ]
    return CliRunner().invoke(app, ["plan", "--config", str(path), *[p for s in sizes for p in ("--set", s)], *more])


def test_json_of_the_command(tmp_path: Path) -> None:
    limit = resident_bytes() + (1 << 30)  # the budget counts this process too, which grows with the tests that ran before
    found = _command(tmp_path, "--json", "--memory-budget", str(limit))
    assert found.exit_code == 0, found.output
    plan = json.loads(found.stdout)
    assert plan["schema"] == 1
    assert plan["fits"] is True
    (device,) = plan["devices"]
    assert (plan["main"], plan["streamed_layers"], device["layers"]) == ("cpu", 0, ["0-1"])
    assert (device["device"], device["budget_bytes"]) == ("cpu", limit)
    assert list(device["phases"]) == list(PHASES)
    for row in device["phases"].values():
        assert list(row) == [*KINDS, "total"]
        assert row["total"] == sum(row[kind] for kind in KINDS)
    assert set(plan["settings"]) == {"batch_tokens", "rollout_batch_size", "checkpointing", "micro_batch_rows"}


def test_the_table_and_the_refusal_of_the_command(tmp_path: Path) -> None:
    found = _command(
        tmp_path, "--memory-budget", "50KiB", "--set", "backbone.precision=fp32", "--set", "backbone.placement.mode=single"
    )
    assert found.exit_code == 2
    assert "planning: measuring" in found.stderr
    for word in ("rollout", "KV cache", "optimizer", "total", "It does not fit.", "does not fit:", "backbone.precision=bf16"):
        assert word in found.stdout
    # fp32: 100 KiB of embeddings and output layer, 30 KiB a layer; a fifth of each card is kept.
    cards = [
        "--device",
        "cuda:0=180KiB",
        "--device",
        "cuda:1=130KiB",
        "--set",
        "backbone.precision=fp32",
        "--set",
        "backbone.device=auto",
    ]
    spread = _command(tmp_path, *cards)
    titles = ("Memory by device", "Memory on cuda:0", "Memory on cuda:1")
    for word in ("layer 0 on cuda:0, layer 1 on cuda:1;", *titles, "180.0 KiB"):
        assert word in spread.stdout, spread.output
    for unclear in ("gpu=1GiB", "cuda:0", "cpu=much"):
        refused = CliRunner().invoke(app, ["plan", "--device", unclear])
        assert refused.exit_code == 2
        assert "expected NAME=SIZE" in refused.stderr
    wrong = CliRunner().invoke(app, ["plan", "--model", "org/nothing", "--set", "backbone.device=cpu"])
    assert wrong.exit_code == 2
    assert "of known size" in wrong.stderr


@pytest.mark.parametrize(
    ("kind", "setting", "said"),
    [
        ("rwkv", "backbone.lora.rank=4", "models of type rwkv store the state of a partial reply"),
        ("xlnet", "backbone.lora.rank=4", "models of type xlnet store the state of a partial reply"),
        ("bert", "backbone.lora.rank=4", "not a causal language model"),
        ("gpt2", "backbone.lora.rank=1000000", "backbone.lora.rank = 1000000 is larger than the widest layer"),
        ("gpt2", "backbone.lora.rank=20000", "backbone.lora.rank = 20000 is larger than the widest layer"),
        ("gpt2", 'backbone.lora.targets=["q_prooj"]', 'no module of this model is called "q_prooj"'),
    ],
)
def test_a_config_that_a_run_refuses_is_refused_before_it_is_measured(
    tmp_path: Path, kind: str, setting: str, said: str
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": kind, "architectures": ["BertForMaskedLM"] if kind == "bert" else None}))
    found = CliRunner().invoke(app, ["plan", "--config", str(path), "--set", "backbone.device=cpu", "--set", setting])
    assert found.exit_code == 2, found.output
    assert said in " ".join(found.stderr.split())
    assert "measuring" not in found.stderr


@pytest.mark.parametrize(
    ("lost", "setting", "said"),
    [
        ("model.safetensors", "backbone.lora.rank=4", "no weights (model.safetensors)"),
        ("tokenizer.json", "backbone.lora.rank=4", "its tokenizer cannot be read"),
        ("", "backbone.lora.rank=20000", "backbone.lora.rank = 20000 is larger than the widest layer"),
    ],
)
def test_a_folder_that_a_run_refuses_is_refused_before_it_is_measured(
    tmp_path: Path, lost: str, setting: str, said: str
) -> None:
    model = tiny_models.save_model(tiny_models.model("llama", 384), tiny_models.words_tokenizer(), tmp_path / "model")
    if lost:
        (model / lost).unlink()
    found = CliRunner().invoke(app, ["plan", "--model", str(model), "--set", "backbone.device=cpu", "--set", setting])
    assert found.exit_code == 2, found.output
    assert said in " ".join(found.stderr.split())
    assert "measuring" not in found.stderr


def test_an_automatic_precision_is_planned_as_it_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "Measured", _OnlyWeights)
    facts = model_facts("Qwen2.5-7B-Instruct")

    def picked(machine: Machine, **changes: Any) -> str:
        return make_plan(RunConfig.model_validate({"backbone": changes}), facts, machine).precision

    found = {gib: picked(_cards(cpu=gib)) for gib in (64, 24, 14, 9)}
    assert found == {64: "fp32", 24: "bf16", 14: "int8", 9: "nf4"}
    assert picked(_cards(cpu=1), precision="bf16") == "bf16"
    assert picked(_cards(cuda0=24, cpu=64)) == "bf16"
    # Two cards together hold 16 bits: the sum decides, as in loading.
    assert picked(_cards(cuda0=12, cuda1=12, cpu=64)) == "bf16"
    # nf4 by the sum, but on no device as a whole nor on the cards alone: what can be spread.
    assert picked(_cards(cuda0=3, cpu=64)) == "bf16"


def test_a_packed_precision_that_needs_bitsandbytes_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "Measured", _OnlyWeights)
    facts, machine = model_facts("Qwen2.5-7B-Instruct"), _cards(cuda0=9)

    def changes(**values: Any) -> str:
        return " ".join(make_plan(RunConfig.model_validate({"backbone": values}), facts, machine).changes)

    assert "bitsandbytes" not in changes()  # it is installed, and nf4 is selected
    for module in (advice, precision):
        monkeypatch.setattr(module, "is_bitsandbytes_available", lambda: False)
    said = changes()
    assert re.search(r"backbone\.precision=nf4 takes about 5\.\d{3} GiB on cuda:0, which fits; it needs bitsandbytes", said), (
        said
    )
    assert "pip install 'self-evaluator[quantised]'" in said
    assert "bitsandbytes" not in changes(precision="bf16")  # a choice of the user is not questioned


def test_every_step_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "Measured", _OnlyWeights)
    steps: list[str] = []
    make_plan(
        RunConfig(backbone=BackboneConfig(rollout_batch_size=7)),
        model_facts("gpt2"),
        _cards(cpu=64),
        report_progress=steps.append,
    )
    first = [
        "checking openai-community/gpt2",
        "placing the weights of openai-community/gpt2",
        "measuring 7 concurrent replies",
    ]
    assert steps[:3] == first
    assert any(text.startswith("measuring micro-batches of") for text in steps)


class _OnlyWeights(Measured):
    """Without passes."""

    def _rollout(self, rows: int) -> Peaks:
        return self.load()

    def _learning(self, rows: int) -> dict[str, Peaks]:
        return {"score": self.load(), "update": self.load()}


# -- this process -----------------------------------------------------------------------------------------------------------


def test_the_runtime_counts_in_ram_and_against_a_budget_for_the_process() -> None:
    machine = Machine.of(_config(memory_budget="2GiB").backbone, {"cpu": 4 << 30})
    assert 100 << 20 < machine.runtime < 2 << 30
    assert machine.budget("cpu") == 2 << 30
    plan = make_plan(_config(), _facts(2), machine, work=WORK)
    assert all(plan.main.phases[phase]["runtime"] == machine.runtime for phase in PHASES)
    assert not plan.main.phases["load"]["kernels"]
    halves = make_plan(_config(precision="bf16"), _facts(2), machine, work=WORK)
    assert halves.main.phases["load"]["kernels"] == kernel_bytes()
    # Free memory does not hold what this process has taken already.
    free = Machine.of(_config().backbone, {"cpu": 4 << 30})
    assert free.budget("cpu") == (4 << 30) + free.runtime


def test_named_devices_take_the_place_of_those_that_are_here() -> None:
    machine = Machine.of(BackboneConfig(), {"cpu": 7, "cuda:1": 5, "cuda:0": 3})
    assert list(machine.memory.items()) == [("cuda:0", 3), ("cuda:1", 5), ("cpu", 7), (DISK, ENDLESS)]
    assert list(Machine.of(BackboneConfig(device="cpu"), {"cuda:0": 3, "cpu": 7}).memory) == ["cpu", DISK]
    with pytest.raises(ConfigError, match="name a card too"):
        Machine.of(BackboneConfig(device="cuda"), {"cpu": 7})


@pytest.mark.parametrize("learner", [name if name in ("ppo", "dpo", "ilql") else slow(name) for name in LEARNERS])
def test_every_learner_is_planned_with_its_roles_and_its_optimizers(free: Plan, learner: str) -> None:
    policy = {"learner": learner, "questions_per_iteration": 8, "replies_per_question": 4, "minibatch": 16}
    plan = _plan(None, policy=policy, evaluator={"batch": 1})  # training the evaluator then takes less than the policy
    update = plan.main.phases["update"]
    # Adapters of evaluator, policy and those of the learner; a moment pair for each trained role, none for the copies.
    heads = {"ppo": 2, "trpo": 2, "ilql": 4, "soft_q": 3}.get(learner, 1)
    adapter = (update["adapters"] - heads * 4 * (32 + 1)) / (2 + len(LEARNERS[learner].extra_roles))
    assert adapter == free.main.phases["update"]["gradients"]  # those of the policy
    trained = {"ppo": 2, "trpo": 1, "ilql": 4, "soft_q": 3}.get(learner, 1)
    assert trained * 2 * adapter < update["optimizer"] < (trained + 0.5) * 2 * adapter
    assert plan.fits


def test_every_evaluator_and_a_moving_reference_have_adapters(free: Plan) -> None:
    policy = {"questions_per_iteration": 8, "replies_per_question": 4, "minibatch": 16, "reference_ema": 0.01}
    more = _plan(None, evaluator={"members": 3}, policy=policy)
    one = free.main.phases["update"]["adapters"] - 2 * 4 * (32 + 1)
    assert 3 * (more.main.phases["update"]["adapters"] - 4 * 4 * (32 + 1)) == 6 * one


def test_later_rounds_hold_two_adapters_more(free: Plan) -> None:
    # Evaluator, policy and critic, two of them with a head: 3 a + 2 h. Then the start and the reference too: 5 a + 2 h.
    heads = 2 * 4 * (tiny_models.tiny_config("llama", 400).hidden_size + 1)
    one, many = (plan.main.phases["update"]["adapters"] - heads for plan in (free, _plan(None, rounds=2)))
    assert 3 * many == 5 * one > 0


def test_a_mixture_of_experts_is_planned_in_fp32() -> None:
    """A CPU computes the products of the experts in fp32, which torch's shape function of them refuses."""
    config = tiny_models.tiny_config("mixtral", 40)
    plan = make_plan(
        _config(rollout_batch_size=4), ModelFacts("tiny", config), Machine({"cpu": ENDLESS, DISK: ENDLESS}), work=WORK
    )
    assert plan.fits
    assert plan.main.phases["update"]["gradients"] > 0
