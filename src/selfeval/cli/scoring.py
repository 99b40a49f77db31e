"""Scores for one question on the command line, or for JSON lines from a file or standard input."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from selfeval.errors import DataError, InputError
from selfeval.runs.asked import EXAMPLE, Asked, asked_of, result_of
from selfeval.texts import LONGEST_LINE, json_lines, read_text, safe_json, visible

if TYPE_CHECKING:
    from selfeval.runs.evaluator import Evaluator, Ranking

__all__ = ["print_scores", "read_asked", "typed"]

_LARGEST = 1 << 30


def read_asked(source: Path) -> Iterable[Asked]:
    """Read questions from JSON lines; `-` is standard input, whose lines are read as they arrive.

    Raises:
        DataError: a line is malformed; the message names it. A file is read completely before the first result.
    """
    if str(source) == "-":
        arriving = json_lines(_from_standard_input(), "standard input", DataError, EXAMPLE)
        return (asked_of(values, f"standard input, line {number}") for number, values in arriving)
    text = read_text(source, "file", DataError, most=_LARGEST, remedy=f"pass JSON lines ({EXAMPLE}), or - for standard input")
    lines = json_lines(text, str(source), DataError, EXAMPLE)
    found = [asked_of(values, f"{source}, line {number}") for number, values in lines]
    if not found:
        raise DataError(f"file {source} is empty; write one {EXAMPLE} per line")
    return found


def typed(question: str, replies: Sequence[str]) -> list[Asked]:
    """Return the question given on the command line.

    Raises:
        InputError: the question or a reply is empty.
    """
    if not question.strip() or not all(reply.strip() for reply in replies):
        raise InputError("the question and the replies must not be empty")
    return [Asked(question, tuple(replies), {"question": question, "replies": list(replies)})]


def _from_standard_input() -> Iterator[bytes]:
    """Yield the lines as they arrive, of at most one byte over the limit."""
    while line := sys.stdin.buffer.readline(LONGEST_LINE + 1):
        yield line


def print_scores(evaluator: Evaluator, asked: Iterable[Asked], sure: float | None, *, as_json: bool, batch: int) -> None:
    """Print the scores of each question as soon as its batch is scored.

    Args:
        evaluator: evaluator of a run.
        asked: the questions.
        sure: confidence below which a preference is unsure; None for the evaluator's own.
        as_json: print one JSON object per line, with all fields of the question's line.
        batch: number of questions that are read before any of them is scored.
    """
    # One iterator for all batches; standard input is read no further than the batch needs.
    rest, is_first = iter(asked), True
    while group := list(islice(rest, batch)):
        for one, result in zip(group, evaluator.rank([(a.question, a.replies) for a in group], sure), strict=True):
            if as_json:
                typer.echo(safe_json(result_of(one, result)))
            else:
                typer.echo("\n".join([*([] if is_first else [""]), *_as_text(one.replies, result)]))
            is_first = False
        # A program on the other end of a pipe waits for these lines before it sends the next question.
        sys.stdout.flush()


def _as_text(replies: Sequence[str], result: Ranking) -> list[str]:
    lines = [f"{value:+.3f}  {visible(text)}" for text, value in zip(replies, result.scores, strict=True)]
    if result.preferred is not None and result.confidence is not None:
        verdict = "unsure" if result.unsure else f"reply {result.preferred + 1}"
        calibration = "" if result.calibrated else ", not calibrated: too few held-out pairs to fit a temperature"
        lines.append(f"preferred: {verdict} (confidence {result.confidence:.2f}{calibration})")
    return lines
