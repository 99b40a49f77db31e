"""The judge: a language model prompted to compare two replies, in both orders, and to abstain.

A verdict is read where the judge names the better reply: the probabilities of the three labels (first, second, neither)
at that token, not the sampled word alone. Averaging both orders removes the position bias (Zheng et al. 2023,
https://arxiv.org/abs/2306.05685, section 3.4). What does not parse has no probability; it is never a default.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from selfeval.backbone.roles import Backbone
from selfeval.config import VerdictsConfig
from selfeval.judging.templates import Labels, Templates
from selfeval.records import VerdictState
from selfeval.rollout.engine import Request, Rollout, generate

__all__ = ["Comparison", "Judgement", "Reading", "combine", "compare", "label_tokens", "state_of"]


@dataclass(frozen=True)
class Comparison:
    """A question and the two replies to compare."""

    question: str
    first: str
    second: str


@dataclass(frozen=True)
class Reading:
    """What one order of a comparison gave: probabilities of the labels (None when unparsable), and the judge's words."""

    probabilities: tuple[float, float, float] | None
    words: str

    @property
    def first_better(self) -> float | None:
        """Probability that the reply shown first is better; half of `neither` counts for it."""
        if self.probabilities is None:
            return None
        first, second, tie = self.probabilities
        return (first + tie / 2) / (first + second + tie)

    @property
    def tie(self) -> float | None:
        return None if self.probabilities is None else self.probabilities[2] / sum(self.probabilities)


@dataclass(frozen=True)
class Judgement:
    """Both orders of a comparison put together; `probability` is that of the comparison's own `first`."""

    probability: float | None
    in_order: float | None
    swapped: float | None
    tie: float | None
    words: tuple[str, str]


def label_tokens(templates: Templates, labels: Labels) -> tuple[int, int, int]:
    """The token that tells each label from the others, after the lead."""
    encoded = [templates.tokenizer.encode(labels.lead + label, add_special_tokens=False) for label in labels.all]
    shared = 0
    while all(len(e) > shared + 1 for e in encoded) and len({e[shared] for e in encoded}) == 1:
        shared += 1
    first, second, tie = (int(e[shared]) for e in encoded)
    return first, second, tie


def _position(rollout: Rollout, templates: Templates, labels: Labels, tokens: Sequence[int]) -> int | None:
    """Index of the token that names the verdict: a label right after the lead."""
    for index, token in enumerate(rollout.ids):
        if token in tokens:
            before = str(templates.tokenizer.decode(list(rollout.ids[:index]))).rstrip()
            if before.endswith(labels.lead.strip()):
                return index
    return None


def _probabilities(logprobs: Sequence[float], label_mass: float) -> tuple[float, float, float] | None:
    first, second, tie = (math.exp(p) for p in logprobs)
    total = first + second + tie
    return (first, second, tie) if total >= label_mass and total > 0 else None


def compare(
    backbone: Backbone,
    templates: Templates,
    kind: str,
    comparisons: Sequence[Comparison],
    config: VerdictsConfig,
    *,
    seed: int,
    rows: int,
    advance: Callable[[int], None] | None = None,
) -> list[Judgement]:
    """Judges every comparison in both orders, greedily, under the role that is acting.

    Args:
        kind: the prompt: `judge`, or `referee` for evaluation.
        seed: unused by greedy decoding, kept for the engine.
    """
    prompts = [templates.prompt(kind, question=c.question, first=c.first, second=c.second) for c in comparisons]
    prompts += [templates.prompt(kind, question=c.question, first=c.second, second=c.first) for c in comparisons]
    readings = _read(backbone, templates, templates.labels(kind), prompts, config, seed, rows, advance)
    half = len(comparisons)
    return [combine(a, b) for a, b in zip(readings[:half], readings[half:], strict=True)]


def _read(
    backbone: Backbone,
    templates: Templates,
    labels: Labels,
    prompts: Sequence[tuple[int, ...]],
    config: VerdictsConfig,
    seed: int,
    rows: int,
    advance: Callable[[int], None] | None,
) -> list[Reading]:
    tokens = label_tokens(templates, labels)
    working = [Rollout((), (), False)] * len(prompts)
    if config.working:
        requests = [Request(p, temperature=0.0) for p in prompts]
        working = generate(backbone, requests, max_new_tokens=config.max_new_tokens, seed=seed, rows=rows, watch=tokens, advance=advance)
    positions = [_position(w, templates, labels, tokens) for w in working]
    silent = [i for i, position in enumerate(positions) if position is None]
    asked = _ask_for_verdict(backbone, templates, labels, tokens, [(prompts[i], working[i]) for i in silent], seed, rows)
    readings = []
    for index, (rollout, position) in enumerate(zip(working, positions, strict=True)):
        logprobs = asked.get(silent.index(index)) if position is None else rollout.watched[position]
        words = str(templates.tokenizer.decode(list(rollout.ids)))
        readings.append(Reading(None if logprobs is None else _probabilities(logprobs, config.label_mass), words))
    return readings


def _ask_for_verdict(
    backbone: Backbone,
    templates: Templates,
    labels: Labels,
    tokens: Sequence[int],
    cases: Sequence[tuple[tuple[int, ...], Rollout]],
    seed: int,
    rows: int,
) -> dict[int, tuple[float, ...]]:
    """Appends the lead to what the judge wrote and reads the label probabilities that follow; none without a lead."""
    if not labels.lead or not cases:
        return {}
    eos = set(backbone.loaded.eos_ids)
    encoded = templates.tokenizer.encode(labels.lead + labels.first, add_special_tokens=False)
    lead = tuple(encoded[: encoded.index(tokens[0])])
    requests = [Request((*prompt, *(i for i in said.ids if i not in eos), *lead), temperature=0.0) for prompt, said in cases]
    rollouts = generate(backbone, requests, max_new_tokens=1, seed=seed, rows=rows, watch=tokens)
    return {i: rollout.watched[0] for i, rollout in enumerate(rollouts)}


def combine(in_order: Reading, swapped: Reading) -> Judgement:
    """Averages both orders; no probability when either order did not parse."""
    forward = in_order.first_better
    backward = None if swapped.first_better is None else 1.0 - swapped.first_better
    words = (in_order.words, swapped.words)
    if forward is None or backward is None or in_order.tie is None or swapped.tie is None:
        return Judgement(None, forward, backward, None, words)
    return Judgement((forward + backward) / 2, forward, backward, (in_order.tie + swapped.tie) / 2, words)


def state_of(judgement: Judgement, config: VerdictsConfig) -> VerdictState:
    """Kept, tie, unsure or unparsable."""
    if judgement.probability is None or judgement.tie is None:
        return VerdictState.UNPARSABLE
    if judgement.tie > config.tie:
        return VerdictState.TIE
    sure = max(judgement.probability, 1.0 - judgement.probability) >= config.keep
    return VerdictState.KEPT if sure else VerdictState.UNSURE
