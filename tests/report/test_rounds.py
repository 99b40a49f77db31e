"""The rounds on the page and in sentences."""

from __future__ import annotations

import re
from typing import Any

import pytest
from sample_report import compared, fig, parsed, sample_metrics, sample_report

from selfeval.errors import InputError
from selfeval.report import page, summary

UP = compared(0.02, 0.01, 0.03, 2000, 60, 20, 0.0001, "better")
FLAT = compared(0.001, -0.004, 0.006, 2000, 22, 20, 0.88, "unclear")
DOWN = compared(-0.02, -0.03, -0.01, 2000, 20, 60, 0.0001, "worse")
FEW = compared(0.75, 0.1, 1.0, 4, 3, 0, 0.25, "too_few")


def rounds_sentences(report: dict[str, Any]) -> tuple[str, ...]:
    return summary.rounds_sentences(parsed(report))


def render(report: dict[str, Any], metrics: dict[str, Any]) -> str:
    return page.render(parsed(report), metrics)


def row(number: int, evaluator: Any, policy: Any, **policy_figures: Any) -> dict[str, Any]:
    accuracy = fig(0.9 + number / 100, 0.89, 0.94, 1900)
    return {
        "round": number,
        "folder": "." if number == 1 else f"rounds/{number:02d}",
        "evaluator": {
            "accuracy_gold": fig(0.8, 0.7, 0.9, 40),
            "accuracy_judge": fig(0.99, 0.98, 1.0, 300),
            "accuracy_gold_first_pairs": accuracy,
            "accuracy_judge_first_pairs": fig(0.98, 0.97, 0.99, 1800),
            "gain": None if evaluator is None else evaluator["difference"],
            "comparison": evaluator,
            "pairs_trained": 1000 * number,
        },
        "policy": {
            "win_rate": fig(0.5 + number / 100, 0.5, 0.6, 2000),
            **{"win": 11 * number, "tie": 22 * number, "loss": 3333 * number},
            "gold_before": fig(0.4, 0.38, 0.42, 2000),
            "gold_after": fig(0.9, 0.88, 0.92, 2000),
            "gold_gain": None if policy is None else policy["difference"],
            "comparisons": {"gold": policy, "win_rate": compared(0.01, 0.0, 0.1, 2000, 40, 20, 0.013, "better", "sign_exact")},
            "kl": fig(1.5, 1.4, 1.6, 2000),
            **policy_figures,
        },
    }


def report(*rows: dict[str, Any]) -> dict[str, Any]:
    return {**sample_report(), "rounds": list(rows)}


@pytest.mark.parametrize(
    ("gains", "said"),
    [
        ((UP, UP, UP), "improved in every round: in the last, round 3, "),
        ((UP, FLAT, FLAT), "improved up to round 1 and not further: round 2 shows no significant gain; "),
        ((UP, UP, FLAT), "improved up to round 2 and not further: round 3 shows no significant gain; "),
        ((UP, DOWN, UP), "improved up to round 1 and not further: round 2 is worse; "),
        ((FEW, UP, UP), "did not improve: round 1 has too few cases to show a gain; "),
        ((FLAT, UP, UP), "did not improve: round 1 shows no significant gain; "),
    ],
)
def test_the_sentence_says_where_the_policy_stops(gains: tuple[Any, ...], said: str) -> None:
    rows = [row(number, UP if number > 1 else None, gain) for number, gain in enumerate(gains, start=1)]
    sentence = rounds_sentences(report(*rows))[1]
    assert sentence.startswith(f"By gold, the policy {said}")
    # A gain after the stop is reported.
    assert sentence.endswith("in round 2 and 3.") == (gains[0] in (FLAT, FEW))
    assert sentence.endswith("it improved again in round 3.") == (gains == (UP, DOWN, UP))


def test_the_evaluator_is_compared_from_round_two_on() -> None:
    rows = [row(1, None, UP), row(2, UP, UP), row(3, FLAT, UP)]
    told = rounds_sentences(report(*rows))[0]
    assert told == (
        "By gold, on round 1's pairs, the evaluator improved up to round 2 and not further: round 3 shows no significant gain; "
        "its accuracy minus that of the previous round is 0.1 points (interval -0.4 to 0.6, exact McNemar "
        "test p = 0.88, n = 2,000)."
    )


def test_without_gold_the_judge_is_asked() -> None:
    wins = [compared(0.1, 0.05, 0.15, 200, 60, 20, 0.0001, "better", "sign_exact")]
    wins.append(compared(0.0, -0.05, 0.05, 200, 30, 30, 1.0, "unclear", "sign_exact"))
    rows = [row(i, None, None, comparisons={"gold": None, "win_rate": win}) for i, win in enumerate(wins, start=1)]
    evaluator, policy = rounds_sentences(report(*rows))
    assert evaluator == "By gold, on round 1's pairs, the evaluator was not compared with its predecessor in every round."
    assert policy == (
        "By the judge, the policy improved up to round 1 and not further: round 2 shows no significant gain; its win rate over "
        "the previous policy minus one half is 0.0 points (interval -5.0 to 5.0, exact sign test p = 1, n = 200)."
    )


def test_one_round_has_no_section_and_no_sentence() -> None:
    assert rounds_sentences(sample_report()) == ()
    assert "Round by round" not in render(sample_report(), sample_metrics())
    assert rounds_sentences(report(row(1, None, UP))) == ()


def test_the_page_shows_every_round_with_its_figures() -> None:
    html = render(report(row(1, None, UP), row(2, UP, FLAT)), sample_metrics())
    section = html[html.index('id="rounds"') : html.index('id="policy"')]
    words = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", section))
    for expected in ("92.0% 89.0% to 94.0% n = 1,900", "22 / 44 / 6,666", "52.0% 50.0% to 60.0% n = 2,000", "2,000", "1.50"):
        assert expected in words
    assert "By gold, the policy improved up to round 1 and not further" in words
    assert section.count('<svg class="chart"') == 2
    # The chart of the policies begins at the base, 40%; the evaluators' begins with round 1, 91%.
    assert "share: 40.0% at round 0, 90.0% at round 2" in section
    assert "share: 91.0% at round 1, 92.0% at round 2" in section
    assert '<a href="#rounds">' in html


def test_the_terminal_has_a_few_figures_of_each_later_round() -> None:
    rows = dict(summary.summary_rows(parsed(report(row(1, None, UP), row(2, UP, FLAT)))))
    assert rows["round 2: evaluator on round 1's pairs"].startswith("92.0%")
    assert rows["round 2: win rate against the previous round"].startswith("52.0%")
    assert not [name for name in rows if name.startswith("round 1")]


@pytest.mark.parametrize("numbers", [[2], [1, 3]])
def test_rounds_that_are_not_numbered_from_one_are_refused(numbers: list[int]) -> None:
    rows = [row(number, UP, UP) for number in numbers]
    with pytest.raises(InputError, match=r"rounds must be numbered from 1, got \["):
        rounds_sentences(report(*rows))
