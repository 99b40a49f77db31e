"""The sentences on evaluator and policy: a good run, and each kind of weaker run."""

from __future__ import annotations

from typing import Any

import pytest
from sample_report import compared, emptied, fig, parsed, sample_report

from selfeval.quality.comparisons import compare_with_level
from selfeval.quality.statistics import mean_figure
from selfeval.report import summary
from selfeval.report.summary import Badge


def verdict_sentences(report: dict[str, Any]) -> tuple[str, str]:
    return summary.verdict_sentences(parsed(report))


def badges(report: dict[str, Any]) -> tuple[Badge, Badge]:
    return summary.badges(parsed(report))


def summary_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    return summary.summary_rows(parsed(report))


def words(report: dict[str, Any]) -> tuple[str, str]:
    evaluator, policy = badges(report)
    return evaluator.word, policy.word


def standings(report: dict[str, Any]) -> tuple[str, str]:
    evaluator, policy = badges(report)
    return evaluator.standing, policy.standing


def without_gold() -> dict[str, Any]:
    report = sample_report()
    report["model"]["domain"] = None
    report["evaluator"]["accuracy_gold"] = None
    report["evaluator"]["baselines_on"] = "judge"
    report["evaluator"]["baselines"]["judge"] = fig(1.0, 0.987, 1.0, 300)
    report["evaluator"]["comparisons"]["judge"] = None
    report["policy"]["gold_before"] = report["policy"]["gold_after"] = None
    report["policy"]["comparisons"]["gold"] = None
    report["verdicts"]["label_accuracy_gold"] = None
    return report


def test_a_good_run_is_told_with_every_interval_test_and_n() -> None:
    evaluator, policy = verdict_sentences(sample_report())
    assert evaluator == (
        "By gold labels, the evaluator picks the better reply in 93.1% of held-out pairs (interval 91.5% to 94.5%, n = 1,100), "
        "more than every trivial baseline on the same pairs; the margin over the strongest, the mean log-probability, is "
        "15.0 points (interval 12.4 to 17.7, exact McNemar test p < 0.001, n = 1,100). It is more accurate than its judge, "
        "by 3.7 points (interval 1.9 to 5.5, exact McNemar test p < 0.001, n = 1,100). Per verdict, the judge takes 8.40 ms "
        "and the evaluator 0.420 ms, 20 times faster, with 96.0 tokens (judge: 264). Distillation succeeded: the evaluator "
        "is 20 times faster, and at most 2.0 points worse than its judge."
    )
    assert policy == (
        "The policy improved: its gold accuracy rose from 41.2% (interval 38.9% to 43.5%, n = 1,800) to "
        "68.7% (interval 66.5% to 70.8%, n = 1,800), by 27.5 points (interval 24.8 to 30.1, exact McNemar test p < 0.001, "
        "n = 1,800), and the judge also prefers the new replies, with a win rate of 76.7% (interval 73.9% to 79.3%, "
        "n = 520, exact sign test p < 0.001)."
    )
    assert standings(sample_report()) == ("better", "better")
    assert words(sample_report()) == ("▲ better than its judge", "▲ better")


# -- the evaluator and its judge ----------------------------------------------------------------------------------------


def against_judge(*row: Any) -> dict[str, Any]:
    report = sample_report()
    report["evaluator"]["comparisons"]["judge"] = compared(*row)
    return report


def test_a_small_loss_for_a_large_gain_in_time_is_a_success() -> None:
    report = against_judge(-0.0079, -0.0142, -0.0024, 1900, 12, 27, 0.0071, "worse")
    sentence = verdict_sentences(report)[0]
    assert (
        "It is less accurate than its judge, by 0.8 points (interval 0.2 to 1.4, exact McNemar test p = 0.0071, n = 1,900). "
        "Per verdict, the judge takes 8.40 ms and the evaluator 0.420 ms, 20 times faster, with 96.0 tokens (judge: 264). "
        "Distillation succeeded: the evaluator loses 0.8 points and is 20 times faster."
    ) in sentence
    assert badges(report)[0].standing == "better"
    assert words(report)[0] == "▲ 0.8 points below its judge, 20 times faster"


