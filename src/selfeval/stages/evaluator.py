"""evaluator: train the scalar evaluators on the training pairs, and fit their confidence temperature on held-out pairs.

Each round trains new evaluators from scratch on the pairs of all rounds so far.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import accumulate
from statistics import fmean, pstdev
from typing import Any

from torch.optim import AdamW

from selfeval.backbone.process_group import by_first
from selfeval.backbone.role_files import save_role
from selfeval.errors import LoopError
from selfeval.quality.calibration import fit_temperature
from selfeval.quality.margin_signals import MarginCalibration, fit_margin_signals
from selfeval.records import Pair
from selfeval.runs.members import Temperature, member_roles
from selfeval.stages.added_pairs import attack_pairs, mismatched_pairs
from selfeval.stages.context import Context
from selfeval.stages.garbled_pairs import garbled_pairs
from selfeval.stages.terminal import Bar
from selfeval.store import read_json, write_json
from selfeval.training.checkpoint import Checkpoints
from selfeval.training.evaluator import EVALUATOR, Preference, score_replies, steps_of, train_evaluator
from selfeval.training.scoring import without_reference

__all__ = [
    "FEWEST_FOR_TEMPERATURE",
    "TEMPERATURE_PRIOR",
    "margins",
    "preferences",
    "run",
]

FEWEST_FOR_TEMPERATURE = 50
TEMPERATURE_PRIOR = 0.5
"""Standard deviation of log T: 95% between 0.38 and 2.7.

It keeps T in range when 50 pairs happen to be separable; 500 pairs outweigh it.
"""
_REPLIES_FOR_UNITS = 256


def preferences(context: Context, pairs: Sequence[Pair]) -> list[Preference]:
    """Convert pairs to token ids, with the evaluator's prompt."""
    return [
        Preference(context.grade_prompt(p.question_id, p.prompt), p.chosen_ids, p.rejected_ids, p.confidence) for p in pairs
    ]


def margins(context: Context, pairs: Sequence[Preference]) -> list[float]:
    """Return the ensemble's score of the chosen reply minus its score of the rejected reply, per pair."""
    prompts = [p.prompt for p in pairs] * 2
    replies = [p.chosen for p in pairs] + [p.rejected for p in pairs]
    scores = context.scorer().of(prompts, replies).whole_B.tolist()
    return [a - b for a, b in zip(scores[: len(pairs)], scores[len(pairs) :], strict=True)]


