"""Run the stages of a round in order, skipping finished ones and setting aside results of another configuration."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from selfeval.backbone.fingerprint import model_identity
from selfeval.backbone.meters import peak_resident_bytes
from selfeval.backbone.snapshot import commit_of
from selfeval.config import RunConfig, judge_spec
from selfeval.errors import LostWorkError, RunFolderError
from selfeval.judging.kinds import kinds_of_run
from selfeval.judging.sources import prompt_sources, tokenizer_files
from selfeval.judging.templates import template_texts, templates_folder
from selfeval.records import Split
from selfeval.runs.members import member_roles
from selfeval.runs.reader import pairs_of
from selfeval.stages import evaluation, evaluator, pairs, policy, questions, replies, report, verdicts
from selfeval.stages.changes import Loss, agree, changed_contents, differences
from selfeval.stages.context import Context
from selfeval.stages.given import given_key
from selfeval.stages.gold import check_domain, gold_key
from selfeval.stages.prompts import has_lost_chat_template, keep_templates
from selfeval.stages.trackers import check_installed
from selfeval.store import RUN_SCHEMA, fingerprint

__all__ = [
    "STAGES",
    "Stage",
    "agree_to_changes",
    "begin_round",
    "bring_report_up_to_date",
    "has_current_evidence",
    "is_finished",
    "run_stages",
    "set_changed_aside",
    "stage_keys",
]


@dataclass(frozen=True)
class Stage:
    """One stage of the pipeline.

    Attributes:
        run: does the work and returns counts for the manifest.
        sections: configuration sections that its output depends on, in addition to those of the previous stages.
        prompts: kinds of prompts that it reads, in addition to those of the previous stages and of the judges that it asks.
        outputs: files and folders that must exist when it is finished, in addition to its shards.
        roles: returns the names of the roles that it writes, which are outputs too.
        owned: further files of the run folder that it writes.
        trains: whether it trains a role. If one of its files is lost, it restarts from scratch instead of filling the gap.
        gathers: whether it only combines the output of other stages, and is overwritten when that changes.
    """

    name: str
    run: Callable[[Context], dict[str, Any]]
    sections: tuple[str, ...]
    prompts: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    roles: Callable[[RunConfig], tuple[str, ...]] | None = None
    owned: tuple[str, ...] = ()
    trains: bool = False
    gathers: bool = False

    def output_paths(self, root: Path, config: RunConfig) -> list[Path]:
        roles = self.roles(config) if self.roles else ()
        return [*(root / path for path in self.outputs), *(root / "roles" / role for role in roles)]

    def prompts_read(self, config: RunConfig) -> tuple[str, ...]:
        """Return the kinds of prompts that its output depends on, including those of the judge or referee that it asks.

        Policy training depends on the referee only if the held-out judge is enabled.
        """
        judge = config.verdicts.judge
        if self.name == "verdicts":
            return (*self.prompts, *judge_spec("judge", judge).kinds("judge"))
        if self.name == "evaluation" or (self.name == "policy" and config.policy.judge_every is not None):
            return (*self.prompts, *judge_spec("referee", judge).kinds("referee"))
        return self.prompts

    def owned_paths(self, root: Path, config: RunConfig) -> list[Path]:
        return [*self.output_paths(root, config), *(root / path for path in self.owned)]

    def kept_paths(self, root: Path) -> list[Path]:
        """Return outputs that no stage reads but that must be intact: metrics and dropped records."""
        return [root / path for path in self.owned if path.startswith(("dropped/", "metrics/"))]


STAGES: tuple[Stage, ...] = (
    Stage(
        "questions",
        questions.run,
        ("precision", "context", "seed", "rollout_rows", "questions"),
        prompts=("ask",),
        owned=("dropped/questions",),
    ),
    Stage("replies", replies.run, ("replies",), prompts=("reply",), outputs=("workings",)),
    Stage("verdicts", verdicts.run, ("verdicts",), owned=("dropped/verdicts",)),
    Stage("pairs", pairs.run, (), outputs=tuple(pairs_of(split) for split in Split)),
    Stage(
        "evaluator",
        evaluator.run,
        ("lora", "batch_tokens", "evaluator"),
        prompts=("grade",),
        roles=member_roles,
        owned=("checkpoints/evaluator", "metrics/evaluator.jsonl"),
        trains=True,
    ),
    Stage(
        "policy",
        policy.run,
        ("policy",),
        roles=policy.output_roles,
        owned=("checkpoints/policy", "metrics/policy.jsonl", "metrics/watchdogs.jsonl"),
        trains=True,
    ),
    Stage(
        "evaluation",
        evaluation.run,
        ("domain", "gold", "evaluation"),
        outputs=("evaluation/figures.json", f"evaluation/{evaluation.FIRST_PAIRS}"),
        owned=("metrics/evaluation.jsonl",),
    ),
    Stage("report", report.run, ("name",), outputs=("report.json",), owned=("index.html",), gathers=True),
)


def _tokenizer_day(name: str, day: date) -> str | None:
    """Return the date if a chat template of the model may print it, else None."""
    texts = (path.read_text(encoding="utf-8", errors="replace") for path in tokenizer_files(name) if _is_text(path))
    return day.isoformat() if any("strftime_now" in text for text in texts) else None


def _is_text(path: Path) -> bool:
    return path.suffix == ".jinja" or path.name == "tokenizer_config.json" or path.name.startswith("chat_template")


def stage_keys(config: RunConfig, seeds: list[Any], number: int = 1, day: date | None = None) -> dict[str, str]:
    """Compute, for each stage, a fingerprint of everything that its output depends on.

    Args:
        config: configuration of the run.
        seeds: seeds of the run.
        number: number of the round; a later round depends on the previous round's policy. Default: 1.
        day: Optional. Date that templates print. Default: today.
    """
    values, day = _with_contents(config), day or date.today()
    sources = prompt_sources(templates_folder(config.model, config.templates), day, kinds_of_run(config.verdicts))
    # A later round's key contains the key of the previous round's policy, so changes propagate across rounds.
    if number > 1:
        before: Any = ["round", number, stage_keys(config, seeds, number - 1, day)["policy"]]
    else:
        tokenizer = [_tokenizer_day(config.model, day), sources["chat"]]
        before = [model_identity(config.model), tokenizer, [s.question for s in seeds], *given_key(config)]
    keys = {}
    for stage in STAGES:
        sections = {name: values[name] for name in stage.sections}
        prompts = {kind: sources[kind] for kind in stage.prompts_read(config)}
        # Chained: a stage's key changes whenever the key of an earlier stage does.
        before = keys[stage.name] = fingerprint([before, stage.name, sections, prompts])
    return keys


def _with_contents(config: RunConfig) -> dict[str, Any]:
    """Return the configuration with user files identified by content instead of by path."""
    values = config.model_dump(mode="json")
    for section in ("questions", "replies"):
        del values[section]["file"]  # part of the first key
    return {**values, "gold": gold_key(config.gold)}


def agree_to_changes(contexts: Sequence[Context]) -> None:
    """Ask once, for all rounds, whether work of another configuration may be set aside.

    Args:
        contexts: the rounds that have begun, in order.

    Raises:
        RunFolderError: the user did not agree; nothing has been moved.
    """
    losses = [
        _loss(context, stage)
        for context in contexts
        for stage in STAGES
        if _has_work_of_another_key(context, stage) and not stage.gathers
    ]
    agree(contexts[0], losses, [_changes(contexts[0])])
    for context in contexts:
        context.restart = contexts[0].restart


def _has_work_of_another_key(context: Context, stage: Stage) -> bool:
    store = context.store
    changed = store.key(stage.name) != _keys(context)[stage.name]
    return changed and store.has_work(stage.name, stage.owned_paths(store.root, context.config))


def _loss(context: Context, stage: Stage) -> Loss:
    name = f"round {context.round}, {stage.name}" if context.earlier else stage.name
    return Loss(name, context.store.run.get("stages", {}).get(stage.name, {}))


def _changes(context: Context) -> str:
    """Describe how this configuration differs from that of the results."""
    store, sections = context.store, {section for stage in STAGES for section in stage.sections}
    old, new = store.run.get("config") or {}, context.config.model_dump(mode="json")
    found = differences({k: v for k, v in old.items() if k in sections}, {k: v for k, v in new.items() if k in sections})
    found += changed_contents(store.run.get("made_of") or {}, _made_of(context))
    before, now = store.run.get("commit"), commit_of(context.config.model)
    if before and now and before != now:
        found.append(f"commit of {context.config.model}: {before}, now {now}")
    lost = [stage.name for stage in STAGES if store.key(stage.name) is None and store.has_work(stage.name)]
    found += [f"{name}/key.json is missing" for name in lost]
    return f"{store.root} has results of another configuration: {', '.join(found) or 'it cannot be told which'}"


def _made_of(context: Context) -> dict[str, str]:
    """Return fingerprints of the inputs that the keys cover besides the configuration, to report which of them changed."""
    config = context.config
    return {
        "the model's files": fingerprint(model_identity(config.model)),
        "the templates": fingerprint(template_texts(templates_folder(config.model, config.templates))),
        "the file of questions, replies or pairs": fingerprint(given_key(config)),
        "the gold file": gold_key(config.gold),
        "the seeds": fingerprint([seed.question for seed in context.seeds]),
    }


def set_changed_aside(context: Context) -> bool:
    """Set aside results of another configuration, with a note to the user. Return True if there were any."""
    keys, moved = _keys(context), []
    for stage in STAGES:
        if context.store.begin(stage.name, keys[stage.name], stage.owned_paths(context.store.root, context.config)):
            _say(context, stage, "the configuration has changed; the old result was moved to replaced/")
            moved.append(stage)
    return bool(moved)


def _check_finished(context: Context) -> None:
    """Refuse damaged files of finished stages; with `restart`, set a damaged training aside instead."""
    store = context.store
    for stage in STAGES:
        damaged = store.damaged_files(stage.name) if store.has_manifest(stage.name) else []
        if damaged and stage.trains and context.restart:
            _say(context, stage, f"{damaged[0]} is damaged; the stage is trained again, and the rest was moved to replaced/")
            store.set_aside(stage.name, stage.owned_paths(store.root, context.config))
        elif damaged:
            remedy = (
                "train the stage again: give the same command with --restart"
                if stage.trains
                else ("remove it and give the same command again: it is made again")
            )
            raise RunFolderError(
                f"{store.root / damaged[0]} is damaged: its content is not what was written there. Put back a good copy, or "
                f"{remedy}"
            )


def _keys(context: Context) -> dict[str, str]:
    return stage_keys(context.config, context.seeds, context.round, context.day)


def _say(context: Context, stage: Stage, text: str) -> None:
    round_too = f"round {context.round}, " if context.earlier else ""
    context.terminal.note(f"{round_too}{stage.name}: {text}")


def begin_round(context: Context, until: str | None = None) -> None:
    """Make all early checks, write run.json, and set aside results of another configuration.

    Raises:
        RunFolderError: `until` is not a stage.
        ConfigError: the domain or a tracker is not installed.
    """
    names = [stage.name for stage in STAGES]
    if until is not None and until not in names:
        raise RunFolderError(f'there is no stage "{until}"; stages: {", ".join(names)}')
    check_domain(context.config.domain)
    check_installed(context.config.trackers)
    agree_to_changes([context])
    if not context.store.run:
        # A folder without run.json is not a run. Its results may be from other settings, so the archive records none.
        context.store.update_run(schema=RUN_SCHEMA, status="running")
    set_changed_aside(context)  # before run.json is updated, so the archive gets the old configuration
    _begin_run(context)
    _keep_templates(context)


def _begin_run(context: Context) -> None:
    config, store = context.config, context.store
    finished = {stage.name: store.manifest(stage.name)["counts"] for stage in STAGES if store.is_finished(stage.name)}
    rows = {name: {"state": "finished", "seconds": 0.0, "counts": counts} for name, counts in finished.items()}
    context.store.update_run(
        schema=RUN_SCHEMA,
        status="running",
        name=context.name,
        round=context.round,
        seed=config.seed,
        config=config.model_dump(mode="json"),
        made_of=_made_of(context),
        commit=commit_of(config.model),
        versions=report.versions(),
        stages={**rows, **store.run.get("stages", {})},  # restore the rows if run.json was removed
    )
    context.store.write_records("seeds.jsonl", context.seeds)


def _keep_templates(context: Context) -> None:
    """Copy the templates into the run folder, from which they are read from now on.

    Called after results of other templates were set aside.
    """
    if not context.earlier:
        keep_templates(context.config, context.store, context.day)
        if has_lost_chat_template(context.store):
            _ = context.templates  # loads the tokenizer and rewrites the chat template


def run_stages(context: Context, until: str | None = None) -> bool:
    """Run every unfinished stage of a round up to `until` (default: all).

    Returns:
        False if there was nothing left to do.

    Raises:
        RunFolderError: `until` is not a stage.
    """
    begin_round(context, until)
    _check_finished(context)
    keys = _keys(context)
    wanted = STAGES[: [stage.name for stage in STAGES].index(until) + 1] if until else STAGES
    try:
        worked = [_bring_up_to_date(context, stage, keys[stage.name]) for stage in wanted]
    except BaseException:
        context.store.update_run(status="interrupted")
        raise
    finally:
        context.trackers.close()
    context.store.update_run(status="finished" if is_finished(context) else "partial")
    return any(worked)


def is_finished(context: Context) -> bool:
    """Return whether every stage of the round is finished."""
    return all(context.store.is_finished(stage.name) for stage in STAGES)


def _inputs(context: Context, stage: Stage) -> str:
    """Return a fingerprint of the previous stage's output, and so of all stages before it.

    For the first stage, it is the fingerprint of what the round starts from.
    """
    index = STAGES.index(stage)
    if not index:
        return context.earlier[-1].content("policy") if context.earlier else ""
    before = context.store.content(STAGES[index - 1].name)
    # Only the report of round 1 covers several rounds, so it also depends on their evidence.
    if stage.name != "report" or context.earlier or context.config.rounds == 1:
        return before
    return fingerprint([before, context.config.rounds, *(store.content("evaluation") for store in context.later)])


def has_current_evidence(context: Context) -> bool:
    """Return whether every stage up to evaluation is finished and based on the current output of the one before it."""
    stages = [stage for stage in STAGES if not stage.gathers]
    return all(
        context.store.is_finished(stage.name) and context.store.made_from(stage.name) == _inputs(context, stage)
        for stage in stages
    )


def bring_report_up_to_date(context: Context) -> bool:
    """Rewrite the report of round 1 if it does not reflect `context.later`. Return True if it was rewritten."""
    stage = STAGES[-1]
    return _bring_up_to_date(context, stage, _keys(context)[stage.name])


def _bring_up_to_date(context: Context, stage: Stage, key: str) -> bool:
    """Run a stage unless it is finished and based on its current inputs. Return True if it ran."""
    store, inputs = context.store, _inputs(context, stage)
    was_finished = store.has_manifest(stage.name)
    if store.made_from(stage.name) not in (None, inputs):
        if stage.gathers:
            store.reopen(stage.name)
        else:
            _set_aside(context, stage, "the results that it was made from have changed")
    elif store.is_finished(stage.name):
        return False
    elif was_finished and stage.trains:
        # Lost shards can be regenerated one by one, but a partly lost training has to restart from scratch.
        _set_aside(context, stage, f"{store.missing_files(stage.name)[0]} is missing")
    elif was_finished:
        _say(context, stage, "a file of it is missing; it is made again")
        store.reopen(stage.name)
    store.note_inputs(stage.name, inputs)
    try:
        _run_stage(context, stage, key, inputs)
    except LostWorkError as error:
        if not context.restart:
            raise
        context.release()  # its roles are only partly trained
        _set_aside(context, stage, str(error).partition(". ")[0])
        store.note_inputs(stage.name, inputs)
        _run_stage(context, stage, key, inputs)
    return True


def _set_aside(context: Context, stage: Stage, reason: str) -> None:
    """Move the work of a stage to `replaced/` if the user agrees."""
    agree(context, [_loss(context, stage)], [f"{context.store.root}, {stage.name}: {reason}"])
    _say(context, stage, f"{reason}, so it is made again; the old result was moved to replaced/")
    context.store.set_aside(stage.name, stage.owned_paths(context.store.root, context.config))


def _run_stage(context: Context, stage: Stage, key: str, inputs: str) -> None:
    store, started = context.store, time.monotonic()
    try:
        counts = stage.run(context)
    except BaseException:
        store.record_stage(
            stage.name, state="interrupted", seconds=time.monotonic() - started, memory_events=_memory_events(context, stage)
        )
        raise
    seconds = time.monotonic() - started
    store.record_stage(
        stage.name,
        state="finished",
        seconds=seconds,
        counts=counts,
        peak_bytes=peak_resident_bytes(),
        memory_events=_memory_events(context, stage),
    )
    store.finish(stage.name, key, counts, stage.output_paths(store.root, context.config), inputs, stage.kept_paths(store.root))
    shown = ", ".join(f"{name} {value}" for name, value in counts.items())
    _say(context, stage, f"{seconds:.1f} s" + (f"  ({shown})" if shown else ""))


def _memory_events(context: Context, stage: Stage) -> list[dict[str, Any]]:
    """Return the memory events of this stage, including those of earlier, interrupted attempts."""
    earlier: list[dict[str, Any]] = context.store.run.get("stages", {}).get(stage.name, {}).get("memory_events", [])
    return [*earlier, *context.take_memory_events()]
