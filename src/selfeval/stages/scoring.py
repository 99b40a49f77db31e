"""Scores replies that a user gives with the evaluator of a finished run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from selfeval.backbone.adapters import BASE
from selfeval.backbone.roles import Backbone
from selfeval.config import RunConfig
from selfeval.errors import InputError, RunFolderError
from selfeval.judging.templates import Templates
from selfeval.rollout.engine import Request, generate
from selfeval.stages.context import as_begun
from selfeval.stages.evaluators import Temperature, load_members, member_roles, temperature_of
from selfeval.stages.prompts import templates_of_run
from selfeval.store import check_files, read_run
from selfeval.training.evaluator import EVALUATOR
from selfeval.training.scoring import EvaluatorScorer

__all__ = ["RunScorer", "Scored", "check_texts", "score_texts"]


@dataclass(frozen=True)
class Scored:
    """Scores in the order of the replies; with two or more, the best one and the confidence that it beats the next.

    `calibrated` says whether the confidence has a temperature that was fitted on held-out pairs.
    """

    scores: tuple[float, ...]
    preferred: int | None
    confidence: float | None
    unsure: bool
    calibrated: bool = False


@dataclass(frozen=True)
class RunScorer:
    """The evaluator of a run, loaded once for any number of questions."""

    backbone: Backbone
    templates: Templates
    scorer: EvaluatorScorer
    temperature: Temperature
    config: RunConfig

    @classmethod
    def load(cls, config: RunConfig, folder: Path, *, trust_remote_code: bool = False) -> RunScorer:
        """Loads base, evaluators and prompts of a run.

        Raises:
            RunFolderError: the run has no evaluator yet, or a file of it is damaged.
        """
        roles = folder / "roles"
        if not (roles / EVALUATOR / "evaluator.json").is_file():
            raise RunFolderError(f"{folder} has no evaluator yet; `selfeval run` trains it (stage evaluator)")
        check_files(folder, [roles / role for role in member_roles(config)])
        begun = as_begun(config, read_run(folder))
        # The folder may be somebody else's: it does not choose where weights that do not fit in memory are written.
        begun = begun.model_copy(update={"placement": begun.placement.model_copy(update={"folder": ""})})
        backbone = Backbone.load(begun, trust_remote_code=trust_remote_code)
        scorer = EvaluatorScorer(backbone, config.batch_tokens, load_members(backbone, roles, config))
        templates = templates_of_run(folder, backbone.loaded.tokenizer)
        return cls(backbone, templates, scorer, temperature_of(roles), config)

    def score(self, asked: Sequence[tuple[str, Sequence[str]]], sure: float) -> list[Scored]:
        """Scores the replies to each question; confidence is sigmoid(margin / temperature).

        Args:
            asked: questions with their replies.
            sure: confidence below which a preference is unsure.

        Raises:
            InputError: a reply or a question is empty.
        """
        check_texts(asked)
        workings = self._workings([question for question, _ in asked])
        end = self.backbone.loaded.eos_ids[:1]
        prompts, ids = [], []
        for (question, replies), working in zip(asked, workings, strict=True):
            prompt = self.templates.prompt("grade", question=question, working=working)
            prompts += [prompt] * len(replies)
            ids += [(*self.templates.reply_ids(text), *end) for text in replies]
        scores = iter(self.scorer.of(prompts, ids).whole_B.tolist())
        return [self._scored([next(scores) for _ in replies], sure) for _, replies in asked]

    def _scored(self, scores: Sequence[float], sure: float) -> Scored:
        if len(scores) < 2:
            return Scored(tuple(scores), None, None, unsure=False)
        order = sorted(range(len(scores)), key=lambda i: -scores[i])
        confidence = 1 / (1 + math.exp(-(scores[order[0]] - scores[order[1]]) / self.temperature.value))
        calibrated = self.temperature.pairs > 0
        return Scored(tuple(scores), order[0], confidence, unsure=confidence < sure, calibrated=calibrated)

    def _workings(self, questions: Sequence[str]) -> list[str]:
        """The model's own greedy replies, where the grade template shows them."""
        if not self.templates.grades_with_working:
            return [""] * len(questions)
        requests = [Request(self.templates.prompt("reply", question=question), temperature=0.0) for question in questions]
        limit, rows = self.config.replies.max_new_tokens, self.config.rollout_rows
        with self.backbone.acting_as(BASE):
            rollouts = generate(self.backbone, requests, max_new_tokens=limit, seed=0, rows=rows)
        return [self.templates.text(rollout.ids) for rollout in rollouts]


def check_texts(asked: Sequence[tuple[str, Sequence[str]]]) -> None:
    """Refuses questions and replies without any text.

    Raises:
        InputError: there is one.
    """
    for question, replies in asked:
        if not question.strip() or any(not reply.strip() for reply in replies):
            raise InputError("the question and every reply need some text")


def score_texts(
    config: RunConfig, folder: Path, question: str, replies: Sequence[str], sure: float, *, trust_remote_code: bool = False
) -> Scored:
    """Scores the replies to one question under the run's evaluator; see `RunScorer`.

    Raises:
        RunFolderError: the run has no evaluator yet, or a file of it is damaged.
        InputError: a reply or the question is empty.
    """
    check_texts([(question, replies)])
    return RunScorer.load(config, folder, trust_remote_code=trust_remote_code).score([(question, replies)], sure)[0]
