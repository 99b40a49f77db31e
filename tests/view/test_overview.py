from __future__ import annotations

import platform
import re
import time
from pathlib import Path
from typing import Any

import pytest

from compared_runs import QUESTIONS, begin_run, compared, finish_run, log_steps, write_samples
from selfeval.runs.reader import round_folder
from selfeval.store import PROGRESS, Progress, RunStore, write_progress
from selfeval.view import drawn as drawn_module
from selfeval.view.drawn import Drawn
from view_server import FRAGMENT, client


def _live(folder: Path) -> RunStore:
    """A run in progress: 40 iterations of the policy are done."""
    store = begin_run(folder / "live")
    log_steps(store, range(40))
    write_samples(store, 39)
    store.add_metrics(
        "watchdogs", {"step": 20, "name": "length_drift", "message": "replies are <longer>", "action": "roll_back"}
    )
    store.record_stage("policy", threads=2)
    progress = Progress(platform.node(), 1, "policy", 81.2, "policy", 40.4, 96.0, 0.52, 107.0, "reward 0.31 kl 0.20")
    write_progress(store.root, progress)
    return store


def _row(html: str, stage: str) -> str:
    return html[html.index(f'data-key="{stage}"') :].partition("</tr>")[0]


def _words(html: str) -> str:
    return " ".join(re.sub(r"<[^>]*>", " ", html).split())


def test_a_run_in_progress_shows_its_stage_count_and_time_left(tmp_path: Path) -> None:
    store = _live(tmp_path)
    html = client(tmp_path).get("/view/run/live").text
    store.close()
    assert '<progress max="1" value="0.4208"' in html
    words = _words(html)
    for said in ("40 of 96", "42%", "about 2 min left", "0.520 per second", "reward 0.31 kl 0.20", "1 min 21 s so far"):
        assert said in words
    assert "running" in _row(html, "policy")
    assert "1 min 21 s" in _row(html, "policy")
    assert "train 12, test 12" in _row(html, "questions")
    assert "waiting" in _row(html, "evaluation")
    assert 'data-live="2" data-announce="The stage policy is in progress. 1 of 8 stages are finished."' in html


def test_curves_alarms_and_samples_are_shown_and_escaped(tmp_path: Path) -> None:
    store = _live(tmp_path)
    html = client(tmp_path).get("/view/run/live").text
    store.close()
    assert 'aria-label="KL to the reference. KL: 0 at step 0, 1.95 at step 39"' in html
    assert "1 more curve<" in html, "the gradient norm"
    assert "replies are &lt;longer&gt;" in html
    assert "roll back" in html
    assert "Iteration 39: &lt;b&gt;2&lt;/b&gt; &amp; so on,\n  so the answer is" in html
    assert "What is 2 * 2?" in html
    assert 'href="/view/run/live/question/q2"' in html
    assert "<b>" not in html


@pytest.mark.skipif(not Path("/proc/locks").is_file(), reason="this system does not list its locks")
def test_a_killed_run_says_how_to_resume_it(tmp_path: Path) -> None:
    _live(tmp_path).close()
    html = client(tmp_path).get("/view/run/live").text
    assert f"selfeval run --output {tmp_path}/live" in html
    assert "<progress" not in html
    assert 'data-live="15" data-announce="The run is not in progress.' in html


def test_a_finished_run_has_no_progress_and_is_refreshed_slowly(tmp_path: Path) -> None:
    store = begin_run(tmp_path / "done")
    finish_run(store, [compared(n) for n in range(QUESTIONS)])
    store.close()
    html = client(tmp_path).get("/view/run/done").text
    assert 'data-live="15" data-announce="The run is finished. 8 of 8 stages are finished."' in html
    assert "858 MiB" in _row(html, "policy")
    assert "records 1,200" in _row(html, "replies")


def test_the_log_and_the_configuration_are_collapsed(tmp_path: Path) -> None:
    store = _live(tmp_path)
    store.close()
    (tmp_path / "live" / "run.log").write_text("".join(f"line {n} \x1b[31m<x>\n" for n in range(5000)))
    html = client(tmp_path).get("/view/run/live").text
    assert "line 4999 \\x1b[31m&lt;x&gt;" in html
    assert "line 4700 " not in html
    assert "policy.iterations" not in html
    assert "<code>iterations</code>" in html
    assert "<details open" not in html


