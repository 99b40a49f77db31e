"""report: combine figures, counts, times and the resolved configuration into report.json, and draw the page."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any

from selfeval import __version__, records
from selfeval.backbone.meters import peak_resident_bytes
from selfeval.config import JudgeRole
from selfeval.judging.server.cache import AnswerCache
from selfeval.judging.server.spending import spending_of
from selfeval.judging.templates import template_texts
from selfeval.records import Pair, Question, Reply, Split
from selfeval.report.labels import has_other_gold, with_labels
from selfeval.report.page import draw_page
from selfeval.report.reading import parse_part
from selfeval.report.schema import (
    SCHEMA,
    Data,
    Drop,
    Dropped,
    Evaluation,
    Memory,
    MemoryEvent,
    Report,
    Round,
    RoundEvaluator,
    RoundPolicy,
    Server,
    Time,
)
from selfeval.runs.label_report import labels_of_run, save_threshold
from selfeval.runs.reader import pairs_of
from selfeval.runs.templates import TEMPLATES
from selfeval.stages.context import Context
from selfeval.store import RunStore, open_file

__all__ = [
    "EXAMPLES_PER_REASON",
    "build_report",
    "run",
    "versions",
]

EXAMPLES_PER_REASON = 2
_LIBRARIES = ("torch", "transformers", "peft", "tokenizers", "numpy")


def _dropped(context: Context) -> Dropped:
    drops = {stage: context.store.read_dropped(stage) for stage in ("questions", "replies", "verdicts")}
    counts = {stage: dict(sorted(Counter(drop.reason for drop in found).items())) for stage, found in drops.items()}
    examples = tuple(example for stage, found in drops.items() for example in _examples(stage, found))
    return Dropped(**counts, examples=examples)


def _examples(stage: str, drops: Sequence[records.Drop]) -> Iterator[Drop]:
    """Yield the first few drops of each reason."""
    shown: Counter[str] = Counter()
    for drop in drops:
        shown[drop.reason] += 1
        if shown[drop.reason] <= EXAMPLES_PER_REASON:
            yield Drop(stage=stage, reason=drop.reason, text=drop.text)


def _data(context: Context) -> Data:
    questions = context.store.read("questions", Question)
    return Data(
        seeds=len(context.seeds),
        questions=sum(q.split == Split.TRAIN for q in questions),
        questions_test=sum(q.split == Split.TEST for q in questions),
        replies=len(context.store.read("replies", Reply)),
        pairs_train=len(context.store.read(pairs_of(Split.TRAIN), Pair)),
        pairs_held_out=len(context.store.read(pairs_of(Split.TEST), Pair)),
    )


def _evaluation(store: RunStore) -> Evaluation:
    """Read the evidence of a round."""
    path = store.folder("evaluation") / "figures.json"
    with open_file(path) as file:
        return parse_part(Evaluation, file.read(), str(path))


def _rounds(stores: Sequence[RunStore]) -> tuple[Round, ...]:
    """Return one row per round: its evaluator, and its policy compared with the previous one."""
    return tuple(_round(number, store, stores[0]) for number, store in enumerate(stores, start=1))


def _round(number: int, store: RunStore, first: RunStore) -> Round:
    figures = _evaluation(store)
    evaluator, policy = figures.evaluator, figures.policy
    return Round(
        round=number,
        folder=str(store.root.relative_to(first.root)),
        evaluator=RoundEvaluator(
            accuracy_gold=evaluator.accuracy_gold,
            accuracy_judge=evaluator.accuracy_judge,
            accuracy_gold_first_pairs=evaluator.first_pairs.accuracy_gold,
            accuracy_judge_first_pairs=evaluator.first_pairs.accuracy_judge,
            gain=evaluator.first_pairs.gain,
            comparison=evaluator.first_pairs.comparison,
            pairs_trained=evaluator.pairs_trained,
        ),
        policy=RoundPolicy(**{name: getattr(policy, name) for name in RoundPolicy.model_fields}),
    )


def _prompts(context: Context) -> dict[str, str]:
    """Return the prompt templates of the run by file name; the folder of round 1 holds them for all rounds."""
    folder = context.first.root / TEMPLATES
    return template_texts(folder) if folder.is_dir() else {}


def versions() -> dict[str, str]:
    """Return the versions of this package, of Python, and of the libraries that affect the figures."""
    libraries = {name: version(name) for name in _LIBRARIES}
    return {"selfeval": __version__, "python": platform.python_version(), **libraries}


def build_report(context: Context) -> Report:
    """Combine the figures, counts, times and the resolved configuration."""
    figures = _evaluation(context.store)
    report = Report(
        schema=SCHEMA,
        name=context.name,
        seed=context.config.seed,
        model=figures.model,
        data=_data(context),
        evaluator=figures.evaluator,
        verdicts=figures.verdicts,
        policy=figures.policy,
        replies=figures.replies,
        steps=figures.steps,
        domain_map=figures.domain_map,
        rounds=_rounds([context.store, *context.later]) if context.round == 1 < context.config.rounds else None,
        dropped=_dropped(context),
        samples=figures.samples,
        prompts=_prompts(context),
        time=_time(context, figures),
        memory=_memory(context, figures),
        servers=_servers(context),
        versions=versions(),
        config=context.config.model_dump(mode="json"),
    )
    return with_labels(report, labels_of_run(context.store.root, has_gold=has_other_gold(report)))


def _servers(context: Context) -> tuple[Server, ...] | None:
    """Return the cost of the answers of each server; None if the model of the run has all roles."""
    roles: dict[str, JudgeRole] = {"verdicts.endpoint": "judge", "evaluation.referee": "referee"}
    found = []
    for section, settings in context.config.servers.items():
        spent = spending_of(AnswerCache(context.answers, roles[section]))
        found.append(
            Server(
                role=roles[section],
                url=settings.url,
                model=settings.model,
                answers=spent.answers,
                tokens_read=spent.read,
                tokens_written=spent.written,
                cost=spent.cost(settings),
            )
        )
    return tuple(found) or None


def _time(context: Context, figures: Evaluation) -> Time:
    stages = context.store.run.get("stages", {})
    # The report's own time is unknown while it is being written.
    seconds = {name: row.get("seconds", 0.0) for name, row in stages.items() if name != "report"}
    return Time(stages=seconds, per_verdict=figures.seconds_per_verdict, total=round(sum(seconds.values()), 2))


def _memory(context: Context, figures: Evaluation) -> Memory:
    stages = context.store.run.get("stages", {})
    return Memory(
        base_bytes=figures.memory.base_bytes,
        adapter_bytes=figures.memory.adapter_bytes,
        weight_copies=figures.memory.weight_copies,
        shared_prompts=figures.memory.shared_prompts,
        # Every stage recorded its peak when it finished; this process may have a higher one by now.
        peak_bytes=max([peak_resident_bytes(), *(row.get("peak_bytes", 0) for row in stages.values())]),
        events=tuple(
            MemoryEvent(stage=name, **event) for name, row in stages.items() for event in row.get("memory_events", [])
        ),
    )


def run(context: Context) -> dict[str, Any]:
    """Write report.json and index.html."""
    save_threshold(context.store.root)
    context.store.write_json(context.store.root / "report.json", build_report(context).as_json())
    # Drawn from report.json, never from the objects in memory: `selfeval report` draws the same page later.
    draw_page(context.store.root)
    return {}
