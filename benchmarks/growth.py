"""Growth of CPU time with questions, reply length, batch, model size and records, as slopes on a log-log scale.

python benchmarks/growth.py [--only sampling scoring records ...] [--rounds 3]

A slope of 1 is linear: twice the work takes twice the time. Sizes take turns in each round, with one thread, and the median of
a size counts. The slope is that of the least-squares line through the logarithms, and `last` the slope between the two largest
sizes, at which fixed costs matter least. The model is the embedded one; for `model size` random Llamas from 1 to 31 million
parameters.

Records: `dedupe` finds near-duplicates among generated questions, of which a tenth are near-duplicates of others; `reading`
reads replies and verdicts from a run folder; `evaluation` computes the figures of verdicts and evaluator; `report` draws the
page with as many steps of metrics.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import linear_regression, median
from typing import Any

import torch
from common import RESULTS, write

Work = Callable[[], object]
TOKENS = {"prompt_tokens": 32, "reply_tokens": 24}


def seconds_of(work: Work) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def growth(name: str, unit: str, works: dict[int, Work], rounds: int, fixed: str) -> dict[str, Any]:
    """Time each size in turns and return the medians with the slopes."""
    for work in list(works.values())[:1]:
        work()
    times: dict[int, list[float]] = {size: [] for size in works}
    for _ in range(rounds):
        for size, work in works.items():
            times[size].append(seconds_of(work))
    medians = {size: median(found) for size, found in times.items()}
    slope = slope_of(medians)
    print(name, {size: round(found, 3) for size, found in medians.items()}, f"slope {slope:.2f}", flush=True)
    return {
        "unit": unit,
        "fixed": fixed,
        "seconds": {str(size): [round(one, 4) for one in found] for size, found in times.items()},
        "slope": round(slope, 3),
        "last": round(slope_of(dict(list(medians.items())[-2:])), 3),
    }


def slope_of(medians: dict[int, float]) -> float:
    """Return the slope of log seconds over log size."""
    return linear_regression([math.log(size) for size in medians], [math.log(found) for found in medians.values()]).slope


# -- the model ----------------------------------------------------------------------------------------------------------


def backbone_of(folder: str | None) -> Any:
    """Return a backbone on one thread, with a random policy and evaluator, whose replies end at their limits."""
    from selfeval.bench.workloads import BenchOptions, add_random_role, bench_config, load_backbone
    from selfeval.training.context import POLICY
    from selfeval.training.evaluator import EVALUATOR

    made = load_backbone(bench_config(BenchOptions(folder, "cpu", "fp32", threads=1)))
    add_random_role(made, POLICY)
    add_random_role(made, EVALUATOR, head=True)
    made.loaded.eos_ids = ()
    return made


def sampling(backbone: Any, requests: int, rows: int = 256, **tokens: int) -> Work:
    from selfeval.bench.rollout import sample_ours
    from selfeval.bench.workloads import replies_to

    sizes = TOKENS | tokens
    replies = replies_to(backbone, requests, 1, sizes["prompt_tokens"], sizes["reply_tokens"], 0)
    return lambda: sample_ours(backbone, replies, rows)


def scoring(backbone: Any, requests: int, reply_tokens: int = TOKENS["reply_tokens"]) -> Work:
    from selfeval.bench.workloads import random_ids
    from selfeval.prompt import Prompt
    from selfeval.training.evaluator import EVALUATOR
    from selfeval.training.scoring import score_replies

    rng = random.Random(0)
    prompts = [Prompt(tuple(random_ids(backbone, TOKENS["prompt_tokens"], rng))) for _ in range(requests)]
    replies = [tuple(random_ids(backbone, reply_tokens, rng)) for _ in range(requests)]
    return lambda: score_replies(backbone, EVALUATOR, prompts, replies, 16384)


def iteration(backbone: Any, prompts: int) -> Work:
    from selfeval.bench.step import StepShape, run_iterations

    shape = StepShape(prompts, 8, TOKENS["prompt_tokens"], TOKENS["reply_tokens"], iterations=1)
    return lambda: run_iterations(backbone, shape, "ppo")


def random_llama(folder: Path, width: int) -> tuple[int, str]:
    """Write a random Llama and return its number of parameters without embeddings, which are a lookup, and its folder."""
    from step import make_model
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8000,
        hidden_size=width,
        intermediate_size=11 * width // 4,
        num_hidden_layers=max(2, width // 64),
        num_attention_heads=width // 64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(make_model("embedded", folder)).save_pretrained(folder)
    # The tied embedding counts once: it is also the output layer.
    return model.num_parameters(), str(folder)


# -- records ------------------------------------------------------------------------------------------------------------


def questions(count: int) -> Iterator[str]:
    """Questions of 8 to 16 words with Zipf's frequencies, of which a tenth differs from an earlier one in its last word."""
    rng = random.Random(0)
    words = [f"{a}{b}{c}" for a in "bcdfgklmnprstvz" for b in "aeiou" for c in ("n", "r", "st", "l", "ko", "ri", "ta", "mo")]
    vocabulary = [first + second for first in words for second in words][:50_000]
    rng.shuffle(vocabulary)
    weights = [1 / rank for rank in range(1, len(vocabulary) + 1)]
    cumulative = [0.0]
    for weight in weights:
        cumulative.append(cumulative[-1] + weight)
    made: list[list[str]] = []
    for number in range(count):
        if made and number % 10 == 0:
            chosen = [*rng.choice(made)[:-1], rng.choice(vocabulary)]
        else:
            chosen = rng.choices(vocabulary, cum_weights=cumulative[1:], k=rng.randint(8, 16))
        made.append(chosen)
        yield " ".join(chosen) + "?"


