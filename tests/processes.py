"""The real command, and Python code, in separate processes.

Importing torch, transformers and PEFT takes about five seconds of CPU time. Processes are therefore forked from a server that
has imported them, unless a variable that libraries read while they are imported has another value than in the server.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Sequence
from functools import cache
from multiprocessing.context import BaseContext, ForkServerContext
from multiprocessing.forkserver import ensure_running
from pathlib import Path

__all__ = [
    "TIMEOUT",
    "Process",
    "context",
    "environment",
    "python",
    "python_anew",
    "script",
    "selfeval",
    "selfeval_on_a_full_disk",
    "start",
    "start_piped",
    "start_python",
]

TIMEOUT = 600
"""Seconds that a process may take."""

SRC = Path(__file__).resolve().parents[1] / "src"

PRELOADED = [
    "peft",
    "selfeval.cli.app",
    "selfeval.cli.scoring",
    "selfeval.stages.pipeline",
    "selfeval.stages.running",
    "preloaded",  # last: it freezes what the others imported
]

READ_ON_IMPORT = ("HF_", "HUGGINGFACE", "TRANSFORMERS_", "OMP_", "MKL_", "PYTHON", "CUDA_", "LD_", "TERM", "COLUMNS")
"""Beginnings of the names of those variables."""

SET_BY_THE_COMMAND = {"TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS"}
"""Set by `selfeval.cli.main`, also where a test calls it in this process, so they make no difference."""


def environment() -> dict[str, str]:
    """One thread (the same sums everywhere), no network, and the source tree under test."""
    paths = [str(SRC), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(paths), "COLUMNS": "200"}


AT_FIRST = environment()
"""As it was before any test changed a variable, so the first test to start a process makes no difference."""


class Process:
    """`python WORDS` as a forked process, with the part of the interface of `subprocess.Popen` that the tests use.

    Args:
        words: arguments of Python: `-m MODULE ...` or `-c CODE ...`.
        cwd: its working directory. Default: this process's.
        given: its standard input. Default: empty.
    """

    def __init__(self, words: Sequence[str], *, cwd: Path | None = None, given: str = "") -> None:
        self.args = [sys.executable, *words]
        # Files and not pipes: a process that writes more than a pipe holds would wait for a reader.
        self._folder = Path(tempfile.mkdtemp())
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        streams = [self._folder / name for name in ("in", "out", "err")]
        streams[0].write_text(given, "utf-8")
        target = (list(words), cwd or Path.cwd(), environment(), streams)
        self._process = _fork_server()[0].Process(target=_run_here, args=target)
        self._process.start()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def written(self, name: str = "out") -> str:
        """Return what the process has written so far to standard output (`out`) or standard error (`err`)."""
        path = self._folder / name
        return path.read_text("utf-8") if path.exists() else ""

    def send_signal(self, number: int) -> None:
        if self.returncode is None and self._process.pid is not None:
            os.kill(self._process.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float = TIMEOUT) -> tuple[str, str]:
        """Wait for the end; return what the process wrote to standard output and standard error."""
        self._process.join(timeout)
        if self.returncode is None:
            self.kill()
            raise subprocess.TimeoutExpired(self.args, timeout)
        out, err = ((self._folder / name).read_text("utf-8") for name in ("out", "err"))
        return out, err


def context() -> BaseContext:
    """Return a start method for workers that share no memory with this process and that need not import the libraries."""
    return _fork_server()[0] if sys.platform == "linux" else multiprocessing.get_context("spawn")


def start(arguments: Sequence[str]) -> Process | subprocess.Popen[str]:
    """Start the real command."""
    return _start(["-m", "selfeval", *arguments])


def start_python(code: str, *arguments: str) -> Process | subprocess.Popen[str]:
    """Start Python code."""
    return _start(["-c", code, *arguments])


def start_piped(*words: str) -> subprocess.Popen[str]:
    """Start `python WORDS` as a process of its own, which also runs what is registered with `atexit`."""
    return subprocess.Popen(
        [sys.executable, *words], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def selfeval(*arguments: str, given: str = "") -> subprocess.CompletedProcess[str]:
    """Run the real command to its end."""
    return _end(_start(["-m", "selfeval", *arguments], given=given), given)


ON_A_FULL_DISK = """
import resource, runpy, signal, sys

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
sys.argv = ["selfeval", *sys.argv[2:]]
runpy.run_module("selfeval", run_name="__main__", alter_sys=True)
"""


def selfeval_on_a_full_disk(largest_file: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the real command to its end; no file may grow beyond `largest_file` bytes, as on a disk that is full."""
    return python(ON_A_FULL_DISK, str(largest_file), *arguments)


def python(code: str, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run Python code to its end."""
    return _end(_start(["-c", code, *arguments], cwd=cwd))


WITHOUT_THE_PACKAGE = """
import sys

for name in [name for name in sys.modules if name.partition(".")[0] == "selfeval"]:
    del sys.modules[name]
exec(sys.argv.pop(1), {"__name__": "__main__"})
"""


def python_anew(code: str, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run Python code to its end, in a process that has imported the libraries and nothing of this package."""
    return python(WITHOUT_THE_PACKAGE, code, *arguments, cwd=cwd)


RUN_A_FILE = """
import runpy, sys
from pathlib import Path

sys.argv.pop(0)
sys.path.insert(0, str(Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def script(path: Path, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a file of Python code to its end, as `python PATH ARGUMENTS` does."""
    return python(RUN_A_FILE, str(path), *arguments, cwd=cwd)


def _start(words: Sequence[str], *, cwd: Path | None = None, given: str = "") -> Process | subprocess.Popen[str]:
    if sys.platform == "linux" and _read_on_import(environment()) == _fork_server()[1]:
        return Process(words, cwd=cwd, given=given)
    return subprocess.Popen(
        [sys.executable, *words],
        cwd=cwd,
        env=environment(),
        stdin=subprocess.PIPE if given else None,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _end(process: Process | subprocess.Popen[str], given: str = "") -> subprocess.CompletedProcess[str]:
    if isinstance(process, Process):
        out, err = process.communicate()
    else:
        out, err = process.communicate(given or None, timeout=TIMEOUT)
    assert process.returncode is not None
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def _read_on_import(variables: dict[str, str]) -> dict[str, str]:
    read = (name for name in variables if name.startswith(READ_ON_IMPORT) and name not in SET_BY_THE_COMMAND)
    return {name: variables[name] for name in read}


@cache
def _fork_server() -> tuple[ForkServerContext, dict[str, str]]:
    """Start the fork server; return its context and the variables that it imported with."""
    context, before = multiprocessing.get_context("forkserver"), dict(os.environ)
    context.set_forkserver_preload(PRELOADED)
    os.environ.clear()
    os.environ.update(AT_FIRST)
    # The server finds what it is to import on this path only; its processes have this one's.
    os.environ["PYTHONPATH"] = os.pathsep.join([AT_FIRST["PYTHONPATH"], str(Path(__file__).parent)])
    try:
        ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context, _read_on_import(AT_FIRST)


def _run_here(words: list[str], folder: Path, variables: dict[str, str], streams: list[Path]) -> None:
    """Do in this process what `python WORDS` does, with standard streams that are files."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    for number, path in enumerate(streams):
        with path.open("wb" if number else "rb") as file:
            os.dup2(file.fileno(), number)
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    kind, what, *arguments = words
    if kind == "-m":
        sys.argv = [what, *arguments]
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        sys.argv = ["-c", *arguments]
        exec(what, {"__name__": "__main__"})
