from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest

from selfeval.config import QuestionsConfig
from selfeval.errors import ConfigError
from selfeval.quality.embeddings import Vectors
from selfeval.records import Drop
from selfeval.stages.question_meaning import Meaning, compares_meaning, draw_from_topics, topic_weights

SEEDS = [f"seed at {angle}" for angle in ("0", "10", "20", "30", "40")]


class Compass:
    """Embeds a text as a point on a circle: its last word is the angle in degrees."""

    name = "compass"

    def __init__(self) -> None:
        self.embedded: list[list[str]] = []

    def embed(self, texts: Sequence[str]) -> Vectors:
        self.embedded.append(list(texts))
        angles = np.deg2rad([float(text.split()[-1]) for text in texts])
        return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def distance(degrees: float) -> float:
    return 1.0 - float(np.cos(np.deg2rad(degrees)))


def meaning(**settings: float) -> Meaning:
    return Meaning(QuestionsConfig.model_validate(settings), Compass(), SEEDS)


def test_a_question_far_from_all_seeds_is_outside_the_domain() -> None:
    group = meaning(off_domain=1.5).group(["near 45", "far 60", "on 20", "below -9"])
    assert group.drop("near 45") is None
    assert group.drop("on 20") is None
    drop = group.drop("far 60")
    assert drop is not None
    assert (drop.reason, drop.text, drop.detail["nearest_seed"]) == ("off_domain", "far 60", "seed at 40")
    assert drop.detail["distance"] == pytest.approx(distance(20), abs=1e-4)
    assert drop.detail["threshold"] == pytest.approx(1.5 * distance(10), abs=1e-4)


def test_a_model_that_writes_about_something_else_keeps_half_of_its_questions() -> None:
    texts = [f"far {angle}" for angle in range(100, 116)]
    group = meaning(off_domain=1.25).group(texts)
    drops = [drop for text in texts if (drop := group.drop(text)) is not None]
    assert [drop.text for drop in drops] == texts[8:]
    assert all(drop.detail["limited"] is True for drop in drops)
    few = meaning(off_domain=1.25).group(texts[:3])
    drops = [drop for text in texts[:3] if (drop := few.drop(text)) is not None]
    assert len(drops) == 3
    assert not any("limited" in drop.detail for drop in drops)


@pytest.mark.parametrize("name", ["off_domain", "paraphrase"])
def test_repeated_seeds_do_not_change_the_scale(name: str) -> None:
    setting = QuestionsConfig.model_validate({name: 1.25 if name == "off_domain" else 0.3})
    repeated = [copy for seed in SEEDS for copy in (seed, seed.upper(), f"{seed}!")]
    found, once = (Meaning(setting, Degrees(), seeds).group(["on 44", "near 42"]) for seeds in (repeated, SEEDS))
    for text in ("on 44", "near 42"):
        expected = once.drop(text)
        drop = found.drop(text)
        assert (drop is None) == (expected is None)
        if drop is not None and expected is not None:
            assert {k: v for k, v in drop.detail.items() if k != "of"} == {
                k: v for k, v in expected.detail.items() if k != "of"
            }
    with pytest.raises(ConfigError, match=rf"questions\.{name} needs at least 5 different seeds.* has 2;"):
        Meaning(setting, Degrees(), repeated[:6])


class Degrees(Compass):
    """Reads the degrees of a text with or without punctuation."""

    def embed(self, texts: Sequence[str]) -> Vectors:
        return super().embed([text.rstrip("!") for text in texts])


@pytest.mark.parametrize("name", ["off_domain", "paraphrase"])
def test_seeds_with_equal_vectors_are_refused(name: str) -> None:
    seeds = [f"{letter} at 20" for letter in "abcdef"]
    with pytest.raises(ConfigError, match=rf"questions\.{name} compares .* most of the 6 seeds have the same vector"):
        Meaning(QuestionsConfig.model_validate({name: 1.0}), Compass(), seeds)


class Letters(Compass):
    """The last word is a letter: a is 0 degrees, b is 5, and so on."""

    def embed(self, texts: Sequence[str]) -> Vectors:
        return super().embed([f"{5 * (ord(text[-1]) - ord('a'))}" for text in texts])


def test_paraphrases_are_found_among_seeds_earlier_and_accepted_questions() -> None:
    seeds = [f"seed {letter}" for letter in "adgjm"]  # 15 degrees apart
    found = Meaning(QuestionsConfig(paraphrase=0.3), Letters(), seeds)  # radius 8.2 degrees
    found.add_all(["q0", "q1"], ["earlier t", "with 7 apples w"])
    group = found.group(["copy b", "copy u", "copy w", "7 copies w", "new p", "copy q"])
    drops = {text: group.drop(text) for text in ("copy b", "copy u", "copy w", "7 copies w", "new p", "copy q")}
    assert {text: drop.detail["of"] for text, drop in drops.items() if drop is not None} == {
        "copy b": "seed-0",
        "copy u": "q0",
        "7 copies w": "q1",  # "copy w" has other numbers
    }
    detail = {"of": "q0", "distance": round(distance(5), 4), "threshold": round(0.3 * distance(15), 4)}
    assert drops["copy u"] == Drop("questions", "paraphrase", "copy u", detail)
    group.accept("q2", "new p")
    later = group.drop("copy q")
    assert later is not None
    assert later.detail["of"] == "q2"


def test_too_few_seeds_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"questions\.off_domain needs at least 5 different seeds.* has 4;"):
        Meaning(QuestionsConfig(off_domain=1.25), Compass(), SEEDS[:4])
    assert not compares_meaning(QuestionsConfig(coverage=True))


def test_a_thin_topic_is_drawn_as_often_as_a_frequent_one() -> None:
    seeds, pool = ["a 0", "b 1"], [*[f"many {angle / 10}" for angle in range(40)], "alone 90"]
    of_seeds, of_pool = topic_weights(Compass().embed(seeds), Compass().embed(pool), 0)
    assert (len(of_seeds), len(of_pool)) == (2, 41)
    assert sum(of_seeds) == pytest.approx(1.0)
    assert sum(of_pool) == pytest.approx(1.0)
    # Five clusters, round(√(43 / 2)), and all of them have questions.
    assert max(of_pool) == of_pool[-1] == pytest.approx(1 / 5)
    assert min(of_pool) > 0


def test_a_seed_with_a_topic_for_itself_is_drawn_as_often_as_the_topic_of_the_others() -> None:
    """A hundred questions are like four of the five seeds: 7 clusters, round(√(105 / 2)), one with the fifth seed alone."""
    seeds, pool = ["a 0", "b 0", "c 0", "d 0", "alone 120"], [f"many {angle % 6 * 12}" for angle in range(100)]
    of_seeds, _ = topic_weights(Compass().embed(seeds), Compass().embed(pool), 0)
    assert of_seeds == pytest.approx([1 / 8] * 4 + [1 / 2])


def test_without_weights_the_draw_is_uniform() -> None:
    assert draw_from_topics(random.Random(3), "abcdef", None, 3) == random.Random(3).sample("abcdef", 3)
