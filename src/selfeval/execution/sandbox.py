"""Run programs that a model wrote, with their tests, in confined processes.

Each program has a separate process: a bare interpreter without site packages, environment variables, standard streams or open
files, in an empty working directory. The process confines itself before it executes the program
(`selfeval.execution.confinement`), and its whole session is killed at the end.

The sandbox protects the machine from the program. It does not protect the tests from it: both run in one interpreter, so a
program written to deceive the tests can do so, for example by returning objects that are equal to everything, or by searching
the interpreter's frames and descriptors for those of the harness. Ending the process early, printing, and replacing builtins do
not help it.
"""

from __future__ import annotations

import json
import os
import platform
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from selfeval.errors import ConfigError
from selfeval.execution.harness import HEADER, PROOF
from selfeval.execution.system_calls import ARCHITECTURES

__all__ = ["LIMITS", "Limits", "Outcome", "Program", "Reason", "check_sandbox", "run_program", "run_programs"]

Reason = Literal["passed", "failed", "error", "syntax", "timeout", "memory", "exit", "crash", "no code"]

_SOURCES = str(Path(__file__).parents[2])
_START = "import sys; sys.path.append(sys.argv[1]); from selfeval.execution.harness import main; main()"
# No -I, which would ignore the hash seed as well; the other variables that it ignores are not in the environment.
_COMMAND = (sys.executable, "-P", "-s", "-S", "-B", "-X", "utf8", "-c", _START, _SOURCES)
_ENVIRONMENT = {"PYTHONHASHSEED": "0"}
"""A fixed order of sets, so that a reply is right or wrong in every run."""

_LONGEST_REPORT = 4096
_MOST_WORKERS = 8


@dataclass(frozen=True)
class Limits:
    """Limits of one program.

    Attributes:
        cpu_seconds: CPU time.
        seconds: wall-clock time, including the start of the process. Above the CPU time, as the machine may be busy.
        memory_bytes: address space.
    """

    cpu_seconds: int = 5
    seconds: float = 20.0
    memory_bytes: int = 512 << 20


LIMITS = Limits()


@dataclass(frozen=True)
class Program:
    """A program with its tests. All parts are executed in one module, in this order.

    Attributes:
        preamble: code before the program, such as imports.
        programs: forms of the program, such as its text with another indentation; the first that compiles is used.
        setup: code between the program and the tests.
        tests: the tests; one fails if it raises anything.
    """

    programs: tuple[str, ...]
    tests: tuple[str, ...]
    preamble: str = ""
    setup: str = ""


@dataclass(frozen=True)
class Outcome:
    """Result of a program.

    Attributes:
        reason: `passed`; `failed` (an assertion), `error` (any other exception), `syntax`, `timeout`, `memory`, `exit` (the
            process ended before the last test), `crash` (by a signal) or `no code` (nothing was run).
        detail: message of the exception, as the program reported it, or a description.
    """

    reason: Reason
    detail: str = ""

    @property
    def passed(self) -> bool:
        return self.reason == "passed"


def run_programs(programs: Sequence[Program], limits: Limits = LIMITS) -> list[Outcome]:
    """Run programs side by side, one per core and at most eight at a time.

    Args:
        programs: the programs.
        limits: limits of each.

    Raises:
        ConfigError: this system has no sandbox.
    """
    workers = min(_MOST_WORKERS, len(os.sched_getaffinity(0))) if sys.platform == "linux" else 1
    with ThreadPoolExecutor(max_workers=workers, thread_name_prefix="sandbox") as pool:
        return list(pool.map(lambda program: run_program(program, limits), programs))


def run_program(program: Program, limits: Limits = LIMITS) -> Outcome:
    """Run a program in a confined process.

    Args:
        program: the program.
        limits: its limits.

    Raises:
        ConfigError: this system has no sandbox.
    """
    with tempfile.TemporaryDirectory(prefix="selfeval-sandbox-") as folder:
        return _run_in(folder, program, limits)


