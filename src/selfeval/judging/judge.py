"""The judge: a language model prompted to compare two replies, in both orders, and to abstain.

A verdict is read at the position where the judge names the better reply: the probabilities of the three labels (first,
second, neither) there, not the sampled word alone. Averaging both orders removes the position bias (Zheng et al. 2023,
https://arxiv.org/abs/2306.05685, section 3.4). An unparsable answer has no probability, never a default.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from selfeval.backbone.roles import Backbone
from selfeval.config import VerdictsConfig
from selfeval.judging.labels import Labels, verdict_tokens
from selfeval.judging.reading import Place, find_verdict, thinking_of, token_at
from selfeval.judging.templates import Templates
from selfeval.prompt import Prompt
from selfeval.records import VerdictState
from selfeval.rollout.engine import Request, Rollout, generate

__all__ = [
    "Choice",
    "Comparison",
    "Judgement",
    "Reading",
    "choice",
    "combine",
    "compare",
    "state_of",
]

TokenIds = tuple[int, ...]
Choice = Literal["first", "second", "neither"]


@dataclass(frozen=True)
class Comparison:
    """A question and the two replies to compare."""

    question: str
    first: str
    second: str


@dataclass(frozen=True)
class Reading:
    """The result of one order of a comparison: label probabilities (None if unparsable) and the judge's raw output."""

    probabilities: tuple[float, float, float] | None
    words: str

    @property
    def first_better(self) -> float | None:
        """Probability that the reply shown first is better, plus half of that of `neither`."""
        if self.probabilities is None:
            return None
        first, second, tie = self.probabilities
        return (first + tie / 2) / (first + second + tie)

    @property
    def tie(self) -> float | None:
        return None if self.probabilities is None else self.probabilities[2] / sum(self.probabilities)


@dataclass(frozen=True)
class Judgement:
    """Both orders of a comparison combined.

    `probability` is that of the comparison's own `first`; `ties` has one value per order.
    """

    probability: float | None
    in_order: float | None
    swapped: float | None
    tie: float | None
    ties: tuple[float | None, float | None]
    words: tuple[str, str]


def compare(
    backbone: Backbone,
    templates: Templates,
    kind: str,
    comparisons: Sequence[Comparison],
    config: VerdictsConfig,
    *,
    rows: int,
    advance: Callable[[int], None] | None = None,
) -> list[Judgement]:
    """Judge every comparison in both orders, greedily, under the active role.

    Args:
        kind: kind of prompt: `judge`, or `referee` for evaluation.
        rows: batch size in comparisons.
        advance: Optional. Called with the number of orders just judged.
    """
    prompts = [templates.prompt(kind, question=c.question, first=c.first, second=c.second) for c in comparisons]
    prompts += [templates.prompt(kind, question=c.question, first=c.second, second=c.first) for c in comparisons]
    readings = _Reader(backbone, templates, templates.labels(kind), config, rows).read(prompts, advance)
    half = len(comparisons)
    return [combine(a, b) for a, b in zip(readings[:half], readings[half:], strict=True)]


_TAIL = 32
"""Number of last tokens of a prompt searched for an opening marker of thinking."""


@dataclass(frozen=True)
class _Spot:
    """Position at which the labels of one order are read.

    Attributes:
        before: all tokens up to the labels.
        watched: Optional. Log-probs of the watched tokens there, if the engine has already computed them.
    """

    before: Prompt
    watched: tuple[float, ...] | None = None


