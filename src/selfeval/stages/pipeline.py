"""Run the stages of a round in order, each according to its state: fresh, missing, changed or damaged."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch

from selfeval.backbone.load import pick_device
from selfeval.backbone.snapshot import commit_of
from selfeval.backbone.threads import cpu_threads, is_set_by_user, pick_threads, usable_cores
from selfeval.errors import InputError, LostWorkError, RunFolderError
from selfeval.stages import report
from selfeval.stages.changes import agree, loss_of, what_changed
from selfeval.stages.context import Context
from selfeval.stages.gold import check_domain
from selfeval.stages.graph import STAGES, Stage, input_fingerprints, ledger_of, with_labels
from selfeval.stages.prompts import has_lost_chat_template, keep_templates
from selfeval.stages.trackers import check_installed
from selfeval.store import RUN_SCHEMA, Changed, Damaged, Expected, Fresh, Ledger, Missing, RunStore, State

__all__ = [
    "bring_report_up_to_date",
    "has_current_evidence",
    "is_finished",
    "note_interruption",
    "run_stages",
    "set_changed_aside",
    "start_round",
]


def run_stages(context: Context, until: str | None = None) -> bool:
    """Run every unfinished stage of a round up to `until` (default: all).

    Returns:
        False if there was nothing left to do.

    Raises:
        RunFolderError: `until` is not a stage, or a file of a finished stage is damaged.
        ConfigError: the domain or a tracker is not installed.
    """
    start_round(context, until)
    # All stages first: a damaged file of the last one must not be reported after hours of work.
    _act_on_damage(context)
    stages = _stages(context)
    wanted = stages[: [stage.name for stage in stages].index(until) + 1] if until else stages
    ledger = ledger_of(context)
    try:
        # A list, because `any` over a generator would stop at the first stage that had work to do.
        worked = [_bring_up_to_date(context, stage, ledger) for stage in wanted]
    except BaseException:
        note_interruption(context.store)
        raise
    finally:
        context.trackers.close()
    context.store.update_run(status="finished" if is_finished(context) else "partial")
    return any(worked)


def note_interruption(store: RunStore) -> None:
    """Set the status of the run to interrupted, if run.json can be written.

    On a full disk it cannot. The error that ended the run must still reach the user, because it names what to change.
    """
    with suppress(InputError):
        store.update_run(status="interrupted")


def bring_report_up_to_date(context: Context) -> bool:
    """Rewrite the report of round 1 if it does not reflect `context.later`. Return True if it was rewritten."""
    return _bring_up_to_date(context, STAGES[-1], ledger_of(context))


def is_finished(context: Context) -> bool:
    """Return whether every stage of the round is finished and up to date."""
    ledger = ledger_of(context)
    return all(isinstance(ledger.state(stage.name), Fresh) for stage in _stages(context))


def has_current_evidence(context: Context) -> bool:
    """Return whether every stage up to evaluation is finished and up to date.

    Damage is not considered here: it is refused when the round is run.
    """
    ledger = ledger_of(context)
    # The report is left out: that of round 1 is written from the rounds for which this returns True.
    return all(isinstance(ledger.state(stage.name), Fresh | Damaged) for stage in _stages(context) if not stage.gathers)


def _stages(context: Context) -> list[Stage]:
    """Return the stages of this run, in order."""
    return [stage for stage in STAGES if stage.wanted(context.config)]


# -- the start of a round -----------------------------------------------------------------------------------------------


def start_round(context: Context, until: str | None = None) -> None:
    """Make all early checks, set aside results of another configuration, and write run.json and the templates.

    Raises:
        RunFolderError: `until` is not a stage, or the user keeps results of another configuration.
        ConfigError: the domain or a tracker is not installed.
    """
    names = [stage.name for stage in _stages(context)]
    if until is not None and until not in names:
        raise RunFolderError(f'there is no stage "{until}"; stages: {", ".join(names)}')
    check_domain(context.config.domain)
    check_installed(context.config.trackers)
    set_changed_aside([context])  # before run.json is updated, so the archive gets the old configuration
    _write_run(context)
    _keep_templates(context)


def set_changed_aside(contexts: Sequence[Context]) -> None:
    """Set aside results of another configuration, after asking once for all rounds.

    Args:
        contexts: the rounds that have begun, in order.

    Raises:
        RunFolderError: the user did not agree; nothing has been moved.
    """
    # Collected over all rounds before the first move, so the user is asked once and a refusal moves nothing.
    found = [(context, stage) for context in contexts for stage in _changed(context)]
    losses = [loss_of(context, stage) for context, stage in found if not stage.gathers]
    agree(contexts[0], losses, [what_changed(contexts[0])] if losses else [])
    for context in contexts:
        # `agree` sets it on the context that asked.
        context.restart = contexts[0].restart
    for context, stage in found:
        # A folder without run.json is not a run. Its results may be from other settings, so the archive records none.
        context.store.update_run(status="partial", **({} if context.store.run else {"schema": RUN_SCHEMA}))
        _act_on(context, stage, Changed("configuration"))


def _changed(context: Context) -> list[Stage]:
    ledger = ledger_of(context)
    return [stage for stage in _stages(context) if ledger.state(stage.name) == Changed("configuration")]


def _act_on_damage(context: Context) -> None:
    """Check every file of every finished stage before any stage runs."""
    ledger = ledger_of(context)
    for stage in _stages(context):
        state = ledger.state(stage.name)
        if isinstance(state, Damaged):
            _act_on(context, stage, state)


def _write_run(context: Context) -> None:
    config, store, ledger = context.config, context.store, Ledger(context.store.root)
    finished = [stage.name for stage in _stages(context) if isinstance(ledger.state(stage.name), Fresh)]
    rows = {n: {"state": "finished", "seconds": 0.0, "counts": store.manifest(n)["counts"]} for n in finished}
    store.update_run(
        schema=RUN_SCHEMA,
        status="running",
        name=context.name,
        round=context.round,
        seed=config.seed,
        config=config.model_dump(mode="json"),
        made_of=input_fingerprints(context),
        commit=commit_of(config.model),
        versions=report.versions(),
        stages={**rows, **store.run.get("stages", {})},  # restore the rows if run.json was removed
    )
    # A copy for a later resume without the user's file (`_config_of_the_run`).
    store.write_records("seeds.jsonl", context.seeds)


def _keep_templates(context: Context) -> None:
    """Copy the templates into the run folder, from which they are read from now on.

    Called after results of other templates were set aside.
    """
    if not context.earlier:
        keep_templates(context.config, context.store, context.day)
        if has_lost_chat_template(context.store):
            _ = context.templates  # loads the tokenizer and rewrites the chat template


# -- one stage ----------------------------------------------------------------------------------------------------------


def _bring_up_to_date(context: Context, stage: Stage, ledger: Ledger) -> bool:
    """Run a stage unless it is fresh. Return True if it ran."""
    ledger = with_labels(ledger, context, stage)
    state = ledger.state(stage.name)
    if isinstance(state, Fresh):
        return False
    _act_on(context, stage, state)
    expected = ledger.expected[stage.name]
    try:
        _run_stage(context, stage, expected)
    except LostWorkError as error:
        if not context.restart:
            raise
        context.release()  # its roles are only partly trained
        _replace(context, stage, str(error).partition(". ")[0])
        _run_stage(context, stage, expected)
    return True


def _act_on(context: Context, stage: Stage, state: State) -> None:
    """Clear away the results of a stage that cannot be used, so that it can run.

    Raises:
        RunFolderError: the user does not agree, or a file is damaged.
    """
    store = context.store
    match state:
        case Fresh() | Missing(files=()):
            return
        case Missing(files=(first, *_)) if stage.trains:
            # Lost shards can be regenerated one by one, but a partly lost training has to restart from scratch.
            _replace(context, stage, f"{first} is missing")
        case Missing():
            _say(context, stage, "a file is missing and will be regenerated")
            store.reopen(stage.name)
        case Changed("inputs") if stage.gathers:
            store.reopen(stage.name)
        case Changed("inputs") if stage.labels:
            # Asked once for all that follows: training on labels may cost hours of training.
            _replace(context, stage, "the verdicts or the labels for training have changed", _later_work(context, stage))
        case Changed("inputs"):
            _replace(context, stage, "the results it was computed from have changed")
        case Changed("configuration"):
            _say(context, stage, "the configuration has changed; the old result was moved to replaced/")
            _set_aside(context, stage)
        case Damaged(file) if stage.trains and context.restart:
            _say(context, stage, f"{file} is damaged; the stage is retrained, and the other files were moved to replaced/")
            _set_aside(context, stage)
        case Damaged(file):
            remedy = "remove it and rerun the same command to regenerate it"
            if stage.trains:
                remedy = "retrain the stage: rerun the same command with --restart"
            raise RunFolderError(
                f"{store.root / file} is damaged: its content does not match its recorded hash. Restore it from a backup, or "
                f"{remedy}"
            )


def _later_work(context: Context, stage: Stage) -> list[Stage]:
    """Return the stages after a stage that have results of their own, which depend on its output."""
    stages, ledger = _stages(context), Ledger(context.store.root)
    later = stages[stages.index(stage) + 1 :]
    return [one for one in later if not one.gathers and ledger.has_work(one.name)]


def _replace(context: Context, stage: Stage, reason: str, later: Sequence[Stage] = ()) -> None:
    """Set aside the work of a stage if the user agrees, who is also asked about the stages that have to follow."""
    losses = [loss_of(context, one) for one in (stage, *later)]
    agree(context, losses, [f"{context.store.root}, {stage.name}: {reason}"])
    _say(context, stage, f"{reason}; the stage is rerun, and the old result was moved to replaced/")
    _set_aside(context, stage)


def _set_aside(context: Context, stage: Stage) -> None:
    context.store.set_aside(stage.name, stage.moved_paths(context.store.root, context.config))


def _run_stage(context: Context, stage: Stage, expected: Expected) -> None:
    store, started = context.store, time.monotonic()
    inputs = expected.inputs or ""
    # Before the work: after a kill, the results on disk can be attributed to this configuration.
    store.begin(stage.name, expected.key, inputs)
    if context.workers is not None and stage.computes and not stage.maps:
        context.workers.stop()  # it needs their memory more
    try:
        with context.terminal.stage(context.round, stage.name), cpu_threads(_threads(context, stage)):
            counts = stage.run(context)
    except BaseException:
        seconds = time.monotonic() - started
        with suppress(InputError):  # as in `note_interruption`
            store.record_stage(stage.name, state="interrupted", seconds=seconds, memory_events=_memory_events(context, stage))
        raise
    finally:
        context.close_executor()
    seconds = time.monotonic() - started
    store.record_stage(
        stage.name,
        state="finished",
        seconds=seconds,
        counts=counts,
        peak_bytes=context.peak_bytes(),
        memory_events=_memory_events(context, stage),
    )
    # The manifest marks the stage as finished, so it comes last: after a kill before it, the stage runs again and reuses
    # its shards and checkpoints.
    outputs, kept = stage.output_paths(store.root, context.config), stage.kept_paths(store.root)
    store.finish(stage.name, expected.key, counts, outputs, inputs, kept)
    shown = ", ".join(f"{name} {value}" for name, value in counts.items())
    _say(context, stage, f"{seconds:.1f} s" + (f"  ({shown})" if shown else ""))


def _threads(context: Context, stage: Stage) -> int:
    """Return the number of CPU threads of a stage: that with which it was begun, or else the fastest one now."""
    if not stage.computes or is_set_by_user() or pick_device(context.config.backbone.device).type != "cpu":
        return torch.get_num_threads()
    recorded, cores = context.store.run.get("stages", {}).get(stage.name, {}).get("threads"), usable_cores()
    if recorded is not None:
        threads = min(int(recorded), cores)
        if threads < recorded:
            _say(context, stage, f"begun with {recorded} CPU threads, continued with {threads}: the last bits may differ")
        return threads
    threads = context.workers.threads if context.workers is not None and (stage.maps or stage.trains) else pick_threads(cores)
    # Before the work: results depend on the number in their last bits, so a resumed stage continues with it.
    context.store.record_stage(stage.name, threads=threads)
    if threads < cores and context.workers is None:
        _say(context, stage, f"{threads} of {cores} CPU threads, because more are slower at the moment")
    return threads


def _memory_events(context: Context, stage: Stage) -> list[dict[str, Any]]:
    """Return the memory events of this stage, including those of earlier, interrupted attempts."""
    # An interrupted attempt has recorded its events in run.json, and they would be overwritten.
    earlier: list[dict[str, Any]] = context.store.run.get("stages", {}).get(stage.name, {}).get("memory_events", [])
    return [*earlier, *context.take_memory_events()]


def _say(context: Context, stage: Stage, text: str) -> None:
    round_too = f"round {context.round}, " if context.earlier else ""
    context.terminal.note(f"{round_too}{stage.name}: {text}")
