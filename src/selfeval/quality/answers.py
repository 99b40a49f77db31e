r"""The final answer of a reply, and whether it equals reference answers: numbers, letters of a choice, or short texts.

The final answer of a text is the first of these that exists: the last `\boxed{...}`, the text after the last `####` (GSM8K),
the text after the last "answer is", "answer:", "答案是" or "答案：". Otherwise it depends on the reference answer: for a
number, the last number of the text; for a letter, a letter by itself at the end; for any other answer the whole text or, if the
answer has a digit (a time, a ratio, a list), the end of the text. Units, algebra and sets are not interpreted but compared as
text, so a correct answer in another form does not match.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

import regex

from selfeval.errors import ConfigError
from selfeval.quality.dedupe import normalise

__all__ = ["AnswerForm", "answer_of", "final_answer", "is_answer"]

AnswerForm = Literal["number", "boxed", "letter", "pattern"]
"""Form in which replies state their final answer."""

_NUMBER = re.compile(
    r"""(?<![^\W\u3040-\u30ff\u3400-\u9fff])(?<![.^])  # neither the rest of a word, unless it is written without spaces: 共9页
        (?<!(?<![\u3040-\u30ff\u3400-\u9fff]):)(?<![\w)][+*^])(?<![+*^]\ )           # nor of a term: "3x+9", "12:30"
        [-+−]?[$€£]?
        (?>(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:\s*/\s*\d+)?(?:[eE][-+]?\d+)?|\.\d+)
        (?![.,:]?\d)(?!\s*[:^+*=]\s*[\w(])(?![A-Za-z]\s*[-+*^=/])""",
    re.VERBOSE,
)
_MARKED = re.compile(r"\banswer\s*(?:is|:|=)\s*:?\s*|答案\s*[是为:：=]\s*[:：]?\s*", re.IGNORECASE)
_LETTER = re.compile(r"^\W*([A-Za-z])\W*$")
_LAST_LETTER = re.compile(r"(?:^|[\s(\[*])([A-Z])[\s).\]*]*$")
_SEVERAL_LETTERS = re.compile(r"\b[A-Z]\b[\s)\].,]*(?:\bor\b|\band\b|,|/|&)[\s(\[]*\b[A-Z]\b")
_FIRST_LETTER = re.compile(r"^\W*([A-Z])[).:\]]")
_LARGEST_EXPONENT = 400
_MOST_BITS = 4096
"""Largest numerator and denominator of an answer, in bits; Python prints no integer of more than 4,300 digits."""
_MOST_SECONDS = 1.0
"""CPU time of one search with the user's pattern."""


def is_answer(reply: str, answers: Sequence[str]) -> bool:
    r"""Return whether the final answer of a reply equals one of the reference answers.

    Args:
        reply: any text.
        answers: bare answers, or worked solutions that end in the answer (as in GSM8K).

    Example:
        >>> is_answer("3 * 24 = 72, so the answer is 72.", ["72"]), is_answer(r"\boxed{\frac{1}{2}}", ["0.5"])
        (True, True)
        >>> is_answer("It is (B).", ["b"]), is_answer("The answer is 1,200 dollars", ["1200"]), is_answer("Rome", ["Paris"])
        (True, True, False)
    """
    return any(_equals(reply, _core(answer)) for answer in answers)


def answer_of(text: str, form: AnswerForm, pattern: str = "") -> str | None:
    r"""Return the final answer of a text in normal form, or None if it has none of this form.

    Two answers are equal if their normal forms are. A number is a fraction in lowest terms, without currency, percent sign or
    thousands separators; other answers of `boxed` and `pattern` are compared without case, spaces and punctuation.

    Args:
        text: any text.
        form: `number`: the first number of the marked answer, or without a mark the last number of the text. `letter`: the
            letter of a multiple choice. `boxed`: the last `\boxed{...}`. `pattern`: the last match of the pattern.
        pattern: regular expression with one group, the answer; for `pattern` only.

    Raises:
        ConfigError: the pattern takes more than a second of CPU time.

    Example:
        >>> [answer_of(text, "number") for text in ("So 600 + 400 = $1,000.00.", "It is 1000 (50%: 500)", "None")]
        ['1000', '500', None]
        >>> answer_of(r"\boxed{\frac{2}{4}}", "boxed"), answer_of("A: 18", "pattern", r"A: (\d+)")
        ('1/2', '18')
    """
    if form == "boxed":
        return _normal_form(_boxed(text))
    if form == "pattern":
        return _normal_form(_last_match(text, pattern))
    marked = final_answer(text)
    if form == "letter":
        return _letter(text if marked is None else marked, is_marked=marked is not None)
    return _shown(_last_number(text) if marked is None else _first_number(marked))


def _normal_form(answer: str | None) -> str | None:
    if answer is None:
        return None
    answer = " ".join(answer.split())
    number = _whole_number(answer)
    if number is not None:
        return _shown(number)
    plain = _plain(answer)
    # As in `_equals`: signs matter in 3x+9 and 12:30, but not in words. Digits that only `plain` has were ¼ or 5².
    return (_exact(answer) if re.search(r"\d", answer + plain) else plain) or None


def _shown(number: Fraction | None) -> str | None:
    if number is None or max(number.numerator.bit_length(), number.denominator.bit_length()) > _MOST_BITS:
        return None
    return str(number)


def _last_match(text: str, pattern: str) -> str | None:
    """Return the text of the group in the last match in which it is not empty.

    Unlike `re`, `regex` can stop a search: (a|aa)+$ takes longer than the age of the universe on a row of a and a b.
    """
    try:
        found = [match[1] for match in regex.finditer(pattern, text, timeout=_MOST_SECONDS) if match[1]]
    except TimeoutError as error:
        raise ConfigError(
            f"verdicts.agreement.pattern: {pattern} took more than {_MOST_SECONDS:g} s on a reply of {len(text):,} characters; "
            "write it without repetitions inside of repetitions, such as (a+)+"
        ) from error
    return found[-1] if found else None


def final_answer(text: str) -> str | None:
    """Return the answer that a text marks as final, or None if there is no mark."""
    boxed = _boxed(text)
    if boxed is not None:
        return boxed
    if "####" in text:
        return text.rpartition("####")[2].strip()
    marks = list(_MARKED.finditer(text))
    if not marks:
        return None
    behind = text[marks[-1].end() :].strip()
    return behind.splitlines()[0].strip() if behind else None


def _core(answer: str) -> str:
    found = final_answer(answer)
    return answer.strip() if found is None else found


def _equals(reply: str, answer: str) -> bool:
    marked = final_answer(reply)
    number = _whole_number(answer)
    if number is not None:
        found = _first_number(marked) if marked is not None else _last_number(reply)
        return found == number
    # A multiple choice. Case is ignored, as in "b" and "(B)".
    if letter := _LETTER.match(answer):
        return _letter(reply if marked is None else marked, is_marked=marked is not None) == letter[1].upper()
    # Not a number but with a digit, such as 12:30 or 3x+9: signs matter, so it is compared exactly.
    if re.search(r"\d", answer):
        return _is_exactly(answer, marked) if marked is not None else _ends_with(reply, answer)
    return _plain(reply if marked is None else marked) == _plain(answer)


def _exact(text: str) -> str:
    """Remove case, spaces and closing punctuation; signs within the text are kept, because 3x+9 is not 3x-9."""
    return re.sub(r"\s+", "", _without_fractions(text)).casefold().strip("$.!").replace("−", "-")


def _is_exactly(answer: str, text: str) -> bool:
    return _exact(text) == _exact(answer)


def _ends_with(text: str, answer: str) -> bool:
    """Return whether a text ends with the answer, and the character before it is not part of a number or term."""
    whole, end = _exact(text), _exact(answer)
    start = len(whole) - len(end)
    if not end or not whole.endswith(end):
        return False
    # `whole` has no spaces, so a word may precede the answer directly, but a digit or a sign may not.
    return start == 0 or not re.match(r"[\d.,:/^+*-]", whole[start - 1])


def _plain(text: str) -> str:
    return normalise(re.sub(r"\\(?:text|mathrm|textbf)\s*\{([^{}]*)\}", r"\1", text)).strip()


def _letter(text: str, *, is_marked: bool) -> str | None:
    """Return the letter of a choice: after a mark it may come first ("B) Paris"), otherwise it is alone or at the end."""
    if alone := _LETTER.match(text):
        return alone[1].upper()
    # "A or B" names no single choice.
    if _SEVERAL_LETTERS.search(text):
        return None
    first, last = _FIRST_LETTER.match(text.strip()), _LAST_LETTER.search(text.strip())
    found = (first or last) if is_marked else (last or first)
    return found[1] if found else None


# -- numbers ------------------------------------------------------------------------------------------------------------


def _whole_number(text: str) -> Fraction | None:
    """Parse a text that is just a number, apart from signs such as $ and % and a one-letter unit; None if it is not."""
    plain = _without_fractions(text).strip(" \t\n\\$€£%().!")
    plain = re.sub(r"(?<=\d)\s*(?:[A-Za-z]|\\?%)?$", "", plain)
    return _value(plain) if _NUMBER.fullmatch(plain) else None


def _without_fractions(text: str) -> str:
    return re.sub(r"\\[dt]?frac\s*\{\s*(-?\d+)\s*\}\s*\{\s*(\d+)\s*\}", r"\1/\2", text)


def _first_number(text: str) -> Fraction | None:
    found = _NUMBER.search(_without_fractions(text))
    return _value(found[0]) if found else None


def _last_number(text: str) -> Fraction | None:
    found = _NUMBER.findall(_without_fractions(text))
    return _value(found[-1]) if found else None


def _value(text: str) -> Fraction | None:
    plain = re.sub(r"[,$€£\s]", "", text).replace("−", "-")
    exponent = re.search(r"[eE]([-+]?\d+)$", plain)
    if exponent and abs(int(exponent[1])) > _LARGEST_EXPONENT:  # a Fraction would have that many digits
        return None
    try:
        return Fraction(plain)
    except (ValueError, ZeroDivisionError):
        return None


def _boxed(text: str) -> str | None:
    """Return the content of the last `\\boxed{...}`, with balanced braces."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    # Counted by hand, because a regular expression cannot match nested braces such as \boxed{\frac{1}{2}}.
    depth, begin = 0, start + len("\\boxed{")
    for index in range(begin, len(text)):
        if text[index] == "{":
            depth += 1
        elif text[index] == "}":
            if not depth:
                return text[begin:index].strip()
            depth -= 1
    return None
