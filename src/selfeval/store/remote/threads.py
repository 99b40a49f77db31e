"""Calls in threads that neither Ctrl-C nor the end of the process waits for.

Python waits for the threads of a `ThreadPoolExecutor` before it exits. A call to a store that does not answer would then keep
an interrupted command for minutes.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TypeVar

from selfeval.errors import StorageError

__all__ = ["THREADS", "in_threads", "within"]

THREADS = 8
"""Objects that are fetched or uploaded at the same time."""

T = TypeVar("T")
R = TypeVar("R")


def in_threads(call: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Call a function with each item, up to `THREADS` at the same time, and return the results in order.

    After an error no further call begins, and it is raised when those in progress have ended. Ctrl-C waits for none.
    """
    waiting = deque(enumerate(items))
    results, errors = dict[int, R](), list[BaseException]()

    def work() -> None:
        with suppress(IndexError):  # nothing is waiting
            while not errors:
                number, item = waiting.popleft()
                try:
                    results[number] = call(item)
                except BaseException as error:
                    errors.append(error)

    threads = [
        threading.Thread(target=work, name=f"store-{number}", daemon=True) for number in range(min(THREADS, len(waiting)))
    ]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except BaseException as interruption:
        errors.append(interruption)
        raise
    if errors:
        raise errors[0]
    return [results[number] for number in sorted(results)]


def within(seconds: float, call: Callable[[], object]) -> bool:
    """Call a function, and wait for it for some seconds.

    Returns:
        Whether it succeeded in that time. It may still be in progress otherwise, or have raised a StorageError.
    """
    succeeded, ended = threading.Event(), threading.Event()

    def work() -> None:
        try:
            with suppress(StorageError):
                call()
                succeeded.set()
        finally:
            ended.set()

    threading.Thread(target=work, name="store-within", daemon=True).start()
    ended.wait(seconds)
    return succeeded.is_set()
