"""Gold domains: installed under the entry point group `selfeval.domains` and read by evaluation alone."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import Protocol, cast

from selfeval.config import nearest
from selfeval.errors import ConfigError

__all__ = ["Gold", "check_domain", "load_gold"]

_GROUP = "selfeval.domains"


class Gold(Protocol):
    """An oracle that no training step ever sees."""

    name: str

    def is_right(self, question: str, reply: str) -> bool | None:
        """Whether the reply is right; None when the question has no gold."""
        ...


def _installed(domain: str) -> EntryPoint:
    found = {point.name: point for point in entry_points(group=_GROUP)}
    if domain not in found:
        raise ConfigError(f'domain "{domain}" is not installed{nearest(domain, list(found))}')
    return found[domain]


def check_domain(domain: str | None) -> None:
    """Says early that a domain is not installed, without loading its oracle.

    Raises:
        ConfigError: no such domain is installed.
    """
    if domain is not None:
        _installed(domain)


def load_gold(domain: str | None) -> Gold | None:
    """The gold oracle of a domain, None without a domain.

    Raises:
        ConfigError: no such domain is installed; and from `is_right`, an answer that is neither yes, no nor unknown.
    """
    if domain is None:
        return None
    return _Answers(domain, cast(Gold, _installed(domain).load()()))


class _Answers:
    """A domain whose answers are True, False or None.

    Domains come from other packages. One that answers 1, or numpy's True, is understood. One that answers 0.5 would count as
    right wherever its answer is used as a condition, and is refused.
    """

    def __init__(self, domain: str, gold: Gold) -> None:
        self.name, self._domain, self._gold = gold.name, domain, gold

    def is_right(self, question: str, reply: str) -> bool | None:
        answer: object = self._gold.is_right(question, reply)
        if answer is None:
            return None
        if answer not in (True, False):
            raise ConfigError(
                f'domain "{self._domain}" answers {answer!r}; its is_right should return True, False, or None for a question '
                "that it does not know"
            )
        return bool(answer)
