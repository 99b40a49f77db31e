"""Requests and bytes of a run at S3, by stage, and its time against a run in a folder.

python benchmarks/storage.py [--folder runs/bench-storage]

S3 is the emulator of the tests (moto), in this process. A request counts for the stage that was in progress when it was
answered; `start` and `end` are before the first and after the last one. Bytes are those of the bodies.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import selfeval, write

from selfeval.store.progress import read_progress
from selfeval.store.remote.mirror import fetched
from selfeval.store.remote.places import run_path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from remote_homes import S3Server
from toy import FEW

URL = "s3://bucket/runs/shop"


class CountingServer(S3Server):
    """The emulator, which counts requests and bytes.

    Attributes:
        stage: returns the name that the next requests count for.
        counts: requests of each method and bytes in both directions, by that name.
    """

    def __init__(self) -> None:
        self.stage: Callable[[], str] = lambda: "start"
        self.counts: dict[str, Counter[str]] = {}
        super().__init__()

    def _answer(self, environment: dict[str, Any], start: Any) -> Any:
        answer = super()._answer(environment, start)
        method, path = environment["REQUEST_METHOD"], environment["PATH_INFO"]
        row = self.counts.setdefault(self.stage(), Counter())
        # A list is a GET of the bucket.
        row["LIST" if method == "GET" and path.strip("/") == "bucket" else method] += 1
        row["sent_bytes"] += int(environment.get("CONTENT_LENGTH") or 0)
        row["received_bytes"] += sum(map(len, answer)) if method == "GET" else 0
        return answer


class StageOfRun:
    """The stage of the run at `URL`, by the progress in its working copy."""

    def __init__(self) -> None:
        self._last = "start"

    def __call__(self) -> str:
        found = read_progress(run_path(URL))
        if found is None:
            return self._last if self._last == "start" else "end"
        self._last = found[0].stage or self._last
        return self._last


def measured(output: str) -> dict[str, float]:
    """Run the loop and return its wall time and CPU time in seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    settings = [word for setting in FEW for word in ("--set", setting)]
    seconds = selfeval("run", "--output", output, "--quiet", *settings)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": round(seconds, 1), "cpu_seconds": round(used, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/bench-storage"))
    options = parser.parse_args()
    shutil.rmtree(options.folder, ignore_errors=True)
    times = {"folder": measured(str(options.folder / "local"))}
    server = CountingServer()
    os.environ.update(server.environment, SELFEVAL_CACHE=str(options.folder / "here"))
    server.create_bucket()
    server.counts.clear()
    server.stage = StageOfRun()
    times["s3"] = measured(URL)
    by_stage = {name: dict(row) for name, row in server.counts.items()}
    os.environ["SELFEVAL_CACHE"] = str(options.folder / "there")
    readings = {}
    for name in ("first", "again"):
        server.counts, server.stage = {}, lambda name=name: name  # type: ignore[misc]
        copy = fetched(URL)
        readings[name] = dict(server.counts[name])
    server.stop()
    sizes = [path.stat().st_size for path in copy.rglob("*") if path.is_file()]
    figures = {"times": times, "stages": by_stage, "readings": readings, "files": len(sizes), "bytes": sum(sizes)}
    print(figures)
    write("storage", "python benchmarks/storage.py", figures)


if __name__ == "__main__":
    main()
