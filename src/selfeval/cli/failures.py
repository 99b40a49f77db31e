"""Errors as one sentence and an exit code."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer

from selfeval.errors import InputError, SelfEvalError, is_out_of_memory

__all__ = ["clear_errors"]


@contextmanager
def clear_errors(debug: bool) -> Iterator[None]:
    """Turns errors into one sentence and an exit code."""
    try:
        yield
    except KeyboardInterrupt:
        _stop(130, "\nInterrupted. Nothing is lost: give the same command again to go on.", debug)
    except InputError as error:
        _stop(2, f"Error: {error}", debug)
    except SelfEvalError as error:
        _stop(1, f"Error: {error} (this is a fault of selfeval; --debug shows where)", debug)
    except (OSError, MemoryError) as error:
        _stop(2, f"Error: {_system_error(error)}", debug)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        _stop(2, f"Error: {_system_error(MemoryError())}", debug)


def _stop(code: int, sentence: str, debug: bool) -> NoReturn:
    """Ends the command with one sentence, after the traceback if that was asked for; the exit code is the same."""
    if debug:
        traceback.print_exc()
    typer.echo(sentence, err=True)
    raise typer.Exit(code) from None


def _system_error(error: OSError | MemoryError) -> str:
    if isinstance(error, MemoryError):
        return (
            "out of memory where no smaller part helps (loading the model, or an optimizer step); finished work is kept. Free "
            "some memory and give the same command again, or use a smaller model, a lower precision or a lower lora.rank"
        )
    return f"{error.strerror or error} ({error.filename}). Nothing is lost: mend it and give the same command again"
