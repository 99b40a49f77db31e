"""Recommended seeds: training questions near uncertain test questions, in the format of a seeds file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from selfeval.errors import InputError, RunFolderError
from selfeval.records import Question, Reply, ScoredPair, Seed, Split, VerdictState
from selfeval.runs.reader import RunReader
from selfeval.runs.search import RunSearch
from selfeval.runs.seed_recommendation import RecommendedSeed, recommend_seeds, uncertainty_of_questions
from selfeval.stages.seeds import read_seeds
from selfeval.store import RUN_SCHEMA, RunStore, write_json
from word_counts import WordCounts

pytestmark = pytest.mark.filterwarnings("ignore:builtin type .* has no __module__ attribute:DeprecationWarning")
TOPICS = {"apples": 4.0, "horses": 0.0, "planets": 1.0}
"""Topics of questions, with the evaluator's margin on each."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run with a test question of each topic and two training questions."""
    from selfeval.config import RunConfig

    store = RunStore(tmp_path / "run")
    store.update_run(schema=RUN_SCHEMA, name="topics", status="finished", config=RunConfig().model_dump(mode="json"), stages={})
    questions, replies, scored = [], [], []
    for topic, margin in TOPICS.items():
        texts = (f"how many {topic} are there", f"count {topic} please", f"which {topic} are here")
        splits = (Split.TEST, Split.TRAIN, Split.TRAIN)
        for n, (text, split) in enumerate(zip(texts, splits, strict=True)):
            questions.append(Question(f"{topic}-{n}", text, split, "self"))
        replies += [Reply(f"{topic}-{k}", f"{topic}-0", f"{k}", (7,), "sample", 1.0, 1.0, -1.0, True) for k in "ab"]
        scored.append(ScoredPair(f"{topic}-0", f"{topic}-a", f"{topic}-b", VerdictState.KEPT, 0.99, margin, 0.0, None, None))
    store.write_records("seeds.jsonl", [Seed("which horses are here")])
    store.write_shard("questions", 0, questions)
    store.write_shard("replies", 0, replies)
    store.write_records("evaluation/scored.jsonl", scored)
    write_json(tmp_path / "run" / "evaluation" / "figures.json", {"evaluator": {"temperature": 1.0}})
    store.close()
    return tmp_path / "run"


def recommended(folder: Path, count: int) -> list[RecommendedSeed]:
    embedder = WordCounts()
    reader = RunReader(folder)
    return recommend_seeds(reader, RunSearch(reader, embedder).questions, embedder, count)


def test_uncertain_topics_come_first_and_test_questions_never(folder: Path) -> None:
    found = recommended(folder, 6)
    assert found[0].question_id == "horses-1", "the other question about horses is a seed already"
    assert {seed.question_id for seed in found} == {f"{topic}-{n}" for topic in TOPICS for n in (1, 2)} - {"horses-2"}
    assert found[0].uncertainty > {seed.question_id: seed.uncertainty for seed in found}["apples-1"]
    assert recommended(folder, 1) == found[:1]


def test_the_uncertainty_is_that_of_the_pairs(folder: Path) -> None:
    # sigmoid(margin) for the judge's 0.99: 1 - 0.982, 1 - 0.5 and 1 - 0.731.
    assert uncertainty_of_questions(RunReader(folder)) == pytest.approx(
        {"apples-0": 0.01799, "horses-0": 0.5, "planets-0": 0.26894}, abs=1e-4
    )


def test_disagreement_of_members_adds_uncertainty(folder: Path) -> None:
    reader = RunReader(folder)
    before = uncertainty_of_questions(reader)
    store = RunStore(folder)
    store.write_records("evaluation/scored.jsonl", [replace(pair, disagreement=3.0) for pair in reader.records("scored")])
    store.close()
    after = uncertainty_of_questions(reader)
    assert after["planets-0"] > before["planets-0"] + 0.05
    assert after["horses-0"] == before["horses-0"] == 0.5


def test_the_output_is_a_file_of_seeds(folder: Path, tmp_path: Path) -> None:
    found = recommended(folder, 3)
    path = tmp_path / "more.jsonl"
    path.write_text("".join(json.dumps(seed.as_json()) + "\n" for seed in found), encoding="utf-8")
    seeds = read_seeds(str(path))
    assert [seed.question for seed in seeds] == [seed.question for seed in found]
    assert seeds[0].extra["question_id"] == found[0].question_id


def test_a_run_without_evaluation_says_so(folder: Path) -> None:
    (folder / "evaluation" / "scored.jsonl").unlink()
    with pytest.raises(RunFolderError, match="has no scored pairs yet"):
        recommended(folder, 3)
    with pytest.raises(InputError, match="must be at least 1, got 0"):
        recommended(folder, 0)
