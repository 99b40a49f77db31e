"""Tune an adapter on the user's text and write it, merged into the base, as a model folder: `selfeval tune`.

This is not a stage of a run; a run starts from the folder that it writes. Until that folder exists, the work is next to it in
OUT.tuning, a run folder with one role, so checkpoints, resuming and exporting work as in any run. Not supported: `dynamic`
RoPE scaling, which config.json cannot express.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from operator import attrgetter, getitem
from pathlib import Path
from statistics import fmean
from typing import Any

from selfeval.backbone.fingerprint import base_fingerprint
from selfeval.backbone.load import LoadedModel
from selfeval.backbone.role_files import save_role
from selfeval.config import BackboneConfig, RunConfig
from selfeval.errors import ConfigError, RunFolderError, TextError
from selfeval.runs.export import TUNING, Exported, export_role, free_folder
from selfeval.stages.context import Context
from selfeval.stages.preflight import check_base
from selfeval.stages.prompts import keep_templates, load_templates
from selfeval.stages.terminal import Terminal
from selfeval.store import Changed, Expected, Ledger, RunStore, fingerprint, read_object, read_run, write_json, writing
from selfeval.texts import Line, json_lines, read_text, shortened
from selfeval.training.checkpoint import Checkpoints
from selfeval.training.sft import pack, tune_on_text

__all__ = ["Tuned", "check_settings", "read_texts", "tune"]

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
_EXAMPLE = '{"text": "..."}'
_LARGEST = 1 << 30
"""Maximum size of a text file in bytes; the whole text is held in memory, as characters and as tokens."""

Rows = list[tuple[int, ...]]


@dataclass(frozen=True)
class Tuned:
    """The result of tuning.

    Attributes:
        exported: the model folder.
        facts: steps, rows, tokens per row, tokens read; loss in nats per token at the start and the end, each the mean over a
            tenth of the steps.
    """

    exported: Exported
    facts: dict[str, Any]


def check_settings(config: RunConfig) -> None:
    """Refuse settings that tuning does not use, and RoPE scaling that config.json cannot express.

    Raises:
        ConfigError: there is such a setting.
    """
    default = RunConfig()
    values = ((name, attrgetter(name)) for name in _SETTINGS if name not in _READ)
    unread = [name for name, value in values if value(config) != value(default)]
    if unread:
        raise ConfigError(f"tuning does not use {', '.join(unread)}; allowed: {', '.join(_READ)}")
    if config.backbone.context.rope_scaling == "dynamic" and config.backbone.context.rope_factor > 1.0:
        raise ConfigError(
            "backbone.context.rope_scaling = dynamic recomputes the angles in each forward pass, which the config.json of a "
            "tuned model cannot express; use yarn or linear"
        )


def tune(
    config: RunConfig,
    texts: Sequence[Path],
    target: Path,
    length: int | None,
    terminal: Terminal,
    *,
    trust_remote_code: bool = False,
) -> Tuned:
    """Tune an adapter on text and write base and adapter as one model folder. A second call resumes.

    Args:
        config: model, backbone and tuning; see `check_settings`.
        texts: paths; see `read_texts`.
        target: the new folder; it may exist if it is empty.
        length: Optional. Tokens per row. Default: the model's whole context, after RoPE scaling.
        terminal: shows progress.
        trust_remote_code: run code that comes with the model. Default: False.

    Raises:
        TextError: the text cannot be read or is too short, or the length does not fit the model.
        ConfigError: see `check_settings`.
        ModelError: the base cannot be loaded, or its context cannot be extended.
        ExportError: the target is not empty, or the written model disagrees with the adapter.
        RunFolderError: another process tunes to this target, or OUT.tuning holds something else.
        LoopError: the loss is not finite.
    """
    check_settings(config)
    target = free_folder(target)
    documents = read_texts(texts)
    check_base(config, trust_remote_code=trust_remote_code)  # fail before a folder is created, not after the training
    with _workplace(target) as store:
        store.update_run(kind=_STAGE, name=config.name, config=config.model_dump(mode="json"))
        context = Context(config, store, terminal, trust_remote_code=trust_remote_code)
        rows = _rows(context, documents, length)
        # After the rows are known, because their content is part of the key.
        _set_others_aside(context, rows)
        # It exists if an earlier call trained it and was killed during the export.
        if not context.role_folder(_ROLE).is_dir():
            _train(context, rows)
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
        )
    # Only after the export succeeded: until then, a second call resumes from this folder.
    shutil.rmtree(store.root)
    return Tuned(exported, facts)


@contextmanager
def _workplace(target: Path) -> Iterator[RunStore]:
    """Open and lock the working folder next to the target; remove it on an error if nothing was done yet."""
    folder = target.with_name(f"{target.name}.tuning")
    begun = (".lock", ".run.json.part")
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
        if not any((folder / name).exists() for name in ("checkpoints", "roles", "replaced")):
            shutil.rmtree(folder)  # nothing was done yet
        raise
    finally:
        store.close()


# -- text ---------------------------------------------------------------------------------------------------------------


def read_texts(paths: Sequence[Path]) -> list[str]:
    """Read the documents in files: each line's `text` in `.jsonl` and `.json` files, the whole content of any other file.

    Raises:
        TextError: a file is missing, empty, not UTF-8, or has a line without a `text`; the message quotes the line.
    """
    return [document for path in paths for document in _read_text(path)]


def _read_text(path: Path) -> list[str]:
    text = read_text(path, "text", TextError, most=_LARGEST, remedy=f"use plain text, or JSON lines ({_EXAMPLE}) named .jsonl")
    documents = [text]
    if path.suffix in (".jsonl", ".json"):
        documents = [_document(path, line) for line in json_lines(text, str(path), TextError, _EXAMPLE)]
    found = [document for document in documents if document.strip()]
    if not found:
        raise TextError(f"text {path} is empty; use plain text, or JSON lines ({_EXAMPLE})")
    return found


def _document(path: Path, line: Line) -> str:
    number, values = line
    text = values.get("text")
    if not isinstance(text, str):
        shown = shortened(json.dumps(values, ensure_ascii=False))
        raise TextError(f'{path}, line {number}: missing or empty "text"; got {shown}; write one {_EXAMPLE} per line')
    return text


def _rows(context: Context, documents: Sequence[str], length: int | None) -> Rows:
    """Pack the documents into rows of tokens; the remainder is dropped."""
    loaded = context.backbone.loaded
    row = _row_length(loaded, length)
    with context.terminal.waiting("reading the text"):
        encoded = [_encode(loaded.tokenizer, document) for document in documents]
    rows = pack(encoded, row)
    tokens = sum(map(len, encoded))
    if not rows:
        raise TextError(f"the text has {tokens:,} tokens, fewer than one row of {row:,}; add text, or lower --length")
    steps = context.config.tuning
    context.terminal.note(
        f"{len(rows):,} rows of {row:,} tokens, {tokens - len(rows) * row:,} tokens left over; "
        f"{steps.steps * steps.batch / len(rows):.2g} epochs"
    )
    return rows


def _row_length(loaded: LoadedModel, wanted: int | None) -> int:
    context = loaded.context_length
    if wanted is None and context is None:
        raise TextError("this model's config has no context length; set the tokens per row with --length")
    if wanted is not None and context is not None and wanted > context:
        raise TextError(
            f"--length {wanted:,} is more than this model's context of {context:,} tokens; lower it, or extend the context: "
            "--set backbone.context.rope_scaling=yarn --set backbone.context.rope_factor=N"
        )
    return wanted or context or 0


def _encode(tokenizer: Any, document: str) -> list[int]:
    """Encode a document with the tokenizer's start tokens and an end token, which separate it from its neighbours."""
    ids = [int(i) for i in tokenizer.encode(document)]
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, int(end)]


