"""A run folder with judged test pairs and without a model, for tests of labelling."""

from __future__ import annotations

from pathlib import Path

from selfeval.config import RunConfig
from selfeval.records import Question, Reply, ScoredPair, Split, VerdictState
from selfeval.store import RUN_SCHEMA, RunStore, write_json

__all__ = ["write_run"]


def write_run(folder: Path, pairs: int = 6, better: str = "good") -> Path:
    """Write a run whose evaluator prefers the first reply to each question, which is the better one."""
    store = RunStore(folder)
    config = RunConfig().model_dump(mode="json")
    store.update_run(schema=RUN_SCHEMA, name="labelled", status="finished", config=config, stages={})
    questions = [Question(f"q{n}", f"What is {n} + <b>1</b>?", Split.TEST, "self") for n in range(pairs)]
    replies = [
        Reply(f"q{n}-r{k}", f"q{n}", f"{text} {n}", (7, 1), "sample", 1.0, 1.0, -1.0, True)
        for n in range(pairs)
        for k, text in enumerate((better, "bad"))
    ]
    scored = [ScoredPair(f"q{n}", f"q{n}-r0", f"q{n}-r1", VerdictState.KEPT, 0.9, 1.5, 0.0, None, None) for n in range(pairs)]
    store.write_shard("questions", 0, questions)
    store.write_shard("replies", 0, replies)
    store.write_records("evaluation/scored.jsonl", scored)
    write_json(folder / "evaluation" / "figures.json", {"evaluator": {"temperature": 1.0}})
    return folder
