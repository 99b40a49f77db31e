"""Runs of the embedded model whose shards are computed by workers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from processes import environment
from ray_tasks import local_ray
from selfeval.backbone.meters import peak_resident_bytes
from selfeval.config import RunConfig
from selfeval.stages.running import execute, new_config
from selfeval.stages.terminal import Terminal
from selfeval.stages.workers import WorkersAsked

SIZES = (
    "questions.train=8",
    "questions.test=4",
    "questions.shard=12",
    "replies.per_question=2",
    "replies.shard=3",
    "replies.beams=2",
    "replies.beam_share=0.5",
    "replies.max_new_tokens=auto",
    "replies.max_new_tokens_cap=48",
    "verdicts.shard=3",
)
TRAINING = (
    "questions.train=32",  # enough pairs for an evaluator
    "questions.test=8",
    "evaluator.epochs=1",
    "evaluator.batch=4",
    "policy.gate=off",
    "policy.iterations=3",
    "policy.questions_per_iteration=4",
    "policy.replies_per_question=2",
    "policy.epochs=1",
    "policy.minibatch=8",
    "policy.checkpoint_every=1",
    "policy.warmup_iterations=0",
    "evaluation.questions=4",
)
pytestmark = pytest.mark.slow
TIMEOUT = 1800
"""Seconds that a run may take on a busy machine."""


def _shards(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("shard-*.jsonl"))}


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return new_config(assignments=SIZES)


@pytest.fixture(scope="module")
def in_process(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run without workers, with which the others are compared."""
    folder = tmp_path_factory.mktemp("in_process") / "run"
    execute(config, folder, (1, "verdicts"), Terminal(quiet=True))
    return folder


@pytest.fixture(scope="module")
def ray() -> Iterator[None]:
    with local_ray(4):
        yield


@pytest.mark.parametrize("number", [1, 2, 4])
def test_shards_are_the_same_with_any_number_of_workers(
    number: int, config: RunConfig, in_process: Path, ray: None, tmp_path: Path
) -> None:
    # The same number of threads as in one process: the last bits of sums depend on it.
    threads = json.loads((in_process / "run.json").read_text())["stages"]["replies"].get("threads")
    chosen = config.model_copy(update={"scale": config.scale.model_copy(update={"threads": threads})})
    execute(chosen, tmp_path / "run", (1, "verdicts"), Terminal(quiet=True), workers=WorkersAsked(number))
    assert _shards(tmp_path / "run") == _shards(in_process)
    recorded = json.loads((tmp_path / "run" / "run.json").read_text())["workers"]
    assert (recorded["number"], recorded["address"], recorded["lost"]) == (number, "local", 0)
    assert 1 <= sum(recorded["started"].values()) <= number
    # Of a worker: the process of this test has imported much more.
    stages = json.loads((tmp_path / "run" / "run.json").read_text())["stages"]
    assert 2**27 < stages["verdicts"]["peak_bytes"] < peak_resident_bytes()
    logs = [path.read_text() for path in sorted((tmp_path / "run" / "logs").glob("worker-*.log"))]
    assert len(logs) == number
    assert sum(log.count("WriteReplies: shard") for log in logs) >= 4, "work that is computed twice is logged twice"


INTERRUPTED = ("run", "--until", "verdicts", "--workers", "2", "--quiet", *(w for s in SIZES for w in ("--set", s)))


def _family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]


def _started(folder: Path) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """Start a run, and wait until its workers have loaded the model and the first shard of replies is written."""
    command = [sys.executable, "-m", "selfeval", *INTERRUPTED, "--output", str(folder)]
    process = subprocess.Popen(
        command,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=_listen_to_interrupts,
    )
    _wait_for(process, lambda: any("loaded in" in path.read_text() for path in folder.glob("logs/worker-*.log")))
    family = _family(process)  # now, because it takes long on a busy machine, and the run must not end before the kill
    _wait_for(process, lambda: any(folder.glob("replies/shard-*.jsonl")))
    return process, family


