from __future__ import annotations

import textwrap

import pytest

from selfeval.execution.reply_code import continuations, defines, programs_of

DOUBLE = "def double(x):\n    return 2 * x\n"


@pytest.mark.parametrize(
    "reply",
    [
        f"```python\n{DOUBLE}```",
        f"Sure!\n\n```\n{DOUBLE}```\n\nIt multiplies by two.",
        f"~~~py\n{DOUBLE}~~~",
        f"```Python\n{DOUBLE}```",
        f"````python\n{DOUBLE}````",
        f'```python title="double.py"\n{DOUBLE}```',
        f"Cut off:\n```python\n{DOUBLE}",
        f"```python\r\n{DOUBLE}```".replace("\n", "\r\n").replace("\r\r", "\r"),
        f"1. First:\n   ```python\n{DOUBLE}   ```",
        # the last block that defines it, rather than an earlier attempt or the example
        f"```python\ndef double(x): pass\n```\nBetter:\n```python\n{DOUBLE}```\nUse:\n```python\nprint(double(2))\n```",
        f"```bash\npip install double\n```\n```python\n{DOUBLE}```\n```text\n4\n```",
        f"<think>\n```python\ndef double(x): pass\n```\n</think>\n```python\n{DOUBLE}```",
        DOUBLE,
        f"Here is the function:\n{DOUBLE}",
        f"Here it is:\n\n{DOUBLE}\nThis works for any number.",
    ],
)
def test_the_code_of_a_reply_is_found(reply: str) -> None:
    assert programs_of(reply, ["double"])[0].strip() == DOUBLE.strip()


def test_a_block_in_a_list_loses_its_indentation() -> None:
    found = programs_of("1. So:\n   ```python\n" + textwrap.indent(DOUBLE, "   ") + "   ```", ["double"])
    assert DOUBLE in found


def test_prose_ends_bare_code_but_not_within_a_string() -> None:
    code = f'TEXT = """\nAdd more test cases here.\n"""\n\n{DOUBLE}'
    assert code in [form.rstrip("\n") + "\n" for form in programs_of(f"{code}\nThat is all there is.", ["double"])]


@pytest.mark.parametrize("reply", ["", " \n", "```python\n```", "<think>\ndef double(x): ...\n</think>"])
def test_a_reply_without_code_has_no_program(reply: str) -> None:
    assert programs_of(reply, ["double"]) == ()


def test_a_block_of_python_comes_before_other_languages() -> None:
    assert programs_of("```python\nx = 1\n```\n```json\n{}\n```", ["double"]) == ("x = 1\n",)
    assert programs_of("```json\n{}\n```", ["double"]) == ("{}\n",)


@pytest.mark.parametrize(
    ("code", "defined"),
    [
        ("def f(x): pass", True),
        ("async  def f(x): pass", True),
        ("class f:\n    pass", True),
        ("f = lambda x: x", True),
        ("f: object = len", True),
        ("f == 1", False),
        ("def ff(x): pass", False),
        ("print(f(1))", False),
        ("# def f(x)", False),
    ],
)
def test_a_definition_is_recognised(code: str, defined: bool) -> None:
    assert defines(code, ["f", "g"]) is defined
    assert not defines(code, [])


STUB = 'def larger(a, b):\n    """Return the larger one."""\n'
BODY = "    if a > b:\n        return a\n    else:\n        return b\n"


@pytest.mark.parametrize(
    "reply",
    [
        BODY,
        BODY.strip(),
        textwrap.dedent(BODY),
        f"```python\n{BODY}```",
        f"```python\n{textwrap.dedent(BODY)}```",
        f"{BODY}\nprint(larger(input(), 1))",
        f"{BODY.strip()}\n\ndef test():\n    larger(",
        "    found = max(\n        a,\n        b,\n    )\n    return found",
        "found = max(\n    a,\n    b,\n)\nreturn found",
        "found = max([a,\n             b])\nreturn found",
        "for x in sorted([b, a], reverse=True):\n    return x",
        "return max(a, b)",
        "    return max(a, b)",
    ],
)
def test_the_body_of_a_function_continues_its_beginning(reply: str) -> None:
    forms = continuations(STUB, reply, programs_of(reply, ["larger"]))
    namespace: dict[str, object] = {}
    exec(_first_that_compiles(forms), namespace)
    larger = namespace["larger"]
    assert callable(larger)
    assert (larger(2, 1), larger(1, 2)) == (2, 2)


def _first_that_compiles(forms: tuple[str, ...]) -> str:
    for form in forms:
        try:
            compile(form, "form", "exec")
        except SyntaxError:
            continue
        return form
    raise AssertionError(forms)


def test_a_long_reply_is_searched_in_no_time() -> None:
    for reply in ("`" * 200_000, "```\n" * 50_000, "def " * 50_000, "x = 1\nprose here\n" * 20_000, " " * 200_000 + "x"):
        programs_of(reply, ["double"])
        continuations(STUB, reply, ())
