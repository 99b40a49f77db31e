"""Check whether a model can judge a domain: load it, sample, measure, decide, and estimate the cost of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any

from selfeval.backbone.roles import Backbone
from selfeval.backbone.snapshot import ensure_snapshot
from selfeval.config import RunConfig
from selfeval.errors import ConfigError
from selfeval.judging.templates import Templates
from selfeval.planner.machine import Machine
from selfeval.planner.memory_plan import Plan
from selfeval.planner.model_configs import model_facts
from selfeval.planner.planning import make_plan
from selfeval.planner.stage_times import RunTime, time_of_run
from selfeval.stages.given import read_given
from selfeval.stages.gold import ask_ahead, gold_file, load_gold
from selfeval.stages.preflight import check_input
from selfeval.stages.seeds import asks_seeds, seeds_of
from selfeval.stages.shards import ModelHandle
from selfeval.suitability.candidates import Candidate, candidates_of, load_templates
from selfeval.suitability.measures import Measures, measure
from selfeval.suitability.recommendation import Decision, decide
from selfeval.suitability.sampling import Sample, grow

__all__ = ["Check", "check_model"]

_FOR_THE_COST = 0.2
"""Share of the time that is kept for the estimate of the cost of a run."""


@dataclass(frozen=True)
class Check:
    """The result of a check.

    Attributes:
        model: model folder or hub id.
        minutes: time budget.
        seconds: time that it took.
        interrupted: whether the user ended it early.
        gold: name of the gold; None without gold.
        sizes: numbers of samples of questions, replies and pairs.
        measures: the figures.
        decision: the recommendation.
        memory: estimated memory of the recommended run; None without a recommendation, or if the user ended the check earlier.
        time: estimated time of the recommended run; None as `memory`.
        notes: judges that were not checked.
    """

    model: str
    minutes: float
    seconds: float
    interrupted: bool
    gold: str | None
    sizes: dict[str, int]
    measures: Measures
    decision: Decision
    memory: Plan | None
    time: RunTime | None
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "minutes": self.minutes,
            "seconds": round(self.seconds, 1),
            "interrupted": self.interrupted,
            "gold": self.gold,
            "sizes": self.sizes,
            **self.decision.as_json(),
            "measures": self.measures.as_json(),
            "memory": None if self.memory is None else self.memory.as_json(),
            "time": None if self.time is None else self.time.as_json(),
            "notes": list(self.notes),
        }


def check_model(
    config: RunConfig,
    minutes: float,
    *,
    report_progress: Callable[[float, str], None] = lambda seconds, text: None,
    trust_remote_code: bool = False,
    allow_code_execution: bool = False,
) -> Check:
    """Check whether a model can judge a domain.

    Args:
        config: configuration of the run.
        minutes: time budget. Loading the model, the first verdicts and the estimate of the cost are not shortened.
        report_progress: Optional. Called with the seconds that are spent and the current step.
        trust_remote_code: run code that comes with the model. Default: False.
        allow_code_execution: run code in replies with the unit tests of a gold file. Default: False.

    Raises:
        InputError: an input cannot be used.
        ConfigError: the configuration has a file of replies or pairs, which leaves nothing to check.
    """
    start = monotonic()

    def say(text: str) -> None:
        report_progress(monotonic() - start, text)

    _refuse_labels(config)
    say(f"checking {config.model}")
    check_input(config, trust_remote_code=trust_remote_code, allow_code_execution=allow_code_execution)
    if not Path(config.model).is_dir():
        say(f"downloading missing files of {config.model}")
        ensure_snapshot(config.model)
    say(f"loading {config.model}")
    backbone = Backbone.load(config.model, config.backbone, trust_remote_code=trust_remote_code)
    backbone.roles.check_targets()
    templates, candidates, notes = load_templates(candidates_of(config), backbone.loaded.tokenizer)
    with TemporaryDirectory() as folder:  # answers of a server, if the configuration names one as the judge
        model = ModelHandle(backbone, templates, answers=Path(folder))
        sample = _sample(config, model, candidates, minutes * 60 - (monotonic() - start), say)
    measures, gold = _measure(config, sample, candidates, allow_code_execution)
    decision = decide(measures, config)
    memory, time = None, None
    if decision.judge is not None and not sample.interrupted:
        chosen = next(candidate.config for candidate in candidates if candidate.name == decision.judge)
        memory, time = _cost(chosen, backbone, templates, say)
    return Check(
        config.model,
        minutes,
        monotonic() - start,
        sample.interrupted,
        gold,
        {"samples": sample.samples, "replies": len(sample.replies), "pairs": len(sample.pairs)},
        measures,
        decision,
        memory,
        time,
        tuple(notes),
    )


def _refuse_labels(config: RunConfig) -> None:
    for name, file in (("replies.file", config.replies.file), ("pairs.file", config.pairs.file)):
        if file:
            raise ConfigError(
                f"{name} = {file}: `selfeval check` judges replies that the model writes; remove {name}. A run with such a "
                "file probes its judge before it judges all pairs"
            )


def _sample(
    config: RunConfig, model: ModelHandle, candidates: Sequence[Candidate], seconds: float, say: Callable[[str], None]
) -> Sample:
    given = read_given(config)
    # Without their passages, such seeds would be other questions.
    seeds = [] if asks_seeds(config) else [seed.question for seed in seeds_of(config, given)]
    say("sampling")
    return grow(config, model, candidates, seeds, given, seconds * (1 - _FOR_THE_COST), lambda sample: say(sample.figures))


def _measure(
    config: RunConfig, sample: Sample, candidates: Sequence[Candidate], allow_code_execution: bool
) -> tuple[Measures, str | None]:
    gold = load_gold(config, allow_code_execution=allow_code_execution)
    texts = {question.id: question.text for question in sample.asked}
    ask_ahead(gold, [(texts[reply.question_id], reply.text) for reply in sample.replies])
    # A domain knows every question in it; a file of answers knows only its own.
    knows_domain = gold is not None and not gold_file(config)
    found = measure(sample, candidates, None if gold is None else gold.is_right, knows_domain=knows_domain)
    return found, None if gold is None else gold.name


def _cost(
    config: RunConfig, backbone: Backbone, templates: Templates, say: Callable[[str], None]
) -> tuple[Plan | None, RunTime | None]:
    """Estimate memory and time of a run, as `selfeval plan --time` does; Ctrl-C skips what is left."""
    memory = None
    try:
        say("estimating the memory of a run")
        memory = make_plan(config, model_facts(config.model), Machine.of(config.backbone))
        say("estimating the time of a run")
        return memory, time_of_run(backbone, templates, config)
    except KeyboardInterrupt:
        return memory, None
