"""Measure the filters of questions and replies on planted faults, and the steering of the examples towards rare topics.

python benchmarks/domain_filters.py [--part filters|replies|paraphrases|coverage ...]

Filters: among real questions (SVAMP, instructions) or generated ones (the embedded domain), 5% are replaced by questions of
another set, 5% are paraphrases of others, and 5% are loops. Each fold has other questions and other faults, so the outcomes are
independent. A paraphrase is made by rules that keep the meaning: words are replaced by synonyms, "How many X" becomes "What is
the number of X", an imperative becomes a request, and the question is moved to the front or to the end.

Off-domain questions are found by the distance to the nearest seed, as the stage does, and by the local outlier factor (Breunig
et al. 2000, https://doi.org/10.1145/342009.335388; scikit-learn) of 5 and of 10 neighbours. All have the same rule of the
threshold: a rank of the scores of the seeds, each computed from the other seeds, times the margin.

Replies: solutions of a language model (GSM8K) and code (HumanEval), cut at random places as a token limit would. Copies of
half of them end in a block that repeats until the limit.

Paraphrases: pairs of the STS benchmark with a score of at least 4.5 are paraphrases, pairs below 3 are not.

Coverage: the embedded model writes the same number of questions with and without `questions.coverage`, three seeds.

One thread. The embedders are the backbones of SmolLM2-135M-Instruct, which `real_model.py` installs, and of the embedded model.
"""

from __future__ import annotations

import argparse
import gzip
import json
import lzma
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, write
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import LocalOutlierFactor

from selfeval.backbone.roles import Backbone
from selfeval.config import BackboneConfig, QuestionsConfig, RunConfig
from selfeval.judging.sources import fixed_text
from selfeval.judging.templates import Templates, templates_folder
from selfeval.lab.domain import Problem, draw_problem, read_problem
from selfeval.quality.dedupe import NearDuplicates, normalise
from selfeval.quality.domain_distance import SeedDomain
from selfeval.quality.embeddings import Embedder, Vectors
from selfeval.quality.embeddings.plain import plain_embedder
from selfeval.quality.question_filters import is_repetitive
from selfeval.quality.reply_loops import find_loop
from selfeval.quality.statistics import proportion
from selfeval.quality.vendi import vendi_score
from selfeval.records import Question
from selfeval.stages.draws import Draws
from selfeval.stages.question_meaning import Meaning
from selfeval.stages.questions import WriteQuestions
from selfeval.stages.shards import Batch, ModelHandle

_ROOT = Path(__file__).resolve().parents[1]
_DATA = _ROOT.parent / "shared" / "data"
_LAB = _ROOT / "src" / "selfeval" / "lab" / "word_problems"
_SHARD = 50
"""Samples per shard of the questions that are steered."""
_SEEDS = 20
"""Seeds of each fold."""
_SHARE = 0.05
"""Share of each fault."""
SETTINGS = {"off_domain": 1.5, "paraphrase": 0.3}
"""Settings that the documentation suggests."""

_NEIGHBOURS = (5, 10)
"""Neighbours of the local outlier factor, at most half of the seeds."""

_SYNONYMS = dict(
    pair.split(":")
    for line in (
        "has:owns have:possess buys:purchases bought:purchased gives:hands gave:handed left:remaining total:overall each:every",
        "big:large write:compose create:make make:produce generate:produce list:enumerate find:determine given:provided",
        "following:below describe:characterise explain:clarify begin:start children:kids picked:gathered found:discovered",
        "needs:requires need:require lost:misplaced shares:divides fills:packs friends:mates store:shop",
    )
    for pair in line.split(" ")
)


# -- data ---------------------------------------------------------------------------------------------------------------


def _lines(path: str) -> list[Any]:
    return [json.loads(line) for line in _text(path).splitlines() if line.strip()]


def _text(path: str) -> str:
    return lzma.decompress((_DATA / path).read_bytes()).decode("utf-8")


def svamp() -> list[str]:
    rows = json.loads(_text("math/svamp.json.xz"))
    return [f"{row['Body'].strip().rstrip('.')}. {row['Question'].strip()}" for row in rows]


