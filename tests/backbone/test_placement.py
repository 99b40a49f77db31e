from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import check_device_map
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ByteSize
from torch import nn
from transformers import LlamaConfig

import tiny_models
from selfeval.backbone.placement import DISK, DeviceMap, free_memory, meta_model, plan_placement, usable_memory
from selfeval.config import PlacementConfig, load_config
from selfeval.errors import ConfigError, ModelError

GIB, MIB = 1 << 30, 1 << 20

# A 7B Llama in bf16, by hand. A layer: four 4096 x 4096 matrices, three 4096 x 11008, two norms of 4096, two bytes each.
LAYER = 2 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096)
# Besides: embedding and output layer of 32000 x 4096, one norm, and two buffers of 64 fp32 rotary frequencies.
FIXED = 2 * (2 * 32000 * 4096 + 4096) + 2 * 64 * 4


@cache
def seven_billion() -> nn.Module:
    return meta_model(LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, vocab_size=32000))


def sizes(**devices: float) -> dict[str, ByteSize]:
    """Bytes by device, of sizes in GiB: `cuda0`, `cuda1`, `cpu`, `disk`."""
    return {name.replace("cuda", "cuda:"): ByteSize(int(size * GIB)) for name, size in devices.items()}


def plan(precision: str = "bf16", **memory: float) -> DeviceMap:
    """The plan of the 7B model for these sizes in GiB."""
    return plan_placement(seven_billion(), sizes(**memory), precision)


# -- plans for cards that are not here ------------------------------------------------------------------------------------


def test_a_model_that_fits_on_one_card_is_not_spread() -> None:
    found = plan(cuda0=14, cuda1=24, cpu=64, disk=1000)
    assert (found.main, found.is_whole, found.streamed) == ("cuda:1", True, ())
    assert found.bytes == {"cuda:1": FIXED + 32 * LAYER}
    assert plan(cuda0=24, cuda1=10, cpu=64).main == "cuda:0"


def test_uneven_cards_are_filled_in_order() -> None:
    found = plan(cuda0=5, cuda1=8, cpu=64, disk=1000)
    first = (5 * GIB - FIXED) // LAYER
    assert first == 11
    assert found.spans() == [("0-10", "cuda:0"), ("11-31", "cuda:1")]
    assert (found.main, found.is_whole, found.streamed) == ("cuda:0", False, ())
    assert found.bytes == {"cuda:0": FIXED + 11 * LAYER, "cuda:1": 21 * LAYER}
    assert found.sentence() == ("layers 0-10 on cuda:0, layers 11-31 on cuda:1; embeddings, output layer and heads on cuda:0")
    assert found.as_json() == {
        "main": "cuda:0", "layers": [["0-10", "cuda:0"], ["11-31", "cuda:1"]], "bytes": dict(found.bytes),
    }  # fmt: skip


def test_a_card_too_small_for_a_layer_is_left_out() -> None:
    first = plan(cuda0=0.5, cuda1=5, cuda2=8, cpu=64)
    assert first.spans() == [("0-10", "cuda:1"), ("11-31", "cuda:2")]
    assert first.main == "cuda:1"
    between = plan(cuda0=5, cuda1=0.3, cuda2=8, cpu=64)
    assert between.spans() == [("0-10", "cuda:0"), ("11-31", "cuda:2")]


def test_what_the_cards_cannot_hold_goes_to_ram_and_then_to_disk() -> None:
    found = plan(cuda0=4, cpu=6, disk=1000)
    resident = (4 * GIB - FIXED - LAYER) // LAYER  # room for one more layer: the one that a pass brings in
    in_ram = 6 * GIB // LAYER
    assert (resident, in_ram) == (8, 15)
    assert found.spans() == [("0-7", "cuda:0"), ("8-22", "cpu"), ("23-31", DISK)]
    assert found.streamed == tuple(f"model.layers.{i}" for i in range(8, 32))
    assert "24 layers are moved to cuda:0 for each forward pass" in found.sentence()


def test_a_machine_without_cards_computes_on_its_cpu() -> None:
    found = plan("fp32", cpu=8, disk=1000)
    resident = (8 * GIB - 2 * (FIXED + LAYER)) // (2 * LAYER)
    assert resident == 8
    assert found.spans() == [("0-7", "cpu"), ("8-31", DISK)]
    assert found.streamed == tuple(f"model.layers.{i}" for i in range(8, 32))
    assert plan("fp32", cpu=64).is_whole
    assert plan(cuda0=0.2, cpu=64).main == "cpu"  # no card can take part


def test_smaller_precisions_need_less_room() -> None:
    assert not plan("bf16", cuda0=8, cpu=64).is_whole
    assert plan("int8", cuda0=8, cpu=64).is_whole
    assert not plan("int8", cuda0=4.5, cpu=64).is_whole
    four = plan("nf4", cuda0=4.5, cpu=64)
    norms = 2 * 2 * 4096  # stay in two bytes
    weights = 4 * 4096**2 + 3 * 4096 * 11008  # half a byte each, a byte for 64, an fp32 for 64 * 256; tables of 273 fp32
    layer = norms + weights // 2 + weights // 64 + 4 * weights // (64 * 256) + 7 * 4 * 273
    assert four.bytes["cuda:0"] == FIXED + 32 * layer


