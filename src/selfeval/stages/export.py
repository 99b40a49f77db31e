"""Exports a trained role as a folder for other tools: weights, tokenizer, prompts, and a README that says how to use them.

The folder appears whole or not at all, and only after what was written was loaded again and compared with the role.
"""

from __future__ import annotations

import copy
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined

from selfeval import __version__
from selfeval.backbone.export import Agreement, Layout, write_adapter, write_merged
from selfeval.backbone.merging import classifier_class, padding_tokenizer
from selfeval.backbone.precision import DTYPES
from selfeval.backbone.roles import Backbone
from selfeval.config import PlacementConfig, RunConfig
from selfeval.errors import ExportError, RunFolderError
from selfeval.judging.dialogue import dialogue_tokenizer
from selfeval.judging.templates import Templates
from selfeval.links import entries, refuse_links
from selfeval.stages.context import as_begun
from selfeval.stages.policy import GUIDE
from selfeval.stages.prompts import copy_templates, templates_of_run
from selfeval.stages.terminal import Terminal
from selfeval.store import check_files, read_json, read_run, write_json, writing

__all__ = ["MERGED_PRECISIONS", "TUNING", "Exported", "export_role", "find_role", "free_folder"]

TUNING = "tuning.json"
"""File in the folder of a role that was tuned on text: the facts of the tuning."""

MERGED_PRECISIONS: Mapping[str, torch.dtype | None] = {"base": None, **DTYPES}
"""Of merged weights; `base` keeps each in the precision in which the run held it."""

_MESSAGES = (
    ("Tom has 3 pens.\nHe buys 2 more. How many pens has he now?", "3 + 2 = 5\n\nThe answer is 5.", "He has 5 pens."),
    ("Wie heißt „Straße“ auf Französisch? 😀", "« rue »", "rue"),
)
"""Questions, replies and workings with lines, signs and letters on which a chat template has to make the evaluator's ids."""


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        role: its full name.
        agreement: how closely the merged folder agrees with the role; None for an adapter, whose weights are the role's own.
        dialogue: the tokenizer's chat template is the evaluator's prompt.
        own_tokenizer: it is one that transformers does not have; `AutoTokenizer` cannot load it, `family_tokenizer` does.
    """

    folder: Path
    role: str
    layout: Layout
    agreement: Agreement | None
    dialogue: bool
    own_tokenizer: bool


def find_role(folder: Path, wanted: str) -> str:
    """The full name of a role of the run; `evaluator` means `evaluator-0` where there is one evaluator.

    Raises:
        RunFolderError: no role is trained yet.
        ExportError: there is no such role, or several; names those there are.
    """
    there = sorted(path.parent.name for path in (folder / "roles").glob("*/role.json"))
    if not there:
        raise RunFolderError(f"{folder} has no trained role yet; `selfeval run` trains the evaluator and the policy")
    members = [name for name in there if re.fullmatch(rf"{re.escape(wanted)}-\d+", name)]
    if wanted in there or len(members) == 1:
        return wanted if wanted in there else members[0]
    if members:
        raise ExportError(f'{folder} has {len(members)} roles called "{wanted}": {", ".join(members)}; give one of them')
    raise ExportError(f'{folder} has no role "{wanted}"; its roles: {", ".join(there)}')


def export_role(
    config: RunConfig,
    folder: Path,
    role: str,
    target: Path,
    *,
    merge: bool,
    precision: str,
    terminal: Terminal,
    trust_remote_code: bool = False,
) -> Exported:
    """Writes a role of a run to a folder of its own.

    Args:
        config: of the run; the base is loaded on the CPU in the run's precision.
        folder: of the run; only read.
        role: see `find_role`.
        target: the new folder; it may exist if it is empty.
        merge: a whole model instead of an adapter.
        precision: one of `MERGED_PRECISIONS`, of merged weights.
        terminal: shows what is waited for.
        trust_remote_code: run code that comes with the base.

    Raises:
        ExportError: the target holds something, there is no such role, or it cannot be exported as asked.
        RunFolderError: the role was trained on another base, or a file of it is damaged.
        StorageError: the disk is full or cannot be written; nothing stands at the target then.
    """
    name = find_role(folder, role)
    _refuse_links(folder, name, Path(config.model))
    check_files(folder, [folder / "roles" / name])
    _refuse_guided(folder / "roles" / name)
    target = free_folder(target)
    with terminal.waiting(f"loading {config.model}"):
        backbone = Backbone.load(_as_in_the_run(config, folder), trust_remote_code=trust_remote_code)
        backbone.load_role(name, folder / "roles" / name)
        templates = templates_of_run(folder, backbone.loaded.tokenizer)
    with terminal.waiting(f"writing {name}"), writing(target) as part:
        copy_templates(folder, part / "templates")
        tokenizer, dialogue = _write_tokenizer(backbone, name, templates, part)
        agreement: Agreement | None = None
        if merge:
            layout, agreement = write_merged(backbone, name, part, tokenizer, MERGED_PRECISIONS[precision])
        else:
            layout = write_adapter(backbone, name, part, config.model)
        own = type(tokenizer).__module__.startswith("selfeval.")
        exported = Exported(target, name, layout, agreement, dialogue, own)
        _describe(exported, config, backbone, templates, tokenizer, folder / "roles" / name, part)
    return exported


_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
"""Weights of a base are often links to another disk; they are written from the loaded model and never copied."""


def _refuse_links(run: Path, role: str, model: Path) -> None:
    """Refuse links that would bring a file from elsewhere on this disk into a folder that is made to be published.

    Raises:
        ExportError: a file of the run or of the model folder is one.
    """
    folder = run / "roles" / role
    refuse_links(run, [run / "run.json", run / "report.json", run / "roles", folder, *entries(folder)], ExportError)
    if model.is_dir():
        refuse_links(model, [path for path in entries(model) if path.suffix not in _WEIGHTS], ExportError)


def _refuse_guided(role_folder: Path) -> None:
    """A policy that a value learner left alone has no weights to give away: it would be exported as it was at its start."""
    if (role_folder / GUIDE).is_file():
        guides = ", ".join(read_json(role_folder / GUIDE)["roles"])
        raise ExportError(
            f"the policy of this run has its first weights; {guides} guide it while it samples, and no folder of weights says "
            "what they say together. Train it with a learner that changes weights (policy.learner), or export one of the guides"
        )


def free_folder(target: Path) -> Path:
    """The whole path of a folder that may be written.

    Raises:
        ExportError: it holds something, or is a file.
    """
    target = Path(os.path.abspath(target))  # Path.resolve raises at a loop of links
    if target.is_dir() and any(target.iterdir()):
        raise ExportError(
            f"{target} exists and is not empty, and nothing is overwritten; give --to a folder that is new or empty"
        )
    if target.exists() and not target.is_dir():
        raise ExportError(f"{target} is a file; give --to a folder that is new or empty")
    return target


def _as_in_the_run(config: RunConfig, folder: Path) -> RunConfig:
    """The configuration with the precision that the run had, whole on the CPU whatever devices it had."""
    begun = as_begun(config, read_run(folder))
    context = config.context.model_copy(update={"attention": "auto"})
    return begun.model_copy(update={"device": "cpu", "placement": PlacementConfig(mode="single"), "context": context})


def _write_tokenizer(backbone: Backbone, role: str, templates: Templates, part: Path) -> tuple[Any, bool]:
    """The tokenizer; for a classifier, with a padding token that ends nothing and the evaluator's chat template."""
    scores = role in backbone.heads and classifier_class(backbone.model.config) is not None
    tokenizer: Any = padding_tokenizer(backbone.loaded) if scores else copy.copy(backbone.loaded.tokenizer)
    tokenizer.chat_template = templates.tokenizer.chat_template  # the run's, which may not be the base's of today
    if backbone.loaded.stretch:  # tools cut texts there
        tokenizer.model_max_length = max(tokenizer.model_max_length, backbone.loaded.stretch.reach)
    dialogue = None
    if scores:
        dialogue = dialogue_tokenizer(templates, tokenizer, backbone.loaded.eos_ids[:1], _MESSAGES)
        tokenizer = dialogue or tokenizer
    tokenizer.save_pretrained(part)
    return tokenizer, dialogue is not None


