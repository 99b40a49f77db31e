"""Quiet libraries: their own messages would hide those of a command."""

from __future__ import annotations

import logging

import typer

from selfeval.versions import versions_note

__all__ = ["quiet_libraries"]


def quiet_libraries() -> None:
    """Silence the libraries' own messages, and print a note if a dependency's version is untested."""
    if note := versions_note():
        typer.echo(f"Note: {note}", err=True)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns about kernels that it would download
    import transformers

    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
