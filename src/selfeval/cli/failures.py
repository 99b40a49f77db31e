"""Errors as one sentence and an exit code.

2: invalid user input. It is raised as an `InputError` where it is detected, and its message says what to do.
1: anything else is a bug. The traceback is written to a file that the message names, for a bug report.
130: interrupted.
"""

from __future__ import annotations

import os
import platform
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from typing import Any, NoReturn

import click
import typer

from selfeval import __version__
from selfeval.errors import InputError, is_out_of_memory
from selfeval.texts import visible
from selfeval.versions import versions_note

__all__ = ["Command", "clear_errors", "end_signals", "refuse_broken_arguments"]

_LOG = "error.log"
_BROKEN_PIPE = 128 + signal.SIGPIPE


@dataclass
class Command:
    """A command that is running.

    Attributes:
        folder: Optional. Its run folder; the log of a bug is written there once the folder exists.
    """

    folder: Path | None = None


@contextmanager
def clear_errors(debug: bool, *, interrupted: str) -> Iterator[Command]:
    """Exit with one sentence and an exit code if the block raises.

    Args:
        debug: print the traceback first.
        interrupted: message after Ctrl-C or SIGTERM: the state of this command's work, and what to do.
    """
    command = Command()
    try:
        yield command
    # typer ends a command by these, and has messages and exit codes for them.
    except (typer.Exit, typer.Abort, click.ClickException):
        raise
    except KeyboardInterrupt:
        _leave_quietly_from_now_on()
        _stop(130, f"\nInterrupted. {interrupted}", debug)
    except InputError as error:
        _stop(2, f"Error: {error}", debug)
    except BrokenPipeError:
        _end_without_reader()
    except Exception as error:
        if is_out_of_memory(error):
            _stop(2, f"Error: {_NO_MEMORY}", debug)
        # An OSError without a number is raised by a library, not by the system, and is treated as a bug.
        if isinstance(error, OSError) and error.errno is not None:
            _stop(2, f"Error: {_system_error(error)}", debug)
        _stop(1, f"Error: {_our_fault(error, command.folder)}", debug)


def _stop(code: int, sentence: str, debug: bool) -> NoReturn:
    """Exit with one sentence, after the traceback if `debug` is set. The exit code does not depend on `debug`."""
    if code == 1 and (note := versions_note()):  # an untested dependency may be the cause
        sentence += f"\nNote: {note}"
    if debug:
        traceback.print_exc()
    with suppress(OSError):  # the terminal may be closed
        typer.echo(visible(sentence, keep="\n"), err=True)
    raise typer.Exit(code) from None


def end_signals() -> list[signal.Signals]:
    """Return the signals that end a command, apart from Ctrl-C. SIGHUP stays ignored under `nohup`; Windows has none."""
    hangup: signal.Signals | None = getattr(signal, "SIGHUP", None)
    if hangup is None or signal.getsignal(hangup) == signal.SIG_IGN:
        return [signal.SIGTERM]
    return [signal.SIGTERM, hangup]


def _leave_quietly_from_now_on() -> None:
    """Make a second Ctrl-C exit at once: nothing is left to clean up, and its traceback would hide the sentence."""
    for number in (signal.SIGINT, *end_signals()):
        signal.signal(number, lambda *_: os._exit(130))


def _end_without_reader() -> NoReturn:
    """Exit silently, as other tools do, when the reader of our output is gone (`selfeval show DIR | head`)."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # otherwise Python reports an error when it flushes at exit
    raise typer.Exit(_BROKEN_PIPE) from None


_NO_MEMORY = (
    "out of memory where smaller batches do not help (loading the model, or an optimizer step); finished work is kept. Free "
    "some memory and rerun the same command, or use a smaller model, a lower precision or a lower backbone.lora.rank"
)


def _system_error(error: OSError) -> str:
    where = "" if error.filename is None else f" ({error.filename})"
    return f"{error.strerror}{where}. Nothing is lost: fix this and rerun the same command"


# -- bugs ---------------------------------------------------------------------------------------------------------------


def _our_fault(error: Exception, folder: Path | None) -> str:
    lines = str(error).strip().splitlines()
    what = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    log = _write_log(error, folder)
    kept = "rerun with --debug to see the traceback" if log is None else f"the traceback is in {log}"
    address = _address()
    where = f"report it at {address}" if address else "report it to the developers"
    return f"{what}. This is a bug in selfeval, not in your input; {kept}. Please {where} with that traceback"


def _write_log(error: Exception, folder: Path | None) -> Path | None:
    """Write the traceback to the run folder, or else to a temporary file; return None if neither is writable."""
    text = f"{_facts()}\n\n{''.join(traceback.format_exception(error))}"
    try:
        if folder is not None and (folder / "run.json").is_file():
            path = folder / _LOG
            path.unlink(missing_ok=True)  # in a folder of unknown origin it may be a link to any file
        else:
            handle, name = tempfile.mkstemp(prefix="selfeval-error-", suffix=".log")
            os.close(handle)
            path = Path(name)
        path.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError:
        return None
    return path


def _facts() -> str:
    arguments = " ".join(["selfeval", *sys.argv[1:]])
    return f"selfeval {__version__}, Python {platform.python_version()}, {platform.platform()}\n{arguments}"


def _address() -> str | None:
    """Return the bug report address from the package metadata: its issue tracker, else its repository or home page."""
    try:
        found: Any = metadata("self-evaluator").get_all("Project-URL") or []
    except PackageNotFoundError:
        return None
    urls = {name.strip().lower(): url.strip() for name, _, url in (line.partition(",") for line in found)}
    wanted = ("issues", "bug tracker", "tracker", "repository", "source", "homepage")
    return next((urls[name] for name in wanted if name in urls), None)


# -- arguments ----------------------------------------------------------------------------------------------------------


def refuse_broken_arguments(arguments: list[str]) -> None:
    """Exit if an argument is not valid UTF-8, because neither run.json nor a message could hold it."""
    for number, argument in enumerate(arguments, start=1):
        try:
            argument.encode("utf-8")
        except UnicodeEncodeError:
            shown = argument.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
            typer.echo(
                f"Error: argument {number} is not valid UTF-8: {visible(shown)}; rename the file or correct the text", err=True
            )
            sys.exit(2)
