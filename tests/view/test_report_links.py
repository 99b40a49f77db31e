"""The report in the pages: every figure has its records behind it, or a reason; the standalone page is unchanged by links."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import pytest
from fastapi.testclient import TestClient
from pydantic import BaseModel
from sample_report import emptied, parsed, sample_metrics, sample_report

from selfeval.quality.comparisons import Comparison
from selfeval.quality.statistics import Figure
from selfeval.report.page import render, render_body
from selfeval.report.schema import Hidden, Report
from selfeval.runs.reader import RunReader
from selfeval.serve.gate import Access
from selfeval.view.app import make_view
from selfeval.view.index import RunIndex
from selfeval.view.kinds import KINDS
from selfeval.view.links import LINKED, NOT_LINKED, linked_fields, values_of
from selfeval.view.opened import OpenedRuns
from selfeval.view.query import find, parse_query
from selfeval.view.report import report_links
from view_runs import ViewRun, make_view_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ViewRun]:
    folder = tmp_path_factory.mktemp("view") / "shop"
    return folder, make_view_run(folder)


def number_fields(model: type[BaseModel], path: str = "") -> Iterator[str]:
    """Yield the path of each field of the schema with a figure, a comparison or a number; `*` is a place in a list."""
    for name, field in model.model_fields.items():
        hidden = any(isinstance(note, Hidden) for note in field.metadata)
        if not hidden:
            yield from fields_of(field.annotation, f"{path}{name}")


def fields_of(hint: Any, path: str) -> Iterator[str]:
    if get_origin(hint) is Annotated or get_origin(hint) in (dict,):
        hint = get_args(hint)[-1] if get_origin(hint) is dict else get_args(hint)[0]
    if isinstance(hint, type) and issubclass(hint, BaseModel):
        yield from number_fields(hint, f"{path}.")
    elif hint in (Figure, Comparison, int, float):
        yield path
    elif get_origin(hint) is tuple:
        inner = get_args(hint)[0]
        is_part = isinstance(inner, type) and issubclass(inner, BaseModel)
        yield from number_fields(inner, f"{path}.*.") if is_part else [path]
    elif get_args(hint):
        for part in get_args(hint):
            yield from fields_of(part, path)


def reason(path: str) -> str | None:
    """Return why a field has no link."""
    above = [path, *(path[: place + 1] for place, letter in enumerate(path) if letter == ".")]
    return next((NOT_LINKED[name] for name in above if name in NOT_LINKED), None)


def test_every_number_of_the_schema_has_a_link_or_a_reason() -> None:
    paths = set(number_fields(Report))
    assert len(paths) > 100
    assert sorted(path for path in paths if path not in LINKED and reason(path) is None) == []
    assert sorted(path for path in LINKED if reason(path) is not None) == []
    assert sorted(set(LINKED) - paths) == ["evaluator.calibration", "policy.gold_gain", "rounds.*.policy.gold_gain"]
    assert [name for name in NOT_LINKED if not any(path == name or path.startswith(name) for path in paths)] == []


def test_as_many_records_are_behind_a_link_as_its_figure_counts(run: tuple[Path, ViewRun], tmp_path: Path) -> None:
    report = run[1].report("shop")
    index = RunIndex(run[0], tmp_path / "index.sqlite")
    index.refresh(RunReader(run[0]), KINDS, 60)
    values, checked = dict(values_of(report)), []
    for path, records in linked_fields(report):
        with index.reading() as connection:
            query = parse_query(KINDS[records.kind], records.parameters)
            found = list(index.load(find(connection, query, whole=True).records))
        if records.unit == "questions":
            counted = len({row["question_id"] for row in found})
        elif records.unit == "outputs":
            counted = sum(row["evidence"]["causes"].count(path.rpartition(".")[2]) for row in found)
        else:
            counted = len(found)
        expected = cases(path, values, report)
        assert counted == expected > 0, path
        checked.append(path)
    assert len(checked) > 45
    assert {"policy.watchdogs.0.step", "dropped.verdicts.tie", "evaluator.risk_coverage"} <= set(checked)


def cases(path: str, values: dict[str, Any], report: Report) -> int:
    """Return the number of cases of a field: the n of a figure, or a count."""
    if path.startswith("policy.watchdogs."):
        return 3  # samples of each step in the run of these tests
    if path == "evaluator.calibration":
        return sum(part.n for part in report.evaluator.calibration)
    if path == "evaluator.risk_coverage":
        return report.evaluator.brier.n
    value = values[path]
    value = value.difference if isinstance(value, Comparison) else value
    return value.n if isinstance(value, Figure) else int(value)


def test_accuracy_is_the_share_of_records_that_are_right(run: tuple[Path, ViewRun], tmp_path: Path) -> None:
    evaluator = run[1].report("shop").evaluator
    index = RunIndex(run[0], tmp_path / "index.sqlite")
    index.refresh(RunReader(run[0]), KINDS, 60)
    for name, figure in (("by_gold", evaluator.accuracy_gold), ("by_judge", evaluator.accuracy_judge)):
        with index.reading() as connection:
            right = find(connection, parse_query(KINDS["scored"], {name: "right"})).total
        assert figure is not None
        assert 0 < right < figure.n
        assert right / figure.n == pytest.approx(figure.value)


def test_the_page_has_a_link_for_each_field_that_it_shows(run: tuple[Path, ViewRun]) -> None:
    client = TestClient(make_view(OpenedRuns([run[0]]), Access(None, loopback=True)), base_url="http://127.0.0.1")
    html = client.get("/view/run/shop/report").text.replace("&amp;", "&")
    missing = [path for path, link in report_links("shop", run[1].report("shop")).items() if f'href="{link}"' not in html]
    assert missing == []
    assert html.count("<main") == 1
    assert html.count('href="/view/run/shop/question/q0#compared-title"') == 1, "samples lead to their question"
    for link in re.findall(r'href="(/view/run/shop/[^"]+)"', html):
        assert client.get(link).status_code == 200, link


def test_records_of_a_later_round_are_those_of_its_folder() -> None:
    import test_rounds as rounds

    report = parsed(rounds.report(rounds.row(1, None, rounds.UP), rounds.row(2, rounds.UP, rounds.UP)))
    links = report_links("shop", report)
    assert links["rounds.0.policy.win"] == "/view/run/shop/compared?outcome=win"
    assert links["rounds.1.policy.win"] == "/view/run/shop@2/compared?outcome=win"


@pytest.mark.parametrize("report", [sample_report(), emptied(sample_report())], ids=["measured", "empty"])
def test_the_standalone_page_is_the_linked_one_without_its_links(report: dict[str, Any]) -> None:
    made = parsed(report)
    links = {path: f"/records/{path}" for path in report_links("shop", made)}
    linked = render_body(made, sample_metrics(), links)
    assert linked.count('<a href="/records/') >= len([path for path in links if not path.startswith("rounds")]) * 0.9
    without = re.sub(r'<p class="small"><a href="/records/[^"]*">Records of this chart</a></p>', "", linked)
    without = re.sub(r'<a href="/records/[^"]*">(.*?)</a>', r"\1", without)
    standalone = render(made, sample_metrics())
    assert standalone.count("<main>") == standalone.count("</main>") == 1
    standalone = standalone.replace("<main>", "<div>").replace("</main>", "</div>")  # the frame of `view` has the other one
    assert without == standalone[standalone.index("<header>") : standalone.index("<footer>") - 1]
