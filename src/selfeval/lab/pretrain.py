"""Pretrains the embedded model from nothing: tokenizer, random weights, AdamW (or Muon) on generated text.

Every step draws its own documents from `(seed, step)`, so a run that is killed goes on from its last checkpoint and ends
where it would have ended. Checkpoints lie in the output folder until the run is done; the model folder is written last.
"""

from __future__ import annotations

import json
import math
import os
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from selfeval.lab.corpus import Document, draw_document
from selfeval.lab.vocabulary import train_tokenizer

__all__ = ["PretrainConfig", "pretrain"]


@dataclass(frozen=True)
class PretrainConfig:
    """What `selfeval lab pretrain` trains, and for how long; the shipped model used these values."""

    seed: int = 0
    steps: int = 24_000
    rows: int = 8
    length: int = 192
    learning_rate: float = 2e-3
    optimizer: str = "adamw"
    muon_learning_rate: float = 0.02
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
    """`rows` lists of whole documents, each list at most `length` tokens long; what does not fit waits for the next row."""
    waiting: list[tuple[list[int], list[float]]] = []
    packed = []
    for _ in range(rows):
        row: list[tuple[list[int], list[float]]] = []
        room, misses = length, 0
        while misses < 4:
            fitting = next((d for d in waiting if len(d[0]) <= room), None)
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
    """Token ids, positions (restarting at each document), and loss weights, `[rows, length]`."""
    rng = random.Random(f"{config.seed}/{step}")
    shape = (config.rows, config.length)
    ids, positions = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    weights = torch.zeros(shape)
    for r, row in enumerate(_packed_rows(tokenizer, rng, config.rows, config.length)):
        start = 0
        for tokens, token_weights in row:
            end = start + len(tokens)
            ids[r, start:end] = torch.tensor(tokens)
            positions[r, start:end] = torch.arange(len(tokens))
            weights[r, start:end] = torch.tensor(token_weights)
            weights[r, start] = 0.0
            start = end
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


def _optimizers(model: LlamaForCausalLM, config: PretrainConfig) -> list[torch.optim.Optimizer]:
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    if config.optimizer == "muon":
        muon = torch.optim.Muon(matrices, lr=config.muon_learning_rate, weight_decay=config.weight_decay)
        return [muon, torch.optim.AdamW(others, lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return [torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=True)]


def _schedule(config: PretrainConfig) -> Callable[[int], float]:
    def factor(step: int) -> float:
        if step < config.warmup:
            return (step + 1) / config.warmup
        progress = (step - config.warmup) / max(1, config.steps - config.warmup)
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return factor


def _loss(model: LlamaForCausalLM, batch: dict[str, Tensor]) -> Tensor:
    logits = model(input_ids=batch["ids"], position_ids=batch["positions"], use_cache=False).logits[:, :-1]
    weights = batch["weights"][:, 1:]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["ids"][:, 1:], reduction="none")
    return (losses * weights).sum() / weights.sum()


def _save(path: Path, **state: object) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def pretrain(output: Path, config: PretrainConfig, report: Callable[[str], None] = print) -> None:
    """Trains the model and writes an ordinary Hugging Face folder (config, safetensors, tokenizer) to `output`.

    Args:
        output: the folder; `checkpoint.pt` and `pretrain.jsonl` lie in it while the run goes on.
        config: sizes, steps and rates.
        report: called with a line of progress every 100 steps.
    """
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(config.seed)
    model = _model(config, tokenizer)
    optimizers = _optimizers(model, config)
    schedulers = [torch.optim.lr_scheduler.LambdaLR(o, _schedule(config)) for o in optimizers]
    checkpoint, step, seconds = output / "checkpoint.pt", 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for scheduler, saved in zip(schedulers, state["schedulers"], strict=True):
            scheduler.load_state_dict(saved)
        step, seconds = int(state["step"]), float(state["seconds"])
        report(f"going on from step {step}")
    started, total, tokens = time.monotonic() - seconds, 0.0, 0
    while step < config.steps:
        batch = _batch(tokenizer, config, step)
        loss = _loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        total += loss.item()
        tokens += batch["ids"].numel()
        if step % 100 == 0:
            line = {"step": step, "loss": round(total / 100, 4), "seconds": round(time.monotonic() - started)}
            with (output / "pretrain.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
            report(json.dumps(line))
            total = 0.0
        if step % config.checkpoint_every == 0 or step == config.steps:
            _save(
                checkpoint,
                model=model.state_dict(),
                optimizers=[o.state_dict() for o in optimizers],
                schedulers=[s.state_dict() for s in schedulers],
                step=step,
                seconds=time.monotonic() - started,
            )
            model.save_pretrained(output)
            tokenizer.save_pretrained(output)
            (output / "pretrain.json").write_text(json.dumps({**asdict(config), "done": step}, indent=1))
