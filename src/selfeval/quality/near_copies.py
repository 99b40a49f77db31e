"""Near-copies among documents: what has to stay on one side of a split into text to train on and held-out text.

Two documents are near-copies if `quality.dedupe` finds them near-duplicates with their numbers read as words, as in versions of
a document. Only the chosen documents and their copies are indexed, so the memory grows with these, not with all documents.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

from selfeval.quality.dedupe import NearDuplicates

__all__ = ["copied", "copy_groups"]

_SIMILARITY = 0.8


def copy_groups(texts: Sequence[str], chosen: Sequence[int], keys: Sequence[Hashable] | None = None) -> list[list[int]]:
    """Return the groups of near-copies that contain chosen texts, in the order in which these were chosen.

    A group is closed: no text outside of it is a near-copy of one in it.

    Args:
        texts: all texts.
        chosen: indices of some of them.
        keys: Optional. A key of each text; texts with equal keys belong together as well. Default: none.

    Returns:
        Indices of each group, ascending.

    Example:
        >>> copy_groups(["one two three four", "five", "One, two, three, four!"], [2])
        [[0, 2]]
    """
    groups = _Groups(texts, keys or range(len(texts)))
    for number in chosen:
        groups.add(number)
    # A copy that is found may have copies that were compared before it was known.
    while sum(groups.add(number) for number in range(len(texts)) if groups.has_copy_of(number)):
        pass
    return groups.in_order()


def copied(texts: Sequence[str], others: Iterable[str]) -> set[int]:
    """Return the indices of the texts that have a near-copy among other texts.

    Example:
        >>> copied(["a b c d", "e f g h"], ["h", "A B C D"])
        {0}
    """
    index, found = NearDuplicates(_SIMILARITY, same_numbers=False), set[str]()
    for number, text in enumerate(texts):
        index.add(str(number), text)
    for other in others:
        found.update(index.find_all(other))
    # Of equal texts, only the first is in the index, under whose key `find` returns the others.
    return {number for number, text in enumerate(texts) if index.find(text) in found or str(number) in found}


class _Groups:
    """The groups so far.

    Args:
        texts: all texts.
        keys: a key of each text.
    """

    def __init__(self, texts: Sequence[str], keys: Sequence[Hashable]) -> None:
        self._texts, self._keys = texts, keys
        self._index = NearDuplicates(_SIMILARITY, same_numbers=False)
        self._group: dict[int, int] = {}
        self._with_key: dict[Hashable, int] = {}

    def has_copy_of(self, number: int) -> bool:
        """Return whether a text that is in no group belongs to one."""
        if number in self._group:
            return False
        return self._keys[number] in self._with_key or self._index.find(self._texts[number]) is not None

    def add(self, number: int) -> bool:
        """Add a text, and join the groups that it belongs to. False if it was added before."""
        if number in self._group:
            return False
        near = {self._group[int(key)] for key in self._index.find_all(self._texts[number])}
        if self._keys[number] in self._with_key:
            near.add(self._group[self._with_key[self._keys[number]]])
        target = min(near, default=len(self._group))
        if len(near) > 1:
            self._group = {text: target if group in near else group for text, group in self._group.items()}
        self._group[number] = target
        self._with_key.setdefault(self._keys[number], number)
        self._index.add(str(number), self._texts[number])
        return True

    def in_order(self) -> list[list[int]]:
        """Return the groups, those with the first chosen texts first."""
        found: dict[int, list[int]] = {}
        for number, group in self._group.items():
            found.setdefault(group, []).append(number)
        return [sorted(found[group]) for group in sorted(found)]
