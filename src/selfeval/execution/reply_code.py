"""Find the code in a reply.

It is, in this order:

1. the last fenced block that defines a function or class which the tests use: a later block often corrects an earlier one, and
   the last block of all may be an example of its use;
2. the last fenced block that is Python or has no language, otherwise the last of any language;
3. without a fence, the lines from the first that begins a statement up to one that cannot belong to the code, or the whole
   text.

Text up to a closing `</think>` is not read. Where several readings are possible they are all returned, and the first that
compiles is used (`selfeval.execution.sandbox`). The text is only searched here, never parsed: a parser is not made for hostile
text.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Collection, Sequence

__all__ = ["continuations", "defines", "programs_of"]

_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})[ \t]*([^\s`]*)[^\n`]*$", re.MULTILINE)
_PYTHON = ("", "python", "python3", "py", "python2", "pycon", "ipython")
_STATEMENT = re.compile(r"^(?:def|class|async def|import|from|@)\b|^@|^[A-Za-z_]\w* *=[^=]", re.MULTILINE)
_CODE_LINE = re.compile(
    r"\s|$|#|@|[)\]}]|(?:async|class|def|import|from|if|elif|else|for|while|try|except|finally|with|return|print|assert|global)\b"
    r"|[A-Za-z_][\w.]*\s*(?:[-+*/|&^%]?=|\(|\[)"
)
"""Beginning of a line that may be at the top level of a program."""
_INSIDE = re.compile(r"(?:return|yield|elif|else|except|finally)\b")
"""A line at the left margin that continues a block or can only be in a function."""
_MOST_CUTS = 10


def programs_of(reply: str, names: Collection[str]) -> tuple[str, ...]:
    """Return the readings of a reply's code, the likeliest first; empty if there is none.

    Args:
        reply: any text.
        names: functions and classes that the tests use.

    Example:
        >>> programs_of("Sure:\\n```python\\ndef f(x):\\n    return x\\n```\\nIt returns x.", ["f"])
        ('def f(x):\\n    return x\\n',)
    """
    text = reply.rpartition("</think>")[2].replace("\r\n", "\n")
    blocks = _blocks(text)
    if blocks:
        defining = [code for _, code in blocks if defines(code, names)]
        python = [code for language, code in blocks if language in _PYTHON]
        chosen = (defining or python or [code for _, code in blocks])[-1]
        return _distinct([chosen, textwrap.dedent(chosen)])
    if not text.strip() or _FENCE.search(text):
        return ()
    begin = _STATEMENT.search(text)
    bare = text[begin.start() :] if begin else text
    cuts = [*_up_to_prose(bare), bare, text]
    return _distinct(sorted(cuts, key=lambda code: not defines(code, names)))


def continuations(stub: str, reply: str, programs: Sequence[str]) -> tuple[str, ...]:
    """Return programs in which a reply continues the body of a function.

    The indentation of the first line, or of all lines, may be lost: replies are stripped, and a model may write the body like a
    whole program.

    Args:
        stub: the beginning of the function, which ends before its body.
        reply: any text.
        programs: readings of its code, see `programs_of`.
    """
    bodies = list(programs)
    if not _blocks(reply):
        bodies.insert(0, reply.replace("\r\n", "\n"))
    start = stub.rstrip("\n") + "\n"
    return _distinct([f"{start}{form}\n" for body in bodies for form in _bodies(body) if form.strip()])


def defines(code: str, names: Collection[str]) -> bool:
    """Return whether code defines a function or class, or assigns a variable, of one of the names at its top level."""
    either = "|".join(re.escape(name) for name in names)
    pattern = rf"^[ \t]*(?:(?:async[ \t]+)?def|class)[ \t]+(?:{either})\b|^(?:{either})[ \t]*(?::[^\n=]*)?=(?!=)"
    return bool(names) and re.search(pattern, code, re.MULTILINE) is not None


def _distinct(texts: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text for text in texts if text.strip()))


def _blocks(text: str) -> list[tuple[str, str]]:
    """Return the language and the content of each fenced block. One that is not closed extends to the end."""
    blocks: list[tuple[str, str]] = []
    opened: re.Match[str] | None = None
    for fence in _FENCE.finditer(text):
        if opened is None:
            opened = fence
        # A block is closed by at least as many of the signs that opened it, and no language; others are part of it.
        elif fence[1].startswith(opened[1]) and not fence[2]:
            blocks.append((opened[2].lower(), text[opened.end() + 1 : fence.start()]))
            opened = None
    if opened is not None:
        blocks.append((opened[2].lower(), text[opened.end() + 1 :]))
    return [block for block in blocks if block[1].strip()]


def _up_to_prose(text: str) -> list[str]:
    """Return the text up to each line that cannot be at the top level of a program, the shortest first.

    Not only up to the first one, which may be part of a string.
    """
    cuts, position = [], 0
    for line in text.splitlines(keepends=True):
        if not _CODE_LINE.match(line):
            cuts.append(text[:position])
        if len(cuts) == _MOST_CUTS:
            break
        position += len(line)
    return cuts


def _bodies(code: str) -> list[str]:
    """Return the forms of the body of a function, indented by four spaces."""
    body = code.strip("\n")
    whole = textwrap.indent(body, "    ")
    if _has_lost_indentation(body):
        return [whole]
    first, _, rest = body.partition("\n")
    # A line at the left margin is no longer part of the function.
    lines = rest.splitlines(keepends=True)
    end = next((number for number, line in enumerate(lines) if line.strip() and line[0] not in " \t"), len(lines))
    rest = "".join(lines[:end])
    within = f"{first}\n{rest}"
    return [within, f"    {first.strip()}\n{rest}", textwrap.indent(textwrap.dedent(within), "    "), whole]


def _has_lost_indentation(body: str) -> bool:
    """Return whether all lines of a body are four spaces too far left, rather than the first line alone."""
    first, *others = [line for line in body.splitlines() if line.strip()] or [""]
    if not others or first[:1] in " \t":
        return False
    if any(_INSIDE.match(line) for line in others):
        return True
    second = len(others[0]) - len(others[0].lstrip())
    # Lines after one of these are indented.
    return second <= 4 if first.rstrip().endswith((":", "(", "[", "{")) else second == 0
