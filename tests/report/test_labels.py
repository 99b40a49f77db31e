"""Labels of people in the report: what is said about them, and when they are its gold."""

from __future__ import annotations

from typing import Any

from sample_report import fig, labels_of_people, parsed, sample_report

from selfeval.report.labels import agreement_sentence, label_sentences, threshold_sentence, with_labels
from selfeval.report.page import render
from selfeval.report.schema import HumanLabels, Report
from selfeval.report.summary import summary_rows, verdict_sentences


def without_gold() -> Report:
    report = sample_report()
    report["model"]["domain"] = None
    report["evaluator"] |= {"accuracy_gold": None, "baselines_on": "judge"}
    report["verdicts"]["label_accuracy_gold"] = None
    return parsed(report)


def labels(**changes: Any) -> HumanLabels:
    found = parsed({**sample_report(), "labels": {**labels_of_people(), **changes}}).labels
    assert found is not None
    return found


def test_labels_are_gold_where_there_is_no_other() -> None:
    report = with_labels(without_gold(), labels(gold=True))
    assert report.evaluator.accuracy_gold == labels().evaluator
    assert report.verdicts.label_accuracy_gold == labels().judge_kept
    page, rows = render(report, {}), dict(summary_rows(report))
    assert "This run has no other gold, so accuracies by gold are by people." in page
    assert "Accuracy on held-out pairs, labels of people" in page
    assert "Kept labels that agree with people" in page
    assert rows["evaluator accuracy, labels of people"] == "90.4% (interval 84.8% to 94.1%, n = 188)"
    sentence = verdict_sentences(report)[0]
    assert sentence.startswith("By the judge's labels: the evaluator makes the judge's choice in ")
    assert (
        "By labels of people, it picks the better reply in 90.4% of all judged test pairs (interval 84.8% to 94.1%" in sentence
    )


def test_labels_that_were_taken_back_are_no_gold_any_more() -> None:
    labelled = with_labels(without_gold(), labels(gold=True))
    assert with_labels(labelled, None) == without_gold()


def test_other_gold_stays_and_labels_are_next_to_it() -> None:
    report = with_labels(parsed(sample_report()), labels())
    assert report.evaluator == parsed(sample_report()).evaluator
    assert "By gold labels, the evaluator picks" in verdict_sentences(report)[0]
    assert "By labels of people, it picks" in verdict_sentences(report)[0]
    page = render(report, {})
    assert "Labels of people" in page
    assert "no other gold" not in page


def test_a_report_without_labels_does_not_mention_them() -> None:
    report = parsed(sample_report())
    assert "labels" not in report.as_json()
    assert "people" not in render(report, {}).lower()


def test_the_line_after_each_label_has_every_interval_and_n() -> None:
    assert agreement_sentence(labels()) == (
        "212 of 1800 pairs labelled (17 ties, 9 skipped); evaluator agrees on 90.4% (interval 84.8% to 94.1%, n = 188), judge "
        "on 93.1% (interval 87.9% to 96.2%, n = 186), agreement of 2 raters 0.781 (interval 0.690 to 0.860, n = 185); 640 more "
        "pairs halve the interval"
    )
    assert agreement_sentence(labels(pairs=300)).endswith("half the interval would take 640 more pairs, and 79 are left")
    nothing = labels(labelled=1, decided=0, ties=1, skipped=0, evaluator=fig(None, None, None, 0), more_labels=None)
    assert agreement_sentence(nothing) == "1 of 1800 pairs labelled (1 ties, 0 skipped); no preference yet"


def test_the_threshold_says_what_it_rests_on() -> None:
    assert threshold_sentence(labels().threshold) == (
        "The evaluator is unsure below 0.76: with probability 95.0%, its error against people is at most 10.0% where it is "
        "sure, which is 80.2% (interval 71.2% to 87.0%, n = 96) of the pairs."
    )
    none = labels(threshold={**labels_of_people()["threshold"], "sure": None, "pairs": 12}).threshold
    assert "takes at least 44 pairs" in threshold_sentence(none)
    assert "there are 12 such pairs so far" in threshold_sentence(none)
    assert threshold_sentence(none).endswith("The evaluator is unsure below 0.8.")


def test_labels_of_other_texts_are_mentioned() -> None:
    said = "3 labels are of texts or of a set of pairs that the run no longer has, and are not used."
    assert said in label_sentences(labels())
    assert len(label_sentences(labels(unused=0))) == 2
