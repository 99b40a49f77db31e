from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache

import tiny_models
from selfeval.backbone.families.states import check_state, state_arguments
from selfeval.errors import ModelError


def test_attention_sees_the_whole_mask_and_a_running_state_only_the_new_tokens() -> None:
    attention_BT, cache = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]), DynamicCache()
    llama = state_arguments(tiny_models.backbone("llama").loaded, cache, attention_BT, 1)
    assert llama.keys() == {"attention_mask", "past_key_values"}
    assert llama["past_key_values"] is cache
    assert llama["attention_mask"].tolist() == attention_BT.tolist()
    mamba = tiny_models.backbone("mamba").loaded
    first, later = (state_arguments(mamba, cache, attention_BT, new) for new in (4, 1))
    assert first.keys() == later.keys() == {"attention_mask", "cache_params"}
    assert first["attention_mask"].tolist() == attention_BT.tolist()
    assert later["attention_mask"].tolist() == [[1], [1]]


def test_models_with_a_state_of_their_own_are_refused_by_type() -> None:
    check_state(tiny_models.backbone("llama").loaded)
    check_state(tiny_models.backbone("mamba").loaded)
    for kind, arguments in (("xlstm", {"cache_params"}), ("a remote one", set())):
        loaded = SimpleNamespace(
            model=SimpleNamespace(config=SimpleNamespace(model_type=kind)), forward_accepts=arguments.__contains__
        )
        with pytest.raises(ModelError, match=f"models of type {kind} keep"):
            check_state(loaded)
