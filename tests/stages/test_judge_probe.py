"""The verdicts stage with a real judge: it probes the judge first, and stops if nothing usable can come out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from judged_runs import CUT, PAIRS, WORKS, run_of, shards
from selfeval.errors import LoopError
from selfeval.records import Question, Verdict
from selfeval.stages import judge_probe, pairs, verdicts
from selfeval.stages.evaluation import _verdicts
from selfeval.stages.given import Given, Labelled
from selfeval.store import Ledger


def test_a_judge_that_is_always_cut_off_stops_the_stage_before_any_shard(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", CUT)
    with pytest.raises(LoopError) as caught:
        verdicts.run(run)
    said = str(caught.value)
    assert "on a probe of 16 pairs it kept none (kept 0, tie 0, unsure 0, unparsable 16)" in said
    assert "32 of 32 orders were cut off at verdicts.max_new_tokens = 4" in said
    assert "raise verdicts.max_new_tokens, for example to 8" in said
    assert "--force" in said
    written = json.loads((tmp_path / "run" / judge_probe.PROBE_FILE).read_text())
    assert written["unreadable_orders"]["cut"] == 32
    assert len(written["outputs"]) == 16
    # Nothing counts as work, so a changed setting sets nothing aside and asks nothing.
    assert shards(run) == []
    assert not Ledger(run.store.root).has_work("verdicts")
    run.store.close()
    again = run_of(tmp_path / "run", WORKS)
    assert verdicts.run(again)["kept"] == PAIRS


def test_a_forced_run_and_a_later_round_continue(tmp_path: Path) -> None:
    forced = run_of(tmp_path / "run", CUT, force=True)
    assert verdicts.run(forced)["unparsable"] == PAIRS
    with pytest.raises(
        LoopError, match=r"kept 0, .*40 of 40 orders were cut off at verdicts.max_new_tokens = 4.*for example to 8"
    ):
        pairs.run(forced)  # the same diagnosis, of all pairs
    later = run_of(tmp_path / "later", CUT, earlier=(forced.store,))
    assert verdicts.run(later)["unparsable"] == PAIRS


def test_the_probe_changes_no_verdict_and_is_in_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(tmp_path / "run", WORKS)
    verdicts.run(run)
    found = _verdicts(run, {q.id: q for q in run.store.read("questions", Question)}, None)
    assert found.probe is not None
    written = json.loads((tmp_path / "run" / judge_probe.PROBE_FILE).read_text())
    assert {k: v for k, v in written.items() if k != "outputs"} == found.probe.as_json()
    assert found.probe.pairs == 16
    monkeypatch.setattr(verdicts, "probe_judge", lambda *_: None)
    alone = run_of(tmp_path / "alone", WORKS)
    verdicts.run(alone)
    assert shards(alone) == shards(run)


def test_few_pairs_and_a_resumed_stage_are_not_probed(tmp_path: Path) -> None:
    few = run_of(tmp_path / "few", CUT, count=16)
    assert verdicts.run(few)["unparsable"] == 16
    assert not (tmp_path / "few" / judge_probe.PROBE_FILE).exists()
    assert _verdicts(few, {}, None).probe is None
    resumed = run_of(tmp_path / "resumed", CUT)
    resumed.store.write_shard("verdicts", 0, list[Verdict](), [])
    assert verdicts.run(resumed)["unparsable"] == PAIRS - 8


def test_a_probe_does_not_stay_with_labels_that_are_not_the_judges(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", CUT)
    with pytest.raises(LoopError):
        verdicts.run(run)
    run.store.close()
    labelled = run_of(tmp_path / "run", WORKS)
    labelled.__dict__["given"] = Given("pairs", (), (), {}, {"q0": (Labelled("this", "that", 1.0),)})
    verdicts.run(labelled)
    assert not (tmp_path / "run" / judge_probe.PROBE_FILE).exists()
