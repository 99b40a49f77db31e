"""The contract of report.json: no loss on a round trip, errors that name a field, every field shown or hidden with a reason."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import typing
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sample_map import sample_map
from sample_report import compared, fig, labels_of_people, parsed, sample_metrics, sample_report
from test_memory import EVENTS
from test_rounds import row

from selfeval.errors import InputError
from selfeval.quality.comparisons import Comparison
from selfeval.quality.statistics import Figure
from selfeval.report.page import render
from selfeval.report.reading import parse_report
from selfeval.report.schema import Evaluation, Hidden, Part, Report
from selfeval.report.summary import rounds_sentences, summary_rows


def full_report() -> dict[str, Any]:
    """Every field present: two rounds, an ensemble, a gold file, an alarm that was acted on, and short memory."""
    better = compared(0.02, 0.01, 0.03, 2000, 60, 20, 0.0001, "better")
    report = sample_report()
    report["rounds"] = [row(1, None, better), row(2, better, better)]
    report["evaluator"] |= {"members": 3, "disagreement": {"error_correlation": fig(0.31, 0.2, 0.41, 1100)}}
    report["evaluator"]["first_pairs"] |= {"gain": fig(0.02, 0.01, 0.03, 1100), "comparison": better}
    report["model"]["gold_file"] = "answers.jsonl"
    report["policy"]["watchdogs"][0]["seen_at"] = 44
    report["memory"]["events"] = EVENTS
    report["labels"] = labels_of_people()
    report["domain_map"] = {**sample_map(), "points_hash": "0" * 16}
    return ordered(report)


def ordered(report: dict[str, Any]) -> dict[str, Any]:
    """The keys in the order in which a run writes them."""
    found: dict[str, Any] = parsed(report).model_dump(mode="json", by_alias=True)
    return found


def test_a_report_is_read_and_written_without_loss() -> None:
    report = full_report()
    again = parse_report(json.dumps(report)).as_json()
    assert json.dumps(again) == json.dumps(report)
    assert again == {**sample_report(), **report}, "the values are those of the sample"


def test_numbers_are_rounded_when_they_are_written() -> None:
    figure = parsed(sample_report()).policy.kl
    exact = parsed(sample_report()).policy.model_copy(update={"kl": Figure(1 / 3, 0.1234567, None, figure.n)})
    assert exact.model_dump()["kl"] == {"value": 0.333333, "ci_low": 0.123457, "ci_high": None, "n": figure.n}


def test_reading_a_report_imports_no_torch() -> None:
    code = "import sys, selfeval.report.reading; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


# -- malformed and older reports ----------------------------------------------------------------------------------------


def changed(path: str, change: Callable[[dict[str, Any], str], Any]) -> str:
    report: dict[str, Any] = full_report()
    *above, last = path.split(".")
    holder = report
    for key in above:
        holder = holder[key]
    change(holder, last)
    return json.dumps(report)


def without(holder: dict[str, Any], key: str) -> None:
    del holder[key]


def to(value: Any) -> Callable[[dict[str, Any], str], None]:
    def put(holder: dict[str, Any], key: str) -> None:
        holder[key] = value

    return put


@pytest.mark.parametrize(
    ("path", "change", "message"),
    [
        ("policy.comparisons", without, "'policy.comparisons' is missing"),
        ("evaluator.first_pairs.comparison", without, "'evaluator.first_pairs.comparison' is missing"),
        ("time.total", without, "'time.total' is missing"),
        ("policy.speed", to(1), "'policy.speed' is not a field of schema 1"),
        ("policy.kl", to({"mean": 3}), "'policy.kl.value' is missing"),
        ("policy.kl.mean", to(3), "'policy.kl.mean' is not a field of schema 1"),
        ("policy.kl.value", to(True), "'policy.kl.value' should be a valid number"),
        ("policy.kl.value", to("3"), "'policy.kl.value' should be a valid number"),
        ("policy.kl.value", to(float("nan")), "'policy.kl.value' should be a finite number"),
        ("policy.kl.value", to(10**400), "'policy.kl.value' should be a finite number"),
        ("policy.comparisons.gold.finding", to("fine"), "'policy.comparisons.gold.finding' should be 'better', 'worse'"),
        ("policy.comparisons.gold.test", to("t"), "'policy.comparisons.gold.test' should be 'mcnemar_exact'"),
        ("evaluator.baselines_on", to("people"), "'evaluator.baselines_on' should be 'gold' or 'judge'"),
        ("evaluator.risk_coverage", to([0.5]), "'evaluator.risk_coverage.0' should be a valid array"),
        ("samples", to({}), "'samples' should be a valid array"),
        ("policy", to([]), "'policy' should be an object"),
        ("time.policy", to("long"), "'time.stages.policy' should be a valid number"),
    ],
)  # fmt: skip
def test_a_malformed_or_older_report_is_refused_by_the_name_of_the_field(path: str, change: Any, message: str) -> None:
    with pytest.raises(
        InputError, match=f"^report.json: {re.escape(message)}.*; remove evaluation/figures.json in the run folder"
    ) as refused:
        parse_report(changed(path, change))
    assert "\n" not in str(refused.value)


# -- every field is shown -----------------------------------------------------------------------------------------------

Field = tuple[str, str]
"""Class and name of a field."""


def fields(kind: type[Part]) -> Iterator[tuple[Field, Any]]:
    """Every field of a part and of the parts inside it."""
    for name, info in kind.model_fields.items():
        yield (kind.__name__, name), info
        for inner in parts_in(info.annotation):
            yield from fields(inner)


def parts_in(annotation: Any) -> Iterator[type[Part]]:
    if isinstance(annotation, type) and issubclass(annotation, Part):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from parts_in(argument)


def is_hidden(info: Any) -> bool:
    return any(isinstance(entry, Hidden) and entry for entry in info.metadata)


def other(value: Any) -> Any:
    """Return a different value of the same type, visibly different when formatted."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, Figure):
        return Figure(0.0815, 0.0123, 0.0987, 4711)
    if isinstance(value, (int, float)):
        return value * 2 + 7
    if isinstance(value, str):
        return "file" if value == "judge" else "judge" if value == "gold" else "loss" if value in ("win", "tie") else "another"
    if isinstance(value, dict):
        return {"another": 4711.0}
    return [] if isinstance(value, tuple) else value


