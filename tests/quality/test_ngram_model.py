"""The n-gram model against nltk's, against sums of probabilities, and on texts whose probabilities are computed by hand."""

from __future__ import annotations

import math
import random

import pytest
from nltk.lm import Vocabulary
from nltk.lm.models import InterpolatedLanguageModel
from nltk.lm.smoothing import KneserNey

from selfeval.quality import ngram_model
from selfeval.quality.dedupe import units
from selfeval.quality.ngram_model import NgramModel, cross_perplexities

TEXTS = [
    "Tom has 3 apples and eats 2 of them. How many are left?",
    "Ann has 5 pears and eats 2 of them. How many are left?",
    "Tom buys 4 apples. How many apples has Tom?",
    "Ann sells 5 pears to Tom. How many pears are left?",
    "How many are left?",
]
CHINESE = ["小明有三个苹果", "小红有五个梨", "小明吃了两个苹果", "还剩几个苹果"]


class UniformKneserNey(KneserNey):
    """nltk's smoothing with our lowest order: its unigrams are not discounted, so an unknown word has probability 0."""

    def unigram_score(self, word):
        count, total = self._continuation_counts(word)
        known = self.counts[1]
        kinds = len(known)
        # Known words (the end included), and the unknown one.
        return max(count - self.discount, 0.0) / total + self.discount * kinds / total / (kinds + 1)


class Nltk(InterpolatedLanguageModel):
    """nltk's interpolated Kneser-Ney, trained on the n-grams that end in a unit or in the end of a text."""

    def __init__(self, texts, order, discount):
        vocabulary = Vocabulary([unit for text in texts for unit in units(text)] + ["</s>"])
        super().__init__(UniformKneserNey, order, vocabulary=vocabulary, params={"discount": discount, "order": order})
        self.counts.update([list(self.ngrams(text)) for text in texts])

    def ngrams(self, text):
        padded = ["<s>"] * (self.order - 1) + units(text) + ["</s>"]
        for end in range(self.order - 1, len(padded)):
            for size in range(1, self.order + 1):
                yield tuple(padded[end + 1 - size : end + 1])

    def log_prob(self, text):
        padded = ["<s>"] * (self.order - 1) + units(text) + ["</s>"]
        known = [unit if unit in self.vocab or unit == "<s>" else "<UNK>" for unit in padded]
        ends = range(self.order - 1, len(padded))
        return sum(math.log(self.unmasked_score(known[i], tuple(known[i + 1 - self.order : i]))) for i in ends)


@pytest.mark.parametrize("order", [2, 3, 4])
@pytest.mark.parametrize("texts", [TEXTS, CHINESE])
def test_equals_nltk(order, texts):
    ours, theirs = NgramModel(texts, order, discount=0.6), Nltk(texts, order, 0.6)
    asked = [*texts, "Tom eats 7 pears of Ann. Why?", "小明卖了三个梨吗", "", "left left left"]
    for text, (found, _) in zip(asked, ours.log_probs(asked), strict=True):
        assert found == pytest.approx(theirs.log_prob(text), rel=1e-12)


@pytest.mark.parametrize("discount", [None, 0.3])
@pytest.mark.parametrize("context", [[], ["tom", "has"], ["tom", "never"], ["unseen", "has"], ["how", "many", "are"]])
def test_probabilities_sum_to_one(discount, context):
    model = NgramModel(TEXTS, 3, discount=discount)
    ends = [*model.vocabulary, "unseen"]
    before, _ = model.log_probs([" ".join(context)])[0]
    # P(w | context) = P(context w) / P(context), both without their ends; the last term is the end itself.
    end = _last(model, context, None)
    total = sum(_last(model, context, word) for word in ends) + end
    assert before < 0
    assert total == pytest.approx(1, abs=1e-12)


def _last(model, context, word):
    """Return the probability of a unit (None: the end) after a context at the beginning of a text."""
    units_of = [context if word is None else [*context, word]]
    probabilities = model._probabilities(model._windows(units_of))
    return probabilities[-1 if word is None else -2]


def test_unigrams_by_hand():
    # Of order 1: counts a 2, b 1, end 1, total 4, d = 0.5, three kinds, and 1/4 for each of a, b, the end and the unknown.
    model = NgramModel(["a b a"], 1, discount=0.5)
    left = 0.5 * 3 / 4 / 4
    expected = math.log(1.5 / 4 + left) + math.log(left) + math.log(0.5 / 4 + left)
    assert model.log_probs(["a c"]) == [(pytest.approx(expected), 3)]
    assert model.perplexities(["a c"]) == [pytest.approx(math.exp(-expected / 3))]


def test_discount_is_estimated_from_counts_of_one_and_two():
    # Order 1: "a" once, "b" twice, the end once: d = 2 / (2 + 2 · 1) = 0.5, as in a model with that discount.
    estimated, fixed = NgramModel(["a b b"], 1), NgramModel(["a b b"], 1, discount=0.5)
    assert estimated.log_probs(["a b"]) == fixed.log_probs(["a b"])
    assert estimated.log_probs(["a b"]) != NgramModel(["a b b"], 1, discount=0.6).log_probs(["a b"])


def test_perplexity_is_low_in_the_domain_and_of_a_batch_equals_that_of_each():
    model = NgramModel(TEXTS)
    asked = [TEXTS[0], "Tom has 5 pears. How many are left?", "The stock market fell sharply on Monday.", ""]
    found = model.perplexities(asked)
    assert found[0] < found[1] < found[2]
    assert found == [model.perplexities([text])[0] for text in asked]


def test_a_text_knows_nothing_of_itself_in_cross_perplexities():
    generator = random.Random(0)
    words = [f"w{i}" for i in range(50)]
    texts = [" ".join(generator.choices(words, k=6)) for _ in range(40)]
    strange = "completely different unrelated sentence here"
    # Its copy is in the same fold, and does not make it familiar.
    found = cross_perplexities([*texts, strange, strange.upper()])
    assert found[-1] == found[-2] == max(found)
    assert NgramModel([*texts, strange]).perplexities([strange])[0] < found[-1]


def test_cross_perplexities_split_each_text_once(monkeypatch):
    texts, seen = [f"Tom has {n} apples and {n + 1} pears." for n in range(20)], []
    alone = cross_perplexities(texts)
    monkeypatch.setattr(ngram_model, "units", lambda text: seen.append(text) or units(text))
    assert cross_perplexities(texts) == alone
    assert seen == texts
    # The folds by the public model: each text by the model of the other folds.
    others = [text for place, text in enumerate(texts) if place % 5 != 2]
    assert alone[7] == NgramModel(others).perplexities([texts[7]])[0]


@pytest.mark.parametrize(
    ("texts", "options", "words"),
    [
        ([], {}, "without any"),
        (["...", ""], {}, "2 texts"),
        (["a"], {"order": 0}, "order"),
        (["a"], {"discount": 1.0}, "discount"),
    ],
)
def test_refuses(texts, options, words):
    with pytest.raises(ValueError, match=words):
        NgramModel(texts, **options)


def test_cross_perplexities_need_two_texts():
    with pytest.raises(ValueError, match="two distinct"):
        cross_perplexities(["a b", "A b!"])
