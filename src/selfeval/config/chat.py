"""The section `[chat]`: the system prompt of replies, and values that the model's chat template reads besides messages."""

from __future__ import annotations

import keyword
import math
from typing import Any

from pydantic import Field, field_validator

from selfeval.config.fields import Section

__all__ = ["ChatConfig"]

_PASSED = (
    *("messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template"),
    *("bos_token", "eos_token", "unk_token", "pad_token", "raise_exception", "strftime_now", "tojson"),
    *("true", "false", "none", "loop", "self", "varargs", "kwargs", "caller", "range", "namespace", "set", "block", "macro"),
)
"""Names that transformers passes to every chat template, or that jinja reserves."""


class ChatConfig(Section):
    """The chat template of the model, which formats the prompts of all stages."""

    arguments: dict[str, Any] = Field(default={})
    """Optional. Arguments of the chat template by name, such as `{enable_thinking = false}`; any JSON values."""

    system: str = ""
    """Optional. System prompt of all replies: a system message before the question, which judge and evaluator do not read."""

    @field_validator("arguments")
    @classmethod
    def _can_be_passed(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        for name, value in arguments.items():
            if not name.isidentifier() or not name.isascii() or keyword.iskeyword(name) or name in _PASSED:
                raise ValueError(
                    f"{name!r} cannot be an argument of a chat template; use a name that the template reads, other than those "
                    "that every template is passed, such as messages"
                )
            if not _is_json(value):
                raise ValueError(f"{name} must be a JSON value (text, number, true, false, list or table), got {value!r}")
        return arguments


def _is_json(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_json(inner) for key, inner in value.items())
    if isinstance(value, list):
        return all(map(_is_json, value))
    return value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))
