"""Embedders on public sets of sentence similarity, word similarity and analogies.

python benchmarks/embedders.py [--pairs 50] [--words 25000] [--only static|embedded|SmolLM2-135M]

Data: ../shared/data/words and ../shared/data/text. Nothing is trained on the sets; the whitening of the backbone is fitted to
their sentences, without the scores. The 135M model is the one of real_model.py. Results are added to results/embedders.json.
"""

from __future__ import annotations

import argparse
import json
import lzma
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, write
from real_model import CACHE

from selfeval.backbone.adapters import BASE
from selfeval.backbone.roles import Backbone
from selfeval.config import BackboneConfig, StaticEmbedderConfig
from selfeval.quality.dedupe import units
from selfeval.quality.embeddings.glove import vocabulary
from selfeval.quality.embeddings.protocol import Vectors, unit_rows
from selfeval.quality.embeddings.selection import drop_words, evenly_spaced, view_agreement
from selfeval.quality.embeddings.states import Pool, layer_count, pooled_states, token_rows
from selfeval.quality.embeddings.static import StaticEmbedder
from selfeval.quality.embeddings.whitening import fit_whitening
from selfeval.quality.statistics import bootstrap_interval, proportion, spearman

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
LAB = ROOT / "src" / "selfeval" / "lab" / "word_problems"
SENTENCES = {
    "STS-B": "stsb_test.tsv.xz",
    "OnWN 2013": "sts_2013_OnWN.test.tsv.xz",
    "headlines 2014": "sts_2014_headlines.test.tsv.xz",
    "images 2014": "sts_2014_images.test.tsv.xz",
}
WORDS = {
    "WS-353 similarity": "EN-WS-353-SIM.txt",
    "WS-353 relatedness": "EN-WS-353-REL.txt",
    "MEN": "EN-MEN-TR-3k.txt.xz",
    "SimLex-999": "EN-SIMLEX-999.txt",
}
TEXTS = ("charlotte_bronte.txt.xz", "darwin.txt.xz", "tinyshakespeare.txt.xz", "tinystories_1000.json.xz")
METHODS = ("cbow", "skip-gram", "subword", "glove")
Pair = tuple[float, str, str]
Embed = Callable[[Sequence[str]], Vectors]


# -- data ---------------------------------------------------------------------------------------------------------------


def lines(path: Path) -> list[str]:
    opened = lzma.open if path.suffix == ".xz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        return [line.rstrip("\n") for line in file]


def sentence_pairs(name: str, count: int) -> list[Pair]:
    """Return a random sample of the scored pairs of a set."""
    first = 4 if name.startswith("stsb") else 0
    cells = [line.split("\t")[first : first + 3] for line in lines(DATA / "words" / name)]
    found = [(float(c[0]), c[1], c[2]) for c in cells if c[0] not in ("", "score")]
    return random.Random(0).sample(found, min(count, len(found)))


def word_pairs(name: str) -> list[Pair]:
    cells = [line.split("\t") for line in lines(DATA / "words" / name) if line]
    return [(float(score), a.lower(), b.lower()) for a, b, score in cells]


def corpus(most: int) -> list[list[str]]:
    """Return the words of paragraphs of the public texts, at most `most` words of each file."""
    found: list[list[str]] = []
    for name in TEXTS:
        read = lines(DATA / "text" / name)
        paragraphs = (
            [str(t) for t in json.loads("\n".join(read))] if name.endswith(".json.xz") else "\n".join(read).split("\n\n")
        )
        total = 0
        for words in map(units, paragraphs):
            if words and total < most:
                found.append(words)
                total += len(words)
    return found


# -- figures ------------------------------------------------------------------------------------------------------------


def correlation(similarity: Sequence[float], scores: Sequence[float]) -> dict[str, Any]:
    """Return Spearman's correlation with its bootstrap interval."""
    x, y = np.array(similarity), np.array(scores)

    def of(indices: Any) -> Any:
        return np.array([value if (value := spearman(x[i], y[i])) is not None else np.nan for i in indices])

    low, high = bootstrap_interval(of, len(x), resamples=500)
    return {"value": spearman(x, y), "ci_low": low, "ci_high": high, "n": len(x)}


