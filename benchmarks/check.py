"""`selfeval check` on models that can and cannot judge: what it recommends, why, and the CPU time that it takes.

python benchmarks/check.py [embedded random stories260K smollm2] [--minutes 3]

- embedded: the embedded model with its seeds and its oracle, so labels are compared with gold. It has to be recommended;
- random: a Llama with random weights and the embedded model's tokenizer, with the same seeds. It has to be rejected;
- stories260K: a model of children's stories with 260,000 parameters (`--stories FOLDER`), with the same seeds. It has to be
  rejected;
- smollm2: SmolLM2-135M-Instruct as converted by real_model.py (or `--model FOLDER`), with the general questions of that script
  as seeds.

Results of models that are not named, or not there, stay in results/check.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import RESULTS, write
from real_model import CACHE, GENERAL

ROOT = Path(__file__).resolve().parents[1]
LAB_SEEDS = ROOT / "src" / "selfeval" / "lab" / "seeds.jsonl"
STORIES = ROOT.parent / "shared" / "models" / "stories260K"
NAMES = ("embedded", "random", "stories260K", "smollm2")


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def check(arguments: list[str], minutes: float) -> dict[str, Any]:
    """Run the command, and return its JSON without paths, with its times."""
    with tempfile.TemporaryDirectory() as folder:
        output, before, started = Path(folder) / "check.json", _cpu_seconds(), time.monotonic()
        command = [sys.executable, "-m", "selfeval", "check", *arguments, "--minutes", f"{minutes:g}", "--output", str(output)]
        code = subprocess.run(command, check=False).returncode
        if code not in (0, 3):
            raise SystemExit(f"{' '.join(command)} ended with exit code {code}")
        times = {"cpu_seconds": round(_cpu_seconds() - before, 1), "wall_seconds": round(time.monotonic() - started, 1)}
        found = json.loads(output.read_text("utf-8"))
    left_out = ("model", "command", "memory", "time")
    return {"exit_code": code, **times, **{name: value for name, value in found.items() if name not in left_out}}


def arguments_of(name: str, folder: Path, options: argparse.Namespace) -> list[str] | None:
    """Return the model and seeds of a check; None if the model is not there."""
    if name == "embedded":
        return []
    if name == "random":
        subprocess.run([sys.executable, str(ROOT / "tests" / "tiny_llama.py"), str(folder / "random")], check=True)
        return [str(folder / "random"), str(LAB_SEEDS)]
    model = options.stories if name == "stories260K" else options.model
    if not model.is_dir():
        print(f"{name} is left out: {model} is not there")
        return None
    if name == "stories260K":
        return [str(model), str(LAB_SEEDS)]
    seeds = folder / "general.txt"
    seeds.write_text("\n".join(GENERAL) + "\n", encoding="utf-8")
    return [str(model), str(seeds)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=[*NAMES], choices=NAMES, help="models to check")
    parser.add_argument("--minutes", type=float, default=3.0, help="time budget of each check")
    parser.add_argument("--stories", type=Path, default=STORIES, help="folder of stories260K")
    parser.add_argument("--model", type=Path, default=CACHE, help="folder of SmolLM2-135M-Instruct")
    options = parser.parse_args()
    known = RESULTS / "check.json"
    models = json.loads(known.read_text("utf-8"))["models"] if known.is_file() else {}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.names:
            arguments = arguments_of(name, Path(folder), options)
            if arguments is not None:
                models[name] = check(arguments, options.minutes)
                write("check", "python benchmarks/check.py", {"models": models})


if __name__ == "__main__":
    main()
