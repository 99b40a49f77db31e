"""Perplexity beyond the trained length, with each way of scaling RoPE, before and after a short tuning of an adapter.

python benchmarks/long_context.py --model stories260K --text tinystories_1000.json.xz

The model is one trained on short stories in rows of 512 tokens, one story after the other; the text is real stories of that
kind, packed the same way (a JSON list of texts, xz-compressed). Every context length is tested on the same tokens: the last
256 of each window, with an increasing part of the window before them. Stories are independent, so a longer context can improve
little here; the test shows what it loses.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import write

from selfeval.backbone.adapters import BASE
from selfeval.backbone.load import load_model
from selfeval.backbone.roles import Backbone
from selfeval.config import ContextConfig, LoraConfig, TuningConfig
from selfeval.quality.statistics import mean_figure
from selfeval.store import read_json, write_json
from selfeval.training.checkpoint import Checkpoints
from selfeval.training.sft import pack, text_logprobs, tune_on_text

MULTIPLES = (1, 2, 4, 8)
LONGEST = MULTIPLES[-1]
METHODS = ("none", "linear", "dynamic", "yarn")
TAIL = 256
ROLE = "reader"
Rows = list[tuple[int, ...]]


def read_documents(path: Path, tokenizer: Any) -> list[list[int]]:
    """Return the texts as token ids, each after the beginning-of-sequence token."""
    texts = json.loads(lzma.decompress(path.read_bytes()))
    return [[tokenizer.bos_token_id, *tokenizer.encode(text.strip(), add_special_tokens=False)] for text in texts]


def tuning_rows(documents: Sequence[Sequence[int]], trained: int, count: int) -> Rows:
    """Return rows of distinct text: of ten, one has 8 times the trained length, two have 4 times, seven twice."""
    stream = [token for document in documents for token in document]
    rows, start = [], 0
    for number in range(count):
        length = trained * (8, 4, 4, 2, 2, 2, 2, 2, 2, 2)[number % 10]
        rows.append(tuple(stream[start : start + length]))
        start += length
    if start > len(stream):
        raise SystemExit(f"the text has {len(stream)} tokens to tune on; {start} are needed")
    return rows


def loaded(model: Path, method: str, factor: float) -> Backbone:
    """Return the model with an extended context; without a method only its limit is lifted, and its angles stay as trained."""
    context = ContextConfig(rope_scaling=method, rope_factor=1.0 if method == "none" else factor)  # type: ignore[arg-type]
    model_loaded = load_model(str(model), device="cpu", precision="fp32", context=context)
    if method == "none":
        config: Any = model_loaded.model.config
        config.max_position_embeddings = int(config.max_position_embeddings * factor)
    return Backbone(model_loaded, LoraConfig(rank=16, alpha=32), model.name)


def perplexity(values: Sequence[float]) -> dict[str, Any]:
    """Return the perplexity and its interval from each window's loss in nats per token (Student over windows)."""
    figure = mean_figure(values, bounds=None).as_json()
    return {k: v if k == "n" or v is None else round(math.exp(v), 4) for k, v in figure.items()}


def measure(backbone: Backbone, role: str, windows: Rows, trained: int, multiples: Sequence[int]) -> dict[str, Any]:
    """Return the perplexity of the last tokens, and of all, at each multiple of the trained length."""
    found: dict[str, Any] = {}
    with backbone.acting_as(role):
        for multiple in multiples:
            rows = [window[-trained * multiple :] for window in windows]
            losses = [[-x for x in row] for row in text_logprobs(backbone, rows, trained * LONGEST)]
            tails = [sum(row[-TAIL:]) / TAIL for row in losses]
            found[str(multiple)] = {
                "last": perplexity(tails),
                "all": perplexity([sum(row) / len(row) for row in losses]),
                "last_nats": [round(t, 5) for t in tails],
            }
    return found


def tuned(backbone: Backbone, rows: Rows, config: TuningConfig) -> dict[str, float]:
    """Tune an adapter; return its CPU time, and the loss of its first and last ten steps."""
    backbone.add_role(ROLE)
    lines: list[dict[str, float]] = []
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        tune_on_text(
            backbone,
            ROLE,
            rows,
            config,
            lambda optimizers: Checkpoints(Path(folder), backbone, [ROLE], optimizers),
            seed=0,
            batch_tokens=max(map(len, rows)),
            log=lines.append,
        )
    ends = {name: sum(line["loss"] for line in part) / 10 for name, part in (("first", lines[:10]), ("last", lines[-10:]))}
    return {
        "cpu_seconds": round(time.process_time() - started, 1),
        **{f"loss_{name}": round(value, 4) for name, value in ends.items()},
    }


