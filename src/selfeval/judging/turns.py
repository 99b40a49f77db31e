"""Turns of a conversation in a prompt template.

`{{ system() }}`, `{{ user() }}` and `{{ assistant() }}` begin a turn; its text is everything up to the next one, without
surrounding whitespace. A template without turns is one user message. A last turn of the assistant is a prefill: the model
continues it.

In the rendered text a turn begins with a mark that inserted texts cannot contain (`without_marks`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from jinja2 import Environment, TemplateRuntimeError, TemplateSyntaxError, meta, nodes

__all__ = ["MARKS", "ROLES", "Turn", "begins_turn", "turn_functions", "turns_of", "without_marks"]

ROLES = ("system", "user", "assistant")
_BEGIN, _END = MARKS = "\x1e", "\x1f"
"""The characters around the role of a turn: ASCII's record and unit separators."""


@dataclass(frozen=True)
class Turn:
    """A message of the conversation."""

    role: str
    text: str


def turn_functions(*, chat: bool) -> dict[str, Callable[[], str]]:
    """Return the functions that begin a turn, by name.

    Args:
        chat: whether the tokenizer has a chat template. Without one, they raise an error when they are called.
    """
    return {role: partial(_mark if chat else _refuse, role) for role in ROLES}


def _mark(role: str) -> str:
    return f"{_BEGIN}{role}{_END}"


def _refuse(role: str) -> str:
    raise TemplateRuntimeError(
        f"it begins a turn with {role}(), but this model has no chat template; write the turns in {{% if chat %}} and plain "
        "text in {% else %}"
    )


def begins_turn(name: str, texts: Mapping[str, str], role: str, seen: frozenset[str] = frozenset()) -> bool:
    """Return whether a template, or one that it includes or extends, calls the function that begins a turn of `role`.

    Args:
        name: name of the template.
        texts: sources by name.
        role: one of `ROLES`.
        seen: names that were looked at already. Default: none.
    """
    if name in seen or name not in texts:
        return False
    try:
        tree = Environment().parse(texts[name])
    except TemplateSyntaxError:
        return False  # loading the template reports it
    if any(isinstance(call.node, nodes.Name) and call.node.name == role for call in tree.find_all(nodes.Call)):
        return True
    linked = meta.find_referenced_templates(tree)
    return any(begins_turn(other, texts, role, seen | {name}) for other in linked if other is not None)


def without_marks(text: str) -> str:
    """Return a text that cannot begin a turn, to insert into a template."""
    return text.replace(_BEGIN, " ").replace(_END, " ")


def turns_of(rendered: str) -> list[Turn]:
    """Split a rendered template into its turns.

    Raises:
        TemplateRuntimeError: there is text before the first turn, a system turn that is not the first, or no user turn.

    Example:
        >>> turns_of("Write a question.")
        [Turn(role='user', text='Write a question.')]
    """
    before, *parts = rendered.split(_BEGIN)
    if not parts:
        return [Turn("user", rendered)]
    if before.strip():
        raise TemplateRuntimeError(f"it has text before its first turn: {before.strip()[:40]!r}; begin with user()")
    turns = []
    for part in parts:
        role, _, text = part.partition(_END)
        turns.append(Turn(role, text.strip()))
    roles = [turn.role for turn in turns]
    if "system" in roles[1:] or "user" not in roles:
        raise TemplateRuntimeError(f"its turns are {', '.join(roles)}; allowed: an optional system turn first, and a user turn")
    return turns
