"""Additional training pairs for the evaluator, whose worse replies are made instead of judged.

Sampled replies to one question differ little in style and topic, so their pairs teach little about which question a reply
belongs to, and nothing about texts that the model never samples. Self-Taught Evaluators (Wang et al. 2024,
https://arxiv.org/abs/2408.02666) use a reply to an altered question as the worse reply to the original one. Here the altered
question is a similar question of the same run, whose reply has already been judged, so nothing has to be generated.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from selfeval.evaluation.attacks import Target, attacks_on
from selfeval.quality.answers import answer_of
from selfeval.quality.dedupe import jaccard, units
from selfeval.records import Pair

__all__ = ["CONFIDENCE", "answers_alike", "attack_pairs", "mismatched_pairs"]

CONFIDENCE = 0.95
"""Label of these pairs. Below 1, because a reply to a similar question is sometimes a good reply to this one too."""
_CANDIDATES = 64
"""Questions that are drawn and compared, of which the most similar is used."""


def mismatched_pairs(pairs: Sequence[Pair], share: float, seed: int) -> list[Pair]:
    """Return additional pairs: each has the prompt and the chosen reply of a pair, and the chosen reply to a similar question.

    The similar question is the one with the largest Jaccard similarity of its words among 64 that are drawn. Questions whose
    reply has the same text, or the same number as its final answer, are passed over: that reply would answer this question as
    well.

    Args:
        pairs: training pairs.
        share: number of additional pairs, as a share of the pairs, rounded; a pair with no suitable question has none.
        seed: seed of the draws. The result depends on the seed and on the pairs.
    """
    rng = random.Random(f"{seed}/mismatched")
    words = {p.question_id: frozenset(units(p.prompt)) for p in pairs}
    found = []
    for pair in rng.sample(list(pairs), min(len(pairs), round(share * len(pairs)))):
        drawn = rng.sample(list(pairs), min(len(pairs), _CANDIDATES))
        others = [p for p in drawn if p.question_id != pair.question_id and not answers_alike(p.chosen, pair.chosen)]
        if others:
            nearest = max(others, key=lambda p: jaccard(words[p.question_id], words[pair.question_id]))
            found.append(replace(pair, rejected=nearest.chosen, rejected_ids=nearest.chosen_ids, confidence=CONFIDENCE))
    return found


def attack_pairs(pairs: Sequence[Pair], share: float, seed: int, encode: Callable[[Pair, str], tuple[int, ...]]) -> list[Pair]:
    """Return additional pairs: each has the prompt and the chosen reply of a pair, and an attack reply of a random kind.

    The kinds are those of the report that need no gold (`evaluation/attacks.py`), without a verdict in the judge's form.

    Args:
        pairs: training pairs.
        share: number of additional pairs, as a share of the pairs, rounded.
        seed: seed of the draws. The result depends on the seed and on the pairs.
        encode: returns the token ids of a typed reply to the question of a pair, with its end token.
    """
    rng = random.Random(f"{seed}/attacks")
    found = []
    for pair in rng.sample(list(pairs), min(len(pairs), round(share * len(pairs)))):
        other = rng.choice(pairs)
        others = () if answers_alike(other.chosen, pair.chosen) else (other.chosen,)
        made = attacks_on(Target(pair.question_id, pair.prompt, pair.chosen, others), seed=seed)
        text = rng.choice(made).worse
        found.append(replace(pair, rejected=text, rejected_ids=encode(pair, text), confidence=CONFIDENCE))
    return found


def answers_alike(one: str, other: str) -> bool:
    """Return whether two replies have the same text or the same number as their final answer."""
    number = answer_of(one, "number")
    return one.strip() == other.strip() or (number is not None and number == answer_of(other, "number"))
