"""evaluator: trains the scalar evaluator on the training pairs and fits the temperature of its confidence on held-out ones."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from selfeval.errors import LoopError
from selfeval.quality.calibration import fit_temperature
from selfeval.records import Pair, Split
from selfeval.stages.context import Context
from selfeval.store import write_json, writing
from selfeval.training.checkpoint import Checkpoints
from selfeval.training.evaluator import EVALUATOR, Preference, score_replies, train_evaluator

__all__ = ["margins", "preferences", "run"]

_FEWEST_FOR_TEMPERATURE = 10


def preferences(context: Context, pairs: Sequence[Pair]) -> list[Preference]:
    """Pairs as token ids, the prompt being the one under which the evaluator reads replies."""
    return [
        Preference(context.grade_prompt(p.question_id, p.prompt), p.chosen_ids, p.rejected_ids, p.confidence) for p in pairs
    ]


def margins(context: Context, pairs: Sequence[Preference]) -> list[float]:
    """Score of the chosen reply minus score of the rejected one."""
    prompts = [p.prompt for p in pairs] * 2
    replies = [p.chosen for p in pairs] + [p.rejected for p in pairs]
    scores = score_replies(context.backbone, EVALUATOR, prompts, replies, context.config.batch_tokens)
    return [a - b for a, b in zip(scores[: len(pairs)], scores[len(pairs) :], strict=True)]


def _is_held_out(question_id: str, share: float, seed: int) -> bool:
    digest = hashlib.sha256(f"{seed}/held-out/{question_id}".encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64 < share


def _split(context: Context) -> tuple[list[Preference], list[Preference]]:
    """Training pairs, and those held out (by question) for the temperature; test questions are in neither."""
    share, seed = context.config.evaluator.held_out, context.config.seed
    pairs = [p for p in context.store.read("pairs", Pair) if p.split == Split.TRAIN]
    aside = {p.question_id for p in pairs if _is_held_out(p.question_id, share, seed)} or {pairs[0].question_id}
    held, kept = ([p for p in pairs if (p.question_id in aside) == wanted] for wanted in (True, False))
    if not kept:
        raise LoopError(f"only {len(pairs)} training pairs: none is left to train on; write more questions (questions.train)")
    return preferences(context, kept), preferences(context, held)


def _temperature(context: Context, held_out: Sequence[Preference]) -> float:
    """Temperature of the confidence sigmoid(margin / T); 1 where the held-out pairs are too few to tell."""
    if len(held_out) < _FEWEST_FOR_TEMPERATURE:
        return 1.0
    return fit_temperature(margins(context, held_out), [p.label for p in held_out])


def run(context: Context) -> dict[str, Any]:
    """Trains and saves the role `evaluator-0`; returns counts and the temperature."""
    config, store, backbone = context.config, context.store, context.backbone
    train, held_out = _split(context)
    backbone.add_role(EVALUATOR, seed=context.seed("role", EVALUATOR) % 2**31, head=True)

    def checkpoints(optimizers: Mapping[str, Any]) -> Checkpoints:
        return Checkpoints(context.checkpoint_folder("evaluator"), backbone, [EVALUATOR], optimizers)

    steps = -(-len(train) // config.evaluator.batch) * config.evaluator.epochs
    with context.terminal.bar("evaluator", steps) as bar:

        def log(values: dict[str, float]) -> None:
            context.log("evaluator", {**values, "step": int(values["step"])})
            bar.say(f"loss {values['loss']:.3f} accuracy {values['accuracy']:.2f}")
            bar.advance()

        def resumed(step: int) -> None:
            store.keep_metrics("evaluator", step)
            bar.advance(step)

        train_evaluator(
            backbone,
            train,
            config.evaluator,
            checkpoints,
            seed=config.seed,
            batch_tokens=config.batch_tokens,
            log=log,
            resumed=resumed,
        )
    temperature = _temperature(context, held_out)
    backbone.freeze(EVALUATOR)
    with writing(context.role_folder(EVALUATOR)) as folder:
        backbone.save_role(EVALUATOR, folder)
        write_json(folder / "evaluator.json", {"temperature": temperature})
    return {"trained": len(train), "held_out": len(held_out), "temperature": round(temperature, 6)}
