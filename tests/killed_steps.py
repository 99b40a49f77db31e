"""Kill a function before any one of its changes on disk: renames, removed files and removed folders."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import Any

import pytest

__all__ = ["Killed", "killed_at"]


class Killed(BaseException):
    """Stands for a kill: no handler of the code under test catches it as an error."""


def killed_at(step: int, act: Callable[[], object]) -> bool:
    """Call a function whose process is killed at one of its steps, counted from 1, and return whether it was.

    After the kill nothing on disk changes any more, so handlers that would clean up do nothing, as after SIGKILL.
    """
    steps = 0

    def dying(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps >= step:
                raise Killed
            return original(*arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((os, "replace"), (os, "unlink"), (os, "rmdir"), (os, "mkdir"), (shutil, "rmtree")):
            patch.setattr(module, name, dying(getattr(module, name)))
        try:
            act()
        except Killed:
            return True
    return False
