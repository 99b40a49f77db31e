"""The trained evaluator of a run: scores replies, compares them, and serves as a reward function."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from selfeval.errors import InputError, RunFolderError
from selfeval.labelling.threshold_file import saved_sure
from selfeval.records import Question, VerdictState
from selfeval.report.labels import DEFAULT_SURE
from selfeval.runs.comparison import Comparison, check_sure
from selfeval.runs.conversations import AnyQuestion, check_conversations, question_from, questions_from
from selfeval.runs.export_tokenizers import pick_tokenizers
from selfeval.runs.member_scores import MemberScores
from selfeval.runs.members import load_members, member_roles
from selfeval.runs.model import RunModel, TrainedModel
from selfeval.runs.pair_confidence import PairConfidence
from selfeval.runs.reader import RunReader
from selfeval.runs.reward import Text, content_of, question_of, text_of
from selfeval.training.evaluator import EVALUATOR
from selfeval.training.scoring import EvaluatorScorer

__all__ = ["Evaluator", "Ranking", "RewardFunction"]

RewardFunction = Callable[..., list[float]]
"""Reward function with TRL's signature: `reward(prompts=..., completions=..., **columns)`."""

_MOST_REFERENCE_ANSWERS = 4096
"""Reference answers that are kept; questions may have thousands of characters."""


@dataclass(frozen=True)
class Ranking:
    """Scores in the order of the replies; for two or more, the best one and the confidence that it beats the next.

    `unsure` is True if that confidence is too low, or if the two replies or their scores are equal, as in
    `Evaluator.compare`. `calibrated` is True if the temperature of the confidence was fitted on held-out pairs.
    """

    scores: tuple[float, ...]
    preferred: int | None
    confidence: float | None
    unsure: bool
    calibrated: bool = False