def instructions() -> list[str]:
    files = ("instruct/seed_tasks_175.jsonl.xz", "instruct/user_oriented_instructions_252.jsonl.xz")
    return list(dict.fromkeys(row["instruction"].strip() for file in files for row in _lines(file)))


def word_problems(count: int) -> list[str]:
    rng = random.Random(0)
    return list(dict.fromkeys(draw_problem(rng).question for _ in range(2 * count)))[:count]


# -- faults -------------------------------------------------------------------------------------------------------------


def paraphrase(text: str) -> str:
    """Rewrite a question by the rules of the module's docstring; equal to the text if no rule applies."""
    sentences = re.split(r"(?<=[.?!])\s+", text.strip())
    question = sentences[-1]
    if len(sentences) > 1 and question.endswith("?"):
        sentences = [_request(question), *sentences[:-1]]
    else:
        sentences = [_request(sentences[0]), *sentences[1:]]
    return " ".join(sentences)


def _request(sentence: str) -> str:
    words = re.sub(r"^How many (\w+) (do|does|did|are|is|will) ", r"What is the number of \1 that ", sentence)
    swapped = re.sub(r"[A-Za-z]+", lambda match: _synonym(match[0]), words)
    if swapped.endswith("?"):
        return swapped
    return f"Please {swapped[0].lower()}{swapped[1:]}"


def _synonym(word: str) -> str:
    found = _SYNONYMS.get(word.lower())
    return word if found is None else found.capitalize() if word[0].isupper() else found


