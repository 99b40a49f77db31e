"""The two verdict sentences: the good run, and every way in which a run can be less than good."""

from __future__ import annotations

from typing import Any

import pytest
from sample_report import fig, sample_report

from selfeval.errors import InputError
from selfeval.report.summary import standings, strongest_baseline, summary_rows, verdict_sentences


def without_gold() -> dict[str, Any]:
    report = sample_report()
    report["model"]["domain"] = None
    report["evaluator"]["accuracy_gold"] = None
    report["evaluator"]["baselines_on"] = "judge"
    report["evaluator"]["baselines"]["judge"] = fig(1.0, 0.987, 1.0, 300)
    report["policy"]["gold_before"] = report["policy"]["gold_after"] = None
    report["verdicts"]["label_accuracy_gold"] = None
    return report


def test_good_run_is_told_with_every_interval_and_n() -> None:
    evaluator, policy = verdict_sentences(sample_report())
    assert evaluator == (
        "By gold, the evaluator picks the better reply in 93.1% of held-out pairs (interval 91.5% to 94.5%, "
        "n = 1,100), above its strongest baseline, the prompted judge, at 89.4% (interval 87.4% to 91.1%, n = 1,100)."
    )
    assert policy == (
        "The policy got better: replies that are right by gold rose from 41.2% (interval 38.9% to 43.5%, n = 1,800) to "
        "68.7% (interval 66.5% to 70.8%, n = 1,800), and the judge prefers the new ones too, with a win rate of 76.7% "
        "(interval 73.9% to 79.3%, n = 520)."
    )
    assert standings(sample_report()) == ("better", "better")


def test_worse_by_gold_is_said_even_when_the_judge_is_pleased() -> None:
    report = sample_report()
    report["policy"]["gold_after"] = fig(0.30, 0.279, 0.322, 1800)
    sentence = verdict_sentences(report)[1]
    assert sentence.startswith("The policy got worse: replies that are right by gold fell from 41.2%")
    assert "yet the judge prefers the new ones" in sentence
    assert sentence.endswith("they please the judge without being right.")
    assert standings(report)[1] == "worse"


def test_overlapping_gold_is_no_gain() -> None:
    report = sample_report()
    report["policy"]["gold_after"] = fig(0.43, 0.407, 0.453, 1800)
    report["policy"]["win_rate"] = fig(0.51, 0.47, 0.55, 520)
    sentence = verdict_sentences(report)[1]
    assert sentence.startswith("No gain is shown: replies that are right by gold went from 41.2%")
    assert "and the intervals overlap; the judge sees no clear change, with a win rate of 51.0%" in sentence
    assert standings(report)[1] == "unclear"


def test_without_gold_only_agreement_is_claimed() -> None:
    evaluator, policy = verdict_sentences(without_gold())
    assert evaluator.startswith(
        "With no gold to check against, only agreement is known: the evaluator picks the judge's choice in 97.1% of "
        "the held-out pairs that the judge was sure of (interval 94.5% to 98.5%, n = 300)"
    )
    assert policy == (
        "With no gold to check against, only the judge can be asked: it prefers the new policy's replies, with a win "
        "rate of 76.7% (interval 73.9% to 79.3%, n = 520), a tie counting half."
    )


def test_judge_is_no_baseline_on_its_own_labels() -> None:
    found = strongest_baseline(without_gold())
    assert found is not None
    assert found[0] == "the mean log-probability"


@pytest.mark.parametrize(
    ("wins", "said", "standing"),
    [
        (fig(0.4, 0.36, 0.44, 520), "finds that the policy got worse", "worse"),
        (fig(0.52, 0.48, 0.56, 520), "shows no gain", "unclear"),
        (fig(0.52, 0.5, 0.54, 520), "the interval includes no change", "unclear"),  # touching one half is not above it
    ],
)
def test_without_gold_the_win_rate_decides(wins: dict[str, Any], said: str, standing: str) -> None:
    report = without_gold()
    report["policy"]["win_rate"] = wins
    assert said in verdict_sentences(report)[1]
    assert standings(report)[1] == standing


@pytest.mark.parametrize(
    ("accuracy", "said", "standing"),
    [
        (fig(0.90, 0.881, 0.917, 1100), "which is not shown to be better than its strongest baseline", "unclear"),
        (fig(0.80, 0.776, 0.822, 1100), "which is worse than its strongest baseline", "worse"),
        (fig(0.51, 0.48, 0.54, 1100), "which is not shown to be better than tossing a coin", "unclear"),
        (fig(0.44, 0.41, 0.47, 1100), "which is worse than tossing a coin", "worse"),
    ],
)
def test_evaluator_is_not_praised_beyond_its_interval(accuracy: dict[str, Any], said: str, standing: str) -> None:
    report = sample_report()
    report["evaluator"]["accuracy_gold"] = accuracy
    assert said in verdict_sentences(report)[0]
    assert standings(report)[0] == standing


def test_baselines_on_other_labels_are_not_compared() -> None:
    report = sample_report()
    report["evaluator"]["baselines_on"] = "judge"
    assert "no baseline was measured on the same labels" in verdict_sentences(report)[0]
    report["evaluator"]["baselines_on"] = "people"
    with pytest.raises(InputError, match='"gold" or "judge", got \'people\''):
        verdict_sentences(report)


def test_nothing_measured_is_said_plainly() -> None:
    evaluator, policy = verdict_sentences({"schema": 1})
    assert evaluator == "What the evaluator is worth was not measured."
    assert policy == "What the policy gained was not measured."
    assert standings({"schema": 1}) == ("unmeasured", "unmeasured")


def test_rows_for_the_terminal() -> None:
    rows = dict(summary_rows(sample_report()))
    assert rows["evaluator accuracy, gold labels"] == "93.1% (interval 91.5% to 94.5%, n = 1,100)"
    assert rows["  the prompted judge, gold labels"] == "89.4% (interval 87.4% to 91.1%, n = 1,100)"
    assert rows["gold before"].startswith("41.2%")
    assert rows["KL to the reference, nats per reply"] == "3.42 (interval 3.31 to 3.53, n = 1,800)"
    assert rows["reply length, after over before"] == "1.04 (interval 1.03 to 1.05, n = 1,800)"
    assert rows["time"] == "3 min 51 s"
    assert rows["peak memory"] == "858 MiB"


def test_rows_never_show_zero_for_what_was_not_measured() -> None:
    assert {told for _, told in summary_rows({"schema": 1})} == {"not measured"}
