"""Texts that hold control tokens: tried on every template when it is loaded, so that no reply can speak for a prompt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfeval.errors import ModelError

if TYPE_CHECKING:
    from selfeval.judging.templates import Templates

__all__ = ["hostile_texts", "refuse_leak"]


def hostile_texts(tokens: tuple[str, ...]) -> list[str]:
    """Texts with some of these control tokens: between words, alone, in the middle of another, and in other letters."""
    some = [*tokens[:4], *tokens[len(tokens) // 2 :][:4], *tokens[-4:]]
    halves = [f"{token[: len(token) // 2]}{some[0]}{token[len(token) // 2 :]}" for token in some]
    other_case = f"eight{' and '.join(some).swapcase()}"
    return [f"five{' and '.join(some)}", other_case, f"{''.join(some)}six", f"se{'ven '.join(halves)}"]


def refuse_leak(templates: Templates, kind: str, values: Mapping[str, Any], path: Path) -> None:
    """Refuses a template in whose prompt a text's control tokens would arrive, though texts are cleaned before.

    So it is where the template changes the text that it shows, for example to lower case.

    Args:
        templates: with this one.
        kind: of prompt.
        values: a sample of its texts, without control tokens.
        path: of the template, for messages.

    Raises:
        ModelError: it lets control tokens through.
    """
    control = templates.control
    honest = Counter(i for i in templates.prompt(kind, **values) if i in control.forbidden_ids)
    for text in hostile_texts(control.texts):
        hostile = {name: [text] if isinstance(value, (list, tuple)) else text for name, value in values.items() if value}
        found = Counter(i for i in templates.prompt(kind, **{**values, **hostile}) if i in control.forbidden_ids)
        if more := found - honest:
            token = templates.tokenizer.convert_ids_to_tokens(min(more))
            raise ModelError(
                f"{path} makes the control token {token} of a text that it shows, so that a reply could speak for the prompt; "
                "show texts as they are, without filters such as lower or replace"
            )
