"""Texts that contain control tokens, tested on every template at load time: no reply may pose as part of the prompt."""

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
    """Return texts with some of these control tokens: between words, alone, nested in another one, and in other case."""
    # The first, some in the middle and the last: large vocabularies have hundreds of control tokens.
    some = [*tokens[:4], *tokens[len(tokens) // 2 :][:4], *tokens[-4:]]
    # A token inside another one: removing the inner one in a single pass would put the outer one together.
    halves = [f"{token[: len(token) // 2]}{some[0]}{token[len(token) // 2 :]}" for token in some]
    # A template that changes case would turn this into real control tokens after the cleaning.
    other_case = f"eight{' and '.join(some).swapcase()}"
    return [f"five{' and '.join(some)}", other_case, f"{''.join(some)}six", f"se{'ven '.join(halves)}"]


def refuse_leak(templates: Templates, kind: str, values: Mapping[str, Any], path: Path) -> None:
    """Refuse a template whose prompt contains a text's control tokens although texts are cleaned first.

    This happens if the template changes the text that it shows, for example to lower case.

    Args:
        templates: templates that include this one.
        kind: kind of prompt.
        values: sample texts without control tokens.
        path: path of the template, for messages.

    Raises:
        ModelError: the template lets control tokens through.
    """
    control = templates.control
    # The template's control tokens are legitimate, so only those in excess of an honest prompt count.
    honest = Counter(i for i in templates.prompt(kind, **values).ids if i in control.forbidden_ids)
    for text in hostile_texts(control.texts):
        texts = {name: value for name, value in values.items() if value and not isinstance(value, bool)}
        hostile = {name: [text] if isinstance(value, (list, tuple)) else text for name, value in texts.items()}
        found = Counter(i for i in templates.prompt(kind, **{**values, **hostile}).ids if i in control.forbidden_ids)
        if more := found - honest:
            token = templates.tokenizer.convert_ids_to_tokens(min(more))
            raise ModelError(
                f"{path} turns inserted text into the control token {token}, so a reply could forge parts of the prompt; "
                "insert texts unchanged, without filters such as lower or replace"
            )
