"""Check the page in a real browser: accessibility rules (axe-core), and overlapping texts in charts."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from sample_report import emptied, parsed, sample_metrics, sample_report

from selfeval.report.page import render

POLICY = (
    "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">"
)
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")

RULES = """
axe.run(document, {runOnly: {type: "tag", values: ["wcag2a", "wcag2aa", "best-practice"]}}).then(found => {
  const seen = found.violations.map(v => [v.id, v.help, v.nodes.length, v.nodes[0].html.slice(0, 160)]);
  document.title = "done"; document.body.setAttribute("data-found", JSON.stringify(seen));
});
"""

OVERLAPS = """
const clashes = [];
for (const svg of document.querySelectorAll("svg.chart")) {
  const texts = [...svg.querySelectorAll("text")].filter(text => !text.closest(".probe"));
  const boxes = texts.map(text => [text.textContent, text.getBoundingClientRect()]);
  for (let i = 0; i < boxes.length; i++) for (let j = 0; j < i; j++) {
    const [a, b] = [boxes[i][1], boxes[j][1]];
    const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
    const high = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
    if (wide > 1 && high > 2) clashes.push([svg.getAttribute("aria-label").slice(0, 60), boxes[j][0], boxes[i][0]]);
  }
}
document.body.setAttribute("data-found", JSON.stringify(clashes));
"""


def whole_report() -> dict[str, Any]:
    """A report with every section of the page: gold, four lines in one chart, alarms, prompts."""
    report = sample_report()
    report["policy"]["overoptimisation"] = {
        "points": [[k / 4, 0.4 + k / 50, 0.4 + k / 60] for k in range(10)],
        "start": [0.4, 0.4],
        "fit": {"evaluator": {"alpha": 0.2, "beta": 0.05, "rmse": 0.01}, "gold": {"alpha": 0.18, "beta": 0.06, "rmse": 0.01}},
        "gap": {"value": 0.05, "ci_low": 0.01, "ci_high": 0.09, "n": 320},
    }
    report["prompts"] = {"judge.jinja": "Which reply is better?\n{{ first }}\n{{ second }}", "templates.toml": 'tie = "C"'}
    return report


def in_browser(html: str, script: str, folder: Path) -> list[list[Any]]:
    """Return the result of a script on the page, with all details open; bypasses the page's policy, which forbids scripts."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed: the page is not opened in a browser here")
    assert POLICY in html
    page = (
        html.replace(POLICY, "").replace("<details>", "<details open>").replace("</body>", f"<script>{script}</script></body>")
    )
    (folder / "page.html").write_text(page, encoding="utf-8")
    command = [chromium, *FLAGS, f"--user-data-dir={folder / 'profile'}", "--window-size=1280,1000"]
    command += ["--virtual-time-budget=20000", "--dump-dom", (folder / "page.html").as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True).stdout
    assert 'data-found="' in dom, "the script did not come to its end"
    found = dom.split('data-found="', 1)[1].split('"', 1)[0]
    for code, letter in (("&quot;", '"'), ("&lt;", "<"), ("&gt;", ">"), ("&amp;", "&")):
        found = found.replace(code, letter)
    listed: list[list[Any]] = json.loads(found)
    return listed


def axe_core() -> str:
    """The source of axe-core: where AXE_CORE says, or where npm puts it."""
    root = Path(__file__).resolve().parents[2]
    places = [os.environ.get("AXE_CORE", ""), root / ".ci" / "node_modules" / "axe-core" / "axe.min.js"]
    found = next((Path(place) for place in places if place and Path(place).is_file()), None)
    if found is None:
        pytest.skip("axe-core is not installed (npm install --prefix .ci axe-core): accessibility is not checked here")
    return found.read_text(encoding="utf-8")


def test_the_page_breaks_no_rule_of_accessibility(tmp_path: Path) -> None:
    """Heading order, names of pictures and regions, contrast, scrollable regions."""
    assert in_browser(render(parsed(whole_report()), sample_metrics()), axe_core() + RULES, tmp_path) == []


def test_no_text_of_a_chart_lies_on_another(tmp_path: Path) -> None:
    assert in_browser(render(parsed(whole_report()), sample_metrics()), OVERLAPS, tmp_path) == []


def test_a_page_with_nothing_measured_breaks_no_rule_either(tmp_path: Path) -> None:
    assert in_browser(render(parsed(emptied(sample_report())), {}), axe_core() + RULES, tmp_path) == []
