from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ByteSize

from selfeval.config import (
    LEARNERS,
    BackboneConfig,
    ContextConfig,
    DPOConfig,
    GRPOConfig,
    LoraConfig,
    PolicyConfig,
    PPOConfig,
    RunConfig,
    config_of_run,
    load_config,
    nearest,
)
from selfeval.errors import ConfigError, RunFolderError

ROOT = Path(__file__).resolve().parents[1]
RECIPES = [*sorted((ROOT / "recipes").glob("*.toml")), ROOT / "src" / "selfeval" / "lab" / "recipe.toml"]


def _recipe(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


def _refusal(*assignments: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(None, {}, assignments)
    return str(caught.value)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads(recipe: Path) -> None:
    config = load_config(recipe, {})
    assert config.name
    assert not config.seeds or Path(config.seeds).is_file()


def test_the_settings_of_vllm_are_read_and_kept(tmp_path: Path) -> None:
    path = _recipe(tmp_path, '[backbone]\nengine = "vllm"\n[backbone.vllm]\nmax_weight = 1.5\nmax_length = 512\n')
    config = load_config(path, {}, ["backbone.vllm.sleep=false"])
    vllm = config.backbone.vllm
    assert (config.backbone.engine, vllm.max_weight, vllm.max_length, vllm.sleep) == ("vllm", 1.5, 512, False)
    assert config_of_run(json.loads(config.model_dump_json()), tmp_path) == config
    assert load_config(None, {}).backbone.engine == "own"


@pytest.mark.parametrize(
    ("assignment", "reason"),
    [
        ("backbone.device=cpu", "needs a GPU"),
        ("backbone.precision=nf4", "would sample from the weights that are not quantised"),
        ("backbone.context.rope_scaling=linear", "does not scale positions"),
        ("backbone.lora.rank=513", "rank 512 at most, got lora.rank = 513"),
        ("policy.learner=ilql", "guides decoding by value functions"),
        ("backbone.vllm.max_weight=0.9", "greater than or equal to 1"),
    ],
)
def test_what_vllm_cannot_do_is_refused(assignment: str, reason: str) -> None:
    assert reason in _refusal("backbone.engine=vllm", assignment)
    if "vllm" not in assignment:
        load_config(None, {}, [assignment])


def test_the_embedded_recipe_points_at_the_files_beside_it() -> None:
    config = load_config(RECIPES[-1], {})
    assert (Path(config.model) / "config.json").is_file()
    assert Path(config.model).is_absolute()


@pytest.mark.parametrize(
    ("assignment", "named", "suggested"),
    [
        ("modell=x", '"modell"', '"model"'),
        ("polcy.iterations=3", '"polcy"', '"policy"'),
        ("policy.iteration=3", '"policy.iteration"', '"iterations"'),
        ("backbone.lora.rnk=3", '"backbone.lora.rnk"', '"rank"'),
        ("precison=fp32", '"precison"', '"backbone.precision"'),
        ("lorra.rank=4", '"lorra"', '"backbone.lora"'),
    ],
)
def test_an_unknown_key_suggests_the_nearest_one(assignment: str, named: str, suggested: str) -> None:
    message = _refusal(assignment)
    assert f"unknown key {named}; did you mean {suggested}?" in message


def test_an_unknown_key_in_a_recipe_names_the_recipe(tmp_path: Path) -> None:
    path = _recipe(tmp_path, "[questions]\ntrian = 3\n")
    with pytest.raises(ConfigError, match=r'unknown key "questions\.trian"; did you mean "train"') as caught:
        load_config(path, {})
    assert str(path) in str(caught.value)


def test_a_key_that_is_like_no_other_lists_what_is_allowed() -> None:
    message = _refusal("backbone.lora.zzzzzz=3")
    assert "allowed: alpha, rank, rslora, targets" in message
    assert "backbone" not in _refusal("policy.precison=fp32"), "only at the top, where settings of the backbone are expected"
    assert nearest("zzzz", ["b", "a"]) == "; allowed: a, b"
    assert nearest("verdict", ["pairs", "verdicts"]) == '; did you mean "verdicts"?'


def test_a_misspelt_setting_of_the_backbone_is_suggested_with_its_section() -> None:
    with pytest.raises(ConfigError, match=r'unknown key "precison"; did you mean "backbone\.precision"'):
        load_config(None, {}, ["precison=bf16"])


@pytest.mark.parametrize(
    ("assignment", "got"),
    [
        ("policy.iterations=many", '"many"'),
        ("policy.iterations=2.5", "2.5"),
        ("policy.learning_rate=[1]", "[1]"),
        ("seed=-1", "-1"),
        ("backbone.device=tpu", '"tpu"'),
        ("policy.iterations=0", "0"),
        ("policy.learning_rate=0", "0"),
        ("policy.learning_rate=inf", "Infinity"),
        ("verdicts.keep=0.4", "0.4"),
        ("verdicts.keep=1.01", "1.01"),
        ("replies.per_question=1", "1"),
        ("questions.top_p=0", "0"),
        ("evaluator.held_out=0.5", "0.5"),
    ],
)
def test_a_wrong_type_or_range_says_the_key_and_what_was_got(assignment: str, got: str) -> None:
    message = _refusal(assignment)
    assert f"{assignment.split('=')[0]}: got {got}; " in message


@pytest.mark.parametrize("learner", ["grpo", "rloo", "raft", "dpo"])
def test_a_learner_that_compares_replies_wants_two_of_them(learner: str) -> None:
    given = [f"policy.learner={learner}", "policy.replies_per_question=1"]
    assert f"{learner} compares replies to the same question; replies_per_question must be at least 2" in _refusal(*given)
    assert load_config(None, {}, ["policy.replies_per_question=1"]).policy.learner == "ppo"


def test_dpo_wants_a_minibatch_of_a_pair() -> None:
    given = ["policy.learner=dpo", "policy.minibatch=1"]
    assert "minibatch counts replies; it must be at least 2, got 1" in _refusal(*given)
    kept = ["policy.learner=dpo", "policy.dpo.pairs=kept", "policy.replies_per_question=1"]
    assert load_config(None, {}, kept).policy.settings == DPOConfig(pairs="kept")


def test_arguments_of_the_chat_template_are_json_values_by_name() -> None:
    given = ["chat.arguments.enable_thinking=false", "chat.arguments.tools_in=[1, {a = 'b'}]"]
    config = load_config(None, {}, given)
    assert config.chat.arguments == {"enable_thinking": False, "tools_in": [1, {"a": "b"}]}
    assert config_of_run(json.loads(config.model_dump_json()), Path("run.json")) == config


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("chat.arguments.messages=1", "'messages' cannot be an argument of a chat template"),
        ("chat.arguments={'a-b' = 1}", "'a-b' cannot be an argument of a chat template"),
        ("chat.arguments={in = 1}", "'in' cannot be an argument of a chat template"),
        ("chat.arguments.day=2026-01-31", "day must be a JSON value"),
        ("chat.arguments.scale=inf", "scale must be a JSON value"),
    ],
)
def test_what_a_chat_template_cannot_be_passed_is_refused(assignment: str, said: str) -> None:
    assert said in _refusal(assignment)


