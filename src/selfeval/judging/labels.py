"""The words of a verdict, and the tokens that distinguish them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from selfeval.errors import ModelError

if TYPE_CHECKING:
    from selfeval.judging.templates import Templates

__all__ = ["Labels", "VerdictTokens", "in_order", "verdict_tokens"]

TokenIds = tuple[int, ...]


class Labels(BaseModel):
    """The words of a verdict: the text before it, and one text per label that the kind of template declares (`in_order`)."""

    model_config = ConfigDict(frozen=True, extra="allow")
    __pydantic_extra__: dict[str, str]

    lead: str = ""

    @property
    def all(self) -> tuple[str, ...]:
        """The texts of the labels, in the order in which they are declared."""
        return tuple(self.__pydantic_extra__.values())


def in_order(kind: str, table: Any, names: Sequence[str]) -> Any:
    """Return a table of labels in the declared order, in which readings list their probabilities; anything else unchanged.

    Args:
        kind: kind of template that the table belongs to, for the message.
        table: the table in templates.toml.
        names: names of the labels that the kind declares.

    Raises:
        ValueError: a label is missing or not declared.
    """
    if not isinstance(table, dict):
        return table  # refused later, with its key
    missing, unknown = [name for name in names if name not in table], sorted(table.keys() - {"lead", *names})
    if missing or unknown:
        problem = f"lacks {', '.join(missing)}" if missing else f"has unknown labels: {', '.join(unknown)}"
        raise ValueError(f"[{kind}] {problem}; set {', '.join(names)}, and optionally lead")
    return {name: table[name] for name in ("lead", *names) if name in table}


@dataclass(frozen=True)
class VerdictTokens:
    """Token sequences of the verdicts. Many tokenizers split a label into several tokens: " 1" into " " and "1".

    Attributes:
        lead: tokens of the lead, and of any prefix that all labels share.
        paths: per label, in order, the tokens that follow, up to the first that no other label shares.
    """

    lead: tuple[int, ...]
    paths: tuple[TokenIds, ...]

    @property
    def all(self) -> tuple[int, ...]:
        """All tokens of the paths."""
        return tuple(sorted({token for path in self.paths for token in path}))

    @property
    def longest(self) -> int:
        """Length of the longest path in tokens."""
        return max(len(path) for path in self.paths)

    @property
    def forks(self) -> tuple[TokenIds, ...]:
        """Prefixes of paths after which probabilities are read; the empty one comes first."""
        return tuple(dict.fromkeys(path[:k] for k in range(self.longest) for path in self.paths if k < len(path)))


def verdict_tokens(templates: Templates, labels: Labels) -> VerdictTokens:
    """Return this tokenizer's encoding of the verdicts: a shared prefix, then the tokens in which they differ.

    Raises:
        ModelError: one label is a prefix of another, so they cannot be distinguished.
    """
    encoded = [tuple(templates.tokenizer.encode(labels.lead + label, add_special_tokens=False)) for label in labels.all]
    shared = _common(encoded)
    rests = [e[shared:] for e in encoded]
    # Up to and including the token at which the label differs from both others.
    lengths = [1 + max(_common([rest, other]) for other in rests[:i] + rests[i + 1 :]) for i, rest in enumerate(rests)]
    # A label that ends before it differs is a prefix of another one.
    if any(length > len(rest) for length, rest in zip(lengths, rests, strict=True)):
        shown = ", ".join(f'"{label}"' for label in labels.all)
        raise ModelError(f"this tokenizer cannot distinguish the verdict labels {shown}; set others in templates.toml")
    return VerdictTokens(encoded[0][:shared], tuple(rest[:length] for rest, length in zip(rests, lengths, strict=True)))


def _common(sequences: Sequence[TokenIds]) -> int:
    """Return the length of the longest common prefix."""
    columns = zip(*sequences, strict=False)
    return next((i for i, column in enumerate(columns) if len(set(column)) > 1), min(map(len, sequences)))
