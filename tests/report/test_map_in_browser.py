"""The map in a real browser: texts by pointer and by keyboard, colours without a script, accessibility, phones."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sample_map import sample_map, sample_points
from sample_report import parsed, sample_metrics, sample_report
from test_browser import OVERLAPS, axe_core

from selfeval.report.map_chart import ordered_points
from selfeval.report.map_points import MapPoint, cut_text
from selfeval.report.page import render
from slow import slow

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: no page is opened in a browser")

CHROMIUM = Path("/usr/bin/chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not CHROMIUM.exists():
        pytest.skip("chromium is not installed: no page is opened in a browser here")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "index.html"
    report = parsed({**sample_report(), "domain_map": sample_map()})
    path.write_text(render(report, sample_metrics(), linked_points()), encoding="utf-8")
    return path.as_uri()


def linked_points() -> list[MapPoint]:
    """The points of the sample, of which the most isolated one is the question of the second sample of replies."""
    points = ordered_points(sample_points())
    place = _most_isolated(points)
    question = parsed(sample_report()).samples[1].question
    return [*points[:place], points[place].model_copy(update={"id": "q9", "text": cut_text(question)}), *points[place + 1 :]]


def test_texts_are_read_with_the_keyboard_and_shown_under_the_pointer(browser: Any, address: str) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(address)
    points = ordered_points(linked_points())
    page.focus(".map-walk input")
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    assert page.inner_text(".map-text").startswith(points[3].text)
    assert page.get_attribute(".map-walk input", "aria-valuetext").startswith(points[3].text)
    page.keyboard.press("End")
    assert page.inner_text(".map-text").startswith(points[-1].text)
    assert page.locator(".m-point.chosen").count() == 1
    alone = _most_isolated(points)
    marker = page.locator(".m-point").nth(alone)
    marker.scroll_into_view_if_needed()
    box = marker.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    # Chromium delivers moves of the pointer with the next frame, so the text may change a little later.
    playwright.expect(page.locator(".map-text")).to_contain_text(points[alone].text)
    playwright.expect(page.locator(".map-walk input")).to_have_value(str(alone))
    assert said == [], "the policy of the page allows the script, and it raises nothing"
    page.close()


def test_a_question_is_opened_with_the_keyboard_and_by_a_click(browser: Any, address: str) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(address)
    points = ordered_points(linked_points())
    alone = _most_isolated(points)
    assert points[alone].id == "q9"
    link, slider = page.locator(".map-open a"), page.locator(".map-walk input")
    assert not link.is_visible(), "nothing is chosen yet"
    slider.evaluate(f"e => {{ e.value = {alone - 1}; }}")
    slider.focus()
    page.keyboard.press("ArrowRight")
    assert link.get_attribute("href") == "#sample-1"
    page.keyboard.press("Tab")
    assert link.evaluate("e => e === document.activeElement")
    page.keyboard.press("Enter")
    page.wait_for_url(f"{address}#sample-1")
    slider.focus()
    page.keyboard.press("ArrowRight")
    assert not link.is_visible(), "the next point has no sample"
    page.goto(f"{address}#map")
    marker = page.locator(".m-point").nth(alone)
    marker.scroll_into_view_if_needed()
    box = marker.bounding_box()
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.wait_for_url(f"{address}#sample-1")
    page.close()


def _most_isolated(points: list[MapPoint]) -> int:
    """Return the index of the point that is farthest from all others: no neighbour can be taken for it."""
    places = [(point.x, point.y) for point in points]
    return max(range(len(places)), key=lambda one: sorted(math.dist(places[one], other) for other in places)[1])


def test_colours_are_chosen_without_a_script(browser: Any, address: str) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(address)
    seen = {}
    for value in ("cluster", "kept", "accuracy", "confidence"):
        page.check(f"[name=map-colour][value={value}]")
        seen[value] = [
            page.locator(f".m-point{name}").first.evaluate("e => getComputedStyle(e).color") for name in (".m-k0", ".m-k1")
        ]
        seen[f"{value} none"] = [page.locator(".m-seed").first.evaluate("e => getComputedStyle(e).color")]
    assert seen["cluster"][0] != seen["cluster"][1]
    assert seen["kept none"] == seen["accuracy none"] == seen["confidence none"] != seen["cluster none"]
    page.check("[value=accuracy]")
    right = page.locator(".m-point.m-b3").first.evaluate("e => getComputedStyle(e).color")
    wrong = page.locator(".m-point.m-b0").first.evaluate("e => getComputedStyle(e).color")
    assert right != wrong
    assert page.locator(".map-of-share").is_visible()
    assert not page.locator(".map-of-cluster").is_visible()
    assert not page.locator(".map-walk").is_visible(), "a slider that does nothing is not shown"
    assert page.locator("#map tbody tr").count() == 5
    context.close()


@pytest.mark.parametrize(("width", "scheme"), [slow(1280, "light"), slow(1280, "dark"), slow(360, "light"), (360, "dark")])
def test_the_map_breaks_no_rule_of_accessibility_and_is_not_wider_than_the_screen(
    browser: Any, address: str, width: int, scheme: str
) -> None:
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme, bypass_csp=True)
    page.goto(address)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.evaluate(axe_core())
    slider = page.locator(".map-walk input")
    slider.evaluate(f"e => {{ e.value = {_most_isolated(ordered_points(linked_points()))}; }}")
    slider.dispatch_event("input")
    assert page.locator(".map-open a").is_visible()
    for value in ("cluster", "kept"):
        page.check(f"[name=map-colour][value={value}]")
        found = page.evaluate("axe.run('#map').then(found => found.violations)")
        assert [(one["id"], one["nodes"][0]["html"][:200]) for one in found] == []
    page.evaluate(OVERLAPS)
    assert page.get_attribute("body", "data-found") == "[]"
    page.close()
