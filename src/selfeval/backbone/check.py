"""Whether a model can be used, from its config, its tokenizer and the headers of its weight files: no weight is read.

`load_model` begins with these checks, and so does a command before it creates a run folder.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from selfeval.backbone.families.cache import check_state
from selfeval.backbone.families.table import FAMILIES, family_tokenizer, register_family
from selfeval.backbone.placement import meta_model
from selfeval.backbone.rope import Stretch, stretch_positions
from selfeval.backbone.tokens import ControlTokens, sample_ids
from selfeval.backbone.weight_headers import check_pointers, read_headers
from selfeval.backbone.weights import check_fit, weight_files
from selfeval.config import ContextConfig
from selfeval.errors import ModelError
from selfeval.texts import format_bytes, shortened

__all__ = ["ModelParts", "check_causal", "check_model", "errors_of_model", "read_parts", "refuse_many_layers"]

_GIVE = "pass a Hugging Face model folder or a hub id such as org/name"
_LONGEST_REASON = 400

# A folder of a few bytes must not fill the memory. The limits are several times those of the largest published models.
_LARGEST_FILE, _LARGEST_TEMPLATE = 128 << 20, 1 << 20
_MOST_LAYERS = 4096
_TEXT_FILES = (
    *("config.json", "generation_config.json", "*.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("vocab.txt", "merges.txt", "*.model", "*.tiktoken", "chat_template.json", "*.jinja", "additional_chat_templates/*.jinja"),
)
"""Patterns of the files, besides weights, that loading reads as a whole."""
_COUNTS = re.compile(r"(^|_)(layers?|experts|blocks|depth)$")
"""Names of settings that are numbers of modules."""


@dataclass(frozen=True)
class ModelParts:
    """A model without its weights.

    Attributes:
        config: of transformers, its context stretched as asked.
        files: the safetensors files; empty where a hub id is not downloaded yet.
        shell: the model on the meta device.
        notes: sentences for the user.
    """

    config: Any
    tokenizer: PreTrainedTokenizerBase
    files: tuple[Path, ...]
    shell: nn.Module
    stretch: Stretch | None
    notes: list[str]

    @property
    def model(self) -> nn.Module:
        return self.shell

    def forward_accepts(self, argument: str) -> bool:
        return argument in inspect.signature(self.shell.forward).parameters


def check_model(name: str, *, trust_remote_code: bool = False, context: ContextConfig | None = None) -> None:
    """Refuse a model that cannot be used, in a moment: the checks that `load_model` makes before it reads weights.

    Of a hub id that is not in the cache, config and tokenizer are downloaded, and the weight files are checked when they are
    loaded.

    Args:
        name: folder or hub id.
        trust_remote_code: run code that comes with the model.
        context: how far it attends.

    Raises:
        ModelError: not found, not a causal language model, no usable weight files, files that do not belong together, a
            context that it cannot be given, or a way to write that rollouts cannot follow.
    """
    check_state(read_parts(name, trust_remote_code=trust_remote_code, context=context, download=False))


def read_parts(
    name: str, *, trust_remote_code: bool = False, context: ContextConfig | None = None, download: bool = True
) -> ModelParts:
    """Config, tokenizer and weight files of a model that passed every check of `check_model`.

    Args:
        name: folder or hub id.
        trust_remote_code: run code that comes with the model.
        context: how far it attends.
        download: fetch the weight files of a hub id.

    Raises:
        ModelError: see `check_model`.
    """
    if not name:
        raise ModelError("no model was given; use --model with a Hugging Face model folder or hub id")
    _check_folder(name)
    with errors_of_model(name):
        if not Path(name).is_dir():
            _check_snapshot(name)
        # Before AutoConfig, which refuses a model_type that is not registered.
        values = PreTrainedConfig.get_config_dict(name)[0]
        _refuse_kernels(values, name)
        refuse_many_layers(values, name)
        register_family(values.get("model_type"))
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        check_causal(config, name)
        stretch = stretch_positions(config, context or ContextConfig(), name)
        tokenizer = _tokenizer(name, trust_remote_code)
        files = weight_files(name, download=download)
        _refuse_adapter(name, files)
        shell = meta_model(config, trust_remote_code=trust_remote_code)
        notes = [*_check_weights(shell, files, name), *_check_tokens(shell, tokenizer, name)]
    return ModelParts(config, tokenizer, files, shell, stretch, notes)


@contextmanager
def errors_of_model(name: str) -> Iterator[None]:
    """Inside the block, whatever fails is the model's fault and becomes one sentence.

    The hub client, safetensors and the models' own code raise many kinds of errors.
    """
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        if "trust_remote_code" in str(error):  # transformers names its own argument, which no command of ours has
            raise ModelError(
                f"model {name} contains custom code, which is executed only on request: review it, and pass "
                "--trust-remote-code if you trust it"
            ) from error
        raise ModelError(f"cannot load model {name}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """The whole text of an error as one line: its cause often stands behind the first line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _LONGEST_REASON else f"{text[: _LONGEST_REASON - 3]}..."


