from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from selfeval.lab import pretrain as module
from selfeval.lab.corpus import MARKERS
from selfeval.lab.pretrain import PretrainConfig, pretrain
from selfeval.lab.vocabulary import train_tokenizer

TINY = PretrainConfig(
    steps=20,
    rows=2,
    length=96,
    hidden_size=32,
    layers=2,
    heads=2,
    kv_heads=1,
    intermediate_size=48,
    warmup=4,
    checkpoint_every=8,
)


_tokenizer = functools.cache(train_tokenizer)
"""Deterministic, and therefore trained only once."""


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Use one thread, which fixes the order of sums."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(module, "train_tokenizer", _tokenizer)
    yield
    torch.set_num_threads(threads)


class _Killed(BaseException):
    pass


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def _pretrain_until_killed(folder: Path, config: PretrainConfig, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train and abort in the middle of `step`, before its batch is used."""
    batch = module._batch

    def dying(tokenizer: Any, config: PretrainConfig, at: int) -> Any:
        if at == step:
            raise _Killed
        return batch(tokenizer, config, at)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_batch", dying)
        with pytest.raises(_Killed):
            pretrain(folder, config, lambda line: None)


def test_a_killed_and_resumed_run_ends_bit_for_bit_where_an_undisturbed_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretrain(tmp_path / "whole", TINY, lambda line: None)
    for step in (11, 18):
        _pretrain_until_killed(tmp_path / "killed", TINY, step, monkeypatch)
    said: list[str] = []
    pretrain(tmp_path / "killed", TINY, said.append)
    assert said[0] == "resuming from step 16"
    whole, killed = _weights(tmp_path / "whole"), _weights(tmp_path / "killed")
    assert whole.keys() == killed.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, killed[name]), name


def _log(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of the log without the times."""
    lines = [json.loads(line) for line in (folder / "pretrain.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


@pytest.mark.parametrize("torn", [False, True], ids=["whole", "torn"])
def test_the_log_of_a_resumed_run_is_that_of_an_undisturbed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torn: bool
) -> None:
    # Checkpoints at 8 and 16 and lines at every 3 steps, so the losses of a line may be on both sides of a checkpoint.
    monkeypatch.setattr(module, "_REPORT_EVERY", 3)
    pretrain(tmp_path / "whole", TINY, lambda line: None)
    _pretrain_until_killed(tmp_path / "killed", TINY, 6, monkeypatch)  # before the first checkpoint
    _pretrain_until_killed(tmp_path / "killed", TINY, 15, monkeypatch)
    if torn:
        with (tmp_path / "killed" / "pretrain.jsonl").open("a") as file:
            file.write('{"step": 15, "lo')
    pretrain(tmp_path / "killed", TINY, lambda line: None)
    assert _log(tmp_path / "killed") == _log(tmp_path / "whole")


def test_the_seed_decides_and_training_moves_the_weights(tmp_path: Path) -> None:
    for name, changes in {"a": {}, "seed": {"seed": 1}, "longer": {"steps": 4}}.items():
        config = replace(TINY, steps=2)
        pretrain(tmp_path / name, replace(config, **changes), lambda line: None)
    first = _weights(tmp_path / "a")
    for name in ("seed", "longer"):
        other = _weights(tmp_path / name)
        assert any(not torch.equal(tensor, other[key]) for key, tensor in first.items() if key in other), name


def test_the_result_is_an_ordinary_model_folder(tmp_path: Path) -> None:
    pretrain(tmp_path, replace(TINY, steps=2), lambda line: None)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.rglob("*.safetensors")} == {
        (tmp_path / "config.json").stat().st_mode & 0o777
    }
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert model.config.architectures == ["LlamaForCausalLM"]
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.encode("".join(MARKERS), add_special_tokens=False) == list(range(len(MARKERS)))
    assert json.loads((tmp_path / "pretrain.json").read_text())["steps_done"] == 2


def test_documents_are_whole_and_positions_restart_in_each() -> None:
    tokenizer = _tokenizer(TINY.seed)
    batch = module._batch(tokenizer, TINY, 3)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    grade, reply = tokenizer.convert_tokens_to_ids(["<|grade|>", "<|reply|>"])
    for ids, positions, weights in zip(batch["ids"], batch["positions"], batch["weights"], strict=True):
        starts = (ids == bos).nonzero().flatten().tolist()
        assert starts[0] == 0
        assert (positions[starts] == 0).all()
        assert (weights[starts] == 0).all(), "the first token has nothing to be predicted from"
        for start, end in zip(starts, [*starts[1:], None], strict=True):
            document = ids[start:end]
            is_sums = document[1] == grade and (document == reply).sum() == 0  # a list of sums has no end marker
            assert is_sums or (document == eos).sum() >= 1
            used = (document != tokenizer.pad_token_id).sum()
            assert positions[start : start + used].tolist() == list(range(used))
        assert (weights[ids == tokenizer.pad_token_id] == 0).all()


def test_the_loss_falls() -> None:
    """The loss of a fixed batch after 30 steps on it is lower; a lost gradient would leave it unchanged."""
    tokenizer = _tokenizer(TINY.seed)
    model = module._model(TINY, tokenizer)
    optimizer = module._optimizer(model, TINY)
    batch = module._batch(tokenizer, TINY, 0)
    losses = [module._step(model, optimizer, batch, TINY.learning_rate) for _ in range(30)]
    assert losses[-1] < 0.8 * losses[0]


def test_the_learning_rate_rises_then_falls_to_two_percent() -> None:
    rates = [module._learning_rate(TINY, step) / TINY.learning_rate for step in (0, 1, 3, 4, 12, 20)]
    # warm-up over 4 steps; half way down the cosine (step 12 of 4..20) the factor is 0.02 + 0.98 / 2 = 0.51
    assert rates == pytest.approx([0.25, 0.5, 1.0, 1.0, 0.51, 0.02])
