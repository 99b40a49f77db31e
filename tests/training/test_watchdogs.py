from __future__ import annotations

import math
import random

import pytest

from selfeval.config import PolicyConfig
from selfeval.training.policy import _drop_p_value
from selfeval.training.watchdogs import check_iteration

CONFIG = PolicyConfig(kl_target=4.0)
FIRST = {
    "step": 1.0,
    "kl": 0.0,
    "first_ratio": 1e-6,
    "length": 40.0,
    "entropy": 1.0,
    "policy_loss": 0.1,
    "explained_variance": 0.3,
    "repeated": 0.05,
    "similarity": 0.4,
    "score": 0.0,
}
JUDGED = {"judge_win_rate": 0.5, "judge_error": 0.05, "judge_drop": 0.2, "judge_drop_p": 1e-5, "score_gain": 0.5}


def alarms(**changes: float) -> dict[str, str]:
    """Name -> action of what a later iteration with these figures sets off."""
    found = check_iteration({**FIRST, "step": 7.0, **changes}, FIRST, CONFIG)
    assert all(alarm.step == 7 for alarm in found)
    assert all(alarm.message for alarm in found)
    return {alarm.name: alarm.action for alarm in found}


def test_a_healthy_iteration_sets_off_nothing() -> None:
    assert alarms() == {}
    # Just inside every limit.
    assert alarms(first_ratio=0.02, kl=20.0, length=80.0, entropy=0.02) == {}
    assert alarms(engine_difference=0.05, engine_truncated=0.01) == {}
    assert alarms(kl=-0.5, length=20.0, repeated=0.5) == {}
    assert alarms(similarity=0.849) == {}  # 1 - 0.849 is just above a quarter of 1 - 0.4
    assert alarms(**{**JUDGED, "judge_drop_p": 0.06}) == {}  # no more than noise
    assert alarms(**{**JUDGED, "score_gain": -0.1}) == {}  # both went down: nothing is exploited


@pytest.mark.parametrize(
    ("figures", "name", "action"),
    [
        ({"policy_loss": math.nan}, "not_finite", "roll_back"),
        ({"kl": math.inf}, "not_finite", "roll_back"),
        ({"first_ratio": 0.021}, "ratio_not_one", "warn"),
        ({"engine_difference": 0.051, "engine_truncated": 0.01}, "engine_disagrees", "warn"),
        ({"kl": -0.51}, "negative_kl", "warn"),
        ({"first_ratio": 0.51}, "ratio_not_one", "stop"),
        ({"kl": -5.1}, "negative_kl", "stop"),
        ({"kl": 20.1}, "kl_runaway", "warn"),
        ({"kl": 40.1}, "kl_runaway", "roll_back"),
        ({"length": 81.0}, "length_drift", "warn"),
        ({"length": 19.0}, "length_drift", "warn"),
        ({"length": 161.0}, "length_drift", "roll_back"),
        ({"entropy": 0.019}, "entropy_collapse", "roll_back"),
        ({"repeated": 0.51}, "repeated_reply", "roll_back"),
        ({"similarity": 0.86, "score": 0.0}, "diversity_collapse", "warn"),
        (JUDGED, "judge_disagrees", "finish"),
    ],
)
def test_each_watchdog_names_its_cause(figures: dict[str, float], name: str, action: str) -> None:
    assert alarms(**figures)[name] == action


def test_the_message_names_the_figures_that_broke() -> None:
    (alarm,) = check_iteration({**FIRST, "policy_loss": math.nan, "entropy": math.nan}, FIRST, CONFIG)
    assert "entropy, policy_loss" in alarm.message
    assert alarm.as_json() == {"step": 1, "name": "not_finite", "message": alarm.message, "action": "roll_back"}


@pytest.mark.parametrize(
    ("score", "cause"),
    [(0.5, "rose from 0.00 to 0.50: if it rewards such replies, raise"), (-0.5, "(0.00 at the start, -0.50 now): if the")],
)
def test_the_message_on_similar_replies_says_how_the_score_changed(score: float, cause: str) -> None:
    (alarm,) = check_iteration({**FIRST, "similarity": 0.97, "score": score}, FIRST, CONFIG)
    assert "similarity 0.97, 0.40 at the start" in alarm.message
    assert cause in alarm.message


