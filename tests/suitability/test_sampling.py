"""Rounds on a random model, and the figures of a sample that is built by hand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import tiny_models
from evidence_records import TIE, UNSURE, Gold, reply, verdict
from selfeval.config import RunConfig
from selfeval.judging.templates import Templates, templates_folder
from selfeval.quality.reply_loops import Loop
from selfeval.records import Drop, Question, Split, Verdict
from selfeval.stages import replies
from selfeval.stages.shards import ModelHandle
from selfeval.suitability import sampling
from selfeval.suitability.candidates import Candidate
from selfeval.suitability.measures import measure
from selfeval.suitability.sampling import Judged, Sample, grow

SEEDS = [f"How many apples do {n} trees have in the garden?" for n in range(40)]
SHORT: dict[str, Any] = {
    "questions": {"max_new_tokens": 4},
    "replies": {"max_new_tokens": 4, "beam_share": 0.0},
    "verdicts": {"reasoning": False, "label_mass": 0.0, "keep": 0.5, "tie": 1.0},
}


@pytest.fixture(scope="module")
def model() -> ModelHandle:
    backbone = tiny_models.backbone("llama", 384, max_position_embeddings=1024)
    return ModelHandle(backbone, Templates.load(templates_folder("none"), backbone.loaded.tokenizer))


def grown(model: ModelHandle, monkeypatch: pytest.MonkeyPatch, clock: Iterator[float], seconds: float = 100) -> Sample:
    """A check of one judge; `clock` gives the time whenever it is read."""
    config = RunConfig(**SHORT)
    monkeypatch.setattr(sampling, "monotonic", lambda: next(clock))
    return grow(config, model, [Candidate("pairwise", config, ())], SEEDS, None, seconds)


def still() -> Iterator[float]:
    while True:
        yield 0.0


def test_rounds_grow_until_nothing_is_left_to_ask(model: ModelHandle, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    round_of = sampling._Rounds._round
    monkeypatch.setattr(sampling._Rounds, "_round", lambda self, size: sizes.append(size) or round_of(self, size))  # type: ignore[func-returns-value]
    sample = grown(model, monkeypatch, still())
    # A random model writes no question in four tokens, so the 40 seeds are asked: 8, 16, and the 16 that are left.
    assert sizes == [8, 16, 32]
    assert [question.source for question in sample.asked] == ["seed"] * 40
    assert len({question.id for question in sample.asked}) == 40
    assert sample.samples == len(sample.dropped) >= 64
    assert len(sample.replies) == 80
    assert len(sample.judged["pairwise"].verdicts) == len(sample.pairs) == 40 - sample.identical


def test_a_reply_that_the_stage_drops_as_a_loop_is_not_judged(model: ModelHandle, monkeypatch: pytest.MonkeyPatch) -> None:
    # Replies of four tokens are too short for a loop, so some are declared to be one.
    monkeypatch.setattr(replies, "find_loop", lambda ids, finished: Loop(1, 24) if sum(ids) % 4 == 0 else None)
    sample = grown(model, monkeypatch, still())
    loops = {one.id for one in sample.replies if sum(one.ids) % 4 == 0}
    assert len(loops) > 5
    assert sample.pairs
    assert not {one.id for _, *pair in sample.pairs for one in pair} & loops
    assert len(sample.pairs) + sample.identical == len(sample.asked)


def test_a_round_is_no_larger_than_the_time_that_is_left(model: ModelHandle, monkeypatch: pytest.MonkeyPatch) -> None:
    def clock() -> Iterator[float]:
        now = 0.0
        while True:
            yield now
            now += 1.0

    sample = grown(model, monkeypatch, clock(), seconds=18)
    # The first round takes more than half of the time, so the second one would be smaller than the smallest.
    assert len(sample.asked) < 24
    assert len(sample.asked) >= sampling.FIRST


def test_a_slow_model_gets_the_first_verdicts_and_nothing_after_them(
    model: ModelHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = RunConfig(**SHORT)
    candidates = [Candidate("one", config, ()), Candidate("two", config, ())]
    times = iter([0.0])
    monkeypatch.setattr(sampling, "monotonic", lambda: next(times, 50.0))
    sample = grow(config, model, candidates, SEEDS, None, 10.0)
    assert len(sample.judged["one"].verdicts) == len(sample.pairs) > 0
    assert sample.judged["two"].verdicts == []
    assert len(sample.asked) == sampling.FIRST


def test_an_interrupted_sample_has_what_there_is(model: ModelHandle, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(self: Any, candidate: Candidate) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sampling._Rounds, "_judge", interrupt)
    sample = grown(model, monkeypatch, still())
    assert sample.interrupted
    assert len(sample.replies) == 16
    assert sample.judged["pairwise"].verdicts == []


# -- figures ------------------------------------------------------------------------------------------------------------


def sample_of(verdicts: list[Verdict], retests: list[Verdict]) -> Sample:
    """`What is 1?` and so on: the first reply to each is right, the second is 99 and wrong; the last question has no gold."""
    asked = [Question(f"q{n}", f"What is {n}?", Split.TRAIN, "self") for n in range(1, 9)]
    asked.append(Question("q9", "What is love?", Split.TRAIN, "self"))
    replies = [r for q in asked for r in (reply(f"{q.id}-r0", q.id[1:]), reply(f"{q.id}-r1", "99"))]
    return Sample(
        questions=asked,
        dropped=[Drop("questions", "too_short", "?")],
        asked=asked,
        replies=replies,
        judged={"one": Judged(verdicts, retests, seconds=18.0)},
    )


def test_the_figures_of_a_sample_by_hand() -> None:
    verdicts = [verdict(f"q{n}", 0.9) for n in range(1, 7)]
    verdicts += [verdict("q7", 0.2), verdict("q8", 0.5, TIE), verdict("q9", 0.9)]
    retests = [verdict("q1", 0.9), verdict("q2", 0.1), verdict("q3", 0.5, UNSURE)]
    sample, candidate = sample_of(verdicts, retests), Candidate("one", RunConfig(), ("verdicts.judge=one",))
    found = measure(sample, [candidate], Gold().is_right, knows_domain=True)
    assert (found.questions.usable.value, found.questions.usable.n) == (0.9, 10)  # type: ignore[union-attr]
    assert found.questions.in_domain.value == pytest.approx(8 / 9)  # type: ignore[union-attr]
    assert found.replies.right.value == 0.5  # type: ignore[union-attr]
    (judge,) = found.judges
    # q7 is wrong, q8 is a tie, q9 has no gold.
    assert judge.gold is not None
    assert (judge.gold.wins, judge.gold.losses) == (6, 1)
    # The mean reply is half right. Best of two: +1/2 six times, -1/2 once, 0 for the tie.
    assert judge.gap is not None
    assert judge.gap.difference.value == pytest.approx((6 * 0.5 - 0.5) / 8)
    assert judge.gap_source == "gold"
    assert (judge.retest.value, judge.retest.n) == (pytest.approx(1 / 3), 3)  # type: ignore[union-attr]
    assert (judge.kept.value, judge.seconds_per_pair) == (pytest.approx(8 / 9), 2.0)
    assert judge.majority is None
    assert judge.votes is None


def test_without_gold_nothing_is_right() -> None:
    sample = sample_of([verdict(f"q{n}", 0.9) for n in range(1, 10)], [verdict("q1", 0.5, UNSURE)])
    sample.judged["one"].verdicts[0] = verdict("q1", 0.5, UNSURE)
    (judge,) = measure(sample, [Candidate("one", RunConfig(), ())], None, knows_domain=False).judges
    assert (judge.gold, judge.gap, judge.gap_source) == (None, None, None)
    # Both judgements of q1 prefer neither, which is no agreement on a preference.
    assert judge.retest is not None
    assert judge.retest.n == 0
    assert judge.orders is not None
    assert (judge.orders.wins, judge.kept.n) == (8, 9)
