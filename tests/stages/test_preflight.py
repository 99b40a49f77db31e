"""Checks of the input before a run folder is created."""

from __future__ import annotations

import pytest

from selfeval.config import load_config
from selfeval.errors import ModelError
from selfeval.stages.preflight import check_base
from toy import LAB


def test_a_limit_of_the_thinking_needs_a_tokenizer_with_its_markers() -> None:
    recipe = LAB / "recipe.toml"
    check_base(load_config(recipe, {}))
    with pytest.raises(
        ModelError, match=r"max_thinking_tokens is set, but the tokenizer of .* has no tokens that begin and end"
    ):
        check_base(load_config(recipe, {}, ["replies.max_thinking_tokens=64"]))
