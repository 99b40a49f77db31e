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
from selfeval.judging.templates import Templates, templates_folder
from selfeval.rollout.engine import Request, generate
from selfeval.stages.context import as_begun
from selfeval.stages.evaluators import load_members, temperature_of
from selfeval.store import read_json
from selfeval.training.evaluator import EVALUATOR
from selfeval.training.scoring import EvaluatorScorer

__all__ = ["Scored", "score_texts"]


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


def score_texts(
    config: RunConfig, folder: Path, question: str, replies: Sequence[str], sure: float, *, trust_remote_code: bool = False
) -> Scored:
    """Scores texts under the run's evaluator; confidence is sigmoid(margin / temperature).

    Raises:
        RunFolderError: the run has no evaluator yet.
        InputError: a reply or the question is empty.
    """
    roles = folder / "roles"
    if not (roles / EVALUATOR / "evaluator.json").is_file():
        raise RunFolderError(f"{folder} has no evaluator yet; `selfeval run` trains it (stage evaluator)")
    if not question.strip() or any(not r.strip() for r in replies):
        raise InputError("the question and every reply need some text")
    begun = as_begun(config, read_json(folder / "run.json"))
    # The folder may be somebody else's: it does not choose where weights that do not fit in memory are written.
    begun = begun.model_copy(update={"placement": begun.placement.model_copy(update={"folder": ""})})
    backbone = Backbone.load(begun, trust_remote_code=trust_remote_code)
    scorer = EvaluatorScorer(backbone, config.batch_tokens, load_members(backbone, roles, config))
    templates = Templates.load(templates_folder(config.model, config.templates), backbone.loaded.tokenizer)
    end = backbone.loaded.eos_ids[:1]
    ids = [(*templates.reply_ids(text), *end) for text in replies]
    prompt = templates.prompt("grade", question=question, working=_working(backbone, templates, config, question))
    scores = scorer.of([prompt] * len(ids), ids).whole_B.tolist()
    if len(scores) < 2:
        return Scored(tuple(scores), None, None, unsure=False)
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    temperature = temperature_of(roles)
    confidence = 1 / (1 + math.exp(-(scores[order[0]] - scores[order[1]]) / temperature.value))
    return Scored(tuple(scores), order[0], confidence, unsure=confidence < sure, calibrated=temperature.pairs > 0)


def _working(backbone: Backbone, templates: Templates, config: RunConfig, question: str) -> str:
    """The model's own greedy reply, where the grade template shows it."""
    if not templates.grades_with_working:
        return ""
    request = Request(templates.prompt("reply", question=question), temperature=0.0)
    with backbone.acting_as(BASE):
        rollouts = generate(backbone, [request], max_new_tokens=config.replies.max_new_tokens, seed=0)
    return templates.text(rollouts[0].ids)