def test_a_range_the_wrong_way_round_is_refused() -> None:
    assert "temperature must be a range [low, high], got low 1.2 > high 0.8" in _refusal("replies.temperature=[1.2, 0.8]")
    assert load_config(None, {}, ["replies.temperature=[0.9, 0.9]"]).replies.temperature == (0.9, 0.9)


@pytest.mark.parametrize(
    ("assignments", "path", "value"),
    [
        (["policy.iterations=20"], "policy.iterations", 20),
        (["policy.iterations = 20"], "policy.iterations", 20),
        (["policy.iterations=1", "policy.iterations=2"], "policy.iterations", 2),
        (["policy.learning_rate=1e-4"], "policy.learning_rate", 1e-4),
        (["verdicts.reasoning=false"], "verdicts.reasoning", False),
        (["model=some/model"], "model", "some/model"),
        (["model='some/model'"], "model", "some/model"),
        (["model=a=b"], "model", "a=b"),
        (["replies.top_p=[0.5, 0.75]"], "replies.top_p", (0.5, 0.75)),
        (['backbone.lora.targets=["q_proj", "v_proj"]'], "backbone.lora.targets", ("q_proj", "v_proj")),
        (["backbone.lora.targets=all-linear"], "backbone.lora.targets", "all-linear"),
    ],
)
def test_set_takes_toml_values_and_plain_words(assignments: Sequence[str], path: str, value: Any) -> None:
    found: Any = load_config(None, {}, assignments)
    for part in path.split("."):
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("assignment", ["policy.iterations", "=3", "  =3", ""])
def test_set_without_key_and_value_shows_an_example(assignment: str) -> None:
    assert "expected key=value, for example --set policy.iterations=20" in _refusal(assignment)


