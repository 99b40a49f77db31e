"""Reading verdicts in recorded outputs of real judges, and in random text: only a statement of lead and label is a verdict.

The recorded judges are those of PandaLM (https://github.com/WeOpenML/PandaLM): two judges on 999 pairs, each with a result and
a reason. They were asked for no lead, so their reasons ("Response 2 is better because ...") must not be read as a verdict.
"""

from __future__ import annotations

import json
import lzma
import re
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfeval.judging.labels import Labels
from selfeval.judging.reading import find_verdict, is_refusal
from shared_data import FOLDER

LABELS = Labels(lead="Better response:", first=" 1", second=" 2", tie=" neither")
JUDGES = ("pandalm-7b", "gpt-3.5-turbo")
RESULTS = {"0": "neither", "1": "1", "2": "2", "Tie": "neither", "tie": "neither"}


@cache
def recorded(judge: str) -> list[tuple[str, str]]:
    """Results and reasons of a judge."""
    path = FOLDER / "judge" / f"pandalm_{judge}-testset-v1.json.xz"
    if not path.is_file():
        pytest.skip(f"the data set is not here: shared/data/judge/{path.name} beside the repository")
    with lzma.open(path, "rt", encoding="utf-8") as file:
        rows = json.load(file)
    name = "pandalm" if judge.startswith("pandalm") else "gpt"
    return [(RESULTS.get(str(row[f"{name}_result"]).strip(), ""), str(row[f"{name}_reason"])) for row in rows]


def label_of(text: str, *, finished: bool = True) -> str | None:
    place = find_verdict(text, LABELS, finished=finished)
    return None if place is None else re.split(r"\W", text[place.label :])[0].casefold()


@pytest.mark.parametrize("judge", JUDGES)
def test_the_reason_of_a_recorded_judge_is_no_verdict(judge: str) -> None:
    reasons = [reason for _, reason in recorded(judge)]
    assert len(reasons) == 999
    assert sum(bool(re.search("response [12]", reason, re.IGNORECASE)) for reason in reasons) > 500  # they do name one
    assert [reason for reason in reasons if label_of(reason) or label_of(reason, finished=False)] == []


@pytest.mark.parametrize("judge", JUDGES)
def test_the_result_of_a_recorded_judge_is_read_after_its_reason(judge: str) -> None:
    stated = [(result, reason) for result, reason in recorded(judge) if result]
    assert len(stated) > 900
    for result, reason in stated:
        assert label_of(f"{reason}\nBetter response: {result}") == result
        assert label_of(f"{reason}\n**Better response:** {result}\n", finished=False) == result
        assert label_of(f'"Better response: 1", "Better response: 2"? {reason}') is None  # it repeats its instruction


@pytest.mark.parametrize("judge", JUDGES)
def test_a_recorded_judge_that_judged_did_not_refuse(judge: str) -> None:
    assert [reason for result, reason in recorded(judge) if result in ("1", "2") and is_refusal(reason)] == []


PIECES = st.sampled_from(
    [
        "Better response:",
        " 1",
        "2",
        "neither",
        "12",
        "ly",
        "Better",
        " response",
        ":",
        " ",
        "\n",
        "**",
        '"',
        "is better",
        "\u2028",
    ]
)


@given(st.lists(PIECES, max_size=12).map("".join), st.booleans())
def test_random_text_is_a_verdict_only_where_lead_and_label_are_stated(text: str, finished: bool) -> None:
    place = find_verdict(text, LABELS, finished=finished)
    stated = re.compile(r"better[\s*_`]*response[\s*_`]*:[\s*_`\"'“”(\[{\\$]*(?:1|2|neither)(?!\w)", re.IGNORECASE)
    if place is None:
        assert not (finished and re.fullmatch(r"Better response: (?:1|2|neither)", text))
        return
    assert stated.match(text[place.lead :].lstrip("*_")), text
    assert text[place.label :].casefold().startswith(("1", "2", "neither"))


@given(st.text(st.characters(exclude_characters=":")))
def test_text_without_the_lead_is_never_a_verdict(text: str) -> None:
    assert label_of(text) is None
    assert label_of(text, finished=False) is None
