"""The agreement judge: the probability by hand, votes of a scripted engine, and the whole of it on real models."""

from __future__ import annotations

import json
import lzma
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import tiny_models
from judge_engine import judges_generate_with
from selfeval.backbone.adapters import BASE
from selfeval.backbone.roles import Backbone
from selfeval.config import BackboneConfig, VerdictsConfig, load_config
from selfeval.errors import ConfigError
from selfeval.judging.judges import make_judge
from selfeval.judging.judges.agreement import compare_answers
from selfeval.judging.protocol import Comparison, Judgement, state_of
from selfeval.judging.templates import Templates, templates_folder
from selfeval.judging.voting import Vote
from selfeval.quality.answers import answer_of, is_answer
from selfeval.quality.statistics import wilson_interval
from selfeval.records import AgreementEvidence, Message, Unreadable, VerdictState
from selfeval.rollout.requests import Request, Rollout
from toy import LAB

QUESTION = "Tom has 3 pens. He buys 2 more. How many pens does Tom have now?"
RECORDED = Path(__file__).resolve().parents[4] / "shared" / "data" / "math" / "gsm8k_example_model_solutions.jsonl.xz"


def config(*settings: str) -> VerdictsConfig:
    return load_config(None, {}, ["verdicts.judge=agreement", *(f"verdicts.{setting}" for setting in settings)]).verdicts


def votes(**counts: int) -> list[Vote]:
    """`votes(a=2, none=1)`: two votes for a and one without an answer."""
    answered = [Vote(answer, None, "") for answer, n in counts.items() if answer != "none" for _ in range(n)]
    return answered + [Vote(None, Unreadable.NO_ANSWER, f"text {n}") for n in range(counts.get("none", 0))]


def evidence(judgement: Judgement) -> AgreementEvidence:
    assert isinstance(judgement.evidence, AgreementEvidence)
    return judgement.evidence


# -- the verdict of a vote ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answers", "ballot", "probability", "tie", "state"),
    [
        # The mean of Beta(n + 1, m + 1): (12 + 1) / (12 + 2 + 2), and the same from the other side.
        (("a", "b"), votes(a=12, b=2, c=2), 13 / 16, 0.0, VerdictState.KEPT),
        (("b", "a"), votes(a=12, b=2, c=2), 3 / 16, 0.0, VerdictState.KEPT),
        # No vote for the other answer: (12 + 1) / (12 + 2). Nor is there one for a reply without an answer.
        (("a", "d"), votes(a=12, b=4), 13 / 14, 0.0, VerdictState.KEPT),
        ((None, "a"), votes(a=12, b=4), 1 / 14, 0.0, VerdictState.KEPT),
        # A majority that is too close to the other answer for `keep`: 10 / 17.
        (("a", "b"), votes(a=9, b=6, none=1), 10 / 17, 0.0, VerdictState.UNSURE),
        # Both have the majority's answer, or neither has.
        (("a", "a"), votes(a=12, b=4), 0.5, 1.0, VerdictState.TIE),
        (("b", "c"), votes(a=12, b=4), 0.5, 1.0, VerdictState.TIE),
        ((None, None), votes(a=12, b=4), 0.5, 1.0, VerdictState.TIE),
        # A split vote: less than half of all votes, those without an answer included; or two answers with as many.
        (("a", "b"), votes(a=7, b=1, none=8), 0.5, 0.0, VerdictState.UNSURE),
        (("a", "b"), votes(a=8, b=8), 0.5, 0.0, VerdictState.UNSURE),
        # Nothing to vote on.
        (("a", "b"), votes(none=4), None, None, VerdictState.UNPARSABLE),
    ],
)
def test_the_verdict_of_a_vote_by_hand(
    answers: tuple[str | None, str | None],
    ballot: list[Vote],
    probability: float | None,
    tie: float | None,
    state: VerdictState,
) -> None:
    found = compare_answers(answers, ballot, share=0.5)
    assert (found.probability, found.tie) == (pytest.approx(probability), tie)
    assert state_of(found, config()) == state


