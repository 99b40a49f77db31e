"""Settings that name an entry of a registry, and the section of settings that belongs to the chosen entry."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any, Protocol

from pydantic import BaseModel, create_model

__all__ = ["Entry", "check_name", "read_settings"]


class Entry(Protocol):
    """An entry of a registry."""

    @property
    def config(self) -> type[BaseModel] | None:
        """Class of its section; None if it has no settings."""
        ...


def check_name(value: str, names: Collection[str], what: str) -> str:
    """Return a name, if it is in the registry.

    Args:
        value: the name.
        names: names in the registry.
        what: what they name, for the message.

    Raises:
        ValueError: it is not; the message suggests the nearest one and lists all.
    """
    if value not in names:
        # Laxer than difflib's default of 0.6, because names are short.
        close = difflib.get_close_matches(value, list(names), n=1, cutoff=0.5)
        suggestion = f'did you mean "{close[0]}"? ' if close else ""
        raise ValueError(f"unknown {what}; {suggestion}allowed: {', '.join(names)}")
    return value


def read_settings(values: Any, key: str, default: str, registry: Mapping[str, Entry], alias: str) -> Any:
    """Validate the section of the chosen entry. Other entries' sections remain, as unknown keys.

    Before the fields are validated, because the class of the section depends on the name.

    Args:
        values: values of the section that contains it.
        key: key of the name of the chosen entry.
        default: name without that key.
        registry: entries by name.
        alias: key under which the settings are stored.
    """
    if not isinstance(values, dict):
        return values
    name = values.get(key, default)
    entry = registry.get(name) if isinstance(name, str) else None
    if entry is None:  # the field's own validator reports it; a section can be checked only for a known entry
        return {other: value for other, value in values.items() if other not in registry}
    if entry.config is None:
        return values
    # A model with one field makes pydantic report the location as `NAME.key`, as in the recipe.
    holder = create_model("Holder", **{name: (entry.config, entry.config())})  # type: ignore[call-overload]
    given = {name: values[name]} if name in values else {}
    settings = getattr(holder.model_validate(given), name)
    return {**{other: value for other, value in values.items() if other != name}, alias: settings}
