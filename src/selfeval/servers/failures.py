"""Describe the failure of a request as one sentence with its remedy."""

from __future__ import annotations

from typing import Any

from selfeval.config import ServerConfig
from selfeval.texts import visible

__all__ = ["explain", "without_key"]

_LONGEST = 300
"""Characters of a server's message that are shown."""


def explain(error: Any, settings: ServerConfig, section: str, key: str) -> str:
    """Return one sentence for an error that ends the stage.

    Args:
        error: error of the library.
        settings: settings of the server.
        section: dotted name of the settings.
        key: the API key, which servers may repeat in their messages and which is removed.
    """
    status = getattr(error, "status_code", None)
    said = without_key(key, str(error))
    problem = f"{settings.url} answered {said}" if status else f"{settings.url} cannot be reached ({_cause(error, said, key)})"
    remedy = _remedy(status, said, settings, section)
    return f"{problem}; {remedy}. The answers so far are kept: rerun the same command to continue"


def _remedy(status: int | None, said: str, settings: ServerConfig, section: str) -> str:
    if status is None:
        return f"check that the server runs at this address, or raise {section}.timeout (now {settings.timeout:g} s)"
    if status in (401, 403):
        variable = settings.key_variable
        return f"check the key in {variable}" if variable else f"set {section}.key_variable to the variable with the API key"
    if status == 404:
        return f'check {section}.url, and whether the server has the model "{settings.model}"'
    if status == 429:
        return f"lower {section}.in_flight or {section}.requests_per_minute, or check the quota of the account"
    if status >= 500:
        return f"the server failed {settings.retries + 1} times; try again later, or lower {section}.in_flight"
    if 300 <= status < 400:
        return f"redirects are not followed; set {section}.url to the final address"
    if "logprob" in said:
        return f'set {section}.probabilities = "votes"'
    if "max_tokens" in said or "max_completion_tokens" in said:
        now = getattr(settings, "limit_parameter", "not set")
        return f"set {section}.limit_parameter to the other value (now {now})"
    return "correct the settings"


def _cause(error: Any, said: str, key: str) -> str:
    # The library only says "Connection error."; its cause has the reason.
    cause = error.__cause__
    return said if cause is None or not str(cause) else without_key(key, f"{type(cause).__name__}: {cause}")


def without_key(key: str, text: str) -> str:
    """Return a message on one line, without the API key, which servers may repeat in their messages."""
    text = text.replace(key, "***") if key else text
    line = visible(" ".join(text.split()))
    return line if len(line) <= _LONGEST else line[: _LONGEST - 3] + "..."
