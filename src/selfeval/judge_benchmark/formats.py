"""Formats of public data sets of labelled pairs, as their repositories publish them, and the user's own format.

A data set is read from files that the user has downloaded: nothing is fetched here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfeval.errors import DataError, InputError
from selfeval.judge_benchmark.pairs import LABELS, Label, LabelledPair, in_random_order, merged
from selfeval.judge_benchmark.rows import Row, read_rows
from selfeval.texts import nearest

__all__ = ["FORMATS", "OWN", "Format", "read_data", "read_pairs"]


@dataclass(frozen=True)
class Format:
    """A format of labelled pairs.

    Attributes:
        name: value of `--data`.
        parse: returns the pairs of a row.
        example: a valid row, shortened, for messages.
        files: patterns of its files in a folder.
        merges: whether rows with the same question and replies are the labels of several annotators. Default: False.
    """

    name: str
    parse: Callable[[Row], Iterator[LabelledPair]]
    example: str
    files: tuple[str, ...]
    merges: bool = False


# -- public data sets ---------------------------------------------------------------------------------------------------


def _llmbar(row: Row) -> Iterator[LabelledPair]:
    label: Label = row.one_of("label", {1: "first", 2: "second"})
    yield LabelledPair(
        row.text("input", empty=False), row.text("output_1"), row.text("output_2"), (label,), _llmbar_subset(row.path)
    )


def _llmbar_subset(path: Path) -> str:
    """Return `Natural`, `Adversarial/GPTInst`, ... of the published folders; else the name of the file."""
    stem = path.name.partition(".")[0]
    if stem != "dataset":
        return stem.removeprefix("llmbar_")
    folder = path.parent
    return f"{folder.parent.name}/{folder.name}" if folder.parent.name == "Adversarial" else folder.name


def _pandalm(row: Row) -> Iterator[LabelledPair]:
    meanings: Mapping[Any, Label] = {0: "tie", 1: "first", 2: "second"}
    labels = tuple(row.one_of(f"annotator{number}", meanings) for number in (1, 2, 3))
    # One published instruction is blank, and its task is in the input.
    question = "\n\n".join(text for text in (row.text("instruction"), row.text("input")) if text.strip())
    if not question:
        row.refuse("instruction", "a text that is not empty")
    yield LabelledPair(question, _response(row, "response1"), _response(row, "response2"), labels, row.text("cmp_key"))


def _response(row: Row, name: str) -> str:
    # Six replies that say True are JSON booleans in the published file.
    return str(row.values[name]) if isinstance(row.values.get(name), bool) else row.text(name)


def _mtbench(row: Row) -> Iterator[LabelledPair]:
    meanings: Mapping[Any, Label] = {"model_a": "first", "model_b": "second", "tie": "tie", "tie (inconsistent)": "tie"}
    turns = row.one_of("turn", {1: 1, 2: 2})
    (question, first), (_, second) = (_conversation(row, f"conversation_{side}", turns) for side in "ab")
    yield LabelledPair(question, first, second, (row.one_of("winner", meanings),), f"turn {turns}")


def _conversation(row: Row, name: str, turns: int) -> tuple[str, str]:
    """Return the user's turns and the assistant's turns up to the judged one, each as one text.

    The conversations of both sides differ from the first reply on, so the second turn cannot be shown as a shared conversation.
    """
    messages = row.values.get(name)
    roles = ["user", "assistant"] * turns
    shown = messages[: len(roles)] if isinstance(messages, list) else []
    is_valid = all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in shown)
    if not is_valid or [message.get("role") for message in shown] != roles:
        row.refuse(name, f"a list of at least {len(roles)} messages, user and assistant in turn, each with a content")
    texts = [str(message["content"]) for message in shown]
    return "\n\n".join(texts[0::2]), "\n\n".join(texts[1::2])


def _rewardbench(row: Row) -> Iterator[LabelledPair]:
    yield in_random_order(row.text("prompt", empty=False), row.text("chosen"), row.text("rejected"), row.text("subset"))


def _judgebench(row: Row) -> Iterator[LabelledPair]:
    label: Label = row.one_of("label", {"A>B": "first", "B>A": "second", "A=B": "tie"})
    replies = row.text("response_A"), row.text("response_B")
    yield LabelledPair(row.text("question", empty=False), *replies, (label,), row.text("source"))


_SOLVERS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")


def _gsm8k_solutions(row: Row) -> Iterator[LabelledPair]:
    """Return every pair of a right and a wrong solution; the subset is the model with the right one."""
    question = row.text("question", empty=False)
    solutions = {name: _solution(row, name) for name in _SOLVERS}
    right = [name for name, (is_correct, _) in solutions.items() if is_correct]
    for good in right:
        for bad in (name for name in _SOLVERS if name not in right):
            yield in_random_order(question, solutions[good][1], solutions[bad][1], good)


def _solution(row: Row, name: str) -> tuple[bool, str]:
    value = row.values.get(name)
    if not isinstance(value, dict) or type(value.get("is_correct")) is not bool or not isinstance(value.get("solution"), str):
        row.refuse(name, 'an object with "is_correct" (true or false) and "solution" (a text)')
    return value["is_correct"], value["solution"]


# -- the user's own pairs -----------------------------------------------------------------------------------------------


def _own(row: Row) -> Iterator[LabelledPair]:
    question, subset = row.text("question", empty=False), row.text("subset") if "subset" in row.values else ""
    if "chosen" in row.values or "rejected" in row.values:
        yield in_random_order(question, row.text("chosen", empty=False), row.text("rejected", empty=False), subset)
        return
    # A model may have written nothing; `selfeval judge-check --write` writes such pairs too.
    replies = row.text("first"), row.text("second")
    # null: a line of `selfeval judge-check --write` that nobody has labelled yet.
    is_open = "label" in row.values and row.values["label"] is None
    labels = () if is_open else (row.one_of("label", {label: label for label in LABELS}),)
    yield LabelledPair(question, *replies, labels, subset)


OWN = Format(
    "FILE",
    _own,
    '{"question": "...", "chosen": "...", "rejected": "..."} or {"question": "...", "first": "...", "second": "...", '
    '"label": "first"} (or "second", "tie"), with an optional "subset"',
    ("*.jsonl*", "*.json*"),
    merges=True,
)
"""The user's own pairs."""


