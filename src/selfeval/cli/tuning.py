"""The data of `selfeval tune`, as the command's options name it, and the facts that it prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from selfeval.errors import InputError

if TYPE_CHECKING:
    from selfeval.config import RunConfig
    from selfeval.stages.tuning_rows import Source

__all__ = ["check_source", "config_and_source", "say_tuned", "with_vocabulary"]

_DOCUMENTS = {"text": "passages of text"}


def check_source(texts: Sequence[Path] | None, chat: Sequence[Path] | None, run: Path | None, model: str | None) -> None:
    """Check that the options name one kind of data and one model.

    Raises:
        InputError: they name none, or several.
    """
    given = [name for name, value in (("TEXT...", texts), ("--chat FILE", chat), ("--run DIR", run)) if value]
    if len(given) != 1:
        got = " and ".join(given) or "none of them"
        raise InputError(f"pass the data to tune on as one of TEXT..., --chat FILE and --run DIR; got {got}")
    if run is None and model is None:
        raise InputError(f"{given[0]} needs a model to tune; add --model MODEL")
    if run is not None and model is not None:
        raise InputError("--run DIR tunes the model of the run; remove --model")


def config_and_source(
    texts: Sequence[Path] | None,
    chat: Sequence[Path] | None,
    run: Path | None,
    model: str | None,
    name: str,
    assignments: Sequence[str],
) -> tuple[RunConfig, Source]:
    """Return the configuration and the data that the options of a tuning name; see `check_source`.

    Raises:
        ConfigError: a key or a value is wrong.
        RunFolderError: the folder of --run is not a run.
    """
    from selfeval.stages.running import new_config
    from selfeval.stages.tuning import is_read
    from selfeval.stages.tuning_chats import ChatFiles
    from selfeval.stages.tuning_replies import PreferredReplies
    from selfeval.stages.tuning_texts import TextFiles

    if run is not None:
        replies = PreferredReplies(run)
        return replies.config(name, assignments), replies
    source = ChatFiles(chat) if chat else TextFiles(texts or ())
    return new_config(model=model, name=name, assignments=assignments, wanted=partial(is_read, also=source.also_read)), source


def with_vocabulary(assignments: Sequence[str], tokens: int | None) -> list[str]:
    """Return the assignments with the number of new tokens of `--extend-vocabulary`."""
    return [*assignments, *([] if tokens is None else [f"tuning.extend_vocabulary={tokens}"])]


def say_tuned(facts: Mapping[str, Any]) -> None:
    """Print the facts of a finished tuning."""
    typer.echo(
        f"tuned on {facts['tokens']:,} tokens in {facts['steps']:,} steps: loss {facts['loss_start']:.3f}, then "
        f"{facts['loss_end']:.3f} nats per token (means over the first and last tenth of the steps)"
    )
    if "held_out_loss" in facts:
        kind = _DOCUMENTS.get(facts["kind"], facts["kind"])
        typer.echo(
            f"held-out loss of {facts['held_out']:,} {kind}: {facts['held_out_loss_before']:.3f}, then "
            f"{facts['held_out_loss']:.3f} nats per token (after step {facts['best_step']:,}, whose weights are written)"
        )
    if "vocabulary" in facts:
        _say_vocabulary(facts["vocabulary"])


def _say_vocabulary(facts: Mapping[str, Any]) -> None:
    typer.echo(f"vocabulary: {facts['added']:,} new tokens, {facts['tokens']:,} in all")
    if "characters" not in facts:
        return
    shown = {name: facts[name]["value"] for name in facts if isinstance(facts[name], dict)}
    change = facts["loss_per_character_change"]
    interval = "" if change["ci_low"] is None else f", 95% interval {change['ci_low']:+.4f} to {change['ci_high']:+.4f}"
    typer.echo(
        f"on {facts['characters']:,} held-out characters: untuned base {shown['characters_per_token_before']:.2f} characters "
        f"per token and {shown['loss_per_character_before']:.4f} nats per character; tuned with new tokens "
        f"{shown['characters_per_token']:.2f} and {shown['loss_per_character']:.4f} ({change['value']:+.4f}{interval}, "
        f"{change['n']:,} {facts['clusters']}). The change is that of tuning and new tokens together; a tuning without "
        "--extend-vocabulary shows that of tuning alone"
    )
