"""A copy of a model folder with a larger vocabulary: tokenizer, rows of the embedding and of the output layer, config.json.

A new row is the mean of the rows of the token's old pieces, so the model begins with a guess instead of noise (Hewitt 2021,
https://nlp.stanford.edu/~johnhew/vocab-expansion.html). All other weights are copied from the files, in the precision that they
are stored in, whatever precision the base is loaded in.

Many models have more rows than tokens. New tokens take these free rows first. Only if there are too few does the model grow, to
the same multiple of a power of two as before; rows that are left over get the mean of all rows, which makes them unlikely.

Shapes: V rows, D width.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn
from transformers import AutoTokenizer

from selfeval.backbone.check import ModelParts, read_parts
from selfeval.backbone.snapshot import model_folder
from selfeval.backbone.vocabulary.tokenizer import BpeTokenizer, NewToken, expanded
from selfeval.backbone.vocabulary.weight_rows import DTYPES, Growth, grow_file
from selfeval.backbone.weight_headers import INDEX, TensorHeader, read_headers
from selfeval.errors import ModelError
from selfeval.store import read_object, write_json

__all__ = ["check_extendable", "first_new_id", "write_extended"]

_LARGEST_MULTIPLE = 128
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ot")
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json", "special_tokens_map.json")
_TOKENIZER_ENDINGS = (".model", ".tiktoken")
_LANGUAGE = re.compile(r"text|language|llm|^lm|thinker|^decoder|generator")
_OTHER = re.compile(r"vision|visual|image|video|audio|speech|codec|talker|depth")
"""Names of sections of a config that describe a language model, and words in names of other sections."""
_REMEDY = "use the files that the model was published with"


def check_extendable(parts: ModelParts, name: str) -> None:
    """Refuse a model whose vocabulary cannot be extended, without reading a weight.

    Args:
        parts: the model without its weights.
        name: its name in messages.

    Raises:
        ModelError: its tokenizer is no BPE tokenizer of the library tokenizers, or the number of its tokens decides the shape
            of other weights than the embedding and the output layer.
    """
    BpeTokenizer(parts.tokenizer, name)
    rows, names = _rows_of(parts), _vocabulary_names(parts)
    tensors = [*parts.shell.named_parameters(remove_duplicate=False), *parts.shell.named_buffers()]
    # A hidden layer may have as many rows by chance. Gemma 3n's embedding per layer has fewer rows than the input embedding.
    others = [
        other
        for other, tensor in tensors
        if other not in names
        and ("per_layer" in other or tensor.shape[:1] == (rows,))
        and any(word in other for word in ("embed", "vocab", "logits"))
    ]
    if others:
        raise ModelError(
            f"{name} has further weights with one row per token ({', '.join(sorted(others)[:3])}), for which new tokens have "
            "no values; use another model, or tune without --extend-vocabulary"
        )


def first_new_id(parts: ModelParts, tokenizer: BpeTokenizer) -> int:
    """Return the first id above all tokens, those that only the config names included."""
    return max([tokenizer.first_free, *(index + 1 for index in _token_ids(parts.config.to_dict()))])


def write_extended(
    parts: ModelParts, name: str, tokens: Sequence[NewToken], first: int, target: Path, *, trust_remote_code: bool = False
) -> int:
    """Write the model with new tokens to a folder.

    Args:
        parts: the model without its weights.
        name: model folder or hub id.
        tokens: the new tokens.
        first: id of the first one.
        target: an empty folder.
        trust_remote_code: run code that comes with the model. Default: False.

    Returns:
        The number of rows of the embedding.

    Raises:
        ModelError: the embedding is quantised or not in the files, or the written folder does not read as intended.
    """
    source = model_folder(name)
    if source is None:
        raise ModelError(f"model {name} is neither a local folder nor in the Hub cache; download it first")
    _copy_other_files(source, target)
    _write_tokenizer(parts, name, tokens, first, target, trust_remote_code)
    before = _rows_of(parts)
    growth = Growth(before, _rows_after(before, first + len(tokens)), first, tuple(token.pieces for token in tokens))
    _write_weights(parts, name, growth, target)
    _write_config(target / "config.json", before, growth.after, name)
    # Weights, config and tokenizer fit together, by the checks of every model that is loaded.
    read_parts(str(target), trust_remote_code=trust_remote_code)
    return growth.after


# -- weights --------------------------------------------------------------------------------------------------------------


def _rows_after(before: int, needed: int) -> int:
    if needed <= before:
        return before
    # The largest power of two that divides the size: hardware is faster with it, and the makers may have padded for that.
    multiple = min(before & -before, _LARGEST_MULTIPLE)
    return -(-needed // multiple) * multiple


def _write_weights(parts: ModelParts, name: str, growth: Growth, target: Path) -> None:
    """Write the weight files; those without a vocabulary tensor are copied."""
    wanted, found, grown_bytes = _vocabulary_names(parts), set[str](), 0
    for path in parts.files:
        headers = read_headers([path])
        matches = {key: full for key in headers if (full := _match(key, wanted)) is not None}
        if not matches:
            shutil.copyfile(path, target / path.name)
            continue
        for key in matches:
            _check_tensor(headers[key], growth.before, key, name)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        grown_bytes += grow_file(path, target / path.name, headers, metadata, matches, growth)
        found.update(matches.values())
    embedding = next(iter(wanted))
    if embedding not in found:
        raise ModelError(f"{name}: no weight file has {embedding}, so the vocabulary cannot be extended; {_REMEDY}")
    if (index := target / INDEX).is_file():
        values = read_object(index, "weight_map", remedy=_REMEDY)
        total = values.get("metadata", {}).get("total_size")
        sizes = {} if total is None else {"metadata": {**values["metadata"], "total_size": total + grown_bytes}}
        write_json(index, values | sizes)


def _vocabulary_names(parts: ModelParts) -> dict[str, None]:
    """Return the names of the tensors with a row per token: the input embedding, then weight and bias of the output layer."""
    shell: Any = parts.shell
    modules = [shell.get_input_embeddings(), shell.get_output_embeddings()]
    paths = {id(module): path for path, module in shell.named_modules()}
    found = [
        f"{paths[id(module)]}.{leaf}"
        for module in modules
        if isinstance(module, nn.Module)
        for leaf, parameter in module._parameters.items()
        if parameter is not None
    ]
    return dict.fromkeys(found)


def _match(key: str, wanted: Mapping[str, None]) -> str | None:
    """Return the weight that a tensor of a file is; some files leave out the prefix of the whole model (GPT-2)."""
    return next((full for full in wanted if key == full or full.endswith(f".{key}")), None)


def _check_tensor(header: TensorHeader, rows: int, key: str, name: str) -> None:
    if header.dtype not in DTYPES or header.shape[:1] != (rows,):
        raise ModelError(
            f"{name}: {key} is stored as {header.dtype} of shape {list(header.shape)} instead of plain numbers with {rows:,} "
            "rows, so it is quantised or packed and cannot get new rows; use the unquantised model"
        )


def _rows_of(parts: ModelParts) -> int:
    shell: Any = parts.shell
    return int(shell.get_input_embeddings().weight.shape[0])


# -- config and tokenizer -------------------------------------------------------------------------------------------------


def _copy_other_files(source: Path, target: Path) -> None:
    """Copy everything but weights and the tokenizer: config, generation config, chat template, model card, templates, code."""
    for path in source.iterdir():
        is_tokenizer = path.name in _TOKENIZER_FILES or path.suffix in _TOKENIZER_ENDINGS
        if path.is_dir() and path.name in ("templates", "additional_chat_templates"):
            shutil.copytree(path, target / path.name)
        elif path.is_file() and not is_tokenizer and path.suffix not in _WEIGHTS:
            shutil.copyfile(path, target / path.name)


def _write_config(path: Path, before: int, after: int, name: str) -> None:
    """Set the size of the vocabulary in config.json, in every section of the language model that has it."""
    if before == after:
        return
    values = read_object(path, remedy=_REMEDY)
    found = [section for section in _language_sections(values) if section.get("vocab_size") == before]
    if not found:
        raise ModelError(f"config.json of {name} does not give the {before:,} rows as vocab_size; {_REMEDY}")
    for section in found:
        section["vocab_size"] = after
    write_json(path, values)


def _language_sections(values: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the config and its sections about a language model, at any depth (Qwen2.5-Omni: thinker_config.text_config).

    Sections of other models may have a vocabulary of the same size by chance, such as that of image or audio tokens.
    """
    yield values
    for key, value in values.items():
        if isinstance(value, dict) and _LANGUAGE.search(key) and not _OTHER.search(key):
            yield from _language_sections(value)


