"""Shared helpers of the benchmarks: describe the machine, run the command, write results."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
SMALL = (
    "questions.train=48",
    "questions.test=16",
    "verdicts.keep=0.5",
    "evaluator.batch=8",
    "policy.gate=off",
    "policy.iterations=4",
    "backbone.lora.rank=4",
)
"""Settings of a run of a minute, whose policy and evaluator are good for nothing but their files."""


def machine() -> dict[str, Any]:
    """Return cores, memory and versions of this machine."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(pages / 2**30, 1),
        "processor": platform.machine(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "peft")},
    }


def selfeval(*arguments: str) -> float:
    """Run the command in a separate process and return its wall time in seconds."""
    started = time.monotonic()
    subprocess.run([sys.executable, "-m", "selfeval", *arguments], check=True)
    return time.monotonic() - started


def resident_mib() -> float:
    """Return the resident memory of this process in MiB (Linux)."""
    fields = Path("/proc/self/statm").read_text(encoding="ascii").split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def measured_anew(script: str, kind: str, count: int) -> dict[str, Any]:
    """Run `script --measure KIND --sizes COUNT` in a separate process and return the figures that it prints as JSON."""
    command = [sys.executable, script, "--measure", kind, "--sizes", str(count)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    print(kind, count, found, flush=True)
    return found


def write(name: str, command: str, figures: dict[str, Any]) -> Path:
    """Write results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"command": command, "machine": machine(), **figures}, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")
    return path
