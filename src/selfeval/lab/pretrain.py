"""Pretrain the embedded model from scratch: tokenizer, random weights, AdamW on generated text.

The documents of each step are drawn from `(seed, step)`, so an interrupted run resumes from its last checkpoint with the same
result. The checkpoint is in the output folder; the model files are written last.
"""

from __future__ import annotations

import json
import math
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from selfeval.errors import InputError
from selfeval.lab.corpus import Document, draw_document
from selfeval.lab.vocabulary import train_tokenizer
from selfeval.store import open_to_umask, write_json, writing
from selfeval.store.metrics import add_metrics, keep_metrics

__all__ = ["PretrainConfig", "pretrain"]

_REPORT_EVERY = 100
_TEMPLATES = Path(__file__).parent / "word_problems" / "templates"


@dataclass(frozen=True)
class PretrainConfig:
    """Model and training settings of `selfeval lab pretrain`; the defaults are those of the shipped model."""

    seed: int = 0
    steps: int = 24_000
    rows: int = 8
    length: int = 192
    learning_rate: float = 2e-3
    warmup: int = 200
    weight_decay: float = 0.05
    hidden_size: int = 128
    layers: int = 5
    heads: int = 4
    kv_heads: int = 2
    intermediate_size: int = 344
    checkpoint_every: int = 500


def _encode(tokenizer: PreTrainedTokenizerFast, document: Document) -> tuple[list[int], list[float]]:
    ids: list[int] = []
    weights: list[float] = []
    for text, weight in document:
        piece = tokenizer.encode(text, add_special_tokens=False) if text else []
        ids += piece
        weights += [weight] * len(piece)
    return ids, weights


def _packed_rows(
    tokenizer: PreTrainedTokenizerFast, rng: random.Random, rows: int, length: int
) -> list[list[tuple[list[int], list[float]]]]:
    """Pack whole documents into `rows` rows of at most `length` tokens; a document that does not fit starts a later row."""
    waiting: list[tuple[list[int], list[float]]] = []
    packed = []
    for _ in range(rows):
        row: list[tuple[list[int], list[float]]] = []
        room, misses = length, 0
        # Four documents that do not fit end the row; trying more would bias the data towards short ones.
        while misses < 4:
            fitting = next((d for d in waiting if len(d[0]) <= room), None)
            # Waiting documents first, or long ones would never be placed.
            document = fitting or _encode(tokenizer, draw_document(rng))
            if fitting:
                waiting.remove(fitting)
            if len(document[0]) <= room:
                row.append(document)
                room -= len(document[0])
            else:
                misses += 1
                if len(document[0]) <= length:
                    waiting.append(document)
        packed.append(row)
    return packed


def _batch(tokenizer: PreTrainedTokenizerFast, config: PretrainConfig, step: int) -> dict[str, Tensor]:
    """Return token ids, positions (restarting at each document) and loss weights, `[rows, length]`."""
    rng = random.Random(f"{config.seed}/{step}")
    shape = (config.rows, config.length)
    ids, positions = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    weights = torch.zeros(shape)
    for r, row in enumerate(_packed_rows(tokenizer, rng, config.rows, config.length)):
        start = 0
        for tokens, loss_weights in row:
            end = start + len(tokens)
            ids[r, start:end] = torch.tensor(tokens)
            positions[r, start:end] = torch.arange(len(tokens))
            weights[r, start:end] = torch.tensor(loss_weights)
            # The first token of a document cannot be predicted from the end of the previous one.
            weights[r, start] = 0.0
            start = end
        # Padding is a document by itself, with weights of 0.
        positions[r, start:] = torch.arange(config.length - start)
    return {"ids": ids, "positions": positions, "weights": weights}


