"""Scores of collections: against the libraries, on texts computed by hand, intervals, and errors."""

from __future__ import annotations

import random
import sys

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu import metrics as sacrebleu

from processes import python_anew
from selfeval import text_metrics
from selfeval.errors import InputError, MissingPackageError
from selfeval.quality.ngram_counts import TextCounts, count_ngrams
from selfeval.quality.text_metrics import meteor as meteor_module
from selfeval.quality.text_metrics import scoring
from selfeval.quality.text_metrics.meteor import meteor
from selfeval.quality.text_metrics.rouge import rouge
from selfeval.quality.text_metrics.sacrebleu_metrics import bleu, chrf, ter
from selfeval.quality.text_metrics.scoring import METRICS
from selfeval.quality.text_metrics.splitting import Words, language_of, splitting_of

WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "mat", "big", "red", "house", "of", "Tom", "Ann,", "apples!", "3", "4"]
ENGLISH, CHINESE = splitting_of("en", []), splitting_of("zh", [])


def _corpus(lines: int, seed: int = 0) -> tuple[list[str], list[list[str]], list[str]]:
    """Return texts of a good system, one or two references for each line, and texts of a bad system."""
    generator = random.Random(seed)

    def changed(words: list[str], share: float) -> str:
        return " ".join(generator.choice(WORDS) if generator.random() < share else word for word in words)

    sources = [generator.choices(WORDS, k=generator.randint(3, 12)) for _ in range(lines)]
    references = [[changed(words, 0.1) for _ in range(generator.randint(1, 2))] for words in sources]
    return [changed(words, 0.2) for words in sources], references, [changed(words, 0.6) for words in sources]


def _streams(references: list[list[str]]) -> list[list[str | None]]:
    return [[several[place] if place < len(several) else None for several in references] for place in range(2)]


def _ours(texts, references):
    return {"BLEU": bleu(texts, references, ENGLISH), "CHRF": chrf(texts, references), "TER": ter(texts, references, ENGLISH)}


@pytest.mark.parametrize("name", ["BLEU", "CHRF", "TER"])
def test_corpus_and_resamples_equal_sacrebleu(name):
    texts, references, _ = _corpus(30)
    ours, theirs = _ours(texts, references)[name], getattr(sacrebleu, name)()
    assert ours.value == pytest.approx(theirs.corpus_score(texts, _streams(references)).score, abs=1e-12)
    # A resample is the corpus of the drawn lines, repeated ones included.
    drawn = np.array([[3, 3, 7, 29, 0], [1, 2, 3, 4, 4]])
    with pytest.raises(ValueError):
        ours.resampled(drawn)
    rows = np.random.default_rng(0).integers(0, 30, size=(3, 30))
    expected = [
        theirs.corpus_score([texts[i] for i in row], _streams([references[i] for i in row])).score for row in rows.tolist()
    ]
    assert ours.resampled(rows) == pytest.approx(expected, abs=1e-9)


def test_sentences_equal_sacrebleu_and_rouge_score():
    texts, references, _ = _corpus(12)
    options = {"BLEU": {"effective_order": True}, "CHRF": {}, "TER": {}}
    for name, found in _ours(texts, references).items():
        metric = getattr(sacrebleu, name)(**options[name])
        expected = [metric.sentence_score(*case).score for case in zip(texts, references, strict=True)]
        assert found.sentences == pytest.approx(expected, abs=1e-12)
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL", "rougeLsum"])
    for place, (text, several) in enumerate(zip(texts, references, strict=True)):
        for name, rows in rouge(texts, references, ENGLISH).items():
            assert rows[place] == tuple(scorer.score_multi(several, text)[name])