@pytest.mark.parametrize(
    ("row", "speed", "said"),
    [
        # The loss may be larger than two points.
        ((-0.03, -0.045, -0.015, 1900, 40, 97, 0.0001, "worse"), (20.0, 18.0, 22.0), "20 times faster, with"),
        # Nothing is gained in time, or it is not shown to be gained.
        ((-0.0079, -0.0142, -0.0024, 1900, 12, 27, 0.0071, "worse"), (0.5, 0.4, 0.6), "2.0 times slower, with"),
        ((-0.0079, -0.0142, -0.0024, 1900, 12, 27, 0.0071, "worse"), (1.1, 0.9, 1.3), "1.1 times faster, with"),
    ],
)
def test_a_large_loss_or_no_gain_in_time_is_none(row: Any, speed: Any, said: str) -> None:
    report = against_judge(*row)
    for who in ("evaluator", "scoring"):
        report["time"]["per_verdict"][f"judge_over_{who}"] = fig(*speed, 8)
    sentence = verdict_sentences(report)[0]
    assert said in sentence
    assert "success" not in sentence
    assert words(report)[0] == "▼ worse than its judge"


def test_time_that_is_saved_only_with_a_known_reference_answer_is_reported_so() -> None:
    report = against_judge(-0.0079, -0.0142, -0.0024, 1900, 12, 27, 0.0071, "worse")
    report["time"]["per_verdict"]["evaluator"] = fig(0.0105, 0.0101, 0.0109, 8)
    report["time"]["per_verdict"]["judge_over_evaluator"] = fig(0.8, 0.77, 0.83, 8)
    sentence = verdict_sentences(report)[0]
    assert (
        "and the evaluator 10.5 ms, 1.2 times slower, with 96.0 tokens (judge: 264); if the question's "
        "reference answer is known, 0.420 ms, 20 times faster, with 96.0 tokens."
    ) in sentence
    assert sentence.endswith("the evaluator loses 0.8 points and is 20 times faster if the reference answer is known.")
    assert words(report)[0] == "▲ 0.8 points below its judge, 20 times faster if the reference answer is known"


def test_an_interval_without_zero_beside_an_insignificant_test_is_explained() -> None:
    sentence = verdict_sentences(against_judge(-0.071, -0.159, -0.001, 70, 3, 10, 0.062, "unclear"))[0]
    assert "n = 70); the interval excludes 0, but the exact test is not significant, and both are required." in sentence
    assert "excludes 0" not in verdict_sentences(against_judge(-0.071, -0.159, 0.001, 70, 3, 10, 0.062, "unclear"))[0]


def test_no_difference_from_the_judge_is_not_called_equality() -> None:
    wide = against_judge(-0.001, -0.03, 0.028, 300, 9, 9, 1.0, "unclear")
    sentence = verdict_sentences(wide)[0]
    assert (
        "It does not differ significantly from its judge: -0.1 points (interval -3.0 to 2.8, exact McNemar test p = 1, "
        "n = 300)." in sentence
    )
    assert "success" not in sentence  # it may be 3 points worse
    assert words(wide)[0] == "▲ better than trivial baselines"
    few = against_judge(0.75, 0.1, 1.0, 4, 3, 0, 0.25, "too_few")
    assert (
        "There are too few pairs to compare it with its judge (exact McNemar test p = 0.25, n = 4)."
        in verdict_sentences(few)[0]
    )


@pytest.mark.parametrize(
    ("name", "row", "said", "standing", "word"),
    [
        (
            "mean_logprob", (0.01, -0.01, 0.03, 1100, 60, 49, 0.34, "unclear"),
            "which is not significantly better than the mean log-probability: the difference is 1.0 points", "unclear",
            "◇ not significantly better than the mean log-probability",
        ),
        (
            "longer_wins", (-0.1, -0.13, -0.07, 1100, 60, 170, 1e-9, "worse"),
            "which is worse than picking the longer reply, by 10.0 points (interval 7.0 to 13.0, exact McNemar test p < 0.001",
            "worse", "▼ worse than picking the longer reply",
        ),
        (
            "chance", (0.01, -0.02, 0.04, 1100, 561, 539, 0.53, "unclear"), "is not significantly better than chance level",
            "unclear", "◇ not significantly better than chance level",
        ),
        (
            "chance", (-0.06, -0.09, -0.03, 1100, 480, 620, 0.00003, "worse"), "is worse than chance level, by 6.0 points",
            "worse", "▼ worse than chance level",
        ),
        ("chance", (0.5, 0.01, 0.5, 4, 4, 0, 0.125, "too_few"), "too few for a conclusion", "unclear", "◇ too few pairs"),
    ],
)  # fmt: skip
def test_an_evaluator_has_to_be_better_than_every_simple_rule(name: str, row: Any, said: str, standing: str, word: str) -> None:
    report = sample_report()
    report["evaluator"]["comparisons"][name] = compared(*row)
    sentence = verdict_sentences(report)[0]
    assert said in sentence
    assert "success" not in sentence
    assert badges(report)[0].standing == standing
    assert words(report)[0] == word


