"""The endpoint judge: a model at a server, prompted to compare two replies in both orders, with the prompts of `pairwise`.

The probabilities of the labels are the server's log-probs at the position of the verdict. Where it returns none, several
answers are sampled, and their verdicts are counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from selfeval.backbone.process_group import by_first
from selfeval.config import EndpointConfig
from selfeval.errors import ConfigError, EndpointError
from selfeval.judging.orders import combine
from selfeval.judging.pooling import Reading
from selfeval.judging.protocol import Comparison, JudgeContext, Judgement
from selfeval.judging.server.chat import Answer, ChatRequest
from selfeval.judging.server.client import client_of
from selfeval.judging.server.reading import read_logprobs, read_votes
from selfeval.judging.templates import SETTINGS, Templates
from selfeval.judging.turns import Turn

__all__ = ["EndpointJudge", "at_once", "check_lead"]

_SHORT = 32
"""Token limit of an answer without a chain of thought: a line with lead and label."""


class EndpointJudge:
    """Compares two replies in both orders by asking a server.

    Args:
        context: with one kind of template, which shows a question and two replies and has verdict labels with a lead.

    Raises:
        ConfigError: no server may be asked, it cannot be asked with these settings, or the labels have no lead.
    """

    def __init__(self, context: JudgeContext) -> None:
        settings = context.config.settings
        if not isinstance(settings, EndpointConfig):
            raise TypeError(f"the endpoint judge needs its section of settings, got {settings}")
        if context.answers is None:
            raise ConfigError(
                f"the {context.role} is the server {settings.url}, and only `selfeval run`, `selfeval check` and `selfeval "
                "benchmark-judge --model` send texts to a server"
            )
        (self._kind,) = context.kinds
        self._templates, self._labels = context.templates, context.templates.labels(self._kind)
        check_lead(context.templates, self._kind)
        self._settings, self._config = settings, context.config
        self._seed, self._temperature = context.seed, context.temperature
        self._client = client_of(settings, context.answers, context.role)
        self._backbone = context.backbone

    def judge(self, comparisons: Sequence[Comparison], advance: Callable[[int], None] | None = None) -> list[Judgement]:
        """Judge every comparison in both orders. Of several processes that train together, one asks the server for all."""
        name = f"asking {self._settings.url} about {len(comparisons)} pairs"
        return by_first(self._backbone.budget.processes, name, lambda: self._judge(comparisons, advance))

    def _judge(self, comparisons: Sequence[Comparison], advance: Callable[[int], None] | None) -> list[Judgement]:
        prompts = [self._prompt(c) for c in comparisons] + [self._prompt(c.swapped) for c in comparisons]
        readings = self._read(prompts, advance)
        half = len(comparisons)
        return [combine(a, b) for a, b in zip(readings[:half], readings[half:], strict=True)]

    def _prompt(self, comparison: Comparison) -> tuple[Turn, ...]:
        shown = {name: getattr(comparison, name) for name in ("question", "first", "second", "first_cut", "second_cut")}
        turns = self._templates.conversation(self._kind, **shown)
        return tuple(turns if self._config.reasoning else at_once(turns, self._labels.lead, self._labels.all))

    def _read(self, prompts: Sequence[tuple[Turn, ...]], advance: Callable[[int], None] | None) -> list[Reading]:
        if self._settings.probabilities == "votes":
            return self._by_votes(prompts, advance)
        answers = self._client.ask([self._greedy(prompt) for prompt in prompts], advance)
        # An answer that is none, such as a filtered prompt, has no log-probs either, and votes would not change it.
        without = [n for n, answer in enumerate(answers) if not answer.has_logprobs and _is_complete(answer)]
        if without and self._settings.probabilities == "logprobs":
            raise EndpointError(
                f"{self._settings.url} returned no log-probs for {self._settings.model}; set probabilities to votes or auto in "
                "the section of this server"
            )
        least = self._config.label_mass
        readings = dict(enumerate(read_logprobs(answer, self._labels, least) for answer in answers))
        return list((readings | dict(zip(without, self._by_votes([prompts[n] for n in without], None), strict=True))).values())

    def _by_votes(self, prompts: Sequence[tuple[Turn, ...]], advance: Callable[[int], None] | None) -> list[Reading]:
        count = self._settings.votes
        answers = self._client.ask([self._vote(prompt, n) for prompt in prompts for n in range(count)])
        if advance is not None:
            advance(len(prompts))
        ballots = [answers[begin : begin + count] for begin in range(0, len(answers), count)]
        return [read_votes(ballot, self._labels, self._config.label_mass) for ballot in ballots]

    # -- requests -------------------------------------------------------------------------------------------------------

    def _greedy(self, prompt: tuple[Turn, ...]) -> ChatRequest:
        # With a temperature, the judge is measured against itself, so another seed has to be another sample.
        draw = str(self._seed) if self._temperature else ""
        return ChatRequest(prompt, self._labels, self._limit, self._temperature, self._settings.top_logprobs, draw)

    def _vote(self, prompt: tuple[Turn, ...], number: int) -> ChatRequest:
        return ChatRequest(prompt, self._labels, self._limit, self._settings.temperature, 0, f"{self._seed}/{number}")

    @property
    def _limit(self) -> int:
        return self._config.max_new_tokens if self._config.reasoning else min(_SHORT, self._config.max_new_tokens)


def check_lead(templates: Templates, kind: str) -> None:
    """Refuse templates whose verdicts a server's answer cannot be searched for.

    Raises:
        ConfigError: the labels of this kind of template have no lead.
    """
    if not templates.labels(kind).lead:
        raise ConfigError(
            f"the labels of [{kind}] in {templates.folder / SETTINGS} have no lead, which is needed to find the verdict in the "
            "answer of a server; set `lead` there, or in a copy of the folder that the setting templates names"
        )


def _is_complete(answer: Answer) -> bool:
    return answer.ending in ("stop", "cut")


def at_once(turns: Sequence[Turn], lead: str, labels: Sequence[str]) -> list[Turn]:
    """Return a conversation that asks for the verdict without a chain of thought.

    A server does not continue a text, so the lead cannot be appended as for the model of the run; it has to be asked for.
    """
    lines = ", ".join(f'"{lead}{label}"' for label in labels)
    added = f"Do not explain anything. Your whole answer is one of these lines: {lines}."
    *before, last = turns
    if last.role != "user":
        return [*turns, Turn("user", added)]
    return [*before, Turn("user", f"{last.text}\n\n{added}")]
