"""Text metrics against published values, their time per 1,000 lines, and the n-gram model against nltk.

python benchmarks/text_metrics.py [--data ../shared/data]

Reads the public sets of --data (see docs/concepts/text-metrics.md). CPU time of one thread. Perplexity as a signal for texts
that do not belong: 950 word problems (SVAMP) and 50 instructions on other subjects, each by a model of the others.
"""

from __future__ import annotations

import argparse
import json
import lzma
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import write

from selfeval.quality.dedupe import units
from selfeval.quality.ngram_model import NgramModel, cross_perplexities
from selfeval.quality.statistics import bootstrap_interval, proportion
from selfeval.quality.text_metrics.rouge import rouge
from selfeval.quality.text_metrics.sacrebleu_metrics import bleu, chrf, ter
from selfeval.quality.text_metrics.scoring import METRICS, text_metrics
from selfeval.quality.text_metrics.splitting import splitting_of

LINES = 1000
PLANTED, TEXTS = 50, 1000
NLTK_LINES = 1000

Values = list[tuple[float, float]]
"""Our value and the published one, of each case."""


def seconds(work: Callable[[], object]) -> float:
    """Return the CPU time of a call."""
    started = time.process_time()
    work()
    return time.process_time() - started


def opened(path: Path) -> str:
    """Return the text of a file, compressed or not."""
    if path.suffix == ".xz":
        with lzma.open(path, "rt", encoding="utf-8") as file:
            return file.read()
    return path.read_text(encoding="utf-8")


# -- agreement ----------------------------------------------------------------------------------------------------------


def of_sacrebleu(folder: Path) -> dict[str, tuple[Values, float]]:
    """Return values of sacrebleu's own tests with our options, and the precision with which they are published."""
    found = json.loads(opened(folder / "sacrebleu_test_vectors.json"))
    corpus, sentence, characters, edits = (found[f"test/test_{name}.py"] for name in ("bleu", "sentence_bleu", "chrf", "ter"))
    bleus: Values = []
    for texts, streams, options, expected in corpus["test_corpus_bleu_cases"]:
        if "smooth_method" not in options:
            splitting = splitting_of("en", [], options.get("tokenize"))
            bleus.append((bleu(texts, list(zip(*streams, strict=True)), splitting).value, expected))
    sentences = [
        (bleu([sentence["SYS"]], [[sentence["REF"]]], splitting_of("en", [], tokenizer)).sentences[0], expected)
        for smoothing, _, lowercase, tokenizer, expected in sentence["test_cases"]
        if smoothing == "exp" and not lowercase
    ]
    chrfs = [(chrf(a, [[one] for one in b]).value, expected) for a, b, expected in characters["test_cases_effective_order"]]
    english = splitting_of("en", [])
    ters = [(ter(a, [[one] for one in b], english).value / 100, expected) for a, b, expected in edits["test_cases"]]
    return {
        "BLEU of corpora, sacrebleu": (bleus, 1e-6),
        "BLEU of sentences, sacrebleu": (sentences, 1e-3),
        "chrF, sacrebleu": (chrfs, 1e-4),
        "TER, sacrebleu": (ters, 1e-3),
    }


def of_nlg_eval(folder: Path) -> dict[str, tuple[Values, float]]:
    """Return BLEU-1 to 4 of nlg-eval's example with two references."""
    texts, *streams = (opened(folder / f"nlgeval_{name}.txt").splitlines() for name in ("hyp", "ref1", "ref2"))
    expected, splitting = json.loads(opened(folder / "nlgeval_expected.json")), splitting_of("en", [], "none")
    references = list(zip(*streams, strict=True))
    values = [(bleu(texts, references, splitting, order=n).value / 100, expected[f"Bleu_{n}"]) for n in range(1, 5)]
    return {"BLEU-1 to 4, nlg-eval": (values, 1e-6)}


def of_pltrdy(folder: Path) -> dict[str, tuple[Values, float]]:
    """Return precision and recall of ROUGE-L, and ROUGE-1 of distinct words."""
    splitting = splitting_of("en", [], "none")
    longest: Values = []
    words: Values = []
    for case in json.loads(opened(folder / "pltrdy_rouge_data.json")):
        text, reference, expected = case["hyp"], case["ref"], case["scores"]
        found = rouge([text], [[reference]], splitting, ["rougeL"])["rougeL"][0]
        longest += zip(found[:2], (expected["rouge-l"][name] for name in "pr"), strict=True)
        text, reference = (" ".join(dict.fromkeys(one.split())) for one in (text, reference))
        found = rouge([text], [[reference]], splitting, ["rouge1"])["rouge1"][0]
        words += zip(found, (expected["rouge-1"][name] for name in "prf"), strict=True)
    return {"ROUGE-L precision and recall, pltrdy": (longest, 1e-8), "ROUGE-1 of distinct words, pltrdy": (words, 1e-8)}