def test_the_cost_may_be_unmeasured() -> None:
    report = sample_report()
    report["time"]["per_verdict"] = report["evaluator"]["cost"] = None
    assert verdict_sentences(report)[0].endswith("The cost per verdict was not measured.")


# -- the policy ---------------------------------------------------------------------------------------------------------


def by_gold(*row: Any) -> dict[str, Any]:
    report = sample_report()
    report["policy"]["comparisons"]["gold"] = compared(*row)
    return report


def test_worse_by_gold_is_said_even_when_the_judge_is_pleased() -> None:
    report = by_gold(-0.112, -0.14, -0.08, 1800, 200, 402, 1e-16, "worse")
    report["policy"]["gold_after"] = fig(0.30, 0.279, 0.322, 1800)
    sentence = verdict_sentences(report)[1]
    assert sentence.startswith("The policy got worse: its gold accuracy fell from 41.2%")
    assert ", by 11.2 points (interval 8.0 to 14.0" in sentence
    assert "but the judge prefers the new replies" in sentence
    assert sentence.endswith("they please the judge without being right.")
    assert standings(report)[1] == "worse"


def test_a_gain_that_the_paired_test_does_not_show_is_none() -> None:
    report = by_gold(0.018, -0.01, 0.046, 1800, 330, 298, 0.22, "unclear")
    report["policy"]["gold_after"] = fig(0.43, 0.407, 0.453, 1800)
    report["policy"]["win_rate"] = fig(0.51, 0.47, 0.55, 520)
    report["policy"]["comparisons"]["win_rate"] = compared(0.01, -0.03, 0.05, 520, 130, 120, 0.57, "unclear", "sign_exact")
    sentence = verdict_sentences(report)[1]
    assert sentence.startswith("No significant gain: the gold accuracy went from 41.2%")
    assert (
        "a difference of 1.8 points (interval -1.0 to 4.6, exact McNemar test p = 0.22, n = 1,800); the judge shows" in sentence
    )
    assert "no significant preference, with a win rate of 51.0%" in sentence
    assert standings(report)[1] == "unclear"


def test_a_gain_is_found_although_the_two_intervals_overlap() -> None:
    # The toy run of which the page said "no gain is shown" while its own gold gain was 0.184 [0.046, 0.312].
    report = by_gold(0.184, 0.046, 0.312, 49, 13, 4, 0.049, "better")
    report["policy"]["gold_before"], report["policy"]["gold_after"] = fig(0.5, 0.36, 0.64, 49), fig(0.684, 0.55, 0.80, 49)
    assert verdict_sentences(report)[1].startswith("The policy improved: its gold accuracy rose from 50.0%")
    assert words(report)[1] == "▲ better"


def test_without_gold_only_agreement_is_claimed() -> None:
    evaluator, policy = verdict_sentences(without_gold())
    assert evaluator.startswith(
        "Without gold, only agreement can be measured: the evaluator makes the judge's choice in 97.1% of the held-out pairs "
        "that were kept (interval 94.5% to 98.5%, n = 300), more than every trivial baseline"
    )
    assert "than its judge" not in evaluator
    assert policy == (
        "Without gold, only the judge's preference can be measured: it prefers the new policy's replies, with a win rate of "
        "76.7% (interval 73.9% to 79.3%, n = 520), ties counting half (minus one half: 26.7 points (interval 23.9 to "
        "29.3, exact "
        "sign test p < 0.001, n = 520))."
    )


@pytest.mark.parametrize(
    ("wins", "losses", "ties", "said", "standing"),
    [
        (3, 0, 1, "there are too few comparisons for a conclusion", "unclear"),
        (0, 0, 6, "there is no significant gain", "unclear"),
        (4, 0, 20, "there is no significant gain", "unclear"),
        (5, 0, 195, "there is no significant gain", "unclear"),
        (9, 1, 10, "it prefers the new policy's replies", "better"),
        (1, 9, 10, "it prefers the old policy's replies", "worse"),
    ],
)
def test_without_gold_the_wins_and_losses_decide(wins: int, losses: int, ties: int, said: str, standing: str) -> None:
    report = without_gold()
    found = compare_with_level([1.0] * wins + [0.0] * losses + [0.5] * ties)
    report["policy"]["comparisons"]["win_rate"] = found.as_json()
    assert said in verdict_sentences(report)[1]
    assert standings(report)[1] == standing