def against_trained_length(arm: dict[str, Any], reference: Sequence[float]) -> None:
    """Add the paired difference, in nats per token, from the unchanged model at its trained length on the same tokens."""
    for values in arm.values():
        pairs = zip(values.pop("last_nats"), reference, strict=True)
        values["last_minus_trained"] = mean_figure([a - b for a, b in pairs], bounds=None).as_json()


def examined(method: str, model: Path, rows: Rows, windows: Rows, trained: int, config: TuningConfig) -> dict[str, Any]:
    """Measure one method: return its arms, the figures of its tuning, and the total CPU time."""
    started = time.process_time()
    backbone = loaded(model, method, LONGEST)
    arms = {method: measure(backbone, BASE, windows, trained, MULTIPLES)}
    if method == "dynamic":
        backbone.model.config.rope_parameters["factor"] = float(LONGEST)
        arms["dynamic, transformers' own factor"] = measure(backbone, BASE, windows, trained, MULTIPLES)
        backbone.model.config.rope_parameters["factor"] = 1.0
    if method in ("linear", "yarn"):
        arms[f"{method}, factor as needed"] = {}
        for multiple in MULTIPLES[1:-1]:
            arms[f"{method}, factor as needed"] |= measure(loaded(model, method, multiple), BASE, windows, trained, (multiple,))
    tuning = tuned(backbone, rows, config)
    arms[f"{method}, tuned"] = measure(backbone, ROLE, windows, trained, MULTIPLES)
    return {"arms": arms, "tuning": tuning, "cpu_seconds": round(time.process_time() - started, 1)}


def kept(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the result of `make`, or read it from the file if that exists."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, make())
    found: dict[str, Any] = read_json(path)
    return found


def main() -> None:
    shared = Path(__file__).resolve().parents[1].parent / "shared"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=shared / "models" / "stories260K")
    parser.add_argument("--text", type=Path, default=shared / "data" / "text" / "tinystories_1000.json.xz")
    parser.add_argument("--windows", type=int, default=12, help="windows of 8 times the trained length to measure on")
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--keep", type=Path, help="folder for what is finished, so that a stopped benchmark goes on")
    parser.add_argument("--only", choices=METHODS, help="measure this method into --keep and stop there")
    options = parser.parse_args()
    if options.only and not options.keep:
        parser.error("--only needs --keep")

    backbone = loaded(options.model, "none", 1)
    trained = backbone.loaded.context_length
    assert trained is not None
    documents = read_documents(options.text, backbone.loaded.tokenizer)
    split = len(documents) * 6 // 10  # the learning rate was chosen on stories near this one; the last ones are measured
    rows = tuning_rows(documents[:split], trained, options.steps)
    windows = pack(documents[split:], trained * LONGEST)[-options.windows :]
    config = TuningConfig(steps=options.steps, learning_rate=options.learning_rate, checkpoint_every=options.steps)

    parts: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for method in (options.only,) if options.only else METHODS:
            path = (options.keep or Path(temporary)) / f"{method}.json"
            parts[method] = kept(path, lambda: examined(method, options.model, rows, windows, trained, config))  # noqa: B023
            for name, arm in parts[method]["arms"].items():
                print(name, {k: v["last"]["value"] for k, v in arm.items()}, flush=True)
    if options.only:
        return
    arms = {name: arm for part in parts.values() for name, arm in part["arms"].items()}
    reference = list(arms["none"]["1"]["last_nats"])
    for arm in arms.values():
        against_trained_length(arm, reference)
    figures = {
        "model": options.model.name,
        "text": options.text.name,
        "trained_length": trained,
        "factor": LONGEST,
        "windows": len(windows),
        "last_tokens": TAIL,
        "threads": torch.get_num_threads(),
        "tuning": {
            **config.model_dump(exclude={"checkpoint_every"}),
            "tokens": sum(map(len, rows)),
            "methods": {method: part["tuning"] for method, part in parts.items()},
        },
        "arms": arms,
        "cpu_seconds": round(sum(part["cpu_seconds"] for part in parts.values()), 1),
    }
    write("long_context", f"python benchmarks/long_context.py --model {options.model.name} --text {options.text.name}", figures)


if __name__ == "__main__":
    main()