FORMATS: Mapping[str, Format] = {
    one.name: one
    for one in (
        Format(
            "llmbar",
            _llmbar,
            '{"input": "...", "output_1": "...", "output_2": "...", "label": 1}',
            ("dataset.json*", "llmbar*.json*"),
        ),
        Format(
            "pandalm",
            _pandalm,
            '{"cmp_key": "...", "instruction": "...", "input": "", "response1": "...", "response2": "...", "annotator1": 1, '
            '"annotator2": 0, "annotator3": 2}',
            ("testset-v1.json*", "pandalm_testset-v1.json*"),
        ),
        Format(
            "mtbench",
            _mtbench,
            '{"conversation_a": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}, ...], '
            '"conversation_b": [...], "turn": 1, "winner": "model_a"}',
            ("*human*.json*",),
            merges=True,
        ),
        Format(
            "rewardbench",
            _rewardbench,
            '{"prompt": "...", "chosen": "...", "rejected": "...", "subset": "..."}',
            ("*.json*",),
        ),
        Format(
            "judgebench",
            _judgebench,
            '{"source": "...", "question": "...", "response_A": "...", "response_B": "...", "label": "A>B"}',
            ("*.json*",),
        ),
        Format(
            "gsm8k-solutions",
            _gsm8k_solutions,
            '{"question": "...", "6b_finetuning": {"is_correct": false, "solution": "..."}, "6b_verification": {...}, '
            '"175b_finetuning": {...}, "175b_verification": {...}}',
            ("*example_model_solutions*.json*",),
        ),
    )
}
"""Public data sets by name."""


# -- reading ------------------------------------------------------------------------------------------------------------


def read_data(data: str, files: Sequence[Path] = ()) -> list[LabelledPair]:
    """Read labelled pairs: a public data set from its files, or the user's own pairs.

    Args:
        data: name of a public data set, or the path of a file of the user's own pairs.
        files: files of the public data set, or folders that contain them. Not for the user's own file.

    Raises:
        InputError: there is no such data set or file, or the files are missing or not needed.
        DataError: a file or a row cannot be read.
    """
    if data in FORMATS:
        if not files:
            raise InputError(
                f"--data {data} needs its file, because nothing is downloaded: pass --file PATH, the file or a folder with "
                f"{' or '.join(FORMATS[data].files)}"
            )
        return read_pairs(FORMATS[data], [found for path in files for found in _files_of(FORMATS[data], path)])
    if not Path(data).exists():
        raise InputError(f'there is no data set and no file "{data}"{nearest(data, list(FORMATS))}')
    if files:
        raise InputError(f"--data {data} is a file of pairs already; remove --file, or pass one of: {', '.join(FORMATS)}")
    return read_pairs(OWN, _files_of(OWN, Path(data)))


def read_pairs(kind: Format, files: Sequence[Path]) -> list[LabelledPair]:
    """Read the pairs of files in a format.

    Raises:
        DataError: a file or a row cannot be read, or there is no pair.
    """
    pairs = [pair for path in files for row in read_rows(path, kind.example) for pair in kind.parse(row)]
    if not pairs:
        raise DataError(f"{', '.join(map(str, files))}: no row has a pair of replies; a valid row is {kind.example}")
    return merged(pairs) if kind.merges else pairs


def _files_of(kind: Format, path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = sorted({file for pattern in kind.files for file in path.rglob(pattern) if file.is_file()})
    if not found:
        raise DataError(f"folder {path} has no file of {kind.name} ({' or '.join(kind.files)}); pass the file itself")
    return found
