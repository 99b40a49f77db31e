"""The page of a comparison: a self-contained `index.html` with the ranking, the win rates of every pair, and the notes.

As the page of a run, it makes no network requests and has no scripts. Names come from the user's files and are escaped.
"""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from selfeval.policy_comparison.figures import JudgeFigures
from selfeval.policy_comparison.result import (
    GOLD_HEADER,
    PAIR_HEADER,
    RANK_HEADER,
    PolicyComparison,
    gold_rows,
    pair_rows,
    rank_rows,
    sentences,
)
from selfeval.quality.statistics import Figure
from selfeval.report.charts import Bar, bar_chart
from selfeval.report.figures import percent
from selfeval.report.page import page_template

__all__ = ["render"]


def render(result: PolicyComparison) -> str:
    """Return the page as a string."""
    judges = [{"name": judge.judge, "tables": _tables(judge, result), "chart": _chart(judge)} for judge in result.judges]
    gold = None if result.gold is None else _table("Right by gold", GOLD_HEADER, gold_rows(result.gold))
    return page_template("comparison.html.j2").render(
        policies=result.policies,
        facts=[("Questions", f"{len(result.questions.used):,}"), ("Judges of", result.judge_run)],
        judges=judges,
        gold=gold,
        sentences=list(sentences(result)),
    )


def _tables(judge: JudgeFigures, result: PolicyComparison) -> list[dict[str, Any]]:
    return [
        _table("Ranks", RANK_HEADER, rank_rows(judge)),
        _table("Win rate of the row against the column", ("", *result.policies), _matrix(judge, result.policies)),
        _table("Pairs", PAIR_HEADER, pair_rows(judge)),
    ]


def _table(caption: str, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> dict[str, Any]:
    return {"caption": caption, "header": header, "rows": rows}


def _matrix(judge: JudgeFigures, policies: tuple[str, ...]) -> list[tuple[str, ...]]:
    rates: dict[tuple[str, str], float] = {}
    for pair in judge.pairs:
        if pair.win_rate.value is not None:
            rates[pair.first, pair.second] = pair.win_rate.value
            rates[pair.second, pair.first] = 1 - pair.win_rate.value
    return [(row, *(percent(rates[row, one]) if (row, one) in rates else "–" for one in policies)) for row in policies]


def _chart(judge: JudgeFigures) -> Markup | None:
    """Return the strengths with their intervals; None if they are undefined."""
    bars = [_bar(place.name, place.ranks, place.strength) for place in judge.ranking if place.strength.value is not None]
    if not bars:
        return None
    reach = max(abs(end) for bar in bars for end in (bar.value, bar.low, bar.high) if end is not None)
    # At least 100 points to each side, so a small difference does not look like a large one.
    end = max(100.0, 1.1 * reach)
    label = f"Bradley-Terry strengths by {judge.judge}, in Elo points"
    return Markup(bar_chart(bars, label=label, low=-end, high=end, reference=0.0, as_percent=False))


def _bar(name: str, ranks: str, strength: Figure) -> Bar:
    return Bar(name, strength.known, strength.ci_low, strength.ci_high, f"{strength.known:+.0f}, rank {ranks}", accent=True)
