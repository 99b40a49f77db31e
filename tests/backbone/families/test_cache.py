from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM, MistralConfig

import tiny_models
from selfeval.backbone.families.cache import (
    CACHE_FIELD,
    PreallocatedLayer,
    RowFacts,
    append_rows,
    appends_rows,
    cache_argument,
    cache_bytes,
    cache_of,
    check_state,
    is_cache,
    preallocated_cache,
    resize_columns,
    select_rows,
    state_arguments,
)
from selfeval.errors import ModelError


def states(length: int, rows: int = 2) -> torch.Tensor:
    return torch.randn(rows, 3, length, 4)


def test_it_returns_what_a_growing_cache_returns() -> None:
    torch.manual_seed(0)
    config = tiny_models.tiny_config("llama", 40)
    ours, theirs = preallocated_cache(config, room=5), DynamicCache(config=config)
    for length in (4, 1, 1, 3):
        for layer in range(2):
            keys, values = states(length), states(length)
            for found, expected in zip(ours.update(keys, values, layer), theirs.update(keys, values, layer), strict=True):
                assert torch.equal(found, expected)
        assert ours.get_seq_length() == theirs.get_seq_length()


def test_new_tokens_are_written_in_place() -> None:
    cache = preallocated_cache(tiny_models.tiny_config("llama", 40), room=5)
    cache.update(states(4), states(4), 0)
    address = cache.layers[0].keys.data_ptr()
    for _ in range(5):
        cache.update(states(1), states(1), 0)
        assert cache.layers[0].keys.data_ptr() == address


def test_rows_are_dropped_repeated_and_reordered() -> None:
    cache = preallocated_cache(tiny_models.tiny_config("llama", 40), room=2)
    keys = states(3, rows=3)
    for layer in range(2):
        cache.update(keys, keys + 1, layer)
    rows = [2, 0, 0, 2]
    select_rows(cache, rows, "cpu")
    more = states(1, rows=4)
    for layer in range(2):
        found, values = cache.update(more, more, layer)
        assert torch.equal(found, torch.cat([keys[rows], more], dim=2))
        assert torch.equal(values, torch.cat([keys[rows] + 1, more], dim=2))


@pytest.mark.parametrize("rows", [[0, 4, 2], [0, 1, 2], [3], [4, 3]])
def test_rows_that_fill_gaps_are_moved_in_place(rows: list[int]) -> None:
    cache = preallocated_cache(tiny_models.tiny_config("llama", 40), room=2)
    keys = states(3, rows=5)
    for layer in range(2):
        cache.update(keys, keys + 1, layer)
    address = cache.layers[0].keys.data_ptr()
    select_rows(cache, rows, "cpu")
    assert cache.layers[0].keys.data_ptr() == address
    more = states(1, rows=len(rows))
    for layer in range(2):
        found, values = cache.update(more, more, layer)
        assert torch.equal(found, torch.cat([keys[rows], more], dim=2))
        assert torch.equal(values, torch.cat([keys[rows] + 1, more], dim=2))


def test_rows_of_running_states_move_with_those_of_keys_and_values() -> None:
    cache = preallocated_cache(tiny_models.tiny_config("falcon_h1", 40), room=2)  # attention and Mamba in every layer
    conv, recurrent, keys = torch.randn(3, 6, 4), torch.randn(3, 5, 2), states(3, rows=3)
    for layer in range(2):
        cache.update_conv_state(conv, layer)
        cache.update_recurrent_state(recurrent, layer)
        cache.update(keys, keys, layer)
    rows = [2, 0, 0, 2]
    select_rows(cache, rows, "cpu")
    for layer in cache.layers:
        assert torch.equal(layer.conv_states[0], conv[rows])
        assert torch.equal(layer.recurrent_states[0], recurrent[rows])
        assert torch.equal(layer.keys, keys[rows])