def test_set_below_a_value_is_refused() -> None:
    assert '"seed" is a value, not a section' in _refusal("seed=1", "seed.more=2")


def test_set_wins_over_options_and_options_over_the_recipe(tmp_path: Path) -> None:
    path = _recipe(tmp_path, 'name = "recipe"\nseed = 3\n[policy]\niterations = 7\n[policy.ppo]\nclip = 0.3\n')
    config = load_config(path, {"name": "option", "seeds": None}, ["policy.iterations=9"])
    assert (config.name, config.seed, config.policy.iterations, config.policy.settings_as(PPOConfig).clip) == (
        "option",
        3,
        9,
        0.3,
    )
    assert load_config(path, {"name": "option"}, ["name=set"]).name == "set"


def test_paths_in_a_recipe_are_relative_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "recipes"
    (folder / "model").mkdir(parents=True)
    (folder / "seeds.txt").write_text("How?\n")
    path = _recipe(folder, 'model = "model"\nseeds = "seeds.txt"\n')
    monkeypatch.chdir(tmp_path)
    config = load_config(path.relative_to(tmp_path), {})
    assert (config.model, config.seeds) == (str(folder / "model"), str(folder / "seeds.txt"))
    hub = load_config(_recipe(folder, 'model = "org/name"\n'), {})
    assert hub.model == "org/name"


@pytest.mark.parametrize(
    "text",
    [
        b"a = ",
        b"[policy\n",
        b"x = 1\nx = 2\n",
        b"x = " + b"9" * 5000,
        b"x = " + b"[" * 10_000,
        b"x = " + b"[" * 10_000 + b"]" * 10_000,
    ],
)
def test_a_recipe_that_is_no_toml_is_refused(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "recipe.toml"
    path.write_bytes(text)
    with pytest.raises(ConfigError, match="is not valid TOML"):
        load_config(path, {})


def test_a_recipe_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for path, problem in ((tmp_path / "none.toml", "does not exist"), (tmp_path, "is a folder, not a file")):
        with pytest.raises(ConfigError, match=rf"{problem}; pass the path of a \.toml recipe"):
            load_config(path, {})


def test_every_field_is_explained_and_the_config_survives_json() -> None:
    config = load_config(None, {}, ["replies.temperature=[0.5, 1]", 'backbone.lora.targets=["q_proj"]'])
    assert RunConfig.model_validate(json.loads(json.dumps(config.model_dump(mode="json")))) == config
    sections: list[Any] = [
        RunConfig,
        *_sections_of(RunConfig),
        *_sections_of(BackboneConfig),
        *(spec.config for spec in LEARNERS.values()),
    ]
    fields = [(s, name, field) for s in sections for name, field in s.model_fields.items() if field.validation_alias is None]
    values = [row for row in fields if not hasattr(row[2].annotation, "model_fields")]  # a section has its own docstring
    silent = [f"{s.__name__}.{name}" for s, name, field in values if not field.description]
    assert silent == []


def _sections_of(model: Any) -> list[Any]:
    return [field.annotation for field in model.model_fields.values() if hasattr(field.annotation, "model_fields")]


@pytest.mark.parametrize("learner", ["ilql", "soft_q"])
def test_learners_that_leave_the_policys_weights_alone_have_one_round(learner: str) -> None:
    assert load_config(None, {}, [f"policy.learner={learner}"]).rounds == 1
    said = _refusal("rounds=2", f"policy.learner={learner}")
    assert f'rounds: got 2; policy.learner = "{learner}" leaves the policy\'s weights unchanged' in said
    assert load_config(None, {}, ["rounds=2"]).rounds == 2


def test_a_byte_order_mark_is_no_part_of_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_bytes(b'\xef\xbb\xbfname = "mine"\n')
    assert load_config(path, {}).name == "mine"
    path.write_bytes(b"\xff\xfen\x00")
    with pytest.raises(ConfigError, match=r"recipe .*recipe\.toml is not UTF-8 text"):
        load_config(path, {})


def test_each_problem_names_the_place_that_the_value_was_given_at(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text("seed = -1\n[backbone.lora]\nrank = 4\n")
    assignments = ["policy.ppo.clip=-1", "backbone.lora.alpha=1e300", "backbone.rollout=3"]
    with pytest.raises(ConfigError) as caught:
        load_config(path, {"backbone.memory_budget": "5 parsecs"}, assignments)
    said = str(caught.value)
    assert f"recipe {path}: seed: got -1; Input should be greater than or equal to 0" in said
    assert "--memory-budget 5 parsecs: backbone.memory_budget: got" in said
    assert "--set policy.ppo.clip=-1: policy.ppo.clip: got -1; Input should be greater than 0" in said
    assert "--set backbone.lora.alpha=1e300: backbone.lora.alpha: got 1e+300; must be between -1e+09 and 1e+09" in said
    assert '--set backbone.rollout=3: unknown key "backbone.rollout"; did you mean "rollout_batch_size"?' in said
    assert said.count("recipe") == 2, "the recipe is blamed for its own value only (its path holds the word too)"


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("backbone.lora.targets=[]", "list at least one module"),
        ('backbone.lora.targets=["q_proj", " "]', "list at least one module"),
        ("questions.train=10000000000000000000000", "must be at most 2,147,483,647"),
        ("seed=9223372036854775808", "must be at most 9,223,372,036,854,775,807"),
        ("policy.learning_rate=1e40", "must be between"),
        ('name="a\\u0000b"', "must not contain control characters"),
        ('seeds="a\\u001b[2Jb"', "must not contain control characters"),
        ("name=../mine", "must be a folder name below runs/"),
        ("name=..", "must be a folder name below runs/"),
        ('name=""', "must be a folder name below runs/"),
    ],
)
def test_values_that_would_fail_once_the_work_has_begun_are_refused(assignment: str, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)) as caught:
        load_config(None, {}, [assignment])
    assert str(caught.value).startswith(f"--set {assignment}: ")
    assert load_config(None, {}, ["seed=9223372036854775807"]).seed == 2**63 - 1


