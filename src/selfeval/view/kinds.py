"""Columns, searched text and filters of each kind of record in the index of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from selfeval.judging.choices import is_consistent
from selfeval.records import PairwiseEvidence, Split, Unreadable, Verdict, VerdictState

__all__ = ["KINDS", "Choice", "Exact", "Filter", "Kind", "Range", "Row", "Tags", "Value", "right_by_gold"]

Row = Mapping[str, Any]
"""A record as in its file."""
Value = str | int | float | None
"""A value in the index."""


@dataclass(frozen=True)
class Choice:
    """A filter by one value of a column, or by a group of values.

    Attributes:
        name: parameter in the address, and column.
        label: label in the form.
        words: names of values, where they differ from the value itself.
        groups: values of the parameter that stand for several values of the column: name, and these values.
        through: kind of record that has the column, reached by the id of the question. Default: the record itself.
    """

    name: str
    label: str
    words: Mapping[str, str]
    groups: Mapping[str, tuple[str, tuple[str, ...]]]
    through: str = ""


@dataclass(frozen=True)
class Tags:
    """A filter by one of several words that a column has, separated and surrounded by spaces.

    Attributes:
        name: parameter in the address, and column.
        label: label in the form.
        words: names of the possible values.
    """

    name: str
    label: str
    words: Mapping[str, str]


@dataclass(frozen=True)
class Range:
    """A filter by a smallest and a largest number: the parameters are the name of the column with `_min` and `_max`."""

    name: str
    label: str


@dataclass(frozen=True)
class Exact:
    """A filter by one value that is typed in."""

    name: str
    label: str
    is_number: bool = False


Filter = Choice | Tags | Range | Exact


@dataclass(frozen=True)
class Kind:
    """A kind of record in the index.

    Attributes:
        name: name, as in `selfeval.runs.reader.KINDS`.
        title: heading of its page.
        explanation: one sentence about the records.
        columns: columns to filter and sort by, each computed from a record.
        text: the text of a record that is searched.
        filters: filters of the page.
        mentions: columns with the id of another record whose text is searched too, and its kind.
    """

    name: str
    title: str
    explanation: str
    columns: Mapping[str, Callable[[Row], Value]]
    text: Callable[[Row], str]
    filters: tuple[Filter, ...]
    mentions: Mapping[str, str]


def _choice(name: str, label: str, through: str = "", **words: str) -> Choice:
    return Choice(name, label, words, {}, through)


_SPLIT = _choice("split", "Split", train="training", test="test")
_OF_QUESTION = Exact("question", "Question id")
_IN_QUESTION = {"question": "questions"}
_WORDS = {"yes": "yes", "no": "no"}
_RIGHT = {"right": "right", "wrong": "wrong"}
_KNOWN = {"known": ("right or wrong", ("right", "wrong"))}


def _yes(value: Any) -> Value:
    return None if value is None else "yes" if value else "no"


def _right(value: Any) -> Value:
    return None if value is None else "right" if value else "wrong"


def _field(name: str) -> Callable[[Row], Value]:
    def read(row: Row) -> Value:
        value: Value = row[name]
        return value

    return read


def _fields(*names: str) -> dict[str, Callable[[Row], Value]]:
    return {name: _field(name) for name in names}


# A question is found by its text too: dropped records and seeds have no id of it. The hash is that of this process, as is the
# index.
def _hash(name: str) -> Callable[[Row], Value]:
    return lambda row: hash(row[name])


# -- verdicts -----------------------------------------------------------------------------------------------------------


def _confidence(row: Row) -> Value:
    probability = row["probability"]
    return None if probability is None else max(probability, 1.0 - probability)


def _members(row: Row) -> list[Row]:
    """Return the evidence of each judge of a verdict."""
    evidence = row["evidence"] or {}
    return [member or {} for member in evidence.get("members", [evidence])]


def _tags(row: Row) -> Value:
    found = {cause for member in _members(row) for cause in member.get("causes") or () if cause}
    return f" {' '.join(sorted(found))} " if found else None


def _consistent(row: Row) -> Value:
    evidence = row["evidence"] or {}
    if "in_order" not in evidence:
        return None
    # Without its texts: `from_json` checks every field, which takes ten times as long for 100,000 verdicts.
    pairwise = PairwiseEvidence(evidence["in_order"], evidence["swapped"], tuple(evidence["ties"]), ("", ""))
    return _yes(is_consistent(Verdict("", Split.TRAIN, "", "", VerdictState.KEPT, None, None, pairwise)))


def _mean(name: str) -> Callable[[Row], Value]:
    """Return the mean of the known values of a list in the evidence."""

    def read(row: Row) -> Value:
        known = [value for value in (row["evidence"] or {}).get(name, ()) if value is not None]
        return sum(known) / len(known) if known else None

    return read


def _outputs(row: Row) -> str:
    return "\n".join(text for member in _members(row) for text in member.get("raw_output") or ())


_CAUSES: dict[str, str] = {
    Unreadable.CUT: "cut off before a verdict",
    Unreadable.LOOP: "cut off in a loop",
    Unreadable.LABEL_MASS: "improbable labels",
    Unreadable.NO_ROOM: "no room in the context",
    Unreadable.NO_LEAD: "ended without a verdict",
    Unreadable.NO_ANSWER: "vote without an answer",
    Unreadable.TRUNCATED: "cut off and read nevertheless",
    Unreadable.REFUSED: "refused to judge",
}
_STATES = _choice("state", "State of the verdict")

# -- test pairs and comparisons -----------------------------------------------------------------------------------------


def right_by_gold(first: bool | None, second: bool | None, margin: float) -> bool | None:
    """Return whether the evaluator prefers the reply that is right by gold; None unless exactly one is.

    Args:
        first, second: whether each reply is right by gold; None: not known.
        margin: evaluator score of the first reply minus that of the second.
    """
    if first is None or second is None or first == second:
        return None
    return margin != 0 and (margin > 0) == first


def _against_judge(row: Row) -> Value:
    """Return whether the evaluator agrees with the judge; None unless the judge's verdict was kept and prefers a reply."""
    probability = row["probability"]
    if row["state"] != VerdictState.KEPT or probability is None or probability == 0.5:
        return None
    return _right(row["margin"] != 0 and (row["margin"] > 0) == (probability > 0.5))


