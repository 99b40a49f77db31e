"""Export a trained role as a folder for other tools: weights, tokenizer, prompts, and a model card with instructions.

The folder appears atomically, and only after the written files were reloaded and compared with the role.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from selfeval import __version__
from selfeval.backbone.adapters import BASE
from selfeval.backbone.export import Agreement, Layout, write_adapter, write_merged
from selfeval.backbone.merging import refuse_pooled
from selfeval.backbone.precision import DTYPES
from selfeval.backbone.role_files import load_role, pooling_of
from selfeval.backbone.roles import Backbone
from selfeval.config import LEARNERS, BackboneConfig, PlacementConfig, RunConfig
from selfeval.errors import ExportError, RunFolderError
from selfeval.judging.templates import Templates
from selfeval.links import entries, refuse_links
from selfeval.runs.card import BaseModel, card_text, find_base
from selfeval.runs.export_folder import free_folder
from selfeval.runs.export_tokenizers import Tokenizers, pick_tokenizers
from selfeval.runs.members import EVALUATOR_FILE, reads_reference
from selfeval.runs.policy import GUIDE
from selfeval.runs.reader import backbone_config
from selfeval.runs.reply_limit import LIMIT_FILE, reply_limit
from selfeval.runs.templates import copy_templates, templates_of_run
from selfeval.store import as_storage_error, check_files, read_json, read_object, read_run, write_json, writing

__all__ = ["MERGED_PRECISIONS", "TUNING", "Exported", "export_role", "find_role"]

TUNING = "tuning.json"
"""File in the folder of a role that was tuned on text: the facts of the tuning."""

MERGED_PRECISIONS: Mapping[str, torch.dtype | None] = {"base": None, **DTYPES}
"""Precisions of merged weights; `base` keeps each weight in the precision of the run."""


Waiting = Callable[[str], AbstractContextManager[object]]


@dataclass(frozen=True)
class Exported:
    """An exported folder.

    Attributes:
        role: its full name.
        agreement: how closely the merged folder agrees with the role; None for an adapter, whose weights are copied unchanged.
        tokenizers: the tokenizers that were saved.
        base: public identity of the base.
    """

    folder: Path
    role: str
    layout: Layout
    agreement: Agreement | None
    tokenizers: Tokenizers
    base: BaseModel


def find_role(folder: Path, wanted: str) -> str:
    """Return the full name of a role of the run; `evaluator` means `evaluator-0` if there is one evaluator.

    Raises:
        RunFolderError: no role is trained yet.
        ExportError: there is no such role, or several; the message lists the existing ones.
    """
    there = sorted(path.parent.name for path in (folder / "roles").glob("*/role.json"))
    if not there:
        raise RunFolderError(f"{folder} has no trained role yet; `selfeval run` trains the evaluator and the policy")
    members = [name for name in there if re.fullmatch(rf"{re.escape(wanted)}-\d+", name)]
    if wanted in there or len(members) == 1:
        return wanted if wanted in there else members[0]
    if members:
        raise ExportError(f'{folder} has {len(members)} roles called "{wanted}": {", ".join(members)}; pass one of them')
    raise ExportError(f'{folder} has no role "{wanted}"; its roles: {", ".join(there)}')


def export_role(
    config: RunConfig,
    folder: Path,
    role: str,
    target: Path,
    *,
    merge: bool,
    precision: str,
    waiting: Waiting = nullcontext,
    trust_remote_code: bool = False,
    base_id: str | None = None,
) -> Exported:
    """Write a role of a run to a new folder.

    Args:
        config: configuration of the run; the base is loaded on the CPU in the run's precision.
        folder: folder of the run; only read.
        role: see `find_role`.
        target: the new folder; it may exist if it is empty.
        merge: write a whole model instead of an adapter.
        precision: precision of merged weights, one of `MERGED_PRECISIONS`.
        waiting: called with the name of a long step, returns a context manager that shows it. Default: shows nothing.
        trust_remote_code: run code that comes with the base. Default: False.
        base_id: Optional. Hub id of the base, for the model card and the adapter's config, if the run used a local copy.

    Raises:
        ExportError: the target is not empty, there is no such role, or it cannot be exported as requested.
        RunFolderError: the role was trained on another base, or one of its files is damaged.
        StorageError: the disk is full or not writable; nothing is left at the target.
    """
    # All cheap refusals come before the base is loaded.
    name = find_role(folder, role)
    _refuse_links(folder, name, Path(config.model))
    check_files(folder, [folder / "roles" / name])
    _refuse_guided(folder / "roles" / name)
    if merge:
        _refuse_pooled(folder / "roles" / name)
    target = free_folder(target)
    base = find_base(config.model, base_id)
    with _locked(target):
        return _export(config, folder, name, target, base, merge, precision, waiting, trust_remote_code)


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Lock the target: two exports would write to the same temporary folder next to it.

    Raises:
        ExportError: another process is exporting to it.
        StorageError: the lock file cannot be written.
    """
    path = target.with_name(f".{target.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        held = _lock_file(path)
    except BlockingIOError as error:
        raise ExportError(f"another process is exporting to {target}; wait for it, or pass another folder to --to") from error
    except OSError as error:
        raise as_storage_error(target, error) from error
    try:
        yield
    finally:
        # While it is locked: `_lock_file` notices that the file is gone, so no process takes a removed lock for the lock.
        path.unlink(missing_ok=True)
        os.close(held)


def _lock_file(path: Path) -> int:
    """Create and lock a file that its owner removes, and return its descriptor. Not every version of filelock can do this.

    Raises:
        BlockingIOError: another process has locked it.
    """
    while True:
        opened = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(opened), os.stat(path)):
                return opened
        except FileNotFoundError:
            pass  # it is removed
        except BaseException:
            os.close(opened)
            raise
        # Its owner removed it after this process had opened it.
        os.close(opened)


