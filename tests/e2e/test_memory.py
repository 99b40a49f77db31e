"""The whole loop with the real command where memory is short: a true limit of the address space, and `--memory-budget`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from processes import environment, selfeval
from toy import copy_lab, toy_arguments

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="address space and resident memory are read as Linux tells them"
)

MIB = 2**20
LARGE = (
    "evaluator.batch=64", "evaluator.epochs=2", "evaluator.checkpoint_every=1", "policy.iterations=1",
    "policy.questions_per_iteration=24", "policy.replies_per_question=8", "policy.minibatch=192",
)  # fmt: skip
"""Logical batches whose activations take some 100 MiB when they go through at once."""

UNDER_A_LIMIT = """
import resource, sys
from pathlib import Path

import torch

import selfeval.report.page, selfeval.stages.pipeline
from selfeval.backbone.roles import Backbone
from selfeval.cli import main
from selfeval.config import load_config

config = load_config(Path(sys.argv[2]), {})
backbone = Backbone.load(config.model, config.backbone)  # so that everything is imported and set up before the limit
backbone.roles.add("any")
ids = torch.ones(2, 5, dtype=torch.long)
with backbone.acting_as("any"):
    backbone.hidden(ids, ids).sum().backward()
del backbone
size = next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, ((int(size) << 10) + (MIB_LEFT << 20),) * 2)
main()
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_lab(tmp_path_factory.mktemp("memory") / "lab")


def large(recipe: Path, folder: Path, *more: str) -> list[str]:
    return toy_arguments(recipe, folder, *[part for size in LARGE for part in ("--set", size)], *more)


def memory(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())["memory"]
    return found


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory, recipe: Path) -> Path:
    """A run that the system itself gives 150 MiB for its activations, and no more."""
    folder = tmp_path_factory.mktemp("memory") / "run"
    command = [sys.executable, "-c", UNDER_A_LIMIT.replace("MIB_LEFT", "150"), *large(recipe, folder)]
    found = subprocess.run(command, capture_output=True, text=True, check=False, env=environment(), timeout=600)
    assert found.returncode == 0, found.stderr
    assert "update: out of memory; continuing with" in found.stderr
    assert "memory, policy: update" in found.stdout
    return folder


@pytest.mark.slow
def test_a_run_that_truly_runs_out_of_memory_ends_and_says_what_happened(limited: Path) -> None:
    events = memory(limited)["events"]
    failed = [event for event in events if event["kind"] == "out_of_memory"]
    assert "update" in {event["phase"] for event in failed}
    assert "update" in {event["phase"] for event in events if event["stage"] == "policy"}
    assert all(event["to"] < event["from"] for event in failed)
    assert "memory, policy: update" in (limited / "index.html").read_text()
    run = json.loads((limited / "run.json").read_text())
    assert [event for row in run["stages"].values() for event in row["memory_events"]] == [
        {key: value for key, value in event.items() if key != "stage"} for event in events
    ]


@pytest.mark.slow
def test_a_budget_makes_groups_smaller_and_gives_the_same_replies(limited: Path, recipe: Path, tmp_path: Path) -> None:
    # The memory that the process needs without large batches, and a little for them.
    stages = json.loads((limited / "run.json").read_text())["stages"]
    budget = stages["verdicts"]["peak_bytes"] // MIB + 70
    folder = tmp_path / "run"
    found = selfeval(*large(recipe, folder, "--memory-budget", f"{budget}MiB"))
    assert found.returncode == 0, found.stderr
    told = memory(folder)
    assert {event["kind"] for event in told["events"]} >= {"over_budget"}
    assert "over the memory budget" in found.stdout
    for name in ("questions", "replies", "policy"):
        for one, other in zip(sorted((folder / name).glob("shard-*")), sorted((limited / name).glob("shard-*")), strict=True):
            assert _texts(one) == _texts(other)


def _texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def test_a_budget_below_what_one_reply_needs_is_the_users_error(recipe: Path, tmp_path: Path) -> None:
    found = selfeval(*large(recipe, tmp_path / "run", "--memory-budget", "50MiB"))
    assert found.returncode == 2
    last = found.stderr.strip().splitlines()[-1]
    assert last.startswith("Error: sampling one reply alone does not fit: this process then uses ")
    assert "backbone.memory_budget is 50.0 MiB" in last
    assert "raise --memory-budget" in last


def test_a_budget_that_is_no_size_is_refused(recipe: Path, tmp_path: Path) -> None:
    found = selfeval(*large(recipe, tmp_path / "run", "--memory-budget", "plenty"))
    assert found.returncode == 2
    assert "--memory-budget plenty: backbone.memory_budget: got" in found.stderr
    assert not (tmp_path / "run").exists()
