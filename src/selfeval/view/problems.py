"""Errors of the pages."""

from __future__ import annotations

from selfeval.errors import InputError

__all__ = ["NotFoundError"]


class NotFoundError(InputError):
    """The address names a run, a record or a page that does not exist."""
