"""Writes the figures of the README and of the model card from results/*.json, so that none is typed by hand.

python benchmarks/figures.py [--check]
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[1]
_README = _ROOT / "README.md"
_CARD = _ROOT / "src" / "selfeval" / "lab" / "word_problems" / "README.md"
_BLOCK = re.compile(r"(<!-- figures -->\n).*?(<!-- /figures -->)", re.DOTALL)
_ROWS = (
    ("evaluator picks the right one of two replies (gold, unfiltered held-out pairs)", "evaluator_gold"),
    ("… the judge it learned from, asked in both orders, forced to choose", "baseline_judge"),
    ("… mean log-probability", "baseline_mean_logprob"),
    ("… the longer reply", "baseline_longer_wins"),
    ("… the first reply", "baseline_first_wins"),
    ("evaluator agrees with the judge where the judge was sure", "evaluator_judge"),
    ("verdicts kept", "kept_share"),
    ("kept labels that are right (gold)", "kept_labels_right"),
    ("replies right at temperature 1, before (gold)", "gold_before"),
    ("replies right at temperature 1, after (gold)", "gold_after"),
    ("win rate after against before, ties count half", "win_rate"),
    ("win rate after against before, ties dropped", "win_rate_decisive"),
    ("length-controlled win rate", "length_controlled"),
)
_PLAIN = (("KL to the start, nats per reply", "kl"), ("reply length, after over before", "length_ratio"))


def _load(name: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((_ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))
    return values


def _row(label: str, runs: list[dict[str, Any]], name: str, percent: bool) -> str:
    def write(value: float) -> str:
        return f"{100 * value:.1f}%" if percent else f"{value:.2f}"

    values = [run[name]["value"] for run in runs]
    low, high, n = (min(run[name]["ci_low"] for run in runs), max(run[name]["ci_high"] for run in runs), runs[0][name]["n"])
    spread = f"{write(min(values))} to {write(max(values))}"
    return f"| {label} | {write(statistics.median(values))} | {spread} | {write(low)} to {write(high)} | {n:,} |"


def table() -> str:
    """The table of the README, from results/loop.json."""
    loop = _load("loop")
    runs = loop["runs"]
    seconds, peak = ([run[key] for run in runs] for key in ("seconds", "peak_gib"))
    machine = loop["machine"]
    lines = [
        f"Median of {len(runs)} seeds on {machine['cores']} CPU cores without a GPU ({machine['memory_gib']:.0f} GiB), "
        f"by `{loop['command']}`. The last interval spans the 95% intervals of all seeds; n is that of seed {runs[0]['seed']}.",
        "",
        "| | median | over seeds | intervals | n |",
        "|---|---|---|---|---|",
        *(_row(label, runs, name, percent=True) for label, name in _ROWS),
        *(_row(label, runs, name, percent=False) for label, name in _PLAIN),
        f"| seconds for the whole loop | {statistics.median(seconds):.0f} | {min(seconds):.0f} to {max(seconds):.0f} | | |",
        f"| peak memory of the process, GiB | {statistics.median(peak):.2f} | {min(peak):.2f} to {max(peak):.2f} | | |",
        f"| copies of the base weights | {runs[0]['weight_copies']} | | | |",
    ]
    return "\n".join(lines) + "\n"


_SKILLS = {
    "replies_right_sampled": "replies right, sampled at temperature 1",
    "replies_right_greedy": "replies right, greedy",
    "questions_well_posed_free": "questions well posed, written freely",
    "questions_well_posed_with_examples": "questions well posed, after four examples",
    "judge": "judge",
    "referee": "referee (a second judge prompt, for evaluation)",
    "right_first_shown_first": "right verdicts, right reply shown first",
    "right_first_shown_second": "right verdicts, right reply shown second",
    "tie_found": "ties found where both replies are right or both wrong",
    "tie_claimed_wrongly": "ties claimed where exactly one is right",
    "final_marks_right": "right marks at the end of a reply without other marks",
}


def skills_table() -> str:
    """The table of the model card, from results/exam.json."""
    exam = _load("exam")
    lines = [f"By `{exam['command']}`, fresh problems.", "", "| skill | share | 95% interval | n |", "|---|---|---|---|"]
    for name, value in exam["skills"].items():
        parts = {name: value} if "value" in value else {f"{name}/{part}": figure for part, figure in value.items()}
        for key, figure in parts.items():
            label = ", ".join(_SKILLS[word] for word in key.split("/"))
            interval = f"{100 * figure['ci_low']:.1f}% to {100 * figure['ci_high']:.1f}%"
            lines.append(f"| {label} | {100 * figure['value']:.1f}% | {interval} | {figure['n']:,} |")
    return "\n".join(lines) + "\n"


def _refresh(path: Path, block: str, check: bool) -> None:
    old = path.read_text(encoding="utf-8")
    new = _BLOCK.sub(lambda match: match.group(1) + block + match.group(2), old)
    if check and new != old:
        sys.exit(f"the figures in {path.name} are not those of benchmarks/results; run python benchmarks/figures.py")
    path.write_text(new, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail when README or model card are not up to date")
    options = parser.parse_args()
    _refresh(_README, table(), options.check)
    _refresh(_CARD, skills_table(), options.check)


if __name__ == "__main__":
    main()
