"""Additional training pairs for the evaluator that are made of the run's own replies: garbled texts, and other styles.

Judged pairs compare fluent replies only. Where an evaluator takes a right reply for a wrong one, its score is then no bound for
texts that are no reply at all, and they may score higher. A chosen reply that beats such a text says nothing about this case:
the text must be below the rejected reply too. Garbled replies are therefore compared with both replies of a pair.

Corrupted replies as negatives: Self-Taught Evaluators (Wang et al. 2024, https://arxiv.org/abs/2408.02666) and West-of-N
(Pace et al. 2024, https://arxiv.org/abs/2401.12086) make the worse reply instead of asking for it. No text or template of
`evaluation/attacks.py` is used here, so that the report's attacks remain texts that training has not seen.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from selfeval.quality.dedupe import is_unspaced
from selfeval.records import Pair
from selfeval.stages.added_pairs import answers_alike

__all__ = ["GARBLED", "GARBLED_CONFIDENCE", "STYLES", "garbled_pairs"]

GARBLED_CONFIDENCE = 0.999
"""Label of a pair with a garbled text.

Close to 1, unlike that of the other added pairs: with 0.95 the loss asks for a margin of log 19, which is less than that of a
judged pair, so that the garbled text would score above a reply that is taken for a wrong one.
"""
_RESTYLED_SHARE = 0.5
"""Share of the added pairs with replies in another style; the others have a garbled text.

