"""Failures that are answers: the prompt is the reason, and other prompts of the same run can succeed."""

from __future__ import annotations

import re
from typing import Any

from selfeval.judging.server.chat import Answer
from selfeval.servers.failures import without_key

__all__ = ["answer_instead"]

_NO_ROOM = re.compile(
    r"context[ _-]?(?:length|window|size)|maximum context|(?:prompt|input|message)s? (?:is|are) too long|too many tokens",
    re.IGNORECASE,
)
"""How OpenAI, vLLM, llama.cpp, TGI and others say that a prompt does not fit."""


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
        return Answer(without_key(key, message), "no_room", 0, 0)
    if code in ("content_filter", "content_policy_violation"):
        return Answer(without_key(key, message), "refused", 0, 0)
    return None
