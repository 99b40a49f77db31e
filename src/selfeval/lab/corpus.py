"""The pretraining corpus: questions, noisy replies, judged pairs and replies with step-by-step marks.

A document is a list of `(text, weight)` segments; the weight scales the loss of the segment's tokens. Markers such as
`<|reply|>` are single tokens. `KINDS` lists the kinds of documents with their shares. The loop does not use this module.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable

from selfeval.lab.domain import FAMILIES, NAMES, Problem, draw_problem
from selfeval.lab.noise import GRADED_ERRORS, Reply, draw_reply, draw_sum, plain_reply

__all__ = ["KINDS", "MARKERS", "Document", "draw_document"]

MARKERS = (
    "<|pad|>",
    "<|bos|>",
    "<|eos|>",
    "<|ask|>",
    "<|question|>",
    "<|reply|>",
    "<|grade|>",
    "<|judge|>",
    "<|referee|>",
    "<|first|>",
    "<|second|>",
    "<|work|>",
    "[A]",
    "[B]",
    "[=]",
    "(1)",
    "(2)",
    "(=)",
    "<|right|>",
    "<|wrong|>",
)
"""Tokens that structure a document; pad, bos and eos are 0, 1 and 2."""

Document = list[tuple[str, float]]

_VERDICT_WEIGHT = 4.0
_MARK_WEIGHT = 8.0
_SUM_MARK_WEIGHT = 4.0
_ASK_WEIGHT = 0.5
_NAME_WEIGHT = 4.0
_CONTEXT_WEIGHT = 0.05
_SUMS = 12


def _ask(rng: random.Random) -> Document:
    """Write a new question after zero to five examples from the same few families."""
    families = tuple(rng.sample(FAMILIES, rng.choice((2, 4, len(FAMILIES)))))
    examples = rng.choice((0, 0, 2, 3, 4, 5))
    document = [("<|bos|>", 0.0)]
    for _ in range(examples + 1):
        document += [("<|ask|>", _ASK_WEIGHT), *_weighed_words(draw_problem(rng, families).question)]
    return [*document, ("<|eos|>", _ASK_WEIGHT)]


def _weighed_words(question: str) -> Document:
    """Split a question into weighted words. A repeated name has a higher weight, because it must be copied, not invented."""
    document: Document = []
    met: set[str] = set()
    for word in re.findall(r" ?[^ ]+", question):
        name = word.strip(" .?")
        document.append((word, _NAME_WEIGHT if name in met else _ASK_WEIGHT))
        met |= {name} & NAMES.keys()
    return document


def _reply(rng: random.Random) -> Document:
    problem = draw_problem(rng)
    prompt = f"<|bos|><|question|>{problem.question}<|reply|>"
    return [(prompt, _CONTEXT_WEIGHT), (f"{draw_reply(problem, rng).text}<|eos|>", 1.0)]


def _grade(rng: random.Random) -> Document:
    """Write a reply with a mark (right or wrong) at its end, and after all, some or none of its steps."""
    problem = draw_problem(rng)
    # Balanced, so a mark cannot be guessed from its frequency.
    reply = draw_reply(problem, rng, right=rng.random() < 0.5, kinds=GRADED_ERRORS)
    # By the final answer alone; the marks of the steps are stricter.
    mark = "<|right|>" if reply.answer == problem.answer else "<|wrong|>"
    return [
        (f"<|bos|><|grade|>{problem.question}<|reply|>", _CONTEXT_WEIGHT),
        (reply.opening, _CONTEXT_WEIGHT),
        *_marked_steps(problem, reply, rng, marked_share=rng.choice((0.0, 0.0, 0.5, 1.0))),
        (reply.closing, _CONTEXT_WEIGHT),
        # The mark follows the end token, because the evaluator's head reads its score there.
        ("<|eos|>", 0.0),
        (mark, _MARK_WEIGHT),
    ]


def _marked_steps(problem: Problem, reply: Reply, rng: random.Random, marked_share: float) -> Document:
    document: Document = []
    right_so_far = True
    for index, (step, sentence) in enumerate(zip(reply.steps, reply.sentences, strict=True)):
        # A step is wrong as soon as the solution has left the right path, even if its own arithmetic is exact.
        right_so_far &= index < len(problem.steps) and step == problem.steps[index]
        document.append((sentence, _CONTEXT_WEIGHT))
        if rng.random() < marked_share:
            document.append(("<|right|>" if right_so_far else "<|wrong|>", _MARK_WEIGHT))
    return document


def _sums(rng: random.Random) -> Document:
    """Write a list of sums, each marked right or wrong. Every line is a check, so this is where checking a step is learned."""
    document: Document = [("<|bos|><|grade|>", 0.0)]
    for _ in range(_SUMS):
        line, is_right = draw_sum(rng)
        document += [(line, _CONTEXT_WEIGHT), ("<|right|>" if is_right else "<|wrong|>", _SUM_MARK_WEIGHT)]
    return document


def _pair(problem: Problem, rng: random.Random) -> tuple[Reply, Reply]:
    """Draw two replies: in two of three cases exactly one is right, otherwise both are right or both wrong."""
    kind = rng.choices(("one", "right", "wrong"), weights=(4, 1, 1))[0]
    first = kind == "right" or (kind == "one" and rng.random() < 0.5)
    second = not first if kind == "one" else first
    return draw_reply(problem, rng, right=first), draw_reply(problem, rng, right=second)


def _compare(rng: random.Random, task: str, labels: tuple[str, str, str]) -> Document:
    problem = draw_problem(rng)
    first, second = _pair(problem, rng)
    goods = (first.answer == problem.answer, second.answer == problem.answer)
    verdict = labels[2] if goods[0] == goods[1] else labels[0 if goods[0] else 1]
    # Each label is shown with its reply, so the verdict can copy it.
    shown = f"<|first|>{first.text}{labels[0]}<|second|>{second.text}{labels[1]}"
    return [
        (f"<|bos|>{task}{problem.question}{shown}<|work|>", 0.0),
        # The judge solves the problem itself before its verdict: `verdicts.reasoning`.
        (plain_reply(problem), 0.5),
        (verdict, _VERDICT_WEIGHT),
        ("<|eos|>", 0.5),
    ]


def _judge(rng: random.Random) -> Document:
    return _compare(rng, "<|judge|>", ("[A]", "[B]", "[=]"))


def _referee(rng: random.Random) -> Document:
    return _compare(rng, "<|referee|>", ("(1)", "(2)", "(=)"))


KINDS: dict[str, tuple[Callable[[random.Random], Document], float]] = {
    "ask": (_ask, 0.10),
    "reply": (_reply, 0.22),
    "grade": (_grade, 0.32),
    "sums": (_sums, 0.12),
    "judge": (_judge, 0.16),
    "referee": (_referee, 0.08),
}
"""Kind of document -> (function that writes it, share of documents)."""


def draw_document(rng: random.Random) -> Document:
    """Draw a random document as weighted segments."""
    names = list(KINDS)
    kind = rng.choices(names, weights=[KINDS[name][1] for name in names])[0]
    return KINDS[kind][0](rng)