def _export(
    config: RunConfig,
    folder: Path,
    name: str,
    target: Path,
    base: BaseModel,
    merge: bool,
    precision: str,
    waiting: Waiting,
    trust_remote_code: bool,
) -> Exported:
    with waiting(f"loading {config.model}"):
        backbone = Backbone.load(config.model, _as_in_the_run(config, folder), trust_remote_code=trust_remote_code)
        load_role(backbone, name, folder / "roles" / name)
        templates = templates_of_run(folder, backbone.loaded.tokenizer, config.verdicts)
    # Everything is written to a temporary folder: an error, or weights that disagree, leave nothing at the target.
    with waiting(f"writing {name}"), writing(target, new=True) as part:
        copy_templates(folder, part / "templates")
        if _reads_no_reference(folder / "roles" / name):
            templates = templates.without_reference_answer()
            _show_no_reference(part / "templates" / "templates.toml")
        # Unmerged, an evaluator of an earlier layer fits no class of PEFT or transformers; neither does one of a mean.
        is_plain = name not in backbone.roles.depths and name not in backbone.roles.poolings
        tokenizers = pick_tokenizers(backbone, name, templates, dialogue=merge or is_plain)
        source = base.hub_id or config.model
        layout, agreement = _write_weights(backbone, name, part, tokenizers, source, MERGED_PRECISIONS[precision], merge)
        exported = Exported(target, name, layout, agreement, tokenizers, base)
        _describe(exported, config, backbone, templates, base, folder, part)
    return exported


def _reads_no_reference(role_folder: Path) -> bool:
    """Return whether this is an evaluator whose prompt has no reference answer, although the template shows one."""
    return (role_folder / EVALUATOR_FILE).is_file() and not reads_reference(role_folder)


def _show_no_reference(settings: Path) -> None:
    """Make exported templates those of an evaluator that reads no reference answer."""
    text = settings.read_text(encoding="utf-8")
    shown = re.sub(r"(?m)^(\s*grade_reference_answer\s*=\s*)true\b", r"\1false", text)
    if tomllib.loads(shown).get("grade_reference_answer"):
        raise ExportError(
            f"{settings.name} of the run sets grade_reference_answer in another form than grade_reference_answer = true, and "
            "the export has to turn it off; write it in this form, and rerun the stages"
        )
    settings.write_text(shown, encoding="utf-8")


_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
"""Weight files of a base. They are often links to another disk; weights are written from the loaded model, never copied."""


def _refuse_links(run: Path, role: str, model: Path) -> None:
    """Refuse links that would copy a file from elsewhere on this disk into a folder that is meant to be published.

    Raises:
        ExportError: a file of the run or of the model folder is such a link.
    """
    folder = run / "roles" / role
    refuse_links(run, [run / "run.json", run / "report.json", run / "roles", folder, *entries(folder)], ExportError)
    if (model / "config.json").is_file():  # a model made in memory has the name "", which is the current folder
        refuse_links(model, [path for path in entries(model) if path.suffix not in _WEIGHTS], ExportError)


def _refuse_guided(role_folder: Path) -> None:
    """Refuse a policy that is guided by value roles: its weights are unchanged, so the export would be the initial policy."""
    if (role_folder / GUIDE).is_file():
        guides = ", ".join(read_json(role_folder / GUIDE)["roles"])
        raise ExportError(
            f"the policy of this run has its initial weights: {guides} guide its sampling, which cannot be exported as "
            f"weights. Train it with a learner that changes the weights ({', '.join(_trainers())}), or export one of "
            "the guides"
        )


def _refuse_pooled(role_folder: Path) -> None:
    """Refuse to merge an evaluator that scores the mean over the reply."""
    refuse_pooled(role_folder.name, pooling_of(read_object(role_folder / "role.json"), role_folder))


