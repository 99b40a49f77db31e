"""Recommend training questions of a run as seeds of the next one: where its evaluator is least certain."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Any

from selfeval.errors import InputError, RunFolderError
from selfeval.labelling.pairs import of_scored
from selfeval.labelling.queue import expected_error
from selfeval.quality.embeddings import Embedder
from selfeval.quality.seed_recommendation import expected_uncertainty, farthest_first, spread_margin_temperature
from selfeval.quality.vector_index import VectorIndex
from selfeval.records import Question, ScoredPair, Split
from selfeval.runs.reader import RunReader
from selfeval.store import read_object

__all__ = ["RecommendedSeed", "recommend_seeds", "uncertainty_of_questions"]


@dataclass(frozen=True)
class RecommendedSeed:
    """A question to ask about more: a line of a seeds file.

    Attributes:
        question: its text; of a conversation, the first user turn.
        question_id: its id in the run.
        uncertainty: expected probability that the evaluator or the judge is wrong about a pair of replies to it.
    """

    question: str
    question_id: str
    uncertainty: float

    def as_json(self) -> dict[str, Any]:
        """Return the line of a seeds file."""
        return asdict(self)


def recommend_seeds(reader: RunReader, questions: VectorIndex, embedder: Embedder, count: int) -> list[RecommendedSeed]:
    """Recommend training questions as seeds: different from each other and from the seeds, in uncertain regions.

    The uncertainty is measured on test questions, because only they have evaluator scores that were not trained on, and spread
    to the nearest training questions. Test questions are never recommended: a run that trained on questions like them could not
    be compared with this one on its test questions.

    Args:
        reader: files of the run.
        questions: index of all questions of the run.
        embedder: embedder of the index.
        count: maximum number of seeds, > 0.

    Raises:
        InputError: the count is not positive.
        RunFolderError: the run has no evaluation yet, or a file is damaged.
    """
    if count < 1:
        raise InputError(f"the number of seeds must be at least 1, got {count}")
    uncertain = uncertainty_of_questions(reader)
    asked: list[Question] = reader.records("questions")
    rows = {key: row for row, key in enumerate(questions.contents.keys)}
    train = [question for question in asked if question.split == Split.TRAIN and question.id in rows]
    if not uncertain or not train:
        raise RunFolderError(f"{reader.folder} has no judged test pairs, or no training questions to recommend")
    candidates_MD = questions.vectors([rows[question.id] for question in train])
    expected_M = expected_uncertainty(candidates_MD, questions.vectors([rows[key] for key in uncertain]), [*uncertain.values()])
    known_SD = embedder.embed([seed.question for seed in reader.records("seeds")])
    chosen = farthest_first(candidates_MD, expected_M.tolist(), count, known_SD)
    return [RecommendedSeed(train[row].opening, train[row].id, float(expected_M[row])) for row in chosen]


def uncertainty_of_questions(reader: RunReader) -> dict[str, float]:
    """Return the mean expected error of the judged pairs of each test question (`selfeval.labelling.queue.expected_error`).

    Raises:
        RunFolderError: the run has no evaluation yet, or a file is damaged.
    """
    scored: list[ScoredPair] = reader.records("scored")
    questions = {question.id: question.text for question in reader.records("questions", split=Split.TEST)}
    replies = {row["id"]: row["text"] for row in reader.rows("replies", split=Split.TEST)}
    path = reader.folder / "evaluation" / "figures.json"
    reader.check([path])
    temperature = float(read_object(path, "evaluator")["evaluator"]["temperature"])
    errors: defaultdict[str, list[float]] = defaultdict(list)
    for pair, seen in zip(of_scored(scored, questions, replies), scored, strict=True):
        spread = spread_margin_temperature(temperature, seen.disagreement)
        errors[pair.question_id].append(expected_error(pair, spread))
    return {key: sum(found) / len(found) for key, found in errors.items()}
