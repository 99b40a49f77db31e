"""The records that stages exchange: frozen dataclasses, one JSON object per line.

Pairs have the columns `prompt`, `chosen` and `rejected`, which HF `datasets`, TRL and LLaMA-Factory read directly.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache, partial
from typing import Any, TypeVar

__all__ = [
    "AgreementEvidence",
    "CombinedEvidence",
    "ComparedReplies",
    "Drop",
    "Evidence",
    "Label",
    "LabelChoice",
    "Message",
    "Pair",
    "PairwiseEvidence",
    "PointwiseEvidence",
    "Question",
    "ReferenceAnswer",
    "Reply",
    "Sampled",
    "SampledPairwiseEvidence",
    "SampledPointwiseEvidence",
    "ScoredPair",
    "Seed",
    "Split",
    "StepLabels",
    "Unreadable",
    "Verdict",
    "VerdictState",
    "from_json",
    "to_json",
]


class Split(StrEnum):
    """Split of a question; test questions are never trained on."""

    TRAIN = "train"
    TEST = "test"


class VerdictState(StrEnum):
    """Outcome of a judged pair; only KEPT pairs become training pairs."""

    KEPT = "kept"
    TIE = "tie"
    UNSURE = "unsure"
    UNPARSABLE = "unparsable"


class Unreadable(StrEnum):
    """Cause of an output of the judge without a readable verdict: an order, a grade, or a vote without an answer.

    An output with the cause TRUNCATED has a verdict nevertheless.

    CUT: the judge's output was cut off at `verdicts.max_new_tokens` before a verdict.
    LOOP: the same, and the end of the output repeats a block of tokens.
    LABEL_MASS: the verdict labels together were less likely than `verdicts.label_mass`.
    NO_ROOM: the model's context ended before a verdict, or is too short for the prompt.
    NO_LEAD: the output ended without a verdict, and no lead could be appended to read one: the labels have none, or a server
        wrote the output.
    NO_ANSWER: a vote ended without an answer in the form of `verdicts.agreement.answer`.
    TRUNCATED: cut off like CUT, LOOP or NO_ROOM, and read after an appended lead, because `verdicts.truncated` is "force".
    REFUSED: the output is a refusal to judge.
    """

    CUT = "cut"
    LOOP = "loop"
    LABEL_MASS = "label_mass"
    NO_ROOM = "no_room"
    NO_LEAD = "no_lead"
    NO_ANSWER = "no_answer"
    TRUNCATED = "truncated"
    REFUSED = "refused"


@dataclass(frozen=True)
class Seed:
    """A seed question from the user; `extra` has all other fields of its line."""

    question: str
    reply: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Message:
    """A turn of a conversation; `role` is `system`, `user` or `assistant`."""

    role: str
    content: str


@dataclass(frozen=True)
class Question:
    """A question of the run.

    Attributes:
        text: the question; of a conversation, all turns as one text with their names.
        source: `self` (written by the model), `seed` or `file` (provided by the user).
        messages: turns of a conversation, the last of which is the user's. Default: none, `text` is the only turn.
    """

    id: str
    text: str
    split: Split
    source: str
    messages: tuple[Message, ...] = ()

    @property
    def opening(self) -> str:
        """The first user turn: a question that can stand alone, such as the examples in the prompt for new questions."""
        return next((message.content for message in self.messages if message.role == "user"), self.text)


@dataclass(frozen=True)
class Reply:
    """A sampled reply as token ids (end-of-sequence included) and as text.

    Attributes:
        sampling_method: `sample`, `beam`, or `file` (provided by the user).
        logprob: sum of the token log-probs at the sampling temperature (1 for beams), in nats.
        finished: whether it ended with an end-of-sequence token, before the token limit.
        thinking: text that the model wrote before the reply, which judge and evaluator do not read; `ids` and `logprob` are
            without it. Default: empty.
    """

    id: str
    question_id: str
    text: str
    ids: tuple[int, ...]
    sampling_method: str
    temperature: float
    top_p: float
    logprob: float
    finished: bool
    thinking: str = ""


@dataclass(frozen=True)
class ReferenceAnswer:
    """The model's own greedy reply to a question: its reference answer, which evaluator and critic may read before a reply."""

    question_id: str
    text: str


