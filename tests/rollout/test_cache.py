from __future__ import annotations

import torch
from transformers import DynamicCache, MistralConfig

import tiny_models
from selfeval.rollout.cache import RoomyLayer, roomy_cache, select_rows


def states(length: int, rows: int = 2) -> torch.Tensor:
    return torch.randn(rows, 3, length, 4)


def test_it_returns_what_a_growing_cache_returns() -> None:
    torch.manual_seed(0)
    config = tiny_models.tiny_config("llama", 40)
    ours, theirs = roomy_cache(config, room=5), DynamicCache(config=config)
    for length in (4, 1, 1, 3):
        for layer in range(2):
            keys, values = states(length), states(length)
            for found, expected in zip(ours.update(keys, values, layer), theirs.update(keys, values, layer), strict=True):
                assert torch.equal(found, expected)
        assert ours.get_seq_length() == theirs.get_seq_length()


def test_new_tokens_are_written_in_place() -> None:
    cache = roomy_cache(tiny_models.tiny_config("llama", 40), room=5)
    cache.update(states(4), states(4), 0)
    address = cache.layers[0].keys.data_ptr()
    for _ in range(5):
        cache.update(states(1), states(1), 0)
        assert cache.layers[0].keys.data_ptr() == address


def test_rows_are_dropped_repeated_and_reordered() -> None:
    cache = roomy_cache(tiny_models.tiny_config("llama", 40), room=2)
    keys = states(3, rows=3)
    for layer in range(2):
        cache.update(keys, keys + 1, layer)
    rows = torch.tensor([2, 0, 0, 2])
    select_rows(cache, rows)
    more = states(1, rows=4)
    for layer in range(2):
        found, values = cache.update(more, more, layer)
        assert torch.equal(found, torch.cat([keys[rows], more], dim=2))
        assert torch.equal(values, torch.cat([keys[rows] + 1, more], dim=2))


def test_rows_of_running_states_move_with_those_of_keys_and_values() -> None:
    cache = roomy_cache(tiny_models.tiny_config("falcon_h1", 40), room=2)  # attention and Mamba in every layer
    conv, recurrent, keys = torch.randn(3, 6, 4), torch.randn(3, 5, 2), states(3, rows=3)
    for layer in range(2):
        cache.update_conv_state(conv, layer)
        cache.update_recurrent_state(recurrent, layer)
        cache.update(keys, keys, layer)
    rows = torch.tensor([2, 0, 0, 2])
    select_rows(cache, rows)
    for layer in cache.layers:
        assert torch.equal(layer.conv_states[0], conv[rows])
        assert torch.equal(layer.recurrent_states[0], recurrent[rows])
        assert torch.equal(layer.keys, keys[rows])


def test_layers_that_do_not_keep_everything_stay_as_they_were() -> None:
    config = MistralConfig(num_hidden_layers=2, sliding_window=3)
    assert not any(isinstance(layer, RoomyLayer) for layer in roomy_cache(config, 4).layers)
    assert all(isinstance(layer, RoomyLayer) for layer in roomy_cache(tiny_models.tiny_config("qwen3", 40), 4).layers)
