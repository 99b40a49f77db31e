"""Writes a role as a folder that other tools load, and reads it back to see that it computes what the role computes.

Merged, a role without a head is an ordinary language model and one with a head a sequence classifier. Not merged, it is a PEFT
adapter folder; with a head it is in PEFT's layout for sequence classification where the family has such a class, so
`AutoPeftModelForSequenceClassification` finds the head. The head is always saved to a separate file as well.

Shapes: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from selfeval.backbone.merging import (
    classifier_class,
    is_quantised,
    merged_classifier,
    merged_language_model,
    plain_config,
)
from selfeval.backbone.role_files import save_role, seal_role
from selfeval.backbone.roles import Backbone
from selfeval.backbone.sequences import Sequences, final_scores, pad_sequences
from selfeval.errors import ExportError, RoleError
from selfeval.prompt import Prompt
from selfeval.store import read_json, write_json

__all__ = ["Agreement", "Layout", "write_adapter", "write_merged"]

Layout = Literal["language model", "classifier", "adapter", "classifier adapter", "adapter and head"]

_SHARD = "5GB"
_PROBE_LENGTHS = (12, 8, 5, 3)
_EXACT, _ROUNDED = 1e-4, 0.1
"""Allowed difference between what was written and the role, as a share of the largest score or logit (but at least 1)."""


@dataclass(frozen=True)
class Agreement:
    """How closely a folder, loaded again, says what the role says on a few sequences.

    Attributes:
        compared: `scores` or `logits`.
        difference: the largest, in their units.
        largest: absolute score or logit of the role.
        precision: of the written weights, as config.json names it.
    """

    compared: str
    difference: float
    largest: float
    precision: str


def write_merged(
    backbone: Backbone, role: str, folder: Path, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype | None = None
) -> tuple[Layout, Agreement]:
    """Write the role merged into its base, as sharded safetensors, and load the result to compare it with the role.

    Args:
        backbone: is not changed.
        role: with a head it becomes a classifier, without one a language model.
        folder: is filled with config and weights; the tokenizer is left to the caller.
        tokenizer: whose padding token the classifier skips (`padding_tokenizer`).
        dtype: of the written weights; None is the base's own. The sum is taken in fp32 whatever it is.

    Raises:
        RoleError: there is no such role.
        ExportError: the family has no classifier, or what was written does not compute what the role computes.
    """
    rows = _probe(backbone, avoid=tokenizer.pad_token_id)
    if role in backbone.roles.heads:
        expected = _role_scores(backbone, role, rows)
        kind = _save(merged_classifier(backbone, role, _pad_id(tokenizer), dtype), folder)
        found, precision = _written_scores(_load(kind, folder), rows)
        layout: Layout = "classifier"
    else:
        expected = _role_logits(backbone, role, rows)
        kind = _save(merged_language_model(backbone, role, dtype), folder)
        _write_generation_config(backbone.model, folder)
        found, precision = _written_logits(_load(kind, folder), rows)
        layout = "language model"
    difference, largest = float((found - expected).abs().max()), float(expected.abs().max())
    agreement = Agreement("scores" if layout == "classifier" else "logits", difference, largest, precision)
    # A chained comparison: written in fp32, from a base in fp32.
    is_fp32 = precision == str(backbone.model.dtype).removeprefix("torch.") == "float32"
    _check(agreement, is_exact=is_fp32 and not is_quantised(backbone.model))
    return layout, agreement


def write_adapter(backbone: Backbone, role: str, folder: Path, base: str) -> Layout:
    """Write the role in PEFT's layout for the base at `base` (a folder or hub id), and read it back.

    The folder can be loaded as a role too (`role_files.load_role`), which refuses another base; PEFT does not look. Where the
    positions of the base were scaled, the folder holds the scaled `config.json` to load the base with, and does not name the
    base: otherwise `AutoPeftModel...` would load it with its original config, and score on unscaled positions.

    Raises:
        RoleError: there is no such role.
        ExportError: the files do not hold the role's weights.
    """
    save_role(backbone, role, folder)
    stretched = backbone.loaded.stretch is not None
    if stretched:
        plain_config(backbone.model).save_pretrained(folder)
    config = {**read_json(folder / "adapter_config.json"), "base_model_name_or_path": None if stretched else base}
    layout: Layout = "adapter"
    if role in backbone.roles.heads:
        # PEFT's classifier would read the last token of the last layer.
        is_plain = role not in backbone.roles.depths and role not in backbone.roles.poolings
        is_classifier = is_plain and classifier_class(backbone.model.config) is not None
        layout = "classifier adapter" if is_classifier else "adapter and head"
    if layout == "classifier adapter":
        config |= {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
        _add_head(folder, backbone.roles.heads[role].weight)
    write_json(folder / "adapter_config.json", config)
    # Again after `save_role`, because the files have changed since.
    seal_role(backbone, role, folder)
    _check_adapter(backbone, role, folder)
    return layout


# -- files --------------------------------------------------------------------------------------------------------------


def _save(merged: Any, folder: Path) -> Any:
    """Save a merged model and return only its class, to free the model before it is loaded again."""
    merged.save_pretrained(folder, max_shard_size=_SHARD)
    return type(merged)


def _load(kind: Any, folder: Path) -> Any:
    model, report = kind.from_pretrained(folder, dtype="auto", output_loading_info=True)
    if report["missing_keys"] or report["unexpected_keys"] or report["mismatched_keys"]:
        raise ExportError(f"the written weights do not match the class {kind.__name__} ({report}); nothing was exported")
    return model.eval()


def _write_generation_config(live: Any, folder: Path) -> None:
    """The base's own, as it is: `save_pretrained` would refuse values that the base's makers left in it."""
    if getattr(live, "generation_config", None) is not None:
        (folder / "generation_config.json").write_text(live.generation_config.to_json_string(), encoding="utf-8")


def _add_head(folder: Path, weight: Tensor) -> None:
    """Return the head under the name that PEFT uses for saved modules of a classifier."""
    path = folder / "adapter_model.safetensors"
    tensors = {**load_file(path), "base_model.model.score.weight": weight.detach().cpu().contiguous()}
    save_file(tensors, path, metadata={"format": "pt"})


def _check_adapter(backbone: Backbone, role: str, folder: Path) -> None:
    """Check that the files contain all weights of the role and, apart from the head, nothing else."""
    saved = load_file(folder / "adapter_model.safetensors")
    wanted = {
        "base_model.model." + name.replace(f".{role}.", "."): p
        for name, p in backbone.roles.parameters(role).items()
        if "lora_" in name
    }
    if role in backbone.roles.heads:
        wanted |= {f"head.{name}": p for name, p in backbone.roles.heads[role].named_parameters()}
        saved |= {f"head.{name}": p for name, p in load_file(folder / "head.safetensors").items()}
    wrong = [name for name, p in wanted.items() if name not in saved or not torch.equal(saved[name], p.detach().cpu())]
    # One more is the head under PEFT's name, in a classifier adapter.
    if wrong or len(saved) - len(wanted) not in (0, 1):
        raise ExportError(f"the files in {folder} do not contain the weights of {role} ({wrong[:3]}); nothing was exported")


# -- does it say what the role says? ------------------------------------------------------------------------------------


def _probe(backbone: Backbone, avoid: int | None) -> Sequences:
    """Random sequences of several lengths, right-padded, that end as a finished reply does."""
    loaded = backbone.loaded
    size = loaded.model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    # Ordinary tokens only: padding at the end of a row would move the place where a classifier reads its score.
    usable = torch.tensor([i for i in range(size) if i not in (avoid, loaded.pad_id, *loaded.eos_ids)])
    generator, end = torch.Generator().manual_seed(0), list(loaded.eos_ids[:1])
    rows = [usable[torch.randint(len(usable), (length,), generator=generator)].tolist() for length in _PROBE_LENGTHS]
    return pad_sequences(backbone, [Prompt(tuple(row[:1])) for row in rows], [row[1:] + end for row in rows])


@torch.no_grad()
def _role_scores(backbone: Backbone, role: str, rows: Sequences) -> Tensor:
    with backbone.acting_as(role):
        return final_scores(backbone, role, rows).cpu()


@torch.no_grad()
def _role_logits(backbone: Backbone, role: str, rows: Sequences) -> Tensor:
    """Logits `[N, V]` at the real tokens."""
    with backbone.acting_as(role):
        hidden_BTD = backbone.hidden(rows.ids_BT, rows.attention_BT)
        return backbone.logits(hidden_BTD[rows.attention_BT.bool()]).cpu()


@torch.no_grad()
def _written_scores(model: Any, rows: Sequences) -> tuple[Tensor, str]:
    """The classifier's scores of the batch, padded with its own padding token."""
    attention_BT = rows.attention_BT.cpu()
    ids_BT = rows.ids_BT.cpu().masked_fill(attention_BT == 0, model.config.get_text_config().pad_token_id)
    logits_B1 = model(input_ids=ids_BT, attention_mask=attention_BT).logits.float()
    return logits_B1[:, 0] + model.config.score_bias, str(model.dtype).removeprefix("torch.")


@torch.no_grad()
def _written_logits(model: Any, rows: Sequences) -> tuple[Tensor, str]:
    attention_BT = rows.attention_BT.cpu()
    logits_BTV = model(input_ids=rows.ids_BT.cpu(), attention_mask=attention_BT).logits.float()
    return logits_BTV[attention_BT.bool()], str(model.dtype).removeprefix("torch.")


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.pad_token_id is None:
        raise RoleError("a classifier needs a tokenizer with a padding token; see padding_tokenizer")
    return int(tokenizer.pad_token_id)


def _check(agreement: Agreement, *, is_exact: bool) -> None:
    allowed = (_EXACT if is_exact else _ROUNDED) * max(1.0, agreement.largest)
    if not agreement.difference <= allowed:  # NaN is not
        remedy = "" if is_exact else "; --precision fp32 avoids the rounding"
        raise ExportError(
            f"the merged model does not reproduce the role: {agreement.compared} differ by up to "
            f"{agreement.difference:.3g}, at most {allowed:.3g} is allowed{remedy}. Nothing was exported"
        )
