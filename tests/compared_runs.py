"""Run folders with records, metrics and a report, written without a model, for the pages that watch and compare runs."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sample_report import sample_report

from selfeval.config import load_config
from selfeval.records import ComparedReplies, Question, Sampled, ScoredPair, Split, VerdictState
from selfeval.store import RUN_SCHEMA, RunStore

__all__ = ["QUESTIONS", "begin_run", "compared", "finish_run", "log_steps", "scored", "write_samples"]

QUESTIONS = 12
"""Test questions of a run; it has as many for training."""


def begin_run(
    folder: Path, *, status: str = "running", prefix: str = "What is", stages: Any = None, **settings: Any
) -> RunStore:
    """Create a run whose questions are finished; the caller closes its store.

    Args:
        folder: its folder.
        status: status in run.json.
        prefix: start of its questions; runs with the same one share them.
        stages: Optional. Rows of the stages. Default: that of the questions.
        **settings: configuration.
    """
    config = load_config(None, {"name": folder.name, "model": "/models/little", "domain": "word-problems", **settings}, [])
    store = RunStore(folder)
    rows = {"questions": {"state": "finished", "seconds": 12.5, "counts": {"train": QUESTIONS, "test": QUESTIONS}}}
    store.update_run(
        schema=RUN_SCHEMA,
        status=status,
        name=folder.name,
        round=1,
        seed=config.seed,
        config=config.model_dump(mode="json"),
        made_of={"the gold file": ""},
        templates={"referee.jinja": "0" * 64},
        versions={"selfeval": "0.1.0"},
        stages=rows if stages is None else stages,
    )
    store.begin("questions", "key")
    tests = [Question(f"t{n}", f"{prefix} {n} + {n}?", Split.TEST, "self") for n in range(QUESTIONS)]
    trained = [Question(f"q{n}", f"{prefix} {n} * {n}?", Split.TRAIN, "self") for n in range(QUESTIONS)]
    store.write_shard("questions", 0, [*tests, *trained])
    store.finish("questions", "key", {})
    return store


def log_steps(store: RunStore, steps: Sequence[int], shift: float = 0.0) -> None:
    """Log steps of policy training."""
    for step in steps:
        values = {"reward": math.sin(step / 3) + shift, "score": step / 10 + shift, "kl": step / 20, "length": 18 + step % 3,
                  "entropy": 1 / (step + 1), "policy_loss": -0.01, "value_loss": 0.2, "grad_norm": 0.5}  # fmt: skip
        store.add_metrics("policy", {"step": step, **values})


def write_samples(store: RunStore, step: int) -> None:
    """Write the samples of an iteration: two replies to three questions, with text that must be escaped."""
    rows = [
        Sampled(step, f"q{n}", f"Iteration {step}: <b>{n}</b> & so on,\n  so the answer is {n * n + k}.", 0.5 - k, k == 0)
        for n in range(3)
        for k in range(2)
    ]
    store.write_shard("policy", step, rows)


def compared(number: int, **values: Any) -> ComparedReplies:
    """The replies to a test question before and after training."""
    row = ComparedReplies(
        question_id=f"t{number}",
        before=f"t{number}-r0",
        after=f"The answer is {2 * number}.",
        outcome="win",
        probability=0.9,
        score_before=0.1,
        score_after=0.7,
        gold_before=False,
        gold_after=True,
        tokens_before=9,
        tokens_after=8,
        finished_before=True,
        finished_after=True,
        kl=0.3,
    )
    return dataclasses.replace(row, **values)


def scored(number: int, *, right: bool) -> ScoredPair:
    """A judged pair of a test question, of which the evaluator picks the right or the wrong reply."""
    margin = 1.0 if right else -1.0
    return ScoredPair(f"t{number}", f"t{number}-r0", f"t{number}-r1", VerdictState.KEPT, 0.9, margin, 0.0, True, False)


def finish_run(store: RunStore, replies: Sequence[ComparedReplies], pairs: Sequence[ScoredPair] = (), **report: Any) -> None:
    """Write the records of the evaluation and a report, and set the run to finished."""
    folder = store.root / "evaluation"
    folder.mkdir()
    for name, rows in (("compared", replies), ("scored", pairs)):
        lines = "".join(json.dumps(dataclasses.asdict(row)) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    store.begin("evaluation", "key")
    store.finish("evaluation", "key", {}, [folder / "compared.jsonl", folder / "scored.jsonl"])
    store.write_json(store.root / "report.json", {**sample_report(), **report})
    store.begin("report", "key")
    store.finish("report", "key", {}, [store.root / "report.json"])
    rows = {**store.run["stages"]}
    for name in ("replies", "verdicts", "pairs", "evaluator", "policy", "evaluation", "report"):
        rows[name] = {"state": "finished", "seconds": 3.0, "counts": {"records": 1200}, "peak_bytes": 900_000_000}
    store.update_run(status="finished", stages=rows)