def test_judge_is_no_baseline_on_its_own_labels() -> None:
    found = summary.strongest_baseline(parsed(without_gold()))
    assert found is not None
    assert found[0] == "the mean log-probability"
    report = without_gold()
    assert not [name for name, _ in summary_rows(report) if "prompted judge" in name]
    report["evaluator"]["baselines_on"] = "gold"
    assert len([name for name, _ in summary_rows(report) if "prompted judge" in name]) == 2


@pytest.mark.parametrize("gold", [True, False])
def test_a_referee_that_decides_nothing_is_no_win_rate_of_one_half(gold: bool) -> None:
    report = sample_report() if gold else without_gold()
    report["policy"] |= {"win": 0, "loss": 0, "tie": 20, "win_rate": mean_figure([0.5] * 20).as_json()}
    report["policy"]["comparisons"]["win_rate"] = compare_with_level([0.5] * 20).as_json()
    said = verdict_sentences(report)[1]
    assert "the referee decided none of 20 comparisons: no preference, or the two orders disagree" in said
    assert "50.0%" not in said
    assert dict(summary_rows(report))["win rate, after vs. before"].startswith("the referee decided none of 20")
    assert words(report)[1] == ("▲ better" if gold else "◇ nothing decided")
    report["policy"]["win"] = 1
    assert "decided none" not in verdict_sentences(report)[1]


def test_rows_for_the_terminal() -> None:
    rows = dict(summary_rows(sample_report()))
    assert rows["evaluator accuracy, gold labels"] == "93.1% (interval 91.5% to 94.5%, n = 1,100)"
    assert rows["  the prompted judge, gold labels"] == "89.4% (interval 87.4% to 91.1%, n = 1,100)"
    less = "3.7 points (interval 1.9 to 5.5, exact McNemar test p < 0.001, n = 1,100)"
    assert rows["evaluator minus the prompted judge"] == less
    assert rows["time per verdict, judge"] == "8.40 ms (interval 8.10 ms to 8.70 ms, n = 8)"
    assert rows["tokens per verdict, judge"] == "180 read, 84.0 written"
    assert rows["  after minus before"].startswith("27.5 points (interval 24.8 to 30.1, exact McNemar test p < 0.001")
    assert rows["gold accuracy before"].startswith("41.2%")
    assert rows["KL to the reference, nats per reply"] == "3.42 (interval 3.31 to 3.53, n = 1,800)"
    assert rows["reply length, ratio of after to before"] == "1.04 (interval 1.03 to 1.05, n = 1,800)"
    assert rows["time"] == "3 min 51 s"
    assert rows["peak memory"] == "858 MiB"


def test_labels_of_a_file_are_not_called_the_judges() -> None:
    report = sample_report()
    report["evaluator"]["accuracy_gold"] = None
    report["evaluator"]["baselines_on"] = "judge"
    report["verdicts"]["source"] = "file"
    said = verdict_sentences(report)[0]
    assert "By your own labels, the evaluator picks the better reply in" in said
    assert "judge's choice" not in said
    assert "evaluator accuracy, your file's labels" in dict(summary_rows(report))
    report["verdicts"]["source"] = "judge"
    assert "the evaluator makes the judge's choice in" in verdict_sentences(report)[0]
    assert "evaluator accuracy, judge's labels" in dict(summary_rows(report))


def test_replies_that_the_limit_cut_off_are_rows_of_the_table() -> None:
    rows = dict(summary_rows(sample_report()))
    assert rows["replies cut off at the token limit"] == "2.1% (interval 1.8% to 2.5%, n = 4,000)"
    assert rows["  before training"] == "3.1% (interval 2.4% to 4.0%, n = 1,800)"
    assert rows["  after training"] == "1.2% (interval 0.8% to 1.8%, n = 1,800)"


