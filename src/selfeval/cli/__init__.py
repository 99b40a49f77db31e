"""The command line: commands in `app`, errors as sentences and exit codes in `failures`, the closing table in `closing`."""

from __future__ import annotations

from selfeval.cli.app import app, main

__all__ = ["app", "main"]
