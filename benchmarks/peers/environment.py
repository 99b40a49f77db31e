"""The environment of the peers: TRL and lm-eval with the newest transformers that they support, and this project's torch.

python benchmarks/peers/environment.py        builds .venv-peers (once) and prints its interpreter

The variable SELFEVAL_PEERS names the interpreter of another environment that has them.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".venv-peers"
PACKAGES = ("trl", "lm-eval", "peft")


def interpreter() -> Path | None:
    """Return the interpreter of the environment, or None if it is not built."""
    found = Path(os.environ.get("SELFEVAL_PEERS", FOLDER / "bin" / "python"))
    if not found.is_file():
        return None
    check = subprocess.run([found, "-c", "import lm_eval, peft, trl"], capture_output=True, check=False)
    return found if check.returncode == 0 else None


def build() -> Path:
    """Build the environment unless it is there, and return its interpreter."""
    found = interpreter()
    if found is not None:
        return found
    torch = re.search(r"^torch==\S+$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert torch is not None
    venv.create(FOLDER, with_pip=True, clear=True)
    python = FOLDER / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, torch.group()], check=True)  # first and alone: no other requirement may choose its version
    subprocess.run([*pip, torch.group(), *PACKAGES], check=True)
    return python


if __name__ == "__main__":
    print(build())
    sys.exit(0)
