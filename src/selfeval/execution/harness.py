"""The process that runs a program and its tests: `main` is called by a bare interpreter and does not return.

It reads a job from standard input, confines itself, executes the program and the tests in one module, and writes a report to
standard output. Both streams are replaced before the program runs, so it cannot write a report by printing. A report of success
ends in the proof, which follows the job in the pipe and is read only after the last test.

Standard library only. The program shares this interpreter: see `selfeval.execution.sandbox` on what that means.
"""

from __future__ import annotations

import builtins
import json
import os
import sys
import types
from collections.abc import Mapping
from typing import Any, NoReturn

__all__ = ["HEADER", "PROOF", "main"]

HEADER, PROOF = 16, 32
"""Bytes of the job's length in hexadecimal digits, and of the proof."""

_NAME = "program"
_LONGEST = 1000


def main() -> NoReturn:
    """Run the job on standard input, and exit."""
    from selfeval.execution.confinement import confine  # not on Windows, where the constants of this module are imported

    inbox, outbox = _take_streams()
    job = json.loads(_read(inbox, int(_read(inbox, HEADER), 16)))
    # The program may replace the functions of these modules.
    read, write, leave = os.read, os.write, os._exit
    if os.getppid() != job["parent"]:  # it died before this process could ask to die with it
        leave(1)
    try:
        confine(cpu_seconds=job["cpu_seconds"], memory_bytes=job["memory_bytes"])
    except OSError as error:
        write(outbox, b"unavailable " + str(error.strerror).encode("utf-8", "replace"))
        leave(1)
    _forget_package()
    report = _run(job)
    write(outbox, b"passed " + read(inbox, PROOF) if report is None else report)
    leave(0)


def _take_streams() -> tuple[int, int]:
    """Move standard input and output to other descriptors, and replace them by /dev/null."""
    inbox, outbox = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    os.close(nothing)
    return inbox, outbox


def _read(descriptor: int, length: int) -> bytes:
    data = b""
    while len(data) < length:
        piece = os.read(descriptor, length - len(data))
        if not piece:
            os._exit(1)  # the parent is gone
        data += piece
    return data


def _forget_package() -> None:
    """Make this package as absent as any other that is not of the standard library."""
    sys.path.pop()
    for name in [name for name in sys.modules if name.partition(".")[0] == "selfeval"]:
        del sys.modules[name]


def _run(job: Mapping[str, Any]) -> bytes | None:
    """Execute the program and its tests. Return a report of the failure; None if all tests passed."""
    # Tests see the builtins as they are now, whatever the program assigns to that module.
    original = dict(vars(builtins))
    module = types.ModuleType(_NAME)
    sys.modules[_NAME] = module  # dataclasses and pickle look it up there
    namespace = vars(module)
    try:
        program = _compiled(job["programs"])
    except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError) as error:
        return _failure("syntax", error)
    try:
        for part in (job["preamble"], program, job["setup"]):
            exec(part, namespace)
        for test in job["tests"]:
            namespace["__builtins__"] = original
            exec(compile(test, "<test>", "exec", dont_inherit=True), namespace)
    except MemoryError as error:
        return _failure("memory", error)
    except AssertionError as error:
        return _failure("failed", error)
    except BaseException as error:  # SystemExit as well: a test that did not end has not passed
        return _failure("error", error)
    return None


def _compiled(programs: list[str]) -> types.CodeType:
    """Return the first program that compiles.

    Raises:
        SyntaxError: none does; the error of the first.
    """
    first: Exception | None = None
    for text in programs:
        try:
            return compile(text, f"<{_NAME}>", "exec", dont_inherit=True)
        except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError) as error:
            first = first or error
    raise first or SyntaxError("no program")


def _failure(reason: str, error: BaseException) -> bytes:
    try:
        shown = f"{type(error).__name__}: {error}"[:_LONGEST]
    except BaseException:  # __str__ of the program's own exception
        shown = type(error).__name__
    return f"{reason} {shown}".encode("utf-8", "backslashreplace")