class _Reader:
    """Runs the judge and reads its verdicts."""

    def __init__(self, backbone: Backbone, templates: Templates, labels: Labels, config: VerdictsConfig, rows: int) -> None:
        self.backbone, self.templates, self.labels, self.config, self.rows = backbone, templates, labels, config, rows
        self.tokens = verdict_tokens(templates, labels)

    def read(self, prompts: Sequence[Prompt], advance: Callable[[int], None] | None) -> list[Reading]:
        """Return one reading per prompt. A prompt longer than the model's context is unparsable, and its raw output says so."""
        working = self._work(prompts, advance)
        spots = {prompt: spot for prompt, said in working.items() if (spot := self._spot(prompt, said)) is not None}
        logprobs = self._label_logprobs(spots)
        return [self._reading(prompt, working.get(prompt), logprobs.get(prompt)) for prompt in prompts]

    def _room(self, prompt: Prompt) -> int:
        context = self.backbone.loaded.context_length
        return sys.maxsize if context is None else context - len(prompt.ids)

    def _work(self, prompts: Sequence[Prompt], advance: Callable[[int], None] | None) -> dict[Prompt, Rollout]:
        distinct = [p for p in dict.fromkeys(prompts) if self._room(p) > len(self.tokens.lead) + self.tokens.longest]
        if not self.config.working or not distinct:
            return dict.fromkeys(distinct, Rollout((), (), False))
        requests = [Request(prompt, temperature=0.0) for prompt in distinct]
        limit, watch = self.config.max_new_tokens, self.tokens.all
        rollouts = generate(self.backbone, requests, max_new_tokens=limit, seed=0, rows=self.rows, watch=watch, advance=advance)
        return dict(zip(distinct, rollouts, strict=True))

    def _spot(self, prompt: Prompt, said: Rollout) -> _Spot | None:
        """Return the position of the labels: at the judge's verdict, or after a lead that is appended to its output.

        None if there is nothing to read: the judge was cut off before it decided, or there is no lead to append.
        """
        text = self._decode(said.ids)
        thinking = thinking_of(text, self._decode(prompt.ids[-_TAIL:]))
        # Still thinking: close the block first, or the lead would be read as part of the draft.
        if thinking.end is None:
            close = tuple(self.templates.tokenizer.encode(thinking.close, add_special_tokens=False))
            return self._appended(prompt, said, (*self._without_end(said.ids), *close))
        label = self._label(said, text, thinking.end)
        if label is not None:
            return _Spot(prompt.followed_by(said.ids[:label]), said.watched[label])
        place = self._statement(said, text, thinking.end)
        if place is None:
            return self._appended(prompt, said, self._without_end(said.ids))
        return _Spot(self._with_lead(prompt, said.ids[: self._tokens_before(said, place.lead)]))

    def _statement(self, said: Rollout, text: str, begin: int) -> Place | None:
        """Return the deciding statement, as positions in `text`."""
        place = find_verdict(text[begin:], self.labels, finished=said.finished) if self.labels.lead else None
        return None if place is None else Place(begin + place.lead, begin + place.label)

    def _label(self, said: Rollout, text: str, begin: int) -> int | None:
        """Return the index of the token that begins the deciding label; None if its tokens match no label."""
        names = {path[0] for path in self.tokens.paths}
        if not self.labels.lead:
            shared = self._decode(self.tokens.lead).strip()
            places = [i for i, token in enumerate(said.ids) if token in names]
            before = [(i, self._decode(said.ids[:i])) for i in (reversed(places) if said.finished else places)]
            return next((i for i, words in before if len(words) >= begin and words.rstrip().endswith(shared)), None)
        place = self._statement(said, text, begin)
        if place is None:
            return None
        # Token and character positions can differ by a token or two around spaces and decoration, so search nearby.
        near = self._tokens_before(said, place.label)
        label = text[place.label :]
        return next((i for i in range(max(0, near - 2), min(near + 3, len(said.ids))) if self._begins(said, i, label)), None)

    def _begins(self, said: Rollout, index: int, label: str) -> bool:
        """Return whether the token at `index` begins the text `label`, or continues the prefix that all labels share."""
        if said.ids[index] not in {path[0] for path in self.tokens.paths}:
            return False
        shared = self._decode(self.tokens.lead).strip().removeprefix(self.labels.lead.strip()).strip()
        rest = self._decode(said.ids)[len(self._decode(said.ids[:index])) :].lstrip()
        return (shared + rest) == label

    def _tokens_before(self, said: Rollout, character: int) -> int:
        return token_at(lambda count: self._decode(said.ids[:count]), len(said.ids), character)

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.templates.tokenizer.decode(list(ids)))

    def _without_end(self, ids: TokenIds) -> TokenIds:
        ends = set(self.backbone.loaded.eos_ids)
        return tuple(i for i in ids if i not in ends)

    def _appended(self, prompt: Prompt, said: Rollout, words: TokenIds) -> _Spot | None:
        """Return the position after an appended lead; None if the chain of thought was cut off, because it has no verdict."""
        if self.config.working and not (self.labels.lead and said.finished):
            return None
        return _Spot(self._with_lead(prompt, words))

    def _with_lead(self, prompt: Prompt, words: TokenIds) -> Prompt:
        """Append the lead to the output, truncating the output if the context is too short."""
        lead = self.tokens.lead
        return prompt.followed_by((*words[: self._room(prompt) - len(lead) - self.tokens.longest], *lead))

    def _label_logprobs(self, spots: dict[Prompt, _Spot]) -> dict[Prompt, tuple[float, ...]]:
        """Return the log-probs of the three labels at each position, summed along their paths."""
        seen: dict[tuple[Prompt, TokenIds], tuple[float, ...]] = {}
        seen |= {(p, ()): spot.watched for p, spot in spots.items() if spot.watched is not None}
        # Labels of several tokens need one extra forward pass per shared prefix.
        cases = [(p, f) for p in spots for f in self.tokens.forks if (p, f) not in seen]
        requests = [Request(spots[prompt].before.followed_by(fork), temperature=0.0) for prompt, fork in cases]
        watch = self.tokens.all
        rollouts = generate(self.backbone, requests, max_new_tokens=1, seed=0, rows=self.rows, watch=watch)
        seen |= {case: rollout.watched[0] for case, rollout in zip(cases, rollouts, strict=True)}

        def total(prompt: Prompt, path: TokenIds) -> float:
            return math.fsum(seen[prompt, path[:k]][watch.index(token)] for k, token in enumerate(path))

        return {prompt: tuple(total(prompt, path) for path in self.tokens.paths) for prompt in spots}

    def _reading(self, prompt: Prompt, rollout: Rollout | None, logprobs: tuple[float, ...] | None) -> Reading:
        if rollout is None:
            return Reading(None, f"(not asked: the prompt of {len(prompt.ids)} tokens does not fit the model's context)")
        words = self._decode(rollout.ids)
        return Reading(None if logprobs is None else _probabilities(logprobs, self.config.label_mass), words)


