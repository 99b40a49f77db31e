"""Facts about models from their config.json alone: nothing is downloaded, and no weights are read.

The files in `published_configs/` contain the public config fields that determine the sizes of common models, and their source.
"""

from __future__ import annotations

import difflib
import inspect
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from selfeval.backbone.check import check_causal, refuse_many_layers
from selfeval.backbone.families.table import FAMILIES, register_family
from selfeval.backbone.placement import meta_model
from selfeval.backbone.rope import stretch_positions
from selfeval.backbone.sizes import WeightSizes, weight_sizes
from selfeval.config import ContextConfig
from selfeval.errors import ModelError
from selfeval.texts import read_text

__all__ = ["ModelFacts", "count_parameters", "known_models", "model_facts", "read_facts", "weigh"]

_SHIPPED = Path(__file__).parent / "published_configs"


@dataclass(frozen=True)
class ModelFacts:
    """A model's name and its config of transformers, and how it will attend.

    Attributes:
        attention: optional `attn_implementation` for transformers. Default: None, the default of the family.
        reach: tokens of a stretched context; None where the config's own holds.
    """

    name: str
    config: Any
    attention: str | None = None
    reach: int | None = None

    @property
    def text(self) -> Any:
        """The config of its language part."""
        return self.config.get_text_config()

    @cached_property
    def shell(self) -> nn.Module:
        """The model on the meta device, built once: for a deep model that takes seconds."""
        return meta_model(self.config)

    @property
    def model(self) -> nn.Module:
        return self.shell

    def forward_accepts(self, argument: str) -> bool:
        return argument in inspect.signature(self.shell.forward).parameters

    @property
    def layers(self) -> int:
        return int(self.text.num_hidden_layers)

    @property
    def context(self) -> int | None:
        if self.reach is not None:
            return self.reach
        found = next((n for key in ("max_position_embeddings", "n_positions") if (n := getattr(self.text, key, None))), None)
        return None if found is None else int(found)

    def within(self, context: ContextConfig) -> ModelFacts:
        """The facts of the model as it is loaded with these `[backbone.context]` values.

        Flash attention is taken for sdpa, which holds as much.

        Raises:
            ModelError: its positions cannot be scaled.
        """
        # A copy, because stretch_positions changes the config in place.
        config = type(self.config).from_dict(self.config.to_dict())
        stretch = stretch_positions(config, context, self.name)
        attention = {"auto": None, "flash_attention_2": "sdpa"}.get(context.attention, context.attention)
        return ModelFacts(self.name, config, attention, stretch.reach if stretch else None)

    def with_layers(self, count: int) -> Any:
        """A copy of the config with the first `count` layers."""
        values = self.config.to_dict()
        # Families name the number of layers differently.
        for key in ("num_hidden_layers", "n_layer", "num_layers", "n_layers"):
            if key in values:
                values[key] = count
        if isinstance(values.get("layer_types"), list):
            values["layer_types"] = values["layer_types"][:count]
        return type(self.config).from_dict(values)

    @property
    def period(self) -> int | None:
        """After how many layers their kinds repeat: 1 where all are alike, None where the config does not say so plainly."""
        kinds = getattr(self.text, "layer_types", None) or [""] * self.layers
        lists = [
            k for k, v in self.text.to_dict().items() if isinstance(v, list) and len(v) == self.layers and k != "layer_types"
        ]
        # Another list with an entry per layer may vary the layers too, and `with_layers` shortens the top-level config alone.
        if lists or self.text is not self.config:
            return None
        # The smallest shift that maps the kinds onto themselves; a shift by all layers always does.
        return next(n for n in range(1, self.layers + 1) if all(a == b for a, b in zip(kinds, kinds[n:], strict=False)))


def known_models() -> dict[str, Path]:
    """Hub ids whose facts come with the package."""
    return {path.stem.replace("--", "/"): path for path in sorted(_SHIPPED.glob("*.json"))}


def read_facts(name: str, values: dict[str, Any]) -> ModelFacts:
    """Facts from the content of a config.json.

    Raises:
        ModelError: it is no causal language model that transformers knows.
    """
    kind = values.get("model_type")
    if (
        not isinstance(kind, str)
        or kind not in {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *FAMILIES}
        or values.get("is_encoder_decoder")
    ):
        raise ModelError(
            f"{name}: model_type {json.dumps(kind)} is not a causal language model known to transformers; use the config.json "
            "of a model that generates text"
        )
    register_family(kind)
    refuse_many_layers(values, name)
    # The class itself and not AutoConfig.for_model: a family may read a published config as that of another model.
    config = CONFIG_MAPPING[kind].from_dict(values, name_or_path=name)
    check_causal(config, name)
    return ModelFacts(name, config)


_LARGEST_CONFIG = 16 << 20


def _read_json(path: Path) -> dict[str, Any]:
    text = read_text(path, "config.json", ModelError, most=_LARGEST_CONFIG, remedy="pass the config.json of a model")
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise ModelError(f"{path} cannot be read as a config.json: {reason}") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path} is not a model's config.json: it contains a {type(values).__name__} instead of an object")
    return values


def model_facts(model: str) -> ModelFacts:
    """The facts of a model folder, a config.json, or a hub id that is known here (its last part will do).

    Raises:
        ModelError: none of these.
    """
    path = Path(model)
    if model and path.is_dir():
        path = path / "config.json"
        if not path.is_file():
            raise ModelError(
                f"{model} has no config.json, so it is not a model folder; pass the folder that contains config.json"
            )
    if model and path.is_file():
        return read_facts(path.parent.name if path.name == "config.json" else path.name, _read_json(path))
    known = known_models()
    found = {name.lower(): name for name in known} | {name.split("/")[1].lower(): name for name in known}
    name = found.get(model.lower())
    if name is None:
        close = difflib.get_close_matches(model.lower(), found, n=1, cutoff=0.6)
        hint = f' Did you mean "{found[close[0]]}"?' if close else ""
        raise ModelError(
            f'model "{model}" is neither a local folder nor a model of known size.{hint} Pass a model folder, --config with '
            "its "
            f"config.json, or one of: {', '.join(known)}"
        )
    return read_facts(name, _read_json(known[name])["config"])


def weigh(facts: ModelFacts, precision: str) -> WeightSizes:
    """Count the bytes of a model's weights in a precision, without creating any."""
    return weight_sizes(facts.shell, precision)


def count_parameters(model: str) -> int:
    """Count the parameters of a model by its config; see `model_facts`.

    Raises:
        ModelError: its config is not known here.
    """
    return weigh(model_facts(model), "fp32").total // 4