def _listen_to_interrupts() -> None:
    """A shell lets its background processes ignore Ctrl-C, and their children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _wait_for(process: subprocess.Popen[str], happened: Callable[[], bool]) -> None:
    until = time.monotonic() + TIMEOUT
    while not happened():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_the_driver_and_the_run_resumes_without_workers(
    how: signal.Signals, in_process: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process, family = _started(tmp_path / "run")
    assert any("ray::" in " ".join(p.cmdline()) for p in family if p.is_running()), "workers are its children"
    # As at a terminal, Ctrl-C reaches the whole group.
    (os.killpg if how == signal.SIGINT else os.kill)(process.pid, how)
    _, said = process.communicate(timeout=120)
    assert process.returncode == (-9 if how == signal.SIGKILL else 130), said
    _, alive = psutil.wait_procs(family[1:], timeout=180)
    assert [p for p in alive if p.status() != psutil.STATUS_ZOMBIE] == []
    finished = _shards(tmp_path / "run")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    resumed = [sys.executable, "-m", "selfeval", *INTERRUPTED, "--output", str(tmp_path / "run")]
    resumed = [word for word in resumed if word not in ("--workers", "2")]
    assert subprocess.run(resumed, env=environment(), timeout=TIMEOUT).returncode == 0
    for name, content in finished.items():
        assert _shards(tmp_path / "run")[name] == content
    assert _shards(tmp_path / "run") == _shards(in_process)


def _command(folder: Path, *more: str) -> list[str]:
    sizes = [word for size in (*SIZES, *TRAINING) for word in ("--set", size)]
    return [sys.executable, "-m", "selfeval", "run", "--quiet", *sizes, "--output", str(folder), *more]


def _run(folder: Path, *more: str) -> None:
    found = subprocess.run(_command(folder, *more), env=environment(), stderr=subprocess.PIPE, text=True, timeout=TIMEOUT)
    assert found.returncode == 0, found.stderr


def _metrics(folder: Path, stage: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics" / f"{stage}.jsonl").read_text().splitlines()]


def _trained(folder: Path, role: str) -> Tensor:
    """The weights B of an adapter, which are zero before training, in one row."""
    weights = load_file(folder / "roles" / role / "adapter_model.safetensors")
    return torch.cat([weights[name].flatten() for name in sorted(weights) if "lora_B" in name])


def _steps(folder: Path) -> int:
    path = folder / "metrics" / "policy.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in one process up to the policy."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        _run(folder, "--until", "policy")
    return folder


@pytest.mark.parametrize("then", [("--workers", "3"), ()])
def test_a_policy_training_on_workers_resumes_with_another_number_of_processes(
    then: tuple[str, ...], trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    folder = tmp_path / "run"
    command = _command(folder, "--until", "policy", "--workers", "2")
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True, start_new_session=True)
    _wait_for(process, lambda: _steps(folder) >= 1)
    workers = json.loads((folder / "run.json").read_text())["workers"]
    assert workers["training"] == {"started": 2, "lost": 0}, "the evaluator's training is recorded when it ends"
    family = _family(process)
    process.kill()
    process.communicate(timeout=120)
    assert [p for p in psutil.wait_procs(family[1:], timeout=180)[1] if p.status() != psutil.STATUS_ZOMBIE] == []
    _run(folder, "--until", "policy", *then)
    assert _shards(folder) == _shards(trained)
    assert "training as worker 1 of 2" in (folder / "logs" / "worker-1.log").read_text()
    for ours, whole in zip(_metrics(folder, "policy"), _metrics(trained, "policy"), strict=True):
        assert ours["step"] == whole["step"]
        assert ours["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-2)
    for role in ("evaluator-0", "policy"):
        assert torch.nn.functional.cosine_similarity(_trained(folder, role), _trained(trained, role), dim=0) > 0.999


def test_the_evaluation_is_the_same_on_workers(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    batches = ("--set", "verdicts.shard=3")  # as the run has it, so that the two workers have four batches of scores
    found = {}
    for name, more in (("here", ()), ("there", ("--workers", "2"))):
        folder = tmp_path / name
        shutil.copytree(trained, folder)
        _run(folder, "--until", "evaluation", *batches, *more)
        found[name] = [(folder / "evaluation" / file).read_bytes() for file in ("scored.jsonl", "compared.jsonl")]
    assert found["there"] == found["here"]
    logs = "".join(path.read_text() for path in (tmp_path / "there" / "logs").glob("worker-*.log"))
    assert {name for name in ("ScoreReplies", "AnswerQuestions", "JudgeReplies") if name in logs} == {
        "ScoreReplies",
        "AnswerQuestions",
        "JudgeReplies",
    }
