"""Time and memory of browsing a large run in `selfeval view`, on this machine.

Makes a run folder with 100,000 replies and as many verdicts, indexes it, and requests pages as a browser does. Writes
results/browse.json. Needs no model. Run it with

    python benchmarks/browse.py
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastapi.testclient import TestClient

from selfeval.config import RunConfig
from selfeval.records import PairwiseEvidence, Question, Reply, Split, Verdict, VerdictState
from selfeval.runs.reader import RunReader
from selfeval.serve.gate import Access
from selfeval.store import RUN_SCHEMA, RunStore
from selfeval.view.app import make_view
from selfeval.view.index import RunIndex
from selfeval.view.opened import OpenedRuns

RESULTS = Path(__file__).parent / "results" / "browse.json"
WORDS = "apple bag coin day egg fish game hat ink jar kite lamp mile nut oven pen queen road ship tree unit vase wall yard"
PAGES = {
    "first page": "replies",
    "page 1000": "replies?page=1000",
    "filter": "verdicts?state=tie&split=train",
    "full-text search": "replies?q=apple+%22road+ship%22",
    "search of two characters": "replies?q=7x",
    "sort by confidence": "verdicts?sort=-confidence",
    "question": "question/q500",
}
REPEATS = 5


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=100_000, help="replies, and verdicts")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "large"
        make_run(run, options.records)
        figures = measure(run, Path(folder))
    # After the measurement: it imports torch, whose memory is none of the pages'.
    import torch

    from selfeval.bench.machine import describe_machine

    found = {"machine": describe_machine(torch.device("cpu")), "records": options.records, **figures}
    options.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=2))


def measure(run: Path, folder: Path) -> dict[str, Any]:
    """Return the size of the run, the seconds to index it, and the CPU seconds of each page."""
    size = sum(path.stat().st_size for path in run.rglob("*.jsonl"))
    before = peak_bytes()
    index = RunIndex(run, folder / "index.sqlite")
    wall, cpu = time.perf_counter(), time.process_time()
    while not index.refresh(RunReader(run), ("questions", "replies", "verdicts"), 600).is_complete:
        pass
    indexing = {"seconds": round(time.perf_counter() - wall, 1), "cpu_seconds": round(time.process_time() - cpu, 1)}
    indexing["database_bytes"] = sum(path.stat().st_size for path in folder.glob("index.sqlite*"))
    after = peak_bytes()
    client = TestClient(make_view(OpenedRuns([run]), Access(None, loopback=True)), base_url="http://127.0.0.1")
    while "data-live" in client.get("/view/run/large/verdicts").text:
        pass
    while "still being indexed" in client.get("/view/run/large/question/q0").text:
        pass
    return {
        "jsonl_bytes": size,
        "indexing": indexing,
        "cpu_seconds_per_page": {name: timed(client, path) for name, path in PAGES.items()},
        "peak_bytes": {"before": before, "after_indexing": after, "after_pages": peak_bytes()},
    }


def timed(client: TestClient, path: str) -> float:
    """Return the smallest CPU time of a page, after one request to warm up."""
    client.get(f"/view/run/large/{path}").raise_for_status()
    times = []
    for _ in range(REPEATS):
        begin = time.process_time()
        client.get(f"/view/run/large/{path}").raise_for_status()
        times.append(time.process_time() - begin)
    return round(min(times), 4)


def peak_bytes() -> int:
    """Return the peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# -- the run ------------------------------------------------------------------------------------------------------------


def make_run(folder: Path, records: int, shard: int = 512) -> None:
    """Write a run with two replies to each question and one verdict per reply."""
    store, questions = RunStore(folder), records // 2
    config = RunConfig(name="large").model_dump(mode="json")
    store.update_run(schema=RUN_SCHEMA, status="finished", config=config, stages={})
    rows = {"questions": (questions, question), "replies": (records, reply), "verdicts": (records, verdict)}
    for stage, (count, make) in rows.items():
        for number, start in enumerate(range(0, count, shard)):
            # By hand: the journal of `write_shard` is rewritten with every shard.
            path = store.shard_path(stage, number)
            path.parent.mkdir(exist_ok=True)
            store.write_records(str(path.relative_to(folder)), [make(n) for n in range(start, min(count, start + shard))])
        store.finish(stage, "key", {})
    store.close()


def question(n: int) -> Question:
    """Return a question of about 100 characters."""
    return Question(f"q{n}", f"{text(n, 18)}?", Split.TEST if n % 5 == 0 else Split.TRAIN, "self")


def reply(n: int) -> Reply:
    """Return a reply of about 250 characters and 80 tokens."""
    ids = tuple((n * 31 + k * 17) % 32_000 for k in range(80))
    return Reply(f"q{n // 2}-r{n % 2}", f"q{n // 2}", text(n, 48), ids, "sample", 1.0, 1.0, -float(n % 97), n % 20 != 0)


def verdict(n: int) -> Verdict:
    """Return a verdict with two outputs of about 100 characters."""
    draw = random.Random(n)
    q, probability = n // 2, round(draw.random(), 6)
    state = VerdictState.KEPT if abs(probability - 0.5) > 0.2 else VerdictState.TIE
    outputs = text(n + 1, 18), text(n + 2, 18)
    evidence = PairwiseEvidence(probability, probability, (0.1, 0.1), outputs, (None, None), (0.9, 0.9))
    split = Split.TEST if q % 5 == 0 else Split.TRAIN
    return Verdict(f"q{q}", split, f"q{q}-r0", f"q{q}-r1", state, probability, 0.1, evidence)


def text(seed: int, words: int) -> str:
    """Return random words and a number."""
    return " ".join(_words(random.Random(seed), words)) + f" {seed % 1000}x"


def _words(draw: random.Random, count: int) -> Iterator[str]:
    vocabulary = WORDS.split()
    return (draw.choice(vocabulary) for _ in range(count))


if __name__ == "__main__":
    main()