def _run_in(folder: str, program: Program, limits: Limits) -> Outcome:
    """Run a program in a working directory, which it can read."""
    if sys.platform != "linux" or platform.machine() not in ARCHITECTURES:
        raise _unavailable(
            f"this is {platform.system() or 'an unknown system'} on {platform.machine() or 'an unknown machine'}"
        )
    # Of hexadecimal digits, so that a report is text.
    proof = secrets.token_hex(PROOF // 2).encode()
    code, report, is_late = _run_process(_message(program, limits) + proof, folder, limits.seconds)
    return _outcome(code, report, proof, is_late=is_late)


def _message(program: Program, limits: Limits) -> bytes:
    job = {
        "programs": program.programs,
        "tests": program.tests,
        "preamble": program.preamble,
        "setup": program.setup,
        "cpu_seconds": limits.cpu_seconds,
        "memory_bytes": limits.memory_bytes,
        "parent": os.getpid(),
    }
    data = json.dumps(job).encode()
    return f"{len(data):0{HEADER}x}".encode() + data


def _run_process(message: bytes, folder: str, seconds: float) -> tuple[int, bytes, bool]:
    """Return the exit code, the report, and whether the process was killed because it was late."""
    process = subprocess.Popen(
        _COMMAND,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=folder,
        env=_ENVIRONMENT,
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    late = threading.Event()

    def stop() -> None:
        late.set()
        _kill(process.pid)

    timer = threading.Timer(seconds, stop)
    timer.start()
    try:
        with process.stdin, process.stdout:
            _send(process.stdin, message)
            report = process.stdout.read(_LONGEST_REPORT)
    finally:
        # Before the process is reaped, after which its id may belong to another.
        timer.cancel()
        timer.join()
        _kill(process.pid)
        code = process.wait()
    return code, report, late.is_set()


def _send(stream: IO[bytes], message: bytes) -> None:
    # The process may have ended, which the report will show.
    with suppress(BrokenPipeError):
        stream.write(message)
        stream.flush()


def _kill(session: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(session, signal.SIGKILL)


def _outcome(code: int, report: bytes, proof: bytes, *, is_late: bool) -> Outcome:
    kind, _, detail = report.partition(b" ")
    text = detail.decode("utf-8", "replace")
    if kind == b"unavailable":
        raise _unavailable(text)
    if kind == b"passed" and detail == proof:
        return Outcome("passed")
    if is_late:
        return Outcome("timeout", "the wall-clock limit was reached")
    if kind in (b"failed", b"error", b"syntax", b"memory"):
        return Outcome(kind.decode(), text)  # type: ignore[arg-type]
    if code == -signal.SIGXCPU:
        return Outcome("timeout", "the limit of CPU time was reached")
    if code < 0:
        return Outcome("crash", f"signal {-code}")
    return Outcome("exit", "the process ended before the last test")


# -- the check at the start ---------------------------------------------------------------------------------------------


def check_sandbox() -> None:
    """Run a program that tries to leave the sandbox.

    Raises:
        ConfigError: this system has no sandbox, or it does not hold.
    """
    with (
        tempfile.NamedTemporaryFile(prefix="selfeval-secret-") as secret,
        tempfile.TemporaryDirectory(prefix="selfeval-sandbox-") as folder,
    ):
        # The program can read this file, like those of Python's library.
        Path(folder, "readable").write_text("kept", encoding="utf-8")
        outcome = _run_in(folder, _attempts(secret.name), LIMITS)
    if not outcome.passed:
        raise _unavailable(f"the sandbox failed its check ({outcome.reason}: {outcome.detail})")


def _attempts(secret: str) -> Program:
    setup = f"""
import os, socket, threading

def is_refused(action):
    try:
        action()
    except (OSError, RuntimeError):
        return True
    return False

secret = {secret!r}
"""
    attempts = {
        "open a socket": "socket.socket()",
        "read a file": "open(secret)",
        "write a file": "open(secret, 'w')",
        "empty a file": "os.open('readable', os.O_RDONLY | os.O_TRUNC)",
        "create a file": "open('file', 'w')",
        "remove a file": "os.remove(secret)",
        "start a process": "os.fork()",
        "execute a file": "os.execv('/bin/true', ['true'])",
        "start a thread": "threading.Thread(target=int).start()",
        "send a signal": "os.kill(os.getppid(), 0)",
    }
    tests = (f"assert is_refused(lambda: {code}), 'a program can {what}'" for what, code in attempts.items())
    return Program((setup,), tuple(tests))


def _unavailable(reason: str) -> ConfigError:
    return ConfigError(
        f"code cannot be run in a sandbox here: {reason}. It needs Linux 5.13 or newer with Landlock and seccomp, on x86-64 or "
        "arm64 (docs/guides/your-own-data.md, Code). Use a file of answers or labels, or run on such a system"
    )