def test_one_device_too_small_for_a_layer_is_refused_with_what_is_missing() -> None:
    with pytest.raises(ModelError) as caught:
        plan(cuda0=0.25, cpu=0.5, disk=1000)
    # 500.0 MiB besides the layers and 386.0 MiB for one layer are needed; 512 MiB are available.
    message = str(caught.value)
    assert "one device must hold 886 MiB" in message
    assert "374 MiB more than any device has" in message
    assert "usable: cuda:0 256 MiB, cpu 512 MiB, disk 1,000 GiB" in message
    assert "Free memory" in message


def test_all_devices_together_too_small_is_refused_with_what_is_missing() -> None:
    with pytest.raises(ModelError, match=r"12\.6 GiB does not fit: all devices together lack 4\.9\d GiB.*cuda:0 3\.00 GiB"):
        plan(cuda0=3, cpu=4, disk=1)  # the model and the layer brought in are 12.6 + 0.4 GiB


SIZES = st.integers(0, 40 * 1024)


@given(st.lists(SIZES, min_size=0, max_size=4), SIZES, SIZES)
def test_no_plan_overfills_a_device_or_goes_back(cards: list[int], ram: int, disk: int) -> None:
    memory = {**{f"cuda:{i}": size * MIB for i, size in enumerate(cards)}, "cpu": ram * MIB, DISK: disk * MIB}
    try:
        found = plan_placement(seven_billion(), memory, "bf16")
    except ModelError:
        computing = [size for device, size in memory.items() if device != DISK]
        assert memory[DISK] < 32 * LAYER or max(computing) < FIXED + LAYER
        return
    brought = LAYER if found.streamed else 0
    assert all(size + (brought if device == found.main else 0) <= memory[device] for device, size in found.bytes.items())
    order = [list(memory).index(device) for device in found.devices]
    assert order == sorted(order)
    assert sum(found.bytes.values()) == FIXED + 32 * LAYER
    assert found.main != DISK


# -- models ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_every_weight_has_a_device_and_tied_ones_have_the_same(family: str, tied: bool) -> None:
    model: Any = meta_model(tiny_models.tiny_config(family, 384, tie_word_embeddings=tied))
    bytes_ = sum(p.numel() * 4 for p in model.parameters()) + sum(b.numel() * b.element_size() for b in model.buffers())
    found = plan_placement(model, {"cpu": bytes_ - 1, DISK: GIB}, "fp32")
    assert found.devices == ("disk", "disk")  # the room of the second layer is kept for the one that a pass brings in
    check_device_map(model, found.for_transformers())
    assert all(device == "cpu" for name, device in found.for_transformers().items() if name in found.fixed)
    assert sum(found.bytes.values()) == bytes_
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied


def test_cards_are_numbers_for_transformers() -> None:
    found = plan(cuda0=0.5, cuda1=5, cuda2=8, cpu=64).for_transformers()
    assert (found["model.layers.0"], found["model.layers.31"], found["lm_head"], found["model.norm"]) == (1, 2, 1, 1)


# -- memory ---------------------------------------------------------------------------------------------------------------


def test_the_reserve_and_the_limits_of_the_user() -> None:
    free = {"cuda:0": 10 * GIB, "cpu": 100 * GIB, DISK: 1 << 62}
    assert usable_memory(free, PlacementConfig(reserve=0.2)) == {"cuda:0": 8 * GIB, "cpu": 80 * GIB, DISK: 1 << 62}
    limited = PlacementConfig(reserve=0.0, max_memory=sizes(cpu=5, cuda0=11, disk=0))
    assert usable_memory(free, limited) == {"cuda:0": 10 * GIB, "cpu": 5 * GIB, DISK: 0}
    with pytest.raises(ModelError, match=r"names cuda:3; the devices here are cuda:0, cpu, disk"):
        usable_memory(free, PlacementConfig(max_memory=sizes(cuda3=1)))


def test_limits_come_from_the_command_line() -> None:
    found = load_config(
        None, {}, ["backbone.placement.max_memory.cpu=200MiB", "backbone.placement.max_memory.cuda:1=10GiB"]
    ).backbone.placement
    assert found.max_memory == {"cpu": 200 * MIB, "cuda:1": 10 * GIB}
    for wrong in ("backbone.placement.max_memory.gpu=1GiB", "backbone.placement.max_memory.cpu=much"):
        with pytest.raises(ConfigError, match=r"placement\.max_memory"):
            load_config(None, {}, [wrong])


def test_free_memory_of_this_machine() -> None:
    found = free_memory(torch.device("cpu"))
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert list(found) == ["cpu", DISK]
    assert 0 < found["cpu"] < total


def test_the_limit_of_a_container_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selfeval.backbone.placement._CGROUP", tmp_path)
    free = free_memory(torch.device("cpu"))["cpu"]
    assert free > 50 * MIB
    for name, text in {
        "memory.max": 60 * MIB,
        "memory.current": 40 * MIB,
        "memory.stat": f"anon 1\ninactive_file {MIB}\n",
    }.items():
        (tmp_path / name).write_text(f"{text}\n")
    assert free_memory(torch.device("cpu"))["cpu"] == 21 * MIB
    (tmp_path / "memory.max").write_text("max\n")  # no limit
    assert free_memory(torch.device("cpu"))["cpu"] > 50 * MIB


def test_free_memory_of_cards() -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device here")
    found: dict[str, Any] = free_memory(torch.device("cuda"))
    assert list(found) == [*(f"cuda:{i}" for i in range(torch.cuda.device_count())), "cpu", DISK]
    assert 0 < found["cuda:0"] <= torch.cuda.mem_get_info(0)[1]
