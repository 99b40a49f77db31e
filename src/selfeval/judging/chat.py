"""The tokenizer's chat template: tried before it is used, and with the date of the run in place of today's.

Chat templates come with the model, and three kinds fail silently or late: some print today's date, so that the same score
differs tomorrow; some expect the content of a message as a list of parts and drop a plain string; some raise an error of
their own.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from datetime import date
from typing import Any

from transformers import PreTrainedTokenizerBase

from selfeval.errors import ModelError

__all__ = ["CHAT_TEMPLATE", "freeze_date", "jinja_string", "message", "reason", "refuse_chance", "settled", "uses_parts"]

CHAT_TEMPLATE = "chat_template.jinja"
"""File of a templates folder that replaces the tokenizer's chat template; an empty file switches it off."""

_SAMPLE = "How many apples does Mary have?"
_DIRECTIVES = (*"aAbBcdHIjmMpSUwWxXyYZzGuVfDFTeRhklnrt", "-d", "-m", "-j", "-y", "-H", "-I", "-M", "-S")
_RANDOM = re.compile(r"\|\s*random\b|\blipsum\s*\(")
_FROZEN = "macro strftime_now(format)"
_PERCENT = "\ue000"  # private use: stands for a literal % while directives are replaced


def freeze_date(source: str, day: date, *, trims: bool = False) -> str:
    """A template in which `strftime_now`, the only clock that templates have, shows a fixed day at midnight.

    A macro of the same name is put before the template. It travels with the text: exports and other tools show the same date.

    Args:
        source: of the template.
        day: the date to show.
        trims: it is rendered with `trim_blocks`, as chat templates are.
    """
    if "strftime_now" not in source or _FROZEN in source:
        return source
    steps = [("%%", _PERCENT), *((f"%{d}", day.strftime(f"%{d}")) for d in _DIRECTIVES), (_PERCENT, "%")]
    filters = "".join(f" | replace({jinja_string(old)}, {jinja_string(new)})" for old, new in steps)
    newline = "\n" if trims else ""  # removed by trim_blocks; the template still begins on a fresh line
    return f"{{% {_FROZEN} %}}{{{{ format{filters} }}}}{{% endmacro %}}{newline}{source}"


def jinja_string(text: str) -> str:
    """Write a string literal of jinja, which knows escapes of 16 bits as Python does but joins no surrogates."""
    return json.dumps(text, ensure_ascii=False)


def settled(tokenizer: PreTrainedTokenizerBase, replacement: str | None, day: date) -> PreTrainedTokenizerBase:
    """The tokenizer with the chat template of the run; a copy where that differs from its own.

    Args:
        tokenizer: as loaded.
        replacement: text of `CHAT_TEMPLATE`; None keeps the tokenizer's own, an empty text means no chat template.
        day: shown for today's date.

    Raises:
        ModelError: the tokenizer's own chat template is empty.
    """
    own: Any = getattr(tokenizer, "chat_template", None)
    if replacement is None and own is not None and not own:
        raise ModelError(
            f"the chat template of {_name(tokenizer)} is empty; restore it, or remove its file if the model has no chat format"
        )
    picked = own if replacement is None else replacement.strip() and replacement
    frozen = _each(picked, day)
    if frozen == own or not (frozen or own):
        return tokenizer
    changed: Any = copy.copy(tokenizer)
    changed.chat_template = frozen or None
    made: PreTrainedTokenizerBase = changed
    return made


def _each(templates: Any, day: date) -> Any:
    """Some tokenizers have several templates by name."""
    if isinstance(templates, Mapping):
        return {name: freeze_date(text, day, trims=True) for name, text in templates.items()}
    return freeze_date(templates, day, trims=True) if templates else templates


def message(text: str, *, parts: bool) -> list[dict[str, Any]]:
    """A conversation of one user message."""
    return [{"role": "user", "content": [{"type": "text", "text": text}] if parts else text}]


def uses_parts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template wants the content of a message in parts, found out by rendering a sample.

    Raises:
        ModelError: it raises, or shows the content in neither form.
    """
    any_tokenizer: Any = tokenizer
    refuse_chance(str(any_tokenizer.chat_template), f"the chat template of {_name(tokenizer)}")
    reasons = []
    for parts in (False, True):
        try:
            shown = any_tokenizer.apply_chat_template(message(_SAMPLE, parts=parts), add_generation_prompt=True, tokenize=False)
        except Exception as error:  # a template is a program: it may raise anything
            reasons.append(reason(error))
            continue
        if _SAMPLE in shown:
            return parts
        reasons.append(f"it drops the text of a user message (a sample becomes {shown[:60]!r})")
    raise ModelError(
        f"the chat template of {_name(tokenizer)} cannot be used: {reasons[0]}. Prompts are one user message without a system "
        f"message; correct the template, or put a {CHAT_TEMPLATE} that accepts this into the templates folder"
    )


def reason(error: Exception) -> str:
    """One line about what a template raised, with its line number where jinja knows it."""
    text = " ".join(str(error).split()) or type(error).__name__
    line = getattr(error, "lineno", None)
    return text if line is None else f"line {line}: {text}"


def _name(tokenizer: Any) -> str:
    return str(getattr(tokenizer, "name_or_path", "") or "this tokenizer")


def refuse_chance(source: str, name: str) -> None:
    """Refuse a template that draws at random: no prompt would be the same twice, and no run could be resumed exactly."""
    if found := _RANDOM.search(source):
        raise ModelError(f"{name} uses `{found.group().strip('|( ')}`, so that prompts differ each time; remove it")
