"""The protocol of judges: what they compare, what they return, and what they are built from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from selfeval.backbone.roles import Backbone
from selfeval.config import JudgeRole, VerdictsConfig
from selfeval.judging.templates import Templates
from selfeval.quality.judge_calibration import Calibration
from selfeval.quality.judge_signals import SignalCalibration
from selfeval.records import Evidence, Message, VerdictState

__all__ = ["UNFITTED", "Comparison", "Judge", "JudgeContext", "JudgeFit", "Judgement", "state_of"]


@dataclass(frozen=True)
class Comparison:
    """A question and the two replies to compare.

    Attributes:
        question: the question.
        first, second: the replies.
        first_cut, second_cut: whether the reply was cut off at its token limit. Default: False.
        messages: turns of a conversation, of which `question` is the text. Default: none, the question is the only turn.
    """

    question: str
    first: str
    second: str
    first_cut: bool = False
    second_cut: bool = False
    messages: tuple[Message, ...] = ()

    @property
    def swapped(self) -> Comparison:
        """The same comparison with the replies in the other order."""
        return Comparison(self.question, self.second, self.first, self.second_cut, self.first_cut, self.messages)


@dataclass(frozen=True)
class Judgement:
    """The result of a comparison.

    Attributes:
        probability: probability that the comparison's `first` is better; None if there is no verdict.
        tie: probability that neither is better; None if there is no verdict, or if the judge does not estimate it.
        evidence: Optional. How the judge arrived at its verdict.
    """

    probability: float | None
    tie: float | None = None
    evidence: Evidence | None = None


class Judge(Protocol):
    """Compares two replies to a question, for many questions at once."""

    def judge(self, comparisons: Sequence[Comparison], advance: Callable[[int], None] | None = None) -> list[Judgement]:
        """Return one judgement per comparison, in order.

        A judge that is a model runs under the active role of its backbone.

        Args:
            comparisons: questions with two replies each.
            advance: Optional. Called with the number of prompts that were just judged.
        """
        ...


@dataclass(frozen=True)
class JudgeFit:
    """Estimates from the judge's own verdicts, made before it is used.

    Attributes:
        accuracies: Optional. Accuracies of the members of a combined judge. Default: none, so it estimates them from the
            comparisons of each call.
        calibration: Optional. Calibration on the agreement of both orders. Default: none, its probabilities are unchanged.
    """

    accuracies: tuple[float, ...] | None = None
    calibration: Calibration | SignalCalibration | None = None


UNFITTED = JudgeFit()
"""Nothing was estimated."""


@dataclass(frozen=True)
class JudgeContext:
    """Everything that a judge is built from.

    Attributes:
        backbone: the model.
        templates: the prompts.
        kinds: kinds of templates that the judge reads in its role, as registered.
        config: settings of the verdicts.
        batch_size: maximum number of prompts that are generated from at once.
        seed: seed of what the judge samples. Default: 0.
        temperature: sampling temperature of a judge that is otherwise greedy; see `make_judge`. Default: 0, greedy.
        role: role of the judge. Default: judge.
        answers: Optional. Folder of the answers of a server. Default: none, so no server may be asked.
        fit: estimates that were made before. Default: none.
    """

    backbone: Backbone
    templates: Templates
    kinds: tuple[str, ...]
    config: VerdictsConfig
    batch_size: int
    seed: int = 0
    temperature: float = 0.0
    role: JudgeRole = "judge"
    answers: Path | None = None
    fit: JudgeFit = UNFITTED


def state_of(judgement: Judgement, config: VerdictsConfig) -> VerdictState:
    """Return the state of a judgement: kept, tie, unsure or unparsable.

    A probability of exactly 0.5 prefers neither reply, so it is unsure whatever `config.keep` is.
    """
    if judgement.probability is None:
        return VerdictState.UNPARSABLE
    if judgement.tie is not None and judgement.tie > config.tie:
        return VerdictState.TIE
    sure = judgement.probability != 0.5 and max(judgement.probability, 1.0 - judgement.probability) >= config.keep
    return VerdictState.KEPT if sure else VerdictState.UNSURE
