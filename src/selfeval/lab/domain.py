"""Short word problems in natural language: ten families, each with several phrasings and a worked solution.

A *phrasing* is a sentence pattern with slots. The same pattern generates a question (`Phrasing.fill`) and parses one
(`Phrasing.read`), so the oracle understands exactly the questions that the domain can ask, whoever wrote them. All numbers are
in 0..60; a problem with a step outside that range is not part of the domain.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

__all__ = ["FAMILIES", "ITEMS", "LARGEST", "NAMES", "Family", "Phrasing", "Problem", "Step", "draw_problem", "read_problem"]

LARGEST = 60
"""Largest number in a problem, a step or an answer."""

NAMES = {"Tom": "He", "Anna": "She", "Ben": "He", "Lily": "She", "Sam": "He", "Mia": "She", "Leo": "He", "Zoe": "She"}
"""First names and their pronouns."""

ITEMS = ("apples", "pens", "books", "eggs", "cards", "shells", "stamps", "balls", "cakes", "plums")
THINGS = {"pen": "pens", "book": "books", "card": "cards", "ball": "balls", "cake": "cakes", "stamp": "stamps"}
"""Goods of a shop, singular and plural."""
BOXES = ("boxes", "bags", "baskets", "shelves")
UNITS = {("weeks", "days"): 7, ("yards", "feet"): 3, ("hands", "fingers"): 5}
"""(Large unit, small unit) -> number of small units in a large one."""

_OPERATIONS: Mapping[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    # -1 is out of range, so a problem with a remainder is redrawn.
    "/": lambda a, b: a // b if b and a % b == 0 else -1,
}


@dataclass(frozen=True)
class Step:
    """A step of a solution, `left operator right = result`; `result` is the number *as written*, right or wrong."""

    left: int
    operator: str
    right: int
    result: int

    @classmethod
    def worked(cls, left: int, operator: str, right: int) -> Step:
        """Create a step with its exact result, or -1 if a division has a remainder."""
        return cls(left, operator, right, _OPERATIONS[operator](left, right))

    @property
    def is_exact(self) -> bool:
        return self.result == _OPERATIONS[self.operator](self.left, self.right)

    @property
    def in_range(self) -> bool:
        return all(0 <= number <= LARGEST for number in (self.left, self.right, self.result))


@dataclass(frozen=True)
class Phrasing:
    """A question pattern: words with `{slot}`s, numbers in slots `a`, `b`, `c`."""

    pattern: str

    def fill(self, slots: Mapping[str, object]) -> str:
        return self.pattern.format(**slots)

    @cached_property
    def regex(self) -> re.Pattern[str]:
        seen: set[str] = set()

        def group(match: re.Match[str]) -> str:
            name = match.group(1)
            # A repeated slot has to match the same text: a back-reference.
            if name in seen:
                return f"(?P={name})"
            seen.add(name)
            # Digits for numbers, one word for anything else.
            return rf"(?P<{name}>\d+)" if name in ("a", "b", "c") else rf"(?P<{name}>[A-Za-z]+)"

        parts = re.split(r"(\{\w+\})", self.pattern)
        return re.compile("".join(re.sub(r"\{(\w+)\}", group, p) if p.startswith("{") else re.escape(p) for p in parts))

    def read(self, question: str) -> dict[str, str] | None:
        match = self.regex.fullmatch(question)
        return match.groupdict() if match else None


@dataclass(frozen=True)
class Family:
    """A kind of problem: how it is drawn, phrased, solved and commonly misread.

    `solve` and `misread` map the slots to steps; for some numbers either may be impossible (a number out of range).
    """

    name: str
    phrasings: tuple[Phrasing, ...]
    draw: Callable[[random.Random], dict[str, object]]
    solve: Callable[[int, int, int], tuple[Step, ...]]
    misread: Callable[[int, int, int], tuple[Step, ...]]
    holds: Callable[[Mapping[str, str]], bool] = field(default=lambda slots: True)


@dataclass(frozen=True)
class Problem:
    """A question with its exact steps; `answer` is the result of the last one."""

    family: Family
    question: str
    numbers: tuple[int, int, int]
    steps: tuple[Step, ...]

    @property
    def answer(self) -> int:
        return self.steps[-1].result

    def misread_steps(self) -> tuple[Step, ...] | None:
        """Steps of the common misreading, or None if it is outside the domain or yields the right answer."""
        steps = self.family.misread(*self.numbers)
        # A misreading that happens to give the right answer is not an error.
        fits = all(step.in_range for step in steps) and steps[-1].result != self.answer
        return steps if fits else None


def _chain(first: Step, *rest: tuple[str, int]) -> tuple[Step, ...]:
    steps = [first]
    for operator, right in rest:
        steps.append(Step.worked(steps[-1].result, operator, right))
    return tuple(steps)


def _one(left: int, operator: str, right: int) -> tuple[Step, ...]:
    return (Step.worked(left, operator, right),)


def _people(rng: random.Random) -> dict[str, object]:
    name, other = rng.sample(sorted(NAMES), 2)
    return {"name": name, "other": other, "pronoun": NAMES[name], "items": rng.choice(ITEMS)}


def _pronoun_fits(slots: Mapping[str, str]) -> bool:
    return "pronoun" not in slots or NAMES.get(slots["name"]) == slots["pronoun"]


def _with(rng: random.Random, **numbers: int) -> dict[str, object]:
    return {**_people(rng), **numbers}


def _draw_gain(rng: random.Random) -> dict[str, object]:
    return _with(rng, a=rng.randint(4, 40), b=rng.randint(2, 15))


def _draw_loss(rng: random.Random) -> dict[str, object]:
    b = rng.randint(2, 15)
    return _with(rng, a=rng.randint(b + 1, 45), b=b)


def _draw_groups(rng: random.Random) -> dict[str, object]:
    return {**_with(rng, a=rng.randint(2, 7), b=rng.randint(2, 8)), "boxes": rng.choice(BOXES)}


def _draw_shop(rng: random.Random) -> dict[str, object]:
    thing, other_thing = rng.sample(sorted(THINGS), 2)
    slots = _with(rng, a=rng.randint(2, 6), b=rng.randint(2, 6), c=rng.randint(2, 15))
    return {**slots, "thing": thing, "things": THINGS[thing], "extra": other_thing}


def _draw_spend(rng: random.Random) -> dict[str, object]:
    slots = _draw_shop(rng)
    a, b = rng.randint(2, 5), rng.randint(2, 6)
    return {**slots, "a": a, "b": b, "c": rng.randint(a * b + 1, 45)}


def _draw_units(rng: random.Random) -> dict[str, object]:
    (large, small), size = rng.choice(sorted(UNITS.items()))
    return {**_with(rng, a=rng.randint(2, 6), b=rng.randint(1, size - 1)), "large": large, "small": small}


def _draw_change(rng: random.Random) -> dict[str, object]:
    a, b = rng.randint(4, 30), rng.randint(2, 12)
    return _with(rng, a=a, b=b, c=rng.randint(2, min(12, a + b - 1)))


def _draw_together(rng: random.Random) -> dict[str, object]:
    return _with(rng, a=rng.randint(2, 10), b=rng.randint(3, 22))


def _draw_share(rng: random.Random) -> dict[str, object]:
    b = rng.randint(2, 7)
    return _with(rng, a=b * rng.randint(2, 8), b=b)


def _shop_fits(slots: Mapping[str, str]) -> bool:
    plural = "things" not in slots or THINGS.get(slots.get("thing", "")) in (slots["things"], None)
    return plural and _pronoun_fits(slots)


def _phrasings(*patterns: str) -> tuple[Phrasing, ...]:
    return tuple(Phrasing(pattern) for pattern in patterns)


def _unit_size(slots: Mapping[str, str]) -> int | None:
    return UNITS.get((slots.get("large", ""), slots.get("small", "")))


FAMILIES: tuple[Family, ...] = (
    Family(
        "gain",
        _phrasings(
            "{name} has {a} {items}. {pronoun} buys {b} more. How many {items} does {name} have now?",
            "{name} had {a} {items} and then found {b} more. How many {items} are there now?",
            "There are {a} {items} on the table. {name} puts {b} more there. How many {items} are on the table?",
        ),
        _draw_gain,
        lambda a, b, c: _one(a, "+", b),
        lambda a, b, c: _one(a, "-", b),
        _pronoun_fits,
    ),
    Family(
        "loss",
        _phrasings(
            "{name} has {a} {items}. {pronoun} gives {b} to {other}. How many {items} are left?",
            "{name} had {a} {items} but lost {b} of them. How many {items} does {name} have now?",
            "There were {a} {items} on the table. {name} took {b} of them. How many {items} are left?",
        ),
        _draw_loss,
        lambda a, b, c: _one(a, "-", b),
        lambda a, b, c: _one(a, "+", b),
        _pronoun_fits,
    ),
    Family(
        "compare",
        _phrasings(
            "{name} has {a} {items}. {other} has {b} {items}. How many more {items} does {name} have than {other}?",
            "{other} has {b} {items} and {name} has {a}. How many fewer {items} does {other} have than {name}?",
        ),
        _draw_loss,
        lambda a, b, c: _one(a, "-", b),
        lambda a, b, c: _one(a, "+", b),
    ),
    Family(
        "groups",
        _phrasings(
            "There are {a} {boxes} with {b} {items} in each. How many {items} are there?",
            "{name} fills {a} {boxes}. Each holds {b} {items}. How many {items} does {name} need?",
        ),
        _draw_groups,
        lambda a, b, c: _one(a, "*", b),
        lambda a, b, c: _one(a, "+", b),
    ),
    Family(
        "shop",
        _phrasings(
            "A {thing} costs {b} coins. {name} buys {a} {things} and a {extra} for {c} coins. How many coins does {name} pay?",
            "{name} buys {a} {things} at {b} coins each and a {extra} for {c} coins. How many coins is that?",
        ),
        _draw_shop,
        lambda a, b, c: _chain(Step.worked(a, "*", b), ("+", c)),
        lambda a, b, c: _one(b, "+", c),
        _shop_fits,
    ),
    Family(
        "spend",
        _phrasings(
            "{name} has {c} coins. {pronoun} buys {a} {things} at {b} coins each. How many coins are left?",
            "A {thing} costs {b} coins. {name} has {c} coins and buys {a} {things}. How many coins are left?",
        ),
        _draw_spend,
        lambda a, b, c: _spend(a, b, c),
        lambda a, b, c: _one(c, "-", b),
        _shop_fits,
    ),
    Family(
        "units",
        _phrasings(
            "A trip takes {a} {large} and {b} {small}. How many {small} is that?",
            "{name} counts {a} {large} and {b} {small}. How many {small} is that?",
        ),
        _draw_units,
        lambda a, b, c: _chain(Step.worked(a, "*", c), ("+", b)),
        lambda a, b, c: _one(a, "+", b),
    ),
    Family(
        "change",
        _phrasings(
            "{name} has {a} {items}. {pronoun} buys {b} more and gives {c} to {other}. How many {items} does {name} have now?",
            "There are {a} {items} on the table. {name} puts {b} more there and {other} takes {c}. How many {items} are left?",
        ),
        _draw_change,
        lambda a, b, c: _chain(Step.worked(a, "+", b), ("-", c)),
        lambda a, b, c: _chain(Step.worked(a, "+", b), ("+", c)),
        _pronoun_fits,
    ),
    Family(
        "together",
        _phrasings(
            "{name} has {a} more {items} than {other}. {other} has {b} {items}. How many {items} do they have together?",
            "{other} has {b} {items}. {name} has {a} more than that. How many {items} do they have together?",
        ),
        _draw_together,
        lambda a, b, c: _chain(Step.worked(b, "+", a), ("+", b)),
        lambda a, b, c: _one(b, "+", a),
    ),
    Family(
        "share",
        _phrasings(
            "{name} shares {a} {items} among {b} friends. How many {items} does each friend get?",
            "{a} {items} go into {b} {boxes}, the same number in each. How many {items} are in each?",
        ),
        lambda rng: {**_draw_share(rng), "boxes": rng.choice(BOXES)},
        lambda a, b, c: _one(a, "/", b),
        lambda a, b, c: _one(a, "-", b),
    ),
)


def _spend(a: int, b: int, c: int) -> tuple[Step, ...]:
    paid = Step.worked(a, "*", b)
    return paid, Step.worked(c, "-", paid.result)


def _problem(family: Family, question: str, slots: Mapping[str, object]) -> Problem | None:
    # The number of small units in a large one is world knowledge: it is in no slot of the question.
    if family.name == "units":
        size = _unit_size({k: str(v) for k, v in slots.items()})
        if size is None:
            return None
        slots = {**slots, "c": size}
    numbers = (int(str(slots["a"])), int(str(slots["b"])), int(str(slots.get("c", 0))))
    steps = family.solve(*numbers)
    return Problem(family, question, numbers, steps) if all(step.in_range for step in steps) else None


def draw_problem(rng: random.Random, families: tuple[Family, ...] = FAMILIES) -> Problem:
    """Draw a random problem from `families` (default: all) with all steps in range."""
    while True:
        family = rng.choice(families)
        slots = family.draw(rng)
        problem = _problem(family, rng.choice(family.phrasings).fill(slots), slots)
        if problem is not None and problem.answer > 0:
            return problem


def read_problem(question: str) -> Problem | None:
    """Parse a question, or return None if it is not a well-posed question of this domain."""
    text = " ".join(question.split())
    for family in FAMILIES:
        for phrasing in family.phrasings:
            slots = phrasing.read(text)
            if slots is not None and family.holds(slots):
                return _problem(family, text, slots)
    return None
