"""The benchmark of word problems: its questions, and its figures by hand."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from selfeval.quality.dedupe import NearDuplicates

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def problems(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import word_problems

    for name in ("word_problems", "real_model", "common"):
        monkeypatch.delitem(sys.modules, name)
    if not word_problems.DATA.exists():
        pytest.skip("shared/data is not next to the repository")
    return word_problems


def test_no_test_question_is_near_a_training_question(problems: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"input": row["input"]} for row in problems._rows()]  # without the answers, which the split must not need
    monkeypatch.setattr(problems, "_rows", lambda: rows)
    train, test = problems.questions_of(200, 100)
    assert (len(set(train)), len(set(test))) == (200, 100)
    found = NearDuplicates()
    for text in test:
        found.add(text, text)
    assert [text for text in train if found.find(text) is not None] == []
    assert problems.questions_of(200, 100) == (train, test)


def test_seeds_are_pooled_by_question(problems: Any) -> None:
    times = problems.SAMPLES
    one = {
        "base": {"greedy": [0.0, 1.0], "sampled": [0.0] * 2 * times},
        "policy": {"greedy": [1.0, 1.0], "sampled": [1.0] * 2 * times},
    }
    other = {
        "base": {"greedy": [0.0, 1.0], "sampled": [0.0] * 2 * times},
        "policy": {"greedy": [0.0, 0.0], "sampled": [0.0] * 2 * times},
    }
    found = problems.pooled([one, other], ["a", "b"])
    # Question a: +1 and 0; question b: 0 and -1.
    assert found["greedy"]["policy_less_base"]["difference"]["value"] == 0.0
    assert (found["greedy"]["base"]["value"], found["greedy"]["policy"]["value"]) == (0.5, 0.5)
    assert found["greedy"]["policy_less_base"]["difference"]["n"] == 2
    assert found["sampled"]["policy_less_base"]["difference"] | {"ci_low": 0, "ci_high": 0} == {
        "value": 0.5, "ci_low": 0, "ci_high": 0, "n": 2,
    }  # fmt: skip
