"""How the stage samples: test questions as evaluation does, training questions from the ranges of the stage."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import tiny_models
from selfeval.config import RepliesConfig
from selfeval.judging.templates import Templates, templates_folder
from selfeval.records import Question, Split
from selfeval.stages.draws import Draws
from selfeval.stages.replies import WriteReplies


def test_test_questions_are_sampled_as_evaluation_is_configured_and_training_questions_are_not() -> None:
    model: Any = SimpleNamespace(templates=Templates.load(templates_folder("none"), tiny_models.words_tokenizer()))
    config = RepliesConfig(temperature=(0.9, 1.1), top_p=(0.95, 1.0))
    work = WriteReplies(config, 8, 64, Draws(0), test_temperature=0.5, test_top_p=0.75)
    tested = work._request(model, Question("q0", "Why?", Split.TEST, "self"), 0)
    assert (tested.temperature, tested.top_p) == (0.5, 0.75)
    trained = work._request(model, Question("q1", "Why?", Split.TRAIN, "self"), 0)
    assert 0.9 <= trained.temperature <= 1.1
    assert 0.95 <= trained.top_p <= 1.0
