"""Find a model's weight files, check that they are complete, and check that they match config.json.

Only headers are read, so a damaged or unsuitable model is rejected immediately instead of after minutes of loading.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from selfeval.backbone.weight_headers import INDEX, SINGLE, TensorHeader, shards_of
from selfeval.errors import ModelError

__all__ = ["check_fit", "check_report", "weight_files"]

_CONVERT = (
    "convert it: from transformers import AutoModelForCausalLM; "
    'AutoModelForCausalLM.from_pretrained("{name}", use_safetensors=False).save_pretrained("NEW_FOLDER"), '
    "copy the tokenizer files there, and pass NEW_FOLDER"
)
# -- which files there are ----------------------------------------------------------------------------------------------


def weight_files(name: str, *, download: bool = True) -> tuple[Path, ...]:
    """Return the safetensors files of a model folder or hub id, in order.

    Args:
        name: model folder or hub id.
        download: download files of a hub id that are not cached. If False, a hub id that is not cached has no files.
            Default: True.

    Raises:
        ModelError: the folder has no safetensors files, or its index is invalid.
    """

    def find(file: str) -> Path | None:
        found = cached_file(name, file, _raise_exceptions_for_missing_entries=False, local_files_only=not download)
        return None if found is None else Path(found)

    single = find(SINGLE)
    if single is not None:
        return (single,)
    index = find(INDEX)
    if index is None:
        if Path(name).is_dir():
            raise ModelError(_no_weights(Path(name)))
        return ()
    shards = shards_of(index)
    files = {shard: find(shard) for shard in shards}
    missing = [shard for shard, path in files.items() if path is None]
    if missing and (download or Path(name).is_dir()):
        some = ", ".join(missing[:3]) + (" and others" if len(missing) > 3 else "")
        raise ModelError(
            f"{name}: {len(missing)} of the {len(shards)} weight files listed in {index.name} are missing ({some}); download "
            "them"
        )
    return () if missing else tuple(path for path in files.values() if path is not None)


def _no_weights(folder: Path) -> str:
    """Return the error message for a folder without safetensors files, based on the files it has instead."""
    there = sorted(path.name for path in folder.iterdir() if path.is_file())
    pickles = [name for name in there if name.endswith((".bin", ".pt", ".pth", ".ckpt")) and name != "training_args.bin"]
    gguf = [name for name in there if name.endswith(".gguf")]
    others = [name for name in there if name.endswith(".safetensors")]
    if others:
        return (
            f"{folder} has {others[0]}, but no {SINGLE} and no {INDEX}; rename its files to the names they were published with"
        )
    if pickles:
        return (
            f"{folder} has weights only in {pickles[0]}, a pickle, which can execute code when loaded and is not supported; "
            + _CONVERT.format(name=folder)
        )
    if gguf:
        return f"{folder} has weights only in {gguf[0]}; GGUF is not supported: use the original safetensors folder"
    return f"{folder} has a config.json but no weights ({SINGLE}); download the model's weight files into it"


# -- whether they fit config.json ---------------------------------------------------------------------------------------


def check_fit(made: nn.Module, headers: Mapping[str, TensorHeader], name: str) -> list[str]:
    """Compare tensor names and shapes in the files with those that config.json requires, using transformers' own loader.

    transformers renames, splits and fuses weights while loading. Here it does so on the meta device, with empty tensors of the
    shapes in the headers.

    Args:
        made: model built from the config, on the meta device.
        headers: headers of all its files.
        name: name of the model, for messages.

    Returns:
        Messages about unused weights.

    Raises:
        ModelError: weights are missing, of another shape, or of more layers than config.json names.
    """
    kind: Any = type(made)
    tensors: dict[str, Tensor] = {n: torch.empty(header.shape, device="meta") for n, header in headers.items()}
    with _quiet_transformers():
        try:
            _, report = kind.from_pretrained(
                None,
                config=copy.deepcopy(made.config),
                state_dict=tensors,
                device_map={"": "meta"},
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        except RuntimeError as error:  # weights that cannot be fused because their shapes differ
            raise ModelError(
                f"{name}: its weights cannot be converted for the architecture in config.json ({kind.__name__}); config.json "
                "and weight "
                "files must come from the same model"
            ) from error
    return check_report(report, made, name)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bar and loading report; problems are reported in a single message instead."""
    shows_bars, logger = transformers_logging.is_progress_bar_enabled(), logging.getLogger("transformers")
    level = logger.level
    transformers_logging.disable_progress_bar()
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
        if shows_bars:
            transformers_logging.enable_progress_bar()


def check_report(report: Mapping[str, Any], made: nn.Module, name: str) -> list[str]:
    """Turn transformers' warnings into errors: it initialises missing weights randomly and drops unexpected ones.

    Args:
        report: transformers' `loading_info`.
        made: the loaded model, or the same model on the meta device.
        name: name of the model, for messages.

    Returns:
        Messages about unused weights.

    Raises:
        ModelError: weights are missing, of another shape, or of more layers than config.json names.
    """
    if wrong := sorted(report["mismatched_keys"]):
        weight, in_file, in_config = wrong[0]
        others = f", and {len(wrong) - 1} more differ" if len(wrong) > 1 else ""
        raise ModelError(
            f"{name}: {weight} has shape {list(in_file)} in the weight files and {list(in_config)} in config.json{others}; "
            "config.json and weight files must come from the same model"
        )
    if missing := report["missing_keys"]:
        raise ModelError(
            f"cannot load model {name}: {len(missing)} {'weight is' if len(missing) == 1 else 'weights are'} missing from its "
            f"files ({_some(missing)}); download or save it again"
        )
    unexpected = report["unexpected_keys"]
    if surplus := _surplus_layers(unexpected, made):
        raise ModelError(
            f"{name}: the weight files contain more layers than config.json describes ({_some(surplus)}); config.json and "
            "weight "
            "files must come from the same model"
        )
    if not unexpected:
        return []
    return [
        f"{len(unexpected)} weights in the model's files are not part of {type(made).__name__} and are ignored "
        f"({_some(unexpected)})"
    ]


def _some(names: Collection[str]) -> str:
    return ", ".join(sorted(names)[:3]) + (" and others" if len(names) > 3 else "")


def _surplus_layers(unexpected: Collection[str], made: nn.Module) -> list[str]:
    """Return weights of layers after the last one in config.json, except multi-token prediction layers.

    Checkpoints with multi-token prediction store its layers after the decoder layers (DeepSeek-V3,
    https://arxiv.org/abs/2412.19437, section 2.2); config.json counts them separately.
    """
    ahead = int(getattr(getattr(made, "config", None), "num_nextn_predict_layers", 0) or 0)
    lists = {name: len(module) for name, module in made.named_modules() if isinstance(module, nn.ModuleList)}

    def is_surplus(weight: str) -> bool:
        for match in re.finditer(r"\.(\d+)\.", f".{weight}"):
            prefix, index = f".{weight}"[: match.start()].lstrip("."), int(match[1])
            # Published names may lack the prefix of the base model ("layers.0" for "model.layers.0").
            sizes = [n for name, n in lists.items() if name == prefix or name.endswith(f".{prefix}")]
            if sizes and index >= max(sizes) + ahead:
                return True
        return False

    return [weight for weight in unexpected if is_surplus(weight)]
