"""Checks of the input before a run folder is created."""

from __future__ import annotations

import pytest

from selfeval.config import load_config
from selfeval.errors import ConfigError, ModelError
from selfeval.judging.templates import templates_folder
from selfeval.stages.preflight import check_base
from toy import LAB


def test_a_limit_of_the_thinking_needs_a_tokenizer_with_its_markers() -> None:
    recipe = LAB / "recipe.toml"
    check_base(load_config(recipe, {}))
    with pytest.raises(
        ModelError, match=r"max_thinking_tokens is set, but the tokenizer of .* has no tokens that begin and end"
    ):
        check_base(load_config(recipe, {}, ["replies.max_thinking_tokens=64"]))


@pytest.mark.parametrize(
    ("inputs", "templates", "said"),
    [
        ("[{layer = 6}]", "none", r"layer = 6, but this model has layers 1 to 5"),
        ("[{rank = 100000}]", "none", r"evaluator.inputs: rank = 100000 is larger than the widest layer"),
        ("[{reference_answer = false}]", str(templates_folder("none")), r"reference_answer = false has no effect"),
    ],
)
def test_evaluators_cannot_read_what_is_not_there(inputs: str, templates: str, said: str) -> None:
    recipe = LAB / "recipe.toml"
    check_base(load_config(recipe, {}, ["evaluator.inputs=[{layer = 5, reference_answer = false, rank = 64}]"]))
    with pytest.raises(ConfigError, match=said):
        check_base(load_config(recipe, {}, [f"evaluator.inputs={inputs}", f"templates={templates}"]))