def test_paired_difference():
    good, references, bad = _corpus(60)
    names = ["bleu", "ter", "rougeL", "distinct1", "self_bleu"]
    found = text_metrics(good, references, against=bad, metrics=names, resamples=300)
    same = text_metrics(good, references, against=good, metrics=names, resamples=300)
    for name in names:
        score, equal = found[name], same[name].difference
        assert (equal.value, equal.ci_low, equal.ci_high) == (0, 0, 0)
        assert score.difference.value == pytest.approx(score.figure.value - score.other.value)
    assert found["bleu"].difference.ci_low > 0
    assert found["ter"].difference.ci_high < 0
    # Paired: narrower than if each system had drawn its own lines.
    own, other, both = found["rougeL"].figure, found["rougeL"].other, found["rougeL"].difference
    assert both.ci_high - both.ci_low < (own.ci_high - own.ci_low) + (other.ci_high - other.ci_low)


def test_interval_of_a_mean_is_that_of_the_normal_approximation():
    texts, references, _ = _corpus(400)
    score = text_metrics(texts, references, metrics=["rouge1"])["rouge1"]
    values = np.array(score.sentences)
    reach = 1.96 * values.std(ddof=1) / 20
    assert (score.figure.ci_low, score.figure.ci_high) == pytest.approx(
        (values.mean() - reach, values.mean() + reach), abs=3e-3
    )
    again, other = (text_metrics(texts, references, metrics=["rouge1"], seed=seed)["rouge1"].figure for seed in (0, 1))
    assert again == score.figure != other


def test_few_lines_have_no_interval():
    texts, references, _ = _corpus(9)
    found = text_metrics(texts, references, against=texts, metrics=["bleu", "distinct2"])
    for score in found.scores.values():
        assert score.figure.ci_low is score.difference.ci_low is None
        assert score.figure.n == 9


# -- METEOR -------------------------------------------------------------------------------------------------------------


def test_meteor_by_hand():
    # All three words match, by equality or stem, in one chunk: F = 1, penalty 0.5 (1 / 3)³.
    assert meteor(["The cats sat"], [["the cat sat"]], ENGLISH) == [pytest.approx(1 - 0.5 / 27)]
    # Without stems two words match, in two chunks: precision and recall 2 / 3, penalty 0.5.
    assert meteor(["The cats sat"], [["the cat sat"]], splitting_of("other", [])) == [pytest.approx(1 / 3)]
    # Recall weighs nine times as much: P = 1, R = 1 / 2, F = 10 P R / (R + 9 P), one chunk of one match.
    assert meteor(["cat"], [["dog", "cat dog"]], ENGLISH) == [pytest.approx(0.5 * 5 / 9.5)]
    assert meteor(["", "x"], [["a"], ["y"]], ENGLISH) == [0, 0]


def test_meteor_uses_wordnet_where_it_is_installed(monkeypatch):
    class Lemma:
        def name(self):
            return "kitten"

    class Synset:
        def lemmas(self):
            return [Lemma()]

    class WordNet:
        def synsets(self, word):
            return [Synset()] if word == "cat" else []

    # A class in place of a corpus of 10 MB, which is not part of nltk.
    plain = meteor(["a cat"], [["a kitten"]], ENGLISH)
    monkeypatch.setattr(meteor_module, "_synonyms", lambda splitting: WordNet())
    assert meteor(["a cat"], [["a kitten"]], ENGLISH) == [pytest.approx(1 - 0.5 / 8)]
    assert plain[0] < 0.5
    assert text_metrics(["a cat"], ["a kitten"], metrics=["meteor"]).meteor_stages == "exact and stem and WordNet synonyms"


# -- languages ----------------------------------------------------------------------------------------------------------


def test_chinese_by_hand():
    # Five characters against four, three of them common, in order.
    assert rouge(["我喜欢苹果"], [["我喜欢梨"]], CHINESE)["rouge1"] == [pytest.approx((3 / 5, 3 / 4, 2 / 3))]
    assert rouge(["苹果我喜欢"], [["我喜欢梨"]], CHINESE)["rouge2"] == [pytest.approx((2 / 4, 2 / 3, 4 / 7))]
    # rouge_score's own tokenizer finds no word.
    assert rouge(["我喜欢苹果"], [["我喜欢梨"]], ENGLISH)["rouge1"] == [(0, 0, 0)]
    assert bleu(["我喜欢苹果"], [["我喜欢梨"]], CHINESE, order=1).value == pytest.approx(60)
    assert ter(["我喜欢苹果"], [["我喜欢梨子"]], CHINESE).value == pytest.approx(40)
    assert text_metrics(["我喜欢苹果"], ["我喜欢梨"], metrics=["bleu"]).language == "zh"


