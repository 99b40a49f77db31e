"""Measure the embedded model's skills against gold.

python benchmarks/exam.py
"""

from __future__ import annotations

import json
from pathlib import Path

from common import write

import selfeval
from selfeval.lab.exam import examine


def main() -> None:
    model = Path(selfeval.__file__).parent / "lab" / "word_problems"
    skills = examine(str(model), questions=2000, seed=1)
    print(json.dumps(skills, indent=2))
    write("exam", "python benchmarks/exam.py", {"skills": skills})


if __name__ == "__main__":
    main()