def test_layers_that_do_not_keep_everything_stay_as_they_were() -> None:
    config = MistralConfig(num_hidden_layers=2, sliding_window=3)
    assert not any(isinstance(layer, PreallocatedLayer) for layer in preallocated_cache(config, 4).layers)
    assert all(
        isinstance(layer, PreallocatedLayer) for layer in preallocated_cache(tiny_models.tiny_config("qwen3", 40), 4).layers
    )


# -- the names of a model's cache -----------------------------------------------------------------------------------------


def test_the_field_of_outputs_is_the_argument_of_transformers_own_models() -> None:
    assert CACHE_FIELD in inspect.signature(LlamaForCausalLM.forward).parameters
    assert cache_argument(tiny_models.backbone("llama").loaded) == CACHE_FIELD
    cache = cache_of(tiny_models.model("llama")(input_ids=torch.tensor([[5, 6]]), use_cache=True))
    assert is_cache(cache)
    assert not is_cache(cache.layers)
    assert cache.get_seq_length() == 2


@pytest.mark.parametrize(
    ("accepted", "expected"),
    [
        ({"cache", "use_cache"}, "cache"),  # transformers 5.24
        ({"past_key_values", "use_cache"}, "past_key_values"),  # before it, and code that comes with weights
        ({"cache_params", "use_cache"}, "cache_params"),  # state-space models before 5.24
        ({"use_cache"}, None),
    ],
)
def test_a_model_is_asked_which_name_it_takes_its_cache_in(accepted: set[str], expected: str | None) -> None:
    assert cache_argument(SimpleNamespace(forward_accepts=accepted.__contains__)) == expected


def test_attention_sees_the_whole_mask_and_a_running_state_only_the_new_tokens() -> None:
    attention_BT = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    for family, whole in (("llama", True), ("falcon_h1", True), ("mamba", False)):
        backbone = tiny_models.backbone(family)
        cache = preallocated_cache(backbone.model.config, 4)
        first, later = (state_arguments(backbone.loaded, cache, attention_BT, new) for new in (4, 1))
        assert first.keys() == later.keys() == {"attention_mask", cache_argument(backbone.loaded)}
        assert cache in first.values()
        assert first["attention_mask"].tolist() == attention_BT.tolist()
        assert later["attention_mask"].tolist() == (attention_BT if whole else attention_BT[:, -1:]).tolist(), family


def test_models_with_a_state_of_their_own_are_refused_by_type() -> None:
    check_state(tiny_models.backbone("llama").loaded)
    check_state(tiny_models.backbone("mamba").loaded)
    for kind, arguments in (("xlstm", {"cache_params"}), ("a remote one", set())):
        loaded = SimpleNamespace(
            model=SimpleNamespace(config=SimpleNamespace(model_type=kind)), forward_accepts=arguments.__contains__
        )
        with pytest.raises(ModelError, match=f"models of type {kind} store the state"):
            check_state(loaded)


# -- numbers of rows ------------------------------------------------------------------------------------------------------


def test_numbers_of_rows_move_with_their_rows_and_replace_earlier_ones() -> None:
    cache = preallocated_cache(tiny_models.tiny_config("llama", 40), room=2)
    keys = states(3, rows=3)
    for layer in range(2):
        cache.update(keys, keys, layer)
    assert RowFacts.of(cache) is None
    RowFacts(torch.zeros(3, 2)).put_in(cache)
    RowFacts(torch.tensor([[1, 2], [3, 4], [5, 6]])).put_in(cache)
    assert len(cache.layers) == 3
    select_rows(cache, [2, 0, 0], "cpu")
    found = RowFacts.of(cache)
    assert found is not None
    assert found.facts_BN.tolist() == [[5, 6], [1, 2], [1, 2]]


# -- rows that join -------------------------------------------------------------------------------------------------------


