"""Files of a saved role, with content hashes that prevent loading a damaged role."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from safetensors.torch import save_file
from torch import nn

from selfeval.backbone.roles import Backbone
from selfeval.backbone.tensor_files import copy_tensors, read_tensors
from selfeval.config import LoraConfig, Pooling
from selfeval.errors import RunFolderError
from selfeval.links import stays_inside
from selfeval.store import content_hash, read_object, write_json
from selfeval.texts import shortened

__all__ = ["load_role", "pooling_of", "save_role", "seal_role"]

_SEALED = ("adapter_config.json", "adapter_model.safetensors", "head.safetensors", "rows.safetensors")


def save_role(backbone: Backbone, role: str, folder: Path) -> None:
    """Save the role in PEFT's layout, and record its base model.

    A head is saved as `head.safetensors`, rows of new tokens as `rows.safetensors`, the number of the first token in its name.

    Raises:
        RoleError: there is no such role, or it has no adapter.
    """
    config = backbone.roles.adapter_config(role)
    folder.mkdir(parents=True, exist_ok=True)
    config.base_model_name_or_path = backbone.source
    config.fan_in_fan_out = any(getattr(m, "fan_in_fan_out", False) for m in backbone.model.modules())  # PEFT notes it once
    tensors = {name: p.detach().cpu().contiguous() for name, p in _named_as_saved(backbone, role).items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    _save_adapter_config(config, folder)
    if role in backbone.roles.heads:
        head = backbone.roles.heads[role].state_dict()
        save_file({name: tensor.cpu() for name, tensor in head.items()}, folder / "head.safetensors")
    if role in backbone.roles.rows:
        rows = backbone.roles.rows[role]
        save_file(
            {f"{name}.{rows.first}": p.detach().cpu() for name, p in rows.parameters.items()}, folder / "rows.safetensors"
        )
    seal_role(backbone, role, folder)


def load_role(backbone: Backbone, role: str, folder: Path, *, trainable: bool = False) -> None:
    """Add a role that `save_role` wrote.

    Raises:
        RunFolderError: files are missing or damaged, or the role was trained on another base or with other `[backbone.lora]`
            values.
    """
    origin = _check_role(folder)
    if origin["base_fingerprint"] != backbone.fingerprint:
        raise RunFolderError(
            f"the role in {folder} was trained on {origin['base']} (weights {origin['base_fingerprint']}), not on "
            f"{backbone.base_name} (weights {backbone.fingerprint}); load it on its own base"
        )
    rank = _rank_of(origin, folder)
    _check_lora(backbone.roles.lora, rank, folder)
    layer, pooling = _layer_of(origin, backbone, folder), pooling_of(origin, folder)
    has_head = (folder / "head.safetensors").is_file()
    backbone.roles.add(role, head=has_head, trainable=trainable, layer=layer, rank=rank, pooling=pooling)
    try:
        _load_weights(backbone, role, folder)
    except RunFolderError:
        backbone.roles.remove(role)
        raise


def _load_weights(backbone: Backbone, role: str, folder: Path) -> None:
    """Fill an added role from its files.

    Raises:
        RunFolderError: a file is not a safetensors file, or its tensors are not those of the role.
    """
    path, remedy = folder / "adapter_model.safetensors", _remedy(folder)
    saved, own = read_tensors(path, remedy), _named_as_saved(backbone, role)
    # An exported classifier adapter also has the head among these tensors; it is read from head.safetensors below.
    if own.keys() != {name for name in saved if "lora_" in name}:
        raise RunFolderError(
            f"the role in {folder} adapts other layers than backbone.lora.targets = {backbone.roles.lora.targets} does; "
            "set its own targets"
        )
    copy_tensors(own, saved, path, remedy)
    if role in backbone.roles.heads:
        path = folder / "head.safetensors"
        copy_tensors(backbone.roles.heads[role].state_dict(), read_tensors(path, remedy), path, remedy)
    if (folder / "rows.safetensors").is_file():
        _load_rows(backbone, role, folder / "rows.safetensors", remedy)


def _load_rows(backbone: Backbone, role: str, path: Path, remedy: str) -> None:
    """Give a role the rows of new tokens in a file.

    Raises:
        RunFolderError: the file does not have the rows of this base.
    """
    saved = read_tensors(path, remedy)
    name = next((name for name in saved if re.fullmatch(r"rows\.input\.\d{1,9}", name)), None)
    if name is None:
        raise RunFolderError(f"{path} has no rows of new tokens; {remedy}")
    first = int(name.rpartition(".")[2])
    try:
        backbone.roles.add_rows(role, first, len(saved[name]))
    except ValueError as error:
        raise RunFolderError(f"{path} does not fit the base: {error}; {remedy}") from error
    wanted = {f"{key}.{first}": p.detach() for key, p in backbone.roles.rows[role].parameters.items()}
    copy_tensors(wanted, saved, path, remedy)


def _named_as_saved(backbone: Backbone, role: str) -> dict[str, nn.Parameter]:
    """Return the weights of the role's adapter by their names in PEFT's files."""
    return {"base_model.model." + n.replace(f".{role}.", "."): p for n, p in backbone.roles.adapter(role).items()}


def _check_lora(lora: LoraConfig, rank: int | None, folder: Path) -> None:
    """Check the LoRA settings: with a different scale the weights would still load, but scores would change.

    Args:
        lora: of the backbone.
        rank: of the role, if it is not that of the backbone.
        folder: of the role.
    """
    saved = read_object(folder / "adapter_config.json", "r", "lora_alpha", "use_rslora", remedy=_remedy(folder))
    found = {"rank": saved["r"], "alpha": saved["lora_alpha"], "rslora": saved["use_rslora"]}
    wanted = lora.model_dump(include=set(found)) | ({} if rank is None else {"rank": rank})
    if found != wanted:
        raise RunFolderError(
            f"the role in {folder} was trained with backbone.lora {found}, not with {wanted}; set its own values"
        )


def _save_adapter_config(config: Any, folder: Path) -> None:
    """Write PEFT's adapter_config.json with its lists of names in order.

    PEFT holds these names in sets, and writes them in the order of the set: another one in every process, as it depends on
    PYTHONHASHSEED.
    """
    config.save_pretrained(str(folder))
    path = folder / "adapter_config.json"
    values = read_object(path)
    unordered = [name for name in values if isinstance(getattr(config, name, None), set)]
    write_json(path, {**values, **{name: sorted(values[name]) for name in unordered}})


def seal_role(backbone: Backbone, role: str, folder: Path) -> None:
    """Record the base and the hash of each file in a role's folder; call after the last change to its files.

    The layer, the rank and the pooling of the role are recorded if they are not the last layer, the rank of the backbone, and
    the last token.

    Args:
        backbone: model that the role belongs to.
        role: name of the role.
        folder: folder of the role.
    """
    files = {name: content_hash(folder / name) for name in _SEALED if (folder / name).is_file()}
    roles = backbone.roles
    settings = {"layer": roles.depths.get(role), "rank": roles.ranks.get(role), "pooling": roles.poolings.get(role)}
    own = {name: value for name, value in settings.items() if value is not None}
    write_json(
        folder / "role.json", {"base": backbone.base_name, "base_fingerprint": backbone.fingerprint, **own, "files": files}
    )


def _layer_of(origin: Mapping[str, Any], backbone: Backbone, folder: Path) -> int | None:
    """Return the earlier layer that a saved role reads; None for the last one.

    Raises:
        RunFolderError: the base has no such layer.
    """
    layer, count = origin.get("layer"), backbone.model.config.get_text_config().num_hidden_layers
    if layer is not None and not (type(layer) is int and 1 <= layer < count):
        raise RunFolderError(
            f"{folder / 'role.json'} is damaged: layer is {shortened(repr(layer))} instead of a whole number from 1 to "
            f"{count - 1}; {_remedy(folder)}"
        )
    return layer


def _rank_of(origin: Mapping[str, Any], folder: Path) -> int | None:
    """Return the rank of a saved role; None for that of the backbone.

    Raises:
        RunFolderError: it is no rank.
    """
    rank = origin.get("rank")
    if rank is not None and not (type(rank) is int and rank >= 1):
        raise RunFolderError(
            f"{folder / 'role.json'} is damaged: rank is {shortened(repr(rank))} instead of a whole number of at least 1; "
            f"{_remedy(folder)}"
        )
    return rank


def pooling_of(origin: Mapping[str, Any], folder: Path) -> Pooling:
    """Return the pooling of a saved role, from the contents of its role.json.

    Raises:
        RunFolderError: it is no pooling.
    """
    pooling: Pooling = origin.get("pooling", "last")
    if pooling not in get_args(Pooling):
        allowed = " or ".join(f'"{name}"' for name in get_args(Pooling))
        raise RunFolderError(
            f"{folder / 'role.json'} is damaged: pooling is {shortened(repr(pooling))} instead of {allowed}; {_remedy(folder)}"
        )
    return pooling


def _remedy(folder: Path) -> str:
    return f"restore it from a backup, or remove {folder} and rerun the command that wrote it"


def _check_role(folder: Path) -> dict[str, Any]:
    """Return the contents of role.json after checking that every file of the role is unchanged.

    Raises:
        RunFolderError: a file is missing or damaged.
    """
    remedy = _remedy(folder)
    origin = read_object(folder / "role.json", "base", "base_fingerprint", "files", remedy=remedy)
    files = origin["files"] if isinstance(origin["files"], dict) else {}
    if not {"adapter_config.json", "adapter_model.safetensors"} <= files.keys():
        raise RunFolderError(f"{folder / 'role.json'} is damaged (it does not list the role's files); {remedy}")
    for name in ("head.safetensors", "rows.safetensors"):
        if (folder / name).exists() and name not in files:
            raise RunFolderError(f"{folder / name} is not among the files in role.json; {remedy}")
    for name, written in files.items():
        if not stays_inside(name):
            raise RunFolderError(f"{folder / 'role.json'} is damaged (it lists {name!r}, not a file of the role); {remedy}")
        path = folder / name
        if not path.is_file():
            raise RunFolderError(f"{path} is missing; {remedy}")
        if content_hash(path) != written:
            raise RunFolderError(f"{path} is damaged: its content does not match the hash in role.json; {remedy}")
    return origin
