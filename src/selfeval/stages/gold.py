"""Gold domains: installed under the entry point group `selfeval.domains` and read by evaluation alone."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Protocol, cast

from selfeval.config import nearest
from selfeval.errors import ConfigError

__all__ = ["Gold", "load_gold"]

_GROUP = "selfeval.domains"


class Gold(Protocol):
    """An oracle that no training step ever sees."""

    name: str

    def is_right(self, question: str, reply: str) -> bool | None:
        """Whether the reply is right; None when the question has no gold."""
        ...


def load_gold(domain: str | None) -> Gold | None:
    """The gold oracle of a domain, None without a domain.

    Raises:
        ConfigError: no such domain is installed.
    """
    if domain is None:
        return None
    found = {point.name: point for point in entry_points(group=_GROUP)}
    if domain not in found:
        raise ConfigError(f'domain "{domain}" is not installed{nearest(domain, list(found))}')
    return cast(Gold, found[domain].load()())
