"""Measure whether further rounds, each started from the improved policy, still pay.

python benchmarks/rounds.py [--seeds 0] [--rounds 3] [--folder runs/bench-rounds] [--set KEY=VALUE]

Runs the real command on the embedded recipe. Reports per round: the evaluator on the test pairs of round 1 (for all), with
its change from the previous round on the same pairs; the policy against the previous one; and one sentence on each, with the
last round that improved it. An existing run folder is resumed, so an interrupted benchmark can be repeated.

The gate (`policy.gate`) is off: it would end the run in a round whose evaluator is not shown to be useful, and whether such a
round pays is what is measured. `--set` can turn it on.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import selfeval, write

from selfeval.quality.comparisons import Comparison
from selfeval.report.reading import read_report
from selfeval.report.schema import Round
from selfeval.report.summary import rounds_sentences


def measure(seed: int, rounds: int, folder: Path, settings: list[str]) -> dict[str, Any]:
    """Return the rounds of one seed; seconds cover all stages, including interrupted attempts."""
    output = folder / f"seed-{seed}"
    given = [
        part for setting in ("policy.gate=off", f"seed={seed}", f"rounds={rounds}", *settings) for part in ("--set", setting)
    ]
    selfeval("run", "--output", str(output), *given, "--quiet")
    report = read_report(output / "report.json")
    rounds_of_run = report.rounds or ()
    rows = [{**row.as_json(), **_cost(output / row.folder)} for row in rounds_of_run]
    return {"seed": seed, "rounds": rows, "said": list(rounds_sentences(report)), "better": better(rounds_of_run)}


def _cost(folder: Path) -> dict[str, Any]:
    report = read_report(folder / "report.json")
    return {
        "seconds": report.time.total,
        "questions": report.data.questions,
        "pairs_train": report.data.pairs_train,
        "weight_copies": report.memory.weight_copies,
        "peak_bytes": report.memory.peak_bytes,
        "kept_share": report.verdicts.kept_share.as_json(),
    }


def better(rows: Sequence[Round]) -> dict[str, list[bool]]:
    """Return for each round whether the paired comparison finds it better than the previous; for the evaluator from round 2."""
    return {
        "evaluator": [is_better(row.evaluator.comparison) for row in rows[1:]],
        "policy": [is_better(row.policy.comparisons.gold) for row in rows],
    }


def is_better(comparison: Comparison | None) -> bool:
    return comparison is not None and comparison.finding == "better"


def shown(figure: dict[str, Any] | None) -> str:
    if figure is None or figure["value"] is None:
        return "-"
    return f"{figure['value']:.4f} [{figure['ci_low']:.4f}, {figure['ci_high']:.4f}] n={figure['n']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("runs/bench-rounds"))
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a value of the recipe; also shorter runs"
    )
    parser.add_argument("--name", default="rounds", help="of the file in results/")
    options = parser.parse_args()
    runs = [measure(seed, options.rounds, options.folder, options.set) for seed in options.seeds]
    for run in runs:
        for row in run["rounds"]:
            evaluator, policy = row["evaluator"], row["policy"]
            print(f"seed {run['seed']}, round {row['round']} ({row['seconds']:.0f} s)")
            print(
                f"  evaluator, round 1's pairs {shown(evaluator['accuracy_gold_first_pairs'])}  gain {shown(evaluator['gain'])}"
            )
            print(f"  win rate {shown(policy['win_rate'])}  {policy['win']} / {policy['tie']} / {policy['loss']}")
            print(f"  gold after {shown(policy['gold_after'])}  gain {shown(policy['gold_gain'])}  kl {shown(policy['kl'])}")
        print("\n".join(run["said"]))
    whole = {who: all(all(run["better"][who]) for run in runs) for who in ("evaluator", "policy")}
    print(f"better in every round and seed: {whole}")
    command = f"python benchmarks/rounds.py --seeds {' '.join(map(str, options.seeds))} --rounds {options.rounds}"
    command += "".join(f" --set {setting}" for setting in options.set)
    write(options.name, command, {"settings": options.set, "better_in_every_round": whole, "runs": runs})


if __name__ == "__main__":
    main()