def looped(text: str, rng: random.Random) -> str:
    """Return a question that repeats a few of its words until a limit of 40 words."""
    words = text.split()
    start = rng.randrange(1, max(2, len(words) // 2))
    block = words[start : start + rng.randrange(1, 8)]
    return " ".join([*words[: start + len(block)], *(block * 40)][:40])


# -- filters of questions -----------------------------------------------------------------------------------------------

Outcomes = dict[str, list[tuple[str, bool]]]
"""By filter: kind of each text, and whether the filter drops it."""


def fold_of(texts: Sequence[str], others: Sequence[str], rng: random.Random) -> tuple[list[str], list[tuple[str, str]]]:
    """Return the seeds, and (kind, text) of the samples in random order; a paraphrase comes after its original."""
    seeds, rest = list(texts[:_SEEDS]), list(texts[_SEEDS:])
    count = round(_SHARE * len(rest))
    originals = [text for text in rest[2 * count :] if normalise(paraphrase(text)) != normalise(text)][:count]
    rows = [("real", text) for text in rest[2 * count :]] + [("off_domain", text) for text in others[:count]]
    rows += [("loop", looped(text, rng)) for text in rest[:count]]
    rng.shuffle(rows)
    return seeds, [*rows, *(("paraphrase", paraphrase(text)) for text in originals)]


def judge_fold(embedder: Embedder, seeds: Sequence[str], rows: Sequence[tuple[str, str]]) -> Outcomes:
    """Return what each filter drops: those of the stage alone, without the others."""
    found: Outcomes = {}
    exact = set(map(normalise, seeds))
    words = NearDuplicates()
    for number, seed in enumerate(seeds):
        words.add(str(number), seed)
    for number, (kind, text) in enumerate(rows):
        found.setdefault("exact match", []).append((kind, normalise(text) in exact))
        found.setdefault("shingles", []).append((kind, words.find(text) is not None))
        found.setdefault("loop", []).append((kind, is_repetitive(text)))
        exact.add(normalise(text))
        words.add(f"q{number}", text)
    for name, setting in SETTINGS.items():
        found[name] = [
            (kind, dropped) for (kind, _), dropped in zip(rows, _dropped(embedder, seeds, rows, name, setting), strict=True)
        ]
    for name, drops in _outliers(embedder, seeds, [text for _, text in rows]).items():
        found[name] = [(kind, dropped) for (kind, _), dropped in zip(rows, drops, strict=True)]
    return found


def _outliers(embedder: Embedder, seeds: Sequence[str], texts: Sequence[str]) -> dict[str, list[bool]]:
    """Return the texts that the local outlier factor drops, by the number of neighbours."""
    vectors, own = embedder.embed(texts), embedder.embed(seeds)
    found = {}
    for count in _NEIGHBOURS:
        domain = SeedDomain.of(own, SETTINGS["off_domain"], _left_out_factors(own, count))
        factors = outlier_factors(own, vectors, count)
        found[f"off_domain, LOF {count}"] = (factors > domain.border(factors)).tolist()
    return found


def _left_out_factors(seeds: Vectors, neighbours: int) -> NDArray[np.float64]:
    """Return `[S]`, the local outlier factor of each seed among the others."""
    rows = [outlier_factors(np.delete(seeds, place, axis=0), seeds[[place]], neighbours) for place in range(len(seeds))]
    return np.concatenate(rows)


def outlier_factors(seeds: Vectors, vectors: Vectors, neighbours: int) -> NDArray[np.float64]:
    """Return `[N]`, the local outlier factor of each vector among the seeds: near 1 inside, larger outside."""
    model = LocalOutlierFactor(n_neighbors=neighbours, metric="cosine", novelty=True).fit(seeds)
    factors: NDArray[np.float64] = -model.score_samples(vectors)
    return factors


def areas(embedder: Embedder, seeds: Sequence[str], rows: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Return the area under the ROC curve of each score, off-domain questions against real ones: it needs no threshold."""
    known = [(kind == "off_domain", text) for kind, text in rows if kind in ("real", "off_domain")]
    vectors, own = embedder.embed([text for _, text in known]), embedder.embed(seeds)
    scores = {"off_domain": (1 - vectors @ own.T).min(axis=1)}
    scores |= {f"off_domain, LOF {count}": outlier_factors(own, vectors, count) for count in _NEIGHBOURS}
    is_planted = [planted for planted, _ in known]
    return {name: round(float(roc_auc_score(is_planted, values)), 4) for name, values in scores.items()}


def _dropped(
    embedder: Embedder, seeds: Sequence[str], rows: Sequence[tuple[str, str]], name: str, setting: float
) -> list[bool]:
    meaning = Meaning(QuestionsConfig(**{name: setting}), embedder, seeds)
    group, dropped = meaning.group([text for _, text in rows]), []
    for number, (_, text) in enumerate(rows):
        drop = group.drop(text)
        dropped.append(drop is not None)
        if drop is None:
            group.accept(f"q{number}", text)
    return dropped


def summary(outcomes: Sequence[Outcomes]) -> dict[str, Any]:
    """Return recall of each kind of fault and the share of real questions that are dropped, of each filter."""
    figures: dict[str, Any] = {}
    for name in outcomes[0]:
        cases = [case for fold in outcomes for case in fold[name]]
        kinds = sorted({kind for kind, _ in cases})
        figures[name] = {kind: _figure([dropped for k, dropped in cases if k == kind]) for kind in kinds}
        target = "paraphrase" if name in ("exact match", "shingles") else name.partition(",")[0]
        hits = [kind == target for kind, dropped in cases if dropped and kind in (target, "real")]
        figures[name]["precision"] = _figure(hits) if hits else None
    return figures


def _figure(outcomes: Sequence[bool]) -> dict[str, Any]:
    return proportion(list(outcomes)).as_json()


class Remembered:
    """An embedder that computes each text once: folds of the same set share it."""

    def __init__(self, embedder: Embedder, texts: Sequence[str]) -> None:
        self.name, distinct = embedder.name, list(dict.fromkeys(texts))
        started = time.process_time()
        self._rows = dict(zip(distinct, embedder.embed(distinct), strict=True))
        self.seconds_per_text = (time.process_time() - started) / len(distinct)

    def embed(self, texts: Sequence[str]) -> Vectors:
        return np.stack([self._rows[text] for text in texts])


def filters(folds: int = 3, size: int = 160) -> dict[str, Any]:
    """Measure the filters of questions on three sets."""
    found: dict[str, Any] = {}
    for name, load, texts, others in _sets():
        rng = random.Random(0)
        rng.shuffle(texts)
        rng.shuffle(others)
        parts = []
        for fold in range(min(folds, len(texts) // size)):
            count = round(_SHARE * (size - _SEEDS))
            parts.append(fold_of(texts[fold * size : (fold + 1) * size], others[fold * count : (fold + 1) * count], rng))
        found[name] = _measured(load(), parts)
        print(name, json.dumps(found[name]), flush=True)
    return found


def _sets() -> list[tuple[str, Callable[[], Backbone], list[str], list[str]]]:
    return [
        ("embedded", embedded, word_problems(800), instructions()),
        ("svamp", small_model, svamp(), instructions()),
        ("instructions", small_model, instructions(), svamp()),
    ]


def _measured(backbone: Backbone, parts: Sequence[tuple[list[str], list[tuple[str, str]]]]) -> dict[str, Any]:
    outcomes, separations, seconds = [], [], 0.0
    for seeds, rows in parts:
        remembered = Remembered(plain_embedder(backbone), [*seeds, *(text for _, text in rows)])
        seconds += remembered.seconds_per_text / len(parts)
        outcomes.append(judge_fold(remembered, seeds, rows))
        separations.append(areas(remembered, seeds, rows))
    return {
        "folds": len(parts),
        "seeds": _SEEDS,
        "seconds_per_text": round(seconds, 4),
        "filters": summary(outcomes),
        "areas": {name: [fold[name] for fold in separations] for name in separations[0]},
    }


# -- embedders ----------------------------------------------------------------------------------------------------------


def embedded() -> Backbone:
    return Backbone.load(str(_LAB), BackboneConfig())


def small_model() -> Backbone:
    from real_model import model_folder

    return Backbone.load(str(model_folder()), BackboneConfig())


# -- loops of replies ---------------------------------------------------------------------------------------------------


def replies(count: int = 600) -> dict[str, Any]:
    """Measure the detector of loops on replies that a token limit cuts off."""
    tokenizer, rng = small_model().loaded.tokenizer, random.Random(0)
    found: dict[str, Any] = {}
    for name, texts in (("solutions", _solutions()), ("code", _code())):
        rng.shuffle(texts)
        rows = [tokenizer.encode(text, add_special_tokens=False) for text in texts[:count]]
        cut = [row[: rng.randrange(len(row) // 2, len(row)) + 1] for row in rows]
        planted = [_loop_of(row, rng) for row in cut[: round(0.5 * len(cut))]]
        found[name] = {
            "real": _figure([find_loop(row, finished=False) is not None for row in cut]),
            "loop": _figure([find_loop(row, finished=False) is not None for row in planted]),
        }
    return found


def _solutions() -> list[str]:
    rows = _lines("math/gsm8k_example_model_solutions.jsonl.xz")
    return [row[key]["solution"] for row in rows for key in row if isinstance(row[key], dict) and "solution" in row[key]]


def _code() -> list[str]:
    with gzip.open(_DATA / "code/HumanEval.jsonl.gz", "rt", encoding="utf-8") as lines:
        human = [json.loads(line) for line in lines]
    return [row["prompt"] + row["canonical_solution"] for row in human]


def _loop_of(ids: Sequence[int], rng: random.Random) -> list[int]:
    """Return a reply of 256 tokens that begins like this one and repeats its last tokens, at a random place."""
    start = ids[: rng.randrange(4, max(5, min(len(ids), 160)))]
    block = start[-rng.randrange(1, 25) :]
    return [*start, *(block * 256)][:256]


# -- pairs of the STS benchmark -----------------------------------------------------------------------------------------


def paraphrases(count: int = 60) -> dict[str, Any]:
    """Measure the share of real paraphrases, and of different sentences, that the filter drops."""
    rows = _text("words/stsb_test.tsv.xz").splitlines()[1:]
    pairs = [(float(row[4]), row[5], row[6]) for row in (line.split("\t") for line in rows) if len(row) >= 7]
    random.Random(0).shuffle(pairs)
    kinds = {"paraphrase": [p for p in pairs if p[0] >= 4.5][:count], "different": [p for p in pairs if p[0] < 3][:count]}
    backbone = small_model()
    seeds = [first for _, first, _ in pairs[-_SEEDS:]]
    texts = [*seeds, *(text for found in kinds.values() for _, first, second in found for text in (first, second))]
    remembered = Remembered(plain_embedder(backbone), texts)
    return {kind: _pairs_dropped(remembered, seeds, found) for kind, found in kinds.items()}


def _pairs_dropped(embedder: Embedder, seeds: Sequence[str], pairs: Sequence[tuple[float, str, str]]) -> dict[str, Any]:
    outcomes: dict[str, list[bool]] = {"shingles": [], "paraphrase": []}
    for _, first, second in pairs:
        words = NearDuplicates()
        words.add("first", first)
        meaning = Meaning(QuestionsConfig(paraphrase=SETTINGS["paraphrase"]), embedder, seeds)
        meaning.add_all(["first"], [first])
        drop = meaning.group([second]).drop(second)
        outcomes["shingles"].append(words.find(second) is not None)
        outcomes["paraphrase"].append(drop is not None and drop.detail["of"] == "first")
    return {name: _figure(found) for name, found in outcomes.items()}


# -- coverage -----------------------------------------------------------------------------------------------------------


def coverage(seeds: Sequence[int] = (0, 1, 2), wanted: int = 300) -> dict[str, Any]:
    """Compare the questions that the embedded model writes with and without steering, at equal numbers."""
    backbone, found = embedded(), []
    embedder = plain_embedder(backbone)
    for seed in seeds:
        spreads = {name: _spread(embedder, _written(backbone, seed, wanted, steered=name == "on")) for name in ("off", "on")}
        found.append({"seed": seed, **spreads})
        print(json.dumps(found[-1]), flush=True)
    return {"questions": wanted, "shard": _SHARD, "runs": found}


def _written(backbone: Backbone, seed: int, wanted: int, *, steered: bool) -> list[str]:
    """Write questions as the stage does, shard by shard."""
    config = RunConfig(model=str(_LAB))
    folder = templates_folder(config.model, "")
    settings = QuestionsConfig(train=wanted, test=1, shard=_SHARD, coverage=steered)
    work = WriteQuestions(settings, 512, Draws(seed), _lab_seeds(), fixed_text(folder, "ask"))
    model, records = ModelHandle(backbone, Templates.load(folder, backbone.loaded.tokenizer)), list[Question]()
    for shard in range(4 * wanted // _SHARD):
        if len(records) < wanted:
            records += work(model, Batch(shard, tuple(records))).records
    return [question.text for question in records[:wanted]]


def _lab_seeds() -> tuple[str, ...]:
    lines = _LAB.with_name("seeds.jsonl").read_text(encoding="utf-8").splitlines()
    return tuple(json.loads(line)["question"] for line in lines)


def _spread(embedder: Embedder, texts: Sequence[str]) -> dict[str, float | None]:
    """Return counts by the oracle of the domain (families and phrasings of a question), and the Vendi score."""
    problems = [problem for text in texts if (problem := read_problem(text)) is not None]
    phrasings = Counter(_phrasing(problem) for problem in problems)
    return {
        "questions": len(texts),
        "well_posed": len(problems) / len(texts),
        "families": len({problem.family.name for problem in problems}),
        "effective_families": _effective(Counter(problem.family.name for problem in problems)),
        "phrasings": len(phrasings),
        "effective_phrasings": _effective(phrasings),
        "vendi": vendi_score(embedder.embed(texts)),
    }


def _phrasing(problem: Problem) -> str:
    return next(phrasing.pattern for phrasing in problem.family.phrasings if phrasing.read(problem.question) is not None)


def _effective(counts: Mapping[Any, int]) -> float:
    """Return the number of equally frequent kinds with the same entropy."""
    shares = np.array(list(counts.values())) / sum(counts.values())
    return float(np.exp(-(shares * np.log(shares)).sum()))


# -- command ------------------------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "filters": filters,
    "replies": replies,
    "paraphrases": paraphrases,
    "coverage": coverage,
}


def main() -> None:
    """Measure the parts; those that are not requested keep their results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="*", choices=PARTS, default=list(PARTS))
    path = RESULTS / "domain_filters.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    found = {name: known[name] for name in PARTS if name in known}
    for name in parser.parse_args().part:
        started = time.process_time()
        found[name] = {**PARTS[name](), "cpu_seconds": round(time.process_time() - started, 1)}
        write("domain_filters", "python benchmarks/domain_filters.py", found)


if __name__ == "__main__":
    main()
