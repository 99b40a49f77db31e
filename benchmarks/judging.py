"""Verdicts on pairs in both orders and scores of an evaluator, against Hugging Face and the limit, on three models.

python benchmarks/judging.py [--models embedded llama-30m smollm2-135m] [--rounds 3] [--requests 256]

Calls the function of `selfeval bench judge` on the models of benchmarks/rollout.py, one thread. Models that are not asked for
keep their earlier figures.
"""

from __future__ import annotations

from typing import Any

from common import write

from rollout import arguments, measured, say

SIZES: dict[str, dict[str, int]] = {
    "embedded": {"prompt_tokens": 24, "reply_tokens": 24},
    "llama-30m": {"prompt_tokens": 32, "reply_tokens": 64},
    "smollm2-135m": {"prompt_tokens": 32, "reply_tokens": 64},
}


def main() -> None:
    asked = arguments(__doc__, SIZES)

    def measure(options: Any, model: str) -> dict[str, Any]:
        from selfeval.bench.judge import bench_judge

        return bench_judge(options, requests=asked.requests, **SIZES[model], report_progress=say(model)).as_json()

    write("judging", "python benchmarks/judging.py", measured("judging", asked, measure, "judging.py"))


if __name__ == "__main__":
    main()
