from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from compared_runs import QUESTIONS, begin_run, compared, finish_run, log_steps, scored
from view_server import client

AB = "/view/compare?run=a&run=b"


def _words(html: str) -> str:
    return " ".join(re.sub(r"<[^>]*>", " ", html).replace("\u00a0", " ").split())


def _row(html: str, name: str) -> str:
    return _words(html[html.index(f">{name}</th>") :].partition("</tr>")[0])


def _replies(html: str) -> Iterator[tuple[str, list[str]]]:
    """Yield each question with the replies next to each other."""
    for article in html.split("<article")[1:]:
        question = re.search(r'<p dir="auto">(.*?)</p>', article, re.S)
        assert question is not None
        yield question[1], re.findall(r'aria-label="Reply of .">(.*?)</div>', article, re.S)


def _run(folder: Path, right: Any, outcome: str = "win", **settings: Any) -> None:
    """A finished run, whose policy is right in the test questions that a function says."""
    store = begin_run(folder, **settings)
    log_steps(store, range(24))
    pairs = [scored(n, right=bool(right(n))) for n in range(QUESTIONS)]
    finish_run(store, [compared(n, gold_after=right(n), outcome=outcome) for n in range(QUESTIONS)], pairs)
    store.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two runs on the same questions: A is right in 2 of 12, B in 10 others."""
    _run(tmp_path / "a", lambda n: n < 2)
    _run(tmp_path / "b", lambda n: n >= 2, policy={"learner": "grpo"}, seed=3)
    return tmp_path


def test_the_difference_on_shared_questions_is_paired(folder: Path) -> None:
    """B wins 10 questions and loses 2: 8/12 = 66.7 points; exact McNemar p = 2 * (1 + 12 + 66) / 2^12 = 0.0386."""
    html = client(folder).get(AB).text
    row = _row(html, "Gold accuracy of the policy")
    assert "16.7%" in row
    assert "83.3%" in row
    assert "+66.7 points" in row
    assert "paired, exact McNemar test p = 0.039, n = 12" in row
    assert "▲ better" in row
    assert "A and B share 12 of 12 test questions." in _words(html)
    swapped = client(folder).get("/view/compare?run=b&run=a").text
    assert "-66.7 points" in _row(swapped, "Gold accuracy of the policy")
    assert "▼ worse" in _row(swapped, "Gold accuracy of the policy")


def test_on_other_questions_the_samples_are_independent(folder: Path) -> None:
    _run(folder / "c", lambda n: n >= 2, prefix="How much is")
    html = client(folder).get("/view/compare?run=a&run=c").text
    assert "independent samples, n = 12 and 12" in _row(html, "Gold accuracy of the policy")
    assert "share 0 of 12 test questions" in _words(html)
    assert "These runs have no evaluated test question in common" in _words(html)


def test_runs_with_another_gold_or_referee_are_not_compared_in_it(folder: Path) -> None:
    _run(folder / "c", lambda n: True, domain=None)
    store = begin_run(folder / "d")
    store.update_run(templates={"referee.jinja": "1" * 64})
    finish_run(store, [compared(n) for n in range(QUESTIONS)])
    store.close()
    html = client(folder).get("/view/compare?run=a&run=c&run=d").text
    words = _words(html)
    assert "Gold of A and B is not the same (domain word-problems and your own questions)" in words
    assert "The referees of A and C are not the same, so their win rates are not compared." in words
    assert "another gold" in _row(html, "Gold accuracy of the policy")
    assert "+83.3 points" in _row(html, "Gold accuracy of the policy"), "A and C have the same gold"
    assert "another referee" in _row(html, "Win rate over the run&#39;s own start")


def test_only_settings_that_differ_are_listed(folder: Path) -> None:
    html = client(folder).get(AB).text
    table = html[html.index('<table class="settings">') :]
    keys = re.findall(r'<th scope="row"><code>(.*?)</code>', table)
    assert {"name", "seed", "policy.learner"} <= set(keys)
    assert "policy.iterations" not in keys
    assert "replies.temperature" not in keys
    row = table[table.index("<code>policy.learner</code>") :].partition("</tr>")[0]
    assert re.findall(r"<code>(.*?)</code>", row) == ["policy.learner", "ppo", "grpo"]
    assert '<tr class="group"><th scope="rowgroup" colspan="3">policy</th></tr>' in table


def test_curves_have_a_line_for_each_run(folder: Path) -> None:
    begin_run(folder / "c").close()
    html = client(folder).get("/view/compare?run=c&run=a&run=b").text
    (label,) = re.findall(r'aria-label="(KL to the reference[^"]*)"', html)
    assert label == "KL to the reference. B: a: 0 at step 0, 1.15 at step 23; C: b: 0 at step 0, 1.15 at step 23"
    chart = html[html.index(label) :].partition("</svg>")[0]
    assert 'class="line c2 dashed"' in chart, "A has no metrics, and B keeps its colour"
    assert 'class="line c1' not in chart


def test_replies_are_shown_side_by_side_and_filtered(folder: Path) -> None:
    asked = client(folder)
    every = dict(_replies(asked.get(AB).text))
    assert list(every) == [f"What is {n} + {n}?" for n in range(QUESTIONS)]
    assert every["What is 3 + 3?"] == ["The answer is 6.", "The answer is 6."]
    assert len(dict(_replies(asked.get(f"{AB}&show=gold").text))) == 12
    assert list(dict(_replies(asked.get(f"{AB}&show=a").text))) == ["What is 0 + 0?", "What is 1 + 1?"]
    better = asked.get(f"{AB}&show=b").text
    assert list(dict(_replies(better))) == [f"What is {n} + {n}?" for n in range(2, QUESTIONS)]
    assert '<option value="b" selected>B better than A (10)</option>' in better


def test_replies_are_not_ranked_across_golds_and_referees(folder: Path) -> None:
    """C is right in all questions by another gold, and ties where A wins; D has another referee."""
    _run(folder / "c", lambda n: True, "tie", domain=None)
    asked = client(folder)
    shown = {name: len(dict(_replies(asked.get(f"/view/compare?run=a&run=c&show={name}").text))) for name in ("gold", "a", "b")}
    assert shown == {"gold": 0, "a": QUESTIONS, "b": 0}, "only the outcomes are by the same referee"
    three = asked.get("/view/compare?run=a&run=b&run=c&show=gold").text
    assert len(dict(_replies(three))) == 0
    store = begin_run(folder / "d", domain=None)
    store.update_run(templates={"referee.jinja": "1" * 64})
    finish_run(store, [compared(n, outcome="tie") for n in range(QUESTIONS)])
    store.close()
    assert len(dict(_replies(asked.get("/view/compare?run=a&run=d&show=a").text))) == 0
    assert len(dict(_replies(asked.get("/view/compare?run=a&run=d").text))) == QUESTIONS


@pytest.mark.skipif(not Path("/proc/locks").is_file(), reason="this system does not list its locks")
def test_a_killed_run_is_not_shown_as_running(folder: Path) -> None:
    begin_run(folder / "killed").close()
    asked = client(folder)
    legend = asked.get("/view/compare?run=a&run=killed").text.partition('<ul class="legend">')[2].partition("</ul>")[0]
    assert _words(legend) == "A a finished B killed stopped"
    assert "Resume the run" in asked.get("/view/run/killed/verdicts").text
    assert 'class="note bad"' in asked.get("/view/run/killed/report").text


def test_without_gold_the_outcomes_decide(tmp_path: Path) -> None:
    for name, outcome in (("a", "tie"), ("b", "win")):
        _run(tmp_path / name, lambda n: None, outcome)
    assert len(dict(_replies(client(tmp_path).get(f"{AB}&show=b").text))) == QUESTIONS
    assert len(dict(_replies(client(tmp_path).get(f"{AB}&show=a").text))) == 0


def test_replies_are_paged(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selfeval.view.compare._PER_PAGE", 5)
    asked = client(folder)
    pages = [asked.get(f"{AB}&page={n}").text for n in (1, 2, 3)]
    found = [question for html in pages for question, _ in _replies(html)]
    assert found == [f"What is {n} + {n}?" for n in range(QUESTIONS)]
    assert "Page 2 of 3" in pages[1]
    assert 'href="?run=a&amp;run=b&amp;page=3#replies" rel="next"' in pages[1]
    assert "next" not in pages[2].partition('aria-label="Pages of replies"')[2]
    assert list(_replies(asked.get(f"{AB}&page=9").text)) == list(_replies(pages[2]))
    assert asked.get(f"{AB}&page=0").status_code == 400


def test_text_of_models_is_escaped(tmp_path: Path) -> None:
    for name in ("a", "b"):
        store = begin_run(tmp_path / name, prefix="<i>Was</i>")
        finish_run(store, [compared(n, after="<script>alert(1)</script>") for n in range(QUESTIONS)])
        store.close()
    html = client(tmp_path).get(AB).text
    assert "<script>alert" not in html
    assert "<i>" not in html
    assert "&lt;script&gt;alert(1)" in html


@pytest.mark.parametrize(
    ("query", "status", "said"),
    [
        ("", 400, "needs 2 to 4 different runs, got 0"),
        ("?run=a", 400, "got 1; select them in the list"),
        ("?run=a&run=a", 400, "got 1"),
        ("?run=a&run=b&run=c&run=d&run=e", 400, "got 5"),
        ("?run=a&run=none", 404, "There is no run &#x27;none&#x27; here."),
        ("?run=a&run=../b", 404, "There is no run"),
    ],
)
def test_other_choices_of_runs_are_refused(query: str, status: int, said: str, folder: Path) -> None:
    answer = client(folder).get(f"/view/compare{query}")
    assert answer.status_code == status
    assert said in answer.text


def test_a_run_in_progress_is_compared_as_far_as_it_is(folder: Path) -> None:
    begin_run(folder / "c").close()
    html = client(folder).get("/view/compare?run=a&run=c").text
    assert "Run B has no evaluation yet" in _words(html)
    assert "not measured" in _row(html, "Gold accuracy of the policy")
    none = client(folder).get("/view/compare?run=c&run=a@1")
    assert none.status_code == 200


def test_a_damaged_file_is_named(folder: Path) -> None:
    (folder / "b" / "evaluation" / "compared.jsonl").write_text("{}\n")
    answer = client(folder).get(AB)
    assert answer.status_code == 400
    assert "compared.jsonl is damaged" in answer.text