def test_the_evidence_has_votes_share_interval_and_causes() -> None:
    found = evidence(compare_answers(("a", None), votes(b=1, a=6, none=3), share=0.5))
    assert found.answers == ("a", None)
    assert list(found.votes.items()) == [("a", 6), ("b", 1)]
    assert (found.share, found.share_low, found.share_high) == (0.6, *wilson_interval(6, 10))
    assert found.causes == (None,) * 7 + (Unreadable.NO_ANSWER,) * 3
    assert found.raw_output == ("text 0", "text 1")


ANSWERS = st.sampled_from(["1", "2", "3", None])


@given(st.tuples(ANSWERS, ANSWERS), st.lists(ANSWERS, min_size=1, max_size=20), st.floats(0.01, 1.0))
def test_the_order_of_replies_and_votes_does_not_matter(
    answers: tuple[str | None, str | None], cast: list[str | None], share: float
) -> None:
    ballot = [Vote(answer, None if answer else Unreadable.CUT, "") for answer in cast]
    found, swapped = compare_answers(answers, ballot, share), compare_answers((answers[1], answers[0]), ballot, share)
    turned = compare_answers(answers, ballot[::-1], share)
    assert (turned.probability, turned.tie) == (found.probability, found.tie)
    assert swapped.tie == found.tie
    if found.probability is None or swapped.probability is None:
        assert found.probability is None
        assert swapped.probability is None
    else:
        assert found.probability + swapped.probability == pytest.approx(1.0)
        assert 0 < found.probability < 1


# -- votes --------------------------------------------------------------------------------------------------------------


def judged(
    monkeypatch: pytest.MonkeyPatch,
    words: Sequence[str],
    duels: Sequence[Comparison],
    *settings: str,
    cut: Callable[[int], bool] = lambda number: False,
    context: int = 4096,
    template: str | None = None,
) -> tuple[list[Judgement], list[Request]]:
    """Judge with an engine that writes one of the texts per request, in turn."""
    tokenizer = tiny_models.words_tokenizer()
    tokenizer.chat_template = template
    asked: list[Request] = []

    def engine(backbone: Any, requests: Sequence[Request], **options: Any) -> list[Rollout]:
        asked.extend(requests)
        return [rollout(n) for n in range(len(requests))]

    def rollout(number: int) -> Rollout:
        ids = tuple(tokenizer.encode(words[number % len(words)], add_special_tokens=False))
        end = () if cut(number) else (tiny_models.EOS,)
        return Rollout((*ids, *end), (0.0,) * len(ids), bool(end))

    judges_generate_with(monkeypatch, engine)
    backbone = tiny_models.backbone("llama", 400, max_position_embeddings=context)
    own = Templates.load(templates_folder("no such model"), tokenizer)
    judge = make_judge(backbone, own, config(*settings), batch_size=8)
    return judge.judge(duels), asked


def test_a_question_is_voted_on_once_and_the_replies_have_no_vote(monkeypatch: pytest.MonkeyPatch) -> None:
    duels = [Comparison("One?", "It is 5.", "It is 6."), Comparison("One?", "7", "It is 5."), Comparison("Two?", "8", "9")]
    found, asked = judged(monkeypatch, ["It is 5.", "It is 5", "6"], duels, "agreement.votes=6")
    assert len(asked) == 12
    assert len({request.stream for request in asked}) == 12
    assert {request.temperature for request in asked} == {0.7}
    assert [evidence(judgement).votes for judgement in found] == [{"5": 4, "6": 2}] * 3
    assert [judgement.probability for judgement in found] == [pytest.approx(5 / 8), pytest.approx(1 / 6), 0.5]


def test_votes_on_a_conversation_continue_its_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}"
    turns = (Message("user", "two pens"), Message("assistant", "one"), Message("user", "How many?"))
    duel = Comparison("the conversation as text", "5", "6", messages=turns)
    _, (asked, *_) = judged(monkeypatch, ["It is 5."], [duel], "agreement.votes=2", template=template)
    shown = tiny_models.words_tokenizer().decode(list(asked.prompt.ids))
    assert shown.index("two pens") < shown.index("assistant") < shown.index("How many")
    assert "as text" not in shown


