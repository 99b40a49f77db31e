"""Rounds: repeat the loop, each time starting from the previous round's policy.

Round 1 is the run folder itself. Round 2 is in its `rounds/02`, round 3 in `rounds/03`, all with the same layout, so code that
reads a run also reads a round. How later rounds differ from the first is described at each place: `Context.ensure_start` (who
writes and replies), `stages/questions.py`, `stages/evaluator.py` and `stages/evaluation.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from selfeval.errors import RunFolderError
from selfeval.runs.reader import round_folder
from selfeval.stages.context import Context
from selfeval.stages.pipeline import (
    bring_report_up_to_date,
    has_current_evidence,
    is_finished,
    note_interruption,
    run_stages,
    set_changed_aside,
    start_round,
)
from selfeval.store import RunStore

__all__ = ["run_rounds"]


def run_rounds(first: Context, until: tuple[int, str | None] | None = None) -> bool:
    """Run every unfinished stage of every round.

    Args:
        first: context of round 1.
        until: Optional. Round and stage after which to stop; a stage of None is the round's last. Default: the last round's
            last stage.

    Returns:
        False if there was nothing left to do.

    Raises:
        RunFolderError: the folder is itself a round of a run, or there is no such round or stage.
    """
    rounds = first.config.rounds
    last, stage = until or (rounds, None)
    _refuse_a_round(first.store)
    if not 1 <= last <= rounds:
        raise RunFolderError(f"there is no round {last}; rounds = {rounds}")
    if rounds == 1:
        return run_stages(first, stage)
    # Opened now, not when their turn comes: results of another configuration are found in all rounds before any work.
    contexts = [first, *_begun(first)]
    try:
        worked = _run_all(contexts, last, stage)
    except BaseException:
        note_interruption(first.store)
        raise
    finally:
        # Each later round holds the lock of its folder; the caller closes the store of round 1.
        for context in contexts[1:]:
            context.store.close()
    return worked


def _refuse_a_round(store: RunStore) -> None:
    number = store.run.get("round", 1)
    if number > 1:
        run = store.root.resolve().parent.parent
        raise RunFolderError(f"{store.root} is round {number} of a run; pass the folder of the run as --output ({run})")


def _begun(first: Context) -> list[Context]:
    """Return the later rounds that have begun, without results of another configuration."""
    found = [first]
    while len(found) < first.config.rounds and (_next_folder(found) / "run.json").is_file():
        found.append(_next(found))
    return found[1:]


def _next_folder(contexts: Sequence[Context]) -> Path:
    return round_folder(contexts[0].store.root, len(contexts) + 1)


def _next(contexts: Sequence[Context]) -> Context:
    """Return the context of the next round."""
    first = contexts[0]
    store = RunStore(_next_folder(contexts))
    return replace(first, store=store, earlier=tuple(c.store for c in contexts), later=[])


def _run_all(contexts: list[Context], last: int, stage: str | None) -> bool:
    first = contexts[0]
    set_changed_aside(contexts)
    start_round(first, stage)
    # The report of round 1 covers these rounds, so its freshness depends on them.
    first.later = _current(contexts)
    worked = run_stages(first, stage if last == 1 else None)
    for number in range(2, last + 1):
        # `run_stages` has set the status of round 1, which stands for the whole run, to finished or partial.
        first.store.update_run(status="running")
        # Only one model in memory at a time.
        contexts[number - 2].release()
        if len(contexts) < number:
            contexts.append(_next(contexts))
        worked |= _run_later(contexts[number - 1], stage if number == last else None)
        first.later = _current(contexts)
        worked |= bring_report_up_to_date(first)
    contexts[last - 1].release()
    finished = len(first.later) == first.config.rounds - 1 and all(is_finished(context) for context in contexts)
    first.store.update_run(status="finished" if finished else "partial")
    return worked


def _run_later(context: Context, stage: str | None) -> bool:
    if not has_current_evidence(context):
        number, of = context.round, context.config.rounds
        context.terminal.note(
            f"round {number} of {of}: starting from the policy of round {number - 1}, in {context.store.root}"
        )
    return run_stages(context, stage)


def _current(contexts: Sequence[Context]) -> list[RunStore]:
    """Return the later rounds whose evidence is up to date, stopping at the first that is not."""
    found: list[RunStore] = []
    for context in contexts:
        if not has_current_evidence(context):
            break
        found.append(context.store)
    return found[1:]
