"""The baseline that prefers the reply with the lower perplexity under an n-gram model of the run's own training text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from selfeval.evaluation.evaluator import JudgedPair
from selfeval.quality.dedupe import units
from selfeval.quality.ngram_model import NgramModel
from selfeval.records import Question, Reply, Split

__all__ = ["with_surprise"]


def with_surprise(pairs: Sequence[JudgedPair], questions: Mapping[str, Question], replies: Iterable[Reply]) -> list[JudgedPair]:
    """Return the pairs with the surprise of both replies, in nats per unit; infinite for a reply without a unit.

    The perplexity of a reply without a unit is that of its end alone, which says nothing about words.

    The model is trained on the training questions and the replies to them, without any judgement: it knows how replies usually
    read. No text of a test question is in its training.

    Args:
        pairs: judged test pairs.
        questions: questions of the round by id.
        replies: replies of the round, to questions of both splits.
    """
    train = {identifier for identifier, question in questions.items() if question.split == Split.TRAIN}
    # In the order of the records, so that the sums of the model do not depend on the order of a set.
    texts = [question.text for identifier, question in questions.items() if identifier in train] + [
        r.text for r in replies if r.question_id in train
    ]
    # Without a word in the training text there is no model, and the baseline is not measured.
    if not pairs or not any(units(text) for text in texts):
        return list(pairs)
    both = [reply.text for pair in pairs for reply in pair.replies]
    values = NgramModel(texts).perplexities(both)
    surprise = [math.log(value) if units(text) else math.inf for text, value in zip(both, values, strict=True)]
    return [
        replace(pair, surprise=two) for pair, two in zip(pairs, zip(surprise[::2], surprise[1::2], strict=True), strict=True)
    ]