class Evaluator(TrainedModel):
    """The trained evaluator of a run, loaded once for any number of questions.

    Use `Evaluator.load`. Scores of replies to one question are comparable; those of different questions are not. An ensemble
    (`evaluator.members`) scores as the mean of its members.

    Example:
        >>> evaluator = Evaluator.load("runs/first")
        >>> question = "Tom has 3 pens. He buys 2 more. How many pens does Tom have now?"
        >>> good, bad = evaluator.score(question, ["3 + 2 = 5. The answer is 5.", "3 - 2 = 1. The answer is 1."])
        >>> evaluator.compare(question, "The answer is 5.", "The answer is 5.").preferred
        'unsure'
    """

    def __init__(self, model: RunModel) -> None:
        super().__init__(model)
        members = load_members(model.backbone, model.roles, model.config)
        model.backbone.budget.shorter = "shorten the question or the replies"
        self._scorer = EvaluatorScorer(model.backbone, model.config.backbone.batch_tokens, members)
        self._confidence = PairConfidence.of(model.roles)
        self._sure = saved_sure(model.reader.folder)
        self._reference_answers: dict[Question, str] = {}

    @property
    def sure(self) -> float:
        """Confidence below which a preference is unsure: the threshold from labels of people, otherwise 0.8.

        `selfeval label` chooses the threshold; see `label_threshold.json` in the run folder.
        """
        return DEFAULT_SURE if self._sure is None else self._sure

    def sure_or(self, given: float | None) -> float:
        """Return a given confidence threshold, or `sure` if none is given.

        Raises:
            InputError: it is not between 0.5 and 1.
        """
        sure = self.sure if given is None else given
        check_sure(sure)
        return sure

    @staticmethod
    def check(reader: RunReader) -> None:
        """Refuse a run without a complete evaluator, without loading anything.

        Raises:
            RunFolderError: the run has no evaluator yet, or one of its files is damaged.
        """
        roles = reader.roles_folder
        if not (roles / EVALUATOR / "evaluator.json").is_file():
            raise RunFolderError(f"{reader.folder} has no evaluator yet; `selfeval run` trains it (stage evaluator)")
        reader.check([roles / role for role in member_roles(reader.config)])

    # -- scores ---------------------------------------------------------------------------------------------------------

    def score(self, question: AnyQuestion | Sequence[AnyQuestion], replies: Sequence[str]) -> list[float]:
        """Score replies; higher is better.

        Args:
            question: one question for all replies, or a list with one per reply. A question is a text, or a conversation: a
                list of messages with `role` and `content` that ends with a message of the user.
            replies: the texts to score.

        Returns:
            One score per reply, in their order. Those of an ensemble are `MemberScores`: floats with the scores of the members,
            which `comparison_of` and `confidences` need for a confidence that depends on their disagreement.

        Raises:
            InputError: a text is empty, a conversation is malformed, or the numbers of questions and replies differ.

        Example:
            >>> evaluator = Evaluator.load("runs/first")
            >>> len(evaluator.score(["What is 1 + 1?", "What is 2 + 2?"], ["2", "4"]))
            2
        """
        if isinstance(replies, str):
            raise InputError("replies must be a list of strings, got a single string")
        questions, is_single = questions_from(question)
        questions = questions * len(replies) if is_single else questions
        if len(questions) != len(replies):
            raise InputError(
                f"got {len(questions)} questions and {len(replies)} replies; pass one question per reply, or a single question"
            )
        _check_texts(replies)
        return self._scores(questions, replies)

    def rank(self, asked: Sequence[tuple[AnyQuestion, Sequence[str]]], sure: float | None = None) -> list[Ranking]:
        """Rank the replies to each question, with the confidence that the best one beats the next.

        The confidence is sigmoid(margin / temperature), or with `evaluator.confidence` that of margin and disagreement.

        Args:
            asked: questions (texts or conversations) with their replies.
            sure: Optional. Confidence below which a preference is unsure. Default: `Evaluator.sure`.

        Raises:
            InputError: a reply or a question is empty, or `sure` is not between 0.5 and 1.

        Example:
            >>> Evaluator.load("runs/first").rank([("What is 1 + 1?", ["2"])])[0].preferred is None
            True
        """
        sure = self.sure_or(sure)
        _check_texts([reply for _, replies in asked for reply in replies])
        # All questions in one pass, so the batches are full; `next` below deals the scores out in the same order.
        questions = [one for question, replies in asked for one in [question_from(question)] * len(replies)]
        scores = iter(self._scores(questions, [reply for _, replies in asked for reply in replies]))
        return [self.ranking_of(replies, [next(scores) for _ in replies], sure) for _, replies in asked]

    def compare(self, question: AnyQuestion, a: str, b: str, sure: float | None = None) -> Comparison:
        """Compare two replies to a question.

        Args:
            question: the question: a text, or a conversation.
            a: a reply to it.
            b: another reply.
            sure: Optional. Confidence below which neither reply is preferred. Default: `Evaluator.sure`.

        Raises:
            InputError: a text is empty, or `sure` is not between 0.5 and 1.
        """
        sure = self.sure_or(sure)
        score_a, score_b = self.score(question, [a, b])
        return self.comparison_of((a, b), (score_a, score_b), sure)

    def comparison_of(self, replies: tuple[str, str], scores: tuple[float, float], sure: float) -> Comparison:
        """Return the comparison of two replies to a question that are already scored; see `compare`."""
        (a, b), (score_a, score_b) = replies, scores
        probability = self._confidence.probability(score_a, score_b)
        # Position in a batch affects the last bits, so equal replies may get slightly different scores.
        is_sure = max(probability, 1.0 - probability) >= sure and score_a != score_b and a != b
        return Comparison(
            probability=probability,
            preferred=("a" if score_a > score_b else "b") if is_sure else "unsure",
            state=VerdictState.KEPT if is_sure else VerdictState.UNSURE,
            scores=scores,
            calibrated=self._confidence.is_calibrated,
        )

    def ranking_of(self, replies: Sequence[str], scores: Sequence[float], sure: float) -> Ranking:
        """Return the ranking of replies to a question that are already scored; see `rank`."""
        if len(scores) < 2:
            return Ranking(tuple(scores), None, None, unsure=False)
        best, second = sorted(range(len(scores)), key=lambda i: -scores[i])[:2]
        found = self.comparison_of((replies[best], replies[second]), (scores[best], scores[second]), sure)
        return Ranking(tuple(scores), best, found.confidence, found.preferred == "unsure", found.calibrated)

    def confidences(self, scores: Sequence[float]) -> list[float]:
        """Return, for each of two or more replies to a question, the confidence that it is better than the best of the others.

        It is that of `compare` for the reply and the one with the highest score of the others.

        Args:
            scores: scores of `score`.
        """
        return [
            self._confidence.probability(score, max(other for j, other in enumerate(scores) if j != i))
            for i, score in enumerate(scores)
        ]

    def relevance(self, scores: Sequence[float]) -> list[float]:
        """Return scores as numbers between 0 and 1: sigmoid(score / temperature), whatever `evaluator.confidence` is.

        Scores are normalised by the replies that the evaluator was trained on, so the number is the confidence that a reply is
        better than one with their mean score. It is not a probability of relevance.

        Args:
            scores: scores of `score`.
        """
        return [self._confidence.against_the_mean(score) for score in scores]

    def as_reward_fn(self) -> RewardFunction:
        """Return a reward function for TRL, with the signature `(prompts, completions, **columns) -> list[float]`.

        Prompts and completions may be messages or plain text. Messages are a conversation that ends with a message of the user,
        and a list of one assistant message. A plain prompt is the question, or the policy's full prompt. Other plain text with
        control tokens raises ValueError, because the evaluator was not trained on such prompts.

        Example:
            >>> reward = Evaluator.load("runs/first").as_reward_fn()
            >>> len(reward(prompts=["What is 1 + 1?"], completions=["2"]))
            1
        """
        # Computed once: it tests templates on samples, and a trainer calls the function in every step.
        around = pick_tokenizers(self._model.backbone, EVALUATOR, self._model.templates).around_question
        control = self._model.templates.control.texts

        def evaluator_reward(prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[float]:
            questions = [question_from(_asked(prompt, around, control)) for prompt in prompts]
            return self._scores(questions, [content_of(completion, "assistant") for completion in completions])

        return evaluator_reward

    # -- reference answers ----------------------------------------------------------------------------------------------

    def unanswered(self, questions: Sequence[AnyQuestion]) -> list[Question]:
        """Return the questions, each once, whose reference answer a score needs and that have none yet.

        `score` generates them; a server may do it before, and pass them to `remember_answer`.

        Raises:
            InputError: a conversation is malformed.
        """
        if not self._reads_reference:
            return []
        return self._new(question_from(question) for question in questions)

    def remember_answer(self, question: Question, answer: str) -> None:
        """Take the base's greedy reply to a question as its reference answer."""
        self._reference_answers[question] = answer

    # -- inside ---------------------------------------------------------------------------------------------------------

    def _scores(self, questions: Sequence[Question], replies: Sequence[str]) -> list[float]:
        self._answer(questions)
        # As in training: typed replies end with the end token, at which the score is read.
        templates, end = self._model.templates, self._model.backbone.loaded.eos_ids[:1]
        prompts = {
            question: templates.grade_prompt(
                question.text,
                self._reference_answers.get(question, ""),
                alone=not all(member.reference_answer for member in self._scorer.members),
            )
            for question in dict.fromkeys(questions)
        }
        ids = [(*templates.reply_ids(templates.without_thinking(text)), *end) for text in replies]
        if not ids:
            return []
        scores_KB = self._scorer.each([prompts[question] for question in questions], ids)
        members_BK: list[list[float]] = scores_KB.T.tolist()
        return [MemberScores(members_K) if len(members_K) > 1 else members_K[0] for members_K in members_BK]

    def _answer(self, questions: Sequence[Question]) -> None:
        """Generate and cache reference answers if the grade template shows them; trainers repeat each question often."""
        if len(self._reference_answers) > _MOST_REFERENCE_ANSWERS:  # a server never stops asking new questions
            self._reference_answers.clear()
        if new := self._new(questions) if self._reads_reference else []:
            self._reference_answers.update(zip(new, self._model.reference_answers(new), strict=True))

    def _new(self, questions: Iterable[Question]) -> list[Question]:
        new = [question for question in dict.fromkeys(questions) if question not in self._reference_answers]
        check_conversations(self._model.templates, new)
        return new

    @property
    def _reads_reference(self) -> bool:
        """Whether a member reads the reference answer."""
        shown = self._model.templates.grades_with_reference_answer
        return shown and any(member.reference_answer for member in self._scorer.members)


def _check_texts(texts: Sequence[str]) -> None:
    if any(not text.strip() for text in texts):
        raise InputError("the question and the replies must not be empty")


def _asked(prompt: Text, around: Sequence[str] | None, control: Sequence[str]) -> AnyQuestion:
    """Return the prompt of a trainer as a question: the question in a plain text, or the messages with contents as text."""
    if isinstance(prompt, str):
        return question_of(prompt, around, control)
    return [{**message, "content": text_of(message)} for message in prompt]