def variants(part: Part) -> Iterator[tuple[Field, Part]]:
    """The same part with one field changed, once for every field with a value in it and in the parts inside it."""
    for name in type(part).model_fields:
        value, field = getattr(part, name), (type(part).__name__, name)
        for inner_field, changed_value in value_variants(value):
            yield inner_field or field, part.model_copy(update={name: changed_value})


def value_variants(value: Any) -> Iterator[tuple[Field | None, Any]]:
    if value is None:
        return
    if isinstance(value, Part):
        yield from variants(value)
    elif isinstance(value, tuple) and value and isinstance(value[0], Part):
        for at, entry in enumerate(value):
            for field, changed_entry in variants(entry):
                yield field, (*value[:at], changed_entry, *value[at + 1 :])
    elif isinstance(value, Comparison):
        difference = Figure(0.0815, 0.0123, 0.0987, 4711)
        yield None, Comparison(difference, 815, 321, 0.0456, "sign_exact", "unclear")
    elif isinstance(value, tuple) and value and isinstance(value[0], float):
        yield None, (other(value[0]), *value[1:])
    elif isinstance(value, tuple):
        yield None, value[:-1]
    else:
        yield None, other(value)


METRICS = {name: rows[:: len(rows) // 4] for name, rows in sample_metrics().items()}
"""Short curves, because the page is drawn for every field."""


def shown(report: Report) -> str:
    """Return all text shown to a user: the page, the terminal's table and its sentences."""
    return "\n".join((render(report, METRICS), str(summary_rows(report)), *rounds_sentences(report)))


def unseen(report: Report) -> set[Field]:
    """Return the fields whose changes do not appear on the page or the terminal."""
    before, found, seen = shown(report), set[Field](), set[Field]()
    for field, variant in variants(report):
        if field in seen:
            continue
        found.add(field)
        assert isinstance(variant, Report)
        if shown(variant) != before:
            seen.add(field)
    return found - seen


@pytest.fixture(scope="module")
def invisible() -> set[Field]:
    by_judge = full_report()
    for entry in by_judge["rounds"]:
        entry["evaluator"]["accuracy_gold_first_pairs"] = None  # its place is then taken by the judge's figure
    return unseen(parsed(full_report())) & unseen(parsed(by_judge))


def test_every_field_is_on_the_page_or_hidden_for_a_reason(invisible: set[Field]) -> None:
    all_fields = dict(fields(Report))
    hidden = {field for field, info in all_fields.items() if is_hidden(info)}
    inside = {inner for field in hidden for kind in parts_in(all_fields[field].annotation) for inner, _ in fields(kind)}
    assert invisible - hidden - inside == set(), "show these fields on the page, or mark them Hidden with a reason"
    assert {field for field in hidden if field not in invisible and not list(parts_in(all_fields[field].annotation))} == set()


def test_every_field_has_a_docstring() -> None:
    assert [field for field, info in fields(Report) if not info.description] == []
    assert set(Evaluation.model_fields) < {*Report.model_fields, "seconds_per_verdict"}
