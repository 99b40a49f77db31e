"""The token limit of replies: the setting, or with `replies.max_new_tokens = "auto"` the limit that the run decided.

The stage replies decides it once, from the first shard of round 1, and writes it to `replies/limit.json`. Everything that
samples replies afterwards reads it there: the other shards, policy training, evaluation, later rounds and exports.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from selfeval.config import RepliesConfig
from selfeval.errors import RunFolderError
from selfeval.store import read_object

__all__ = ["LIMIT_FILE", "ReplyLimit", "decide_limit", "read_limit", "reply_limit"]

LIMIT_FILE = "replies/limit.json"
"""File in the folder of a round, only with `replies.max_new_tokens = "auto"`."""

_QUANTILE = 0.95
_STEP = 16
"""Limits are multiples of this, except the cap itself."""
_FEWEST, _SHARE = 20, 0.5
"""Minimum number of finished replies, and their minimum share, from which a limit is decided."""


@dataclass(frozen=True)
class ReplyLimit:
    """A limit that was decided.

    Attributes:
        tokens: the limit.
        cap: limit of the replies from which it was decided.
        replies: number of these replies.
        finished: number of those that ended before the cap.
    """

    tokens: int
    cap: int
    replies: int
    finished: int

    @property
    def sentence(self) -> str:
        """Describe the decision for the user."""
        if self.tokens < self.cap:
            return (
                f"{self.tokens} tokens, enough for {_QUANTILE:.0%} of the {self.finished} finished replies of the first shard"
            )
        too_few = _too_few(self.finished, self.replies)
        why = "too few ended before it to decide another limit" if too_few else f"{_QUANTILE:.0%} of them need nearly as many"
        return f"{self.tokens} tokens, the cap: {self.finished} of {self.replies} replies of the first shard ended, {why}"


def _too_few(finished: int, replies: int) -> bool:
    return finished < _FEWEST or finished < _SHARE * replies


def decide_limit(finished: Sequence[int], replies: int, cap: int) -> ReplyLimit:
    """Decide a limit: the 95% quantile of the lengths of finished replies, rounded up to a multiple of 16, at most the cap.

    Replies that reach the cap have no known length. If they are the majority, or if fewer than 20 replies are finished, the
    limit is the cap.

    Args:
        finished: lengths of the finished replies in tokens, including the end-of-sequence token.
        replies: number of all replies.
        cap: their limit.

    Example:
        >>> decide_limit([*range(1, 101)], 100, 512).tokens
        96
    """
    if _too_few(len(finished), replies):
        return ReplyLimit(cap, cap, replies, len(finished))
    # Nearest rank: the shortest length that at least 95% of the replies do not exceed.
    quantile = sorted(finished)[math.ceil(_QUANTILE * len(finished)) - 1]
    return ReplyLimit(min(cap, math.ceil(quantile / _STEP) * _STEP), cap, replies, len(finished))


def read_limit(root: Path) -> ReplyLimit:
    """Return the limit that a round uses.

    Args:
        root: folder of the round.

    Raises:
        RunFolderError: the stage replies has not decided it yet, or the file is damaged.
    """
    path = root / LIMIT_FILE
    if not path.is_file():
        raise RunFolderError(
            f'{root} has no token limit yet: replies.max_new_tokens is "auto", and the stage replies decides it; '
            "`selfeval run` runs it"
        )
    names = ("tokens", "cap", "replies", "finished")
    values = read_object(path, *names)
    numbers = [values[name] for name in names]
    if any(type(number) is not int or number < 0 for number in numbers) or not numbers[0]:
        raise RunFolderError(f"{path} is damaged: expected whole numbers {', '.join(names)}; remove it and rerun the command")
    return ReplyLimit(*numbers)


def reply_limit(config: RepliesConfig, root: Path) -> int:
    """Return the token limit of the replies of a round; see `read_limit`."""
    return read_limit(root).tokens if config.max_new_tokens == "auto" else config.max_new_tokens
