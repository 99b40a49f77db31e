"""The words of a verdict, and the tokens that distinguish them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from selfeval.errors import ModelError

if TYPE_CHECKING:
    from selfeval.judging.templates import Templates

__all__ = ["Labels", "VerdictTokens", "verdict_tokens"]

TokenIds = tuple[int, ...]


class Labels(BaseModel):
    """The words of a verdict."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    lead: str = ""
    first: str
    second: str
    tie: str

    @property
    def all(self) -> tuple[str, str, str]:
        return self.first, self.second, self.tie


@dataclass(frozen=True)
class VerdictTokens:
    """Token sequences of the three verdicts. Many tokenizers split a label into several tokens: " 1" into " " and "1".

    Attributes:
        lead: tokens of the lead, and of any prefix that all labels share.
        paths: per label (first, second, neither), the tokens that follow, up to the first that no other label shares.
    """

    lead: tuple[int, ...]
    paths: tuple[TokenIds, TokenIds, TokenIds]

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
    """Return this tokenizer's encoding of the three verdicts: a shared prefix, then the tokens in which they differ.

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
    first, second, tie = (rest[:length] for rest, length in zip(rests, lengths, strict=True))
    return VerdictTokens(encoded[0][:shared], (first, second, tie))


def _common(sequences: Sequence[TokenIds]) -> int:
    """Return the length of the longest common prefix."""
    columns = zip(*sequences, strict=False)
    return next((i for i, column in enumerate(columns) if len(set(column)) > 1), min(map(len, sequences)))