def dedupe(count: int) -> Work:
    from selfeval.quality.dedupe import NearDuplicates

    texts = list(questions(count))

    def find_all() -> None:
        known = NearDuplicates(0.7)
        for number, text in enumerate(texts):
            if known.find(text) is None:
                known.add(str(number), text)

    return find_all


def judged_pairs(count: int) -> list[Any]:
    """Return judged pairs with gold: half of them kept, eight to a question, with replies of 20 tokens."""
    from selfeval.evaluation.evaluator import JudgedPair
    from selfeval.records import PairwiseEvidence, Reply, Split, Verdict, VerdictState

    rng = random.Random(1)
    found = []
    for number in range(count):
        question, probability = f"q{number // 8}", rng.random()
        names = [f"{question}-r{2 * (number % 8) + k}" for k in range(2)]
        texts = ["word " * rng.randint(5, 30) for _ in names]
        replies = tuple(
            Reply(name, question, text, (7,) * 20, "sample", 1.0, 1.0, -9.0, True)
            for name, text in zip(names, texts, strict=True)
        )
        state = VerdictState.KEPT if abs(probability - 0.5) > 0.25 else VerdictState.UNSURE
        evidence = PairwiseEvidence(probability, probability, (0.0, 0.0), ("Verdict: A", "Verdict: B"))
        verdict = Verdict(question, Split.TEST, replies[0].id, replies[1].id, state, probability, 0.0, evidence)
        right = (rng.random() < probability, rng.random() > probability)
        found.append(JudgedPair(verdict, replies, rng.gauss(probability - 0.5, 0.3), 0.0, right))
    return found


def evaluation(count: int) -> Work:
    from selfeval.evaluation.evaluator import EvaluatorFacts, measure_evaluator, measure_first_pairs, rights_of
    from selfeval.evaluation.verdicts import measure_verdicts

    pairs = judged_pairs(count)

    def measure() -> None:
        first = measure_first_pairs(rights_of(pairs), None, has_gold=True)
        measure_evaluator(pairs, EvaluatorFacts(1.0, 100, 100, 1), first, None, has_gold=True)
        measure_verdicts([pair.verdict for pair in pairs], None, from_file=False)

    return measure


