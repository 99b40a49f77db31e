"""Defaults for the model of a new run, by its size and its chat template (see config/model_defaults.py)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfeval.backbone.weight_headers import count_parameters
from selfeval.config import RunConfig
from selfeval.config.model_defaults import NO_THINKING, defaults_for, size_name
from selfeval.errors import ModelError

__all__ = ["ModelDefaults", "model_defaults"]

_LARGEST_FILE = 16 << 20


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
        """Return a sentence with the values that a configuration has taken over; empty if there are none."""
        resolved = config.model_dump(mode="json")
        taken = [f"{key} = {json.dumps(value)}" for key, value in self.values.items() if _at(resolved, key) == value]
        if not taken:
            return ""
        return f"settings for a model of {size_name(self.parameters)} parameters: {', '.join(taken)}"


def model_defaults(model: str, *, download: bool = False) -> ModelDefaults | None:
    """Return the defaults for a model folder, a hub id, or a config.json; None for one that cannot be used.

    The checks of the input say why a model cannot be used.

    Args:
        model: model folder, path of a config.json, or hub id.
        download: download config and tokenizer of a hub id that is not cached. Default: False.
    """
    try:
        if (Path(model) / "config.json").is_file():
            return _defaults(count_parameters(Path(model)), Path(model))
        return _of_hub_id(model, download=download)
    except (ModelError, OSError, ValueError):
        return None


def _of_hub_id(model: str, *, download: bool) -> ModelDefaults:
    # Imported here because they import torch, which a local folder does not need.
    from selfeval.backbone.snapshot import download_texts, model_folder
    from selfeval.planner.model_configs import model_facts, weigh

    if download and not Path(model).exists() and model_folder(model) is None:
        download_texts(model)
    folder = None if Path(model).exists() else model_folder(model)
    # From the config and not from the weights, so the size is the same before and after they are downloaded.
    facts = model_facts(model if folder is None else str(folder))
    return _defaults(weigh(facts, "fp32").total // 4, folder)


def _defaults(parameters: int, folder: Path | None) -> ModelDefaults:
    thinks = folder is not None and _reads_thinking(folder)
    return ModelDefaults(parameters, {**defaults_for(parameters).values, **(NO_THINKING if thinks else {})})


def _reads_thinking(folder: Path) -> bool:
    """Return whether the chat template has an argument `enable_thinking`."""
    files = [path for name in ("chat_template.jinja", "tokenizer_config.json") if (path := folder / name).is_file()]
    texts = [path.read_text("utf-8", errors="replace") for path in files if path.stat().st_size <= _LARGEST_FILE]
    return any(re.search(r"\benable_thinking\b", text) for text in texts)


def _at(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values
