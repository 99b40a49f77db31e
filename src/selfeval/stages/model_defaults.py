"""Defaults for the model of a new run, by its size and its chat template (see config/model_defaults.py)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfeval.backbone.weight_headers import count_parameters
from selfeval.config import RunConfig
from selfeval.config.model_defaults import NO_THINKING, defaults_for, size_name
from selfeval.errors import ModelError

__all__ = ["ModelDefaults", "model_defaults"]

_LARGEST_FILE = 16 << 20
_THINKING = re.compile(r"\benable_thinking\b")


@dataclass(frozen=True)
class ModelDefaults:
    """Defaults for a model.

    Attributes:
        parameters: its number of parameters.
        values: values by dotted key, for settings that neither recipe nor options set.
    """

    parameters: int
    values: Mapping[str, Any]

    def note(self, config: RunConfig) -> str:
        """Return a sentence with the values that the stages of a run take from here; empty if there are none."""
        resolved = config.model_dump(mode="json")
        used = {key: value for key, value in self.values.items() if not key.startswith("tuning.")}
        taken = [f"{key} = {json.dumps(value)}" for key, value in used.items() if _at(resolved, key) == value]
        if not taken:
            return ""
        return f"settings for a model of {size_name(self.parameters)} parameters: {', '.join(taken)}"


def model_defaults(model: str, count: Callable[[str], int] | None = None) -> ModelDefaults | None:
    """Return the defaults for a model folder or a hub id; None for one that cannot be used.

    The checks of the input say why a model cannot be used.

    Args:
        model: model folder or hub id.
        count: Optional. Returns the number of parameters of a model that is not a folder. Default: read its config, which is
            downloaded unless it is cached.
    """
    folder = Path(model)
    try:
        if (folder / "config.json").is_file():
            return _defaults(count_parameters(folder), thinks=_reads_thinking(folder))
        return _defaults(count(model), thinks=False) if count else _of_hub_id(model)
    except (ModelError, OSError, ValueError):
        return None


def _of_hub_id(model: str) -> ModelDefaults:
    # Imported here because they import torch, which a local folder does not need.
    from selfeval.backbone.check import read_parts
    from selfeval.backbone.sizes import weight_sizes

    # From the config and not from the weights, so the size is the same before and after they are downloaded.
    parts = read_parts(model, download=False)
    template: Any = parts.tokenizer.chat_template
    return _defaults(weight_sizes(parts.shell, "fp32").total // 4, thinks=bool(_THINKING.search(json.dumps(template))))


def _defaults(parameters: int, *, thinks: bool) -> ModelDefaults:
    return ModelDefaults(parameters, {**defaults_for(parameters).values, **(NO_THINKING if thinks else {})})


def _reads_thinking(folder: Path) -> bool:
    """Return whether the chat template has an argument `enable_thinking`."""
    files = [path for name in ("chat_template.jinja", "tokenizer_config.json") if (path := folder / name).is_file()]
    texts = [path.read_text("utf-8", errors="replace") for path in files if path.stat().st_size <= _LARGEST_FILE]
    return any(_THINKING.search(text) for text in texts)


def _at(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values
