"""Calls to a remote store: repeated with back-off while the fault may pass, and turned into one sentence when it does not."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from selfeval.errors import StorageError

__all__ = ["PATIENCE", "is_refusal", "reach", "without_secrets"]

PATIENCE = 300.0
"""Seconds during which a failing call is repeated."""

_LIBRARIES = ("aiobotocore", "aiohttp", "azure", "botocore", "fsspec", "gcsfs", "google", "requests", "s3fs", "urllib3")
"""Packages that raise errors of their own about the network."""
_FINAL = (PermissionError, FileNotFoundError, NotADirectoryError, IsADirectoryError)
_SECRET_NAMES = ("KEY", "SECRET", "TOKEN", "PASSWORD", "CREDENTIAL")
_FIRST, _LONGEST = 0.5, 30.0
_LONGEST_REASON = 300

R = TypeVar("R")


def reach(
    call: Callable[[], R],
    url: str,
    work: str,
    *,
    patience: float = PATIENCE,
    advice: str = "",
    hurry: threading.Event | None = None,
) -> R:
    """Call a remote store until it answers.

    The waits double from half a second to half a minute, each with a random part, so many machines do not return at once.

    Args:
        call: the call, which can be repeated.
        url: URL of the run.
        work: the work, such as `read the index`, for the error message.
        patience: seconds after which a failing call is given up. Default: `PATIENCE`.
        advice: Optional. What to do, for the error message.
        hurry: Optional. Once it is set, a failing call is given up at once.

    Raises:
        StorageError: the store refuses, or has not answered for `patience` seconds.
    """
    until, wait, hurry = time.monotonic() + patience, _FIRST, hurry or threading.Event()
    while True:
        try:
            return call()
        except Exception as error:
            if not _is_remote(error):
                raise
            pause = wait * random.uniform(0.5, 1.0)
            if _is_final(error) or hurry.is_set() or time.monotonic() + pause > until:
                raise StorageError(f"cannot {work} at {url}: {_reason(error)}; {advice or _ADVICE}") from error
        hurry.wait(pause)
        wait = min(2 * wait, _LONGEST)


_ADVICE = "check the URL, the credentials and the network, and rerun the same command"


def is_refusal(error: StorageError) -> bool:
    """Return whether the store has answered and refused, for example because the credentials have expired."""
    return isinstance(error.__cause__, Exception) and _is_final(error.__cause__)


def _is_remote(error: Exception) -> bool:
    return isinstance(error, OSError | TimeoutError) or type(error).__module__.partition(".")[0] in _LIBRARIES


def _is_final(error: Exception) -> bool:
    """Return whether repeating the call cannot help."""
    return isinstance(error, _FINAL) or "Credential" in type(error).__name__


def _reason(error: Exception) -> str:
    text = " ".join(without_secrets(str(error)).split())
    return f"{type(error).__name__}: {text}"[:_LONGEST_REASON]


def without_secrets(text: str) -> str:
    """Remove the values of environment variables that hold credentials from a text that a library wrote."""
    for name, value in os.environ.items():
        if len(value) > 7 and any(part in name.upper() for part in _SECRET_NAMES):
            text = text.replace(value, f"[{name}]")
    return text
