"""Writes the tables of docs/concepts/evidence.md: fields from the docstrings of the schema, limits from the code that has them.

python docs/generate_evidence.py            writes the page
python docs/generate_evidence.py --check    exits with 1 when the page is stale
"""

from __future__ import annotations

import sys
import types
import typing
from pathlib import Path
from typing import Any

from generating import main

from selfeval.config import RunConfig
from selfeval.evaluation import over_optimisation
from selfeval.quality import calibration, comparisons, length_control, statistics
from selfeval.quality.comparisons import Comparison
from selfeval.quality.statistics import Figure
from selfeval.report import schema, summary
from selfeval.stages import evaluator, report, verdict_cost

PAGE = Path(__file__).parent / "concepts" / "evidence.md"
TABLES: tuple[type[schema.Part], ...] = (
    schema.Evaluator,
    schema.FirstPairs,
    schema.Baselines,
    schema.EvaluatorComparisons,
    schema.Disagreement,
    schema.Bin,
    schema.Steps,
    schema.HumanLabels,
    schema.HumanThreshold,
    schema.EvaluatorConfidence,
    schema.Attacks,
    schema.AttackKind,
    schema.TokensPerVerdict,
    schema.TokensOf,
    schema.SecondsPerVerdict,
    schema.Verdicts,
    schema.UnreadableOrders,
    schema.JudgeCalibration,
    schema.JudgeSignals,
    schema.JudgeMember,
    schema.JudgeProbe,
    schema.ProbeFinding,
    schema.Policy,
    schema.PolicyComparisons,
    schema.Diversity,
    schema.DiversityChange,
    schema.DomainMap,
    schema.Cluster,
    schema.ReferenceScores,
    schema.ReferenceMetric,
    schema.Replies,
    schema.RepliesPerQuestion,
    schema.Alarm,
    schema.OverOptimisation,
    schema.CurveFit,
    schema.Round,
    schema.RoundEvaluator,
    schema.RoundPolicy,
    schema.Report,
    schema.Model,
    schema.Data,
    schema.Dropped,
    schema.Drop,
    schema.Sample,
    schema.Time,
    schema.Memory,
    schema.MemoryEvent,
    schema.Server,
)
_WORDS = {
    Figure: "figure",
    Comparison: "comparison",
    int: "whole number",
    float: "number",
    str: "text",
    bool: "true or false",
    dict: "object",
}


def type_of(annotation: Any) -> str:
    """The type in words; `null` is said in the meaning."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return type_of(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_of(argument) for argument in arguments if argument is not type(None))
    if origin is typing.Literal:
        return " or ".join(f"`{argument}`" for argument in arguments)
    if origin is tuple and len(arguments) == 2 and arguments[1] is Ellipsis:
        return (
            f"list of {type_of(arguments[0]).replace('list of', 'lists of') + ('' if 'list' in type_of(arguments[0]) else 's')}"
        )
    if origin is tuple:
        return f"list of {len(arguments)} numbers"
    if origin is dict:
        return "object"
    return _WORDS.get(annotation, "object")


def table(part: type[schema.Part]) -> str:
    rows = ["| key | type | meaning |", "|---|---|---|"]
    for name, field in part.model_fields.items():
        meaning = " ".join((field.description or "").split()).replace("|", "\\|")
        rows.append(f"| `{field.alias or name}` | {type_of(field.annotation)} | {meaning} |")
    return "\n".join(rows)


def limits() -> str:
    """Thresholds and sizes behind the figures, as the code has them."""
    evaluation = RunConfig.model_fields["evaluation"].annotation
    assert evaluation is not None
    defaults = {name: field.default for name, field in evaluation.model_fields.items()}
    rows = [
        ("questions that a comparison needs before anything is claimed", comparisons.FEWEST),
        ("largest p value at which a difference is claimed", comparisons.LEVEL),
        ("difference from the judge that is still close, in points: the whole interval is above", -100 * summary.CLOSE),
        ("share of replies cut off at the token limit above which summary and page warn", summary.UNFINISHED),
        ("share of the attacks of a kind that must score lower; below it, summary and page warn", summary.WITHSTOOD),
        ("held-out pairs that the temperature needs; with fewer it is 1", evaluator.FEWEST_FOR_TEMPERATURE),
        ("standard deviation of the prior on the logarithm of the temperature", evaluator.TEMPERATURE_PRIOR),
        ("test pairs on which the cost of a verdict is measured, at most", verdict_cost.PAIRS),
        ("batches that alternate between evaluator and judge", verdict_cost.BATCHES),
        ("bins of the calibration error, at most", calibration.BINS),
        ("pairs that a bin of the calibration error needs", calibration.CASES_PER_BIN),
        ("cases that an interval of a rank correlation needs", statistics.FEWEST_RANKS),
        ("resamples of the length-controlled win rate", length_control.RESAMPLES),
        ("different KLs that the curves of over-optimisation need", over_optimisation.FEWEST_POINTS),
        ("examples per stage and reason in `dropped`", report.EXAMPLES_PER_REASON),
        *((f"default of `evaluation.{name}`", value) for name, value in defaults.items() if value is not None),
    ]
    return "\n".join(["| limit | value |", "|---|---|", *(f"| {name} | {value:g} |" for name, value in rows)])


if __name__ == "__main__":
    blocks = {part.__name__: table(part) for part in TABLES} | {"limits": limits()}
    sys.exit(main(PAGE, blocks, "src/selfeval/report/schema.py"))