def test_an_integer_of_thousands_of_digits_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"seed: got .*must be at most|seed: got"):
        load_config(None, {}, [f"seed={'9' * 5000}"])


@pytest.mark.parametrize("value", ["true", "false"])
@pytest.mark.parametrize("key", ["trust_remote_code", "allow_code_execution"])
def test_no_file_decides_whether_a_models_code_runs(key: str, value: str, tmp_path: Path) -> None:
    recipe, option = _recipe(tmp_path, f"{key} = {value}"), f"--{key.replace('_', '-')}"
    for arguments in ((recipe, {}, ()), (None, {}, (f"{key}={value}",))):
        with pytest.raises(ConfigError, match=rf'"{key}": .* pass {option} on the command line'):
            load_config(*arguments)


# -- the section of the backbone ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BackboneConfig.model_fields)
def test_a_setting_of_the_backbone_at_the_top_names_its_place(name: str, tmp_path: Path) -> None:
    value: Any = BackboneConfig.model_fields[name].default
    is_section = isinstance(value, BaseModel)
    expected = f'unknown key "{name}": it is a setting of the backbone; give it as backbone.{name}'
    assignment = f"{name}.{next(iter(type(value).model_fields))}=1" if is_section else f"{name}=1"
    assert _refusal(assignment) == f"--set {assignment}: {expected}"
    path = _recipe(tmp_path, f"[{name}]\n" if is_section else f"{name} = 1\n")
    with pytest.raises(ConfigError, match=re.escape(f"recipe {path}: {expected}")):
        load_config(path, {})


def test_settings_of_the_backbone_are_read_from_its_section(tmp_path: Path) -> None:
    path = _recipe(tmp_path, '[backbone]\nprecision = "bf16"\n[backbone.lora]\nrank = 4\n')
    given = {"backbone.memory_budget": "2GiB"}
    config = load_config(path, given, ["backbone.lora.alpha=8", "backbone.context.attention=eager"])
    assert config.backbone == BackboneConfig(
        precision="bf16",
        memory_budget=ByteSize(2 << 30),
        context=ContextConfig(attention="eager"),
        lora=LoraConfig(rank=4, alpha=8.0),
    )
    with pytest.raises(ConfigError, match=r'^--memory-budget 2GiB: "backbone" is a value, not a section$'):
        load_config(_recipe(tmp_path, "backbone = 1\n"), given)


# -- the sections of the learners ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("learner", LEARNERS)
def test_a_configuration_holds_the_section_of_its_learner_and_no_other(learner: str) -> None:
    config = load_config(None, {}, [f"policy.learner={learner}"])
    assert type(config.policy.settings) is LEARNERS[learner].config
    dumped = config.model_dump(mode="json")
    assert {key for key in dumped["policy"] if key in LEARNERS} == {learner}
    assert dumped["policy"][learner].keys() == LEARNERS[learner].config.model_fields.keys()
    assert RunConfig.model_validate(json.loads(json.dumps(dumped))) == config


