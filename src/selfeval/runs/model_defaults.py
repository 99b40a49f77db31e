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
        return f"settings for a model of {size_name(self.parameters)} parameters and its chat template: {', '.join(taken)}"


def model_defaults(
    model: str, count: Callable[[str], int] | None = None, *, trust_remote_code: bool = False
) -> ModelDefaults | None:
    """Return the defaults for a model folder or a hub id; None for one that cannot be used.

    The checks of the input say why a model cannot be used.

    Args:
        model: model folder or hub id.
        count: Optional. Returns the number of parameters of a model that is not a folder. Default: read its config, which is
            downloaded unless it is cached.
        trust_remote_code: run code that comes with the model, which may have the class of its config. Default: False.
    """
    try:
        parameters, thinks = _size_and_thinking(model, count, trust_remote_code)
    except (ModelError, OSError, ValueError):
        return None
    return ModelDefaults(parameters, {**defaults_for(parameters).values, **(NO_THINKING if thinks else {})})


def _size_and_thinking(model: str, count: Callable[[str], int] | None, trust_remote_code: bool) -> tuple[int, bool]:
    """Return the number of parameters, and whether the chat template has an argument `enable_thinking`."""
    folder = Path(model)
    if count is not None and not folder.is_dir():
        return count(model), False
    # Packed weights have fewer elements than parameters.
    if folder.is_dir() and not re.search(r'"quantization_config"\s*:\s*\{', _text(folder / "config.json")):
        texts = (_text(folder / name) for name in ("chat_template.jinja", "tokenizer_config.json"))
        return count_parameters(folder), any(_THINKING.search(text) for text in texts)
    # Imported here because they import torch, which a local folder does not need.
    from selfeval.backbone.check import read_parts
    from selfeval.backbone.sizes import weight_sizes

    # From the config and not from the weights, so the size of a hub id is the same before and after they are downloaded.
    parts = read_parts(model, trust_remote_code=trust_remote_code, download=False)
    template: Any = parts.tokenizer.chat_template
    return weight_sizes(parts.shell, "fp32").total // 4, bool(_THINKING.search(json.dumps(template)))


def _text(path: Path) -> str:
    """Return the text of a file; empty if it is missing or too large to be what it should be."""
    is_usable = path.is_file() and path.stat().st_size <= _LARGEST_FILE
    return path.read_text("utf-8", errors="replace") if is_usable else ""


def _at(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values
