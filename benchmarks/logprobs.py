"""Compare chunked log-probs with the plain version (all logits, log-softmax, gather, autograd): memory and time.

Memory: peak resident size of a fresh process minus that before the call (head, hidden states, targets). Time: medians of
forward and backward, alternating between the two versions in one process. Seconds are CPU seconds of the process, which other
processes affect little; the ratio of wall times is reported as well. The head is random, without a model.

python benchmarks/logprobs.py [--threads 1] [--rounds 5]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from common import write
from torch import Tensor, nn

from selfeval.backbone.logprobs import Measure, token_logprobs
from selfeval.backbone.output_head import OutputHead

VOCABULARY = 131072


@dataclass(frozen=True)
class Case:
    """One shape and its outputs: `logprobs` (as a PPO step needs them: entropy as a value), or `all` with all gradients."""

    tokens: int
    width: int
    dtype: str
    asked: str
    cap: float | None = None


MEMORY = (Case(16384, 64, "float32", "logprobs"), Case(16384, 64, "float32", "all", cap=30.0))
PLAIN_MEMORY = (Case(512, 64, "float32", "logprobs"),)
"""At 16384 tokens the plain version holds at least three times 8 GiB."""
TIME = (
    Case(256, 64, "float32", "logprobs"),
    Case(256, 64, "float32", "all"),
    Case(128, 1024, "float32", "logprobs"),
    Case(128, 1024, "float32", "all"),
    Case(128, 1024, "bfloat16", "logprobs"),
)


@dataclass(frozen=True)
class Head:
    output_head: OutputHead


@dataclass(frozen=True)
class Problem:
    """Create a random head with a bias, hidden states of two roles, and targets."""

    case: Case
    head: Head
    hidden: Tensor
    other: Tensor
    targets: Tensor

    @classmethod
    def of(cls, case: Case) -> Problem:
        torch.manual_seed(0)
        dtype = getattr(torch, case.dtype)
        linear = nn.Linear(case.width, VOCABULARY, dtype=dtype).requires_grad_(False)
        hidden, other = (torch.randn(1, case.tokens, case.width).to(dtype) for _ in range(2))
        targets = torch.randint(VOCABULARY, (1, case.tokens))
        return cls(case, Head(OutputHead(linear, VOCABULARY, 1.0, case.cap)), hidden.requires_grad_(), other, targets)


def ours(problem: Problem) -> Tensor:
    """Run forward and backward; return the gradient of the hidden states."""
    everything = problem.case.asked == "all"
    measures: tuple[Measure, ...] = ("logprobs", "entropy", "kl") if everything else ("logprobs",)
    mask = torch.ones_like(problem.targets, dtype=torch.bool)
    other = problem.other if everything else None
    found = token_logprobs(
        problem.head, problem.hidden, problem.targets, mask, entropy=True, other_BRD=other, gradient=measures
    )
    return _gradient(problem, [v for v in found if v is not None and v.requires_grad])


def plain(problem: Problem) -> Tensor:
    """Compute the same with all logits in memory."""
    everything = problem.case.asked == "all"
    logp = torch.log_softmax(problem.head.output_head.logits(problem.hidden), -1)
    outputs = [logp.gather(-1, problem.targets[..., None])[..., 0]]
    with torch.set_grad_enabled(everything):
        entropy = -(logp.exp() * logp).sum(-1)
    if everything:
        with torch.no_grad():
            other = torch.log_softmax(problem.head.output_head.logits(problem.other), -1)
        outputs += [entropy, (logp.exp() * (logp - other)).sum(-1)]
    return _gradient(problem, outputs)


def _gradient(problem: Problem, outputs: list[Tensor]) -> Tensor:
    loss = sum(weight * values.sum() for weight, values in zip((1.0, 0.1, 0.2), outputs, strict=False))
    return torch.autograd.grad(loss, problem.hidden)[0]


VERSIONS = {"ours": ours, "plain": plain}


def _status(key: str) -> int:
    """Return one field of /proc/self/status in bytes."""
    line = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(key))
    return int(line.split()[1]) * 1024


def extra_peak(version: str, case: Case) -> dict[str, Any]:
    """Return the peak memory of this process during one forward and backward, minus that before."""
    problem = Problem.of(case)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    idle = _status("VmRSS")
    VERSIONS[version](problem)
    logits = case.tokens * VOCABULARY * 4
    return {"extra_peak_mib": round((_status("VmHWM") - idle) / 2**20, 1), "all_logits_fp32_mib": logits // 2**20}


def ratio(case: Case, rounds: int) -> dict[str, Any]:
    """Return medians over alternating runs, and the difference of the gradients."""
    problem = Problem.of(case)
    gradients = {name: run(problem).float() for name, run in VERSIONS.items()}  # also the warm-up
    cpu, wall = ({name: [] for name in VERSIONS} for _ in range(2))
    for _ in range(rounds):
        for name, run in VERSIONS.items():
            started, began = time.process_time(), time.perf_counter()
            run(problem)
            cpu[name].append(time.process_time() - started)
            wall[name].append(time.perf_counter() - began)
    middle = {name: statistics.median(values) for name, values in cpu.items()}
    slow = {name: statistics.median(values) for name, values in wall.items()}
    apart = (gradients["ours"] - gradients["plain"]).abs().max().item()
    return {
        "plain_seconds": round(middle["plain"], 3),
        "ours_seconds": round(middle["ours"], 3),
        "ratio": round(middle["ours"] / middle["plain"], 3),
        "ratio_wall": round(slow["ours"] / slow["plain"], 3),
        "rounds": rounds,
        "largest_gradient_difference": apart,
        "largest_gradient": gradients["plain"].abs().max().item(),
    }


def _fresh(options: argparse.Namespace, kind: str, version: str, case: Case) -> dict[str, Any]:
    """Run one measurement in a separate process."""
    order = json.dumps({"kind": kind, "version": version, "case": asdict(case)})
    command = [sys.executable, __file__, "--threads", str(options.threads), "--rounds", str(options.rounds), "--measure", order]
    answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    row = {"version": version, **asdict(case), **json.loads(answer.splitlines()[-1])}
    print(json.dumps(row), flush=True)
    return row


def _measure(order: dict[str, Any], rounds: int) -> dict[str, Any]:
    case = Case(**order["case"])
    return extra_peak(order["version"], case) if order["kind"] == "memory" else ratio(case, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.measure:
        print(json.dumps(_measure(json.loads(options.measure), options.rounds)))
        return
    memory = [_fresh(options, "memory", "ours", case) for case in MEMORY]
    memory += [_fresh(options, "memory", "plain", case) for case in PLAIN_MEMORY]
    times = [_fresh(options, "time", "both", case) for case in TIME]
    targets = {
        "extra peak <= 64 MiB at vocabulary 128k, 16k tokens": all(
            row["extra_peak_mib"] <= 64 for row in memory if row["version"] == "ours"
        ),
        "log-probs and their gradient: time <= 1.05 x plain": all(
            r["ratio"] <= 1.05 for r in times if r["asked"] == "logprobs"
        ),
        "with gradients of entropy and KL: time <= 1.05 x plain": all(r["ratio"] <= 1.05 for r in times if r["asked"] == "all"),
    }
    for name, met in targets.items():
        print(f"{name:60} {met}")
    note = f"{options.threads} thread(s) on a CPU, no GPU"
    write(
        "logprobs",
        "python benchmarks/logprobs.py",
        {"on": note, "vocabulary": VOCABULARY, "targets": targets, "memory": memory, "time": times},
    )


if __name__ == "__main__":
    main()
