"""Make `python -m selfeval` run the command `selfeval`."""

from __future__ import annotations

from selfeval.cli import main

__all__: list[str] = []

if __name__ == "__main__":
    main()
