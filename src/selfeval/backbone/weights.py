"""Find a model's weight files, check that they are complete, and check that they match config.json.

Only headers are read, so a damaged or unsuitable model is rejected immediately instead of after minutes of loading.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from selfeval.errors import ModelError
from selfeval.links import stays_inside

__all__ = ["TensorHeader", "check_fit", "check_pointers", "check_report", "is_lfs_pointer", "read_headers", "weight_files"]

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_LFS = b"version https://git-lfs"
_CONVERT = (
    "convert it: from transformers import AutoModelForCausalLM; "
    'AutoModelForCausalLM.from_pretrained("{name}", use_safetensors=False).save_pretrained("NEW_FOLDER"), '
    "copy the tokenizer files there, and pass NEW_FOLDER"
)
_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
"""Bits per element of each safetensors dtype."""


@dataclass(frozen=True)
class TensorHeader:
    """Location, dtype and shape of a tensor in a safetensors file.

    Attributes:
        file: path of the file.
        dtype: dtype name used in the file, for example BF16.
        shape: tensor shape.
        start, stop: byte range, counted from the start of the file.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


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

    single = find(_SINGLE)
    if single is not None:
        return (single,)
    index = find(_INDEX)
    if index is None:
        if Path(name).is_dir():
            raise ModelError(_no_weights(Path(name)))
        return ()
    shards = _shards(index)
    files = {shard: find(shard) for shard in shards}
    missing = [shard for shard, path in files.items() if path is None]
    if missing and (download or Path(name).is_dir()):
        some = ", ".join(missing[:3]) + (" and others" if len(missing) > 3 else "")
        raise ModelError(
            f"{name}: {len(missing)} of the {len(shards)} weight files listed in {index.name} are missing ({some}); download "
            "them"
        )
    return () if missing else tuple(path for path in files.values() if path is not None)


def _shards(index: Path) -> list[str]:
    """Return the files listed in an index, sorted."""
    if is_lfs_pointer(index):
        raise ModelError(_lfs_message([index]))
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(
            f"{index} is not an index of weight files (an object with a weight_map): {error!r}; download it again"
        ) from error
    if not names or not all(isinstance(name, str) for name in names):
        raise ModelError(f"{index} lists no weight files in its weight_map; download it again")
    if outside := next((name for name in sorted(names) if not stays_inside(name)), None):
        raise ModelError(f"{index} lists {outside!r}, which is not a file in the model folder; download it again")
    return sorted(names)


def _no_weights(folder: Path) -> str:
    """Return the error message for a folder without safetensors files, based on the files it has instead."""
    there = sorted(path.name for path in folder.iterdir() if path.is_file())
    pickles = [name for name in there if name.endswith((".bin", ".pt", ".pth", ".ckpt")) and name != "training_args.bin"]
    gguf = [name for name in there if name.endswith(".gguf")]
    others = [name for name in there if name.endswith(".safetensors")]
    if others:
        return (
            f"{folder} has {others[0]}, but no {_SINGLE} and no {_INDEX}; rename its files to the names they were published "
            "with"
        )
    if pickles:
        return (
            f"{folder} has weights only in {pickles[0]}, a pickle, which can execute code when loaded and is not supported; "
            + _CONVERT.format(name=folder)
        )
    if gguf:
        return f"{folder} has weights only in {gguf[0]}; GGUF is not supported: use the original safetensors folder"
    return f"{folder} has a config.json but no weights ({_SINGLE}); download the model's weight files into it"


# -- whether they are whole ---------------------------------------------------------------------------------------------


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is a git-lfs pointer instead of the actual content."""
    with path.open("rb") as file:
        return file.read(len(_LFS)) == _LFS


def _lfs_message(files: Sequence[Path]) -> str:
    names = ", ".join(path.name for path in files[:3]) + (" and others" if len(files) > 3 else "")
    return (
        f"{files[0].parent}: {names} {'is' if len(files) == 1 else 'are'} a git-lfs pointer, not the file itself; "
        "run `git lfs pull` in this folder"
    )


def check_pointers(folder: Path) -> None:
    """Reject a folder that was cloned without git-lfs.

    Raises:
        ModelError: some of its files are pointers.
    """
    pointers = [path for path in sorted(folder.iterdir()) if path.is_file() and is_lfs_pointer(path)]
    if pointers:
        raise ModelError(_lfs_message(pointers))


_LONGEST_HEADER = 100_000_000
"""Limit of the safetensors library."""


def read_headers(files: Sequence[Path]) -> dict[str, TensorHeader]:
    """Read name, dtype, shape and byte range of every tensor in these files.

    Raises:
        ModelError: a file is a git-lfs pointer, truncated, or not a safetensors file.
    """
    return {name: header for path in files for name, header in _read_header(path).items()}


def _read_header(path: Path) -> dict[str, TensorHeader]:
    size = path.stat().st_size
    with path.open("rb") as file:
        # A safetensors file: the header's length in 8 bytes, the header as JSON, and the data, from whose start offsets count.
        first = file.read(8)
        if _LFS.startswith(first) and len(first) == 8:
            raise ModelError(_lfs_message([path]))
        length = int.from_bytes(first, "little")
        if size < 8 or length > size - 8:
            raise ModelError(_cut_off(path, "its header extends past the end of the file"))
        if length > _LONGEST_HEADER:
            raise ModelError(
                _cut_off(path, f"its header has {length:,} bytes, more than {_LONGEST_HEADER:,}, the format's limit")
            )
        text = file.read(length)
    try:
        entries = {name: value for name, value in json.loads(text).items() if name != "__metadata__"}
        found = {name: _tensor(path, value, 8 + length) for name, value in entries.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(f"{path} is not a safetensors file (its header is damaged: {error!r}); download it again") from error
    end = max((tensor.stop for tensor in found.values()), default=8 + length)
    if end > size:
        raise ModelError(_cut_off(path, f"it has {size:,} bytes, but its header describes {end:,}"))
    if end < size:
        raise ModelError(f"{path} is damaged: {size - end:,} of its {size:,} bytes belong to no tensor; download it again")
    return found


def _cut_off(path: Path, why: str) -> str:
    return f"{path} is truncated or not a safetensors file: {why}; download or copy it again"


def _tensor(path: Path, entry: Mapping[str, Any], base: int) -> TensorHeader:
    start, stop = (int(offset) for offset in entry["data_offsets"])
    dtype, shape = str(entry["dtype"]), tuple(int(size) for size in entry["shape"])
    bits = _BITS.get(dtype)
    if not 0 <= start <= stop or min(shape, default=0) < 0:
        raise ValueError(f"data_offsets {start}, {stop} of shape {list(shape)}")
    if bits is not None and (stop - start) * 8 != math.prod(shape) * bits:
        raise ValueError(f"{stop - start} bytes for shape {list(shape)} of {dtype}")
    return TensorHeader(path, dtype, shape, base + start, base + stop)


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
