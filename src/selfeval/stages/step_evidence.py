"""Measure the step evaluator on test pairs, and the labels of steps. Part of the evaluation stage, which passes gold in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from selfeval.algorithms.step_scores import combined_score
from selfeval.evaluation.evaluator import JudgedPair
from selfeval.evaluation.steps import GoldStep, measure_steps
from selfeval.judging.step_labels import step_label
from selfeval.judging.steps import step_ends, step_texts
from selfeval.records import Question, StepLabels
from selfeval.report.schema import Steps
from selfeval.stages.context import Context
from selfeval.stages.steps import ensure_step_evaluator
from selfeval.training.step_evaluator import score_steps

__all__ = ["RightSteps", "evaluate_steps"]

RightSteps = Callable[[str, Sequence[str]], Sequence[bool] | None]
"""Returns for each step of a reply to a question whether the reply is right so far; None if nothing is known about it."""


def evaluate_steps(
    context: Context,
    questions: Mapping[str, Question],
    pairs: Sequence[JudgedPair],
    right_steps: RightSteps | None,
    *,
    has_gold: bool,
) -> Steps | None:
    """Return the figures of the step evaluator; None without `steps.enabled`.

    Args:
        context: context of the round.
        questions: questions by id.
        pairs: judged test pairs.
        right_steps: Optional. Gold of steps.
        has_gold: whether the domain has gold.
    """
    if not context.config.steps.enabled:
        return None
    labels = context.store.read("steps", StepLabels)
    gold = None if right_steps is None else _gold_steps(context, questions, labels, right_steps)
    steps = sum(len(found.ends) - 1 for found in labels)
    return measure_steps(len(labels), steps, gold, pairs, _margins(context, questions, pairs), has_gold=has_gold)


def _gold_steps(
    context: Context, questions: Mapping[str, Question], labels: Sequence[StepLabels], right_steps: RightSteps
) -> list[GoldStep]:
    replies, decode, kind = context.replies(), context.templates.tokenizer.decode, context.config.steps.labels
    steps = []
    for found in labels:
        texts = step_texts(replies[found.reply_id].ids, found.ends, decode)
        rights = right_steps(questions[found.question_id].text, texts)
        # The last step has no completions: its label says whether the reply has the majority's answer.
        known = [] if rights is None else list(zip(found.shares, rights, strict=True))[:-1]
        steps += [GoldStep(found.question_id, step_label(share, kind), right) for share, right in known]
    return steps


def _margins(context: Context, questions: Mapping[str, Question], pairs: Sequence[JudgedPair]) -> list[float]:
    """Return the score by steps of the first reply minus that of the second, per pair."""
    if not pairs:
        return []
    config, loaded = context.config, context.backbone.loaded
    prompts = [context.grade_prompt(p.verdict.question_id, questions[p.verdict.question_id].text) for p in pairs]
    ids = [pair.replies[0].ids for pair in pairs] + [pair.replies[1].ids for pair in pairs]
    ends = [step_ends(reply, context.templates.tokenizer.decode, config.steps.form, loaded.eos_ids) for reply in ids]
    role, budget = ensure_step_evaluator(context), config.backbone.batch_tokens
    logits = score_steps(context.backbone, role, prompts * 2, ids, ends, budget)
    scores = [float(combined_score(torch.tensor(row), config.steps.combine)) for row in logits]
    return [first - second for first, second in zip(scores[: len(pairs)], scores[len(pairs) :], strict=True)]