def test_words_of_any_script():
    assert Words().tokenize("GPU 很快, naïve! Ärger हिन्दी") == ["gpu", "很", "快", "naïve", "ärger", "हिन्दी"]


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("Tom has three apples and eats one of them.", "en"),
        ("Der Hund läuft heute schnell durch den dunklen Wald.", "de"),
        ("Сегодня вечером мы пойдём в театр, потому что завтра у нас выходной день.", "ru"),
        ("小明有三个 apple 和两个梨。", "zh"),
        ("ここは東京の駅です。", "ja"),
        ("Tomek ma trzy jabłka i zjada jedno z nich.", "other"),
        ("3 + 4", "en"),
    ],
)
def test_language(text, language):
    assert language_of([text]) == language


# -- errors -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([],), {}, "no text to score"),
        ((["a", "b"], ["a"]), {}, "2 texts and 1 references"),
        ((["a"], ["a"]), {"against": ["a", "b"]}, "1 texts and 2 texts of the other system"),
        ((["a", "b"], [["a"], []]), {}, "text 2 has no reference"),
        ((["a"],), {"metrics": ["bleu"]}, '"bleu" compares with references'),
        ((["a"], ["a"]), {"metrics": ["rogue1"]}, 'did you mean "rouge1"'),
        ((["a"], ["a"]), {"metrics": []}, "no metric was named"),
        ((["a"], ["a"]), {"language": "xx"}, '"xx" is unknown'),
        ((["a"], ["a"]), {"tokenizer": "14a"}, 'did you mean "13a"'),
    ],
)
def test_refuses(arguments, options, message):
    with pytest.raises(InputError, match=message):
        text_metrics(*arguments, **options)


@pytest.mark.parametrize(
    ("module", "metric", "package"),
    [
        ("sacrebleu", "bleu", "sacrebleu"),
        ("rouge_score.rouge_scorer", "rouge1", "rouge-score"),
        ("nltk.translate.meteor_score", "meteor", "nltk"),
    ],
)
def test_missing_library(monkeypatch, module, metric, package):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingPackageError, match=package) as caught:
        text_metrics(["a"], ["a"], metrics=[metric])
    assert caught.value.extra == "data"


def test_defaults_and_json():
    found = text_metrics(["a cat sat"] * 2, ["a cat sat"] * 2)
    assert list(found.scores) == [name for name in METRICS if name != "chrf++"]
    assert list(text_metrics(["a cat sat"] * 2).scores) == ["distinct1", "distinct2", "self_bleu"]
    values = found.as_json(sentences=True)
    assert values["metrics"]["rouge1"] == {
        "score": {"value": 1.0, "ci_low": None, "ci_high": None, "n": 2},
        "sentences": [1.0, 1.0],
    }
    assert "sentences" not in values["metrics"]["self_bleu"]


def test_libraries_are_imported_when_they_are_used():
    code = """
import sys

import selfeval

selfeval.text_metrics
print([name for name in ("nltk", "sacrebleu", "rouge_score") if name in sys.modules])
"""
    assert python_anew(code).stdout.strip() == "[]"


@pytest.mark.parametrize(("metrics", "orders"), [(None, 4), (["distinct1"], 1), (["distinct2", "distinct1"], 2)])
def test_the_ngrams_of_a_system_are_counted_once(
    monkeypatch: pytest.MonkeyPatch, metrics: list[str] | None, orders: int
) -> None:
    texts, _, others = _corpus(12)
    alone, counted = text_metrics(texts, against=others, metrics=metrics), []

    def count(lines: list[str], *, orders: int) -> TextCounts:
        counted.append((lines, orders))
        return count_ngrams(lines, orders=orders)

    monkeypatch.setattr(scoring, "count_ngrams", count)
    assert text_metrics(texts, against=others, metrics=metrics).as_json() == alone.as_json()
    assert counted == [(texts, orders), (others, orders)]