def test_rows_join_right_aligned_and_columns_move_to_the_front_when_there_is_no_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A plain list of rows does the same steps: each row is its own tokens, and what comes before them is not read."""
    torch.manual_seed(0)
    empty = PreallocatedLayer._empty
    # What uninitialised memory may hold.
    monkeypatch.setattr(PreallocatedLayer, "_empty", lambda *arguments: empty(*arguments).fill_(float("nan")))
    config = tiny_models.tiny_config("llama", 40)
    cache = preallocated_cache(config, room=3, rows=4, width=5)
    rows: list[torch.Tensor] = []

    def join(*prompts: int) -> None:
        read = preallocated_cache(config, room=0)
        new = torch.randn(len(prompts), 3, max(prompts), 4)
        for layer in range(2):
            read.update(new + layer, new - layer, layer)
        append_rows(cache, read, list(range(len(prompts))), "cpu")
        rows.extend(row[:, -count:] for row, count in zip(new, prompts, strict=True))

    def step() -> None:
        more = states(1, rows=len(rows))
        for layer in range(2):
            keys, values = cache.update(more + layer, more - layer, layer)
            for place, row in enumerate(rows):
                if layer == 0:
                    rows[place] = row = torch.cat([row, more[place]], dim=1)
                assert torch.equal(keys[place, :, -row.shape[1] :], row + layer)
                assert torch.equal(values[place, :, -row.shape[1] :], row - layer)
            assert not keys.isnan().any()

    join(5, 4, 2)
    address = cache.layers[0].keys.data_ptr()
    for _ in range(2):
        step()
    select_rows(cache, [2, 1], "cpu")  # the first row is finished
    rows[:] = [rows[2], rows[1]]
    resize_columns(cache, 6)  # the longest row has 6 of 7 columns
    assert cache.get_seq_length() == 6
    join(1, 1)
    for _ in range(2):  # the second step has no room behind the columns in use
        step()
    assert cache.layers[0].first == 0
    assert cache.layers[0].keys.data_ptr() == address
    assert cache.get_seq_length() == 8


def test_columns_are_added_in_front_for_a_longer_row(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = PreallocatedLayer._empty
    monkeypatch.setattr(PreallocatedLayer, "_empty", lambda *arguments: empty(*arguments).fill_(float("nan")))
    cache = preallocated_cache(tiny_models.tiny_config("llama", 40), room=9, rows=2)
    layer = cache.layers[0]
    cache.layers.pop()
    resize_columns(cache, 4)
    first, longer = states(4, rows=1), states(7, rows=1)
    layer.append(first, -first)
    resize_columns(cache, 3)  # the first column was padding
    for columns in (4, 7):  # within the columns that were dropped, and beyond them
        resize_columns(cache, columns)
        assert torch.equal(layer.keys[0, :, layer.first : layer.first + columns][:, -3:], first[0, :, 1:])
        assert not layer.keys[0, :, layer.first : layer.first + columns - 3].any()
    layer.append(longer, -longer)
    keys, values = layer.update(states(1, rows=2), states(1, rows=2))
    assert torch.equal(keys[1, :, :-1], longer[0])
    assert torch.equal(values[0, :, 4:-1], -first[0, :, 1:])
    assert not keys.isnan().any()
    select_rows(cache, [], "cpu")
    resize_columns(cache, 2)
    assert (layer.first, layer.length) == (0, 2)  # without rows there is nothing to move
    # Keys and values of both rows, with all columns.
    assert cache_bytes(cache) == 2 * first[0, :, 0].numel() * 4 * 2 * 9


def test_rows_join_where_all_layers_keep_everything_and_nothing_else() -> None:
    for family, joins in (("llama", True), ("gpt2", True), ("bloom", True), ("mamba", False), ("falcon_h1", False)):
        assert appends_rows(tiny_models.backbone(family).loaded) == joins, family
    assert not appends_rows(tiny_models.backbone("mistral", sliding_window=4).loaded)


def test_a_layer_that_is_never_written_to_has_no_tokens() -> None:
    cache = preallocated_cache(tiny_models.tiny_config("llama", 40), room=3, rows=2, width=5)
    assert cache.layers[1].get_seq_length() == 0
    cache.layers[0].append(states(5), states(5))
    resize_columns(cache, 3)
    assert [layer.get_seq_length() for layer in cache.layers] == [3, 0]
