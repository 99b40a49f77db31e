from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

import selfeval
import tiny_models
from selfeval.cli.tuning import config_and_source
from selfeval.config import RunConfig, load_config
from selfeval.config.model_defaults import BY_SIZE, defaults_for
from selfeval.planner.model_configs import count_parameters
from selfeval.runs.model_defaults import model_defaults
from selfeval.stages.running import config_to_run, new_config
from selfeval.stages.tuning import check_settings
from selfeval.store import RUN_SCHEMA, RunStore


def _model(folder: Path, parameters: int, template: str = "") -> Path:
    """A model folder whose weight file is a hole in the file system, as long as its header says."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "chat_template.jinja").write_text(template)
    header = json.dumps({"w": {"dtype": "F32", "shape": [parameters], "data_offsets": [0, 4 * parameters]}}).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 4 * parameters)
    return folder


def test_settings_that_nothing_sets_depend_on_the_size_of_the_model(tmp_path: Path) -> None:
    config = new_config(model=str(_model(tmp_path / "135M", 135_000_000)))
    expected = defaults_for(135_000_000).values
    assert config.policy.learning_rate == expected["policy.learning_rate"] == 2e-4
    assert config.policy.model_dump()["ppo"]["critic_learning_rate"] == expected["policy.ppo.critic_learning_rate"]
    assert config.replies.temperature == (0.6, 1.0)
    seven = new_config(model=str(_model(tmp_path / "7B", 7_000_000_000)))
    assert seven.policy.learning_rate == 5e-5
    assert seven.replies.temperature == (0.8, 1.2)


def test_recipe_and_options_come_before_them(tmp_path: Path) -> None:
    model = _model(tmp_path / "model", 135_000_000)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'model = "{model}"\n[policy]\nlearner = "dpo"\nlearning_rate = 3e-3\n')
    config = new_config(recipe, assignments=["replies.temperature=[1.0, 1.0]"])
    assert config.policy.learning_rate == 3e-3
    assert config.replies.temperature == (1.0, 1.0)
    assert config.evaluator.learning_rate == 5e-4
    assert "ppo" not in config.policy.model_dump()


def test_the_embedded_model_keeps_the_values_of_its_recipe() -> None:
    config = new_config()
    assert config == load_config(Path(config.model).parent / "recipe.toml", {})


def test_a_template_that_may_think_is_told_not_to(tmp_path: Path) -> None:
    model = str(_model(tmp_path / "model", 600_000_000, "{% if enable_thinking %}<think>{% endif %}"))
    assert new_config(model=model).chat.arguments == {"enable_thinking": False}
    thinking = new_config(model=model, assignments=["chat.arguments={enable_thinking = true}"])
    assert thinking.chat.arguments == {"enable_thinking": True}


def test_the_values_are_named_and_those_of_the_user_are_not(tmp_path: Path) -> None:
    model = str(_model(tmp_path / "model", 135_000_000))
    made = model_defaults(model)
    assert made is not None
    note = made.note(new_config(model=model, assignments=["policy.learning_rate=0.5"]))
    assert note.startswith("settings for a model of 135M parameters and its chat template: ")
    assert "evaluator.learning_rate = 0.0005" in note
    assert "policy.learning_rate" not in note


def test_a_hub_id_of_known_size_needs_no_download() -> None:
    made = model_defaults("Qwen/Qwen2.5-7B-Instruct", count_parameters)
    assert made is not None
    assert 7e9 < made.parameters < 8e9
    assert new_config(model="Qwen/Qwen2.5-7B-Instruct", count=count_parameters).policy.learning_rate == 5e-5


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1", b"\xff" * 64])
def test_a_damaged_model_is_left_to_the_checks_of_the_input(content: bytes, tmp_path: Path) -> None:
    model = _model(tmp_path / "model", 1)
    (model / "model.safetensors").write_bytes(content)
    assert model_defaults(str(model)) is None
    assert model_defaults(str(tmp_path / "nothing")) is None
    assert new_config(model=str(model)).policy.learning_rate == 1e-3


def test_every_value_of_the_table_is_valid() -> None:
    for row in BY_SIZE:
        for learner in ("ppo", "trpo", "dpo", "ilql"):
            load_config(None, {}, [f"policy.learner={learner}"], row.values)


def test_a_resumed_run_does_not_ask_the_table(tmp_path: Path) -> None:
    """Its folder has every value, so another version of the table changes nothing."""
    config = load_config(None, {"model": str(_model(tmp_path / "model", 135_000_000))})
    store = RunStore(tmp_path / "run")
    store.update_run(schema=RUN_SCHEMA, status="running", config=config.model_dump(mode="json"))
    store.close()
    assert config_to_run(None, tmp_path / "run").policy == config.policy


def test_whoever_limits_the_chain_of_thought_gets_one(tmp_path: Path) -> None:
    model = str(_model(tmp_path / "model", 600_000_000, "{% if enable_thinking %}<think>{% endif %}"))
    assert new_config(model=model, assignments=["replies.max_thinking_tokens=64"]).chat.arguments == {}


def test_packed_weights_count_as_the_parameters_of_the_config(tmp_path: Path) -> None:
    """Two 4-bit weights in a byte: the file has far fewer elements than the model has parameters."""
    tokenizer = tiny_models.words_tokenizer()
    tiny_models.save_model(tiny_models.model("llama", len(tokenizer)), tokenizer, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}}))
    weights = load_file(tmp_path / "model.safetensors")
    parameters = sum(tensor.numel() for tensor in weights.values())
    made = model_defaults(str(tmp_path))
    assert made is not None
    assert made.parameters == pytest.approx(parameters, rel=0.05)


@pytest.mark.parametrize("also", [[], ["chat"]])
def test_a_tuning_takes_the_defaults_that_it_reads_and_no_others(also: list[str], tmp_path: Path) -> None:
    model = _model(tmp_path / "model", 600_000_000, "{% if enable_thinking %}<think>{% endif %}")
    texts, chats = ([tmp_path / "some.jsonl"], None) if not also else (None, [tmp_path / "some.jsonl"])
    config, source = config_and_source(texts, chats, None, str(model), "name", [])
    check_settings(config, source.also_read)
    assert config.tuning.learning_rate == defaults_for(600_000_000).values["tuning.learning_rate"]
    assert config.chat.arguments == ({"enable_thinking": False} if also else {})
    assert config.policy == RunConfig().policy


def test_the_api_reads_a_recipe_as_a_run_does(tmp_path: Path) -> None:
    model = _model(tmp_path / "model", 135_000_000)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'model = "{model}"\n')
    config = selfeval.load_config(recipe, policy={"iterations": 4})
    assert config == new_config(recipe, assignments=["policy.iterations=4"])
    assert (config.policy.iterations, config.policy.learning_rate) == (4, 2e-4)
