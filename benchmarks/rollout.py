"""Sampling and log-probs of replies against Hugging Face and the limit, on three models.

python benchmarks/rollout.py [--models embedded llama-30m smollm2-135m] [--rounds 3] [--requests 256]

Calls the functions of `selfeval bench rollout`, with one and with eight replies per prompt, and of `selfeval bench logprobs`,
with one thread, on the embedded model, a random Llama of 30 million parameters (`step.make_model`) and, if
benchmarks/real_model.py has converted it, SmolLM2-135M. Models that are not asked for keep their earlier figures.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import RESULTS, write
from real_model import CACHE
from step import make_model

MODELS = ("embedded", "llama-30m", "smollm2-135m")
SIZES: dict[str, dict[str, int]] = {
    "embedded": {"prompt_tokens": 32, "reply_tokens": 32},
    "llama-30m": {"prompt_tokens": 128, "reply_tokens": 64},
    "smollm2-135m": {"prompt_tokens": 128, "reply_tokens": 64},
}


def arguments(description: str | None, sizes: dict[str, dict[str, int]]) -> argparse.Namespace:
    """Return the parsed options of this script or of judging.py."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=sizes, default=list(sizes))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=256)
    return parser.parse_args()


def measured(name: str, asked: argparse.Namespace, measure: Callable[[Any, str], dict[str, Any]], file: str) -> dict[str, Any]:
    """Return the figures of each model, with earlier ones of models that are not asked for.

    Args:
        name: name of the results file.
        asked: parsed options.
        measure: returns the figures with options of the measurement and the name of a model.
        file: name of the script, for messages.
    """
    from selfeval.bench.workloads import BenchOptions

    known = RESULTS / f"{name}.json"
    before = json.loads(known.read_text(encoding="utf-8")) if known.is_file() else {}
    figures: dict[str, Any] = {model: before[model] for model in MODELS if model in before}
    for model in asked.models:
        if model == "smollm2-135m" and not (CACHE / "config.json").is_file():
            print(f"{file}: {model} is left out: {CACHE} does not exist; benchmarks/real_model.py creates it")
            continue
        with tempfile.TemporaryDirectory() as home:
            folder = CACHE if model == "smollm2-135m" else make_model(model, Path(home) / "model")
            options = BenchOptions(str(folder), "cpu", "fp32", threads=1, rounds=asked.rounds)
            figures[model] = measure(options, model)
    return figures


def say(model: str) -> Callable[[str], None]:
    return lambda text: print(f"{model}: {text}", flush=True)


def main() -> None:
    asked = arguments(__doc__, SIZES)

    def measure(options: Any, model: str) -> dict[str, Any]:
        from selfeval.bench.logprobs import bench_logprobs
        from selfeval.bench.rollout import bench_rollout

        sizes = {"requests": asked.requests, **SIZES[model]}
        return {
            "rollout": {
                f"n={n}": bench_rollout(options, samples=n, **sizes, report_progress=say(model)).as_json() for n in (1, 8)
            },
            "logprobs": bench_logprobs(options, **sizes, report_progress=say(model)).as_json(),
        }

    write("rollout", "python benchmarks/rollout.py", measured("rollout", asked, measure, "rollout.py"))


if __name__ == "__main__":
    main()
