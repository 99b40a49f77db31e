"""The tokenizer's chat template: tested before use, with the date of the run in place of today's, and with its arguments.

Chat templates come with the model, and three kinds fail silently or late: some print today's date, so the same score
differs tomorrow; some expect the content of a message as a list of parts and drop a plain string; some raise their own
errors.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any

from transformers import PreTrainedTokenizerBase

from selfeval.errors import ModelError
from selfeval.judging.turns import Turn, begins_turn

__all__ = [
    "CHAT_TEMPLATE",
    "freeze_date",
    "ignored_arguments",
    "jinja_string",
    "messages",
    "reason",
    "refuse_chance",
    "settled",
    "uses_parts",
    "with_arguments",
    "with_system",
]

CHAT_TEMPLATE = "chat_template.jinja"
"""File in a templates folder that replaces the tokenizer's chat template; an empty file disables it."""

_REPLY = "reply.jinja"
_SAMPLE = "How many apples does Mary have?"
_DIRECTIVES = (*"aAbBcdHIjmMpSUwWxXyYZzGuVfDFTeRhklnrt", "-d", "-m", "-j", "-y", "-H", "-I", "-M", "-S")
_RANDOM = re.compile(r"\|\s*random\b|\blipsum\s*\(")
_FROZEN = "macro strftime_now(format)"
_PERCENT = "\ue000"  # private-use character: replaces a literal % while directives are replaced


def freeze_date(source: str, day: date, *, trims: bool = False) -> str:
    """Return a template in which `strftime_now`, the only clock available to templates, shows a fixed day at midnight.

    A macro of the same name is prepended to the template, so exports and other tools show the same date.

    Args:
        source: source of the template.
        day: the date to show.
        trims: whether it is rendered with `trim_blocks`, as chat templates are. Default: False.
    """
    if "strftime_now" not in source or _FROZEN in source:
        return source
    # %% first, or "%%d" would become a percent sign and a day.
    steps = [("%%", _PERCENT), *((f"%{d}", day.strftime(f"%{d}")) for d in _DIRECTIVES), (_PERCENT, "%")]
    filters = "".join(f" | replace({jinja_string(old)}, {jinja_string(new)})" for old, new in steps)
    newline = "\n" if trims else ""  # removed by trim_blocks; the template still begins on a fresh line
    return f"{{% {_FROZEN} %}}{{{{ format{filters} }}}}{{% endmacro %}}{newline}{source}"


def jinja_string(text: str) -> str:
    """Return a jinja string literal. Jinja has Python's 16-bit escapes but does not join surrogates."""
    return json.dumps(text, ensure_ascii=False)


def with_arguments(source: str, arguments: Mapping[str, Any]) -> str:
    """Return a chat template in which the arguments are set, unless its caller passes other values.

    They are part of the template rather than of every call, so exports and other tools format the same prompts.

    Args:
        source: source of the template; an empty one is returned as it is.
        arguments: JSON values by name.

    Example:
        >>> with_arguments("{{ size }}", {"size": 3})
        '{% if size is not defined %}{% set size = 3 %}{% endif %}\\n{{ size }}'
    """
    return _assignments(arguments) + source if source and arguments else source


def ignored_arguments(source: str, arguments: Mapping[str, Any]) -> list[str]:
    """Return the arguments whose names do not occur in a template to which `with_arguments` has added them."""
    own = source.removeprefix(_assignments(arguments))
    return [name for name in arguments if not re.search(rf"\b{name}\b", own)]


def with_system(texts: Mapping[str, str], system: str) -> dict[str, str]:
    """Return the texts of a templates folder with a system turn at the start of `reply.jinja`.

    It is written into the template, so the run folder and exports have it.

    Args:
        texts: texts by file name; the system turn is not added twice.
        system: text of the turn; an empty one adds none.

    Raises:
        ModelError: `reply.jinja` has a system turn already.
    """
    source = texts.get(_REPLY)
    begin = f"{{{{ system() }}}}{{{{ {jinja_string(system)} }}}}"
    # Anywhere in it: a frozen date is written before the system turn.
    if not system or source is None or begin in source:
        return dict(texts)
    if begins_turn(_REPLY, texts, "system"):
        raise ModelError(
            f"{_REPLY} begins a system turn with system(), and chat.system is set too; remove one of them, or insert the text "
            "of chat.system there"
        )
    # A template without turns is one user message, which has to be begun after another turn.
    return {**texts, _REPLY: begin + ("" if begins_turn(_REPLY, texts, "user") else "{{ user() }}") + source}


