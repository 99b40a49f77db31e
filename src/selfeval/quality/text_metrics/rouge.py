"""ROUGE by rouge_score (Lin 2004, https://aclanthology.org/W04-1013), from 0 to 1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from selfeval.errors import MissingPackageError
from selfeval.quality.text_metrics.splitting import Splitting, Words

__all__ = ["ROUGES", "RougeName", "rouge"]

RougeName = Literal["rouge1", "rouge2", "rougeL", "rougeLsum"]
ROUGES: tuple[RougeName, ...] = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def rouge(
    hypotheses: Sequence[str], references: Sequence[Sequence[str]], splitting: Splitting, names: Sequence[RougeName] = ROUGES
) -> dict[RougeName, list[tuple[float, float, float]]]:
    """Compute ROUGE-1, ROUGE-2, ROUGE-L, and ROUGE-L over the lines of a text (`rougeLsum`).

    English has the tokenizer of rouge_score: lower case, a to z and 0 to 9, no stems. Other languages have `Words`. With the
    tokenizer `none`, words are separated by white space in all languages.

    Args:
        hypotheses: [N].
        references: [N], one or more for each line; the one with the highest F1 counts.
        splitting: the language.
        names: Optional. Which of them. Default: all.

    Returns:
        Precision, recall and F1 of each line, by name.
    """
    scorer = _scorer(list(names), _tokenizer(splitting))
    rows = [scorer.score_multi(list(refs), text) for text, refs in zip(hypotheses, references, strict=True)]
    return {
        name: [(float(s.precision), float(s.recall), float(s.fmeasure)) for s in (row[name] for row in rows)] for name in names
    }


class _Separated:
    def tokenize(self, text: str) -> list[str]:
        return text.split()


def _tokenizer(splitting: Splitting) -> Words | _Separated | None:
    """Return the tokenizer of a language; None for that of rouge_score."""
    if splitting.tokenizer == "none":
        return _Separated()
    return None if splitting.language == "en" else Words()


def _scorer(names: list[RougeName], tokenizer: Words | _Separated | None) -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise MissingPackageError("ROUGE", "rouge-score", extra="data") from error
    return RougeScorer(names, use_stemmer=False, tokenizer=tokenizer)