def test_damaged_metrics_and_samples_hide_nothing_else(tmp_path: Path) -> None:
    store = _live(tmp_path)
    (tmp_path / "live" / "metrics" / "policy.jsonl").write_text("{\n{}\n")
    (tmp_path / "live" / "policy" / "shard-00039.jsonl").write_text('{"step": "x"}\n')
    answer = client(tmp_path).get("/view/run/live")
    store.close()
    assert answer.status_code == 200
    assert "policy.jsonl, line 1 is damaged" in answer.text
    assert "40 of 96" in answer.text


def test_an_alarm_of_another_version_hides_nothing_else(tmp_path: Path) -> None:
    store = _live(tmp_path)
    store.add_metrics("watchdogs", {"step": 21, "name": "length_drift", "message": "longer"})
    answer = client(tmp_path).get("/view/run/live")
    store.close()
    assert answer.status_code == 200
    said = "watchdogs.jsonl has an alarm that this version cannot read (action: Field required)"
    assert answer.text.count(said) == 2, "instead of the alarms, and of the curves that they are drawn into"
    assert "40 of 96" in answer.text


def test_rounds_link_to_each_other(tmp_path: Path) -> None:
    store = begin_run(tmp_path / "live")
    later = RunStore(round_folder(tmp_path / "live", 2))
    later.update_run(**{**store.run, "round": 2, "stages": {}})
    log_steps(later, range(3))
    write_progress(store.root, Progress(platform.node(), 2, "replies", 4.0, "replies", 1.0, 4.0))
    asked = client(tmp_path)
    first, second = asked.get("/view/run/live").text, asked.get("/view/run/live@2").text
    for one in (store, later):
        one.close()
    for html in (first, second):
        assert '<a href="/view/run/live"' in html
        assert '<a href="/view/run/live%402"' in html
        assert "round 2, replies" in html
    assert "running" not in _row(first, "replies")
    assert "running" in _row(second, "replies")
    assert "3 steps logged" in second
    assert "steps logged" not in first
    assert asked.get("/view/run/live@3").status_code == 404


def test_a_fragment_changes_with_the_progress(tmp_path: Path) -> None:
    store = _live(tmp_path)
    asked = client(tmp_path)
    first = asked.get("/view/run/live", headers=FRAGMENT)
    tag = {**FRAGMENT, "If-None-Match": first.headers["etag"]}
    assert asked.get("/view/run/live", headers=tag).status_code == 304
    write_progress(store.root, Progress(platform.node(), 1, "policy", 90.0, "policy", 41.0, 96.0))
    changed = asked.get("/view/run/live", headers=tag)
    store.close()
    assert "41 of 96" in changed.text


def test_garbage_in_the_progress_is_no_error(tmp_path: Path) -> None:
    store = _live(tmp_path)
    (tmp_path / "live" / PROGRESS).write_text('{"stage": ["x"], "done": "y"}')
    answer = client(tmp_path).get("/view/run/live")
    store.close()
    assert answer.status_code == 200
    assert "<progress" not in answer.text


def test_slow_charts_are_drawn_again_only_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chart that took 2 s is used for 38 s more, so drawing takes at most a twentieth of the time."""

    class Clock:
        now = 100.0

        def monotonic(self) -> float:
            return self.now

    clock = Clock()
    monkeypatch.setattr(drawn_module, "time", clock)
    made: list[Any] = []

    def draw() -> int:
        clock.now += 2
        made.append(clock.now)
        return len(made)

    cache: Drawn[int] = Drawn(share=0.05)
    assert cache.get("run", 1, draw) == 1
    assert cache.get("run", 1, draw) == 1
    clock.now += 37
    assert cache.get("run", 2, draw) == 1
    clock.now += 1.5
    assert cache.get("run", 2, draw) == 2
    clock.now += 1000
    assert cache.get("run", 2, draw) == 2, "nothing changed"
    assert cache.get("other", 2, draw) == 3


@pytest.mark.slow
def test_a_hundred_thousand_steps_do_not_block_the_page(tmp_path: Path) -> None:
    store = begin_run(tmp_path / "long")
    path = store.metrics_path("policy")
    path.parent.mkdir()
    line = '{{"step": {0}, "reward": 0.{0}, "score": 0.5, "kl": 1.5, "length": 18.{0}}}\n'
    path.write_text("".join(line.format(n) for n in range(100_000)))
    asked = client(tmp_path)
    assert "100,000 steps logged" in asked.get("/view/run/long").text
    store.add_metrics("policy", {"step": 100_000, "reward": 1.0})
    begun = time.process_time()
    html = asked.get("/view/run/long").text
    store.close()
    assert time.process_time() - begun < 1.0, "the charts that were just drawn are shown"
    assert "100,000 steps logged" in html
    assert len(html) < 2_000_000