def _assignments(arguments: Mapping[str, Any]) -> str:
    texts = [
        f"{{% if {name} is not defined %}}{{% set {name} = {_jinja_value(value)} %}}{{% endif %}}"
        for name, value in arguments.items()
    ]
    return "".join(texts) + "\n"  # removed by trim_blocks; the template still begins on a fresh line


def _jinja_value(value: Any) -> str:
    """Return a jinja literal. JSON's form but for null, which jinja does not know."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{jinja_string(key)}: {_jinja_value(inner)}' for key, inner in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_jinja_value, value))}]"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def settled(
    tokenizer: PreTrainedTokenizerBase, replacement: str | None, day: date, arguments: Mapping[str, Any]
) -> PreTrainedTokenizerBase:
    """Return the tokenizer with the chat template of the run; a copy if that differs from its own.

    Args:
        tokenizer: as loaded.
        replacement: text of `CHAT_TEMPLATE`; None keeps the tokenizer's own, an empty text means no chat template.
        day: shown instead of today's date.
        arguments: arguments of the chat template.

    Raises:
        ModelError: the tokenizer's own chat template is empty, or there are arguments but no chat template.
    """
    own: Any = getattr(tokenizer, "chat_template", None)
    if replacement is None and own is not None and not own:
        raise ModelError(
            f"the chat template of {_name(tokenizer)} is empty; restore it, or remove its file if the model has no chat format"
        )
    picked = own if replacement is None else replacement.strip() and replacement
    if arguments and not picked:
        raise ModelError(
            f"chat.arguments has {', '.join(arguments)}, but {_name(tokenizer)} has no chat template to read them; remove "
            f"chat.arguments, or add a {CHAT_TEMPLATE} to the templates folder"
        )
    frozen = _each(picked, day, arguments)
    # The caller's tokenizer is shared, so it is copied before a change and returned as it is otherwise.
    if frozen == own or not (frozen or own):
        return tokenizer
    changed: Any = copy.copy(tokenizer)
    changed.chat_template = frozen or None
    made: PreTrainedTokenizerBase = changed
    return made


def _each(templates: Any, day: date, arguments: Mapping[str, Any]) -> Any:
    """Freeze the date and set the arguments in every template; some tokenizers have several, by name."""
    if isinstance(templates, Mapping):
        return {name: _each(text, day, arguments) for name, text in templates.items()}
    return with_arguments(freeze_date(templates, day, trims=True), arguments) if templates else templates


def messages(turns: Sequence[Turn], *, parts: bool) -> list[dict[str, Any]]:
    """Return a conversation in the form that chat templates read.

    Args:
        turns: its messages.
        parts: whether the content of a message is a list of parts.
    """
    contents: list[Any] = [[{"type": "text", "text": turn.text}] if parts else turn.text for turn in turns]
    return [{"role": turn.role, "content": content} for turn, content in zip(turns, contents, strict=True)]


def uses_parts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the chat template expects message content as a list of parts, by rendering a sample.

    Raises:
        ModelError: the template raises, or shows the content in neither form.
    """
    any_tokenizer: Any = tokenizer
    sample = [Turn("user", _SAMPLE)]
    refuse_chance(str(any_tokenizer.chat_template), f"the chat template of {_name(tokenizer)}")
    reasons = []
    for parts in (False, True):
        try:
            shown = any_tokenizer.apply_chat_template(messages(sample, parts=parts), add_generation_prompt=True, tokenize=False)
        except Exception as error:  # a template is a program: it may raise anything
            reasons.append(reason(error))
            continue
        if _SAMPLE in shown:
            return parts
        reasons.append(f"it drops the text of a user message (a sample renders as {shown[:60]!r})")
    raise ModelError(
        f"the chat template of {_name(tokenizer)} cannot be used: {reasons[0]}. A prompt is a single user message without a "
        f"system message; correct the template, or add a {CHAT_TEMPLATE} that accepts this to the templates folder"
    )


def reason(error: Exception) -> str:
    """Describe in one line what a template raised, with its line number if jinja reports it."""
    text = " ".join(str(error).split()) or type(error).__name__
    line = getattr(error, "lineno", None)
    return text if line is None else f"line {line}: {text}"


def _name(tokenizer: Any) -> str:
    return str(getattr(tokenizer, "name_or_path", "") or "this tokenizer")


def refuse_chance(source: str, name: str) -> None:
    """Refuse a template that uses randomness: its prompts would differ every time, and no run could be resumed exactly."""
    if found := _RANDOM.search(source):
        raise ModelError(f"{name} uses `{found.group().strip('|( ')}`, which makes prompts non-deterministic; remove it")
