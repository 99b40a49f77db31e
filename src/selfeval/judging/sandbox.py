"""The environment that renders prompt templates, which may come from an untrusted folder.

jinja2's sandbox keeps a template away from Python's internals, but does not limit memory or time: `'x' * 10**10` is one
operation, and three nested loops over 10**5 numbers never end. The results of `*` and `**`, and the ranges that loops iterate
over, are limited here.
"""

from __future__ import annotations

from typing import Any

from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

__all__ = ["PromptEnvironment"]

_LARGEST_RESULT, _LARGEST_NUMBER, _MOST_STEPS = 1 << 20, 1 << 64, 100_000


class PromptEnvironment(ImmutableSandboxedEnvironment):
    """A sandbox with limits on the size of a result and on the steps of loops over numbers.

    Raises:
        SecurityError: while rendering, a limit is exceeded.
    """

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Refuse products and powers that are too large, before computing them."""
        if operator == "**":
            if not (isinstance(left, int | float) and isinstance(right, int | float) and abs(right) <= 64 and abs(left) <= 1e6):
                raise SecurityError("a template may only raise numbers up to 1,000,000 to powers up to 64")
        elif sizes := [len(value) for value in (left, right) if hasattr(value, "__len__")]:
            # A sequence times an integer is a repetition; two sequences are left to Python's own TypeError.
            times = next((value for value in (left, right) if isinstance(value, int)), 0)
            if sizes[0] * times > _LARGEST_RESULT:
                raise SecurityError(f"a template may repeat a string or list to {_LARGEST_RESULT:,} items at most")
        elif any(isinstance(value, int) and abs(value) > _LARGEST_NUMBER for value in (left, right)):
            raise SecurityError("a template multiplies numbers that are too large")
        return super().call_binop(context, operator, left, right)

    def limited_range(self) -> Any:
        """Return a `range` for one rendering, limited in the total length of all its calls."""
        # One counter for all calls of a rendering, because nested loops multiply.
        left = _MOST_STEPS

        def limited(*bounds: int) -> range:
            nonlocal left
            numbers = range(*bounds)
            left -= len(numbers)
            if left < 0:
                raise SecurityError(f"a template may loop over {_MOST_STEPS:,} numbers in total at most")
            return numbers

        return limited
