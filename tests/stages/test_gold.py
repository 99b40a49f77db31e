from __future__ import annotations

from importlib.metadata import EntryPoint
from typing import Any

import numpy as np
import pytest

from selfeval.errors import ConfigError
from selfeval.stages import gold as module
from selfeval.stages.gold import load_gold


def test_the_embedded_domain_is_found_by_its_name() -> None:
    gold = load_gold("word-problems")
    assert gold is not None
    assert gold.name == "word-problems"
    question = "Ben has 18 eggs. He buys 11 more and gives 10 to Mia. How many eggs does Ben have now?"
    assert gold.is_right(question, "18 + 11 = 29. 29 - 10 = 19. The answer is 19") is True
    assert gold.is_right(question, "The answer is 18") is False
    assert gold.is_right("What is love?", "The answer is 19") is None


def test_no_domain_is_no_gold() -> None:
    assert load_gold(None) is None


def test_an_unknown_domain_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match='domain "word-problem" is not installed; did you mean "word-problems"'):
        load_gold("word-problem")


class Coin:
    """A gold domain as another package would bring it."""

    name = "coin"

    def is_right(self, question: str, reply: str) -> bool | None:
        return reply == "heads" if question == "coin" else None


def test_any_package_can_bring_a_domain(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("coin", "somewhere:Coin", "selfeval.domains")
    monkeypatch.setattr(EntryPoint, "load", lambda self: Coin)

    def installed(group: str) -> list[EntryPoint]:
        return [point] if group == "selfeval.domains" else []

    monkeypatch.setattr(module, "entry_points", installed)
    gold = load_gold("coin")
    assert gold is not None
    assert (gold.is_right("coin", "heads"), gold.is_right("coin", "tails"), gold.is_right("x", "heads")) == (True, False, None)


@pytest.mark.parametrize(
    ("said", "understood"), [(1, True), (np.False_, False), (None, None), (0.5, ConfigError), ("no", ConfigError)]
)
def test_an_answer_is_yes_no_or_unknown(said: object, understood: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Odd:
        name = "odd"

        def is_right(self, question: str, reply: str) -> object:
            return said

    monkeypatch.setattr(EntryPoint, "load", lambda self: Odd)
    monkeypatch.setattr(module, "entry_points", lambda group: [EntryPoint("odd", "somewhere:Odd", "selfeval.domains")])
    gold = load_gold("odd")
    assert gold is not None
    if understood is ConfigError:
        with pytest.raises(ConfigError, match=r'domain "odd" answers .*; its is_right should return True, False, or None'):
            gold.is_right("x", "y")
    else:
        assert gold.is_right("x", "y") is understood