_CHANGES = {
    (False, True): "gained",
    (True, False): "lost",
    (True, True): "right",
    (False, False): "wrong",
}


def _change(row: Row) -> Value:
    return _CHANGES.get((row["gold_before"], row["gold_after"]))


_CHANGE_WORDS = {
    "gained": "wrong, then right",
    "lost": "right, then wrong",
    "right": "right both times",
    "wrong": "wrong both times",
}
_BOTH_KNOWN = {"known": ("gold knows both replies", tuple(_CHANGE_WORDS))}
_OUTCOMES = {"win": "win", "tie": "tie", "loss": "loss", "unparsable": "unparsable"}
_DECIDED = {
    "decided": ("win, tie or loss", ("win", "tie", "loss")),
    "decisive": ("win or loss", ("win", "loss")),
}


KINDS: Mapping[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind(
            "seeds",
            "Seeds",
            "The questions that the run started from.",
            {"same": _hash("question"), "reply": lambda row: _yes(row["reply"] is not None)},
            lambda row: "\n".join(text for text in (row["question"], row["reply"]) if text),
            (_choice("reply", "With a reply", **_WORDS),),
            {},
        ),
        Kind(
            "questions",
            "Questions",
            "Questions of training and of the test; test questions are never trained on.",
            {
                "question": _field("id"),
                "same": _hash("text"),
                **_fields("split", "source"),
                "length": lambda row: len(row["text"]),
            },
            _field("text"),  # type: ignore[arg-type]
            (
                _SPLIT,
                _choice("source", "Source", self="written by the model", seed="a seed", file="from a file"),
                _OF_QUESTION,
            ),
            {},
        ),
        Kind(
            "replies",
            "Replies",
            "Replies that were sampled to each question, before the training of the policy.",
            {
                "question": _field("question_id"),
                "reply": _field("id"),
                "method": _field("sampling_method"),
                "finished": lambda row: _yes(row["finished"]),
                **_fields("temperature", "logprob"),
                "tokens": lambda row: len(row["ids"]),
            },
            lambda row: "\n".join(text for text in (row["text"], row.get("thinking")) if text),
            (
                _choice("split", "Split", "questions", train="training", test="test"),
                Choice(
                    "method",
                    "Sampled by",
                    {"sample": "sampling", "beam": "beam search", "file": "from a file"},
                    {"model": ("the model, any method", ("sample", "beam"))},
                ),
                _choice("finished", "Finished", yes="yes", no="no, cut off"),
                Range("tokens", "Tokens"),
                Range("logprob", "Log-prob, nats"),
                _OF_QUESTION,
            ),
            _IN_QUESTION,
        ),
        Kind(
            "reference_answers",
            "Reference answers",
            "The model's greedy reply to each question, which evaluator and critic may read before a reply.",
            {"question": _field("question_id"), "length": lambda row: len(row["text"])},
            _field("text"),  # type: ignore[arg-type]
            (_choice("split", "Split", "questions", train="training", test="test"), _OF_QUESTION),
            _IN_QUESTION,
        ),
        Kind(
            "verdicts",
            "Verdicts",
            "The judge's verdict on each pair of replies; only kept verdicts become training pairs.",
            {
                "question": _field("question_id"),
                **_fields("split", "first", "second", "state", "probability", "tie"),
                "confidence": _confidence,
                "cause": _tags,
                "consistent": _consistent,
                "share": lambda row: (row["evidence"] or {}).get("share"),
                "entropy": _mean("vote_entropies"),
                "grade": _mean("grades"),
            },
            _outputs,
            (
                _SPLIT,
                _choice("state", "State"),
                Tags("cause", "Cause", _CAUSES),
                Choice("consistent", "Same in both orders", _WORDS, {"known": ("yes or no", ("yes", "no"))}),
                Range("confidence", "Confidence"),
                Range("tie", "Tie"),
                Range("share", "Share of votes"),
                Range("entropy", "Entropy of votes"),
                Range("grade", "Mean grade"),
                _OF_QUESTION,
            ),
            {"question": "questions", "first": "replies", "second": "replies"},
        ),
        Kind(
            "pairs",
            "Pairs",
            "Kept preferences: pairs of training questions train the evaluator, pairs of test questions measure it.",
            {"question": _field("question_id"), **_fields("split", "confidence")},
            lambda row: f"{row['chosen']}\n{row['rejected']}",
            (_SPLIT, Range("confidence", "Confidence"), _OF_QUESTION),
            _IN_QUESTION,
        ),
        Kind(
            "dropped",
            "Dropped",
            "Everything that a stage left out, with the reason.",
            {**_fields("stage", "reason"), "same": _hash("text"), "length": lambda row: len(row["text"])},
            lambda row: "\n".join([row["text"], *_texts(row.get("detail") or {})]),
            (_choice("stage", "Stage"), _choice("reason", "Reason")),
            {},
        ),
        Kind(
            "scored",
            "Test pairs",
            "Judged pairs of test questions with the evaluator's margin: score of the first reply minus that of the second.",
            {
                "question": _field("question_id"),
                **_fields("first", "second", "state", "probability", "margin", "disagreement"),
                "certainty": lambda row: abs(row["margin"]),
                "by_gold": lambda row: _right(right_by_gold(row["gold_first"], row["gold_second"], row["margin"])),
                "by_judge": _against_judge,
            },
            lambda row: "",
            (
                Choice("by_gold", "Evaluator by gold", _RIGHT, _KNOWN),
                Choice("by_judge", "Evaluator by judge", _RIGHT, _KNOWN),
                _STATES,
                Range("certainty", "Size of the margin"),
                Range("disagreement", "Disagreement"),
                _OF_QUESTION,
            ),
            {"question": "questions", "first": "replies", "second": "replies"},
        ),
        Kind(
            "compared",
            "Before and after",
            "Replies to test questions before and after training, compared by the referee.",
            {
                "question": _field("question_id"),
                **_fields("before", "outcome", "probability", "score_before", "score_after", "kl"),
                "gold_before": lambda row: _right(row["gold_before"]),
                "gold_after": lambda row: _right(row["gold_after"]),
                "change": _change,
                "gain": lambda row: row["score_after"] - row["score_before"],
                **_fields("tokens_before", "tokens_after"),
                "finished_before": lambda row: _yes(row["finished_before"]),
                "finished_after": lambda row: _yes(row["finished_after"]),
            },
            _field("after"),  # type: ignore[arg-type]
            (
                Choice("outcome", "Outcome", _OUTCOMES, _DECIDED),
                Choice("gold_before", "Gold before", _RIGHT, _KNOWN),
                Choice("gold_after", "Gold after", _RIGHT, _KNOWN),
                Choice("change", "Gold, both", _CHANGE_WORDS, _BOTH_KNOWN),
                _choice("finished_before", "Finished before", **_WORDS),
                _choice("finished_after", "Finished after", **_WORDS),
                Range("gain", "Gain in score"),
                Range("kl", "KL, nats"),
                _OF_QUESTION,
            ),
            {"question": "questions", "before": "replies"},
        ),
        Kind(
            "sampled",
            "Training samples",
            "Replies that the policy wrote while it was trained, with the evaluator's score.",
            {
                "question": _field("question_id"),
                **_fields("step", "score"),
                "finished": lambda row: _yes(row["finished"]),
                "length": lambda row: len(row["text"]),
            },
            lambda row: "\n".join(text for text in (row["text"], row.get("thinking")) if text),
            (
                Exact("step", "Step", is_number=True),
                Range("score", "Score"),
                _choice("finished", "Finished", **_WORDS),
                _OF_QUESTION,
            ),
            _IN_QUESTION,
        ),
    )
}
"""All kinds by name, in the order of the stages."""


def _texts(detail: Row) -> list[str]:
    """Return the texts in the details of a dropped record."""
    found = [part for value in detail.values() for part in (value if isinstance(value, list) else [value])]
    return [part for part in found if isinstance(part, str)]
