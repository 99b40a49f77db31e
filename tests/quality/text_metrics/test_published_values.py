"""The metrics against values that other implementations publish: sacrebleu's tests, nlg-eval and pltrdy's rouge.

Compared is what has the same definition. Not the same are:

- nlg-eval: METEOR is version 1.5 (Java, with WordNet and paraphrases); its ROUGE-L takes the best precision and the best recall
  over all references and weights recall by 1.2²; CIDEr, SPICE and the embedding metrics are not ours.
- pltrdy: ROUGE-1 and 2 count distinct n-grams, and the F of ROUGE-L weights recall by (precision / recall)².
- sacrebleu: cases with other options (smoothing methods, lower case, white space).
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from selfeval.quality.text_metrics.rouge import rouge
from selfeval.quality.text_metrics.sacrebleu_metrics import bleu, chrf, ter
from selfeval.quality.text_metrics.splitting import splitting_of
from shared_data import FOLDER


def _file(name: str) -> str:
    path = FOLDER / "metrics" / name
    if not path.is_file():
        pytest.skip(f"the data set is not here: shared/data/metrics/{name} beside the repository", allow_module_level=True)
    return path.read_text(encoding="utf-8")


SACREBLEU: dict[str, Any] = json.loads(_file("sacrebleu_test_vectors.json"))
BLEU, SENTENCE_BLEU, CHRF, TER = (SACREBLEU[f"test/test_{name}.py"] for name in ("bleu", "sentence_bleu", "chrf", "ter"))
PLTRDY: list[dict[str, Any]] = json.loads(_file("pltrdy_rouge_data.json"))
ENGLISH, SEPARATED = splitting_of("en", []), splitting_of("en", [], "none")


def _by_line(streams: list[list[str]]) -> list[tuple[str, ...]]:
    return list(zip(*streams, strict=True))


@pytest.mark.parametrize("case", [case for case in BLEU["test_corpus_bleu_cases"] if "smooth_method" not in case[2]])
def test_corpus_bleu(case):
    hypotheses, streams, options, expected = case
    splitting = splitting_of("en", [], options.get("tokenize"))
    assert bleu(hypotheses, _by_line(streams), splitting).value == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("case", BLEU["test_bleu_max_order"])
def test_bleu_of_other_orders(case):
    order, hypotheses, streams, expected = case
    assert f"{bleu(hypotheses, _by_line(streams), ENGLISH, order=order).value:.2f}" == expected


# The third case has other smoothing.
@pytest.mark.parametrize("case", BLEU["test_case_effective_order"][:2])
def test_bleu_of_short_sentences(case):
    hypotheses, [[reference]], expected = case
    assert bleu(hypotheses, [[reference]], SEPARATED).sentences == (pytest.approx(100 * expected),)


@pytest.mark.parametrize("case", [case for case in SENTENCE_BLEU["test_cases"] if case[0] == "exp" and not case[2]])
def test_sentence_bleu(case):
    found = bleu([SENTENCE_BLEU["SYS"]], [[SENTENCE_BLEU["REF"]]], splitting_of("en", [], case[3]))
    assert found.sentences == (pytest.approx(case[4], abs=1e-3),)


@pytest.mark.parametrize("case", CHRF["test_sentence_level_chrf"])
def test_sentence_chrf(case):
    hypothesis, references, expected = case
    # They have the option `eps_smoothing`: the mean of F over the orders, ours is F of the means of precision and recall.
    assert chrf([hypothesis], [references]).sentences == (pytest.approx(expected, abs=1e-3),)


@pytest.mark.parametrize("case", CHRF["test_cases_effective_order"])
def test_corpus_chrf(case):
    hypotheses, references, expected = case
    assert chrf(hypotheses, [[one] for one in references]).value == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("case", TER["test_cases"])
def test_corpus_ter(case):
    hypotheses, references, expected = case
    assert ter(hypotheses, [[one] for one in references], ENGLISH).value == pytest.approx(100 * expected, abs=0.1)


def test_bleu_and_rouge_of_nlg_eval():
    hypotheses, *streams = (_file(f"nlgeval_{name}.txt").splitlines() for name in ("hyp", "ref1", "ref2"))
    expected = json.loads(_file("nlgeval_expected.json"))
    references = _by_line(streams)
    for order in range(1, 5):
        found = bleu(hypotheses, references, SEPARATED, order=order).value / 100
        assert round(found, 6) == expected[f"Bleu_{order}"]
    scores = []
    for hypothesis, several in zip(hypotheses, references, strict=True):
        rows = [rouge([hypothesis], [[one]], SEPARATED, ["rougeL"])["rougeL"][0] for one in several]
        precision, recall = max(row[0] for row in rows), max(row[1] for row in rows)
        scores.append((1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision))
    assert round(sum(scores) / len(scores), 6) == expected["ROUGE_L"]


@pytest.mark.parametrize("case", PLTRDY)
def test_rouge_of_pltrdy(case):
    expected, hypothesis, reference = case["scores"], case["hyp"], case["ref"]
    precision, recall, _ = rouge([hypothesis], [[reference]], SEPARATED, ["rougeL"])["rougeL"][0]
    assert (precision, recall) == (pytest.approx(expected["rouge-l"]["p"]), pytest.approx(expected["rouge-l"]["r"]))
    # Of distinct words, the numbers of distinct ones and of all are the same.
    distinct = [" ".join(dict.fromkeys(text.split())) for text in (hypothesis, reference)]
    found = rouge(distinct[:1], [distinct[1:]], SEPARATED, ["rouge1"])["rouge1"][0]
    # Their F has 1e-8 in its denominator.
    assert found == tuple(pytest.approx(expected["rouge-1"][name], abs=1e-8) for name in "prf")
