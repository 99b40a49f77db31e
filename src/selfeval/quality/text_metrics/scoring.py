"""Score texts with all metrics: corpus scores with intervals, sentence scores, and paired differences between two systems."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

from selfeval.errors import InputError
from selfeval.quality.jackknife import Kept, jackknife
from selfeval.quality.ngram_counts import BLEU_ORDERS, TextCounts, count_ngrams, distinct_share, self_bleu
from selfeval.quality.statistics import Figure, rounded
from selfeval.quality.text_metrics.meteor import meteor, stages_of
from selfeval.quality.text_metrics.rouge import ROUGES, rouge
from selfeval.quality.text_metrics.sacrebleu_metrics import bleu, chrf, ter
from selfeval.quality.text_metrics.splitting import Splitting, splitting_of
from selfeval.quality.text_metrics.statistics_of_lines import (
    LineStatistics,
    corpus_difference,
    corpus_figure,
    mean_of,
)
from selfeval.texts import nearest

__all__ = [
    "DIVERSITY",
    "LOWER_IS_BETTER",
    "METRICS",
    "OVERLAP",
    "MetricName",
    "MetricScore",
    "TextMetrics",
    "text_metrics",
]

MetricName = Literal[
    "bleu",
    "chrf",
    "chrf++",
    "ter",
    "rouge1",
    "rouge2",
    "rougeL",
    "rougeLsum",
    "meteor",
    "distinct1",
    "distinct2",
    "self_bleu",
]
METRICS: tuple[MetricName, ...] = get_args(MetricName)
DIVERSITY: tuple[MetricName, ...] = ("distinct1", "distinct2", "self_bleu")
"""Metrics of the hypotheses alone, which need no references."""
_ORDERS: Mapping[MetricName, int] = {"distinct1": 1, "distinct2": 2, "self_bleu": BLEU_ORDERS}
"""Largest n-grams of each."""
OVERLAP: tuple[MetricName, ...] = tuple(name for name in METRICS if name not in DIVERSITY)
LOWER_IS_BETTER: frozenset[str] = frozenset({"ter", "self_bleu"})
RESAMPLES = 2000

References = Sequence[Sequence[str]]


@dataclass(frozen=True)
class MetricScore:
    """A metric on a collection of texts.

    Attributes:
        name: name of the metric.
        figure: corpus score with its 95 % interval; no interval below 10 texts.
        sentences: score of each text alone; empty for the metrics of the collection as a whole (`DIVERSITY`).
        difference: this collection minus the other one, with a paired 95 % interval; None without another one.
        other: corpus score of the other collection; None without one.
    """

    name: MetricName
    figure: Figure
    sentences: tuple[float, ...] = ()
    difference: Figure | None = None
    other: Figure | None = None

    def as_json(self, *, sentences: bool = False) -> dict[str, Any]:
        """Return the figures, and optionally the sentence scores, for JSON."""
        found: dict[str, Any] = {"score": self.figure.as_json()}
        if self.difference is not None and self.other is not None:
            found |= {"against": self.other.as_json(), "difference": self.difference.as_json()}
        if sentences and self.sentences:
            found["sentences"] = [rounded(value) for value in self.sentences]
        return found


@dataclass(frozen=True)
class TextMetrics:
    """Scores of a collection of texts, by metric.

    Attributes:
        scores: the metrics in the order of `METRICS`.
        lines: number of texts.
        language: language by whose rules the texts were split.
        tokenizer: tokenizer of BLEU and METEOR.
        meteor_stages: by which of equality, stems and synonyms METEOR aligned words; empty without METEOR.
    """

    scores: Mapping[MetricName, MetricScore]
    lines: int
    language: str
    tokenizer: str
    meteor_stages: str = ""

    def __getitem__(self, name: MetricName) -> MetricScore:
        return self.scores[name]

    def as_json(self, *, sentences: bool = False) -> dict[str, Any]:
        """Return all figures for JSON.

        Args:
            sentences: whether to include the score of each text. Default: False.
        """
        found = {"lines": self.lines, "language": self.language, "tokenizer": self.tokenizer}
        if self.meteor_stages:
            found["meteor_stages"] = self.meteor_stages
        return {**found, "metrics": {name: score.as_json(sentences=sentences) for name, score in self.scores.items()}}


def text_metrics(
    hypotheses: Sequence[str],
    references: Sequence[str | Sequence[str]] | None = None,
    *,
    metrics: Sequence[str] | None = None,
    language: str = "auto",
    tokenizer: str | None = None,
    against: Sequence[str] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> TextMetrics:
    """Score texts against references, and their repetition among themselves.

    BLEU, chrF and TER are those of sacrebleu (0 to 100), ROUGE is that of rouge_score (F1, 0 to 1) and METEOR that of nltk (0
    to 1). Intervals of these are percentile bootstrap intervals over lines; those of distinct-n and self-BLEU, which a repeated
    line would distort, are jackknife intervals.

    Args:
        hypotheses: [N] texts.
        references: Optional. [N], one reference or several for each text. Default: none, so only the metrics of `DIVERSITY`.
        metrics: Optional. Names in `METRICS`. Default: all but chrF++ (without references, those of `DIVERSITY`).
        language: one of `selfeval.quality.text_metrics.splitting.LANGUAGES`. Default: `auto`, found from the references.
        tokenizer: Optional. Another tokenizer of BLEU and METEOR. Default: that of the language.
        against: Optional. [N] texts of another system; each score then has the paired difference, ours minus theirs.
        seed: seed of the bootstrap.
        resamples: number of resamples, > 0. Default: 2000.

    Raises:
        InputError: there are no texts, the numbers of texts differ, a text has no reference, a metric needs references, or a
            metric, language or tokenizer is unknown.
        MissingPackageError: a library of the extra `data` is not installed.

    Example:
        >>> found = text_metrics(["a cat sat", "a dog ran", "A cat sat."], metrics=["distinct1"])
        >>> found["distinct1"].figure.as_json()["value"]
        0.555556
    """
    names = _names(metrics, has_references=references is not None)
    found = None if references is None else [[one] if isinstance(one, str) else list(one) for one in references]
    _check(hypotheses, found, against)
    texts = list(hypotheses) if found is None else [text for several in found for text in several]
    splitting = splitting_of(language, texts, tokenizer)
    own, other = (None if lines is None else _overlap(lines, found, names, splitting) for lines in (hypotheses, against))
    scores = _diversity([name for name in names if name in DIVERSITY], hypotheses, against)
    if own is not None:
        overlaps = {name: _score(name, own[name], None if other is None else other[name], seed, resamples) for name in own}
        scores = {name: (scores | overlaps)[name] for name in names}
    stages = stages_of(splitting) if "meteor" in names else ""
    return TextMetrics(scores, len(hypotheses), splitting.language, splitting.tokenizer, stages)


def _names(metrics: Sequence[str] | None, *, has_references: bool) -> list[MetricName]:
    if metrics is None:
        return [name for name in (METRICS if has_references else DIVERSITY) if name != "chrf++"]
    unknown = next((name for name in metrics if name not in METRICS), None)
    if unknown is not None:
        raise InputError(f'metric "{unknown}" is unknown{nearest(unknown, METRICS)}')
    names = [name for name in METRICS if name in metrics]
    needs = next((name for name in names if name not in DIVERSITY), None)
    if needs is not None and not has_references:
        raise InputError(f'metric "{needs}" compares with references, and there are none; without them: {", ".join(DIVERSITY)}')
    if not names:
        raise InputError(f"no metric was named; allowed: {', '.join(METRICS)}")
    return names


def _check(hypotheses: Sequence[str], references: References | None, against: Sequence[str] | None) -> None:
    if not hypotheses:
        raise InputError("there is no text to score")
    for lines, name in ((references, "references"), (against, "texts of the other system")):
        if lines is not None and len(lines) != len(hypotheses):
            raise InputError(f"{len(hypotheses)} texts and {len(lines)} {name}; each text needs its own")
    empty = next((i for i, several in enumerate(references or ()) if not several), None)
    if empty is not None:
        raise InputError(f"text {empty + 1} has no reference; leave out texts without one")


# -- overlap with references --------------------------------------------------------------------------------------------


def _overlap(
    texts: Sequence[str], references: References | None, names: Sequence[MetricName], splitting: Splitting
) -> dict[MetricName, LineStatistics]:
    """Return the statistics of each metric that compares with references."""
    if references is None:
        return {}
    rouges = [name for name in ROUGES if name in names]
    measures: dict[MetricName, Callable[[], LineStatistics]] = {
        "bleu": partial(bleu, texts, references, splitting),
        "chrf": partial(chrf, texts, references),
        "chrf++": partial(chrf, texts, references, word_order=2),
        "ter": partial(ter, texts, references, splitting),
        "meteor": lambda: mean_of(meteor(texts, references, splitting)),
    }
    found = {name: measure() for name, measure in measures.items() if name in names}
    for rouge_name, rows in (rouge(texts, references, splitting, rouges) if rouges else {}).items():
        found[rouge_name] = mean_of([f1 for _, _, f1 in rows])
    return found


def _score(name: MetricName, own: LineStatistics, other: LineStatistics | None, seed: int, resamples: int) -> MetricScore:
    figure = corpus_figure(own, seed, resamples)
    if other is None:
        return MetricScore(name, figure, own.sentences)
    difference = corpus_difference(own, other, seed, resamples)
    return MetricScore(name, figure, own.sentences, difference, corpus_figure(other, seed, resamples))


# -- repetition ---------------------------------------------------------------------------------------------------------


def _diversity(
    names: Sequence[MetricName], hypotheses: Sequence[str], against: Sequence[str] | None
) -> dict[MetricName, MetricScore]:
    """Return the scores of the measures of repetition, for which the n-grams of each system are counted once."""
    if not names:
        return {}
    orders = max(_ORDERS[name] for name in names)
    own, other = (None if texts is None else count_ngrams(texts, orders=orders) for texts in (hypotheses, against))
    assert own is not None
    return {name: _repetition(name, own, other) for name in names}


def _repetition(name: MetricName, own: TextCounts, other: TextCounts | None) -> MetricScore:
    measure: Callable[[TextCounts, Kept], float] = self_bleu
    if name != "self_bleu":
        measure = partial(_distinct, _ORDERS[name])

    def of_both(kept: Kept) -> list[float]:
        values = [measure(counts, kept) for counts in (own, other) if counts is not None]
        return values if other is None else [*values, values[0] - values[1]]

    ranges = [(0.0, 1.0), (0.0, 1.0), (-1.0, 1.0)]
    figures = jackknife(of_both, len(own.lengths_N), bounds=ranges[: 1 if other is None else 3])
    if other is None:
        return MetricScore(name, figures[0])
    return MetricScore(name, figures[0], other=figures[1], difference=figures[2])


def _distinct(n: int, counts: TextCounts, kept: Kept) -> float:
    return distinct_share(counts, n, kept)
