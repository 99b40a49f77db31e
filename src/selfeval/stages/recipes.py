"""Recipes for the Python API."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from selfeval.config import RunConfig
from selfeval.stages.running import assignments_of, new_config

__all__ = ["load_config"]


def load_config(recipe: str | Path | None = None, **settings: Any) -> RunConfig:
    """Return the configuration that `run` would use for a new run, without running anything.

    Args:
        recipe: Optional. Path of a TOML recipe. Default: the embedded model's, or the defaults if `model` is given.
        **settings: values that override the recipe; sections are dicts, such as `policy={"iterations": 4}`.

    Raises:
        ConfigError: the recipe cannot be read, or a key or a value is wrong.

    Example:
        >>> load_config(policy={"iterations": 4}).policy.iterations
        4
    """
    named = {key: settings.pop(key) for key in ("model", "seeds", "name") if settings.get(key) is not None}
    return new_config(recipe, **named, assignments=[*assignments_of(settings)])