def test_replies_that_were_alike_from_the_start_raise_an_alarm() -> None:
    """19 of 20 questions with one reply: 0.95² = 0.9025. Of 18 bigrams, one other token changes two: 1 - 2/18 = 0.889."""
    start = {**FIRST, "similarity": 0.91, "length": 18.0}
    (alarm,) = check_iteration(start, start, CONFIG)
    assert (alarm.name, alarm.action) == ("diversity_collapse", "warn")
    assert "similarity 0.91, 0.91 at the start" in alarm.message
    assert check_iteration({**start, "similarity": 0.90}, start, CONFIG) == []
    # Of 25 bigrams: 1 - 2/25 = 0.92, so these are long replies of one form with a different token each.
    long = {**start, "length": 25.0}
    assert check_iteration(long, long, CONFIG) == []
    assert [a.name for a in check_iteration({**long, "similarity": 0.93}, long, CONFIG)] == ["diversity_collapse"]


def test_similarity_is_not_checked_without_a_first_value_or_with_few_questions() -> None:
    older = {name: value for name, value in FIRST.items() if name != "similarity"}
    assert check_iteration({**FIRST, "similarity": 1.0}, older, CONFIG) == []  # a checkpoint of an earlier version
    assert check_iteration(older, FIRST, CONFIG) == []
    few = CONFIG.model_copy(update={"questions_per_iteration": 7})
    assert check_iteration({**FIRST, "similarity": 1.0}, FIRST, few) == []


@pytest.mark.parametrize(("length", "remedy"), [(81.0, "set length_guard"), (19.0, "lower learning_rate")])
def test_a_guard_against_long_replies_is_no_remedy_for_short_ones(length: float, remedy: str) -> None:
    (alarm,) = check_iteration({**FIRST, "length": length}, FIRST, CONFIG)
    assert alarm.message.endswith(f"; {remedy}")


def test_an_explained_variance_that_does_not_exist_is_no_alarm() -> None:
    assert alarms(explained_variance=math.nan) == {}  # all returns were the same: there was nothing to explain


def test_several_alarms_can_go_off_at_once() -> None:
    assert set(alarms(kl=-2.0, length=200.0, first_ratio=0.5)) == {"negative_kl", "length_drift", "ratio_not_one"}


def test_where_watchdogs_only_tell_broken_numbers_still_go_back() -> None:
    config = PolicyConfig(kl_target=4.0, watchdogs="warn")
    told = check_iteration({**FIRST, "kl": 50.0, "entropy": 0.0, "repeated": 1.0}, FIRST, config)
    assert {(a.name, a.action) for a in told} == {(n, "warn") for n in ("kl_runaway", "entropy_collapse", "repeated_reply")}
    (broken,) = check_iteration({**FIRST, "kl": math.nan}, FIRST, config)
    assert broken.action == "roll_back"


def test_equal_replies_to_a_handful_of_questions_are_no_alarm() -> None:
    few = PolicyConfig(kl_target=4.0, questions_per_iteration=7)
    assert check_iteration({**FIRST, "repeated": 1.0}, FIRST, few) == []


def test_a_judge_that_is_asked_often_seldom_ends_a_training_without_a_change() -> None:
    """Readings of the same 64 questions, correlated, with a win rate that never changes: a false alarm in 5% at most."""
    rng, false_alarms, trainings, readings = random.Random(0), 0, 200, 10
    config = PolicyConfig(iterations=readings, judge_every=1)
    for _ in range(trainings):
        skill = [rng.random() for _ in range(64)]
        taken = [[float(rng.random() < p) for p in skill] for _ in range(readings)]
        for number, now in enumerate(taken[1:], start=1):
            best = max(taken[:number], key=sum)
            values = {**FIRST, **JUDGED, "judge_drop": (sum(best) - sum(now)) / 64, "judge_drop_p": _drop_p_value(best, now)}
            if "judge_disagrees" in {alarm.name for alarm in check_iteration(values, FIRST, config)}:
                false_alarms += 1
                break
    assert false_alarms <= 0.05 * trainings


def test_a_clear_drop_ends_a_training() -> None:
    best, now = [1.0] * 50 + [0.0] * 14, [1.0] * 20 + [0.0] * 44
    values = {**FIRST, **JUDGED, "judge_drop": 30 / 64, "judge_drop_p": _drop_p_value(best, now)}
    found = check_iteration(values, FIRST, PolicyConfig(iterations=20, judge_every=1))
    assert "judge_disagrees" in {alarm.name for alarm in found}
    assert _drop_p_value([1.0, None, 1.0], [0.0, 1.0, None]) == 1.0  # one question that both could read is too few