def _describe(
    exported: Exported,
    config: RunConfig,
    backbone: Backbone,
    templates: Templates,
    tokenizer: Any,
    role_folder: Path,
    part: Path,
) -> None:
    """export.json and README.md; of an evaluator that stays a role, evaluator.json too."""
    origin = read_json(role_folder / "role.json")
    calibration = role_folder / "evaluator.json"
    temperature = float(read_json(calibration)["temperature"]) if calibration.is_file() else None
    if exported.agreement is None and calibration.is_file():
        shutil.copy(calibration, part)
    tuning = role_folder / TUNING
    head = backbone.heads.get(exported.role)
    facts = {
        "role": exported.role,
        "run": config.name,
        "layout": exported.layout,
        "base": config.model,
        "fingerprint": origin["base_fingerprint"],
        "positions": str(backbone.loaded.stretch) if backbone.loaded.stretch else None,
        "agreement": exported.agreement and asdict(exported.agreement),
        "tuning": read_json(tuning) if tuning.is_file() else None,
        "temperature": temperature,
        "bias": None if head is None else round(float(head.bias.detach()), 6),
        "pad": None if head is None else tokenizer.pad_token,
        "dialogue": exported.dialogue,
        "own_tokenizer": exported.own_tokenizer,
        "working": templates.grades_with_working,
        "version": __version__,
    }
    write_json(part / "export.json", facts)
    shown = {
        **facts,
        "scores": head is not None,
        "chat": templates.uses_chat,
        "end": list(backbone.loaded.eos_ids[:1]),
        "added": "model.config.score_bias" if exported.layout == "classifier" else facts["bias"],
        "lora": config.lora.model_dump(mode="json"),
        "context": config.context.model_dump(mode="json", include={"rope_scaling", "rope_factor"}),
        "max_new_tokens": config.replies.max_new_tokens,
    }
    (part / "README.md").write_text(_card(shown), encoding="utf-8")


def _card(facts: Mapping[str, Any]) -> str:
    environment = Environment(
        loader=PackageLoader("selfeval.stages", "."), undefined=StrictUndefined, autoescape=False, keep_trailing_newline=True
    )
    environment.filters["python"] = repr
    return environment.get_template("card.md.jinja").render(facts)