def _trainers() -> list[str]:
    return [name for name, spec in LEARNERS.items() if spec.changes_policy]


def _as_in_the_run(config: RunConfig, folder: Path) -> BackboneConfig:
    """Return settings that load the base on the CPU in the precision of the run."""
    begun = backbone_config(config, read_run(folder))
    # An attention kernel chosen for a GPU may not exist on the CPU.
    context = begun.context.model_copy(update={"attention": "auto"})
    return begun.model_copy(update={"device": "cpu", "placement": PlacementConfig(mode="single"), "context": context})


def _write_weights(
    backbone: Backbone, role: str, part: Path, tokenizers: Tokenizers, base: str, dtype: torch.dtype | None, merge: bool
) -> tuple[Layout, Agreement | None]:
    """Write the role; for a merged evaluator that reads reference answers, also the base; reward.py if it can score."""
    tokenizers.save(part)
    agreement: Agreement | None = None
    if merge:
        layout, agreement = write_merged(backbone, role, part, tokenizers.main, dtype)
        if tokenizers.asking is not None:
            # A merged evaluator is a classifier and cannot write; its reference answers need the base.
            write_merged(backbone, BASE, part / "reference", tokenizers.asking)
    else:
        layout = write_adapter(backbone, role, part, base)
    if tokenizers.dialogue:
        shutil.copyfile(Path(__file__).with_name("reward.py"), part / "reward.py")
    return layout, agreement


def _reply_limit(config: RunConfig, run: Path) -> int:
    # A folder of `selfeval tune` has no replies, so nothing decided a limit.
    return reply_limit(config.replies, run) if (run / LIMIT_FILE).is_file() else config.replies.longest


def _describe(
    exported: Exported, config: RunConfig, backbone: Backbone, templates: Templates, base: BaseModel, run: Path, part: Path
) -> None:
    """Write export.json and README.md; for the adapter of an evaluator, also evaluator.json."""
    role_folder, head = run / "roles" / exported.role, backbone.roles.heads.get(exported.role)
    calibration = read_json(role_folder / EVALUATOR_FILE) if (role_folder / EVALUATOR_FILE).is_file() else None
    if exported.agreement is None and calibration is not None:
        write_json(part / EVALUATOR_FILE, calibration)
    # Only the first member's file has one. In an ensemble it belongs to the combined score, not to that of a member.
    temperature = None if calibration is None or config.evaluator.members > 1 else float(calibration["temperature"])
    tokenizers = exported.tokenizers
    facts = {
        "role": exported.role,
        "run": config.name,
        "layout": exported.layout,
        "base": base.name,
        "base_revision": base.revision,
        "fingerprint": read_json(role_folder / "role.json")["base_fingerprint"],
        "precision": backbone.loaded.precision,
        "positions": str(backbone.loaded.stretch) if backbone.loaded.stretch else None,
        "agreement": exported.agreement and asdict(exported.agreement),
        "tuning": read_json(role_folder / TUNING) if (role_folder / TUNING).is_file() else None,
        "temperature": temperature,
        "temperature_pairs": 0 if temperature is None or calibration is None else int(calibration.get("temperature_pairs", 0)),
        "layer": backbone.roles.depths.get(exported.role),
        "rank": backbone.roles.ranks.get(exported.role),
        "pooling": backbone.roles.poolings.get(exported.role, "last"),
        "bias": None if head is None else round(float(head.bias.detach()), 6),
        "pad": None if head is None else tokenizers.main.pad_token,
        "dialogue": tokenizers.dialogue,
        "chat_template": tokenizers.chat_template,
        "own_tokenizer": tokenizers.own,
        "reference_answer": templates.grades_with_reference_answer,
        "reply_prompt": tokenizers.around_question,
        "control": list(templates.control.texts),
        "end": list(backbone.loaded.eos_ids),
        "thinking_ends": list(templates.thinking_ends),
        "max_new_tokens": _reply_limit(config, run) + (config.replies.max_thinking_tokens or 0),
        "version": __version__,
    }
    write_json(part / "export.json", facts)
    shown = {
        "scores": head is not None,
        "chat": templates.uses_chat,
        "arguments": {name: json.dumps(value, ensure_ascii=False) for name, value in config.chat.arguments.items()},
        "end": list(backbone.loaded.eos_ids[:1]),
        "added": "model.config.score_bias" if exported.layout == "classifier" else facts["bias"],
        "reasoning_ends": " or ".join(f"`{end}`" for end in templates.thinking_ends),
        "lora": config.backbone.lora.model_dump(mode="json"),
        # The data that the user provided in place of generated ones.
        "given": next((kind for kind in ("pairs", "replies", "questions") if getattr(config, kind).file), None),
        "context": config.backbone.context.model_dump(mode="json", include={"rope_scaling", "rope_factor"}),
    }
    (part / "README.md").write_text(card_text(facts, shown, base, run), encoding="utf-8")