# -- the folder ---------------------------------------------------------------------------------------------------------


def _check_folder(name: str) -> None:
    path = Path(name)
    # A hub id has at most one slash.
    looks_like_path = name.startswith((".", "/", "~")) or path.exists() or name.count("/") > 1
    if not looks_like_path:
        return
    if path.is_file():
        raise ModelError(_is_a_file(path))
    if not path.is_dir():
        raise ModelError(f"model folder {name} does not exist; {_GIVE}")
    if not (path / "config.json").is_file():
        raise ModelError(_no_config(path))
    check_pointers(path)
    _refuse_large_files(path)
    try:
        values = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path / 'config.json'} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path / 'config.json'} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ModelError(
            f"{path / 'config.json'} contains a {type(values).__name__} instead of an object; this is not a model's config.json"
        )


def _check_snapshot(name: str) -> None:
    """Refuse the files of a hub id by the limits of a folder, before any of them is read; download those that are missing.

    If it cannot be downloaded, there is nothing to check: transformers, which is asked next, says why.
    """
    with suppress(HfHubHTTPError, HFValidationError, LocalEntryNotFoundError):
        _refuse_large_files(Path(snapshot_download(name, allow_patterns=list(_TEXT_FILES))))


def _refuse_large_files(folder: Path) -> None:
    for path in (path for pattern in _TEXT_FILES for path in sorted(folder.glob(pattern))):
        if path.is_dir():
            continue
        if not path.is_file():  # a named pipe would be read for ever
            raise ModelError(f"{path} is not a file; replace it with the file that the model was published with")
        most = _LARGEST_TEMPLATE if path.suffix == ".jinja" else _LARGEST_FILE
        if (size := path.stat().st_size) > most:
            raise ModelError(
                f"{path} has {format_bytes(size)}, more than {format_bytes(most)}, the limit; replace it with the file that "
                "the model was published with"
            )


def _is_a_file(path: Path) -> str:
    if path.suffix == ".gguf":
        return f"{path} is a GGUF file, which is not supported; use the original model folder with safetensors files"
    return f"model {path} is a file, not a folder; pass the folder that contains config.json, the tokenizer and the weights"


def _no_config(folder: Path) -> str:
    """The message about a folder without config.json, by what it is instead."""
    gguf = sorted(path.name for path in folder.glob("*.gguf"))
    if (folder / "adapter_config.json").is_file():
        return (
            f"{folder} is a PEFT adapter{_base_of(folder)}, not a model; merge it into its base "
            "(PeftModel.merge_and_unload, then save_pretrained) and pass the merged folder"
        )
    if (folder / "run.json").is_file():
        return (
            f"{folder} is a run folder, not a model folder; export a model with `selfeval export {folder} --role policy "
            "--merge`"
        )
    if gguf:
        return (
            f"{folder} contains {gguf[0]}, a GGUF file, which is not supported; use the original folder with safetensors files"
        )
    return f"{folder} has no config.json, so it is not a model folder; pass the folder that contains config.json"


def _base_of(adapter: Path) -> str:
    try:
        base = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return f" for {base}" if base else ""


def _refuse_adapter(name: str, files: tuple[Path, ...]) -> None:
    """Refuse a model with an adapter_config.json: transformers would load the base that it names, from any folder or hub id."""
    folders = {Path(name), *(path.parent for path in files)}
    if found := next((folder for folder in sorted(folders) if (folder / "adapter_config.json").is_file()), None):
        raise ModelError(
            f"{name} has both a config.json and an adapter_config.json{_base_of(found)}, so it is unclear which model it is; "
            "remove adapter_config.json if the folder has the complete weights, or merge the adapter into its base "
            "(PeftModel.merge_and_unload, then save_pretrained) and pass the merged folder"
        )


def _refuse_kernels(values: Mapping[str, Any], name: str) -> None:
    """Refuse a config that names a kernel on the hub: transformers would download and execute it, without `trust_remote_code`.

    Raises:
        ModelError: a setting such as `attn_implementation`, at any depth, is a hub id or a path.
    """
    for key, value in values.items():
        if key.endswith("_implementation") and "/" in str(value):
            raise ModelError(
                f"config.json of {name} sets {key} = {shortened(repr(value))}, code from the hub, which is never executed; "
                "remove that line (backbone.context.attention selects the attention)"
            )
        if isinstance(value, Mapping):
            _refuse_kernels(value, name)