def agreement(folder: Path) -> list[dict[str, Any]]:
    """Return, for each set of published values, how many are equal to their printed digits, and the largest difference."""
    rows = []
    for name, (values, precision) in {**of_sacrebleu(folder), **of_nlg_eval(folder), **of_pltrdy(folder)}.items():
        differences = [abs(ours - theirs) for ours, theirs in values]
        equal = sum(difference <= precision for difference in differences)
        rows.append({"values": name, "n": len(values), "equal": equal, "precision": precision, "largest": max(differences)})
    return rows


# -- time ---------------------------------------------------------------------------------------------------------------


def times(sentences: list[str]) -> dict[str, float]:
    """Return CPU seconds per 1,000 lines of each metric with its interval, against changed copies."""
    generator = random.Random(0)
    vocabulary = sorted({word for sentence in sentences for word in sentence.split()})
    references = generator.sample(sentences, LINES)
    texts = [
        " ".join(generator.choice(vocabulary) if generator.random() < 0.3 else word for word in reference.split())
        for reference in references
    ]
    text_metrics(texts[:2], references[:2], language="en")  # imports the libraries
    return {name: seconds(lambda name=name: text_metrics(texts, references, metrics=[name], language="en")) for name in METRICS}


def ngram_times(sentences: list[str]) -> dict[str, Any]:
    """Return CPU seconds to train on sentences and to score 1,000, and nltk's for a line."""
    from nltk.lm import KneserNeyInterpolated
    from nltk.lm.preprocessing import padded_everygram_pipeline

    rows = []
    for count in (1_000, 10_000, 100_000):
        texts = (sentences * (count // len(sentences) + 1))[:count]
        started = time.process_time()
        model = NgramModel(texts)
        trained = time.process_time() - started
        scored = seconds(lambda model=model: model.perplexities(sentences[:1000]))
        rows.append({"texts": count, "train": trained, "score_1000": scored})
    theirs = KneserNeyInterpolated(3)
    theirs.fit(*padded_everygram_pipeline(3, [units(text) for text in sentences[:NLTK_LINES]]))

    def line() -> None:
        for text in sentences[:5]:
            padded = ["<s>", "<s>", *units(text), "</s>"]
            for place in range(2, len(padded)):
                theirs.score(padded[place], padded[place - 2 : place])

    return {"rows": rows, "nltk_texts": NLTK_LINES, "nltk_score_1000": seconds(line) * 200}


# -- texts that do not belong -------------------------------------------------------------------------------------------


def anomalies(data: Path) -> list[dict[str, Any]]:
    """Return how well the perplexity under a model of the other texts finds planted texts, for three draws."""
    problems = [f"{row['Body'].strip()} {row['Question'].strip()}" for row in json.loads(opened(data / "math/svamp.json.xz"))]
    lines = opened(data / "instruct/seed_tasks_175.jsonl.xz").splitlines()
    others = [json.loads(line)["instruction"] for line in lines]
    rows = []
    for seed in range(3):
        generator = random.Random(seed)
        planted = generator.sample(others, PLANTED)
        texts = [(text, 0.0) for text in generator.sample(problems, TEXTS - PLANTED)] + [(text, 1.0) for text in planted]
        generator.shuffle(texts)
        scores, is_planted = np.array(cross_perplexities([text for text, _ in texts])), np.array([other for _, other in texts])
        found = [bool(is_planted[place]) for place in np.argsort(-scores)[:PLANTED]]
        low, high = bootstrap_interval(
            lambda rows, s=scores, p=is_planted: np.array([_auc(s[r], p[r]) for r in rows]), TEXTS, resamples=300
        )
        auc = {"value": _auc(scores, is_planted), "ci_low": low, "ci_high": high, "n": TEXTS}
        rows.append({"seed": seed, "auc": auc, "precision": proportion(found).as_json()})
    return rows


def _auc(scores: np.ndarray, is_planted: np.ndarray) -> float:
    """Return the probability that a planted text has a higher score than another one."""
    ranks = scores.argsort().argsort() + 1
    positives = int(is_planted.sum())
    return float((ranks[is_planted == 1].sum() - positives * (positives + 1) / 2) / (positives * (len(scores) - positives)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data")
    options = parser.parse_args()
    stories = json.loads(opened(options.data / "text/tinystories_1000.json.xz"))
    sentences = [part.strip() for story in stories for part in story.replace("\n", " ").split(". ") if len(part.split()) > 3]
    figures = {
        "agreement": agreement(options.data / "metrics"),
        "lines": LINES,
        "words_per_line": round(float(np.mean([len(sentence.split()) for sentence in sentences])), 1),
        "seconds": times(sentences),
        "ngram": ngram_times(sentences),
        "anomalies": anomalies(options.data),
        "texts": TEXTS,
        "planted": PLANTED,
    }
    write("text_metrics", "python benchmarks/text_metrics.py", figures)


if __name__ == "__main__":
    main()
