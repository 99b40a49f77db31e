"""Probe the judge on a few pairs before the verdicts stage judges all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from selfeval.errors import LoopError
from selfeval.evaluation.judge_probe import PROBED, diagnose, probe_sentences
from selfeval.records import Verdict
from selfeval.report.figures import describe
from selfeval.report.schema import JudgeProbe
from selfeval.report.summary import OTHER_JUDGES
from selfeval.stages.context import Context
from selfeval.stages.shards import Batch, Work

__all__ = ["PROBE_FILE", "forget_probe", "probe_judge"]

PROBE_FILE = "probe.json"
"""File in the round's folder: the diagnosis, and the judge's output on the probed pairs.

It is not in the stage's folder, where it would count as finished work that a change of settings has to set aside.
"""


def forget_probe(context: Context) -> None:
    """Remove the probe of an attempt that wrote no shard: its settings may have been others, or a file gives the labels now."""
    if not context.store.shards("verdicts"):
        (context.store.root / PROBE_FILE).unlink(missing_ok=True)


def probe_judge(context: Context, pairs: Sequence[Any], work: Work[Any]) -> None:
    """Judge the first pairs, report what is wrong with the judge, and stop if it is unusable.

    Skipped if a shard is finished, or if there are no more pairs than those of a probe. The shards judge these pairs again:
    batches of other sizes may differ in the last digit, and a shard must not depend on the probe.

    Args:
        context: context of the round.
        pairs: the pairs of the stage, in order.
        work: judges a batch of pairs.

    Raises:
        LoopError: nothing usable can come out of the judge, and the user has not forced the run. Only in round 1: later rounds
            have the pairs of earlier ones.
    """
    if len(pairs) <= PROBED or context.store.shards("verdicts"):
        return
    context.terminal.note(f"verdicts: probing the judge on {PROBED} of {len(pairs)} pairs")
    verdicts = [v for _, output in context.executor.map(work, [Batch(0, pairs[:PROBED])]) for v in output.records]
    found = diagnose(verdicts, context.config)
    context.store.write_json(context.store.root / PROBE_FILE, {**found.as_json(), "outputs": _outputs(verdicts)})
    _say(context, found)
    if not found.usable and not context.force and not context.earlier:
        raise LoopError(_unusable(context, found))


def _outputs(verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    return [
        {"question_id": v.question_id, "state": v.state, "raw_output": v.evidence.raw_output}
        for v in verdicts
        if v.evidence is not None
    ]


def _counts(found: JudgeProbe) -> str:
    return f"kept {found.kept}, tie {found.tie}, unsure {found.unsure}, unparsable {found.unparsable}"


def _say(context: Context, found: JudgeProbe) -> None:
    figures = {
        "orders agree": found.agreement,
        "chose the reply shown first": found.shown_first,
        "probability of the labels": found.label_mass,
    }
    # A judge that does not compare in both orders has none of them.
    said = [_counts(found), *(f"{name} {describe(figure)}" for name, figure in figures.items() if figure.n)]
    context.terminal.note(f"verdicts: probe of {found.pairs} pairs: {'; '.join(said)}")
    for sentence in probe_sentences(found):
        context.terminal.note(f"verdicts: {sentence}")


def _unusable(context: Context, found: JudgeProbe) -> str:
    return (
        f"the judge is unusable: on a probe of {found.pairs} pairs it kept none ({_counts(found)}). "
        f"{'; '.join(probe_sentences(found))}. {OTHER_JUDGES}. Its output is in {context.store.root / PROBE_FILE}. "
        "Change a setting and rerun; finished stages are kept. To judge all pairs anyway, rerun the same command with --force"
    )