def _model(config: PretrainConfig, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(config.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def _optimizer(model: LlamaForCausalLM, config: PretrainConfig) -> torch.optim.AdamW:
    # Norms and the (tied) embedding are not decayed.
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=True)


def _learning_rate(config: PretrainConfig, step: int) -> float:
    """Compute the learning rate: linear warm-up, then cosine decay to 2% at the last step."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def _loss(model: LlamaForCausalLM, batch: dict[str, Tensor]) -> Tensor:
    # Without an attention mask, transformers derives one block per document from positions that restart at 0.
    logits = model(input_ids=batch["ids"], position_ids=batch["positions"], use_cache=False).logits[:, :-1]
    # Position t predicts token t + 1.
    weights = batch["weights"][:, 1:]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["ids"][:, 1:], reduction="none")
    return (losses * weights).sum() / weights.sum()


def _save(path: Path, model: LlamaForCausalLM, optimizer: torch.optim.AdamW, progress: dict[str, Any]) -> None:
    """Save weights and optimizer state as safetensors, with the progress as metadata; nothing is pickled."""
    tensors = {f"model/{name}": p.detach() for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        # Keys are step, exp_avg and exp_avg_sq, which `_restore` reads back.
        tensors.update({f"{key}/{name}": torch.as_tensor(value) for key, value in optimizer.state[parameter].items()})
    with writing(path) as temporary:
        save_file(tensors, temporary, metadata={"progress": json.dumps(progress)})


def _restore(path: Path, model: LlamaForCausalLM, optimizer: torch.optim.AdamW, config: PretrainConfig) -> dict[str, Any]:
    """Restore a checkpoint and return its progress.

    Raises:
        InputError: the checkpoint has another configuration.
    """
    with safe_open(path, framework="pt") as file:
        begun = json.loads(file.metadata()["progress"])["config"]
    if begun != asdict(config):
        other = ", ".join(f"{k} {begun.get(k)} before, {v} now" for k, v in asdict(config).items() if begun.get(k) != v)
        raise InputError(f"{path.parent} contains a pretraining run with other settings ({other}); pass another --output")
    # Only after the configuration was compared: other sizes could not be copied into this model.
    with safe_open(path, framework="pt") as file, torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(file.get_tensor(f"model/{name}"))
            optimizer.state[parameter] = {key: file.get_tensor(f"{key}/{name}") for key in ("step", "exp_avg", "exp_avg_sq")}
        progress: dict[str, Any] = json.loads(file.metadata()["progress"])
    return progress


def _step(model: LlamaForCausalLM, optimizer: torch.optim.AdamW, batch: dict[str, Tensor], learning_rate: float) -> float:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    loss = _loss(model, batch)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def pretrain(output: Path, config: PretrainConfig, report: Callable[[str], None] = print) -> None:
    """Train the model and write an ordinary Hugging Face folder (config, safetensors, tokenizer) to `output`.

    Args:
        output: output folder; also contains `checkpoint.safetensors` and `pretrain.jsonl`.
        config: sizes, steps and rates.
        report: called with a line of progress every 100 steps. Default: print.
    """
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(config.seed)
    model = _model(config, tokenizer)
    optimizer = _optimizer(model, config)
    checkpoint, log = output / "checkpoint.safetensors", output / "pretrain.jsonl"
    step, seconds, losses = 0, 0.0, list[float]()
    if checkpoint.exists():
        progress = _restore(checkpoint, model, optimizer, config)
        step, seconds = int(progress["step"]), float(progress["seconds"])
        losses = list(progress.get("losses", []))  # checkpoints of earlier versions have none
        report(f"resuming from step {step}")
    if log.exists():
        keep_metrics(log, step)  # the steps after the checkpoint are repeated, and their lines with them
    started = time.monotonic() - seconds  # shifted back, so the time of earlier attempts is included
    while step < config.steps:
        losses.append(_step(model, optimizer, _batch(tokenizer, config, step), _learning_rate(config, step)))
        step += 1
        seconds = time.monotonic() - started
        if step % _REPORT_EVERY == 0:
            line = {"step": step, "loss": round(sum(losses) / len(losses), 4), "seconds": round(seconds)}
            add_metrics(log, line)
            report(f"{json.dumps(line)}, {seconds / step * (config.steps - step) / 60:.0f} minutes left")
            losses = []
        if step % config.checkpoint_every == 0 or step == config.steps:
            progress = {"step": step, "seconds": seconds, "losses": losses, "config": asdict(config)}
            _save(checkpoint, model, optimizer, progress)
    _export(output, model, tokenizer, {**asdict(config), "steps_done": step, "seconds": round(seconds)})


def _export(output: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, facts: dict[str, Any]) -> None:
    """Write the model folder: weights, tokenizer, prompt templates, and a record of the training."""
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    # safetensors writes files that only this user may read.
    for weights in output.glob("*.safetensors"):
        open_to_umask(weights)
    shutil.copytree(_TEMPLATES, output / "templates", dirs_exist_ok=True)
    write_json(output / "pretrain.json", facts)
