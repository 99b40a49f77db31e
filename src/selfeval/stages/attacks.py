"""Score attack replies with the evaluator. Part of the evaluation stage, so it may read gold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from selfeval.config import EvaluatorConfig, judge_spec
from selfeval.evaluation.attacks import KINDS, Attack, Target, attacks_on, measure_attacks, others_of
from selfeval.records import Question, Reply, Split
from selfeval.report.schema import AttackName, Attacks
from selfeval.stages.context import Context
from selfeval.stages.evaluation_work import Score
from selfeval.stages.gold import Gold, ask_ahead

__all__ = ["attack_evaluator", "kinds_trained", "most_attacks"]

_OF_GOLD: tuple[AttackName, ...] = ("altered_number", "plain_right")


def most_attacks(context: Context) -> int:
    """Return the largest number of replies that are scored: an ordinary one, and one of each kind of attack, per question."""
    return min(context.config.evaluation.attacks, len(context.questions(Split.TEST))) * (1 + len(KINDS))


def attack_evaluator(context: Context, gold: Gold | None, score: Score | None = None) -> Attacks | None:
    """Attack the evaluator on the first `evaluation.attacks` test questions and return how often it held.

    The ordinary replies are the run's own: with gold the first one that is right, otherwise the first sample. A question
    without such a reply is left out.

    Args:
        context: context of the round.
        gold: Optional. Gold oracle of the domain.
        score: Optional. Scores replies. Default: the evaluators of the context, in this process.

    Returns:
        The figures; None if no question can be attacked.
    """
    questions = context.questions(Split.TEST)[: context.config.evaluation.attacks]
    targets = _targets(_ordinary(context, questions, gold))
    verdict, attacks = _verdict(context), []
    for target in targets:
        is_right = None if gold is None else _right_of(gold, target.question)
        attacks += attacks_on(target, seed=context.config.seed, verdict=verdict, is_right=is_right)
    if not attacks:
        return None
    margins = _margins(context, {q.id: q for q in questions}, attacks, score)
    return measure_attacks(attacks, margins, by_gold=gold is not None, trained=kinds_trained(context.config.evaluator))


def kinds_trained(config: EvaluatorConfig) -> frozenset[AttackName]:
    """Return the kinds of attacks that the additional training pairs have, or resemble."""
    found: set[AttackName] = set()
    if config.attacks:
        found.update(kind for kind in KINDS if kind not in _OF_GOLD)
    if config.mismatched:
        found |= {"other_question", "long"}
    if config.garbled:
        found.add("repeated")  # a looped phrase is another text of the same kind; the other styles are none of `plain_right`
    return frozenset(found)


def _right_of(gold: Gold, question: str) -> Callable[[str], bool | None]:
    return lambda reply: gold.is_right(question, reply)


def _ordinary(context: Context, questions: Sequence[Question], gold: Gold | None) -> list[tuple[Question, str]]:
    """Return each question with its ordinary reply; without the questions that have none."""
    by_question: dict[str, list[Reply]] = {}
    for reply in context.replies().values():
        by_question.setdefault(reply.question_id, []).append(reply)
    found = [(q, [r.text for r in by_question.get(q.id, ()) if r.finished and r.text.strip()]) for q in questions]
    ask_ahead(gold, [(q.text, text) for q, texts in found for text in texts])
    chosen = [(q, next((text for text in texts if gold is None or gold.is_right(q.text, text)), None)) for q, texts in found]
    return [(q, text) for q, text in chosen if text is not None]


def _targets(ordinary: Sequence[tuple[Question, str]]) -> list[Target]:
    texts = [text for _, text in ordinary]
    return [Target(q.id, q.text, text, others_of(texts, index)) for index, (q, text) in enumerate(ordinary)]


def _verdict(context: Context) -> str:
    """Return a verdict for the first reply in the form of the run's judge; empty if the judge has no labels."""
    members = context.config.verdicts.members
    kinds = [kind for member in members for kind in judge_spec("judge", member.judge).templates.get("judge", ())]
    named = next((kind.name for kind in kinds if kind.labels), None)
    if named is None:
        return ""
    labels = context.templates.labels(named)
    return f"{labels.lead}{labels.all[0]}".strip()


def _margins(
    context: Context, questions: Mapping[str, Question], attacks: Sequence[Attack], score: Score | None
) -> list[float]:
    """Return the score of the better reply minus that of the attack."""
    # The ordinary reply of a question is scored once.
    rows = list(dict.fromkeys((a.question_id, text) for a in attacks for text in (a.better, a.worse)))
    prompts = [context.grade_prompt(question_id, questions[question_id].text) for question_id, _ in rows]
    ids = [context.typed_ids(prompt, text) for prompt, (_, text) in zip(prompts, rows, strict=True)]
    # The mean over members, as for test pairs.
    scores = dict(zip(rows, (score or context.scorer().each)(prompts, ids).mean(0).tolist(), strict=True))
    return [scores[a.question_id, a.better] - scores[a.question_id, a.worse] for a in attacks]
