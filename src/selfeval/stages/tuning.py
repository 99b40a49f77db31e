"""Fine-tune an adapter on the user's data and write it, merged into the base, as a model folder: `selfeval tune`.

This is not a stage of a run; a run starts from the folder that it writes. Until that folder exists, the work is next to it in
OUT.tuning, a run folder with one role, so checkpoints, resuming and exporting work as in any run. Not supported: `dynamic`
RoPE scaling, which config.json cannot express.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, reduce
from operator import attrgetter, getitem
from pathlib import Path
from statistics import fmean
from typing import Any

from selfeval.backbone.fingerprint import base_fingerprint
from selfeval.backbone.process_group import by_first
from selfeval.backbone.role_files import save_role
from selfeval.config import BackboneConfig, RunConfig
from selfeval.errors import ConfigError, RunFolderError
from selfeval.runs.card import find_base
from selfeval.runs.export import TUNING, Exported, export_role
from selfeval.runs.export_folder import free_folder
from selfeval.stages.context import Context, Trainer, in_this_process
from selfeval.stages.preflight import check_base
from selfeval.stages.progress import progress_file
from selfeval.stages.prompts import keep_templates, load_templates
from selfeval.stages.terminal import Terminal
from selfeval.stages.tuning_rows import Source, TuningRows
from selfeval.stages.tuning_vocabulary import VOCABULARY, Vocabulary, check_vocabulary, extend_vocabulary
from selfeval.store import (
    PROGRESS,
    Changed,
    Expected,
    Ledger,
    RunStore,
    fingerprint,
    read_object,
    read_run,
    write_json,
)
from selfeval.training.checkpoint import Checkpoints
from selfeval.training.held_out_loss import HeldOutLoss
from selfeval.training.sft import tune_on_documents

__all__ = ["Tuned", "check_settings", "is_read", "tune"]

_STAGE, _ROLE = "tuning", "tuned"
_UNREAD = "backbone.rollout_batch_size"
"""The one setting of the backbone that tuning does not use."""
_SETTINGS = (
    *(name for name in RunConfig.model_fields if name != "backbone"),
    *(f"backbone.{name}" for name in BackboneConfig.model_fields),
)
_READ = (
    *("name", "model", "templates", "seed", "tuning"),
    *(name for name in _SETTINGS if name.startswith("backbone.") and name != _UNREAD),
)
"""Settings that tuning uses. The rest of the configuration is about the stages of a run."""
_DECIDING = ("backbone.context", "backbone.lora", "tuning", "seed", "backbone.batch_tokens")


@dataclass(frozen=True)
class Tuned:
    """The result of tuning.

    Attributes:
        exported: the model folder.
        facts: steps, rows, tokens per row, tokens whose loss counted; loss in nats per token at the start and the end, each the
            mean over a tenth of the steps; the held-out loss before training and of the weights that were kept.
    """

    exported: Exported
    facts: dict[str, Any]


def is_read(key: str, also: Collection[str] = ()) -> bool:
    """Return whether tuning uses a setting.

    Args:
        key: dotted key.
        also: further sections that the source of the rows reads. Default: none.

    Example:
        >>> is_read("tuning.learning_rate"), is_read("policy.learning_rate")
        (True, False)
    """
    return any(f"{key}.".startswith(f"{name}.") for name in (*_READ, *also))


def check_settings(config: RunConfig, also_read: Collection[str] = ()) -> None:
    """Refuse settings that tuning does not use, and RoPE scaling that config.json cannot express.

    Args:
        config: the settings.
        also_read: further sections that the source of the rows reads. Default: none.

    Raises:
        ConfigError: there is such a setting.
    """
    default, read = RunConfig(), (*_READ, *also_read)
    values = ((name, attrgetter(name)) for name in _SETTINGS if name not in read)
    unread = [name for name, value in values if value(config) != value(default)]
    if unread:
        raise ConfigError(f"this tuning does not use {', '.join(unread)}; allowed: {', '.join(read)}")
    if config.backbone.context.rope_scaling == "dynamic" and config.backbone.context.rope_factor > 1.0:
        raise ConfigError(
            "backbone.context.rope_scaling = dynamic recomputes the angles in each forward pass, which the config.json of a "
            "tuned model cannot express; use yarn or linear"
        )


def tune(
    config: RunConfig,
    source: Source,
    target: Path,
    length: int | None,
    terminal: Terminal,
    *,
    trust_remote_code: bool = False,
    trainer: Trainer = in_this_process,
) -> Tuned:
    """Fine-tune an adapter and write base and adapter as one model folder. A second call resumes.

    Args:
        config: model, backbone and tuning; see `check_settings`.
        source: origin of the rows.
        target: the new folder; it may exist if it is empty.
        length: Optional. Tokens per row. Default: for text the model's whole context, after RoPE scaling; for conversations
            2,048, or the longest conversation that fits the context.
        terminal: shows progress.
        trust_remote_code: run code that comes with the model. Default: False.
        trainer: calls the training. Default: in this process.

    Raises:
        TextError: the data cannot be read or is too short, or the length does not fit the model.
        ConfigError: see `check_settings`.
        ModelError: the base cannot be loaded, or its context cannot be extended.
        ExportError: the target is not empty, or the written model disagrees with the adapter.
        RunFolderError: another process tunes to this target, or OUT.tuning holds something else.
        LoopError: the loss is not finite.
    """
    check_settings(config, source.also_read)
    target = free_folder(target)
    source.check(config)
    check_base(config, trust_remote_code=trust_remote_code)  # fail before a folder is created, not after the training
    check_vocabulary(config, trust_remote_code=trust_remote_code)
    with _workplace(target) as store, progress_file(store.root, terminal), terminal.stage(1, _STAGE):
        store.update_run(kind=_STAGE, name=config.name, config=config.model_dump(mode="json"))
        base_id = find_base(config.model).hub_id
        vocabulary = extend_vocabulary(config, source, store, terminal, trust_remote_code=trust_remote_code)
        if vocabulary is not None:
            config = config.model_copy(update={"model": str(vocabulary.model)})
        context = Context(config, store, terminal, trust_remote_code=trust_remote_code, trainer=trainer)
        rows = source.rows(context, length)
        # After the rows are known, because their content is part of the key.
        _set_others_aside(context, rows)
        # It exists if an earlier call trained it and was killed during the export.
        if not context.role_folder(_ROLE).is_dir():
            context.train(partial(_train, rows, vocabulary))
        # The export reads them from the run folder, where an earlier attempt may have written others.
        keep_templates(config, store, context.day)
        load_templates(config, store, context.backbone.loaded.tokenizer, context.day)
        role = context.role_folder(_ROLE)
        facts = read_object(role / TUNING, remedy=f"remove {role} and rerun the same command")
        # The export loads the base again, in another form; both at once may not fit into memory.
        context.release()
        exported = export_role(
            config,
            store.root,
            _ROLE,
            target,
            merge=True,
            precision="base",
            waiting=terminal.waiting,
            trust_remote_code=trust_remote_code,
            base_id=base_id,
        )
    # Only after the export succeeded: until then, a second call resumes from this folder.
    shutil.rmtree(store.root)
    return Tuned(exported, facts)


@contextmanager
def _workplace(target: Path) -> Iterator[RunStore]:
    """Open and lock the working folder next to the target; remove it on an error if nothing was finished yet."""
    folder = target.with_name(f"{target.name}.tuning")
    begun = (".lock", ".run.json.part", PROGRESS, f".{PROGRESS}.part")
    held = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    key = folder / _STAGE / "key.json"  # identifies the folder if run.json was removed
    # Another run folder must not be taken for this command's, since it is deleted in the end.
    is_ours = read_run(folder).get("kind") == _STAGE if "run.json" in held else ".lock" in held and key.is_file()
    if not is_ours and any(name not in begun for name in held):
        raise RunFolderError(f"{folder} is the working folder of this command, but it contains other files; pass another --to")
    store = RunStore(folder)
    try:
        yield store
    except BaseException:
        if not any((folder / name).exists() for name in ("checkpoints", "roles", "replaced", VOCABULARY)):
            shutil.rmtree(folder)  # nothing was finished yet
        raise
    finally:
        store.close()


# -- tuning -------------------------------------------------------------------------------------------------------------


def _set_others_aside(context: Context, rows: TuningRows) -> None:
    """Set aside work that was begun with another model, other settings or other data, instead of resuming it."""
    store, config, loaded = context.store, context.config.model_dump(mode="json"), context.backbone.loaded
    deciding = {name: reduce(getitem, name.split("."), config) for name in _DECIDING}
    key = fingerprint([base_fingerprint(loaded), loaded.precision, deciding, rows.digest])
    owned = [context.role_folder(_ROLE), context.checkpoint_folder(_STAGE), store.metrics_path(_STAGE)]
    state = Ledger(store.root, {_STAGE: Expected(key, owned=owned)}).state(_STAGE)
    if isinstance(state, Changed):
        store.set_aside(_STAGE, owned)
        context.terminal.note(
            "tuning: an earlier attempt used another model, other settings or other data, so training starts from scratch; "
            f"until it finishes, the earlier work is kept in {store.root / 'replaced'}"
        )
    store.begin(_STAGE, key)


def _train(rows: TuningRows, vocabulary: Vocabulary | None, context: Context) -> dict[str, Any]:
    """Train the adapter from its last checkpoint, if there is one, and save it with the facts."""
    config, backbone, store = context.config, context.backbone, context.store
    backbone.roles.add(_ROLE, seed=context.seed("role", _ROLE) % 2**31)
    if vocabulary is not None:
        backbone.roles.add_rows(_ROLE, vocabulary.first, len(vocabulary.pieces))
    backbone.budget.shorter = "lower --length"
    folder = context.checkpoint_folder(_STAGE)
    with context.terminal.bar(_STAGE, config.tuning.steps) as bar:

        def log(values: dict[str, float]) -> None:
            store.add_metrics(_STAGE, values)
            shown = {"loss": values.get("loss"), "held-out loss": values.get("held_out_loss")}
            bar.say(", ".join(f"{name} {value:.3f}" for name, value in shown.items() if value is not None))
            if values["step"]:
                bar.advance()

        def resumed(step: int) -> None:
            # Without a checkpoint, the measurement before the first step is repeated as well.
            store.keep_metrics(_STAGE, step or -1)
            bar.advance(step)

        measured = tune_on_documents(
            backbone,
            _ROLE,
            rows.rows,
            config.tuning,
            lambda optimizers: Checkpoints(
                folder, backbone, [_ROLE], optimizers, metrics=[store.metrics_path(_STAGE)], check=store.check_writable
            ),
            seed=config.seed,
            batch_tokens=config.backbone.batch_tokens,
            log=log,
            resumed=resumed,
            held_out=rows.held_out,
        )
    if measured is not None:
        _say_if_worse(context.terminal, measured)
    facts = by_first(context.processes, "facts of the tuning", lambda: _facts(store.read_metrics(_STAGE), rows, measured))
    if vocabulary is not None:
        with context.terminal.waiting("measuring the effect of the new tokens"):
            facts["vocabulary"] = vocabulary.effect(backbone, _ROLE, rows.held_out, config.backbone.batch_tokens, rows.clusters)
    # Weights and facts in one rename: `tune` takes an existing folder for a finished training.
    with context.writing_role(_ROLE) as written:
        save_role(backbone, _ROLE, written)
        write_json(written / TUNING, facts)
    return facts


def _say_if_worse(terminal: Terminal, measured: HeldOutLoss) -> None:
    assert measured.before is not None
    assert measured.best is not None
    step, loss = measured.best
    if loss >= measured.before:
        terminal.note(
            f"the held-out loss was lowest before training: {measured.before:.3f} nats per token, and {loss:.3f} after step "
            f"{step}, whose weights are written. The tuned model predicts held-out replies worse than its base; lower "
            "tuning.learning_rate or tuning.steps, or add data"
        )


def _facts(lines: Sequence[dict[str, float]], rows: TuningRows, measured: HeldOutLoss | None) -> dict[str, Any]:
    """Return the facts of the tuning that are written to the model folder."""
    steps = [line for line in lines if line["step"]]
    losses, tenth = [line["loss"] for line in steps], max(1, len(steps) // 10)
    facts = {
        "kind": rows.kind,
        "steps": int(steps[-1]["step"]),
        "rows": len(rows.rows),
        "length": rows.length,
        "tokens": int(sum(line["tokens"] for line in steps)),
        "loss_start": round(fmean(losses[:tenth]), 4),
        "loss_end": round(fmean(losses[-tenth:]), 4),
        "text": rows.digest,
        **rows.facts,
    }
    if measured is None or measured.before is None or measured.best is None:
        return facts
    step, loss = measured.best
    return {**facts, "held_out_loss_before": round(measured.before, 4), "held_out_loss": round(loss, 4), "best_step": step}
