"""Estimate what a judge needs before its verdicts are final: accuracies of the members of a combined judge, or a calibration.

This is done once per round, from its first pairs, and written to a file: the verdict of a pair must not depend on the shard
that it is in, or on when a run was killed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from selfeval.config import CombinedConfig, VerdictsConfig
from selfeval.errors import LoopError
from selfeval.judging.calibrated import calibrated, calibration_of, looks_of, rounded_judgement
from selfeval.judging.judges.combined import fit_members, pool_members
from selfeval.judging.protocol import UNFITTED, JudgeFit, Judgement, state_of
from selfeval.quality.judge_calibration import FEWEST_PAIRS, Calibration, Looks, fit_to_consistency, unbiased_agreement
from selfeval.quality.judge_signals import SignalCalibration, fit_signals_to_consistency
from selfeval.quality.signed_regression import FEWEST_FOR_ISOTONIC
from selfeval.quality.statistics import rounded
from selfeval.records import CombinedEvidence, Verdict
from selfeval.report.summary import OTHER_JUDGES
from selfeval.runs.judge_fit import FIT_FILE, has_fit, read_fit
from selfeval.stages.context import Context
from selfeval.stages.shards import Batch, ShardOutput, Work, computed

__all__ = [
    "Judged",
    "calibrate",
    "calibrated_verdict",
    "estimate_accuracies",
    "fitted_again",
    "forget_fit",
    "known_fit",
    "members_of",
]

Judged = list[tuple[Batch[Any], ShardOutput]]


def known_fit(context: Context) -> JudgeFit | None:
    """Return what was estimated before, if a shard is finished; otherwise remove the file of an attempt with other settings.

    None if it has to be estimated.

    Raises:
        RunFolderError: a shard is finished, and the file is damaged.
    """
    config, store = context.config.verdicts, context.store
    path = store.root / FIT_FILE
    if store.shards("verdicts") and path.is_file():
        return read_fit(config, store.root)
    path.unlink(missing_ok=True)
    return None if has_fit(config) else JudgeFit()


def forget_fit(context: Context) -> None:
    """Remove what was estimated for a judge that labels nothing now: a file gives the labels."""
    (context.store.root / FIT_FILE).unlink(missing_ok=True)


def _judge_first(context: Context, pairs: Sequence[Any], work: Work[Any]) -> Judged:
    size = context.config.verdicts.shard
    batches = [Batch(n, pairs[first : first + size]) for n, first in enumerate(range(0, len(pairs), size))]
    with context.terminal.bar("verdicts", len(pairs)) as bar:
        return sorted(computed(context.executor, work, batches, bar), key=lambda found: found[0].index)


# -- combined -----------------------------------------------------------------------------------------------------------


def members_of(verdicts: Sequence[Verdict]) -> list[CombinedEvidence]:
    """Return the evidence of the verdicts of a combined judge."""
    return [verdict.evidence for verdict in verdicts if isinstance(verdict.evidence, CombinedEvidence)]


def estimate_accuracies(context: Context, combined: CombinedConfig, pairs: Sequence[Any], work: Work[Any]) -> JudgeFit:
    """Estimate the accuracies of the members of a combined judge from the first pairs, and write them.

    The shards judge these pairs again, because a shard must not depend on the batches of another step.

    Args:
        context: context of the round.
        combined: settings of the judge.
        pairs: the pairs of the stage, in order.
        work: judges a batch of pairs.
    """
    first = pairs[: combined.pairs]
    context.terminal.note(f"verdicts: estimating the accuracies of {', '.join(combined.judges)} on {len(first)} pairs")
    found = members_of([verdict for _, output in _judge_first(context, first, work) for verdict in output.records])
    # As written: a resumed run reads these.
    accuracies = tuple(round(a, 6) for a in fit_members(found))
    votes = [sum(map(bool, column)) for column in zip(*(evidence.votes for evidence in found), strict=True)]
    context.store.write_json(
        context.store.root / FIT_FILE,
        {"judges": list(combined.judges), "accuracies": list(accuracies), "votes": votes, "pairs": len(found)},
    )
    said = [f"{name} {a:.2f} ({n} votes)" for name, a, n in zip(combined.judges, accuracies, votes, strict=True)]
    context.terminal.note(f"verdicts: accuracies by the agreement of the judges: {', '.join(said)}")
    return JudgeFit(accuracies=accuracies)


def fitted_again(verdicts: Sequence[Verdict], fitted_on: Sequence[Verdict], config: VerdictsConfig) -> list[Verdict]:
    """Return the verdicts with a fit to all verdicts at hand, as a run has it of its first pairs.

    Args:
        verdicts: verdicts of any judge; those of one with nothing to estimate are returned as they are.
        fitted_on: verdicts of the same judge, from which accuracies or a calibration are estimated.
        config: settings of the verdicts.
    """
    if config.fits_consistency:
        found = _fitted(fitted_on, config)
        return [calibrated_verdict(verdict, found, config) for verdict in verdicts]
    accuracies, given = fit_members(members_of(fitted_on)), calibration_of(config, UNFITTED)

    def pooled(verdict: Verdict) -> Verdict:
        if not isinstance(verdict.evidence, CombinedEvidence):
            return verdict
        judgement = pool_members(verdict.evidence, accuracies, config)
        return _with(verdict, judgement if given is None else calibrated(rounded_judgement(judgement), given), config)

    return list(map(pooled, verdicts))


# -- calibration --------------------------------------------------------------------------------------------------------


def calibrate(context: Context, pairs: Sequence[Any], work: Work[Any]) -> tuple[JudgeFit, Judged]:
    """Fit the calibration to the agreement of both orders on the first pairs, and write it.

    Args:
        context: context of the round.
        pairs: what the shards of the stage are made of, in order.
        work: judges a batch of them, without a calibration.

    Returns:
        The fit, and the batches that were judged, whole shards, with verdicts that are not calibrated yet.

    Raises:
        LoopError: no verdict would be kept, because the orders agree no more often than by chance, and the user has not forced
            the run. Only in round 1: later rounds have the pairs of earlier ones.
    """
    config = context.config.verdicts
    shards = -(-min(config.calibration.pairs, len(pairs)) // config.shard)
    context.terminal.note(f"verdicts: calibrating the judge on the first {min(shards * config.shard, len(pairs))} pairs")
    judged = _judge_first(context, pairs[: shards * config.shard], work)
    verdicts = [verdict for _, output in judged for verdict in output.records]
    found = _fitted(verdicts, config)
    values = None if found is None else dataclasses.asdict(found)
    context.store.write_json(context.store.root / FIT_FILE, {"calibration": values, "pairs": len(verdicts)})
    context.terminal.note(f"verdicts: {_described(found, len(verdicts), config)}")
    if found is not None and found.is_useless and not context.force and not context.earlier:
        raise LoopError(_without_consistency([look for _, look in _looks(verdicts, config)], len(verdicts)))
    return JudgeFit(calibration=found), judged


def _fitted(verdicts: Sequence[Verdict], config: VerdictsConfig) -> Calibration | SignalCalibration | None:
    """Fit to the pairs with a verdict that is no tie, rounded as written: a resumed run reads these numbers."""
    looks, shape = _looks(verdicts, config), config.calibration.map
    if shape != "slope":
        signals = fit_signals_to_consistency([look for _, look in looks], shape, [question for question, _ in looks])
        return signals and signals.rounded()
    found = fit_to_consistency([look for _, look in looks])
    return found and Calibration(**{name: round(value, 6) for name, value in vars(found).items()})


def _looks(verdicts: Sequence[Verdict], config: VerdictsConfig) -> list[tuple[str, Looks]]:
    """Return question id and looks of each verdict with a preference."""
    clear = [verdict for verdict in verdicts if verdict.tie is None or verdict.tie <= config.tie]
    return [(verdict.question_id, look) for verdict in clear if (look := looks_of(_judgement(verdict))) is not None]


def _described(found: Calibration | SignalCalibration | None, pairs: int, config: VerdictsConfig) -> str:
    if found is None:
        return f"fewer than {FEWEST_PAIRS} of {pairs} pairs have a preference, so the judge's probabilities are not calibrated"
    if isinstance(found, SignalCalibration):
        return _signals_described(found, pairs, config)
    cut = f" ({found.truncated_slope:.2g} after a chain of thought that was cut off)" if config.truncated == "force" else ""
    return (
        f"calibrated on the agreement of both orders of {pairs} pairs: log-odds times {found.slope:.2g}{cut}, "
        f"position bias {found.bias:+.2f}"
    )


def _signals_described(found: SignalCalibration, pairs: int, config: VerdictsConfig) -> str:
    weights = ", ".join(f"{name} {weight:+.2g}" for name, weight in found.weights.items() if weight)
    second = f"isotonic regression of {len(found.steps)} points" if found.steps else f"log-odds times {found.scale:.2g}"
    is_short = config.calibration.map == "isotonic" and not found.steps
    short = (
        f"; an isotonic regression needs {FEWEST_FOR_ISOTONIC} looks (two of each question), so it is a temperature"
        if is_short
        else ""
    )
    return (
        f"calibrated on the agreement of both orders of {pairs} pairs: weights {weights or '0'}, {second}, "
        f"position bias {found.bias:+.2f}{short}"
    )


def _without_consistency(looks: Sequence[Looks], pairs: int) -> str:
    return (
        f"less the position bias, both orders of the judge prefer the same reply in {unbiased_agreement(looks):.1%} of "
        f"{len(looks)} pairs (of {pairs}; the others are ties or unparsable), no more often than by chance, so no verdict "
        f"would be kept. Use another judge (verdicts.judge) or a stronger model, or set verdicts.calibration.method=off; "
        f"{OTHER_JUDGES}. Finished stages are kept. To judge all pairs anyway, rerun the same command with --force"
    )


def calibrated_verdict(
    verdict: Verdict, calibration: Calibration | SignalCalibration | None, config: VerdictsConfig
) -> Verdict:
    """Return a recorded verdict with its calibrated probability and the state that follows.

    Args:
        verdict: a verdict that is not calibrated.
        calibration: Optional. None leaves it unchanged.
        config: settings of the verdicts.
    """
    return verdict if calibration is None else _with(verdict, calibrated(_judgement(verdict), calibration), config)


def _judgement(verdict: Verdict) -> Judgement:
    return Judgement(verdict.probability, verdict.tie, verdict.evidence)


def _with(verdict: Verdict, judgement: Judgement, config: VerdictsConfig) -> Verdict:
    written = Judgement(rounded(judgement.probability), rounded(judgement.tie), judgement.evidence)
    return dataclasses.replace(verdict, state=state_of(written, config), **vars(written))
