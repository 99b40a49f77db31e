"""The page itself: escaping, statements on missing figures, atomic writing, and parsing as HTML."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from sample_report import compared, fig, parsed, sample_metrics, sample_report, write_run

from selfeval.errors import InputError, StorageError
from selfeval.report import charts
from selfeval.report import page as pages
from selfeval.report.page import draw_page
from selfeval.store import files

ATTACK = "<script>alert(1)</script>"
QUIET = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run")
OFFLINE = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage")


def render(report: dict[str, Any], metrics: dict[str, Any]) -> str:
    return pages.render(parsed(report), metrics)


class Elements(HTMLParser):
    """Collects every start tag with its attributes, and the text of the page without its style."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.words = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words += f" {data}"

    def of(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_many_replies_that_the_limit_cut_off_are_a_warning() -> None:
    report = sample_report()
    assert "Warning" not in words(render(report, {}))
    report["replies"]["unfinished"] = fig(0.54, 0.49, 0.59, 400)
    assert "raise replies.max_new_tokens (now 48)" in words(render(report, {}))


def words(html: str) -> str:
    return re.sub(r"\s+", " ", Elements(html).words)


def test_the_page_carries_the_figures_of_the_report() -> None:
    said = words(render(sample_report(), sample_metrics()))
    for expected in ("93.1%", "41.2% → 68.7%", "76.7%", "▲ better", "3 min 51 s", "858 MiB", "word-problems"):
        assert expected in said
    assert "length drift Replies grew by 12% in ten steps while the score did not. warn" in said
    assert "policy.kl_target" not in said  # keys are in the table of their part
    assert "kl_target 4.0" in said
    assert "was not measured" not in said


def test_statements_on_the_judge_hold_for_every_setting() -> None:
    report = sample_report()
    report["config"]["verdicts"] = {"keep": 0.5}
    report["verdicts"]["swap_consistency"] = fig(0.0, 0.0, 0.1, 3000)
    report["evaluator"]["accuracy_gold"] = None
    report["evaluator"]["baselines_on"] = "judge"
    report["policy"] |= {"win": 0, "loss": 0, "tie": 20, "win_rate": fig(0.5, 0.39, 0.61, 20)}
    said = words(render(report, sample_metrics()))
    assert "The judge's probability of one reply reached verdicts.keep" in said
    for false in ("confident in both orders", "was sure", "the prompted judge", "right by construction"):
        assert false not in said
    assert "Win rate, after vs. before – the referee decided none of 20 comparisons" in said


def test_a_judge_of_single_replies_has_a_mean_grade_and_no_figures_of_orders() -> None:
    report = sample_report()
    assert "Mean grade" not in words(render(report, sample_metrics()))
    report["config"]["verdicts"] = {"judge": "pointwise", "keep": 0.8}
    nothing = {"value": None, "ci_low": None, "ci_high": None, "n": 0}
    report["verdicts"] |= {"swap_consistency": nothing, "mean_grade": fig(3.25, 3.125, 3.5, 2900)}
    said = words(render(report, sample_metrics()))
    assert "Mean grade of the replies, on the scale of the rubric 3.25 3.12 to 3.50 2,900" in said
    assert "Same choice (one, other, neither)" not in said


def test_a_judge_of_votes_has_no_figures_of_orders() -> None:
    report = sample_report()
    report["config"]["verdicts"] = {"judge": "agreement", "keep": 0.8}
    nothing = {"value": None, "ci_low": None, "ci_high": None, "n": 0}
    report["verdicts"] |= {"swap_consistency": nothing, "majority_share": fig(0.71, 0.68, 0.74, 2900)}
    report["verdicts"]["unreadable_orders"]["no_answer"] = 7
    report["verdicts"]["probe"] |= {"agreement": nothing, "shown_first": nothing, "label_mass": nothing, "findings": []}
    said = words(render(report, sample_metrics()))
    assert "Share of the votes for the most frequent answer 71.0% 68.0% to 74.0% 2,900" in said
    assert "Outputs of the judge that ended without an answer 7" in said
    assert "its votes were split" in said
    for other in ("when the order is swapped", "shown first", "probability of the verdict labels"):
        assert other not in said


def test_a_combined_judge_has_rows_for_every_member() -> None:
    report = sample_report()
    assert "estimated from agreement" not in words(render(report, sample_metrics()))
    nothing = {"value": None, "ci_low": None, "ci_high": None, "n": 0}
    silent = {"judge": "agreement", "accuracy": 0.5, "voted": fig(0.0, 0.0, 0.01, 3000), "agreement": nothing}
    voting = {
        "judge": "pointwise",
        "accuracy": 0.875,
        "voted": fig(0.75, 0.7, 0.8, 3000),
        "agreement": fig(0.8, 0.75, 0.85, 2000),
    }
    report["config"]["verdicts"] = {"judge": "combined", "keep": 0.8}
    report["verdicts"]["members"] = [voting, silent]
    said = words(render(report, sample_metrics()))
    assert "Judge pointwise: accuracy of its votes, estimated from agreement 87.5%" in said
    assert "Judge pointwise: share of the pairs on which it voted 75.0% 70.0% to 80.0% 3,000" in said
    assert "Judge pointwise: votes of the other judges that agree with its own 80.0% 75.0% to 85.0% 2,000" in said
    assert "Judge agreement: share of the pairs on which it voted 0.0%" in said
    assert "Judge agreement: votes of the other judges" not in said


def test_signals_of_judge_and_evaluator_and_kinds_trained_against_are_shown() -> None:
    report = sample_report()
    assert "weight of swap agreement" not in words(render(report, sample_metrics()))
    signals = {"agreement": 0.25, "margin": 0.5, "entropy": -1.5, "disagreement": 0.0, "truncated": -0.1, "steps": [[0.0, 0.5]]}
    report["verdicts"]["calibration"] = {"slope": 1.0, "truncated_slope": 1.0, "bias": 0.0, "signals": signals}
    weights = {"choice": 0.125, "margin": 0.75, "disagreement": -0.5, "scale": 0.875, "steps": []}
    ece = {"value": 0.021, "ci_low": 0.01, "ci_high": 0.04, "n": 1100}
    report["evaluator"]["confidence"] = {**weights, "ece_of_margin": ece, "aurc": 0.0125, "aurc_of_margin": 0.025}
    report["evaluator"]["attacks"]["kinds"][0]["trained"] = True
    report["evaluator"]["attacks"]["held_out"] = {"value": 0.9, "ci_low": 0.8, "ci_high": 0.95, "n": 50}
    said = words(render(report, sample_metrics()))
    assert "Calibration: weight of swap agreement +0.250" in said
    assert "Calibration: weight of the entropy of the votes, per nat -1.500" in said
    assert "Calibration: points of the isotonic regression 1" in said
    assert "Confidence: weights of preference, margin and disagreement of the members +0.125, +0.750, -0.500" in said
    assert "Expected calibration error, confidence of the margin alone 0.021" in said
    assert "(trained against) 100.0%" in said
    assert "kinds not trained against 90.0%" in said


def test_the_calibration_of_the_judge_is_shown() -> None:
    report = sample_report()
    assert "Calibration: factor" not in words(render(report, sample_metrics()))
    report["verdicts"]["calibration"] = {"slope": 0.125, "truncated_slope": 0.0, "bias": 1.5}
    said = words(render(report, sample_metrics()))
    assert "Calibration: factor of the log-odds of a verdict 0.125" in said
    assert "Calibration: the same after an output that was cut off 0.000" in said
    assert "Calibration: log-odds in favour of the reply shown first, subtracted +1.500" in said


def test_a_judge_that_samples_votes_has_their_entropy() -> None:
    report = sample_report()
    assert "Entropy of the sampled votes" not in words(render(report, sample_metrics()))
    report["verdicts"]["vote_entropy"] = fig(0.25, 0.125, 0.5, 2900)
    assert "Entropy of the sampled votes, in nats 0.250 0.125 to 0.500 2,900" in words(render(report, sample_metrics()))


def test_the_results_of_unit_tests_are_counted() -> None:
    report = sample_report()
    assert "Unit tests" not in words(render(report, sample_metrics()))
    report["replies"]["unit_tests"] = {"n": 900, "passed": 512, "failed": 250, "syntax": 100, "no_code": 38}
    said = words(render(report, sample_metrics()))
    assert "Replies whose code was tested 900 Unit tests: all tests passed 512 900 Unit tests: a test failed 250 900" in said
    assert "Unit tests: the code does not compile 100 900 Unit tests: no code in the reply 38 900" in said
    assert "out of memory" not in said, "results without a reply have no row"


def test_every_tag_is_closed_and_every_chart_is_named() -> None:
    elements = Elements(render(sample_report(), sample_metrics()))
    assert elements.open == []
    charts = elements.of("svg")
    assert len(charts) >= 20
    assert all(chart["role"] == "img" and len(chart["aria-label"]) > 10 for chart in charts)
    assert len(elements.of("h1")) == 1
    assert all("scope" in cell for cell in elements.of("th"))


@pytest.mark.parametrize("place", ["question", "before", "after"])
def test_replies_are_text_and_never_markup(place: str) -> None:
    report = sample_report()
    report["samples"][0][place] = ATTACK
    html = render(report, {})
    assert ATTACK not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert Elements(html).of("script") == []


KEPT = (
    *("gold", "judge", "referee", "win", "tie", "loss", "better", "unclear", "mcnemar_exact", "sign_exact", "binomial_exact"),
    *("right", "empty", "plain_right"),
)
"""Words that the report may not have otherwise."""


def test_every_other_string_of_the_report_is_escaped_too() -> None:
    def poisoned(value: Any) -> Any:
        if isinstance(value, dict):
            return {(f"{key}{ATTACK}" if at_will(key) else key): poisoned(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [poisoned(inner) for inner in value]
        return f'{ATTACK}" onload="x' if isinstance(value, str) and value not in KEPT else value

    def at_will(key: str) -> bool:
        return key in ("duplicate", "kl_target", "torch", "judge.jinja")

    rows = [{"step": 1, ATTACK: 0.5}]
    elements = Elements(render(poisoned(sample_report()), {"policy": rows}))
    assert elements.of("script") == []
    assert not [name for _, attributes in elements.tags for name in attributes if name.startswith("on")]


def test_no_network_can_be_reached() -> None:
    elements = Elements(render(sample_report(), sample_metrics()))
    policy = [meta["content"] for meta in elements.of("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]
    links = [a[name] for _, a in elements.tags for name in ("src", "href", "action", "data", "srcset") if name in a]
    assert links
    assert all(link.startswith("#") or link == "data:," for link in links)
    assert "url(" not in render(sample_report(), {})
    assert "@import" not in render(sample_report(), {})


def test_without_gold_the_page_says_so() -> None:
    report = sample_report()
    report["policy"]["gold_before"] = report["policy"]["gold_after"] = report["evaluator"]["accuracy_gold"] = None
    report["evaluator"]["baselines_on"] = "judge"
    report["samples"] = [{**sample, "gold_before": None, "gold_after": None} for sample in report["samples"]]
    metrics = sample_metrics()
    del metrics["evaluation"]
    said = words(render(report, metrics))
    assert "gold was not measured both before and after" in said
    assert "Evaluator agrees with judge" in said
    assert "▲ better, by judge" in said
    assert "✓ right" not in said
    assert "by gold." not in said
    assert said.count("no gold") >= 14


def test_one_absent_metric_leaves_the_others() -> None:
    metrics = sample_metrics()
    for row in metrics["policy"]:
        del row["entropy"]
    html = render(sample_report(), metrics)
    entropy = html[html.index("<h3>Entropy</h3>") :].partition("</figure>")[0]
    assert "Not measured in this run." in entropy
    assert html.count("Not measured in this run.") == 1


def test_values_that_are_not_finite_are_counted_not_drawn() -> None:
    metrics = sample_metrics()
    metrics["policy"][10]["value_loss"] = float("nan")
    metrics["policy"][11]["value_loss"] = float("inf")
    html = render(sample_report(), metrics)
    assert "2 values were not finite and cannot be drawn." in html
    assert "nan" not in re.findall(r'd="([^"]*)"', html[html.index("<h3>Value loss</h3>") :])[0]


def test_every_table_has_a_caption_and_headings_have_no_gap() -> None:
    elements = Elements(render(sample_report(), sample_metrics()))
    assert len(elements.of("caption")) == len(elements.of("table")) > 10
    levels = [int(name[1]) for name, _ in elements.tags if re.fullmatch(r"h[1-6]", name)]
    assert levels[0] == 1
    assert all(deeper - level <= 1 for level, deeper in itertools.pairwise(levels))


def test_the_prompts_that_were_used_are_shown_as_text() -> None:
    report = sample_report()
    report["prompts"]["judge.jinja"] += ATTACK
    html = render(report, {})
    assert "{{ question }}" in html
    assert ATTACK not in html
    assert "judge.jinja" in words(html)
    assert "chat_template.jinja" not in html  # empty: the tokenizer has none


def test_a_chart_that_fails_costs_itself_alone(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def broken(*_: object) -> str:
        raise ZeroDivisionError("no room")

    monkeypatch.setattr(charts, "_probes", broken)  # every line chart reads points out under the pointer
    html = render(sample_report(), sample_metrics())
    said = words(html)
    assert "The chart “Entropy” could not be drawn. This is a fault in selfeval" in said
    assert "93.1%" in said  # figures, tables and the charts of another kind are there
    assert "<h3>Comparison with baselines</h3>" in html
    assert 'aria-label="Accuracy of the evaluator and its baselines' in html
    record = next(record for record in caplog.records if "'Entropy'" in record.message)
    assert "fault in selfeval: please report it" in record.message
    assert record.exc_info is not None
    assert record.exc_info[0] is ZeroDivisionError


def test_a_metric_that_the_page_does_not_know_is_drawn_too() -> None:
    html = render(sample_report(), {"policy": [{"step": 1, "group_spread": 0.5}, {"step": 2, "group_spread": 0.75}]})
    assert "<h3>Group spread</h3>" in html
    assert "group_spread: 0.500 at step 1, 0.750 at step 2" in html


def test_worse_is_marked_worse() -> None:
    report = sample_report()
    report["policy"]["gold_after"] = fig(0.2, 0.18, 0.22, 1800)
    report["policy"]["comparisons"]["gold"] = compared(-0.212, -0.24, -0.18, 1800, 100, 482, 1e-30, "worse")
    assert "▼ worse" in words(render(report, {}))


def test_draw_page_reads_the_folder_alone(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    path = draw_page(run)
    assert path == run / "index.html"
    assert path.read_text(encoding="utf-8") == render(sample_report(), sample_metrics())
    assert sorted(entry.name for entry in run.iterdir()) == ["index.html", "metrics", "report.json"]


def test_a_failed_write_leaves_the_old_page_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run")
    (run / "index.html").write_text("old page", encoding="utf-8")

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full_disk)
    with pytest.raises(StorageError, match="the disk is full"):
        draw_page(run)
    assert (run / "index.html").read_text(encoding="utf-8") == "old page"
    assert sorted(entry.name for entry in run.iterdir()) == ["index.html", "metrics", "report.json"]


def test_the_page_is_replaced_at_once_from_the_same_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run")
    seen: list[tuple[Path, str]] = []
    replace = os.replace

    def watched(source: Path, target: Path) -> None:
        seen.append((Path(source), Path(source).read_text(encoding="utf-8")))
        assert not (run / "index.html").exists()
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", watched)
    draw_page(run)
    assert [source.parent for source, _ in seen] == [run]
    assert seen[0][1].rstrip().endswith("</html>")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "does not exist: finish the run first"),
        ("{", "is not JSON"),
        ("[]", "must contain a JSON object, got list"),
        ('{"schema": 2}', "has schema 2, this version reads schema 1"),
        ("{}", "has schema None"),
        ('{"schema": 1}', "'name' is missing; remove evaluation/figures.json in the run folder"),
    ],
)
def test_a_broken_report_is_the_users_to_mend(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "report.json").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=re.escape(message)):
        draw_page(tmp_path)
    assert not (tmp_path / "index.html").exists()


def test_a_metrics_line_cut_short_is_left_out_and_a_broken_one_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", metrics={"policy": [{"step": 1, "kl": 0.5}, {"step": 2, "kl": 0.75}]})
    metrics = run / "metrics" / "policy.jsonl"
    with metrics.open("a", encoding="utf-8") as file:
        file.write('{"step": 3, "k')
    assert "KL: 0.500 at step 1, 0.750 at step 2" in draw_page(run).read_text(encoding="utf-8")
    with metrics.open("a", encoding="utf-8") as file:
        file.write("\n" + json.dumps({"step": 4}) + "\n")
    with pytest.raises(InputError, match=r"policy\.jsonl, line 3 is damaged"):
        draw_page(run)


def test_a_browser_takes_the_page_without_a_complaint(tmp_path: Path) -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed: the page is not opened in a browser here")
    report = sample_report()
    report["samples"][0]["after"] = ATTACK
    path = draw_page(write_run(tmp_path / "run", report))
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    command = [chromium, *QUIET, *OFFLINE, profile, "--enable-logging=stderr", "--v=0", "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr
    dom = Elements(done.stdout)
    assert dom.of("script") == []
    assert len(dom.of("svg")) == len(Elements(path.read_text(encoding="utf-8")).of("svg"))
    assert "93.1%" in dom.words
    assert "</footer>" in done.stdout