@pytest.mark.parametrize("key", ["unfinished", "unfinished_before", "unfinished_after"])
def test_many_replies_that_the_limit_cut_off_are_a_warning(key: str) -> None:
    report = sample_report()
    assert summary.reply_warnings(parsed(report)) == ()
    report["replies"][key] = fig(summary.UNFINISHED, 0.05, 0.15, 400)
    assert summary.reply_warnings(parsed(report)) == (), "the share itself is allowed"
    report["replies"][key] = fig(0.54, 0.49, 0.59, 400)
    [warning] = summary.reply_warnings(parsed(report))
    assert "54.0%" in warning
    assert "interval 49.0% to 59.0%, n = 400" in warning
    assert "raise replies.max_new_tokens (now 48)" in warning


def test_a_judge_that_keeps_little_is_a_warning_with_its_findings() -> None:
    report = sample_report()
    assert summary.judge_warnings(parsed(report)) == ()
    report["verdicts"]["kept_share"] = fig(0.05, 0.02, summary.KEPT_LITTLE, 400)
    assert summary.judge_warnings(parsed(report)) == (), "the interval reaches the limit"
    report["verdicts"]["kept_share"] = fig(0.02, 0.01, 0.04, 400)
    report["verdicts"]["probe"]["findings"] = [{"name": "ties", "observation": "12 of 16 are ties", "remedy": "widen it"}]
    [warning] = summary.judge_warnings(parsed(report))
    assert warning.startswith("Warning: the judge kept only 2.0% of the pairs (interval 1.0% to 4.0%, n = 400). ")
    assert "12 of 16 are ties: widen it. `selfeval check MODEL SEEDS`" in warning
    report["verdicts"] |= {"source": "file", "probe": None}
    assert summary.judge_warnings(parsed(report)) == (), "there was no judge"


@pytest.mark.parametrize(
    ("cap", "remedy"),
    [(512, "set replies.max_new_tokens to a number above 48."), (48, "raise replies.max_new_tokens_cap (now 48).")],
)
def test_a_limit_that_the_run_decided_has_another_remedy(cap: int, remedy: str) -> None:
    report = sample_report()
    report["replies"]["unfinished"] = fig(0.54, 0.49, 0.59, 400)
    report["config"]["replies"] = {"max_new_tokens": "auto", "max_new_tokens_cap": cap}
    [warning] = summary.reply_warnings(parsed(report))
    assert warning.endswith(f"; {remedy}")


def test_figures_without_cases_are_not_measured_and_never_zero() -> None:
    report = emptied(sample_report())
    del report["servers"]  # counts and a cost, which are known
    for name in ("references", "seed_references"):
        references = report["policy"][name]
        report["policy"][name] = {**references, "metrics": [emptied(row) for row in references["metrics"]]}
    assert verdict_sentences(report) == ("The evaluator was not measured.", "The policy's gain was not measured.")
    assert standings(report) == ("unmeasured", "unmeasured")
    assert summary.reply_warnings(parsed(report)) == ()
    values = [value for name, value in summary_rows(report) if name not in ("time", "peak memory")]
    assert set(values) == {"not measured"}
    report["time"]["per_verdict"] = report["evaluator"]["cost"] = None
    assert {value for name, value in summary_rows(report) if "per verdict" in name} == {"not measured"}


def test_weak_kinds_of_attacks_are_a_warning_that_names_them() -> None:
    report = sample_report()
    assert summary.attack_warnings(parsed(report)) == (), "no kind of the sample is below the limit"
    report["evaluator"]["attacks"]["kinds"].append({"kind": "echo", "below": fig(0.4, 0.28, 0.54, 50)})
    [warning] = summary.attack_warnings(parsed(report))
    assert "the question itself (40.0% of them below (interval 28.0% to 54.0%, n = 50))" in warning
    assert "empty" not in warning
    assert summary.warnings(parsed(report)) == (warning,)
    more = [("praise", 0.5), ("long", 0.1), ("constant", 0.6), ("injection", 0.7)]
    report["evaluator"]["attacks"]["kinds"] += [{"kind": kind, "below": fig(value, 0.0, 0.9, 50)} for kind, value in more]
    [warning] = summary.attack_warnings(parsed(report))
    assert (
        warning.index("replies to other questions") < warning.index("the question itself") < warning.index("praise of itself")
    )
    assert "one polite sentence" not in warning
    assert "; and 2 other kinds, in the table of the evaluator. A policy" in warning
    del report["evaluator"]["attacks"]
    assert summary.warnings(parsed(report)) == ()