With a fifth, and the style in the chosen reply only, the evaluator takes an odd style for a garbled text (docs/log.md).
"""
_MOST_WORDS = 48
_FEWEST_WORDS = 4
"""Words of a reply below which it is taken apart by character."""

_CASE_MATTERS = re.compile(r"[\\`_{}$]|[A-Z][a-z]?\d|[a-z][A-Z]")
"""Code, LaTeX and chemical formulas: in capitals they are wrong."""
_FULL_WIDTH = re.compile(r"(?<!\d)[，。；：！？、]|[，。；：！？、](?!\d)")
_STOP = re.compile(r"\.(?=\s|$)|。")
_INTERJECTIONS = ("hmm", "well", "er", "I guess", "you know", "like")
_SENTENCE_END = re.compile(r"(?<=\.) |(?<=。)(?=.)")

Encode = Callable[[Pair, str], tuple[int, ...]]


@dataclass(frozen=True)
class _Source:
    """Texts that a garbled reply is made of: the reply, and the words of all pairs."""

    reply: str
    words: Sequence[str]
    """Pieces of the prompts and chosen replies."""

    @property
    def pieces(self) -> tuple[list[str], str]:
        """The words of the reply and a space; or its characters and nothing, if it is short or written without spaces."""
        words = _pieces(self.reply)
        if self.space and len(words) < _FEWEST_WORDS:
            return list(self.reply), ""
        return words, self.space

    @property
    def space(self) -> str:
        """The space between pieces of the reply: none if its script has none."""
        return "" if is_unspaced(self.reply) else " "


def _pieces(text: str) -> list[str]:
    """Return the words of a text; its characters if the script has no spaces, where a word would be a whole sentence."""
    return list("".join(text.split())) if is_unspaced(text) else text.split()


# -- garbled ------------------------------------------------------------------------------------------------------------


def _shuffled(source: _Source, rng: random.Random) -> str:
    pieces, space = source.pieces
    return space.join(rng.sample(pieces, len(pieces)))


def _looped(source: _Source, rng: random.Random) -> str:
    """Return a phrase of two to six words of the reply, repeated as in a loop of generation."""
    pieces, space = source.pieces
    size = rng.randint(2, 6)
    start = rng.randrange(max(1, len(pieces) - size + 1))
    return space.join(pieces[start : start + size] * rng.randint(3, 10))


def _broken_off(source: _Source, rng: random.Random) -> str:
    pieces, space = source.pieces
    return space.join(pieces[: rng.randint(1, 3)])


def _salad(source: _Source, rng: random.Random) -> str:
    return source.space.join(rng.choices(source.words, k=rng.randint(1, _MOST_WORDS)))


def _spelled(source: _Source, rng: random.Random) -> str:
    """Return random letters and signs, grouped like words: a text whose tokens no reply has."""
    signs = "abcdefghijklmnopqrstuvwxyz.,;:!?-"
    return " ".join("".join(rng.choices(signs, k=rng.randint(1, 9))) for _ in range(rng.randint(1, _MOST_WORDS)))


GARBLED: dict[str, Callable[[_Source, random.Random], str]] = {
    "shuffled": _shuffled,
    "looped": _looped,
    "broken_off": _broken_off,
    "salad": _salad,
    "spelled": _spelled,
}
"""Families of garbled replies."""


# -- other styles -------------------------------------------------------------------------------------------------------


def _in_capitals(reply: str, rng: random.Random) -> str:
    return reply if _CASE_MATTERS.search(reply) else reply.upper()


def _unpunctuated(reply: str, rng: random.Random) -> str:
    if _CASE_MATTERS.search(reply):  # code needs its signs and lines too
        return reply
    # Punctuation of scripts without spaces is inside of what `split` returns.
    return " ".join(_FULL_WIDTH.sub("", word).rstrip(".,;:!?") for word in reply.split())


def _on_lines(reply: str, rng: random.Random) -> str:
    return _SENTENCE_END.sub("\n", reply)


def _in_lower_case(reply: str, rng: random.Random) -> str:
    return reply if _CASE_MATTERS.search(reply) else reply.lower()


def _emphatic(reply: str, rng: random.Random) -> str:
    """Return the reply with other signs at the ends of its sentences."""
    sign = rng.choice(("!", "!!", " ;", " ...", " -"))
    return _STOP.sub(sign, reply)


def _hesitant(reply: str, rng: random.Random) -> str:
    """Return the reply with interjections between its words."""
    if is_unspaced(reply):
        return reply
    words = reply.split(" ")
    for _ in range(rng.randint(1, 3)):
        words.insert(rng.randrange(len(words) + 1), rng.choice(_INTERJECTIONS))
    return " ".join(words)


def _prefaced(reply: str, rng: random.Random) -> str:
    return f"{rng.choice(('Well,', 'Here it is:', '-', 'Reply:', 'hm, let me see:', 'sure thing,'))} {reply}"


STYLES: dict[str, Callable[[str, random.Random], str]] = {
    "in_capitals": _in_capitals,
    "in_lower_case": _in_lower_case,
    "unpunctuated": _unpunctuated,
    "emphatic": _emphatic,
    "on_lines": _on_lines,
    "hesitant": _hesitant,
    "prefaced": _prefaced,
}
"""Changes of style that leave the words and numbers of a reply in order."""


# -- pairs --------------------------------------------------------------------------------------------------------------


def garbled_pairs(pairs: Sequence[Pair], share: float, seed: int, encode: Encode, limit: int | None = None) -> list[Pair]:
    """Return additional pairs, each made of a training pair without asking the judge.

    Half of them have a garbled text as the worse reply, of a random family; the better one is the chosen or the rejected reply,
    at random. The others have the chosen reply, the rejected one or both in other styles, with the confidence of the pair.

    Args:
        pairs: training pairs.
        share: number of additional pairs, as a share of the pairs, rounded.
        seed: seed of the draws. The result depends on the seed and on the pairs.
        encode: returns the token ids of a typed reply to the question of a pair, with its end token.
        limit: Optional. Token ids of an added reply at most, as of a reply that is cut off. Default: no limit.
    """
    rng = random.Random(f"{seed}/garbled")
    words = [word for pair in pairs for word in (*_pieces(pair.prompt), *_pieces(pair.chosen))]
    drawn = rng.sample(list(pairs), min(len(pairs), round(share * len(pairs))))
    made = [_restyled(pair, rng) if rng.random() < _RESTYLED_SHARE else _garbled(pair, words, rng) for pair in drawn]
    # Typed texts are encoded; a sampled reply keeps its ids.
    return [
        replace(
            pair,
            chosen_ids=pair.chosen_ids or encode(pair, pair.chosen)[:limit],
            rejected_ids=pair.rejected_ids or encode(pair, pair.rejected)[:limit],
        )
        for pair in made
        if pair.chosen.strip() != pair.rejected.strip()
    ]


def _restyled(pair: Pair, rng: random.Random) -> Pair:
    """Return the pair with one of its replies, or both, in other styles: style must not show which one is better."""
    in_chosen, in_rejected = rng.choice(((True, False), (False, True), (True, True)))
    if in_chosen:
        pair = replace(pair, chosen=_in_other_styles(pair.chosen, rng), chosen_ids=())
    if in_rejected:
        pair = replace(pair, rejected=_in_other_styles(pair.rejected, rng), rejected_ids=())
    return pair


def _in_other_styles(reply: str, rng: random.Random) -> str:
    """Return the reply in one to three of the styles that change it."""
    styles = [style for style in STYLES.values() if style(reply, rng).strip() != reply.strip()]
    for style in rng.sample(styles, min(len(styles), rng.randint(1, 3))):
        reply = style(reply, rng)
    return reply


def _garbled(pair: Pair, words: Sequence[str], rng: random.Random) -> Pair:
    better, ids = rng.choice(((pair.chosen, pair.chosen_ids), (pair.rejected, pair.rejected_ids)))
    text = GARBLED[rng.choice(tuple(GARBLED))](_Source(better, words), rng)
    if len(_pieces(better)) < _FEWEST_WORDS and any(answers_alike(text, reply) for reply in (pair.chosen, pair.rejected)):
        text = better  # such as "21" made of "12", which may be the right reply; a pair of equal texts is left out
    return replace(pair, chosen=better, chosen_ids=ids, rejected=text, rejected_ids=(), confidence=GARBLED_CONFIDENCE)