def _is_drawn(question_id: str, share: float, draw: str) -> bool:
    # A hash of the question, not a draw in sequence: adding pairs or rounds moves no question to the other side.
    digest = hashlib.sha256(f"{draw}/{question_id}".encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64 < share


def _split(context: Context) -> tuple[list[Pair], list[Pair]]:
    """Return the training pairs and the pairs held out by question for the temperature. Test questions are in neither."""
    # The run's seed, not the round's: a question that was held out stays held out in later rounds.
    share, seed = context.config.evaluator.held_out, context.config.seed
    pairs = context.training_pairs()
    # At least one question is held out, even if the share selects none.
    aside = {p.question_id for p in pairs if _is_drawn(p.question_id, share, f"{seed}/held-out")} or {pairs[0].question_id}
    held, kept = ([p for p in pairs if (p.question_id in aside) == wanted] for wanted in (True, False))
    if not kept:
        raise LoopError(
            f"only {len(pairs)} training pairs: none are left to train on; generate more questions (questions.train)"
        )
    return kept, held


def _added(context: Context, pairs: Sequence[Pair]) -> list[Pair]:
    """Return the additional training pairs."""
    settings, seed = context.config.evaluator, context.round_seed

    def encode(pair: Pair, text: str) -> tuple[int, ...]:
        return context.typed_ids(context.grade_prompt(pair.question_id, pair.prompt), text)

    return [
        *mismatched_pairs(pairs, settings.mismatched, seed),
        *attack_pairs(pairs, settings.attacks, seed, encode),
        *garbled_pairs(pairs, settings.garbled, seed, encode, context.reply_limit),
    ]


def _bag(pairs: Sequence[Pair], role: str, share: float, seed: int) -> list[Pair]:
    """Return the pairs of the questions that a member is trained on; all pairs if the draw selects none."""
    # Of 1.0 no hash is left out, so the members of earlier runs have the same pairs.
    return [p for p in pairs if _is_drawn(p.question_id, share, f"{seed}/bag/{role}")] or list(pairs)


def _temperature(context: Context, held_out: Sequence[Preference]) -> Temperature:
    """Fit the temperature T of the confidence sigmoid(margin / T). With too few held-out pairs, T is 1, fitted on no pair.

    A fit on ten pairs once gave 0.032, and a confidence of 1.00 everywhere.
    """
    if len(held_out) < FEWEST_FOR_TEMPERATURE:
        return Temperature(1.0, 0)
    labels = [p.label for p in held_out]
    return Temperature(fit_temperature(margins(context, held_out), labels, prior=TEMPERATURE_PRIOR), len(held_out))


def _confidence(context: Context, held_out: Sequence[Preference]) -> MarginCalibration | None:
    """Fit the confidence of margin and disagreement; None if it is that of the margin alone, or with too few held-out pairs."""
    shape = context.config.evaluator.confidence
    if shape == "slope" or len(held_out) < FEWEST_FOR_TEMPERATURE:
        return None
    prompts, replies = [p.prompt for p in held_out] * 2, [p.chosen for p in held_out] + [p.rejected for p in held_out]
    chosen_KN, rejected_KN = context.scorer().each(prompts, replies).chunk(2, dim=1)
    margins_KN = chosen_KN - rejected_KN
    # As in evaluation: the mean over members, and a population deviation.
    margins, deviations = margins_KN.mean(0).tolist(), margins_KN.std(0, correction=0).tolist()
    # The prompt is that of the question, which may have several pairs.
    labels, questions = [p.label for p in held_out], [p.prompt.ids for p in held_out]
    return fit_margin_signals(margins, deviations, labels, shape, prior=TEMPERATURE_PRIOR, groups=questions)


def run(context: Context) -> dict[str, Any]:
    """Train and save the roles `evaluator-0`, ...; return counts and the temperature."""
    return context.train(_train_members)


def _train_members(context: Context) -> dict[str, Any]:
    config = context.config
    kept, held = _split(context)
    added = _added(context, kept)
    held_out = preferences(context, held)
    members = {
        role: _read_by(number, context, preferences(context, _bag([*kept, *added], role, config.evaluator.bag, config.seed)))
        for number, role in enumerate(member_roles(config))
    }
    # Number of steps before each member, and after the last one.
    starts = list(accumulate((steps_of(train, config.evaluator) for train in members.values()), initial=0))
    with context.terminal.bar("evaluator", starts[-1]) as bar:
        for number, ((role, train), start, end) in enumerate(zip(members.items(), starts, starts[1:], strict=False)):
            if not context.has_role(role):  # a member trained before an interruption is kept
                _train(context, number, role, train, _read_by(number, context, held_out), start, bar)
            # A member that was trained before an interruption logs no steps, so its share is added here.
            bar.advance(end - bar.done)
    context.load_evaluators()
    temperature = _temperature(context, held_out)
    _add_facts(context, {"temperature": temperature.value, "temperature_pairs": temperature.pairs})
    confidence = _confidence(context, held_out)
    if confidence is not None:
        _add_facts(context, {"confidence": asdict(confidence)})
    counts = {"trained": len(kept), "held_out": len(held_out), "members": len(members)}
    if added:
        counts["added"] = len(added)
    return {**counts, "temperature": round(temperature.value, 6)}


def _add_facts(context: Context, facts: dict[str, Any]) -> None:
    """Add facts to the file of the first member, which was written before they could be fitted."""
    path = context.role_folder(EVALUATOR) / "evaluator.json"

    def add() -> None:
        context.store.write_json(path, {**read_json(path), **facts})

    by_first(context.processes, f"facts of {EVALUATOR}: {', '.join(facts)}", add)


def _read_by(number: int, context: Context, pairs: Sequence[Preference]) -> list[Preference]:
    """Return the pairs with the prompt that a member reads."""
    if context.config.evaluator.input_of(number).reference_answer:
        return list(pairs)
    return [replace(pair, prompt=without_reference(pair.prompt)) for pair in pairs]


def _train(
    context: Context,
    number: int,
    role: str,
    pairs: Sequence[Preference],
    held_out: Sequence[Preference],
    before: int,
    bar: Bar,
) -> None:
    """Train one member and save it. `before` is the number of steps of the previous members, to number its metrics."""
    config, backbone = context.config, context.backbone
    read = config.evaluator.input_of(number)
    reading: dict[str, Any] = {"layer": read.layer, "rank": read.rank, "pooling": read.pooling}
    backbone.roles.add(role, seed=context.seed("role", role) % 2**31, head=True, **reading)
    folder = context.checkpoint_folder("evaluator") / role

    def checkpoints(optimizers: Mapping[str, AdamW]) -> Checkpoints:
        metrics = [context.store.metrics_path("evaluator")]
        return Checkpoints(folder, backbone, [role], optimizers, metrics=metrics, check=context.store.check_writable)

    def log(values: dict[str, float]) -> None:
        if values["step"] == 0:  # the held-out loss of the untrained head, which is log 2
            return
        context.log("evaluator", {**values, "step": before + int(values["step"])})
        bar.say(f"loss {values['loss']:.3f} accuracy {values['accuracy']:.2f}")
        bar.advance()

    def resumed(step: int) -> None:
        context.store.keep_metrics("evaluator", before + step)
        bar.advance(before + step - bar.done)

    train_evaluator(
        backbone,
        pairs,
        config.evaluator,
        checkpoints,
        seed=context.round_seed,
        batch_tokens=config.backbone.batch_tokens,
        log=log,
        resumed=resumed,
        role=role,
        held_out=held_out,
    )
    backbone.roles.freeze(role)
    units = _units(context, role, pairs) if config.evaluator.members > 1 else {"mean": 0.0, "deviation": 1.0}
    read_reference = {} if read.reference_answer else {"reference_answer": False}
    # In one rename, so a role folder that exists is complete; `run` relies on this to skip the member.
    with context.writing_role(role) as written:
        save_role(backbone, role, written)
        write_json(written / "evaluator.json", {**units, **read_reference})


def _units(context: Context, role: str, pairs: Sequence[Preference]) -> dict[str, float]:
    """Return mean and standard deviation of a member's scores of training replies, used to put members on one scale."""
    some = pairs[:_REPLIES_FOR_UNITS]
    prompts, replies = [p.prompt for p in some] * 2, [p.chosen for p in some] + [p.rejected for p in some]
    scores = score_replies(context.backbone, role, prompts, replies, context.config.backbone.batch_tokens)
    # Never 0: the scores are divided by it.
    return {"mean": fmean(scores), "deviation": max(pstdev(scores), 1e-4)}
