"""The environment of the client scripts: the dependency group `clients` of pyproject.toml.

python examples/clients/environment.py        builds .venv-clients (once) and prints its interpreter

The variable SELFEVAL_CLIENTS names the interpreter of another environment that has them.
"""

from __future__ import annotations

import os
import subprocess
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".venv-clients"


def interpreter() -> Path | None:
    """Return the interpreter of the environment, or None if it is not built."""
    found = Path(os.environ.get("SELFEVAL_CLIENTS", FOLDER / "bin" / "python"))
    if not found.is_file():
        return None
    code = "from importlib.metadata import version; [version(n) for n in ('cohere', 'langchain-openai', 'litellm', 'openai')]"
    check = subprocess.run([found, "-c", code], capture_output=True, check=False)
    return found if check.returncode == 0 else None


def build() -> Path:
    """Build the environment unless it is there, and return its interpreter."""
    found = interpreter()
    if found is not None:
        return found
    venv.create(FOLDER, with_pip=True, clear=True)
    python = FOLDER / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "pip>=25.1"], check=True)  # dependency groups need it
    subprocess.run([*pip, "--group", f"{ROOT / 'pyproject.toml'}:clients"], check=True)
    return python


if __name__ == "__main__":
    print(build())
