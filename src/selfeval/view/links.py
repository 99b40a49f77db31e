"""The records behind each figure and count of the report."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from selfeval.quality.comparisons import Comparison
from selfeval.quality.statistics import Figure
from selfeval.report.labels import is_gold_by_people
from selfeval.report.schema import Part, Report

__all__ = ["LINKED", "NOT_LINKED", "Records", "linked_fields", "values_of"]


@dataclass(frozen=True)
class Records:
    """A selection of records.

    Attributes:
        kind: kind of the records.
        filters: set filters, as in an address.
        sort: order, as in an address. Default: the order of the files.
        unit: what the figure or count counts: the records, their questions, or the outputs of the judge with the cause that is
            the last part of the field. Default: records.
    """

    kind: str
    filters: Mapping[str, str] = field(default_factory=dict)
    sort: str = ""
    unit: Literal["records", "questions", "outputs"] = "records"

    @property
    def parameters(self) -> dict[str, str]:
        """The parameters of their address."""
        return {**self.filters, **({"sort": self.sort} if self.sort else {})}


_Find = Callable[[Report], Records]
_SCORED_BY = {"gold": "by_gold", "judge": "by_judge"}


def _always(kind: str, unit: Literal["records", "questions", "outputs"] = "records", **filters: str) -> _Find:
    return lambda report: Records(kind, filters, unit=unit)


def _labelled(sort: str = "") -> _Find:
    """Return the test pairs with a label, by gold if gold labels some, otherwise by the judge."""
    return lambda report: Records("scored", {_SCORED_BY[report.evaluator.baselines_on]: "known"}, sort)


_POLICY: dict[str, _Find] = {
    "win_rate": _always("compared", outcome="decided"),
    "win": _always("compared", outcome="win"),
    "tie": _always("compared", outcome="tie"),
    "loss": _always("compared", outcome="loss"),
    "gold_before": _always("compared", gold_before="known"),
    "gold_after": _always("compared", gold_after="known"),
    "gold_gain": _always("compared", change="known"),
    "comparisons.gold": _always("compared", change="known"),
    "comparisons.win_rate": _always("compared", outcome="decided"),
    "kl": _always("compared"),
}
"""Fields of a policy, in the report and in each of its rounds."""

_CAUSES = ("cut", "loop", "label_mass", "no_room", "no_lead", "no_answer", "truncated", "refused")

LINKED: Mapping[str, _Find] = {
    "data.seeds": _always("seeds"),
    "data.questions": _always("questions", split="train"),
    "data.questions_test": _always("questions", split="test"),
    "data.replies": _always("replies"),
    "data.pairs_train": _always("pairs", split="train"),
    "data.pairs_held_out": _always("pairs", split="test"),
    "evaluator.accuracy_gold": _always("scored", by_gold="known"),
    "evaluator.accuracy_judge": _always("scored", by_judge="known"),
    **{f"evaluator.baselines.{name}": _labelled() for name in ("longer_wins", "first_wins", "mean_logprob", "ngram", "judge")},
    **{
        f"evaluator.comparisons.{name}": _labelled()
        for name in ("longer_wins", "first_wins", "mean_logprob", "ngram", "judge", "chance")
    },
    "evaluator.ece": _labelled(),
    "evaluator.brier": _labelled(),
    "evaluator.disagreement.error_correlation": _labelled("-disagreement"),
    "evaluator.risk_coverage": _labelled("-certainty"),
    "evaluator.calibration": _labelled("certainty"),
    "verdicts.judged": _always("verdicts"),
    **{f"verdicts.{state}": _always("verdicts", state=state) for state in ("kept", "tie", "unsure", "unparsable")},
    **{f"verdicts.unreadable_orders.{cause}": _always("verdicts", "outputs", cause=cause) for cause in _CAUSES},
    "verdicts.kept_share": _always("verdicts"),
    "verdicts.swap_consistency": _always("verdicts", consistent="known"),
    "verdicts.majority_share": _always("verdicts", share_min="0"),
    "verdicts.vote_entropy": _always("verdicts", entropy_min="0"),
    "verdicts.mean_grade": _always("verdicts", grade_min="-1e300"),
    "verdicts.members.*.voted": _always("verdicts"),
    **{f"policy.{name}": find for name, find in _POLICY.items()},
    "policy.win_rate_decisive": _always("compared", outcome="decisive"),
    "policy.length_controlled": _always("compared", outcome="decided"),
    "policy.unparsable": _always("compared", outcome="unparsable"),
    "policy.length_ratio": _always("compared"),
    "replies.unfinished": _always("replies", "questions", method="model"),
    "replies.unfinished_before": _always("compared"),
    "replies.unfinished_after": _always("compared"),
    **{
        f"replies.per_question.{name}": _always("replies", "questions", split="train")
        for name in ("distinct_1", "distinct_2", "overlap", "identical")
    },
    "rounds.*.evaluator.accuracy_gold": _always("scored", by_gold="known"),
    "rounds.*.evaluator.accuracy_judge": _always("scored", by_judge="known"),
    **{f"rounds.*.policy.{name}": find for name, find in _POLICY.items()},
}
"""The records behind a field of the report; `*` stands for a place in a list."""

_COST = "tokens are counted on random test pairs, which the records do not mark"
_MACHINE = "a measurement of the machine, not of records"
_STEP_LABELS = "step labels are not among the kinds of records that the pages show"
_FIRST = "the probe reads the first verdicts; the records do not mark them"
_ROUND_1 = "the margins of a later evaluator on the pairs of round 1 are not kept"
_ATTACKS = "attack replies are made during the evaluation and not kept"
_TOGETHER = "computed from all replies together"
_REFERENCES = "references are in the user's file, not among the records of the run"
_TESTS = "results of unit tests are not kept by reply"

NOT_LINKED: Mapping[str, str] = {
    "seed": "a setting",
    "model.parameters": "a property of the model",
    "evaluator.pairs_trained": "the pairs held out from training are not marked in the records",
    "evaluator.temperature": "fitted on held-out training pairs, which the records do not mark",
    "evaluator.temperature_pairs": "held-out training pairs are not marked in the records",
    "evaluator.members": "a setting",
    "evaluator.confidence.": "fitted on held-out training pairs; the evaluated pairs are linked from evaluator.ece",
    "evaluator.calibration.": "linked as a whole, as evaluator.calibration",
    "evaluator.cost.": _COST,
    "evaluator.attacks.": _ATTACKS,
    "verdicts.members.*.accuracy": "an estimate from all verdicts",
    "verdicts.members.*.agreement": "the verdicts on which a judge and another one voted cannot be selected",
    "verdicts.calibration.": "fitted numbers",
    "verdicts.probe.": _FIRST,
    "verdicts.label_accuracy_gold": "gold of training pairs is not kept in the records",
    "policy.diversity.": _TOGETHER,
    "policy.watchdogs.": "linked as a whole: the step leads to its samples",
    "policy.overoptimisation.": "gold of training samples is not kept in the records",
    "policy.references.": _REFERENCES,
    "policy.seed_references.": "replies to seeds are sampled in the evaluation and not kept",
    "replies.limit": "a setting",
    "replies.unit_tests.": _TESTS,
    "steps.": _STEP_LABELS,
    "rounds.*.round": "the number of the round",
    "rounds.*.evaluator.accuracy_gold_first_pairs": _ROUND_1,
    "rounds.*.evaluator.accuracy_judge_first_pairs": _ROUND_1,
    "rounds.*.evaluator.comparison": _ROUND_1,
    "rounds.*.evaluator.pairs_trained": "the pairs held out from training are not marked in the records",
    "domain_map.": "the records do not mark clusters",
    "dropped.": "linked by stage and reason",
    "labels.": "a list of labels would show later raters the answers of earlier ones; `selfeval show` lists them",
    "samples.": "each sample leads to its question",
    "time.": _MACHINE,
    "memory.": _MACHINE,
    "servers.": "answers of a server are not records of the run",
}
"""Why other numbers of the report have no link; a name that ends with a dot stands for all fields below it."""


def linked_fields(report: Report) -> Iterator[tuple[str, Records]]:
    """Yield each field of a report that has a value and records behind it, with these records."""
    for path, value in values_of(report):
        pattern = _pattern(path)
        if pattern in LINKED and _has_cases(value) and not (path == "evaluator.accuracy_gold" and is_gold_by_people(report)):
            yield path, LINKED[pattern](report)
    for chart in ("evaluator.risk_coverage", "evaluator.calibration"):
        if getattr(report.evaluator, chart.rpartition(".")[2]):
            yield chart, LINKED[chart](report)
    for stage in ("questions", "replies", "verdicts"):
        for reason in getattr(report.dropped, stage):
            yield f"dropped.{stage}.{reason}", Records("dropped", {"stage": stage, "reason": reason})
    for place, alarm in enumerate(report.policy.watchdogs):
        step = alarm.step if alarm.seen_at is None else alarm.seen_at
        yield f"policy.watchdogs.{place}.step", Records("sampled", {"step": str(step)})


def values_of(part: Part, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the path and the value of each figure, comparison and number of a part of the report."""
    for name in type(part).model_fields:
        yield from _values(getattr(part, name), f"{path}{name}")


def _values(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Part):
        yield from values_of(value, f"{path}.")
    elif isinstance(value, tuple) and value and isinstance(value[0], Part):
        for place, one in enumerate(value):
            yield from values_of(one, f"{path}.{place}.")
    elif isinstance(value, dict):
        for name, one in value.items():
            yield from _values(one, f"{path}.{name}")
    elif isinstance(value, Figure | Comparison | int | float) and not isinstance(value, bool):
        yield path, value


def _pattern(path: str) -> str:
    return re.sub(r"\.\d+(?=\.)", ".*", path)


def _has_cases(value: Any) -> bool:
    if isinstance(value, Comparison):
        value = value.difference
    return bool(value.n if isinstance(value, Figure) else value)