@dataclass(frozen=True)
class PairwiseEvidence:
    """How a judge that compares in both orders arrived at its verdict.

    Attributes:
        in_order, swapped: probability that `first` is better from each order alone; None if that order was unparsable.
        ties: probability that neither is better from each order alone: in order, swapped.
        raw_output: text that the judge generated in each order.
        causes: Optional. Why each order was unparsable, or TRUNCATED; None if the judge gave a verdict. Default: None, as in
            runs of earlier versions.
        label_masses: Optional. Probability of all verdict labels together in each order; None if no label was looked at.
            Default: None, as in runs of earlier versions.
    """

    in_order: float | None
    swapped: float | None
    ties: tuple[float | None, float | None]
    raw_output: tuple[str, str]
    causes: tuple[Unreadable | None, Unreadable | None] = (None, None)
    label_masses: tuple[float | None, float | None] = (None, None)


@dataclass(frozen=True)
class AgreementEvidence:
    """How a judge that holds a vote on the answer arrived at its verdict.

    Attributes:
        answers: final answers of both replies in normal form; None for a reply without one.
        votes: number of votes for each answer, most frequent first.
        share: share of the most frequent answer among all votes; None if no vote has an answer.
        share_low, share_high: Wilson's 95 % interval of the share.
        causes: why each vote has no answer; None for a vote that has one.
        raw_output: text of the first votes without an answer, at most two.
    """

    answers: tuple[str | None, str | None]
    votes: Mapping[str, int]
    share: float | None
    share_low: float | None
    share_high: float | None
    causes: tuple[Unreadable | None, ...]
    raw_output: tuple[str, ...] = ()


@dataclass(frozen=True)
class PointwiseEvidence:
    """How a judge that grades each reply alone arrived at its verdict; every field has a value per reply.

    Attributes:
        grades: expected grade, Σ p_i v_i over the grades of the rubric; None if the reply has no readable grade.
        distributions: probability of each grade, in the order of the rubric; empty if the reply has no readable grade.
        raw_output: text that the judge generated.
        causes: why the grade could not be read, or TRUNCATED; None if its judge gave one.
        label_masses: probability of all grades together before they are scaled to 1; None if no grade was looked at.
    """

    grades: tuple[float | None, float | None]
    distributions: tuple[tuple[float, ...], tuple[float, ...]]
    raw_output: tuple[str, str]
    causes: tuple[Unreadable | None, Unreadable | None]
    label_masses: tuple[float | None, float | None]


@dataclass(frozen=True)
class SampledPairwiseEvidence(PairwiseEvidence):
    """How a judge that samples votes in both orders arrived at its verdict; `raw_output` is the first vote of each order.

    Attributes:
        readable_votes: number of votes with a verdict in each order.
        vote_entropies: entropy in nats of the most likely labels of these votes; None for an order without any.
    """

    readable_votes: tuple[int, int] = (0, 0)
    vote_entropies: tuple[float | None, float | None] = (None, None)


@dataclass(frozen=True)
class SampledPointwiseEvidence(PointwiseEvidence):
    """How a judge that samples votes on the grade of each reply arrived at its verdict; `raw_output` is the first vote.

    Attributes:
        readable_votes: number of votes with a grade for each reply.
        vote_entropies: entropy in nats of the most likely grades of these votes; None for a reply without any.
    """

    readable_votes: tuple[int, int]
    vote_entropies: tuple[float | None, float | None]


MemberEvidence = PairwiseEvidence | AgreementEvidence | PointwiseEvidence | SampledPairwiseEvidence | SampledPointwiseEvidence
"""How a judge that is not combined arrived at its verdict. In a file, the fields distinguish the types."""


@dataclass(frozen=True)
class CombinedEvidence:
    """How several judges arrived at their common verdict.

    Attributes:
        judges: names of the judges; every other field has a value per judge.
        probabilities: probability that `first` is better; None for a judge without a verdict.
        ties: probability that neither is better; None without a verdict, or if the judge does not estimate it.
        votes: 1 for `first`, -1 for `second`, 0 if the judge abstains.
        accuracies: estimated probability that a vote of the judge is right, from which its weight is computed.
        members: how the judge arrived at its verdict.
    """

    judges: tuple[str, ...]
    probabilities: tuple[float | None, ...]
    ties: tuple[float | None, ...]
    votes: tuple[int, ...]
    accuracies: tuple[float, ...]
    members: tuple[MemberEvidence | None, ...]

    @property
    def causes(self) -> tuple[Unreadable | None, ...]:
        """Causes of the unreadable outputs of all judges."""
        return tuple(cause for member in self.members if member is not None for cause in member.causes)

    @property
    def raw_output(self) -> tuple[str, ...]:
        """Texts that the judges generated."""
        return tuple(text for member in self.members if member is not None for text in member.raw_output)


Evidence = MemberEvidence | CombinedEvidence
"""How a judge arrived at its verdict. In a file, the fields distinguish the types."""


