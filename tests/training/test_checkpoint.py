from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import AdamW

import tiny_models
from policies import CONFIG, changed, four_roles, train
from selfeval.backbone.roles import Backbone
from selfeval.errors import LostWorkError, RunFolderError, StorageError
from selfeval.store import file_hash, read_json, write_sealed
from selfeval.training import checkpoint
from selfeval.training.checkpoint import Checkpoints, role_optimizer
from slow import slow

ROLES = ("policy", "critic")
Training = tuple[Backbone, dict[str, AdamW], Checkpoints]


def training(folder: Path, seed: int = 0) -> Training:
    backbone = tiny_models.backbone()
    backbone.roles.add("policy", seed=seed)
    backbone.roles.add("critic", seed=seed + 1, head=True)
    optimizers = {role: role_optimizer(backbone.roles.parameters(role), 0.01) for role in ROLES}
    return backbone, optimizers, Checkpoints(folder, backbone, ROLES, optimizers)


def steps(made: Training, first: int, last: int) -> None:
    """Run steps first..last; a step depends only on its number."""
    backbone, optimizers, _ = made
    for step in range(first, last + 1):
        ids = torch.randint(2, 40, (3, 5), generator=torch.Generator().manual_seed(step))
        for role in ROLES:
            with backbone.acting_as(role):
                hidden = backbone.hidden(ids, torch.ones_like(ids))
                loss = (
                    backbone.score(role, hidden).sub(step).square().mean()
                    if role == "critic"
                    else backbone.logits(hidden)[..., 3].mean()
                )
            loss.backward()
            optimizers[role].step()
            optimizers[role].zero_grad(set_to_none=True)


def everything(made: Training) -> dict[str, Tensor]:
    backbone, optimizers, _ = made
    found = {}
    for role in ROLES:
        for name, parameter in backbone.roles.parameters(role).items():
            found[f"{role}/{name}"] = parameter.detach().clone()
            for key, value in optimizers[role].state[parameter].items():
                found[f"{role}/{name}/{key}"] = torch.as_tensor(value).clone()
    return found


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(v.dtype == other[k].dtype and torch.equal(v, other[k]) for k, v in one.items())


def test_training_that_was_resumed_equals_training_that_was_not_bit_for_bit(tmp_path: Path) -> None:
    through = training(tmp_path / "a")
    steps(through, 1, 6)
    half = training(tmp_path / "b")
    steps(half, 1, 3)
    at_three = everything(half)
    half[2].save(3, {"coefficient": 0.1, "nested": {"mean": 1e-17}})
    steps(half, 4, 5)  # lost: the process is killed here
    resumed = training(tmp_path / "b", seed=50)
    assert resumed[2].restore() == {"step": 3, "coefficient": 0.1, "nested": {"mean": 1e-17}}
    assert same(everything(resumed), at_three)
    steps(resumed, 4, 6)
    assert same(everything(resumed), everything(through))
    assert not same(everything(through), at_three)


def test_optimizer_state_matters_to_that(tmp_path: Path) -> None:
    through = training(tmp_path / "a")
    steps(through, 1, 3)
    through[2].save(3, {})
    without = training(tmp_path / "a")
    Checkpoints(tmp_path / "a", without[0], ROLES, {}).restore()  # weights, but no moments
    for each in (through, without):
        steps(each, 4, 4)
    assert not same(everything(through), everything(without))


def test_nothing_to_restore() -> None:
    assert training(Path("no such folder"))[2].restore() is None