def _write_tokenizer(
    parts: ModelParts, name: str, tokens: Sequence[NewToken], first: int, target: Path, trust_remote_code: bool
) -> None:
    """Write the extended tokenizer and check that transformers reads it as intended."""
    base = BpeTokenizer(parts.tokenizer, name)
    values = base.extended(tokens, first)
    parts.tokenizer.save_pretrained(target)
    (target / "tokenizer.json").write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
    read: Any = AutoTokenizer.from_pretrained(target, trust_remote_code=trust_remote_code)
    pieces = {first + number: token.pieces for number, token in enumerate(tokens)}
    probe = _probe(parts.tokenizer, [token.text for token in tokens])
    old = parts.tokenizer.encode(probe, add_special_tokens=False)
    new = read.encode(probe, add_special_tokens=False)
    special = (read.all_special_ids, read.chat_template) == (parts.tokenizer.all_special_ids, parts.tokenizer.chat_template)
    unknown = [token.text for token in tokens if read.convert_tokens_to_ids(token.text) not in pieces]
    if expanded(new, pieces) != old or not special or unknown:
        raise ModelError(
            f"transformers does not read the extended tokenizer of {name} ({type(read).__name__}) as it was written, so the "
            "vocabulary of this model cannot be extended; tune without --extend-vocabulary"
        )


def _probe(tokenizer: Any, tokens: Sequence[str]) -> str:
    """Return a text with the new tokens, other scripts and all special tokens."""
    words = str(tokenizer.convert_tokens_to_string(list(tokens[:2000])))
    return f"Tom's 12 apples, 3.5 km\n\n  é ß 你好 😀 {' '.join(tokenizer.all_special_tokens)} {words}"


def _token_ids(values: Any) -> list[int]:
    """Return the ids of all tokens that a config names, at any depth: a model may reserve rows that its tokenizer does not."""
    if not isinstance(values, dict):
        return []
    found: list[int] = []
    for key, value in values.items():
        if str(key).endswith(("token_id", "token_ids", "token_index")):
            given = value if isinstance(value, list) else [value]
            found += [each for each in given if type(each) is int]
        found += _token_ids(value)
    return found
