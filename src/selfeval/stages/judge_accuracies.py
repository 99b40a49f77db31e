"""Estimate the accuracies of the members of a combined judge before it judges any shard.

They are estimated once per round, from its first pairs, and written to a file: the verdict of a pair must not depend on the
shard that it is in, or on when a run was killed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from selfeval.config import CombinedConfig, VerdictsConfig
from selfeval.judging.judges.combined import fit_members, pool_members
from selfeval.judging.protocol import Judgement, state_of
from selfeval.quality.statistics import rounded
from selfeval.records import CombinedEvidence, Verdict
from selfeval.runs.judge_accuracies import ACCURACIES_FILE, read_accuracies
from selfeval.stages.context import Context
from selfeval.stages.shards import Batch, Work

__all__ = ["estimate_accuracies", "members_of", "pooled_again"]


def members_of(verdicts: Sequence[Verdict]) -> list[CombinedEvidence]:
    """Return the evidence of the verdicts of a combined judge."""
    return [verdict.evidence for verdict in verdicts if isinstance(verdict.evidence, CombinedEvidence)]


def estimate_accuracies(context: Context, pairs: Sequence[Any], work: Work[Any]) -> tuple[float, ...] | None:
    """Return the accuracies of the members, estimated from the first pairs; None if the judge is not combined.

    If a shard is finished, they are read from the file that was written before it. The shards judge these pairs again, because
    a shard must not depend on the batches of another step.

    Args:
        context: context of the round.
        pairs: the pairs of the stage, in order.
        work: judges a batch of pairs.

    Raises:
        RunFolderError: a shard is finished, and the file is damaged.
    """
    config, store = context.config.verdicts, context.store
    path, settings = store.root / ACCURACIES_FILE, config.settings
    if store.shards("verdicts") and path.is_file():
        return read_accuracies(config, store.root)
    path.unlink(missing_ok=True)  # of an attempt with other settings
    if not isinstance(settings, CombinedConfig) or not pairs:
        return None
    first = pairs[: settings.pairs]
    context.terminal.note(f"verdicts: estimating the accuracies of {', '.join(settings.judges)} on {len(first)} pairs")
    batches = [Batch(n, first[n : n + config.shard]) for n in range(0, len(first), config.shard)]
    outputs = sorted(context.executor.map(work, batches), key=lambda found: found[0].index)
    found = members_of([verdict for _, output in outputs for verdict in output.records])
    # As written: a resumed run reads these.
    accuracies = tuple(round(a, 6) for a in fit_members(found))
    votes = [sum(map(bool, column)) for column in zip(*(evidence.votes for evidence in found), strict=True)]
    store.write_json(
        path, {"judges": list(settings.judges), "accuracies": list(accuracies), "votes": votes, "pairs": len(found)}
    )
    said = [f"{name} {a:.2f} ({n} votes)" for name, a, n in zip(settings.judges, accuracies, votes, strict=True)]
    context.terminal.note(f"verdicts: accuracies by the agreement of the judges: {', '.join(said)}")
    return accuracies


def pooled_again(verdicts: Sequence[Verdict], fitted_on: Sequence[Verdict], config: VerdictsConfig) -> list[Verdict]:
    """Return the verdicts with accuracies that are estimated from all verdicts at hand.

    Args:
        verdicts: verdicts of any judge; those of one that is not combined are returned as they are.
        fitted_on: verdicts of the same judge, from which the accuracies are estimated.
        config: settings of the verdicts.
    """
    accuracies = fit_members(members_of(fitted_on))

    def pooled(verdict: Verdict) -> Verdict:
        if not isinstance(verdict.evidence, CombinedEvidence):
            return verdict
        found = pool_members(verdict.evidence, accuracies, config)
        written = Judgement(rounded(found.probability), rounded(found.tie), found.evidence)
        state = state_of(written, config)
        return dataclasses.replace(verdict, state=state, **vars(written))

    return list(map(pooled, verdicts))