def reading(count: int, home: Path) -> Work:
    """A run folder with this many replies and half as many verdicts, which the work reads."""
    from selfeval.runs.reader import RunReader
    from selfeval.stages.recipes import load_config
    from selfeval.store import RunStore

    pairs = judged_pairs(count // 2)
    store = RunStore(home)
    store.update_run(status="finished", config=load_config().model_dump(mode="json"))
    records = {"replies": [reply for pair in pairs for reply in pair.replies], "verdicts": [pair.verdict for pair in pairs]}
    for stage, rows in records.items():
        store.begin(stage, "key")
        for index, start in enumerate(range(0, len(rows), 500)):
            store.write_shard(stage, index, rows[start : start + 500])
        store.finish(stage, "key", {})
    store.close()

    def read() -> None:
        reader = RunReader(home)
        assert len(reader.records("replies")) == len(records["replies"])
        assert len(reader.records("verdicts")) == len(records["verdicts"])

    return read


def report(count: int, run: Path) -> Work:
    """The page of a finished run with this many steps of evaluator and policy metrics."""
    from selfeval.report.page import draw_page

    home = Path(tempfile.mkdtemp(dir=run.parent))
    (home / "report.json").write_bytes((run / "report.json").read_bytes())
    (home / "metrics").mkdir()
    for path in (run / "metrics").glob("*.jsonl"):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        long = [{**rows[min(step, len(rows) - 1)], "step": step + 1} for step in range(count)] if rows else []
        (home / "metrics" / path.name).write_text("".join(json.dumps(row) + "\n" for row in long), encoding="utf-8")
    return lambda: draw_page(home)


# -- the table ----------------------------------------------------------------------------------------------------------


def of_model(rounds: int, only: Sequence[str], home: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Measure the work of the model."""
    backbone = backbone_of(None)
    at_once = "256 rows at a time, prompts of 32 tokens"
    measured: dict[str, Callable[[], tuple[str, dict[int, Work], str]]] = {
        "sampling: questions": lambda: (
            "questions", {n: sampling(backbone, n) for n in (64, 128, 256, 512, 1024)}, f"{at_once}, replies of 24"),
        "sampling: reply length": lambda: (
            "tokens", {n: sampling(backbone, 64, reply_tokens=n) for n in (16, 32, 64, 128)}, "64 replies"),
        "sampling: batch": lambda: (
            "rows", {n: sampling(backbone, n, rows=n) for n in (8, 16, 32, 64, 128, 256)}, "one batch, replies of 24 tokens"),
        "scoring: pairs": lambda: (
            "replies", {n: scoring(backbone, n) for n in (128, 256, 512, 1024)}, "prompts of 32, replies of 24 tokens"),
        "scoring: reply length": lambda: (
            "tokens", {n: scoring(backbone, 128, n) for n in (16, 32, 64, 128)}, "128 replies to prompts of 32 tokens"),
        "PPO iteration: replies": lambda: (
            "replies", {n: iteration(backbone, n) for n in (32, 64, 128, 256)}, "8 per question, one minibatch, two epochs"),
    }  # fmt: skip
    for name, make in measured.items():
        if not only or name.split(":")[0] in only:
            unit, works, fixed = make()
            yield name, growth(name, unit, works, rounds, fixed)
    if not only or "model" in only:
        sized = dict(random_llama(home / str(width), width) for width in (128, 192, 256, 384, 512))
        backbones = {size: backbone_of(folder) for size, folder in sized.items()}
        works = {size: sampling(made, 32) for size, made in backbones.items()}
        yield "sampling: model size", growth("model", "parameters", works, rounds, "32 replies of 24 tokens")
        works = {size: scoring(made, 64) for size, made in backbones.items()}
        yield "scoring: model size", growth("model", "parameters", works, rounds, "64 replies of 24 tokens")


def of_records(rounds: int, home: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Measure the work on records, up to 100,000 of them."""
    from common import selfeval

    sizes = (1_000, 10_000, 100_000)
    run = home / "run"
    small = ("questions.train=16", "questions.test=16", "policy.gate=off", "policy.iterations=2")
    selfeval("run", "--output", str(run), "--quiet", *(part for setting in small for part in ("--set", setting)))
    kinds: dict[str, tuple[str, Callable[[int], Work]]] = {
        "dedupe": ("questions", dedupe),
        "reading": ("replies, and half as many verdicts", lambda n: reading(n, home / f"records-{n}")),
        "evaluation": ("pairs", evaluation),
        "report": ("steps of metrics", lambda n: report(n, run)),
    }
    for name, (unit, make) in kinds.items():
        yield name, growth(name, unit, {size: make(size) for size in sizes}, rounds, "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], choices=["sampling", "scoring", "PPO iteration", "model", "records"])
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    known = RESULTS / "growth.json"
    figures: dict[str, Any] = json.loads(known.read_text(encoding="utf-8"))["growth"] if known.is_file() else {}
    with tempfile.TemporaryDirectory() as home:
        if asked.only != ["records"]:
            figures |= dict(of_model(asked.rounds, asked.only, Path(home)))
        if not asked.only or "records" in asked.only:
            figures |= dict(of_records(asked.rounds, Path(home)))
    write("growth", f"python benchmarks/growth.py --rounds {asked.rounds}", {"growth": figures})


if __name__ == "__main__":
    main()
