"""Decode steps without module overhead against the model's own pass: CPU time of one token per row.

python benchmarks/decoding.py [--model FOLDER] [--rows 4 24 64 256] [--tokens 24]

Both passes process the same tokens after the same prompts of 40 tokens, on one thread, in turns, five times each; the median
CPU time counts. The logits of both are compared.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import write
from torch import Tensor

from selfeval.backbone.adapters import BASE
from selfeval.backbone.decode_step import DecodeStep
from selfeval.backbone.families.cache import preallocated_cache, state_arguments
from selfeval.backbone.roles import Backbone
from selfeval.config.load import load_config
from selfeval.training.context import POLICY

MODEL = Path(__file__).resolve().parents[1] / "src" / "selfeval" / "lab" / "word_problems"
PROMPT, ROUNDS = 40, 5


def decoded(backbone: Backbone, step: DecodeStep | None, rows: int, tokens: int) -> tuple[float, Tensor]:
    """Return the CPU milliseconds of one step, and the logits `[tokens, rows, V]`; by the model's own pass without `step`."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, backbone.model.config.vocab_size, (rows, PROMPT + tokens), generator=generator)
    attention = torch.ones(rows, PROMPT + tokens, dtype=torch.long)
    cache = preallocated_cache(backbone.model.config, tokens)
    found = []

    def passed(start: int, stop: int) -> Tensor:
        arguments = state_arguments(backbone.loaded, cache, attention[:, :stop], stop - start)
        positions = torch.arange(start, stop).expand(rows, -1)
        last = torch.tensor([stop - start - 1])
        output = backbone.model(ids[:, start:stop], position_ids=positions, use_cache=True, logits_to_keep=last, **arguments)
        logits: Tensor = output.logits[:, -1]
        return logits

    passed(0, PROMPT)
    started = time.process_time()
    for end in range(PROMPT + 1, PROMPT + tokens + 1):
        logits = passed(end - 1, end) if step is None else step.logits(ids[:, end - 1 : end], attention[:, :end], cache)[:, -1]
        found.append(logits)
    return 1000 * (time.process_time() - started) / tokens, torch.stack(found)


@torch.no_grad()
def compared(backbone: Backbone, role: str, rows: int, tokens: int) -> dict[str, Any]:
    """Return the median times of both passes under a role, and the largest difference of their logits."""
    step = backbone.decode_step()
    if step is None:
        raise SystemExit("this model has its own pass only; choose an unquantised Llama, Mistral, Qwen 2 or Qwen 3")
    with backbone.acting_as(role):
        runs = [(decoded(backbone, None, rows, tokens), decoded(backbone, step, rows, tokens)) for _ in range(ROUNDS)]
    own, ours = median(a for (a, _), _ in runs), median(b for _, (b, _) in runs)
    ratio = median(a / b for (a, _), (b, _) in runs)
    difference = max(float((a - b).abs().max()) for (_, a), (_, b) in runs)
    return {
        "role": role,
        "rows": rows,
        "own_ms": round(own, 2),
        "step_ms": round(ours, 2),
        "ratio": round(ratio, 2),
        "largest_difference": difference,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL))
    parser.add_argument("--rows", type=int, nargs="+", default=[4, 24, 64, 256])
    parser.add_argument("--tokens", type=int, default=24)
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = load_config(None, {"model": options.model}, ["backbone.device=cpu", "backbone.precision=fp32"])
    backbone = Backbone.load(config.model, config.backbone)
    backbone.roles.add(POLICY)
    found = [compared(backbone, role, rows, options.tokens) for role in (BASE, POLICY) for rows in options.rows]
    for row in found:
        print(row)
    if options.model == str(MODEL):
        write("decoding", "python benchmarks/decoding.py", {"tokens": options.tokens, "rounds": ROUNDS, "steps": found})


if __name__ == "__main__":
    main()
