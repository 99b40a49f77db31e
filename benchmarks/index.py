"""Recall, speed and memory of the vector index at 1,000, 100,000 and a million vectors, compared with other indexes of faiss.

python benchmarks/index.py [--sizes 1000 100000 1000000] [--only selfeval flat hnsw]

Vectors of 256 dimensions are drawn around 2,000 centres in a random subspace of 32 dimensions, with noise in all dimensions.
Queries are drawn in the same way. Recall@10 is the share of the ten nearest vectors, by comparison with all, that were found,
with the 95% interval of `mean_figure` over the queries, which has a width even if every query found all. `selfeval` is
`quality/vector_index.py`; `flat` compares with all vectors, and `hnsw` is a graph (32 links, built with a beam of 40 and
searched with one of 64). Each measurement is a process with one thread. Memory is the growth of the resident set after the
index is built, and after it is opened memory-mapped and searched.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, measured_anew, resident_mib, write
from numpy.typing import NDArray

from selfeval.quality.statistics import mean_figure

Vectors = NDArray[np.float32]
KINDS = ("selfeval", "flat", "hnsw")
DIMENSIONS, QUERIES, NEAREST = 256, 200, 10
LARGEST = {"selfeval": 1_000_000, "flat": 1_000_000, "hnsw": 100_000}
"""A graph of a million vectors takes a quarter of an hour to build."""


def vectors(count: int, seed: int) -> Vectors:
    fixed = np.random.default_rng(0)
    centres, basis = fixed.normal(size=(2000, 32)), fixed.normal(size=(32, DIMENSIONS)) / math.sqrt(32)
    rng, found = np.random.default_rng(seed), np.empty((count, DIMENSIONS), np.float32)
    for start in range(0, count, 10_000):
        size = min(10_000, count - start)
        inner = centres[rng.integers(2000, size=size)] + 0.7 * rng.normal(size=(size, 32))
        block = inner @ basis + 0.3 * rng.standard_normal((size, DIMENSIONS), dtype=np.float32)
        found[start : start + size] = block / np.linalg.norm(block, axis=1, keepdims=True)
    return found


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    started = time.process_time()
    return work(), time.process_time() - started


def true_neighbours(made: Vectors, queries: Vectors) -> NDArray[np.int64]:
    """Return the nearest vectors by comparison with all, a block at a time."""
    import faiss

    found: NDArray[np.int64] = faiss.knn(queries, made, NEAREST, metric=faiss.METRIC_INNER_PRODUCT)[1]
    return found


def ours(made: Vectors, queries: Vectors) -> dict[str, Any]:
    from selfeval.quality.vector_index import Contents, VectorIndex

    VectorIndex.open(Path("missing.faiss"))  # loads faiss
    contents = Contents("benchmark", tuple(map(str, range(len(made)))), ("",) * len(made))
    before = resident_mib()
    index, built = timed(lambda: VectorIndex.build(made, contents))
    memory = resident_mib() - before
    found, seconds = timed(lambda: index.search(queries, NEAREST))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "index.faiss"
        index.save(path)
        size = path.stat().st_size / 2**20
        opened = mapped(path)
    rows = [near.rows.tolist() for near in found]
    return {"build": built, "mib": memory, "seconds": seconds, "rows": rows, "file_mib": size, **opened}


def mapped(path: Path) -> dict[str, Any]:
    """Open the index in another process and search it."""
    done = subprocess.run([sys.executable, __file__, "--open", str(path)], check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def open_and_search(path: Path) -> dict[str, Any]:
    from selfeval.quality.vector_index import VectorIndex

    queries = vectors(QUERIES, 2)
    VectorIndex.open(path.with_name("missing.faiss"))  # loads faiss
    before = resident_mib()
    index, seconds = timed(lambda: VectorIndex.open(path))
    opened = resident_mib() - before
    index.search(queries, NEAREST)
    return {"open": seconds, "opened_mib": opened, "searched_mib": resident_mib() - before}


def of_faiss(kind: str, made: Vectors, queries: Vectors) -> dict[str, Any]:
    import faiss

    index = faiss.IndexFlatIP(DIMENSIONS) if kind == "flat" else faiss.IndexHNSWFlat(DIMENSIONS, 32, faiss.METRIC_INNER_PRODUCT)
    before = resident_mib()
    if kind == "hnsw":
        index.hnsw.efConstruction, index.hnsw.efSearch = 40, 64
    _, built = timed(lambda: index.add(made))
    memory = resident_mib() - before
    (_, rows), seconds = timed(lambda: index.search(queries, NEAREST))
    return {"build": built, "mib": memory, "seconds": seconds, "rows": rows.tolist()}


def measure(kind: str, count: int) -> dict[str, Any]:
    made, queries = vectors(count, 1), vectors(QUERIES, 2)
    found = ours(made, queries) if kind == "selfeval" else of_faiss(kind, made, queries)
    expected = true_neighbours(made, queries)
    shares = [len({*rows} & {*true}) / NEAREST for rows, true in zip(found.pop("rows"), expected.tolist(), strict=True)]
    seconds = found.pop("seconds")
    rounded = {name: round(float(value), 3) for name, value in found.items()}
    return {
        "recall_at_10": mean_figure(shares).as_json(),
        "queries_per_second": round(QUERIES / seconds, 1),
        **rounded,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 100_000, 1_000_000])
    parser.add_argument("--only", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--measure", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--open", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.open or asked.measure:
        print(json.dumps(open_and_search(asked.open) if asked.open else measure(asked.measure, asked.sizes[0])))
        return
    known = RESULTS / "index.json"
    figures: dict[str, Any] = json.loads(known.read_text(encoding="utf-8"))["index"] if known.is_file() else {}
    for size in asked.sizes:
        for kind in asked.only:
            if size <= LARGEST[kind]:
                figures.setdefault(kind, {})[str(size)] = measured_anew(__file__, kind, size)
                write("index", "python benchmarks/index.py", {"dimensions": DIMENSIONS, "index": figures})


if __name__ == "__main__":
    main()
