"""Probabilities of the embedded model's judge, from its margin alone and from all signals of a verdict, against gold.

python benchmarks/judge_signals.py [--pairs 1000] [--seed 0]

The pairs are those of judges.py. Each map is fitted to one half of them, on the agreement of both orders (no labels) or on
gold, and measured on the other half, which it has not seen. `as read` is the mean of both orders, with nothing fitted.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

from common import write
from judges import config_of, drawn_pairs, judged

from selfeval.backbone.roles import Backbone
from selfeval.judge_benchmark.figures import Case
from selfeval.judging.calibrated import looks_of
from selfeval.judging.kinds import kinds_of_run
from selfeval.judging.protocol import Judgement
from selfeval.judging.templates import Templates, templates_folder
from selfeval.quality.calibration import aurc, brier_score, calibration_error
from selfeval.quality.judge_calibration import Calibration, Looks, fit_to_consistency, fit_to_labels
from selfeval.quality.judge_signals import SignalCalibration, fit_signals_to_consistency, fit_signals_to_labels
from selfeval.quality.statistics import mean_figure

JUDGES = {
    "pairwise": (),
    "pairwise at once": ("verdicts.reasoning=false", "verdicts.label_mass=0", "verdicts.tie=1"),
    "pairwise, 4 votes at temperature 2": ("verdicts.votes=4", "verdicts.vote_temperature=2.0", "verdicts.tie=1"),
}
"""The recipe's judge makes hardly any mistake on these pairs; the other two are worse on purpose."""
Row = tuple[float, Looks, bool]


def rows_of(cases: Sequence[Case]) -> list[Row]:
    """Return the recorded probability, the looks and the label of each pair with a verdict that is no tie."""
    found = []
    for case in cases:
        verdict = case.verdict
        looks = looks_of(Judgement(verdict.probability, verdict.tie, verdict.evidence))
        if looks is not None and verdict.probability is not None and verdict.state != "tie":
            found.append((verdict.probability, looks, case.pair.label == "first"))
    return found


def maps_of(rows: Sequence[Row]) -> dict[str, Calibration | SignalCalibration | None]:
    """Fit all maps to some pairs."""
    looks, labels = [row[1] for row in rows], [row[2] for row in rows]
    return {
        "as read": None,
        "consistency, slope": fit_to_consistency(looks),
        "consistency, temperature": fit_signals_to_consistency(looks, "temperature"),
        "consistency, isotonic": fit_signals_to_consistency(looks, "isotonic"),
        "gold, slope": fit_to_labels(looks, labels),
        "gold, temperature": fit_signals_to_labels(looks, labels, "temperature"),
        "gold, isotonic": fit_signals_to_labels(looks, labels, "isotonic"),
    }


def figures(rows: Sequence[Row], found: Calibration | SignalCalibration | None) -> dict[str, Any]:
    """Return calibration error, Brier score and area under the risk-coverage curve of a map."""
    chances = [given if found is None else found.probability(looks) for given, looks, _ in rows]
    confidence = [max(p, 1.0 - p) for p in chances]
    credit = [0.5 if p == 0.5 else float((p > 0.5) == label) for p, (_, _, label) in zip(chances, rows, strict=True)]
    chosen = [(c, value == 1.0) for c, value in zip(confidence, credit, strict=True) if value != 0.5]
    area = aurc(confidence, credit)
    return {
        "right": mean_figure(credit).as_json(),
        "ece": calibration_error([c for c, _ in chosen], [right for _, right in chosen]).as_json(),
        "brier": round(brier_score(chances, [float(label) for _, _, label in rows]) or 0.0, 6),
        "aurc": None if area is None else round(area, 6),
        **({} if not isinstance(found, SignalCalibration) else {"weights": dict(found.weights), "points": len(found.steps)}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    configs = {name: config_of(*settings) for name, settings in JUDGES.items()}
    first = configs["pairwise"]
    backbone = Backbone.load(first.model, first.backbone)
    templates = Templates.load(templates_folder(first.model), backbone.loaded.tokenizer, kinds=kinds_of_run(first.verdicts))
    pairs = drawn_pairs(backbone, templates, options.pairs, options.seed)
    rows: dict[str, Any] = {}
    for name, config in configs.items():
        begun = time.process_time()
        cases = judged(backbone, templates, config, pairs)
        half = len(cases) // 2
        measured = rows_of(cases[half:])
        maps = maps_of(rows_of(cases[:half]))
        rows[name] = {
            "pairs": len(measured),
            "cpu_seconds": round(time.process_time() - begun, 1),
            "maps": {label: figures(measured, found) for label, found in maps.items()},
        }
        for label, values in rows[name]["maps"].items():
            print(name, label, values, flush=True)
    command = f"python benchmarks/judge_signals.py --pairs {options.pairs}"
    write("judge_signals", command, {"seed": options.seed, "fitted": options.pairs // 2, "judges": rows})


if __name__ == "__main__":
    main()