def refuse_many_layers(values: Mapping[str, Any], name: str) -> None:
    """Refuse a config with more layers or experts than any model: each is built before weights are compared.

    Raises:
        ModelError: there is such a number, at any depth.
    """
    for key, value in values.items():
        if _COUNTS.search(key) and isinstance(value, int) and value > _MOST_LAYERS:
            raise ModelError(
                f"config.json of {name} sets {key} = {shortened(str(value))}, which no model has (at most {_MOST_LAYERS:,}); "
                "use the config.json that the model was published with"
            )
        if isinstance(value, Mapping):
            refuse_many_layers(value, name)


# -- config, tokenizer, weights -----------------------------------------------------------------------------------------


def check_causal(config: Any, name: str) -> None:
    """Refuse a model that does not write text, by its config alone: the check that run and plan share.

    Raises:
        ModelError: another architecture than that of a causal language model.
    """
    is_native = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or config.model_type in FAMILIES
    is_remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    architectures = getattr(config, "architectures", None) or []
    # "Conditional" allows multimodal models that generate text (...ForConditionalGeneration).
    names_other_head = architectures and not any("CausalLM" in a or "LMHead" in a or "Conditional" in a for a in architectures)
    is_seq2seq = bool(getattr(config, "is_encoder_decoder", False))  # some of these have a decoder-only twin in transformers
    if is_seq2seq or not (is_native or is_remote) or (names_other_head and not is_remote):
        kind = ", ".join(architectures) or config.model_type
        if not names_other_head and not is_seq2seq:
            raise ModelError(
                f"{name} is a {kind} (model_type {config.model_type}), for which transformers {transformers.__version__} has "
                "no causal language model; use another model, or the complete model if this is one of its parts"
            )
        raise ModelError(f"{name} is a {kind}, not a causal language model; use one that generates text (…ForCausalLM)")


def _tokenizer(name: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    try:
        tokenizer: Any = family_tokenizer(name) or AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except ModelError:
        raise
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise  # `errors_of_model` names the option
        raise ModelError(
            f"cannot load model {name}: its tokenizer cannot be read ({_reason(error)}); add the tokenizer files that the "
            "model was published with (tokenizer.json, tokenizer_config.json)"
        ) from error
    if len(tokenizer) == 0:
        raise ModelError(
            f"cannot load model {name}: its tokenizer has no tokens; add the tokenizer files that the model was published with"
        )
    templates = tokenizer.chat_template
    for text in templates.values() if isinstance(templates, dict) else [templates or ""]:
        if len(text) > _LARGEST_TEMPLATE:
            raise ModelError(
                f"cannot load model {name}: its chat template has {len(text):,} characters, more than {_LARGEST_TEMPLATE:,}, "
                "the limit; use the tokenizer files that the model was published with"
            )
    found: PreTrainedTokenizerBase = tokenizer
    return found


def _check_tokens(shell: Any, tokenizer: PreTrainedTokenizerBase, name: str) -> list[str]:
    """Refuse a tokenizer that gives the model numbers which it has no embedding for; a note where no text is given them.

    So it is when tokens were added to a tokenizer and the model was not resized.
    """
    rows = int(shell.get_input_embeddings().weight.shape[0])
    # A padding token without a row is replaced when the model is loaded, so it does not count.
    beyond = {text: index for text, index in tokenizer.get_vocab().items() if index >= rows and index != tokenizer.pad_token_id}
    control, used = ControlTokens(tokenizer).ids, sample_ids(tokenizer)
    # A control token that no prompt contains is harmless; any other token may occur in a text.
    needed = [text for text, index in beyond.items() if index not in control or index in used]
    some = ", ".join(sorted(needed or beyond)[:3]) + (" and others" if len(needed or beyond) > 3 else "")
    if needed:
        raise ModelError(
            f"{name}: its tokenizer has {len(tokenizer):,} tokens, but its embedding has only {rows:,} rows and none for "
            f"{some}; "
            "use the tokenizer that the model was trained with, or resize the embedding (resize_token_embeddings) and train "
            "the model"
        )
    return [f"the embedding has no row for the tokens {some}; no text is encoded to them"] if beyond else []


def _check_weights(shell: Any, files: tuple[Path, ...], name: str) -> list[str]:
    headers = read_headers(files)
    is_native = type(shell).__module__.startswith("transformers.")
    if not files or not is_native or getattr(shell.config, "quantization_config", None) is not None:
        return []  # packed weights and custom model code: compared while loading
    return check_fit(shell, headers, name)
