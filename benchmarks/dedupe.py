"""Near-duplicates among 100,000 and a million texts: CPU seconds, memory and recall of the exact index and of MinHash.

python benchmarks/dedupe.py [--sizes 10000 100000 1000000] [--only exact minhash]

Texts have 8 to 16 words with Zipf's frequencies; one in ten differs from an earlier text in its last word. Each text is
searched for and, without a near-duplicate, added, as in the stage that writes questions. Each measurement is a process with one
thread; memory is the growth of its resident set. Recall is the number of near-duplicates found over that of the exact index.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from common import RESULTS, measured_anew, resident_mib, write

KINDS = ("exact", "minhash")
THRESHOLD = 0.7
_WORDS = 50_000


def texts(count: int) -> Iterator[str]:
    """Yield texts, the same for every index."""
    rng = np.random.default_rng(0)
    syllables = [a + b for a in "bcdfgklmnprstvz" for b in ("an", "er", "ist", "ol", "uko", "ari", "eta", "imo")]
    words = np.array([one + other + last for one in syllables for other in syllables for last in "aeiou"])
    words = rng.permutation(words)[:_WORDS]
    cumulative = np.cumsum(1 / np.arange(1, _WORDS + 1))
    made: list[list[str]] = []
    for number in range(count):
        if number % 10 == 0 and made:
            chosen = [*made[int(rng.integers(len(made)))][:-1], str(words[int(rng.integers(_WORDS))])]
        else:
            places = np.searchsorted(cumulative, rng.random(int(rng.integers(8, 17))) * cumulative[-1])
            chosen = [str(word) for word in words[places]]
        # A sample to copy from; all of them would be most of the memory.
        if len(made) < 100_000:
            made.append(chosen)
        yield " ".join(chosen) + "?"


def measure(kind: str, count: int) -> dict[str, Any]:
    """Find the near-duplicates of all texts in this process."""
    from selfeval.quality.dedupe import NearDuplicates
    from selfeval.quality.minhash import SketchedDuplicates

    asked = list(texts(count))
    before, started, found = resident_mib(), time.process_time(), 0
    known = NearDuplicates(THRESHOLD) if kind == "exact" else SketchedDuplicates(THRESHOLD)
    for number, text in enumerate(asked):
        if known.find(text) is None:
            known.add(str(number), text)
        else:
            found += 1
    seconds = time.process_time() - started
    return {"seconds": round(seconds, 2), "mib": round(resident_mib() - before), "found": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--only", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--measure", choices=KINDS, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.measure:
        print(json.dumps(measure(asked.measure, asked.sizes[0])))
        return
    known = RESULTS / "dedupe.json"
    figures: dict[str, Any] = json.loads(known.read_text(encoding="utf-8"))["dedupe"] if known.is_file() else {}
    for size in asked.sizes:
        for kind in asked.only:
            figures.setdefault(kind, {})[str(size)] = measured_anew(__file__, kind, size)
            for name, rows in figures.items():
                for key, row in rows.items():
                    if key in figures.get("exact", {}) and name != "exact":
                        row["recall"] = round(row["found"] / figures["exact"][key]["found"], 4)
            write("dedupe", "python benchmarks/dedupe.py", {"threshold": THRESHOLD, "dedupe": figures})
    for kind, rows in figures.items():
        ends = sorted((int(size), row["seconds"]) for size, row in rows.items())[-2:]
        if len(ends) == 2:
            (small, fast), (large, slow) = ends
            print(kind, f"slope {math.log(slow / fast) / math.log(large / small):.2f}")


if __name__ == "__main__":
    main()
