"""The log of a run: notes, progress, warnings of libraries and tracebacks, with times, in `run.log` of the run folder."""

from __future__ import annotations

import logging
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from selfeval import __version__
from selfeval.store import as_storage_error
from selfeval.texts import visible

__all__ = ["LOG", "run_log"]

LOG = "run.log"
"""File in the run folder; `selfeval run --verbose` appends to it."""

_LOGGER = logging.getLogger("selfeval")
_OTHERS = ("transformers", "peft", "accelerate", "huggingface_hub", "torch")
"""Libraries that may not pass their records on to the root logger."""


class _Lines(logging.Formatter):
    """One line per record, in UTC; a traceback keeps its lines. No text can control the terminal of a reader."""

    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03dZ"

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")
        self.converter = time.gmtime

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record), keep="\n")


@contextmanager
def run_log(folder: Path) -> Iterator[Path]:
    """Append what happens in the block to the log of a run, and an error that ends it with its traceback.

    Args:
        folder: run folder, which exists.

    Yields:
        The file.

    Raises:
        StorageError: the file cannot be opened, or is a link.
    """
    path = folder / LOG
    try:
        handler = logging.StreamHandler(
            os.fdopen(os.open(path, _FLAGS, 0o666), "a", encoding="utf-8", errors="backslashreplace")
        )
    except OSError as error:
        raise as_storage_error(path, error) from error
    handler.setFormatter(_Lines())
    level, loggers = _LOGGER.level, [logging.getLogger(), *(logging.getLogger(name) for name in _OTHERS)]
    silent = [logger for logger in loggers if logger is logging.getLogger() or not logger.propagate]
    for logger in silent:
        logger.addHandler(handler)
    _LOGGER.setLevel(logging.DEBUG)
    logging.captureWarnings(True)
    try:
        _LOGGER.info("selfeval %s, Python %s, %s", __version__, platform.python_version(), platform.platform())
        yield path
    except BaseException as error:
        _LOGGER.error("ended by %s", type(error).__name__, exc_info=True)
        raise
    finally:
        logging.captureWarnings(False)
        _LOGGER.setLevel(level)
        for logger in silent:
            logger.removeHandler(handler)
        handler.stream.close()


_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
"""In a folder of unknown origin the file may be a link to any other."""