def on_pairs(embed: Embed, pairs: Sequence[Pair]) -> dict[str, Any]:
    first, second = embed([a for _, a, _ in pairs]), embed([b for _, _, b in pairs])
    return correlation((first * second).sum(axis=1), [score for score, _, _ in pairs])


def sentences(embed: Embed, count: int) -> dict[str, Any]:
    return {label: on_pairs(embed, sentence_pairs(name, count)) for label, name in SENTENCES.items()}


def mean_value(figures: dict[str, Any]) -> float:
    return float(np.mean([figure["value"] for figure in figures.values()]))


# -- static -------------------------------------------------------------------------------------------------------------


def words_of(vector: Any) -> dict[str, Any]:
    """Return word similarity on the pairs whose words both have a vector."""
    found = {}
    for label, name in WORDS.items():
        known = [p for p in word_pairs(name) if vector(p[1]) is not None and vector(p[2]) is not None]
        table = {word: vector(word) for _, a, b in known for word in (a, b)}

        def embed(texts: Sequence[str], table: dict[str, Any] = table) -> Vectors:
            return unit_rows(np.stack([table[text] for text in texts]))

        found[label] = on_pairs(embed, known)
    return found


def analogies(vector: Any, vocabulary: Sequence[str], most: int = 2000) -> dict[str, Any]:
    """Return the accuracy of a - b + c among the vocabulary, for questions whose four words are in it (3CosAdd)."""
    rows = {word: row for row, word in enumerate(vocabulary)}
    table = unit_rows(np.stack([vector(word) for word in vocabulary]))
    asked = [w for line in lines(DATA / "words" / "questions-words.txt.xz") if len(w := line.lower().split()) == 4]
    known = [words for words in asked if all(word in rows for word in words)]
    known = random.Random(0).sample(known, min(most, len(known)))
    right = []
    for words in known:
        a, b, c, d = (rows[word] for word in words)
        similar = table @ (table[b] - table[a] + table[c])
        similar[[a, b, c]] = -np.inf
        right.append(int(similar.argmax()) == d)
    figure = proportion(right)
    return {"value": figure.value, "ci_low": figure.ci_low, "ci_high": figure.ci_high, "n": figure.n}


def static_rows(count: int, words: int) -> Iterator[tuple[str, dict[str, Any]]]:
    texts = corpus(words)
    joined = [" ".join(text) for text in texts]
    settings = {method: StaticEmbedderConfig(method=method) for method in METHODS}
    # gensim's own defaults: CBOW, 5 passes, words that occur at least 5 times.
    settings["gensim's defaults"] = StaticEmbedderConfig(method="cbow", epochs=5, least_count=5, pooling="mean")
    frequent = vocabulary(texts, least_count=2)
    for label, setting in settings.items():
        started = time.process_time()
        embedder = StaticEmbedder(joined, setting)
        seconds = time.process_time() - started
        known = [word for word in frequent[:10_000] if embedder.vector(word) is not None]
        yield (
            f"static, {label}",
            {
                "sentences": sentences(embedder.embed, count),
                "words": words_of(embedder.vector),
                "analogies": analogies(embedder.vector, known),
                "seconds": seconds,
                "corpus_words": sum(map(len, texts)),
            },
        )


# -- backbone -----------------------------------------------------------------------------------------------------------