def test_a_reply_that_was_cut_off_has_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    duels = [Comparison("One?", "It is 5.", "It is 5.", *cut) for cut in ((False, False), (False, True), (True, False))]
    found, _ = judged(monkeypatch, ["It is 5."], duels, "agreement.votes=4")
    assert [(judgement.probability, judgement.tie) for judgement in found] == [
        (0.5, 1.0), (pytest.approx(5 / 6), 0.0), (pytest.approx(1 / 6), 0.0),
    ]  # fmt: skip
    assert [evidence(judgement).answers for judgement in found] == [("5", "5"), ("5", None), (None, "5")]


def test_thinking_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["<think>Is it 4?</think>It is 5.", "<think>It is 4."]
    found, _ = judged(monkeypatch, words, [Comparison("One?", "<think>5</think>6", "5")], "agreement.votes=2")
    assert evidence(found[0]).votes == {"5": 1}
    assert evidence(found[0]).answers == ("6", "5")


def test_every_vote_without_an_answer_has_a_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ["agreement.votes=4", "max_new_tokens=3"]
    words = ["Many.", "So 2 plus 2 is then", "Tom", "two" + " two" * 40]
    (found,), _ = judged(monkeypatch, words, [Comparison("One?", "5", "6")], *settings, cut=lambda number: number > 0)
    assert evidence(found).causes == (Unreadable.NO_ANSWER, Unreadable.CUT, Unreadable.NO_ROOM, Unreadable.LOOP)
    assert (found.probability, evidence(found).share) == (None, None)
    assert len(evidence(found).raw_output) == 2


def test_a_question_without_room_for_a_reply_is_unparsable(monkeypatch: pytest.MonkeyPatch) -> None:
    duels = [Comparison("word " * 200, "5", "6"), Comparison("One?", "5", "6")]
    found, asked = judged(monkeypatch, ["It is 5."], duels, "agreement.votes=2", context=128)
    assert evidence(found[0]).causes == (Unreadable.NO_ROOM,)
    assert "does not fit the model's context" in evidence(found[0]).raw_output[0]
    assert found[1].probability == pytest.approx(3 / 4)
    assert len(asked) == 2


@pytest.fixture(scope="module")
def lab() -> tuple[Backbone, Templates]:
    """The embedded model, which answers word problems."""
    model = str(LAB / "word_problems")
    backbone = Backbone.load(model, BackboneConfig(device="cpu"))
    return backbone, Templates.load(templates_folder(model), backbone.loaded.tokenizer)


def test_votes_depend_on_seed_and_question_alone(lab: tuple[Backbone, Templates]) -> None:
    settings = config("max_new_tokens=64", "agreement.votes=6", "agreement.temperature=1.0")
    one = Comparison(QUESTION, "The answer is 5.", "The answer is 6.")
    other = Comparison(QUESTION.replace("3", "7"), "The answer is 9.", "The answer is 5.")

    def of(duels: Sequence[Comparison], batch_size: int = 64, seed: int = 0) -> list[Any]:
        with lab[0].acting_as(BASE):
            judged = make_judge(*lab, settings, batch_size=batch_size, seed=seed).judge(duels)
        return [judgement.evidence for judgement in judged]

    both = of([one, other])
    assert of([other, one], batch_size=4) == both[::-1]
    assert of([other]) == both[1:]
    assert of([one], seed=1) != both[:1]
    assert {evidence.votes["5"] > 2 for evidence in both[:1]} == {True}


