"""Every error that this package raises on purpose.

SelfEvalError
├── InputError              what the user gave; exit code 2, one sentence, no traceback
│   ├── ConfigError         a recipe or a --set key or value
│   ├── SeedsError          the seeds file
│   ├── ModelError          the model folder or hub id
│   ├── RunFolderError      the output folder: not a run, in use, or damaged
│   ├── StorageError        the disk is full or not writable
│   ├── LoopError           the loop cannot go on with what its stages produced (for example: no pair survived judging)
│   └── ExportError         a role cannot be exported as asked: no such role, a folder in the way, no such kind of model
└── RoleError               our own misuse of roles on the backbone; exit code 1

A message says what was got, what is allowed, and what to do.
"""

from __future__ import annotations

__all__ = [
    "ConfigError",
    "ExportError",
    "InputError",
    "LoopError",
    "ModelError",
    "RoleError",
    "RunFolderError",
    "SeedsError",
    "SelfEvalError",
    "StorageError",
]


class SelfEvalError(Exception):
    """Base of all errors of this package."""


class InputError(SelfEvalError):
    """Something the user gave cannot be used."""


class ConfigError(InputError):
    """A recipe or a `--set` value is wrong."""


class SeedsError(InputError):
    """The seeds file is empty, malformed or unreadable."""


class ModelError(InputError):
    """The model cannot be loaded or cannot be used as a causal language model."""


class RunFolderError(InputError):
    """The output folder is not a run, is used by another process, or is damaged."""


class StorageError(InputError):
    """The disk is full or cannot be written."""


class LoopError(InputError):
    """The loop cannot go on with what its own stages produced."""


class ExportError(InputError):
    """A role cannot be exported as it was asked for."""


class RoleError(SelfEvalError):
    """A role was used in a way that could measure or train the wrong weights."""