def backbone_rows(name: str, folder: Path, count: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Measure all layers in one pass over the sentences, and the choice that is made without labels."""
    backbone = Backbone.load(str(folder), BackboneConfig())
    pools = [Pool(layer, pooling) for layer in range(1, layer_count(backbone) + 1) for pooling in ("mean", "last")]
    pairs = {label: sentence_pairs(file, count) for label, file in SENTENCES.items()}
    texts = list(dict.fromkeys(text for part in pairs.values() for _, a, b in part for text in (a, b)))
    chosen, draws = evenly_spaced(texts, 128), random.Random(0)
    views = [drop_words(text, draws) for _ in range(2) for text in chosen]
    started = time.process_time()
    states = pooled_states(backbone, BASE, token_rows(backbone, [*texts, *views]), pools, 4096)
    seconds = time.process_time() - started
    rows = {text: row for row, text in enumerate(texts)}
    measured, agreement = {}, {}
    for pool, vectors in states.items():
        half = len(chosen)
        seen = fitted(vectors[len(texts) :], vectors[len(texts) :])
        agreement[pool] = view_agreement(seen[:half], seen[half:])
        measured[pool] = on_rows(fitted(vectors[: len(texts)], vectors[: len(texts)]), rows, pairs)
    best = max(pools, key=lambda pool: agreement[pool])
    last = Pool(layer_count(backbone), "mean")
    by_layer = [{"pool": str(pool), "agreement": agreement[pool], "spearman": mean_value(measured[pool])} for pool in pools]
    facts = {"seconds": seconds, "passes_texts": len(texts) + len(views)}
    yield f"backbone, {name}", {"sentences": measured[best], "pool": str(best), "by_layer": by_layer, **facts}
    yield f"backbone, {name}, last layer", {"sentences": measured[last], "pool": str(last)}
    raw = unit_rows(states[last][: len(texts)])
    yield f"backbone, {name}, last layer, not whitened", {"sentences": on_rows(raw, rows, pairs), "pool": str(last)}
    raw = unit_rows(states[best][: len(texts)])
    yield f"backbone, {name}, not whitened", {"sentences": on_rows(raw, rows, pairs), "pool": str(best)}


def fitted(vectors: Vectors, to: Vectors) -> Vectors:
    return unit_rows(fit_whitening(to, 256).apply(vectors))


def on_rows(vectors: Vectors, rows: dict[str, int], pairs: dict[str, list[Pair]]) -> dict[str, Any]:
    def embed(texts: Sequence[str]) -> Vectors:
        return vectors[[rows[text] for text in texts]]

    return {label: on_pairs(embed, part) for label, part in pairs.items()}


def lexical_rows(count: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Measure the cosine of tf-idf vectors, which knows nothing but equal words."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    pairs = {label: sentence_pairs(file, count) for label, file in SENTENCES.items()}
    texts = list(dict.fromkeys(text for part in pairs.values() for _, a, b in part for text in (a, b)))
    model = TfidfVectorizer(analyzer=units).fit(texts)

    def embed(given: Sequence[str]) -> Vectors:
        found: Vectors = model.transform(given).toarray().astype(np.float32)
        return found

    yield "words alone (tf-idf)", {"sentences": {label: on_pairs(embed, part) for label, part in pairs.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=50, help="sentence pairs per set. Default: 50")
    parser.add_argument("--words", type=int, default=25_000, help="words of each text for static vectors. Default: 25,000")
    parser.add_argument("--only", default="", help="measure only the rows of one source and keep the others")
    options = parser.parse_args()
    sources: dict[str, Callable[[], Iterator[tuple[str, dict[str, Any]]]]] = {
        "lexical": lambda: lexical_rows(options.pairs),
        "embedded": lambda: backbone_rows("embedded model", LAB, options.pairs),
        "static": lambda: static_rows(options.pairs, options.words),
        "SmolLM2-135M": lambda: backbone_rows("SmolLM2-135M-Instruct", CACHE, options.pairs),
    }
    path = RESULTS / "embedders.json"
    rows: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else {}
    for source, measure in sources.items():
        if options.only not in ("", source) or (source == "SmolLM2-135M" and not (CACHE / "config.json").is_file()):
            continue
        for label, row in measure():
            rows[label] = row
            print(label, {name: round(figure["value"], 3) for name, figure in row["sentences"].items()}, flush=True)
        write("embedders", f"python benchmarks/embedders.py --pairs {options.pairs} --words {options.words}", {"rows": rows})


if __name__ == "__main__":
    main()