def test_an_unknown_learner_names_the_nearest_one_and_all() -> None:
    said = _refusal("policy.learner=pp0", "policy.pp0.clip=0.1")
    assert 'policy.learner: got "pp0"; unknown learner; did you mean "ppo"? allowed: ppo, trpo, grpo, ' in said
    assert 'unknown key "policy.pp0"; did you mean "ppo"?' in said


def test_the_section_of_another_learner_is_refused(tmp_path: Path) -> None:
    expected = 'policy.dpo: policy.learner is "ppo", so only that section is allowed; set policy.learner = "dpo"'
    assert f"--set policy.dpo.pairs=kept: {expected}" in _refusal("policy.dpo.pairs=kept")
    path = _recipe(tmp_path, '[policy.dpo]\npairs = "kept"\n')
    with pytest.raises(ConfigError, match=re.escape(f"recipe {path}: {expected}")):
        load_config(path, {})
    both = _recipe(tmp_path, '[policy]\nlearner = "dpo"\n[policy.ppo]\nclip = 0.1\n[policy.dpo]\npairs = "kept"\n')
    with pytest.raises(ConfigError, match=r'policy\.ppo: policy\.learner is "dpo"'):
        load_config(both, {})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["policy.clip=0.1"], '"policy.clip" is a setting of the learner; write it as policy.ppo.clip'),
        (["policy.learner=trpo", "policy.trust_region=0.1"], "write it as policy.trpo.trust_region"),
        (
            ["policy.learner=dpo", "policy.clip=0.1"],
            '"policy.clip" is not a setting of dpo; learners that have it: ppo, grpo, rloo',
        ),
        (["policy.ppo.expectile=0.9"], '"policy.ppo.expectile" is not a setting of ppo; learners that have it: ilql'),
        (["policy.ppo.clop=0.1"], 'unknown key "policy.ppo.clop"; did you mean "clip"?'),
        (["policy.settings=1"], 'unknown key "policy.settings"'),
        (["policy.ppo=3"], "policy.ppo: got 3; Input should be a valid dictionary"),
        (
            ["policy.ppo.clip=2", "policy.learner=ppo"],
            "--set policy.ppo.clip=2: policy.ppo.clip: got 2; Input should be less than 1",
        ),
    ],
)
def test_a_misplaced_setting_of_a_learner_names_its_place(given: list[str], said: str) -> None:
    assert said in _refusal(*given)


@pytest.mark.parametrize(
    "key", ["max_grad_norm", "reward_clip", "judge_every", "length_guard", "reference_ema", "ppo.clip_high", "ppo.step_kl"]
)
def test_none_turns_a_setting_off_and_zero_does_not(key: str, tmp_path: Path) -> None:
    config = load_config(None, {}, [f"policy.{key}=none"]).policy
    assert getattr(config.settings if "." in key else config, key.rpartition(".")[2]) is None
    section, _, name = f"policy.{key}".rpartition(".")
    assert load_config(_recipe(tmp_path, f'[{section}]\n{name} = "none"\n'), {}).policy == config
    assert f"policy.{key}: got 0; must be greater than 0; none disables it" in _refusal(f"policy.{key}=0")


def test_a_resumed_run_with_another_loss_has_the_clip_range_of_that_loss() -> None:
    """A range that was written down with the first loss would clip nothing: GSPO's is 0.0003."""
    begun = load_config(None, {}, ["policy.learner=grpo"])
    assert begun.policy.settings_as(GRPOConfig).clip_range == (0.2, 0.2)
    resumed = load_config(None, begun.model_dump(mode="json"), ["policy.grpo.loss=gspo"])
    assert resumed.policy.settings_as(GRPOConfig).clip_range == (3e-4, 4e-4)
    chosen = load_config(None, resumed.model_dump(mode="json"), ["policy.grpo.clip=0.1"])
    assert chosen.policy.settings_as(GRPOConfig).clip_range == (0.1, 0.1)
    back = load_config(None, chosen.model_dump(mode="json"), ["policy.grpo.clip=none", "policy.grpo.loss=dapo"])
    assert back.policy.settings_as(GRPOConfig).clip_range == (0.2, 0.28)
    with pytest.raises(ConfigError, match=r"policy\.grpo\.clip"):
        load_config(None, {}, ["policy.learner=grpo", "policy.grpo.clip=1.5"])


