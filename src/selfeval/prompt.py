"""The prompt of a model: token ids and images, compared and hashed by content.

Prompts with equal content share a prefill, so their identity must include everything that the model reads: two prompts with
different images can have the same ids, because every image is represented by the same placeholder tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["GradePrompt", "Image", "Prompt"]


@dataclass(frozen=True, order=True)
class Image:
    """An image, identified by the hash of its encoded bytes.

    Attributes:
        data: the encoded image, for example the contents of a PNG file.
        sha256: hash of `data` in hex.

    Example:
        >>> Image(b"a") == Image(b"a"), Image(b"a") == Image(b"b")
        (True, False)
    """

    data: bytes = field(repr=False, compare=False)  # compared through its hash, which is computed once
    sha256: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sha256", hashlib.sha256(self.data).hexdigest())


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model reads it.

    Attributes:
        ids: token ids, including the placeholder tokens of the images.
        images: the images, in the order of their placeholders. Default: none.

    Example:
        >>> Prompt((5, 9)).followed_by([2])
        Prompt(ids=(5, 9, 2), images=())
    """

    ids: tuple[int, ...]
    images: tuple[Image, ...] = ()

    def followed_by(self, ids: Sequence[int]) -> Prompt:
        """Return a prompt with the same images and these tokens appended."""
        return Prompt((*self.ids, *ids), self.images)


@dataclass(frozen=True)
class GradePrompt(Prompt):
    """The prompt that evaluators read before a reply, for ensembles whose members read different prompts.

    Attributes:
        without_reference: the same prompt without the reference answer. Default: no member reads it.
    """

    without_reference: Prompt | None = None