# -- tuning -------------------------------------------------------------------------------------------------------------


def _set_others_aside(context: Context, rows: Rows) -> None:
    """Set aside work that was begun with another model, other settings or another text, instead of resuming it."""
    store, config, loaded = context.store, context.config.model_dump(mode="json"), context.backbone.loaded
    deciding = {name: reduce(getitem, name.split("."), config) for name in _DECIDING}
    key = fingerprint([base_fingerprint(loaded), loaded.precision, deciding, _digest(rows)])
    owned = [context.role_folder(_ROLE), context.checkpoint_folder(_STAGE), store.metrics_path(_STAGE)]
    state = Ledger(store.root, {_STAGE: Expected(key, owned=owned)}).state(_STAGE)
    if isinstance(state, Changed):
        store.set_aside(_STAGE, owned)
        context.terminal.note(
            "tuning: an earlier attempt used another model, other settings or another text, so training starts from scratch; "
            f"until it finishes, the earlier work is kept in {store.root / 'replaced'}"
        )
    store.begin(_STAGE, key)


def _digest(rows: Rows) -> str:
    # All rows have this length, so it separates them; the ids alone would not tell where a row ends.
    found = hashlib.sha256(str(len(rows[0])).encode())
    for row in rows:
        found.update(array("q", row).tobytes())
    return found.hexdigest()[:16]


def _train(context: Context, rows: Rows) -> None:
    """Train the adapter from its last checkpoint, if there is one, and save it with the facts."""
    config, backbone, store = context.config, context.backbone, context.store
    backbone.roles.add(_ROLE, seed=context.seed("role", _ROLE) % 2**31)
    folder = context.checkpoint_folder(_STAGE)
    with context.terminal.bar(_STAGE, config.tuning.steps) as bar:

        def log(values: dict[str, float]) -> None:
            store.add_metrics(_STAGE, values)
            bar.say(f"loss {values['loss']:.3f}")
            bar.advance()

        def resumed(step: int) -> None:
            store.keep_metrics(_STAGE, step)
            bar.advance(step)

        tune_on_text(
            backbone,
            _ROLE,
            rows,
            config.tuning,
            lambda optimizers: Checkpoints(folder, backbone, [_ROLE], optimizers, metrics=[store.metrics_path(_STAGE)]),
            seed=config.seed,
            batch_tokens=config.backbone.batch_tokens,
            log=log,
            resumed=resumed,
        )
    # Weights and facts in one rename: `tune` takes an existing folder for a finished training.
    with writing(context.role_folder(_ROLE)) as written:
        save_role(backbone, _ROLE, written)
        write_json(written / TUNING, _facts(store.read_metrics(_STAGE), rows))


def _facts(lines: Sequence[dict[str, float]], rows: Rows) -> dict[str, Any]:
    """Return the facts of the tuning that are written to the model folder."""
    losses, tenth = [line["loss"] for line in lines], max(1, len(lines) // 10)
    return {
        "steps": int(lines[-1]["step"]),
        "rows": len(rows),
        "length": len(rows[0]),
        "tokens": int(sum(line["tokens"] for line in lines)),
        "loss_start": round(fmean(losses[:tenth]), 4),
        "loss_end": round(fmean(losses[-tenth:]), 4),
        "text": _digest(rows),
    }
