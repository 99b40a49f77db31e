"""BLEU, chrF and TER by sacrebleu (Post 2018, https://aclanthology.org/W18-6319), from 0 to 100; TER may exceed 100."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import numpy as np

from selfeval.errors import MissingPackageError
from selfeval.quality.text_metrics.splitting import Splitting
from selfeval.quality.text_metrics.statistics_of_lines import Floats, LineStatistics

__all__ = ["bleu", "chrf", "ter", "tokenizer_of"]

References = Sequence[Sequence[str]]
"""`[N]`, one or more references of each line."""


def bleu(hypotheses: Sequence[str], references: References, splitting: Splitting, *, order: int = 4) -> LineStatistics:
    """Compute BLEU. Papineni et al. 2002 (https://aclanthology.org/P02-1040).

    The corpus score has sacrebleu's defaults: case matters, the reference closest in length counts for the brevity penalty, and
    precisions of 0 are smoothed exponentially. A sentence shorter than `order` uses the orders that it has
    (`effective_order`).

    Args:
        hypotheses: [N].
        references: [N], one or more for each line.
        splitting: the tokenizer.
        order: largest n-gram. Default: 4.
    """
    metrics = _sacrebleu()
    corpus = metrics.BLEU(tokenize=splitting.tokenizer, max_ngram_order=order, force=True)
    sentence = metrics.BLEU(tokenize=splitting.tokenizer, max_ngram_order=order, effective_order=True)
    return _statistics(corpus, sentence, hypotheses, references)


def chrf(hypotheses: Sequence[str], references: References, *, word_order: int = 0) -> LineStatistics:
    """Compute chrF2 over character n-grams up to 6, or chrF++ with word n-grams up to 2.

    Popović 2015 (https://aclanthology.org/W15-3049) and 2017 (https://aclanthology.org/W17-4770). White space is ignored.

    Args:
        hypotheses: [N].
        references: [N], one or more for each line; the best one counts.
        word_order: largest n-gram of words: 0 for chrF, 2 for chrF++. Default: 0.
    """
    metric = _sacrebleu().CHRF(word_order=word_order)
    return _statistics(metric, metric, hypotheses, references)


def ter(hypotheses: Sequence[str], references: References, splitting: Splitting) -> LineStatistics:
    """Compute the translation edit rate: edits and shifts per 100 words of the references; lower is better.

    Snover et al. 2006 (https://aclanthology.org/2006.amta-papers.25). Case is ignored. In scripts without spaces, characters
    are words.

    Args:
        hypotheses: [N].
        references: [N], one or more for each line; the one with the fewest edits counts.
        splitting: whether the script has no spaces.
    """
    # `asian_support` needs `normalized`, which also separates punctuation; sacrebleu's default does neither.
    metric = _sacrebleu().TER(normalized=splitting.characters, asian_support=splitting.characters)
    return _statistics(metric, metric, hypotheses, references)


def _statistics(corpus: Any, sentence: Any, hypotheses: Sequence[str], references: References) -> LineStatistics:
    """Return the statistics of a sacrebleu metric, in its own layout.

    sacrebleu publishes scores only. Its statistics by line are what its own significance tests sum; the tests of this package
    compare the sums with its corpus scores.
    """
    # Lines may have different numbers of references; sacrebleu takes streams, in which None is a missing one.
    streams = list(zip_longest(*references))
    rows = corpus._extract_corpus_statistics(hypotheses, streams)

    def score(sums_S: Floats) -> float:
        # As Python numbers, because BLEU divides lists in place.
        return float(corpus._compute_score_from_stats(sums_S.tolist()).score)

    scores = tuple(float(sentence._compute_score_from_stats(list(row)).score) for row in rows)
    return LineStatistics(np.array(rows, dtype=np.float64), scores, score)


def tokenizer_of(splitting: Splitting) -> Any:
    """Return sacrebleu's tokenizer: a function from a text to its tokens, joined by spaces."""
    return _sacrebleu().BLEU(tokenize=splitting.tokenizer).tokenizer


def _sacrebleu() -> Any:
    try:
        from sacrebleu import metrics
    except ImportError as error:
        raise MissingPackageError("BLEU, chrF and TER", "sacrebleu", extra="data") from error
    return metrics
