from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_models
from processes import environment
from selfeval.backbone.role_files import load_role, save_role
from selfeval.backbone.roles import Backbone
from selfeval.errors import RunFolderError
from selfeval.store import content_hash, file_hash, read_json, write_json

SAVE = """
import sys
from pathlib import Path
import tiny_models
from selfeval.backbone.role_files import save_role
backbone = tiny_models.backbone()
backbone.roles.add("evaluator-0", seed=1, head=True)
save_role(backbone, "evaluator-0", Path(sys.argv[1]))
"""


@pytest.mark.slow
def test_a_saved_role_is_the_same_bytes_whatever_the_order_of_sets(tmp_path: Path) -> None:
    tests = str(Path(__file__).resolve().parents[1])
    for seed in ("1", "2"):
        env = {**environment(), "PYTHONHASHSEED": seed}
        env["PYTHONPATH"] += f":{tests}"
        subprocess.run([sys.executable, "-c", SAVE, str(tmp_path / seed)], env=env, check=True)
    found = [{p.name: file_hash(p) for p in (tmp_path / seed).iterdir()} for seed in ("1", "2")]
    assert found[0] == found[1]
    targets = json.loads((tmp_path / "1" / "adapter_config.json").read_text())["target_modules"]
    assert len(targets) > 3
    assert targets == sorted(targets)


def test_content_is_what_counts_and_not_the_order_in_which_it_was_written(tmp_path: Path) -> None:
    one, other = tmp_path / "one.json", tmp_path / "other.json"
    one.write_text('{"a": 1, "b": [2, 3]}')
    other.write_text('{\n  "b": [2, 3],\n  "a": 1\n}')
    assert content_hash(one) == content_hash(other)
    assert file_hash(one) != file_hash(other)
    other.write_text('{"a": 1, "b": [3, 2]}')
    assert content_hash(one) != content_hash(other)


def _with_header(path: Path, header: bytes, data: bytes) -> None:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def test_the_order_of_metadata_in_a_safetensors_file_does_not_count_and_its_numbers_do(tmp_path: Path) -> None:
    one, other = tmp_path / "one.safetensors", tmp_path / "other.safetensors"
    tensor = '"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
    _with_header(one, f'{{"__metadata__": {{"a": "1", "b": "2"}}, {tensor}}}'.encode(), b"\0\0\x80\x3f")
    _with_header(other, f'{{{tensor}, "__metadata__": {{"b": "2", "a": "1"}}}}   '.encode(), b"\0\0\x80\x3f")
    assert load_file(one)["w"].item() == load_file(other)["w"].item() == 1.0
    assert content_hash(one) == content_hash(other)
    _with_header(other, f'{{{tensor}, "__metadata__": {{"b": "2", "a": "1"}}}}   '.encode(), b"\0\0\x80\x3e")
    assert content_hash(one) != content_hash(other)


def saved_role(folder: Path) -> Backbone:
    backbone = tiny_models.backbone()
    backbone.roles.add("evaluator-0", seed=1, head=True)
    tiny_models.scramble(backbone, "evaluator-0")
    save_role(backbone, "evaluator-0", folder)
    return backbone


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-2] ^= 64
    path.write_bytes(bytes(data))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty_list(path: Path) -> None:
    path.write_text("[]")


@pytest.mark.parametrize("how", [flip, cut, empty_list, Path.unlink])
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "head.safetensors", "adapter_config.json", "role.json"])
def test_a_damaged_role_is_never_loaded(tmp_path: Path, name: str, how: Callable[[Path], None]) -> None:
    saved_role(tmp_path / "role")
    how(tmp_path / "role" / name)
    fresh = tiny_models.backbone()
    with pytest.raises(RunFolderError, match=rf"{name} is (damaged|missing)"):
        load_role(fresh, "evaluator-0", tmp_path / "role")
    assert fresh.roles.names == ()


def test_one_flipped_bit_of_a_weight_is_noticed(tmp_path: Path) -> None:
    saved_role(tmp_path / "role")
    path = tmp_path / "role" / "head.safetensors"
    weights = load_file(path)
    weights["weight"][0, 3] *= 2
    save_file(weights, path)
    with pytest.raises(RunFolderError, match=r"head\.safetensors is damaged"):
        load_role(tiny_models.backbone(), "evaluator-0", tmp_path / "role")


# -- forged roles: the hashes match ---------------------------------------------------------------------------------------


class Command:
    """An object whose pickle creates the file `executed` when it is loaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.folder / "executed"),)


def with_other_shapes(path: Path) -> bytes:
    """One column of each weight: `Tensor.copy_` would repeat it."""
    save_file({name: tensor[..., :1].clone() for name, tensor in load_file(path).items()}, path)
    return path.read_bytes()


FORGED: dict[str, Callable[[Path], bytes]] = {
    "a pickle": lambda path: pickle.dumps(Command(path.parent)),
    "a pickle of torch": lambda path: torch.save({"weight": Command(path.parent)}, path) or path.read_bytes(),  # type: ignore[func-returns-value]
    "a header of a terabyte": lambda path: (1 << 40).to_bytes(8, "little") + b"{}",
    "a header of 100 MiB": lambda path: (100 << 20).to_bytes(8, "little") + b" " * 64,
    "nothing": lambda path: b"",
    "no tensors": lambda path: (2).to_bytes(8, "little") + b"{}",
    "other shapes": with_other_shapes,
}


def forge(role: Path, name: str, data: bytes) -> None:
    """Replace a file of a role, with its hash in role.json."""
    (role / name).write_bytes(data)
    origin = read_json(role / "role.json")
    origin["files"][name] = content_hash(role / name)
    write_json(role / "role.json", origin)


@pytest.mark.parametrize("kind", FORGED)
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "head.safetensors"])
def test_forged_weights_are_refused_and_execute_nothing(tmp_path: Path, name: str, kind: str) -> None:
    role, fresh = tmp_path / "role", tiny_models.backbone()
    saved_role(role)
    forge(role, name, FORGED[kind](role / name))
    with pytest.raises(RunFolderError, match=rf"{name} is damaged .*remove|adapts other layers"):
        load_role(fresh, "evaluator-0", role)
    assert not (role / "executed").exists()
    assert fresh.roles.names == ()


def test_a_forged_adapter_config_is_refused(tmp_path: Path) -> None:
    saved_role(tmp_path / "role")
    forge(tmp_path / "role", "adapter_config.json", b"{}")
    with pytest.raises(RunFolderError, match=r"adapter_config\.json is damaged \(it has no r"):
        load_role(tiny_models.backbone(), "evaluator-0", tmp_path / "role")


@pytest.mark.parametrize("name", ["../notes.txt", "/etc/hostname"])
def test_a_role_names_no_file_outside_of_its_folder(tmp_path: Path, name: str) -> None:
    saved_role(tmp_path / "role")
    (tmp_path / "notes.txt").write_text("mine")
    origin = read_json(tmp_path / "role" / "role.json")
    write_json(tmp_path / "role" / "role.json", {**origin, "files": {**origin["files"], name: "0" * 64}})
    with pytest.raises(RunFolderError, match=rf"role\.json is damaged \(it lists '{name}', not a file of the role"):
        load_role(tiny_models.backbone(), "evaluator-0", tmp_path / "role")
