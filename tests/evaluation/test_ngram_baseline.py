"""The baseline that prefers the reply with the lower perplexity under an n-gram model of the training text."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from evidence_records import UNSURE, pair, reply, verdict
from selfeval.evaluation.evaluator import (
    EvaluatorFacts,
    by_gold,
    compare_with_rules,
    measure_evaluator,
    measure_first_pairs,
    rights_of,
)
from selfeval.evaluation.ngram_baseline import with_surprise
from selfeval.quality.ngram_model import NgramModel
from selfeval.records import Question, Split

TRAIN = {f"t{i}": Question(f"t{i}", f"What is {i} plus {i}?", Split.TRAIN, "self") for i in range(3)}
TEST = {"q1": Question("q1", "What is 1?", Split.TEST, "self")}
REPLIES = [reply(f"t{i}-r0", f"The sum of {i} and {i} is {2 * i}.") for i in range(3)]
USUAL, ODD = "The sum of 1 and 1 is 2.", "Bananas swim in cold rivers."


def _measured(pairs):
    facts = EvaluatorFacts(temperature=1.0, temperature_pairs=0, pairs_trained=0, members=1)
    first = measure_first_pairs(rights_of(pairs), None, has_gold=True)
    return measure_evaluator(pairs, facts, first, None, has_gold=True)


def test_the_surprise_is_the_log_of_the_perplexity_under_training_text():
    texts = [q.text for q in TRAIN.values()] + [r.text for r in REPLIES]
    found = with_surprise([pair(USUAL, ODD)], {**TRAIN, **TEST}, REPLIES)[0].surprise
    assert found == tuple(math.log(value) for value in NgramModel(texts).perplexities([USUAL, ODD]))
    assert found[0] < found[1]


def test_no_text_of_the_test_is_in_the_training():
    test_replies = [reply("q1-r0", ODD), reply("q1-r1", ODD)]
    plain = with_surprise([pair(USUAL, ODD)], {**TRAIN, **TEST}, REPLIES)
    other = {"q1": replace(TEST["q1"], text="Bananas swim in cold rivers?")}
    assert with_surprise([pair(USUAL, ODD)], {**TRAIN, **other}, [*test_replies, *REPLIES]) == plain


def test_an_empty_or_unfinished_reply_never_wins_against_another_one():
    """Right by gold is the first reply, and the unfinished one has the lower surprise."""
    empty, half = with_surprise([pair("1", "...")], {**TRAIN, **TEST}, REPLIES)[0], pair("1", "7")
    assert math.isfinite(empty.surprise[0])
    assert math.isinf(empty.surprise[1]), "a reply without a word"
    half = replace(half, replies=(half.replies[0], replace(half.replies[1], finished=False)), surprise=(3.0, 2.0))
    assert [_measured([one]).baselines.ngram.value for one in (empty, half)] == [1.0, 1.0]
    both = replace(half, replies=tuple(replace(one, finished=False) for one in half.replies))
    assert _measured([both]).baselines.ngram.value == 0.0, "both are unfinished: the lower surprise wins"
    neither = replace(empty, surprise=(math.inf, math.inf))
    assert _measured([neither]).baselines.ngram.value == 0.5


def test_credits_by_hand():
    # Right by gold is "1". The reply with the lower surprise is right, wrong, and neither: (1 + 0 + 1/2) / 3.
    surprises = [(1.0, 2.0), (3.0, 2.0), (2.0, 2.0)]
    pairs = [replace(pair("1", "7", said=verdict("q1", 0.9, UNSURE)), surprise=two) for two in surprises]
    evaluator = _measured(pairs)
    assert evaluator.baselines.ngram.value == pytest.approx(0.5)
    assert evaluator.comparisons.ngram.difference.value == pytest.approx(0.5)  # the evaluator is right on all three
    exchanged = [replace(one, replies=one.replies[::-1], right=one.right[::-1], surprise=one.surprise[::-1]) for one in pairs]
    assert _measured(exchanged).baselines.ngram.value == pytest.approx(0.5)
    assert _measured(pairs[:1]).baselines.ngram.value == 1


def test_without_a_model_it_is_absent():
    pairs = with_surprise([pair("1", "7")], TEST, REPLIES)
    assert pairs[0].surprise is None
    evaluator = _measured(pairs)
    assert evaluator.baselines.ngram is evaluator.comparisons.ngram is None
    assert "ngram" not in evaluator.baselines.as_json()
    assert compare_with_rules(by_gold(pairs)).ngram is None
    assert with_surprise([], TRAIN, REPLIES) == []
