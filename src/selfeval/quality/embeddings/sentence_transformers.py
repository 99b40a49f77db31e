"""A model that was trained to embed, loaded with the package sentence-transformers."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from selfeval.config import SentenceTransformersConfig
from selfeval.errors import ConfigError, MissingPackageError, ModelError
from selfeval.quality.embeddings.protocol import Vectors, unit_rows
from selfeval.store import fingerprint

__all__ = ["SentenceTransformersEmbedder", "check_sentence_transformers"]

_OFF = ("", "0", "false", "no", "off")


class SentenceTransformersEmbedder:
    """Embeds texts with a model of sentence-transformers. Code that comes with a model is never run.

    A hub id is downloaded if it is not in the cache, unless HF_HUB_OFFLINE is set. A text that is longer than the model's
    limit is cut at its end.

    Args:
        settings: the model, and the text that is put before each text.
        device: Optional. Device such as `cpu` or `cuda`. Default: chosen by the package.

    Raises:
        ConfigError: no model is set.
        MissingPackageError: sentence-transformers is not installed.
        ModelError: the model cannot be loaded.
    """

    def __init__(self, settings: SentenceTransformersConfig, *, device: str | None = None) -> None:
        _refuse_no_model(settings)
        self.settings, self._model = settings, _load(settings.model, device)
        self._name = f"sentence-transformers-{fingerprint([_identity(self._model), settings.prompt])[:16]}"

    @property
    def name(self) -> str:
        """Identifier of the weights, the modules and their settings, and the prompt."""
        return self._name

    def embed(self, texts: Sequence[str]) -> Vectors:
        """Return `[N, D]` vectors of length 1; a blank text has a row of zeros."""
        distinct = [text for text in dict.fromkeys(texts) if text.strip()]
        found = np.zeros((len(texts), _width(self._model)), np.float32)
        if distinct:
            given = [self.settings.prompt + text for text in distinct]
            vectors = unit_rows(
                self._model.encode(
                    given, batch_size=self.settings.batch_size, convert_to_numpy=True, show_progress_bar=False
                ).astype(np.float32)
            )
            rows = dict(zip(distinct, vectors, strict=True))
            for number, text in enumerate(texts):
                if text in rows:
                    found[number] = rows[text]
        return found


def _width(model: Any) -> int:
    # Renamed in version 5; older ones are supported too.
    named = getattr(model, "get_embedding_dimension", None) or model.get_sentence_embedding_dimension
    return int(named())


def _refuse_code(model: str) -> None:
    """Refuse a local folder with modules of its own: versions below 6 run them whatever `trust_remote_code` says.

    Raises:
        ModelError: see above, or its list of modules cannot be read.
    """
    path = Path(model) / "modules.json"
    if not path.is_file():
        return
    try:
        kinds = [str(module["type"]) for module in json.loads(path.read_text("utf-8"))]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(f"embeddings.sentence-transformers.model = {model}: {path} is damaged ({error})") from error
    if foreign := [kind for kind in kinds if not kind.startswith("sentence_transformers.")]:
        raise ModelError(
            f"embeddings.sentence-transformers.model = {model} has modules with code of its own ({', '.join(foreign)}), which "
            "is never run; use a model of sentence_transformers' own modules"
        )


def _load(model: str, device: str | None) -> Any:
    _refuse_code(model)
    made = _import_package().SentenceTransformer
    offline = os.environ.get("HF_HUB_OFFLINE", "").strip().lower() not in _OFF
    try:
        return made(model, device=device, trust_remote_code=False, local_files_only=offline)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"embeddings.sentence-transformers.model = {model} cannot be loaded ({reason}); pass the folder of a model, or a "
            "hub id that is in the cache or can be downloaded"
        ) from error


def check_sentence_transformers(settings: SentenceTransformersConfig) -> None:
    """Check, without loading the model, that it is set and that the package is installed.

    Raises:
        ConfigError: no model is set.
        MissingPackageError: sentence-transformers is not installed.
    """
    _refuse_no_model(settings)
    _import_package()


def _refuse_no_model(settings: SentenceTransformersConfig) -> None:
    if not settings.model:
        raise ConfigError(
            "embeddings.sentence-transformers.model is not set; set it to a model folder or a hub id, such as "
            "sentence-transformers/all-MiniLM-L6-v2"
        )


def _import_package() -> Any:
    try:
        import sentence_transformers
    except ImportError as error:
        raise MissingPackageError("the embedder sentence-transformers", "sentence-transformers") from error
    return sentence_transformers


def _identity(model: Any) -> list[Any]:
    """Return what vectors depend on: a hash of the weights, and settings without weights, such as the pooling.

    Another version under the same hub id has another name.
    """
    found = hashlib.sha256()
    for name, values in sorted(model.state_dict().items()):
        found.update(name.encode())
        found.update(values.detach().float().cpu().contiguous().numpy().tobytes())
    modules = [(type(module).__name__, _settings(module)) for module in model]
    default = model.default_prompt_name
    return [found.hexdigest(), int(model.max_seq_length or 0), modules, model.prompts.get(default) if default else None]


def _settings(module: Any) -> Any:
    named = getattr(module, "get_config_dict", None)
    return None if named is None else named()
