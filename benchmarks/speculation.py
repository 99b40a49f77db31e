"""Speculation by lookup: what a pass over drafts costs, how many drafted tokens are correct, and the time of one client.

python benchmarks/speculation.py [--models embedded llama-30m smollm2-135m] [--rounds 3]

Costs: a decoding step over 2, 3, 5 and 9 tokens of each row against one over a single token, at several batch sizes, on one
thread. Correct drafts: counted offline, in the replies, reference answers and verdicts that a small run of the embedded model
samples. One client: greedy requests one after the other in a `LiveBatch`, with `speculation` off and auto in turns; the tokens
of both are compared. SmolLM2 replies to prompts that ask for copies, and to others.

Models that are not asked for keep their earlier figures. SmolLM2-135M is left out if benchmarks/real_model.py has not
converted it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from common import RESULTS, write
from real_model import CACHE
from step import make_model

import selfeval
from selfeval.backbone.adapters import BASE
from selfeval.backbone.families.cache import drop_last, preallocated_cache, state_arguments
from selfeval.backbone.roles import Backbone
from selfeval.bench.workloads import BenchOptions, add_random_role, bench_config, load_backbone
from selfeval.prompt import Prompt
from selfeval.rollout.drafts import Drafts, Speculation
from selfeval.rollout.live import LiveBatch
from selfeval.rollout.requests import Request
from selfeval.rollout.rows import Row
from selfeval.training.context import POLICY

ROWS = {"embedded": (1, 8, 64, 256), "llama-30m": (1, 8, 64), "smollm2-135m": (1, 8)}
WIDTHS, PROMPT, REPLY = (1, 2, 3, 5, 9), 64, 64
COPIES = (
    "Repeat this sentence word for word: The quick brown fox jumps over the lazy dog near the quiet river bank.",
    "Correct the spelling: I recieved teh parcel yesterday and it was realy heavy, so my brother helped me carry it inside.",
    "Rewrite the following text in the past tense: Anna walks to the market every Saturday. She buys apples, bread and cheese. "
    "Then she walks home and cooks soup for her family.",
    "Summarize: The city council met on Monday to discuss the new bridge over the river. The bridge will cost four million "
    "euros and will open in two years. Residents of the old town fear more traffic.",
    "def add(a, b):\n    return a + b\n\ndef subtract(a, b):\n    return a - b\n\nAdd a docstring to each of these functions.",
)
OTHERS = ("What is the capital of France?", "Write a short poem about the sea.", "Give me three tips for a job interview.")
SETTINGS = (Speculation.OFF, Speculation.AUTO)


# -- costs --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def costs(backbone: Backbone, rows: int, rounds: int) -> dict[str, Any]:
    """Return the CPU milliseconds of a step over one token per row, and the ratios of steps over more to it."""
    generator = torch.Generator().manual_seed(0)
    size = backbone.model.config.vocab_size
    with backbone.acting_as(POLICY):
        step = backbone.decode_step()
        assert step is not None, "`measured` leaves out models without"
        cache = preallocated_cache(backbone.model.config, max(WIDTHS))
        ids = torch.randint(5, size, (rows, PROMPT), generator=generator)
        arguments = state_arguments(backbone.loaded, cache, torch.ones_like(ids), PROMPT)
        backbone.model(ids, use_cache=True, logits_to_keep=1, **arguments)
        seconds: dict[int, list[float]] = defaultdict(list)
        for _ in range(rounds):
            for width in WIDTHS:
                new = torch.randint(5, size, (rows, width), generator=generator)
                attention = torch.ones(rows, PROMPT + width, dtype=torch.long)
                started = time.process_time()
                step.logits(new, attention, cache).log_softmax(-1)
                seconds[width].append(time.process_time() - started)
                drop_last(cache, width)
    plain = median(seconds[1])
    ratios = {str(width): round(median(a / b for a, b in zip(seconds[width], seconds[1], strict=True)), 2) for width in WIDTHS}
    return {"rows": rows, "ms": round(1000 * plain, 2), "ratios": ratios}


# -- correct drafts, offline --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reply:
    """Tokens of a reply and of its prompt."""

    prompt: tuple[int, ...]
    ids: tuple[int, ...]


def correct_drafts(replies: Iterable[Reply], *, together: bool) -> dict[str, Any]:
    """Count what drafts would give in the replies, one after the other.

    Args:
        replies: in the order in which they are sampled.
        together: whether earlier replies to the same prompt are looked up as well.
    """
    earlier: dict[tuple[int, ...], list[tuple[int, ...]]] = defaultdict(list)
    counts = dict.fromkeys(("replies", "tokens", "passes", "drafts", "drafted", "correct"), 0)
    for reply in replies:
        drafts = Drafts(reply.prompt, earlier[reply.prompt][-4:] if together else ())
        earlier[reply.prompt].append(reply.ids)
        place = 0
        while place < len(reply.ids):
            draft = drafts.next(reply.ids[:place], len(reply.ids) - place)
            rest = reply.ids[place : place + len(draft)]
            same = next((i for i, (a, b) in enumerate(zip(draft, rest, strict=True)) if a != b), len(draft))
            correct = min(same, len(reply.ids) - place)
            counts["drafts"] += bool(draft)
            counts["drafted"] += len(draft)
            counts["correct"] += correct
            counts["passes"] += 1
            place += correct + 1
        counts["replies"] += 1
        counts["tokens"] += len(reply.ids)
    return counts


@contextmanager
def recorded() -> Iterator[list[tuple[float, Reply]]]:
    """Yield the temperatures and replies of all rows that end inside the block."""
    found: list[tuple[float, Reply]] = []
    end = Row.end

    def ended(row: Row, *, finished: bool) -> None:
        end(row, finished=finished)
        found.append((row.request.temperature, Reply(row.request.prompt.ids, tuple(row.ids))))

    with patch.object(Row, "end", ended):
        yield found


def of_a_run() -> dict[str, list[Reply]]:
    """Return what the stages of a small run of the embedded model sample."""
    sets: dict[str, list[Reply]] = {}
    with tempfile.TemporaryDirectory() as home:
        config = selfeval.load_config(questions={"train": 32, "test": 24}, replies={"per_question": 8})
        for stage, names in (
            ("questions", ("questions", "")),
            ("replies", ("replies, 8 per question", "reference answers, greedy")),
            ("verdicts", ("", "verdicts with reasoning, greedy")),
        ):
            with recorded() as found:
                selfeval.run(config, output=Path(home) / "run", until=stage, force=True, progress=False)
            for name, greedy in zip(names, (False, True), strict=True):
                if name:
                    sets[name] = [reply for temperature, reply in found if (temperature == 0) == greedy]
    return sets


def chat_prompts(backbone: Backbone, texts: Sequence[str]) -> list[Prompt]:
    tokenizer = backbone.loaded.tokenizer
    chats = [[{"role": "user", "content": text}] for text in texts]
    return [Prompt(tuple(tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=False))) for c in chats]


# -- one client ---------------------------------------------------------------------------------------------------------


def one_client(backbone: Backbone, prompts: Sequence[Prompt], rounds: int) -> dict[str, Any]:
    """Return the CPU seconds of greedy replies, one after the other, by setting, and whether all tokens are equal."""
    seconds: dict[str, list[float]] = defaultdict(list)
    replies, drafts = {}, {}
    for _ in range(rounds):
        for setting in SETTINGS:
            batch = LiveBatch(backbone, BASE, places=1, max_tokens=512, speculation=setting)
            started = time.process_time()
            tickets = []
            for prompt in prompts:
                tickets.append(batch.add(Request(prompt, 0.0), seed=0, limit=REPLY))
                while batch.step():
                    pass
            seconds[setting].append(time.process_time() - started)
            replies[setting] = [ticket.rollout.ids for ticket in tickets if ticket.rollout]
            drafts[setting] = {"read": batch.drafts.read, "accepted": batch.drafts.accepted}
    off = seconds[Speculation.OFF]
    return {
        "tokens": sum(map(len, replies[Speculation.OFF])),
        "equal": all(found == replies[Speculation.OFF] for found in replies.values()),
        "seconds": {name: round(median(times), 3) for name, times in seconds.items()},
        "off_over_auto": round(median(a / b for a, b in zip(off, seconds[Speculation.AUTO], strict=True)), 2),
        "drafts": drafts[Speculation.AUTO],
    }


# -- all models ---------------------------------------------------------------------------------------------------------


def measured(model: str, rounds: int) -> dict[str, Any]:
    """Return the figures of a model."""
    with tempfile.TemporaryDirectory() as home:
        folder = CACHE if model == "smollm2-135m" else make_model(model, Path(home) / "model")
        config = bench_config(BenchOptions(str(folder), "cpu", "fp32", threads=1, rounds=rounds))
        backbone = load_backbone(config, trust_remote_code=False)
        add_random_role(backbone, POLICY)
        # Without a step for several tokens, the model's own pass reads drafts, and the time of one client shows the cost.
        sizes = ROWS[model] if backbone.decode_step() is not None else ()
        found: dict[str, Any] = {"rounds": rounds, "costs": [costs(backbone, rows, 2 * rounds + 1) for rows in sizes]}
        print(model, found["costs"], flush=True)
        clients: dict[str, Sequence[Prompt]] = {}
        sets: dict[str, list[Reply]] = {}
        if model == "embedded":
            sets = of_a_run()
            clients["verdicts with reasoning"] = [Prompt(r.prompt) for r in sets["verdicts with reasoning, greedy"][:24]]
            clients["questions"] = [Prompt(r.prompt) for r in sets["reference answers, greedy"][:24]]
        elif model == "smollm2-135m":
            clients["prompts to copy from"] = chat_prompts(backbone, COPIES)
            clients["other prompts"] = chat_prompts(backbone, OTHERS)
        found["drafts"] = {
            name: {"own": correct_drafts(rows, together=False), "together": correct_drafts(rows, together=True)}
            for name, rows in sets.items()
        }
        print(model, found["drafts"], flush=True)
        found["one_client"] = {name: one_client(backbone, prompts, rounds) for name, prompts in clients.items()}
        print(model, found["one_client"], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    known = RESULTS / "speculation.json"
    before = json.loads(known.read_text(encoding="utf-8"))["models"] if known.is_file() else {}
    for model in asked.models:
        if model == "smollm2-135m" and not (CACHE / "config.json").is_file():
            print(f"speculation.py: {model} is left out: {CACHE} does not exist; benchmarks/real_model.py creates it")
            continue
        before[model] = measured(model, asked.rounds)
        models = {name: before[name] for name in ROWS if name in before}
        write("speculation", "python benchmarks/speculation.py", {"models": models})


if __name__ == "__main__":
    main()
