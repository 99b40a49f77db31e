"""Loads any Hugging Face causal language model, frozen, with a tokenizer that can be used for rollouts."""

from __future__ import annotations

import inspect
import json
import shutil
import tempfile
import weakref
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from selfeval.backbone.placement import DISK, DeviceMap, free_memory, meta_model, plan_placement, usable_memory
from selfeval.config import PlacementConfig
from selfeval.errors import ModelError

__all__ = ["LoadedModel", "load_model", "pick_device", "pick_precision"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class LoadedModel:
    """A frozen model with what generation needs to know about it.

    Attributes:
        device: where batches are made and heads lie.
        eos_ids: tokens that end a reply; empty when the model has none.
        pad_id: fills batches; always masked, so that any valid id will do.
        notes: sentences about what was picked or missing, for the user.
        placement: which device holds what; None when it was not planned.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    precision: str
    eos_ids: tuple[int, ...]
    pad_id: int
    notes: list[str] = field(default_factory=list)
    placement: DeviceMap | None = None

    @property
    def hidden_size(self) -> int:
        config: Any = self.model.config
        return int(config.get_text_config().hidden_size)

    @property
    def context_length(self) -> int | None:
        config: Any = self.model.config
        return next((int(n) for key in ("max_position_embeddings", "n_positions") if (n := getattr(config, key, None))), None)

    def forward_accepts(self, argument: str) -> bool:
        return argument in inspect.signature(self.model.forward).parameters


def pick_device(wanted: str) -> torch.device:
    """The device that `wanted` (auto, cpu or cuda) means on this machine."""
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ModelError("device = cuda, but torch sees no CUDA device here; use device = auto or cpu")
    return torch.device(wanted)


def pick_precision(wanted: str, device: torch.device) -> str:
    """`auto` is bf16 on a GPU that has it, fp16 on an older GPU, fp32 on a CPU."""
    if wanted != "auto":
        return wanted
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported() else "fp16"


def _check_folder(name: str) -> None:
    path = Path(name)
    looks_like_path = name.startswith((".", "/", "~")) or path.exists() or name.count("/") > 1
    if not looks_like_path:
        return
    if not path.is_dir():
        raise ModelError(f"model folder {name} does not exist; give a Hugging Face model folder or a hub id such as org/name")
    if not (path / "config.json").is_file():
        raise ModelError(f"{name} has no config.json, so it is not a model folder; give the folder that holds config.json")
    try:
        json.loads((path / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path / 'config.json'} is not valid JSON: {error}") from error


def _check_causal(config: Any, name: str) -> None:
    is_native = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    is_remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    architectures = getattr(config, "architectures", None) or []
    names_other_head = architectures and not any("CausalLM" in a or "LMHead" in a or "Conditional" in a for a in architectures)
    is_seq2seq = bool(getattr(config, "is_encoder_decoder", False))  # some of these have a decoder-only twin in transformers
    if is_seq2seq or not (is_native or is_remote) or (names_other_head and not is_remote):
        kind = ", ".join(architectures) or config.model_type
        raise ModelError(f"{name} is a {kind}, not a causal language model; give one that writes text (…ForCausalLM)")


def _check_complete(missing: Collection[str], name: str) -> None:
    """Refuses weights that transformers had to make up: it only warns, and fills the gaps with random numbers."""
    if missing:
        some = ", ".join(sorted(missing)[:3]) + (" and others" if len(missing) > 3 else "")
        raise ModelError(f"cannot load model {name}: its files lack {len(missing)} weights ({some}); download or save it again")


def load_model(
    name: str,
    *,
    device: str = "auto",
    precision: str = "auto",
    trust_remote_code: bool = False,
    placement: PlacementConfig | None = None,
) -> LoadedModel:
    """Loads a model folder or hub id, frozen and in eval mode, onto the devices that have room for it.

    Raises:
        ModelError: not found, not a causal language model, damaged files, or too large for every device.
    """
    if not name:
        raise ModelError("no model was given; use --model with a Hugging Face model folder or hub id")
    _check_folder(name)
    target = pick_device(device)
    picked = pick_precision(precision, target)
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        _check_causal(config, name)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        plan = _plan(config, device, target, picked, placement or PlacementConfig(), trust_remote_code)
        model, report = _from_files(
            name, plan, placement or PlacementConfig(), dtype=_DTYPES[picked], trust_remote_code=trust_remote_code
        )
        _check_complete(report["missing_keys"], name)
    except ModelError:
        raise
    except Exception as error:  # the hub client and safetensors raise many kinds; the user needs one sentence
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"cannot load model {name}: {reason}") from error
    model.requires_grad_(False)
    target = target if plan is None else torch.device(plan.main)
    if plan is None or plan.is_whole:
        model.to(target)
    return _described(model.eval(), tokenizer, target, picked, plan)


def _plan(
    config: Any, wanted: str, target: torch.device, precision: str, placement: PlacementConfig, trust_remote_code: bool
) -> DeviceMap | None:
    if placement.mode == "single":
        return None
    memory = usable_memory(free_memory(target), placement)
    plan = plan_placement(meta_model(config, trust_remote_code=trust_remote_code), memory, precision)
    if wanted == "cuda" and plan.main == "cpu":
        raise ModelError(
            "device = cuda, but no card has room for even one layer of this model; free memory or use device = auto"
        )
    return plan


def _from_files(name: str, plan: DeviceMap | None, placement: PlacementConfig, **options: Any) -> tuple[Any, dict[str, Any]]:
    """The model and transformers' report; weights on disk stay in the model's files where these can be read as they are."""
    folder = None
    if plan is not None and not plan.is_whole:
        options["device_map"] = plan.for_transformers()
    if plan is not None and DISK in plan.devices:
        if placement.folder:
            Path(placement.folder).mkdir(parents=True, exist_ok=True)
        folder = tempfile.mkdtemp(prefix="selfeval-weights-", dir=placement.folder or None)
        options["offload_folder"] = folder
    try:
        model, report = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **options)
    except BaseException:
        if folder is not None:
            shutil.rmtree(folder)
        raise
    if folder is not None:
        weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)
    return model, report


def _described(
    model: Any, tokenizer: PreTrainedTokenizerBase, device: torch.device, precision: str, plan: DeviceMap | None
) -> LoadedModel:
    notes = [] if plan is None or plan.is_whole else [plan.sentence()]
    eos = _eos_ids(model, tokenizer)
    if not eos:
        notes.append("this model has no end-of-sequence token; replies end only at the token limit")
    pad = tokenizer.pad_token_id
    if pad is None or pad >= model.get_input_embeddings().weight.shape[0]:
        problem = "this tokenizer has no padding token" if pad is None else f"this model has no padding token {pad}"
        pad = eos[0] if eos else 0
        notes.append(f"{problem}; token {pad} fills batches instead (it is masked everywhere)")
    return LoadedModel(model, tokenizer, device, precision, eos, int(pad), notes, plan)


def _eos_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    generation = getattr(model, "generation_config", None)
    found: list[int] = []
    for value in (
        tokenizer.eos_token_id,
        getattr(generation, "eos_token_id", None),
        getattr(model.config, "eos_token_id", None),
    ):
        found += [] if value is None else value if isinstance(value, list) else [value]
    size = model.get_input_embeddings().weight.shape[0]
    return tuple(dict.fromkeys(int(i) for i in found if 0 <= int(i) < size))
