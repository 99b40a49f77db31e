"""Base weights on disk, on the CPU: every result must equal that with all weights in memory."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import OffloadedWeightsLoader
from pydantic import ByteSize
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

import tiny_models
from selfeval.backbone.adapters import BASE
from selfeval.backbone.load import LoadedModel, load_model
from selfeval.backbone.placement import DISK, meta_model, plan_placement
from selfeval.backbone.role_files import load_role, save_role
from selfeval.backbone.roles import Backbone
from selfeval.backbone.sequences import final_scores, pad_sequences
from selfeval.config import LoraConfig, PlacementConfig
from selfeval.errors import ModelError, RoleError
from selfeval.prompt import Prompt
from selfeval.rollout.beams import beam_search
from selfeval.rollout.engine import generate
from selfeval.rollout.requests import Request
from token_prompts import as_prompts

IDS = torch.tensor([[5, 9, 2, 17, 30], [7, 7, 3, 21, 4]])
ONES = torch.ones_like(IDS)
LAYERS = 3


def depth(family: str, layers: int) -> dict[str, int]:
    return {"n_layer" if family == "gpt2" else "num_hidden_layers": layers}


def folder(tmp_path: Path, family: str, layers: int = LAYERS, **changes: Any) -> Path:
    made = tiny_models.model(family, 384, **depth(family, layers), **changes)
    return tiny_models.save_model(made, tiny_models.words_tokenizer(), tmp_path / "model")


def limits(model: Path, resident: int) -> PlacementConfig:
    """Return memory for this many layers, the rest of the model, and the one layer that a pass loads."""
    whole = load_model(str(model), device="cpu").model
    plan = plan_placement(meta_model(whole.config), {"cpu": 1 << 40}, "fp32")
    none = plan_placement(meta_model(whole.config), {"cpu": plan.bytes["cpu"] - 1, DISK: 1 << 40}, "fp32")
    layer = none.bytes[DISK] // none.devices.count(DISK)
    fixed = plan.bytes["cpu"] - layer * len(plan.layers)
    return PlacementConfig(max_memory={"cpu": ByteSize(fixed + (resident + 1) * layer)})


def load(model: Path, placement: PlacementConfig | None = None, **options: Any) -> LoadedModel:
    return load_model(str(model), device="cpu", placement=placement, **options)


def both(tmp_path: Path, family: str = "llama", resident: int = 1) -> tuple[Backbone, Backbone]:
    """The same model whole, and with all but `resident` layers on disk; with the same roles."""
    model = folder(tmp_path, family)
    found = []
    for placement in (None, limits(model, resident)):
        backbone = Backbone(load(model, placement), LoraConfig(rank=4, alpha=8.0), "tiny")
        backbone.roles.add("policy", seed=3, head=True)
        backbone.roles.add("other", seed=4)
        tiny_models.scramble(backbone, "other")
        found.append(backbone)
    assert found[0].loaded.placement is not None
    assert found[0].loaded.placement.is_whole
    assert found[1].loaded.placement is not None
    assert found[1].loaded.placement.devices == ("cpu",) * resident + (DISK,) * (LAYERS - resident)
    return found[0], found[1]


def loss(backbone: Backbone, role: str = "policy") -> Tensor:
    hidden = backbone.hidden(IDS, ONES)
    scores = backbone.score(role, hidden).sum() if role in backbone.roles.heads else 0.0
    return scores - torch.log_softmax(backbone.logits(hidden), -1)[..., 3].sum()


def gradients(backbone: Backbone, role: str) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in backbone.roles.parameters(role).items() if p.grad is not None}
    assert found.keys() == backbone.roles.parameters(role).keys()
    return found


def close_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], relative: float = 1e-5) -> None:
    for name, gradient in found.items():
        close(gradient, expected[name], relative * float(expected[name].abs().max()) + 0.1 * relative)


def absent(backbone: Backbone) -> set[str]:
    return {name for name, p in backbone.model.named_parameters() if p.device.type == "meta"}


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


# -- the same numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_the_forward_is_that_of_the_whole_model(family: str, tmp_path: Path) -> None:
    whole, placed = both(tmp_path, family)
    streamed = absent(placed)
    assert len(streamed) > 8
    assert not absent(whole)
    for role in (BASE, "policy", "other"):
        results = []
        for each in (whole, placed):
            with torch.no_grad(), each.acting_as(role):
                results.append((each.model(input_ids=IDS).logits, each.logits(each.hidden(IDS, ONES))))
        for found, expected in zip(results[1], results[0], strict=True):
            close(found, expected)
    assert absent(placed) == streamed


@pytest.mark.parametrize("resident", [0, 1])
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_adapters_are_real_and_learn_the_same(family: str, resident: int, tmp_path: Path) -> None:
    whole, placed = both(tmp_path, family, resident)
    assert {p.device.type for role in placed.roles.names for p in placed.roles.parameters(role).values()} == {"cpu"}
    for name, parameter in placed.roles.parameters("policy").items():  # the seed draws the same adapter
        assert torch.equal(parameter, whole.roles.parameters("policy")[name])
    streamed = absent(placed)
    optimizers = [torch.optim.AdamW(list(each.roles.parameters("policy").values()), lr=0.05) for each in (whole, placed)]
    for _ in range(2):
        for each, optimizer in zip((whole, placed), optimizers, strict=True):
            optimizer.zero_grad()
            with each.acting_as("policy"):
                loss(each).backward()
        found = gradients(placed, "policy")
        close_gradients(found, gradients(whole, "policy"))
        assert sum(float(g.abs().sum()) > 0 for g in found.values()) > len(found) / 2  # B learns at once, A from then on
        for optimizer in optimizers:
            optimizer.step()
    for name, parameter in placed.roles.parameters("policy").items():
        close(parameter, whole.roles.parameters("policy")[name], 1e-5)
    assert absent(placed) == streamed
    assert not any(p.grad is not None for p in placed.roles.parameters("other").values())


def test_a_backward_after_the_block_computes_again_under_the_role_of_the_forward(tmp_path: Path) -> None:
    whole, placed = both(tmp_path)
    grads = []
    for each in (whole, placed):
        with each.acting_as("other"):
            value = loss(each, "other")
        with each.acting_as("policy"):  # neither this role nor none may take part in the second computation
            value.backward()
            assert each.acting == "policy"
        grads.append(gradients(each, "other"))
    close_gradients(grads[1], grads[0])
    assert all(p.grad is None for p in placed.roles.parameters("policy").values())


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_rollouts_are_those_of_the_whole_model(family: str, tmp_path: Path) -> None:
    whole, placed = both(tmp_path, family, resident=0)
    prompts = [(5, 9, 2), (7,), (5, 9, 2), (30, 31, 32, 33)]
    requests = [*(Request(Prompt(p), temperature=0.0) for p in prompts), Request(Prompt((5, 9)), temperature=1.0)]
    results = []
    for each in (whole, placed):
        with each.acting_as("other"):
            results.append(
                (
                    generate(each, requests, max_new_tokens=8, seed=5),
                    beam_search(each, as_prompts(prompts[:2]), beams=2, max_new_tokens=4),
                )
            )
    for found, expected in zip(results[1], results[0], strict=True):
        assert [r.ids for r in found] == [r.ids for r in expected]
        for one, other in zip(found, expected, strict=True):
            close(torch.tensor(one.logprobs), torch.tensor(other.logprobs), 1e-5)


def test_a_pass_outside_of_a_block_is_refused(tmp_path: Path) -> None:
    _, placed = both(tmp_path)
    for each in (lambda: placed.model(input_ids=IDS), lambda: placed.hidden(IDS, ONES)):
        with pytest.raises(RoleError, match="outside of"):
            each()


# -- files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("from_whole", [True, False])
def test_roles_move_between_placements(from_whole: bool, tmp_path: Path) -> None:
    source, target = both(tmp_path)[:: 1 if from_whole else -1]
    tiny_models.scramble(source, "policy", seed=11)
    save_role(source, "policy", tmp_path / "role")
    load_role(target, "evaluator-0", tmp_path / "role", trainable=True)
    scores = []
    for each, role in ((source, "policy"), (target, "evaluator-0")):
        with each.acting_as(role), torch.no_grad():
            scores.append(final_scores(each, role, pad_sequences(each, as_prompts([(5, 9), (4,)]), [(2, 17, 30), (8, 8)])))
    close(scores[1], scores[0])
    assert scores[0].abs().min() > 1e-3


def test_a_role_of_another_base_is_told_apart_by_weights_on_disk(tmp_path: Path) -> None:
    model = folder(tmp_path, "llama")
    placement = limits(model, resident=0)
    first = Backbone(load(model, placement), LoraConfig(rank=4), "first")
    weights = tiny_models.model("llama", 384, num_hidden_layers=LAYERS)
    with torch.no_grad():
        weights.model.layers[2].mlp.up_proj.weight.add_(0.01)  # a layer that is on disk
    weights.save_pretrained(model)
    second = Backbone(load(model, placement), LoraConfig(rank=4), "second")
    assert second.fingerprint != first.fingerprint


def test_weights_that_are_not_in_the_files_as_they_are_used_are_written_out_and_cleaned_up(tmp_path: Path) -> None:
    """A file of Mixtral holds the experts one by one, its model one stack of them."""
    model = folder(tmp_path, "mixtral")
    expected = tiny_models.model("mixtral", 384, num_hidden_layers=LAYERS)(input_ids=IDS).logits.detach()
    room = tmp_path / "new" / "room"
    loaded = load(model, limits(model, resident=0).model_copy(update={"folder": str(room)}))
    assert sum(p.stat().st_size for p in room.rglob("*.safetensors")) > 3 * 30_000
    close(loaded.model(input_ids=IDS).logits.detach(), expected)
    del loaded
    gc.collect()
    assert list(room.iterdir()) == []


def test_nothing_is_left_behind_when_loading_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Damaged files are refused before the folder is made; a full disk shows only while weights are written to it."""
    model = folder(tmp_path, "llama")
    placement = limits(model, resident=0).model_copy(update={"folder": str(tmp_path / "room")})

    def fill_the_disk(*args: Any, offload_folder: str, **options: Any) -> None:
        (Path(offload_folder) / "0.safetensors").write_bytes(b"half a weight")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("selfeval.backbone.load.AutoModelForCausalLM.from_pretrained", fill_the_disk)
    with pytest.raises(ModelError, match=r"cannot load model .*No space left on device"):
        load(model, placement)
    assert list(tmp_path.glob("room/*")) == []


