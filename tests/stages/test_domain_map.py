"""The texts of the map: how many of each kind, drawn by the seed, and the file of their points."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny_models
from selfeval.config import RunConfig
from selfeval.evaluation.domain_map import results_of
from selfeval.quality.embeddings import Vectors
from selfeval.records import Drop, Question, Seed, Split
from selfeval.report.map_points import MAP_FILE, MapPoint, read_map_points
from selfeval.stages.context import Context
from selfeval.stages.domain_map import draw_map, fit_embedder, texts_of_domain
from selfeval.stages.graph import STAGES
from selfeval.stages.terminal import Terminal
from selfeval.store import RunStore

QUESTIONS = [Question(f"q{n}", f"How many {n}?", Split.TEST if n % 2 else Split.TRAIN, "self") for n in range(60)]
SEEDS = [Seed(f"Seed {n}?") for n in range(12)]
DROPS = [Drop("questions", "too_short", f"Drop {n}") for n in range(40)] + [Drop("questions", "unfinished", " ")]
NO_RESULTS = results_of([], [], temperature=1.0)


class Numbered:
    """An embedder of the last number of a text."""

    name = "numbered"

    def embed(self, texts: Sequence[str]) -> Vectors:
        angles = [float(text.strip("?").split()[-1]) for text in texts]
        return np.array([[np.cos(a), np.sin(a)] for a in angles], dtype=np.float32)


def context(folder: Path, **evaluation: Any) -> Context:
    made = Context(RunConfig.model_validate({"evaluation": evaluation}), RunStore(folder / "run"), Terminal(quiet=True))
    vars(made)["seeds"] = SEEDS
    made.store.write_shard("questions", 0, QUESTIONS, DROPS)
    return made


def points(made: Context) -> tuple[MapPoint, ...]:
    assert draw_map(made, QUESTIONS, Numbered(), NO_RESULTS) is not None
    return read_map_points(made.store.root)


def test_all_texts_are_drawn_if_there_is_room(tmp_path: Path) -> None:
    made = context(tmp_path)
    found = draw_map(made, QUESTIONS, Numbered(), NO_RESULTS)
    assert found is not None
    assert found.points == found.texts == 60 + 12 + 40, "a drop without text has no place"
    assert Counter(p.kind for p in read_map_points(made.store.root)) == {"train": 30, "test": 30, "seed": 12, "dropped": 40}


def test_a_small_map_has_a_share_of_each_kind_and_the_same_texts_every_time(tmp_path: Path) -> None:
    first = points(context(tmp_path / "a", map_points=50))
    counts = Counter(p.kind for p in first)
    assert (counts["seed"], counts["dropped"], counts["train"] + counts["test"]) == (5, 15, 30)
    assert first == points(context(tmp_path / "b", map_points=50))
    assert all(p.reason == "too_short" for p in first if p.kind == "dropped")
    other = Context(
        RunConfig.model_validate({"seed": 1, "evaluation": {"map_points": 50}}), RunStore(tmp_path / "c"), Terminal(quiet=True)
    )
    vars(other)["seeds"] = SEEDS
    other.store.write_shard("questions", 0, QUESTIONS, DROPS)
    assert {p.text for p in points(other)} != {p.text for p in first}


def test_its_file_is_an_output_that_must_be_intact(tmp_path: Path) -> None:
    [stage] = [stage for stage in STAGES if stage.name == "evaluation"]
    assert tmp_path / MAP_FILE in stage.kept_paths(tmp_path)
    assert tmp_path / MAP_FILE not in stage.output_paths(tmp_path, RunConfig()), "runs of earlier versions have none"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_of_the_run_embeds_its_questions(tmp_path: Path, family: str) -> None:
    made = context(tmp_path)
    backbone = tiny_models.backbone(family, 384)
    backbone.loaded.tokenizer = tiny_models.words_tokenizer()
    vars(made)["backbone"] = backbone
    embedder = fit_embedder(made, texts_of_domain(made, QUESTIONS))
    found = draw_map(made, QUESTIONS, embedder, NO_RESULTS)
    assert found is not None
    assert found.embedder.startswith("backbone-")
    assert len(found.clusters) >= 1
