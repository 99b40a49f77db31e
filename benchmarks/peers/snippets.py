"""Run the snippets of docs/guides/use-elsewhere.md that use TRL, and print the trainers' logs as one JSON line.

Run by benchmarks/peers/run.py with the interpreter of the peers, in a folder that holds runs/mine and exported/:
    python snippets.py GUIDE
"""

from __future__ import annotations

import json
import re
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

LIBRARIES = ("torch", "transformers", "trl", "peft", "datasets", "lm_eval")
ROWS = 3


def blocks(guide: Path) -> list[str]:
    """Return the Python snippets, in the order in which a reader runs them."""
    found = re.findall(r"^```python\n(.*?)^```", guide.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [code for code in found if "selfeval" not in code.replace("selfeval.stages", "")]


def seen(trainer: Any) -> dict[str, Any]:
    """Return a trainer's log and its token ids of the first rows."""
    rows = [trainer.train_dataset[number] for number in range(ROWS)]
    ids = [{name: values for name, values in row.items() if name.endswith("_ids")} for row in rows]
    return {"log": trainer.state.log_history, "steps": trainer.state.global_step, "ids": ids}


def main() -> None:
    names: dict[str, Any] = {}
    trainers: dict[str, Any] = {}
    for code in blocks(Path(sys.argv[1])):
        exec(compile(code, "use-elsewhere.md", "exec"), names)
        if "trainer = " in code:
            trainers[type(names["trainer"]).__name__] = seen(names["trainer"])
    prompts = [row["prompt"][0]["content"] for row in names["rows"].select(range(ROWS))]
    reference_answer = names["evaluator"].reference_answers(prompts)
    versions = {name: version(name) for name in LIBRARIES}
    print(
        "\nRESULT "
        + json.dumps({"versions": versions, "trainers": trainers, "prompts": prompts, "reference_answer": reference_answer})
    )


if __name__ == "__main__":
    main()
