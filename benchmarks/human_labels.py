"""The judges of a small instruct model against human labels: agreement, coverage, swap consistency and calibration.

python benchmarks/human_labels.py --data FOLDER [--model FOLDER] [--sets llmbar pandalm] [--limit 200]
    [--output runs/bench-human-labels]

Judges random pairs of LLMBar and PandaLM (FOLDER has their files; see docs/concepts/judge-benchmark.md) with `pairwise` and
`pointwise`, without reasoning, and measures the judge's probabilities as they are, calibrated on the agreement of both orders
(without labels), and on labels (cross-fitted: the pairs of a fifth of the questions get the calibration of the others). The
default model is SmolLM2-135M-Instruct as converted by real_model.py. Judgements are kept, so the same command resumes. Other
data sets keep their earlier figures.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import RESULTS, write
from real_model import model_folder

from selfeval.config import VerdictsConfig
from selfeval.judge_benchmark.benchmark import judge_pairs, results_store
from selfeval.judge_benchmark.figures import Case, credit_of, measure
from selfeval.judge_benchmark.formats import read_data
from selfeval.judge_benchmark.pairs import LabelledPair, sampled
from selfeval.judge_benchmark.subject import subject_of
from selfeval.judging.calibrated import looks_of
from selfeval.judging.protocol import Judgement
from selfeval.quality.calibration import calibration_error
from selfeval.quality.judge_calibration import Calibration, Looks, fit_to_consistency, fit_to_labels
from selfeval.records import VerdictState
from selfeval.stages.judge_fit import calibrated_verdict
from selfeval.stages.terminal import Terminal

JUDGES: dict[str, tuple[str, ...]] = {
    "pairwise": (),
    "pointwise": (),
    "pointwise, any label mass": ("verdicts.label_mass=0",),
}
"""Judges and settings. The model rarely begins with a grade, so nearly all grades fall below the default of the label mass."""
SETTINGS = ("verdicts.reasoning=false", "backbone.device=cpu", "backbone.precision=fp32", "backbone.rollout_batch_size=8")
FOLDS = 5
COMMAND = "python benchmarks/human_labels.py --data FOLDER"


def judged(model: str, name: str, pairs: Sequence[LabelledPair], output: Path) -> tuple[list[Case], VerdictsConfig]:
    """Judge pairs, or read what was judged; return them with the settings."""
    subject = subject_of(model=model, judge=name.partition(",")[0], settings=(*SETTINGS, *JUDGES[name]))
    with results_store(output, "judgements") as store:
        outcomes = judge_pairs(store, subject, pairs, Terminal())
    config = subject.config.verdicts
    return [Case(p, o.verdict(config), o.logprobs) for p, o in zip(pairs, outcomes, strict=True)], config


def looks(case: Case) -> Looks | None:
    """Return the log-odds of a verdict that is no tie."""
    verdict = case.verdict
    if verdict.state == VerdictState.TIE:
        return None
    return looks_of(Judgement(verdict.probability, verdict.tie, verdict.evidence))


def with_calibration(cases: Sequence[Case], found: Calibration | None, config: VerdictsConfig) -> list[Case]:
    """Return the cases with calibrated verdicts."""
    return [dataclasses.replace(case, verdict=calibrated_verdict(case.verdict, found, config)) for case in cases]


def on_consistency(cases: Sequence[Case], config: VerdictsConfig) -> tuple[list[Case], Calibration | None]:
    """Calibrate on the agreement of both orders, as a run does on its first pairs."""
    found = fit_to_consistency([one for case in cases if (one := looks(case)) is not None])
    return with_calibration(cases, found, config), found


def on_labels(cases: Sequence[Case], config: VerdictsConfig) -> list[Case]:
    """Calibrate on labels; each fold with the calibration of the others. Empty if one has too few verdicts that are no ties."""
    fold = {case.pair.question: random.Random(f"{case.pair.question}/fold").randrange(FOLDS) for case in cases}
    made: list[Case] = []
    for number in range(FOLDS):
        others = [case for case in cases if fold[case.pair.question] != number and case.pair.label != "tie"]
        labelled = [(one, case.pair.label == "first") for case in others if (one := looks(case)) is not None]
        found = fit_to_labels([one for one, _ in labelled], [label for _, label in labelled])
        if found is None:
            return []
        made += with_calibration([case for case in cases if fold[case.pair.question] == number], found, config)
    return made


def figures(cases: Sequence[Case]) -> dict[str, Any]:
    """Return the figures of one kind of probability."""
    measured = measure(cases)
    decided = [case for case in cases if case.pair.label != "tie"]
    credits = [credit_of((case.verdict.probability or 0.5) - 0.5, case.pair.label) for case in decided]
    chosen = [(c.verdict.confidence, credit == 1) for c, credit in zip(decided, credits, strict=True) if credit != 0.5]
    return {
        **measured.scores.as_json(),
        "ece": calibration_error([c for c, _ in chosen], [right for _, right in chosen]).as_json(),
        "aurc": None if measured.aurc is None else round(measured.aurc, 6),
        "chance": measured.comparisons["chance"].as_json(),
        "longer": measured.comparisons["longer"].as_json(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of the files of the data sets")
    parser.add_argument("--model", help="folder or hub id of a model")
    parser.add_argument("--sets", nargs="+", default=["llmbar", "pandalm"])
    parser.add_argument("--limit", type=int, default=200, help="pairs of each data set")
    parser.add_argument("--output", type=Path, default=Path("runs/bench-human-labels"))
    options = parser.parse_args()
    model = options.model or str(model_folder())
    results: dict[str, Any] = {}
    for name in options.sets:
        pairs = [pair for pair in read_data(name, [options.data]) if pair.label is not None]
        picked, rows = sampled(pairs, options.limit, 0), {}
        for judge in JUDGES:
            cases, config = judged(
                model, judge, picked, options.output / f"{name}-{judge.replace(', ', '-').replace(' ', '-')}"
            )
            calibrated, found = on_consistency(cases, config) if judge == "pairwise" else ([], None)
            labelled = on_labels(cases, config)
            rows[judge] = {
                "as it is": figures(cases),
                **({"on consistency": figures(calibrated), "calibration": found and vars(found)} if calibrated else {}),
                **({"on labels": figures(labelled)} if labelled else {}),
            }
            print(name, judge, rows[judge], flush=True)
        baselines = {rule: figure.as_json() for rule, figure in measure(cases).baselines.items()}
        command = f"python benchmarks/human_labels.py --data FOLDER --sets {name} --limit {options.limit}"
        counts = {"pairs": len(picked), "available": len(pairs)}
        results[name] = {"command": command, **counts, "judges": rows, "baselines": baselines}
    write("human_labels", COMMAND, {"model": Path(model).name, "sets": {**earlier(Path(model).name), **results}})


def earlier(model: str) -> dict[str, Any]:
    """Return the figures of a model on other data sets that were measured before."""
    path = RESULTS / "human_labels.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found["sets"] if found.get("model") == model else {}


if __name__ == "__main__":
    main()