def test_the_newest_two_checkpoints_are_kept_and_nothing_is_pickled(tmp_path: Path) -> None:
    made = training(tmp_path)
    for step in (5, 10, 15):
        steps(made, step, step)
        made[2].save(step, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000010", "step-000015"]
    assert sorted(p.name for p in (tmp_path / "step-000015").iterdir()) == ["manifest.json", "state.json", "state.safetensors"]


def test_a_checkpoint_before_the_first_step_has_no_moments_yet(tmp_path: Path) -> None:
    made = training(tmp_path)
    made[2].save(0, {})
    fresh = training(tmp_path, seed=9)
    assert fresh[2].restore() == {"step": 0}
    assert same(everything(fresh), everything(made))


def _no_space() -> OSError:
    return OSError(28, "No space left on device")


@pytest.mark.parametrize("part", ["save_file", "write_json"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, _no_space])
def test_an_interrupted_write_leaves_the_former_checkpoint(
    tmp_path: Path, part: str, error: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = training(tmp_path)
    steps(made, 1, 2)
    made[2].save(2, {"mark": "former"})
    before = everything(made)
    steps(made, 3, 4)

    def write(value: Any, path: Path, **_: Any) -> None:
        Path(path if isinstance(path, Path) else value).write_text("half of i")
        raise error()

    monkeypatch.setattr(checkpoint, part, write)
    expected = StorageError if error is _no_space else error
    with pytest.raises(expected):
        made[2].save(4, {"mark": "newer"})
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["step-000002"]
    fresh = training(tmp_path, seed=9)
    assert fresh[2].restore() == {"step": 2, "mark": "former"}
    assert same(everything(fresh), before)


@pytest.mark.parametrize("late", [False, True])
def test_a_process_that_may_not_write_any_more_leaves_the_checkpoints_unchanged(tmp_path: Path, late: bool) -> None:
    """`late`: it lost the right while it wrote the files."""
    calls = list[int]()

    def check() -> None:
        calls.append(len(list(tmp_path.glob(".step-*"))))
        if calls[-1] == late:
            raise RunFolderError("another worker writes here")

    backbone, optimizers, keeper = training(tmp_path)
    keeper.save(1, {})
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RunFolderError, match="another worker"):
        Checkpoints(tmp_path, backbone, ROLES, optimizers, check=check).save(2, {})
    assert sorted(tmp_path.rglob("*")) == before
    assert calls == ([0, 1] if late else [0])


def test_an_older_checkpoint_that_was_not_yet_removed_does_not_count(tmp_path: Path) -> None:
    made = training(tmp_path)
    steps(made, 1, 1)
    made[2].save(1, {})
    (tmp_path / "step-000001").rename(tmp_path / "aside")
    steps(made, 2, 2)
    made[2].save(2, {})
    (tmp_path / "aside").rename(tmp_path / "step-000001")
    fresh = training(tmp_path, seed=9)
    assert fresh[2].restore() == {"step": 2}
    assert same(everything(fresh), everything(made))


# -- damage -------------------------------------------------------------------------------------------------------------


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(bytes(data))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty_object(path: Path) -> None:
    path.write_text("{}")


DAMAGE = [
    (file, how)
    for file in ("state.safetensors", "state.json", "manifest.json", "metrics/policy.jsonl")
    for how in (flip_a_bit, cut, empty_object, Path.unlink)
]


def with_metrics(folder: Path, seed: int = 0) -> Training:
    backbone, optimizers, _ = training(folder, seed)
    folder.mkdir(exist_ok=True)
    keeper = Checkpoints(folder / "checkpoints", backbone, ROLES, optimizers, metrics=[folder / "policy.jsonl"])
    return backbone, optimizers, keeper


def logged_steps(made: Training, folder: Path, first: int, last: int) -> None:
    for step in range(first, last + 1):
        steps(made, step, step)
        with (folder / "policy.jsonl").open("a") as file:
            file.write(f'{{"step": {step}}}\n')


@pytest.mark.parametrize(("file", "how"), DAMAGE, ids=lambda part: getattr(part, "__name__", part))
def test_a_damaged_checkpoint_is_passed_over_with_a_message_and_training_ends_with_the_same_bits(
    tmp_path: Path, file: str, how: Callable[[Path], None]
) -> None:
    through = with_metrics(tmp_path / "a")
    logged_steps(through, tmp_path / "a", 1, 6)
    killed = with_metrics(tmp_path / "b")
    for step in (2, 4):
        logged_steps(killed, tmp_path / "b", step - 1, step)
        killed[2].save(step, {"mark": step})
    logged_steps(killed, tmp_path / "b", 5, 5)
    how(tmp_path / "b" / "checkpoints" / "step-000004" / file)
    resumed, said = with_metrics(tmp_path / "b", seed=50), []
    resumed[0].budget.notify = said.append
    assert resumed[2].restore() == {"step": 2, "mark": 2}
    assert len(said) == 1
    assert said[0].startswith("checkpoint step-000004 is damaged (")
    assert said[0].endswith("resuming from the previous checkpoint, step-000002")
    logged_steps(resumed, tmp_path / "b", 3, 6)
    assert same(everything(resumed), everything(through))
    assert (tmp_path / "b" / "policy.jsonl").read_bytes() == (tmp_path / "a" / "policy.jsonl").read_bytes()


def test_a_damaged_checkpoint_does_not_take_the_place_of_a_good_one(tmp_path: Path) -> None:
    made = training(tmp_path)
    for step in (2, 4):
        made[2].save(step, {})
    cut(tmp_path / "step-000004" / "state.json")
    resumed = training(tmp_path)
    resumed[2].restore()
    resumed[2].save(3, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000002", "step-000003"]


def test_metrics_that_were_changed_after_the_checkpoint_are_put_right(tmp_path: Path) -> None:
    made = with_metrics(tmp_path)
    logged_steps(made, tmp_path, 1, 2)
    made[2].save(2, {})
    (tmp_path / "policy.jsonl").write_text('{"step": 1, "reward": 1e9}\n')
    with_metrics(tmp_path)[2].restore()
    assert (tmp_path / "policy.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


def test_when_no_checkpoint_can_be_used_the_remedy_of_the_message_works(tmp_path: Path) -> None:
    made = training(tmp_path / "checkpoints")
    for step in (1, 2):
        made[2].save(step, {})
        flip_a_bit(tmp_path / "checkpoints" / f"step-{step:06d}" / "state.safetensors")
    with pytest.raises(LostWorkError, match=r"no checkpoint .* can be used: checkpoint step-000002 is damaged") as caught:
        made[2].restore()
    folder = re.search(r"remove (\S+), or", str(caught.value))
    assert folder
    shutil.rmtree(folder.group(1))
    assert made[2].restore() is None


@pytest.mark.parametrize(("how", "problem"), [(Path.unlink, "is missing"), (flip_a_bit, "does not match its recorded hash")])
def test_a_lost_file_of_the_training_is_noticed_when_it_resumes(
    tmp_path: Path, how: Callable[[Path], None], problem: str
) -> None:
    backbone, optimizers, _ = training(tmp_path)
    shards = [tmp_path / f"shard-{number}.jsonl" for number in (1, 2, 3)]
    for shard in shards:
        shard.write_text(f"{{}}  {shard.name}\n")
    keeper = Checkpoints(tmp_path / "c", backbone, ROLES, optimizers, written=lambda step: shards[:step])
    keeper.save(2, {})
    how(shards[2])  # later than the checkpoint: it is written again
    assert keeper.restore() == {"step": 2}
    how(shards[0])
    with pytest.raises(LostWorkError, match=rf"shard-1\.jsonl, which this training wrote before it stopped, {problem}"):
        keeper.restore()


def _flip_a_digit_of_a_hash(path: Path, name: str) -> None:
    manifest = json.loads(path.read_text())
    written = manifest["written"][name]
    manifest["written"][name] = ("1" if written[0] == "0" else "0") + written[1:]
    path.write_text(json.dumps(manifest))


def _set(path: Path, written: Any, *, seals: bool) -> None:
    manifest = {**json.loads(path.read_text()), "written": written}
    write_sealed(path, manifest) if seals else path.write_text(json.dumps(manifest))


WRONG_MANIFESTS = [
    lambda path: _flip_a_digit_of_a_hash(path, "shard-1.jsonl"),
    partial(_set, written={}, seals=False),
    *(partial(_set, written=value, seals=seals) for value in ([], None, 5, {"shard-1.jsonl": 1}) for seals in (False, True)),
]


@pytest.mark.parametrize("change", WRONG_MANIFESTS)
def test_a_manifest_that_was_changed_costs_the_checkpoint_and_blames_no_other_file(
    tmp_path: Path, change: Callable[[Path], None]
) -> None:
    backbone, optimizers, _ = training(tmp_path)
    shards = [tmp_path / f"shard-{number}.jsonl" for number in (1, 2)]
    for shard in shards:
        shard.write_text("{}\n")
    keeper = Checkpoints(tmp_path / "c", backbone, ROLES, optimizers, written=lambda step: shards[:step])
    for step in (1, 2):
        keeper.save(step, {})
    change(tmp_path / "c" / "step-000002" / "manifest.json")
    said: list[str] = []
    backbone.budget.notify = said.append
    assert keeper.restore() == {"step": 1}
    assert said == [
        "checkpoint step-000002 is damaged (its manifest.json is damaged); resuming from the previous checkpoint, step-000001"
    ]


def _one_column(path: Path) -> None:
    save_file({name: tensor[..., :1].clone() if tensor.dim() else tensor for name, tensor in load_file(path).items()}, path)


FORGED: list[tuple[str, Callable[[Path], Any]]] = [
    ("state.safetensors", lambda path: path.write_bytes(b"\x80\x04cposix\nsystem\n")),
    ("state.safetensors", lambda path: path.write_bytes((2).to_bytes(8, "little") + b"{}")),
    ("state.safetensors", _one_column),
    ("state.json", lambda path: path.write_text("{}")),
    ("state.json", lambda path: path.write_text("[]")),
]


@pytest.mark.parametrize(("name", "forge"), FORGED)
def test_a_forged_checkpoint_with_matching_hashes_is_refused(tmp_path: Path, name: str, forge: Callable[[Path], Any]) -> None:
    made = training(tmp_path)
    steps(made, 1, 1)
    made[2].save(1, {})
    step, before = tmp_path / "step-000001", everything(made)
    forge(step / name)
    manifest = read_json(step / "manifest.json")
    write_sealed(step / "manifest.json", {**manifest, "files": {**manifest["files"], name: file_hash(step / name)}})
    with pytest.raises(RunFolderError, match=rf"{re.escape(name)} is damaged .*remove .*step-000001, or rerun"):
        made[2].restore()
    assert same(everything(made), before)


class _Killed(Exception):
    pass


@pytest.mark.parametrize("learner", ["ppo", slow("ilql")])
def test_a_policy_whose_newest_checkpoint_lost_a_bit_ends_where_an_undisturbed_one_does(
    tmp_path: Path, learner: str, one_thread: None
) -> None:
    few = {"questions_per_iteration": 3, "replies_per_question": 4, "minibatch": 6, "epochs": 1}
    config = changed(CONFIG, **{"learner": learner, "iterations": 5, "checkpoint_every": 2, **few})
    through = four_roles()
    train(through, tmp_path / "through", config)

    def killed(iteration: int, *_: object) -> None:
        if iteration == 5:
            raise _Killed

    with pytest.raises(_Killed):
        train(four_roles(), tmp_path / "killed", config, keep=killed)
    flip_a_bit(tmp_path / "killed" / "step-000004" / "state.safetensors")
    resumed, said = four_roles(), []
    resumed.budget.notify = said.append
    train(resumed, tmp_path / "killed", config)
    assert any("checkpoint step-000004 is damaged" in sentence for sentence in said)
    for role in resumed.roles.names:
        for name, parameter in resumed.roles.parameters(role).items():
            assert torch.equal(parameter, through.roles.parameters(role)[name]), name
