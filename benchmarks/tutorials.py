"""Follow a tutorial from top to bottom at the sizes on its page, and keep what its commands print.

python benchmarks/tutorials.py NAME [--model FOLDER] [--only COMMAND] [--folder build/tutorials]

NAME is a page of docs/tutorials: mathematics, code or writing. Its files are written to FOLDER/NAME, its Python blocks and
commands run there with one thread, and `path/to/model` is the embedded model or another folder (`smollm2`:
SmolLM2-135M-Instruct, from real_model.py). A command that fails is kept with its message; the commands after it still run.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import write
from real_model import model_folder

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "docs"))

from snippets import SHELL, Block, blocks, commands  # noqa: E402

EMBEDDED = ROOT / "src" / "selfeval" / "lab" / "word_problems"


def follow(page: Path, model: Path, folder: Path, only: str | None) -> Iterator[dict[str, Any]]:
    """Yield what each command of a page printed, or each `selfeval ONLY`."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(model, folder / "path" / "to" / "model")
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    for block in blocks(page):
        yield from _follow_block(block, folder, only)


def _follow_block(block: Block, folder: Path, only: str | None) -> Iterator[dict[str, Any]]:
    if block.title:
        (folder / block.title).write_text(block.text, encoding="utf-8")
    elif block.language == "python" and not only:
        yield _run(block.text, ["-c", block.text], folder)
    elif block.language in SHELL:
        yield from (_run(line, _arguments(line), folder) for line in commands(block.text) if only in (None, line.split()[1]))


def _arguments(line: str) -> list[str]:
    program, *words = shlex.split(line, comments=True)
    return words if program == "python" else ["-m", program, *words]


def _run(name: str, arguments: list[str], folder: Path) -> dict[str, Any]:
    started = time.monotonic()
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100", "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *arguments], cwd=folder, env=variables, capture_output=True, text=True, check=False
    )
    print(f"{name.splitlines()[0]}: exit code {done.returncode}")
    error = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    written = {"code": done.returncode, "seconds": round(time.monotonic() - started), "out": done.stdout.splitlines()}
    return {"command": name, **written, **({"error": error[-1]} if error else {})}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="page of docs/tutorials")
    parser.add_argument("--model", default=str(EMBEDDED), help="model folder, or smollm2")
    parser.add_argument("--only", metavar="COMMAND", help="run only the commands `selfeval COMMAND`, such as check")
    parser.add_argument("--folder", type=Path, default=Path("build/tutorials"))
    options = parser.parse_args()
    model = model_folder() if options.model == "smollm2" else Path(options.model)
    page, folder = ROOT / "docs" / "tutorials" / f"{options.name}.md", (options.folder / options.name).resolve()
    command = f"python benchmarks/tutorials.py {options.name}"
    command += "" if model == EMBEDDED else f" --model {options.model}"
    command += f" --only {options.only}" if options.only else ""
    printed = list(follow(page, model, folder, options.only))
    text = json.dumps({"model": model.name, "printed": printed}).replace(f"{folder}/", "")
    # The page shows the results of the whole of it on the embedded model; others have other names.
    other = "".join(f"_{Path(name).name}" for name in (options.model if model != EMBEDDED else "", options.only) if name)
    write(f"tutorial_{options.name}{other}", command, json.loads(text))


if __name__ == "__main__":
    main()
