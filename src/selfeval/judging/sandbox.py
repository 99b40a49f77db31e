"""The environment that renders prompt templates, which may come from an untrusted folder.

jinja2's sandbox keeps a template away from Python's internals, but does not limit memory or time: `'x'|center(10**10)` is one
operation, and three nested loops over 10**5 numbers never end. Three limits are added here:

- No value that enters or leaves an operation is larger than `growth.LARGEST_TEXT` characters, lists counted with all that they
  contain. Operations whose result may be much larger than their arguments are estimated before they are executed
  (`selfeval.judging.growth`).
- A rendering takes at most `MOST_STEPS` steps. The body of a loop, macro, block or included template has as many steps as
  nodes in its syntax tree, and they are counted each time it is executed.
- A rendering takes at most `MOST_SECONDS` of CPU time, because a step may be slow on a long text.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

from jinja2 import BaseLoader, StrictUndefined, nodes, pass_context
from jinja2.compiler import CodeGenerator
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from selfeval.judging.growth import Size, filter_growth, growth_of_operator, method_growth, refuse_large, size_of

__all__ = ["MOST_SECONDS", "MOST_STEPS", "PromptEnvironment"]

MOST_STEPS, MOST_SECONDS = 1_000_000, 10.0

_COUNT, _JOIN = "count steps", "concatenate texts"
"""Names of filters that a template cannot write, because they contain a space."""


# -- steps and time -----------------------------------------------------------------------------------------------------


@dataclass
class _Budget:
    """Remaining steps and time of one rendering."""

    steps: int = field(default_factory=lambda: MOST_STEPS)
    deadline: float = field(default_factory=lambda: time.thread_time() + MOST_SECONDS)

    def spend(self, steps: int) -> None:
        self.steps -= steps
        if self.steps < 0:
            raise SecurityError(f"a template may take {MOST_STEPS:,} steps at most; shorten its loops and recursive macros")
        if time.thread_time() > self.deadline:
            raise SecurityError(f"a template may take {MOST_SECONDS:g} seconds of CPU time at most; simplify it")


_budget: ContextVar[_Budget | None] = ContextVar("budget", default=None)


def _spend(steps: int) -> None:
    if (budget := _budget.get()) is not None:
        budget.spend(steps)


def _count(value: Any, steps: int) -> Any:
    _spend(steps)
    return value


def _counting(body: list[nodes.Node]) -> nodes.Filter:
    """Return an expression that is true and counts the steps of a body each time it is evaluated."""
    steps = 1 + sum(1 for statement in body for _ in statement.find_all(nodes.Node))
    return nodes.Filter(nodes.Const(True), _COUNT, [nodes.Const(steps)], [], None, None)


class _CountSteps(NodeTransformer):
    """Makes every body that can be executed repeatedly count its steps."""

    def _counted(self, node: Any) -> Any:
        steps = nodes.ExprStmt(_counting(node.body))
        self.generic_visit(node)
        node.body = [steps, *node.body]
        return node

    visit_Template = visit_Macro = visit_CallBlock = visit_Block = _counted

    def visit_For(self, node: nodes.For) -> nodes.For:
        # A filtered item costs a step too, although the body is not executed for it.
        if node.test is not None:
            node.test = nodes.And(_counting([node.test]), node.test)
        counted: nodes.For = self._counted(node)
        return counted

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        """Concatenate with a filter, because the operator `~` cannot be intercepted."""
        self.generic_visit(node)
        return nodes.Filter(nodes.List(node.nodes), _JOIN, [], [], None, None)


class _CountingCode(CodeGenerator):
    """Compiles templates that count their steps."""

    def visit_Template(self, node: nodes.Template, frame: Any = None) -> None:
        counted = _CountSteps().visit(node)
        counted.set_environment(self.environment)
        super().visit_Template(counted, frame)


# -- sizes --------------------------------------------------------------------------------------------------------------


def _entering(value: Any) -> Any:
    """Refuse an argument that is too large; limit an iterator while it is read."""
    if isinstance(value, Iterator) and not isinstance(value, LoopContext):
        return _limited_items(value)
    size_of(value)
    return value


def _limited_items(items: Iterable[Any]) -> Iterable[Any]:
    total = Size()
    for item in items:
        total.add(size_of(item))
        yield item


def _concatenate(parts: Iterable[Any]) -> str:
    """Join texts, without making one that is too large."""
    texts, total = [], Size()
    for part in parts:
        total.add(size_of(part))
        texts.append(str(part))
    return "".join(texts)


@pass_context  # so that no output is computed while the template is compiled, when nothing limits its time
def _output(context: Context, value: Any) -> Any:
    size_of(value)
    return value


def _limited_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter that refuses large arguments and large results."""
    # The first argument is the context, the environment or its state if the filter is marked so.
    own = 1 if hasattr(function, "jinja_pass_arg") else 0

    @wraps(function)
    def limited(*args: Any, **kwargs: Any) -> Any:
        _spend(1)
        values = [_entering(value) for value in args[own:]]
        named = {key: _entering(value) for key, value in kwargs.items()}
        if name == "join":  # its result depends on the number of items, so an iterator is read first
            values[0] = values[0] if hasattr(values[0], "__len__") else list(values[0])
        refuse_large(filter_growth(name, values, named), f"the filter {name}")
        result = function(*args[:own], *values, **named)
        size_of(result)
        return result

    return limited


class PromptEnvironment(ImmutableSandboxedEnvironment):
    """A sandbox with limits on the size of every value and on the steps and the time of a rendering.

    Args:
        loader: source of the templates.

    Raises:
        SecurityError: while rendering with `render`, a limit is exceeded.
    """

    code_generator_class = _CountingCode
    intercepted_binops = frozenset({"+", "*", "**", "%"})
    concat = staticmethod(_concatenate)

    def __init__(self, loader: BaseLoader) -> None:
        super().__init__(loader=loader, undefined=StrictUndefined, autoescape=False, finalize=_output, optimized=False)
        # Both are random; `refuse_chance` refuses the usual spellings with a better message.
        del self.filters["random"], self.globals["lipsum"]
        self.filters = {name: _limited_filter(name, function) for name, function in self.filters.items()}
        self.filters |= {_COUNT: _count, _JOIN: _concatenate}

    def render(self, name: str, **values: Any) -> str:
        """Return the text of a template, within the limits of one rendering."""
        template = self.get_template(name)
        outer = _budget.set(_Budget())
        try:
            return template.render(**values)
        finally:
            _budget.reset(outer)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Refuse results that are too large, before computing them."""
        size_of(left)
        size_of(right)
        refuse_large(growth_of_operator(operator, left, right), f"the operator {operator}")
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call a method or a macro, within the limits of sizes and steps."""
        _spend(1)
        values = [_entering(value) for value in args]
        named = {key: _entering(value) for key, value in kwargs.items()}
        # jinja2 wraps `format`, and a wrapper has no receiver.
        method = getattr(obj, "__wrapped__", obj)
        receiver, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if name == "join" and isinstance(receiver, str) and values and not hasattr(values[0], "__len__"):
            values[0] = list(values[0])
        size_of(receiver)
        refuse_large(method_growth(name, receiver, values, named), f"the method {name}")
        result = super().call(context, obj, *values, **named)
        size_of(result)
        return result
