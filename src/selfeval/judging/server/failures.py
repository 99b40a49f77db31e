"""Describe the failure of a request: as an answer, if the prompt is the reason, else as a message with its remedy."""

from __future__ import annotations

import re
from typing import Any

from selfeval.config import EndpointConfig
from selfeval.judging.server.chat import Answer
from selfeval.texts import visible

__all__ = ["answer_instead", "explain"]

_NO_ROOM = re.compile(
    r"context[ _-]?(?:length|window|size)|maximum context|(?:prompt|input|message)s? (?:is|are) too long|too many tokens",
    re.IGNORECASE,
)
"""How OpenAI, vLLM, llama.cpp, TGI and others say that a prompt does not fit."""


_LONGEST = 300
"""Characters of a server's message that are shown."""


def answer_instead(error: Any, key: str) -> Answer | None:
    """Return the answer that an error stands for: a prompt that is too long, or that a content filter refused; else None.

    Other prompts of the same run can succeed, so these do not end it.

    Args:
        error: error of the library.
        key: the API key, which servers may repeat in their messages and which is removed.
    """
    if getattr(error, "status_code", None) not in (400, 413, 422):
        return None
    code, message = str(getattr(error, "code", None) or ""), str(error)
    if code == "context_length_exceeded" or _NO_ROOM.search(message):
        return Answer(_without(key, message), "no_room", 0, 0)
    if code in ("content_filter", "content_policy_violation"):
        return Answer(_without(key, message), "refused", 0, 0)
    return None


def explain(error: Any, settings: EndpointConfig, section: str, key: str) -> str:
    """Return one sentence for an error that ends the stage.

    Args:
        error: error of the library.
        settings: settings of the server.
        section: dotted name of the settings.
        key: the API key, which servers may repeat in their messages and which is removed.
    """
    status = getattr(error, "status_code", None)
    said = _without(key, str(error))
    problem = f"{settings.url} answered {said}" if status else f"{settings.url} cannot be reached ({_cause(error, said, key)})"
    remedy = _remedy(status, said, settings, section)
    return f"{problem}; {remedy}. The answers so far are kept: rerun the same command to continue"


def _remedy(status: int | None, said: str, settings: EndpointConfig, section: str) -> str:
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
        return f"set {section}.limit_parameter to the other value (now {settings.limit_parameter})"
    return "correct the settings"


def _cause(error: Any, said: str, key: str) -> str:
    # The library only says "Connection error."; its cause has the reason.
    cause = error.__cause__
    return said if cause is None or not str(cause) else _without(key, f"{type(cause).__name__}: {cause}")


def _without(key: str, text: str) -> str:
    """Return a message on one line, without the key."""
    text = text.replace(key, "***") if key else text
    line = visible(" ".join(text.split()))
    return line if len(line) <= _LONGEST else line[: _LONGEST - 3] + "..."
