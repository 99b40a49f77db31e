"""Sampled votes of a judge with labels: their mean by hand, and votes of the embedded model."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfeval.backbone.adapters import BASE
from selfeval.backbone.roles import Backbone
from selfeval.config import VerdictsConfig, load_config
from selfeval.errors import ConfigError
from selfeval.judging.judges import make_judge
from selfeval.judging.judges.pointwise import compare_grades
from selfeval.judging.kinds import kinds_of_run
from selfeval.judging.orders import combine
from selfeval.judging.pooling import Reading, Spread, pool_votes
from selfeval.judging.protocol import Comparison, Judgement
from selfeval.judging.templates import Templates, templates_folder
from selfeval.lab.corpus import draw_reply
from selfeval.lab.domain import draw_problem
from selfeval.records import PairwiseEvidence, SampledPairwiseEvidence, SampledPointwiseEvidence, Unreadable
from selfeval.stages.graph import stage_keys
from toy import LAB

CUT, TRUNCATED = Reading(None, "cut", Unreadable.CUT), Unreadable.TRUNCATED


# -- the mean of votes --------------------------------------------------------------------------------------------------


def test_votes_are_scaled_before_their_mean() -> None:
    # (0.6, 0.2) / 0.8 = (0.75, 0.25) and (0.1, 0.1) / 0.2 = (0.5, 0.5): the mean is (0.625, 0.375), not 0.7 / 1.0.
    found = pool_votes([Reading((0.6, 0.2), "one", label_mass=0.8), Reading((0.1, 0.1), "two", label_mass=0.2)])
    assert found.probabilities == pytest.approx((0.625, 0.375))
    assert (found.raw_output, found.cause, found.label_mass) == ("one", None, pytest.approx(0.5))


def test_the_entropy_is_that_of_the_most_likely_labels() -> None:
    votes = [Reading(p, "") for p in ((0.6, 0.3, 0.1), (0.5, 0.4, 0.1), (0.9, 0.0, 0.1), (0.1, 0.2, 0.7))]
    # Three votes for the first label, one for the third.
    expected = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert pool_votes([*votes, CUT]).spread == Spread(4, pytest.approx(expected))
    assert pool_votes(votes[:3]).spread == Spread(3, 0.0)


def test_votes_without_a_verdict_abstain_until_most_of_them_do() -> None:
    vote, refused = Reading((0.8, 0.2), "A"), Reading(None, "no", Unreadable.REFUSED)
    assert pool_votes([refused, CUT, vote, vote]).probabilities == pytest.approx((0.8, 0.2))
    found = pool_votes([vote, refused, CUT, CUT])
    assert (found.probabilities, found.cause, found.spread) == (None, Unreadable.CUT, Spread(1, 0.0))
    assert pool_votes([CUT, CUT]).spread == Spread(0, None)


def test_the_mean_is_truncated_if_most_of_its_votes_are() -> None:
    vote, forced = Reading((0.8, 0.2), "A"), Reading((0.8, 0.2), "A", TRUNCATED)
    assert pool_votes([vote, forced, forced, CUT]).cause == TRUNCATED
    assert pool_votes([vote, forced]).cause is None


chances = st.tuples(*[st.floats(1e-6, 1.0)] * 3)


@given(st.lists(chances, min_size=1, max_size=6))
def test_the_mean_is_a_distribution_between_the_votes(votes: list[tuple[float, ...]]) -> None:
    found = pool_votes([Reading(vote, "") for vote in votes])
    assert found.probabilities is not None
    assert found.spread is not None
    assert sum(found.probabilities) == pytest.approx(1.0)
    for label, probability in enumerate(found.probabilities):
        alone = [vote[label] / sum(vote) for vote in votes]
        assert min(alone) - 1e-9 <= probability <= max(alone) + 1e-9
    assert found.spread.entropy is not None
    assert 0.0 <= found.spread.entropy <= math.log(3) + 1e-9


def test_the_evidence_has_the_spread_of_both_orders() -> None:
    one = pool_votes([Reading((0.8, 0.1, 0.1), "A"), Reading((0.2, 0.7, 0.1), "B")])
    other = pool_votes([Reading((0.1, 0.9, 0.0), "B"), CUT])
    found = combine(one, other).evidence
    assert isinstance(found, SampledPairwiseEvidence)
    assert (found.readable_votes, found.vote_entropies) == ((2, 1), (pytest.approx(math.log(2)), 0.0))
    # In order: (0.5 + 0.4 / 2 ...): first 0.5, second 0.4, tie 0.1. Swapped: 1 - 0.1.
    assert (found.in_order, found.swapped) == (pytest.approx(0.55), pytest.approx(0.9))
    graded = compare_grades(pool_votes([Reading((0.1, 0.9), "")]), pool_votes([CUT]), (0, 1)).evidence
    assert isinstance(graded, SampledPointwiseEvidence)
    assert (graded.readable_votes, graded.vote_entropies, graded.causes) == ((1, 0), (0.0, None), (None, Unreadable.CUT))


# -- settings -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("verdicts.reasoning=false",), "needs reasoning = true"),
        (("verdicts.judge=agreement",), 'needs judge = pairwise or pointwise or combined, and judge is "agreement"'),
        (("verdicts.judge=endpoint",), 'needs judge = pairwise or pointwise or combined, and judge is "endpoint"'),
        (("verdicts.votes=65",), "less than or equal to 64"),
    ],
)
def test_votes_that_would_have_no_effect_are_refused(given: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, {}, ["verdicts.votes=2", *given])
    assert said in str(caught.value)


def test_the_votes_are_part_of_the_key_and_the_referee_has_none() -> None:
    def keys(*given: str) -> dict[str, str]:
        return stage_keys(load_config(None, {}, given), [])

    greedy, votes, colder = keys(), keys("verdicts.votes=2"), keys("verdicts.votes=2", "verdicts.vote_temperature=0.5")
    assert len({greedy["verdicts"], votes["verdicts"], colder["verdicts"]}) == 3
    assert keys("verdicts.vote_temperature=0.5") == greedy  # it has no effect on a single vote
    assert load_config(None, {}, ["verdicts.votes=2"]).judging("referee").votes == 1


# -- votes of the embedded model ----------------------------------------------------------------------------------------


@cache
def embedded() -> tuple[Backbone, Templates]:
    model = str(LAB / "word_problems")
    config = load_config(None, {"model": model})
    backbone = Backbone.load(model, config.backbone)
    kinds = dict.fromkeys((*kinds_of_run(config.verdicts), *kinds_of_run(VerdictsConfig(judge="pointwise"))))
    return backbone, Templates.load(templates_folder(model), backbone.loaded.tokenizer, kinds=tuple(kinds))


@cache
def duels(count: int) -> tuple[Comparison, ...]:
    rng = random.Random(5)
    problems = [draw_problem(rng) for _ in range(count)]
    replies = [[draw_reply(p, rng, right=right).text for right in (True, False)] for p in problems]
    return tuple(Comparison(p.question, *both) for p, both in zip(problems, replies, strict=True))


def judged(comparisons: Sequence[Comparison], batch: int = 64, seed: int = 3, **changes: Any) -> list[Judgement]:
    backbone, own = embedded()
    settings = VerdictsConfig(**{"votes": 3, "vote_temperature": 1.5, "max_new_tokens": 64, **changes})
    with backbone.acting_as(BASE):
        return make_judge(backbone, own, settings, batch_size=batch, seed=seed).judge(comparisons)


def sampled(judgement: Judgement) -> SampledPairwiseEvidence:
    assert isinstance(judgement.evidence, SampledPairwiseEvidence)
    return judgement.evidence


def test_votes_are_the_same_in_any_batch_and_differ_by_seed() -> None:
    whole, parts = judged(duels(4)), [*judged(duels(4)[:1], batch=4), *judged(duels(4)[:0:-1], batch=5)[::-1]]
    assert [sampled(j).raw_output for j in whole] == [sampled(j).raw_output for j in parts]
    assert [sampled(j).vote_entropies for j in whole] == [sampled(j).vote_entropies for j in parts]
    known = [(a.probability, b.probability) for a, b in zip(whole, parts, strict=True) if a.probability is not None]
    assert [a for a, _ in known] == pytest.approx([b for _, b in known], abs=1e-4)
    assert [sampled(j).raw_output for j in judged(duels(4), seed=4)] != [sampled(j).raw_output for j in whole]
    assert any(entropy for j in whole for entropy in sampled(j).vote_entropies)  # the votes differ


def test_several_votes_judge_as_the_greedy_verdict_does_where_they_agree() -> None:
    greedy, votes = judged(duels(4), votes=1), judged(duels(4), vote_temperature=0.01, votes=2)
    assert all(type(j.evidence) is PairwiseEvidence for j in greedy)
    # Nearly greedy votes write what the greedy judge does, and their mean is its probability.
    assert [sampled(j).raw_output for j in votes] == [j.evidence.raw_output for j in greedy if j.evidence is not None]
    assert [j.probability for j in votes] == pytest.approx([j.probability for j in greedy], abs=1e-4)
    assert {sampled(j).vote_entropies for j in votes} == {(0.0, 0.0)}
    assert sum((j.probability or 0) > 0.5 for j in votes) >= 3


def test_grades_are_the_mean_of_votes() -> None:
    found = judged(duels(3), judge="pointwise", label_mass=0.0)
    for judgement in found:
        assert isinstance(judgement.evidence, SampledPointwiseEvidence)
        assert max(judgement.evidence.readable_votes) <= 3
    assert found == judged(duels(3), judge="pointwise", label_mass=0.0)
