"""The policies to compare: those of runs, their base models, and files of replies; and the questions that they share."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from selfeval.errors import DataError, InputError, RunFolderError
from selfeval.judging.reading import thinking_of
from selfeval.records import Question, Reply
from selfeval.runs.policy import Policy
from selfeval.runs.reader import RunReader, round_folder
from selfeval.stages.given import read_questions, read_replies
from selfeval.store import content_hash, fingerprint
from selfeval.store.remote.places import local_run

__all__ = ["BASE_SUFFIX", "Questions", "Source", "read_source", "shared_questions"]

BASE_SUFFIX = "@base"
"""Suffix of a run folder that names the unchanged base model of the run."""


@dataclass(frozen=True)
class Source:
    """Where the replies of a policy come from.

    Attributes:
        name: as the user wrote it; it names the policy in all figures.
        kind: `policy` or `base` of a run, or `file`.
        path: absolute path of the run folder, or of the file.
        replies: replies that are known by question: all of a file, and those that a run keeps of its base.
        questions: test questions of the run, or the questions of the file.
        trained: texts of the questions that the policy was trained on.
        key: fingerprint of the policy and its sampling settings; empty for a file.
    """

    name: str
    kind: Literal["policy", "base", "file"]
    path: Path
    questions: tuple[Question, ...]
    replies: dict[str, tuple[str, bool]]
    trained: frozenset[str] = frozenset()
    key: str = ""


@dataclass(frozen=True)
class Questions:
    """The questions of a comparison.

    Attributes:
        used: the questions.
        common: number of questions that all policies can be compared on, before `limit`.
        trained: number of questions that are left out, because a policy was trained on them.
        missing: number of questions that are left out, because a file has no reply to them.
    """

    used: tuple[Question, ...]
    common: int
    trained: int = 0
    missing: int = 0


def read_source(name: str) -> Source:
    """Read what a name on the command line refers to, without loading a model.

    Args:
        name: folder or URL of a run, `RUN@base`, or a file of replies.

    Raises:
        InputError: it is none of these.
        RunFolderError: the run has no policy yet, or one of its files is damaged.
        DataError: the file cannot be read, or has several replies to a question.
    """
    run, is_base = name.removesuffix(BASE_SUFFIX), name.endswith(BASE_SUFFIX)
    path = Path(os.path.abspath(local_run(run)))
    if path.is_dir():
        return _of_run(name, path, is_base=is_base)
    if is_base or not path.exists():
        raise InputError(
            f"{name} is neither a run folder nor a file of replies; pass RUN, RUN{BASE_SUFFIX} for its base model, or a file "
            'of JSON lines {"question": "...", "reply": "..."}'
        )
    rows = read_replies(path)
    # A reply of a file is taken to be complete unless its thinking has no end: nothing else shows that it was cut off.
    replies = {question.text: _without_thinking(reply) for question, reply in rows}
    return Source(name, "file", path, tuple(question for question, _ in rows), replies)


def _without_thinking(reply: str) -> tuple[str, bool]:
    """Return a reply without its thinking, as those of runs are compared, and whether the thinking has an end."""
    end = thinking_of(reply).end
    return ("", False) if end is None else (reply[end:].lstrip() if end else reply, True)


def _of_run(name: str, path: Path, *, is_base: bool) -> Source:
    reader = RunReader(path)
    if not reader.is_finished("questions"):
        raise RunFolderError(f"{path} has not finished its questions; finish the run with selfeval run --output {path}")
    questions: list[Question] = reader.records("questions", split="test")
    sampling = [reader.config.model_dump(mode="json"), reader.run.get("date")]
    if is_base:
        return Source(name, "base", path, tuple(questions), _base_replies(reader), _trained(reader), fingerprint(sampling))
    Policy.check(reader)
    files = sorted(file for file in reader.roles_folder.rglob("*") if file.is_file())
    # By content, so a run that was moved or copied keeps its replies.
    weights = [(file.relative_to(path).as_posix(), content_hash(file)) for file in files]
    return Source(name, "policy", path, tuple(questions), {}, _trained(reader), fingerprint([sampling, weights]))


def _base_replies(reader: RunReader) -> dict[str, tuple[str, bool]]:
    """Return the base's replies that evaluation compares the policy with; none in later rounds, which start from a policy."""
    if reader.round > 1:
        return {}
    texts = {question.id: question.text for question in reader.records("questions", split="test")}
    replies: list[Reply] = reader.records("replies", split="test")
    return {texts[r.question_id]: (r.text, r.finished) for r in replies if r.id == f"{r.question_id}-r0"}


def _trained(reader: RunReader) -> frozenset[str]:
    """Return the training questions of this round and of all before it."""
    rounds = [RunReader(round_folder(reader.root, number)) for number in range(1, reader.round)] + [reader]
    return frozenset(question.text for one in rounds for question in one.records("questions", split="train"))


def shared_questions(sources: Sequence[Source], file: Path | None = None, limit: int | None = None) -> Questions:
    """Return the questions on which all policies can be compared, in the order of the first policy or of the file.

    Without a file these are the test questions of all runs to which all files have a reply. With a file they are its questions,
    except those that a policy was trained on, and those to which a file of replies has no reply.

    Args:
        sources: the policies.
        file: Optional. File of questions. Default: the common test questions.
        limit: Optional. Maximum number of questions. Default: all.

    Raises:
        DataError: no question is left; the message says why.
    """
    # The questions of a run, in whose order files may have any number of replies.
    first = next((one for one in sources if one.kind != "file"), sources[0])
    asked = first.questions if file is None else tuple(read_questions(file))
    known = [{q.text for q in one.questions} for one in sources if file is None or one.kind == "file"]
    trained = frozenset[str]().union(*(one.trained for one in sources))
    here = [q for q in asked if all(q.text in texts for texts in known)]
    common = [q for q in here if q.text not in trained]
    if not common:
        raise _none_left(sources, file, len(asked), len(here))
    # Files are not asked: what they have no reply to is missing. All other sources have or get a reply.
    of_runs = [texts for one, texts in zip(sources, known, strict=False) if file is None and one.kind != "file"]
    wanted = [q for q in asked if all(q.text in texts for texts in of_runs)] if of_runs else asked
    missing = len(wanted) - len(here)
    return Questions(tuple(common[:limit]), len(common), len(here) - len(common), missing)


def _none_left(sources: Sequence[Source], file: Path | None, asked: int, here: int) -> DataError:
    numbers = ", ".join(f"{one.name} has {len(one.questions)}" for one in sources)
    if here:
        return DataError(
            f"a policy was trained on each of the {here} common questions, so they are no test; pass other --questions FILE"
        )
    if file is not None:
        return DataError(f"none of the {asked} test questions of {file} has a reply in every file of replies; pass other files")
    return DataError(
        f"the policies have no test question in common ({numbers}); runs that write their own questions share them only if "
        "model, seeds and seed are equal: pass --questions FILE with questions that none was trained on"
    )
