from __future__ import annotations

import pytest
import torch

import tiny_models
from selfeval.backbone.adapters import BASE
from selfeval.backbone.packing import pad_rows, reads_packed_rows, rows_hidden
from selfeval.errors import RoleError

PACKING = {"llama": True, "qwen3": True, "gpt2": True, "glm4": True, "gemma3": True, "llama4": True}
PADDING = {"bloom": False, "opt": False, "mamba": False, "falcon_h1": False, "gpt_oss": False}


@pytest.mark.parametrize(("family", "expected"), {**PACKING, **PADDING}.items())
def test_it_is_measured_whether_documents_see_each_other(family: str, expected: bool) -> None:
    assert reads_packed_rows(tiny_models.backbone(family)) is expected


def test_it_is_measured_in_sixteen_bits_too() -> None:
    assert reads_packed_rows(tiny_models.backbone(dtype=torch.bfloat16))


def test_a_kernel_that_ignores_the_mask_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda positions: None)
    assert not reads_packed_rows(tiny_models.backbone())


def test_packed_documents_have_the_states_of_each_alone() -> None:
    backbone = tiny_models.backbone()
    documents = [[5, 9, 2, 7], [30, 31], [8, 8, 21, 4, 4, 19]]
    rows = pad_rows([documents, documents[1:2]], backbone.loaded.pad_id, "cpu")
    with torch.no_grad(), backbone.acting_as(BASE):
        found, alone = rows_hidden(backbone, rows), [rows_hidden(backbone, pad_rows([[d]], 0, "cpu"))[0] for d in documents]
    torch.testing.assert_close(found[0], torch.cat(alone), rtol=0, atol=1e-5)
    torch.testing.assert_close(found[1, :2], alone[1], rtol=0, atol=1e-5)


def test_a_role_must_act() -> None:
    backbone = tiny_models.backbone()
    with pytest.raises(RoleError, match="forward pass outside"):
        rows_hidden(backbone, pad_rows([[[1, 2], [3]]], 0, "cpu"))
