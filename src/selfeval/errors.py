"""Every error that this package raises on purpose.

SelfEvalError
├── InputError              what the user gave; exit code 2, one sentence, no traceback
│   ├── ConfigError         a recipe or a --set key or value
│   ├── SeedsError          the seeds file
│   ├── DataError           a file of questions, replies, pairs or gold answers
│   ├── TextError           the text to tune on
│   ├── ModelError          the model folder or hub id
│   ├── RunFolderError      the output folder: not a run, in use, or damaged
│   │   └── LostWorkError   a stage cannot resume from what is left of its work; --restart runs it from its start
│   ├── StorageError        the disk is full or not writable
│   ├── MemoryLimitError    one sequence alone is more than the memory, or the memory budget, holds
│   ├── LoopError           the loop cannot go on with what its stages produced (for example: no pair survived judging)
│   │   └── NotFiniteError  a number of training is NaN or infinite
│   ├── ExportError         a role cannot be exported as asked: no such role, a folder in the way, no such kind of model
│   └── MissingPackageError an optional dependency is not installed; also an ImportError
└── RoleError               our own misuse of roles on the backbone; exit code 1

A message says what was got, what is allowed, and what to do.
"""

from __future__ import annotations

__all__ = [
    "ConfigError",
    "DataError",
    "ExportError",
    "InputError",
    "LoopError",
    "LostWorkError",
    "MemoryLimitError",
    "MissingPackageError",
    "ModelError",
    "NotFiniteError",
    "RoleError",
    "RunFolderError",
    "SeedsError",
    "SelfEvalError",
    "StorageError",
    "TextError",
    "is_out_of_memory",
]


class SelfEvalError(Exception):
    """Base of all errors of this package."""


class InputError(SelfEvalError):
    """Something the user gave cannot be used."""


class ConfigError(InputError):
    """A recipe or a `--set` value is wrong."""


class SeedsError(InputError):
    """The seeds file is empty, malformed or unreadable."""


class DataError(InputError):
    """A file of questions, replies, pairs or gold answers is missing or malformed, or does not fit the run."""


class TextError(InputError):
    """The text to tune on is missing, malformed or too short for the model's rows."""


class ModelError(InputError):
    """The model cannot be loaded or cannot be used as a causal language model."""


class RunFolderError(InputError):
    """The output folder is not a run, is used by another process, or is damaged."""


class LostWorkError(RunFolderError):
    """A stage cannot resume, because a file of its work is missing or damaged; `--restart` runs it from its start."""


class StorageError(InputError):
    """The disk is full or cannot be written."""


class MemoryLimitError(InputError):
    """The smallest piece of work does not fit in the memory that there is."""


class LoopError(InputError):
    """The loop cannot go on with what its own stages produced."""


class NotFiniteError(LoopError):
    """A number of training is NaN or infinite; the message names the tensor."""


class ExportError(InputError):
    """A role cannot be exported as it was asked for."""


class MissingPackageError(InputError, ImportError):
    """An optional dependency is not installed.

    Args:
        work: what needs it.
        package: its name, which is also that of the extra of this package.
    """

    def __init__(self, work: str, package: str) -> None:
        super().__init__(f"{work} needs the package {package}; install it: pip install 'self-evaluator[{package}]'")


class RoleError(SelfEvalError):
    """A role was used in a way that could measure or train the wrong weights."""


_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc", "ALLOC_FAILED")
"""What torch's CPU allocator, CUDA, C++ and cuBLAS write into a plain RuntimeError when there is no memory."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was no memory: Python's MemoryError, torch's own error on a GPU, or one of those it takes from below.

    Names and texts tell them, so that torch need not be imported.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)