# -- memory ---------------------------------------------------------------------------------------------------------------


def test_bytes_and_copies_are_counted_wherever_the_weights_lie(tmp_path: Path) -> None:
    shape = {"hidden_size": 72, "intermediate_size": 104}  # unique shapes, so models of other tests are not counted
    model = folder(tmp_path, "llama", **shape)
    expected = sum(p.numel() for p in load(model).model.parameters())
    gc.collect()
    placed = Backbone(load(model, limits(model, 1)), LoraConfig(rank=4), "tiny")
    placed.roles.add("policy")
    with placed.acting_as("policy"):
        loss(placed).backward()
    assert (placed.census.base_bytes, placed.census.parameter_count) == (4 * expected, expected)
    assert placed.census.weight_copies() == 1
    second = load(model)
    assert placed.census.weight_copies() > 1.5
    del second


class Brought:
    """How many bytes of streamed weights are alive whenever one more is brought in."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.most = 0
        self.alive: list[tuple[StorageWeakRef, int]] = []
        plain = OffloadedWeightsLoader.__getitem__

        def watched(loader: OffloadedWeightsLoader, key: str) -> Tensor:
            found: Tensor = plain(loader, key).clone()  # separate storage, even if the file reader shares it
            self.alive = [(ref, size) for ref, size in self.alive if not ref.expired()]
            self.alive.append((StorageWeakRef(found.untyped_storage()), found.numel() * found.element_size()))
            self.most = max(self.most, sum(size for _, size in self.alive))
            return found

        monkeypatch.setattr(OffloadedWeightsLoader, "__getitem__", watched)


def test_training_holds_the_weights_of_one_streamed_layer_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = folder(tmp_path, "llama", layers=6)
    brought, placement = Brought(monkeypatch), limits(model, 0)
    most = {}
    for name in ("streamed", "piled up"):
        if name == "piled up":  # autograd's default, to prove that the measure detects it
            monkeypatch.setattr("selfeval.backbone.roles.recompute", lambda *_: None)
        placed = Backbone(load(model, placement), LoraConfig(rank=4), "tiny")
        placed.roles.add("policy")
        brought.most = 0
        with placed.acting_as("policy"):
            loss(placed).backward()
        most[name] = brought.most
        del placed
        gc.collect()
    layer = 4 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32)
    assert most["streamed"] <= layer
    assert most["piled up"] > 5 * layer


def test_a_pass_without_gradients_holds_one_matrix_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = folder(tmp_path, "llama")
    brought = Brought(monkeypatch)
    placed = Backbone(load(model, limits(model, 0)), LoraConfig(rank=4), "tiny")
    brought.most = 0
    with placed.acting_as(BASE), torch.no_grad():
        placed.hidden(IDS, ONES)
    assert 0 < brought.most <= 2 * 4 * 32 * 48  # the next one is read before the last one is let go


# -- a card ---------------------------------------------------------------------------------------------------------------


def test_a_card_and_the_cpu_train_like_the_cpu_alone(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device here")
    model = folder(tmp_path, "llama", hidden_size=80, intermediate_size=120)  # unique shapes, for the count of copies
    room = limits(model, 1).max_memory["cpu"]
    others = {f"cuda:{i}": ByteSize(0) for i in range(1, torch.cuda.device_count())}
    placement = PlacementConfig(max_memory={"cuda:0": room, **others})
    placed = Backbone(
        load_model(str(model), device="cuda", precision="fp32", placement=placement), LoraConfig(rank=4, alpha=8.0), "tiny"
    )
    assert placed.census.weight_copies() == 1
    whole = Backbone(load(model), LoraConfig(rank=4, alpha=8.0), "tiny")
    assert placed.fingerprint == whole.fingerprint
    assert placed.loaded.placement is not None
    assert placed.loaded.placement.devices == ("cuda:0", "cpu", "cpu")
    for each in (whole, placed):
        each.roles.add("policy", seed=3, head=True)
        tiny_models.scramble(each, "policy")
    assert {p.device.type for p in placed.roles.parameters("policy").values()} == {"cuda"}
    grads, rollouts = [], []
    for each in (whole, placed):
        ids = IDS.to(each.loaded.device)
        with each.acting_as("policy"):
            hidden = each.hidden(ids, torch.ones_like(ids))
            (each.score("policy", hidden).sum() - torch.log_softmax(each.logits(hidden), -1)[..., 3].sum()).backward()
            rollouts.append(
                generate(
                    each,
                    [Request(Prompt((5, 9, 2)), temperature=0.0), Request(Prompt((7,)), temperature=0.0)],
                    max_new_tokens=6,
                    seed=0,
                )
            )
        grads.append({name: gradient.cpu() for name, gradient in gradients(each, "policy").items()})
    close_gradients(grads[1], grads[0], 1e-3)
    assert [r.ids for r in rollouts[1]] == [r.ids for r in rollouts[0]]