@dataclass(frozen=True)
class Verdict:
    """The judge's verdict on two replies.

    Attributes:
        first, second: reply ids.
        probability: probability that `first` is better; None if unparsable.
        tie: probability that neither is better; None if unparsable, or if the judge does not estimate it.
        evidence: how the judge arrived at it; None for a pair from a file, or if the judge gives none.
    """

    question_id: str
    split: Split
    first: str
    second: str
    state: VerdictState
    probability: float | None
    tie: float | None
    evidence: Evidence | None

    @property
    def confidence(self) -> float:
        """Probability of the more likely reply; 0.5 if there is no verdict."""
        return 0.5 if self.probability is None else max(self.probability, 1.0 - self.probability)


@dataclass(frozen=True)
class StepLabels:
    """The steps of a reply, and how many of their completions reach the answer of the majority.

    Attributes:
        question_id, reply_id: the question and the reply.
        reference: answer of most replies that were sampled to the question, in normal form.
        ends: number of tokens of the reply up to the end of each step.
        reached: number of completions of each step with the reference answer; all or none for the last step, which ends the
            reply.
        completions: number of completions of each step.
    """

    question_id: str
    reply_id: str
    reference: str
    ends: tuple[int, ...]
    reached: tuple[int, ...]
    completions: int

    @property
    def shares(self) -> tuple[float, ...]:
        """Share of the completions of each step with the reference answer."""
        return tuple(count / self.completions for count in self.reached)


@dataclass(frozen=True)
class Pair:
    """A kept preference; `confidence` is the judge's probability that `chosen` is better."""

    question_id: str
    prompt: str
    chosen: str
    rejected: str
    confidence: float
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]
    split: Split


@dataclass(frozen=True)
class Sampled:
    """A reply sampled from the policy in one iteration of its training; `thinking` is what it wrote before the reply."""

    step: int
    question_id: str
    text: str
    score: float
    finished: bool
    thinking: str = ""


@dataclass(frozen=True)
class ScoredPair:
    """A judged pair of a test question with the scores of the evaluation.

    Attributes:
        first, second: reply ids.
        state: state of the judge's verdict.
        probability: the judge's probability that `first` is better; None if unparsable.
        margin: evaluator score of `first` minus that of `second`.
        disagreement: standard deviation of the margin over the members of an ensemble; 0 for a single evaluator.
        gold_first, gold_second: whether each reply is right by gold; None without gold, or if it has no answer.
    """

    question_id: str
    first: str
    second: str
    state: VerdictState
    probability: float | None
    margin: float
    disagreement: float
    gold_first: bool | None
    gold_second: bool | None


class LabelChoice(StrEnum):
    """Answer of a person who compares two replies; `first` and `second` are positions as shown.

    SKIP: the person cannot or does not want to decide.
    UNDO: the person takes back the previous answer to this pair.
    """

    FIRST = "first"
    SECOND = "second"
    TIE = "tie"
    SKIP = "skip"
    UNDO = "undo"


@dataclass(frozen=True)
class Label:
    """A person's answer to which of two replies is better: a line of labels.jsonl.

    A later answer of the same rater to the same pair replaces the earlier one; both lines are kept.

    Attributes:
        first, second: reply ids, in the order in which the replies were shown.
        choice: the answer.
        rater: name of the person.
        time: when it was given: ISO 8601, UTC.
        for_training: whether the pair may be trained on; then it is a pair of a training question.
        texts: fingerprint of the question and both replies. The label counts as long as the run has these texts.
        queue: fingerprint of the order in which the pairs were shown. Figures use only labels given in the order that the run
            has now. Default: empty, for labels for training.
    """

    question_id: str
    first: str
    second: str
    choice: LabelChoice
    rater: str
    time: str
    for_training: bool
    texts: str
    queue: str = ""


@dataclass(frozen=True)
class ComparedReplies:
    """The replies to a test question before and after training, compared by the referee.

    Attributes:
        before: id of the reply before training.
        after: text of the reply after training.
        outcome: `win`, `tie`, `loss` or `unparsable`, for the reply after training.
        probability: the referee's probability that the reply after training is better; None if unparsable.
        score_before, score_after: evaluator scores.
        gold_before, gold_after: whether each reply is right by gold; None without gold, or if it has no answer.
        tokens_before, tokens_after: number of tokens.
        finished_before, finished_after: whether each reply ended before the token limit.
        kl: log-ratio of the reply after training, policy to initial policy, in nats.
    """

    question_id: str
    before: str
    after: str
    outcome: str
    probability: float | None
    score_before: float
    score_after: float
    gold_before: bool | None
    gold_after: bool | None
    tokens_before: int
    tokens_after: int
    finished_before: bool
    finished_after: bool
    kl: float


