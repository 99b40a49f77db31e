from __future__ import annotations

import json
from typing import Any

import pytest

from selfeval.records import (
    AgreementEvidence,
    CombinedEvidence,
    ComparedReplies,
    Drop,
    Label,
    LabelChoice,
    Message,
    Pair,
    PairwiseEvidence,
    PointwiseEvidence,
    Question,
    ReferenceAnswer,
    Reply,
    Sampled,
    SampledPairwiseEvidence,
    SampledPointwiseEvidence,
    ScoredPair,
    Seed,
    Split,
    StepLabels,
    Unreadable,
    Verdict,
    VerdictState,
    from_json,
    to_json,
)

EVIDENCE = PairwiseEvidence(0.5, 0.0, (0.25, 0.0), ("one", "two\n\u2028"))
AGREEMENT = AgreementEvidence(
    ("12", None), {"12": 3, "1/2": 1}, 0.6, 0.2307, 0.8824, (None, None, None, None, Unreadable.NO_ANSWER), ("It is a lot.",)
)
POINTWISE = PointwiseEvidence((None, 0.5), ((), (0.5, 0.5)), ("?", ""), (Unreadable.LABEL_MASS, None), (0.2, 0.9))
SAMPLED = SampledPairwiseEvidence(None, 0.5, (None, 0.5), ("", ""), (Unreadable.CUT, None), (None, 0.9), (1, 4), (0.0, 0.69))
GRADED = SampledPointwiseEvidence(**vars(POINTWISE), readable_votes=(0, 3), vote_entropies=(None, 0.5))
COMBINED = CombinedEvidence(
    *(("pairwise", "agreement", "pointwise"), (None, 0.25, 0.75), (None, 0.0, None), (0, -1, 1), (0.5, 0.75, 0.875)),
    members=(SAMPLED, AGREEMENT, None),
)
VERDICT = Verdict("q1", Split.TEST, "q1-r0", "q1-r1", VerdictState.UNSURE, 0.25, 0.125, EVIDENCE)
RECORDS: list[Any] = [
    Seed("How many?", None, {"level": 3, "tags": ["a", "b"]}),
    Seed("How many?", "Two.", {}),
    Question("q1", "How «many»?", Split.TRAIN, "self"),
    Question("q1", "User: Hi.\n\nUser: Why?", Split.TEST, "file", (Message("user", "Hi."), Message("user", "Why?"))),
    Message("user", "Why?"),
    Reply("q1-r0", "q1", "The answer is 3", (5, 6, 2), "beam", 0.8, 0.95, -1.25, False),
    EVIDENCE,
    PairwiseEvidence(None, 0.5, (None, 0.5), ("", ""), (Unreadable.LOOP, None), (None, 0.75)),
    AGREEMENT,
    AgreementEvidence((None, None), {}, None, None, None, (Unreadable.CUT,)),
    POINTWISE,
    SAMPLED,
    GRADED,
    COMBINED,
    VERDICT,
    Verdict("q1", Split.TRAIN, "q1-r0", "q1-r1", VerdictState.UNPARSABLE, None, None, POINTWISE),
    Verdict("q1", Split.TRAIN, "q1-r0", "q1-r1", VerdictState.KEPT, 0.8, 0.0, AGREEMENT),
    Verdict("q1", Split.TRAIN, "q1-r0", "q1-r1", VerdictState.KEPT, 0.8, 0.0, SAMPLED),
    Verdict("q1", Split.TRAIN, "q1-r0", "q1-r1", VerdictState.KEPT, 0.8, 0.0, GRADED),
    Verdict("q1", Split.TRAIN, "q1-r0", "q1-r1", VerdictState.TIE, 0.7, 0.6, COMBINED),
    StepLabels("q1", "q1-r0", "42", (4, 9, 12), (3, 0, 4), 4),
    Sampled(3, "q1", "The answer is 3", 0.25, True),
    ScoredPair("q1", "q1-r0", "q1-r1", VerdictState.UNSURE, None, -0.5, 0.125, True, None),
    ComparedReplies("q1", "q1-r0", "3", "tie", 0.5, 0.25, 0.75, None, False, 5, 7, True, False, 0.125),
    Label("q1", "q1-r1", "q1-r0", LabelChoice.SKIP, "ann", "2026-11-30T17:45:16+00:00", False, "e37e6615cf3da232"),
    ReferenceAnswer("q1", "6 * 7 = 42. The answer is 42"),
    Verdict("q1", Split.TRAIN, "q1-r0", "q1-r1", VerdictState.UNPARSABLE, None, None, None),
    Pair("q1", "How many?", "2", "3", 0.75, (5, 2), (6, 2), Split.TRAIN),
    Drop("questions", "near_duplicate", "How many?", {"of": "seed-0"}),
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_a_record_survives_a_line_of_json(record: Any) -> None:
    line = json.dumps(to_json(record))
    restored = from_json(type(record), json.loads(line))
    assert restored == record
    for name, value in vars(record).items():
        assert type(getattr(restored, name)) is type(value), name


def test_every_record_type_is_tested_here() -> None:
    import selfeval.records

    public = {vars(selfeval.records)[name] for name in selfeval.records.__all__}
    assert {kind for kind in public if hasattr(kind, "__dataclass_fields__")} == {type(record) for record in RECORDS}


def test_pairs_have_the_names_that_other_tools_read() -> None:
    names = to_json(RECORDS[-2])
    assert {"prompt", "chosen", "rejected"} <= set(names)
    assert names["split"] == "train"
    assert type(json.loads(json.dumps(names))["split"]) is str


def test_missing_unknown_and_wrong_values_are_refused() -> None:
    good = to_json(RECORDS[2])
    for values in ({k: v for k, v in good.items() if k != "split"}, {**good, "colour": "red"}):
        with pytest.raises(TypeError):
            from_json(Question, values)
    with pytest.raises(ValueError, match="sideways"):
        from_json(Question, {**good, "split": "sideways"})
    verdict = to_json(VERDICT)
    for evidence in ({}, {**verdict["evidence"], "in_order": "0.5"}, {**verdict["evidence"], "words": []}, "sure", [0.5]):
        with pytest.raises(TypeError):
            from_json(Verdict, {**verdict, "evidence": evidence})


def test_evidence_of_an_earlier_version_is_read_without_causes() -> None:
    old = {k: v for k, v in to_json(EVIDENCE).items() if k not in ("causes", "label_masses")}
    assert from_json(PairwiseEvidence, old) == EVIDENCE
    with pytest.raises(ValueError, match="bored"):
        from_json(PairwiseEvidence, {**old, "causes": ["bored", None]})


def test_confidence_is_that_of_the_likelier_reply() -> None:
    assert VERDICT.confidence == 0.75
    assert from_json(Verdict, {**to_json(VERDICT), "probability": 0.9}).confidence == 0.9
    assert from_json(Verdict, {**to_json(VERDICT), "probability": None}).confidence == 0.5