def test_a_resumed_run_may_take_another_learner() -> None:
    before = load_config(None, {}, ["policy.ppo.clip=0.1", "policy.iterations=7"]).model_dump(mode="json")
    after = load_config(None, before, ["policy.learner=dpo", "policy.dpo.pairs=kept"]).policy
    assert (after.learner, after.iterations, after.settings) == ("dpo", 7, DPOConfig(pairs="kept"))
    same = load_config(None, before, ["policy.learner=ppo"]).policy
    assert same.settings_as(PPOConfig).clip == 0.1


def test_the_configuration_of_an_older_version_is_refused_in_one_message() -> None:
    values = RunConfig().model_dump(mode="json")
    values["policy"] |= {
        **values["policy"].pop("ppo"),
        "replay": 2048,
        "expectile": 0.8,
        "trust_region": 0.01,
        "pairs": "sampled",
    }
    with pytest.raises(RunFolderError) as caught:
        config_of_run(values, Path("runs/old/run.json"))
    said = str(caught.value)
    assert said.startswith("runs/old/run.json was written by another version of selfeval (unsupported settings: policy.")
    assert "start a new run" in said
    assert len(said) < 400


def test_settings_are_read_as_the_class_that_they_have() -> None:
    with pytest.raises(TypeError, match=r"the settings of ppo are PPOConfig, not DPOConfig"):
        PolicyConfig().settings_as(DPOConfig)


def test_a_system_prompt_may_have_several_lines() -> None:
    assert load_config(None, {}, ['chat.system="Be brief.\\nBe kind."']).chat.system == "Be brief.\nBe kind."
    assert "must not contain control characters" in _refusal('chat.system="Be\\u0007 brief."')


@pytest.mark.parametrize("value", ["0", "-1", "true", "1.5", "car", "none"])
def test_a_limit_of_replies_is_a_number_or_the_word_auto(value: str) -> None:
    said = _refusal(f"replies.max_new_tokens={value}")
    assert said.count("replies.max_new_tokens") == 2, "once where it was set, and once with the reason"
    assert 'must be a whole number of at least 1, or "auto"' in said
    for allowed in ("auto", 7):
        assert load_config(None, {}, [f"replies.max_new_tokens={allowed}"]).replies.max_new_tokens == allowed


def test_inputs_of_evaluators_repeat_and_are_recorded_only_if_set() -> None:
    # Without them the key of the stage is that of earlier versions.
    assert "inputs" not in load_config(None, {}, ["evaluator.members=3"]).model_dump()["evaluator"]
    config = load_config(None, {}, ["evaluator.members=3", "evaluator.inputs=[{}, {layer = 2, reference_answer = false}]"])
    read = [config.evaluator.input_of(member) for member in range(3)]
    assert [(one.layer, one.reference_answer) for one in read] == [(None, True), (2, False), (None, True)]
    assert config.evaluator.varies_reference
    assert config.model_dump()["evaluator"]["inputs"][1] == {"layer": 2, "reference_answer": False}
    assert RunConfig.model_validate(config.model_dump(mode="json")).evaluator == config.evaluator


def test_ranks_poolings_and_labels_are_recorded_only_if_set() -> None:
    assert "labels" not in load_config(None, {}, ["evaluator.labels=soft"]).model_dump()["evaluator"]
    inputs = "evaluator.inputs=[{rank = 4}, {pooling = 'mean'}]"
    config = load_config(None, {}, ["evaluator.members=2", inputs, "evaluator.labels=hard"])
    values = config.model_dump(mode="json")
    assert values["evaluator"]["labels"] == "hard"
    plain = {"layer": None, "reference_answer": True}
    assert values["evaluator"]["inputs"] == [{**plain, "rank": 4}, {**plain, "pooling": "mean"}]
    assert RunConfig.model_validate(values).evaluator == config.evaluator


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("[{}, {}]", "inputs has 2 tables for 1 members"),
        ("[{rank = 0}]", "evaluator.inputs.0.rank: got 0"),
        ("[{pooling = 'max'}]", 'evaluator.inputs.0.pooling: got "max"'),
        ("[{layer = 0}]", "evaluator.inputs.0.layer: got 0"),
        ("[{layers = 2}]", 'unknown key "evaluator.inputs.0.layers"; did you mean "layer"'),
    ],
)
def test_inputs_that_no_evaluator_can_have_are_refused(value: str, said: str) -> None:
    assert said in _refusal(f"evaluator.inputs={value}")