@dataclass(frozen=True)
class Drop:
    """A dropped item of a stage, and the reason."""

    stage: str
    reason: str
    text: str
    detail: Mapping[str, Any] = field(default_factory=dict)


R = TypeVar("R")


def to_json(record: Any) -> dict[str, Any]:
    """Return the record as a JSON-ready dict (tuples become lists, enums their values)."""
    return dataclasses.asdict(record)


def from_json(kind: type[R], values: Mapping[str, Any]) -> R:
    """Return the record of type `kind` from the output of `to_json`.

    Raises:
        TypeError: a field is missing, unknown, or of another type.
        ValueError: a value is not allowed, for example an integer of more than 64 bits.
    """
    restorers = _restorers(typing.cast(type, kind))
    return kind(**{name: restorers[name](value) if name in restorers else value for name, value in dict(values).items()})


# Resolving a type takes longer than reading a record, so what follows from it is computed once.
@cache
def _hints(kind: type) -> dict[str, Any]:
    """Return the types of the fields."""
    return typing.get_type_hints(kind)


@cache
def _restorers(kind: type) -> dict[str, Callable[[Any], Any]]:
    """Return the function that restores each field."""
    return {name: _restorer(hint) for name, hint in _hints(kind).items()}


@cache
def _restorer(hint: Any) -> Callable[[Any], Any]:
    """Return the function that restores a value of a type."""
    if enum := _enum_in(hint):
        return enum if enum is hint else lambda value: None if value is None else enum(value)
    if records := _records_in(hint):
        return partial(_nested, records, _is_optional(hint) and type(None) in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return partial(_restored_tuple, typing.get_args(hint))
    kinds = typing.get_args(hint) if _is_optional(hint) else (hint,)
    # Integers are not among them: their size is checked.
    at_once = {plain for kind in kinds for plain in _PLAIN.get(kind, ())} - {int}
    return lambda value: value if type(value) in at_once else _checked(kinds, value)


def _restored_tuple(kinds: tuple[Any, ...], value: Any) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise TypeError(f"{_shown(value)} where a list is expected")
    if kinds[1:] == (...,):
        if kinds[0] is int and set(map(type, value)) <= {int} and max(map(abs, value), default=0) < 2**63:
            return tuple(value)  # token ids are not checked one by one: that takes ten times as long as reading the record
        return tuple(map(_restorer(kinds[0]), value))
    return tuple(_restorer(kind)(part) for kind, part in zip(kinds, value, strict=True))


def _nested(records: tuple[type, ...], optional: bool, value: Any) -> Any:
    if value is None and optional:
        return None
    if not isinstance(value, dict):
        raise TypeError(f"{_shown(value)} where a {' or '.join(record.__name__ for record in records)} is expected")
    # No field names the type: it is the one that has all of these fields. If there is none, the first one names a wrong field.
    return from_json(next((record for record in records if value.keys() <= _hints(record).keys()), records[0]), value)


def _enum_in(hint: Any) -> type[StrEnum] | None:
    """Return the enumeration that a field holds, optional or not; None if it holds none."""
    kinds = (hint, *typing.get_args(hint)) if _is_optional(hint) else (hint,)
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, StrEnum)), None)


def _is_optional(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _records_in(hint: Any) -> tuple[type, ...]:
    """Return the record types that a field holds, optional or not; empty if it holds none."""
    kinds = typing.get_args(hint) if _is_optional(hint) else (hint,)
    return tuple(kind for kind in kinds if isinstance(kind, type) and dataclasses.is_dataclass(kind))


_PLAIN = {str: (str,), bool: (bool,), int: (int,), float: (int, float), type(None): (type(None),)}


def _checked(kinds: tuple[Any, ...], value: Any) -> Any:
    """Return the value if it has one of the types."""
    if type(value) is int and not -(2**63) <= value < 2**63:
        raise ValueError(f"{_shown(value)} does not fit in 64 bits")
    if not any(_is_of(kind, value) for kind in kinds):
        raise TypeError(f"{_shown(value)} where {' or '.join(getattr(k, '__name__', str(k)) for k in kinds)} is expected")
    return value


def _is_of(kind: Any, value: Any) -> bool:
    if kind in _PLAIN:
        return type(value) in _PLAIN[kind]
    return typing.get_origin(kind) is not Mapping or isinstance(value, dict)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
