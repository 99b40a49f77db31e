"""The section of the map: what it says, what it draws, and what it is without its points or its script."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from sample_map import SIZES, sample_map, sample_points
from sample_report import fig, parsed, sample_metrics, sample_report, write_run

from selfeval.errors import InputError
from selfeval.report.map_chart import map_chart, ordered_points
from selfeval.report.map_points import MAP_FILE, MapPoint, MapPoints, cut_text, points_fingerprint, read_map_points
from selfeval.report.map_section import map_sentences, sample_links
from selfeval.report.page import draw_page, render, render_body
from selfeval.report.schema import DomainMap


def report_with_map(**changes: Any) -> dict[str, Any]:
    return {**sample_report(), "domain_map": {**sample_map(), **changes}}


def the_map(**changes: Any) -> DomainMap:
    found = parsed(report_with_map(**changes)).domain_map
    assert found is not None
    return found


def test_the_sentences_name_the_weak_and_the_thin_cluster() -> None:
    weak, thin, silhouette = map_sentences(the_map())
    # The others have 30, 15 and 12 questions with labels; the last one has 4, too few to be compared.
    assert weak == (
        "The evaluator is the weakest in cluster 2 (bus, minutes, station): right on 71.0% (interval 58.0% to 82.0%, n = 22), "
        "by gold; its interval is below the 96.0% of the other clusters."
    )
    assert thin == "Few questions were asked in cluster 5 (pages, reads, book), 8 next to 2 seeds. The mean is 33 per cluster."
    assert silhouette == "Silhouette of the clusters: 0.23."


def test_a_cluster_is_called_weak_only_with_enough_questions_and_an_interval_below_the_others() -> None:
    clusters = sample_map()["clusters"]
    clusters[1] = {**clusters[1], "accuracy": fig(0.71, 0.58, 0.97, 22)}
    assert "its interval includes the 96.0%" in map_sentences(the_map(clusters=clusters))[0]
    clusters[1] = {**clusters[1], "accuracy": fig(0.2, 0.1, 0.4, 9)}
    assert "cluster 2" not in map_sentences(the_map(clusters=clusters))[0]
    few = [{**cluster, "questions": 20, "accuracy": fig(None, None, None, 0)} for cluster in clusters]
    assert map_sentences(the_map(clusters=few, silhouette=0.02)) == [
        "The clusters overlap (silhouette 0.02): their borders are arbitrary."
    ]


def test_each_text_is_a_point_with_its_place_its_levels_and_its_tooltip() -> None:
    names = ["apples", "buses"]
    base = {"id": "q1", "reason": "", "kept": None, "accuracy": None, "confidence": None}
    points = [
        MapPoint.model_validate({**base, "kind": "test", "text": "a < b?", "x": 0.0, "y": 1.0, "cluster": 0, "kept": 0.5,
                                 "accuracy": 1.0, "confidence": 0.59}),
        MapPoint.model_validate({**base, "kind": "seed", "text": "Seed?", "x": 1.0, "y": 0.0, "cluster": 1}),
        MapPoint.model_validate({**base, "kind": "dropped", "text": "Twin?", "x": 0.5, "y": 0.5, "cluster": 1,
                                 "reason": "near_duplicate"}),
    ]  # fmt: skip
    drawn = map_chart(points, names, label="Map")
    # Upper left, inside the margin; the y axis points up. Half is the second level, 1 the fourth, 0.59 the first one.
    assert '<circle class="m-point m-k0 m-a1 m-b3 m-c0" cx="10.0" cy="10.0" r="2.2">' in drawn
    assert "a &lt; b?\ntest question; cluster 1: apples; verdicts kept 50%; evaluator right 100%; " in drawn
    assert 'class="m-point m-seed m-k1 m-an m-bn m-cn" d="M350.0 256.0l4 4l-4 4l-4 -4z"' in drawn
    assert "Twin?\ndropped question (near duplicate); cluster 2: buses</title>" in drawn
    assert 'aria-label="Map. cluster 1: apples, 1 texts; cluster 2: buses, 2 texts"' in drawn
    assert [point.text for point in ordered_points(points)] == ["a < b?", "Twin?", "Seed?"]


def test_labels_of_clusters_with_the_same_middle_are_apart() -> None:
    labels = re.findall(
        r'<text class="m-label middle" x="([\d.]+)" y="([\d.]+)">', map_chart(sample_points(), ["a"] * 5, label="M")
    )
    places = [(float(x), float(y)) for x, y in labels]
    assert len(places) == len(SIZES)
    assert all(abs(a - c) >= 18 or abs(b - d) >= 14 for i, (a, b) in enumerate(places) for c, d in places[:i])


def test_only_a_page_with_a_map_has_a_script_and_its_policy_allows_no_other() -> None:
    html = render(parsed(report_with_map()), sample_metrics(), sample_points())
    [script] = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'\">" in html
    assert html.count('class="m-point') == sum(SIZES) + 10
    assert "&lt;apples&gt;" in html
    assert "how many <apples>" not in html
    without = render(parsed(sample_report()), sample_metrics())
    assert "<script" not in without
    assert "script-src" not in without
    assert 'id="map"' not in without


def test_without_its_points_the_map_is_a_table() -> None:
    html = render(parsed(report_with_map()), sample_metrics())
    assert "are missing in this run folder" in html
    assert "<script" not in html
    assert "marbles, gives, friend" in html


def test_the_page_is_drawn_from_the_files_of_the_run(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", report_with_map())
    assert read_map_points(folder) == ()
    points = MapPoints(points=tuple(sample_points()))
    (folder / "evaluation").mkdir()
    (folder / MAP_FILE).write_text(json.dumps(points.as_json()), encoding="utf-8")
    read = read_map_points(folder)
    assert [point.text for point in read] == [point.text for point in points.points]
    assert read[0].x == round(points.points[0].x, 4)
    assert draw_page(folder).read_text(encoding="utf-8").count('class="m-point') == len(read)


def test_points_of_another_evaluation_are_not_drawn(tmp_path: Path) -> None:
    points = sample_points()
    folder = write_run(tmp_path / "run", report_with_map(points_hash=points_fingerprint(points)))
    (folder / "evaluation").mkdir()
    file = folder / MAP_FILE
    file.write_text(json.dumps(MapPoints(points=tuple(points)).as_json()), encoding="utf-8")
    assert draw_page(folder).read_text(encoding="utf-8").count('class="m-point') == len(points)
    moved = [points[0].model_copy(update={"x": points[0].x / 2 + 0.2}), *points[1:]]
    file.write_text(json.dumps(MapPoints(points=tuple(moved)).as_json()), encoding="utf-8")
    html = draw_page(folder).read_text(encoding="utf-8")
    assert 'class="m-point' not in html
    assert "are of another evaluation than this report" in html
    assert "marbles, gives, friend" in html, "the table of the clusters is the report's own"


def test_points_lead_to_the_sample_of_their_question_or_nowhere() -> None:
    report = parsed(report_with_map())
    asked = [point for point in sample_points() if point.id][:4]
    first, second = report.samples[:2]
    texts = [cut_text(first.question), cut_text(second.question), cut_text(second.question), "not a sample"]
    points = [point.model_copy(update={"text": text}) for point, text in zip(asked, texts, strict=True)]
    points.append(sample_points()[-1].model_copy(update={"id": "", "text": cut_text(first.question)}))
    # Two questions share the text of the second sample, and a dropped question is none of the run.
    assert sample_links(points, report.samples) == {asked[0].id: "#sample-0"}
    assert sample_links(points, [first, first]) == {}
    html = render(report, sample_metrics(), points)
    assert html.count("data-href=") == html.count('data-href="#sample-0"') == 1
    assert html.count('id="sample-0"') == 1
    assert "Go to the replies to this question" in html
    assert "map-open" not in re.sub(r"<(style|script)>.*?</\1>", "", render(report, {}, sample_points()), flags=re.DOTALL)


def test_in_the_viewer_points_lead_to_the_pages_of_their_questions() -> None:
    links = {point.id: f"/run/a/question/{point.id}?x=1&y" for point in sample_points() if point.id}
    body = render_body(parsed(report_with_map()), {}, {}, sample_points(), links)
    assert body.count("data-href=") == sum(SIZES)
    assert 'data-href="/run/a/question/q0000?x=1&amp;y"' in body
    assert "Open the page of this question" in body


def test_a_damaged_file_of_points_is_named_with_its_field(tmp_path: Path) -> None:
    (tmp_path / "evaluation").mkdir()
    value = MapPoints(points=tuple(sample_points()[:2])).as_json()
    value["points"][1]["x"] = "left"
    (tmp_path / MAP_FILE).write_text(json.dumps(value), encoding="utf-8")
    with pytest.raises(InputError, match=r"map\.json: 'points\.1\.x' should be a valid number"):
        read_map_points(tmp_path)


def test_the_page_of_the_largest_map_stays_small() -> None:
    long = MapPoint.model_validate({**sample_points()[0].model_dump(), "text": "字" * 160})
    html = render(parsed(report_with_map()), {}, [long] * 2000)
    assert len(html.encode()) < 2_000_000