# -- extraction ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not RECORDED.exists(), reason="shared/data is not next to the repository")
def test_answers_of_recorded_outputs_are_those_that_were_marked_right() -> None:
    marked = agreeing = 0
    with lzma.open(RECORDED, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            truth = answer_of(row["ground_truth"], "pattern", r"A: (.*)")
            for solution in (value for value in row.values() if isinstance(value, dict)):
                found = answer_of(solution["solution"], "number")
                # A right solution has the answer of the truth in its normal form; a wrong one has another one, or none.
                marked += 1
                agreeing += (found == truth) == solution["is_correct"]
    assert marked > 5000
    assert agreeing / marked > 0.999


@pytest.mark.parametrize(
    ("form", "pattern", "texts"),
    [
        ("number", "", ["It costs $1,000.", "1000", "so x = 1000.0", "The answer is 1000%.", "2000/2", "1e3", "#### 1,000"]),
        ("number", "", ["0.5", "1/2", "The answer is 50/100", r"\frac{1}{2}", ".5", "+0.50"]),
        ("number", "", ["-3", "−3", "The answer is -3.0 degrees"]),
        ("boxed", "", [r"\boxed{1,000}", r"\boxed{\$1000}", r"So \boxed{1} no: \boxed{1000.0}."]),
        ("boxed", "", [r"\boxed{\text{Paris}}", r"\boxed{paris}", r"\boxed{ Paris. }"]),
        ("boxed", "", [r"\boxed{3x + 9}", r"\boxed{3x+9}"]),
        ("letter", "", ["The answer is (B).", "I choose B", "Answer: b", "(B)"]),
        ("pattern", r"<(\w+)>", ["<4> or <5>", "<5>", "<5> <a b>"]),
    ],
)
def test_equal_answers_have_one_normal_form(form: Any, pattern: str, texts: list[str]) -> None:
    found = {answer_of(text, form, pattern) for text in texts}
    assert len(found) == 1
    assert None not in found


@pytest.mark.parametrize(
    ("form", "pattern", "text"),
    [
        ("number", "", "no number"),
        ("number", "", ""),
        ("number", "", "1/0"),
        ("number", "", f"{'9' * 4000}e400"),
        ("boxed", "", "The answer is 5"),
        ("boxed", "", r"\boxed{}"),
        ("boxed", "", r"\boxed{5"),
        ("letter", "", "A or B"),
        ("pattern", r"A: (\d+)", "A: many"),
        ("pattern", r"A:(?: (\d+))?", "A: many"),
    ],
)
def test_a_text_without_an_answer_has_none(form: Any, pattern: str, text: str) -> None:
    assert answer_of(text, form, pattern) is None


PIECES = [*"0123456789ABx .,/$%+-−=^:()[]{}\\\n", "answer is ", "####", r"\boxed{", r"\frac{"]
WRITING = st.lists(st.sampled_from(PIECES)).map("".join)


@example("¼", "pattern")
@given(st.one_of(st.text(), WRITING), st.sampled_from(["number", "boxed", "letter", "pattern"]))
def test_any_text_has_an_answer_in_normal_form_or_none(text: str, form: Any) -> None:
    found = answer_of(text, form, r"(\S+)$")
    assert found is None or (found and answer_of(found, "pattern", r"(?s)(.*)") in (found, found.lower()))


@given(WRITING)
def test_equal_numbers_are_the_right_answer_of_each_other(text: str) -> None:
    found = answer_of(text, "number")
    assert found is None or is_answer(text, [found])


def test_a_pattern_has_limited_time() -> None:
    with pytest.raises(
        ConfigError, match=r"verdicts\.agreement\.pattern: \(a\|aa\)\+\$ took more than 1 s on a reply of 61 cha"
    ):
        answer_of("a" * 60 + "b", "pattern", "(a|aa)+$")


# -- settings -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["agreement.answer=pattern"], 'answer is "pattern" and pattern is ""; set it'),
        (["agreement.pattern=(a)"], 'answer is "number" and pattern is "(a)"; remove it, or set answer = "pattern"'),
        (["agreement.answer=pattern", "agreement.pattern=("], "is not a regular expression: missing )"),
        (["agreement.answer=pattern", "agreement.pattern=a"], "has 0 groups; write one, around the answer"),
        (["agreement.answer=pattern", "agreement.pattern=(a)(b)"], "has 2 groups; write one"),
        (["agreement.answer=pattern", f"agreement.pattern=({'a' * 500})"], "has 502 characters; at most 500 are allowed"),
        (["agreement.answer=word"], "verdicts.agreement.answer"),
        (["agreement.votes=1"], "verdicts.agreement.votes: got 1"),
        (["agreement.share=0"], "verdicts.agreement.share: got 0"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(settings: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(*settings)
    assert said in str(caught.value)
