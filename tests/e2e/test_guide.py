"""The snippets of docs/guides/use-elsewhere.md that need transformers alone, on a small run of the embedded model."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from processes import environment, selfeval
from toy import ToyRun

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "guides" / "use-elsewhere.md"

pytestmark = pytest.mark.slow


def test_the_guides_snippets_give_the_figures_of_the_run(toy_run: ToyRun, tmp_path: Path) -> None:
    shutil.copytree(toy_run.folder, tmp_path / "runs" / "mine", ignore=shutil.ignore_patterns(".lock"))
    text = GUIDE.read_text(encoding="utf-8")
    commands = re.findall(r"^selfeval export runs/mine (.*)$", text, re.MULTILINE)
    assert len(commands) == 4
    for command in commands[:2]:
        words = [str(tmp_path / word) if word.startswith("exported/") else word for word in command.split()]
        done = selfeval("export", str(tmp_path / "runs" / "mine"), *words)
        assert done.returncode == 0, done.stderr
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    code = "\n".join(b for b in blocks if not re.search("trl|datasets|trainer|selfeval", b))
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env=environment(),
    )
    assert ran.returncode == 0, ran.stderr
    reply, scores, accuracy = ran.stdout.strip().splitlines()
    assert reply.strip()
    assert len(json.loads(scores)) == 2
    report = json.loads((tmp_path / "runs" / "mine" / "report.json").read_text())
    assert float(accuracy) == pytest.approx(report["evaluator"]["accuracy_judge"]["value"], abs=1e-6)
