"""Find the verdict in a judge's output: after its thinking, and not where it quotes the instruction.

Reasoning models write a draft first, between markers such as <think> and </think>, and a draft often names verdicts that the
model rejects later. A judge also tends to repeat the sentence that asks it for "Verdict: A" or "Verdict: B".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from selfeval.judging.labels import Labels

__all__ = ["MARKERS", "Place", "Thinking", "find_verdict", "is_refusal", "thinking_of", "token_at"]

MARKERS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<seed:think>", "</seed:think>"),
    ("<reasoning>", "</reasoning>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
    # Harmony (gpt-oss): everything before the channel `final` is thinking.
    ("<|channel|>analysis", "<|channel|>final<|message|>"),
    ("<|channel|>commentary", "<|channel|>final<|message|>"),
)
"""Opening and closing markers of the thinking of published reasoning models."""

_PROMPTED = (*MARKERS, ("<|start|>assistant", "<|channel|>final<|message|>"))
"""Ends of a prompt after which thinking begins; a chat template may contain the opening marker itself."""

_DECORATION = r"[\s*_`\"'“”(\[{\\$]*"
_QUOTES = ('"', "'", "`", "“", "”", "‘", "’", "«", "»", "„")
_LINE_END = re.compile(r"[ \t.*_`\"')\]}$\\]*(?:\n|<[|/\w])")


@dataclass(frozen=True)
class Thinking:
    """The extent of the thinking in a text.

    Attributes:
        end: index at which the answer begins; 0 without thinking, None while a block is still open.
        close: the marker that would end the open block.
    """

    end: int | None
    close: str = ""


@dataclass(frozen=True)
class Place:
    """Position of a verdict in a text.

    Attributes:
        lead: index of the first character of its lead.
        label: index of the first character of its label.
    """

    lead: int
    label: int


def thinking_of(text: str, prompt: str = "") -> Thinking:
    """Separate thinking from the answer.

    Args:
        text: text written by the model, control tokens included.
        prompt: the preceding text; only its end is used. Default: empty.

    Example:
        >>> thinking_of("<think>A? No.</think>Verdict: B").end
        21
    """
    opened = [close for start, close in _PROMPTED if prompt.rstrip().endswith(start)]
    events = [event for start, close in MARKERS for event in _marks(text, start, close)]
    # A prompt that ends in an opening marker starts the text inside a block.
    end, waits = (None, opened[0]) if opened else (0, "")
    # In the order of the text. A closing marker counts even without an opening one, and an opening one inside a block does
    # not: its text is thinking already.
    for after, closes, close in sorted(events):
        if closes:
            end, waits = after, ""
        elif end is not None:
            end, waits = None, close
    return Thinking(end, waits)


def _marks(text: str, start: str, close: str) -> list[tuple[int, bool, str]]:
    """Return, for every marker, its end, whether it closes a block, and its closing marker."""
    opening = [(match.end(), False, close) for match in re.finditer(re.escape(start), text)]
    return opening + [(match.end(), True, close) for match in re.finditer(re.escape(close), text)]


def find_verdict(text: str, labels: Labels, *, finished: bool) -> Place | None:
    """Find the deciding statement: the last one of a finished judge, the first one of a judge that was cut off.

    A statement in quotation marks counts only if there is no other and all quoted ones agree. A judge that was cut off may
    have been about to change its verdict, so its statement has to fill a whole line.

    Args:
        text: the answer, without thinking.
        labels: the words of a verdict; `lead` must not be empty.
        finished: whether the judge's output ended by itself.
    """
    found = [(match, match.group("label")) for match in _statement(labels).finditer(text)]
    if not finished:
        # A statement in running text may be a plan or a doubt that the judge had no time to revise.
        alone = [match for match, _ in found if _fills_line(text, match)]
        return _place(alone[0]) if alone else None
    stated = [match for match, _ in found if not text[: match.start()].endswith(_QUOTES)]
    if stated:
        return _place(stated[-1])
    return _place(found[-1][0]) if len({label.casefold() for _, label in found}) == 1 else None


_CANNOT = r"i(?: can ?not| can't| am unable to| am not able to|'m unable to|'m not able to| won't| will not)"
_TASK = r"(?:compare|judge|grade|rate|rank|evaluate|assess|decide|determine|choose|help|assist|provide|answer|comply|continue)"
_REFUSAL = re.compile(
    rf"""[\s*_"'“]*(?:(?:i'm |i am )?(?:very )?sorry,? (?:but )?i\b|i apologi[sz]e,? but\b|"""
    rf"(?:unfortunately,? |as an ai\b[^.\n]{{0,40}}?,? )?{_CANNOT} {_TASK}\b|"
    r"(?:很|非常)?(?:抱歉|对不起)，?[^。\n]{0,20}?(?:无法|不能)|我(?:无法|不能)(?:比较|判断|评价|评分|回答|提供|协助|帮助))",
    re.IGNORECASE,
)


def is_refusal(text: str) -> bool:
    """Return whether an answer begins by refusing the task, in English or Chinese.

    Only the beginning counts, because a judge may quote the refusal of a reply, and only with a verb of the task, because
    "I cannot find a mistake" is none. The caller looks for a verdict first.

    Example:
        >>> is_refusal("I'm sorry, but I can't compare these replies."), is_refusal("Reply A says: I cannot help.")
        (True, False)
    """
    return bool(_REFUSAL.match(text.replace("\u2019", "'")))


def _place(match: re.Match[str]) -> Place:
    return Place(match.start(), match.start("label"))


def _fills_line(text: str, match: re.Match[str]) -> bool:
    """Return whether a match is alone on its line, and the line ends or a control token follows."""
    before = text[: match.start()].rpartition("\n")[2]
    return not before.strip(" \t>#-") and bool(_LINE_END.match(text, match.end()))


def _statement(labels: Labels) -> re.Pattern[str]:
    """Compile a pattern for lead and label with the decoration that models add: bold, quotation marks, LaTeX boxes, case."""
    lead = r"[\s*_`]*".join(re.escape(part) for part in re.findall(r"\w+|[^\w\s]", labels.lead))
    return re.compile(rf"[*_]*(?i:{lead}){_DECORATION}(?P<label>{_any(labels.all)})(?!\w)")


def _any(labels: Sequence[str]) -> str:
    """Return a pattern for any of the labels. A single letter is case-sensitive: "Verdict: a close call" names no reply."""
    # Alternatives are tried in order, and a label may begin with another one.
    longest_first = sorted((label.strip() for label in labels), key=len, reverse=True)
    return "|".join(re.escape(label) if len(label) == 1 else f"(?i:{re.escape(label)})" for label in longest_first)


def token_at(decode: Callable[[int], str], length: int, character: int) -> int:
    """Return the number of tokens that are complete before a character of the decoded text.

    Args:
        decode: returns the text of the first n tokens.
        length: total number of tokens.
        character: index into the text of all tokens.
    """
    # Binary search for the largest number of tokens whose text ends at or before the character.
    low, high = 0, length
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if len(decode(middle)) <= character else (low, middle - 1)
    return low