def _probabilities(logprobs: Sequence[float], label_mass: float) -> tuple[float, float, float] | None:
    first, second, tie = (math.exp(p) for p in logprobs)
    total = first + second + tie
    return (first, second, tie) if total >= label_mass and total > 0 else None


def combine(in_order: Reading, swapped: Reading) -> Judgement:
    """Average both orders. The probability is None if either order was unparsable."""
    forward = in_order.first_better
    backward = None if swapped.first_better is None else 1.0 - swapped.first_better
    ties, words = (in_order.tie, swapped.tie), (in_order.words, swapped.words)
    if forward is None or backward is None or in_order.tie is None or swapped.tie is None:
        return Judgement(None, forward, backward, None, ties, words)
    return Judgement((forward + backward) / 2, forward, backward, (in_order.tie + swapped.tie) / 2, ties, words)


def choice(first: float, tie: float) -> Choice:
    """Return the choice of one order: the likeliest of its three labels, `neither` on a tie.

    Args:
        first: probability that the first is better, including half of `neither`, as in `Judgement.in_order`.
        tie: probability of `neither`.
    """
    ahead = first - tie / 2, 1 - first - tie / 2
    if tie >= max(ahead) or ahead[0] == ahead[1]:
        return "neither"
    return "first" if ahead[0] > ahead[1] else "second"


def state_of(judgement: Judgement, config: VerdictsConfig) -> VerdictState:
    """Return the state of a judgement: kept, tie, unsure or unparsable."""
    if judgement.probability is None or judgement.tie is None:
        return VerdictState.UNPARSABLE
    if judgement.tie > config.tie:
        return VerdictState.TIE
    sure = max(judgement.probability, 1.0 - judgement.probability) >= config.keep
    return VerdictState.KEPT if sure else VerdictState.UNSURE
