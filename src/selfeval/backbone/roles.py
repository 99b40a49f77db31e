"""The backbone: one frozen base, and roles on it that cannot touch one another.

A role is a LoRA adapter (through PEFT) and perhaps a scalar head. `acting_as` selects one for the passes inside its block;
there is no lingering role, and a pass outside such a block is an error.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from selfeval.backbone.budget import MemoryBudget
from selfeval.backbone.load import LoadedModel, load_model, pick_device
from selfeval.backbone.meters import cap_gpus, meter_for
from selfeval.config import LoraConfig, RunConfig
from selfeval.errors import ModelError, RoleError, RunFolderError
from selfeval.store import fingerprint, read_json, write_json

__all__ = ["BASE", "Backbone"]

BASE = "base"
"""Name of the bare base as a role: no adapter, no gradient."""


class Backbone:
    """One frozen base and its roles.

    Args:
        loaded: the model.
        lora: rank, scale and targets of every adapter.
        source: what the model is called in messages and in role files.
        memory_budget: bytes that this process should not pass; on a GPU, `cap_gpus` enforces them.
    """

    def __init__(self, loaded: LoadedModel, lora: LoraConfig, source: str, memory_budget: int | None = None) -> None:
        self.loaded = loaded
        self.budget = MemoryBudget(meter_for((p.device for p in loaded.model.parameters()), memory_budget))
        self.lora = lora
        self.source = source
        self.heads: dict[str, nn.Linear] = {}
        self._acting: list[str] = []
        self._trainable: dict[str, bool] = {}
        self._peft: PeftModel | None = None
        self._tuners: list[BaseTunerLayer] = []
        self._logit_scale = _logit_scale(loaded.model.config)
        self._base_storages = _storages(loaded.model)
        self._base_shapes = {tuple(p.shape) for p in loaded.model.parameters() if p.ndim > 1}
        self._base_fingerprint = _weights_fingerprint(loaded.model)
        loaded.model.register_forward_pre_hook(self._refuse_without_role)
        self._check_logits()

    @torch.no_grad()
    def _check_logits(self) -> None:
        """One short pass: `logits(hidden)` must be what the model itself says, or every log-prob would be silently wrong."""
        ids = torch.tensor([[0, 1, 2, 3]], device=self.loaded.device)
        mask = torch.ones_like(ids)
        with self.acting_as(BASE):
            expected = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
            found = self.logits(self.hidden(ids, mask))
        if not torch.allclose(found, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max())):
            kind = self.model.config.model_type
            raise ModelError(
                f"{self.source}: models of type {kind} make their logits in a way this version does not know; use another model"
            )

    @classmethod
    def load(cls, config: RunConfig) -> Backbone:
        """Loads the model that the configuration names."""
        if config.memory_budget is not None and pick_device(config.device).type == "cuda":
            cap_gpus(config.memory_budget)
        loaded = load_model(
            config.model, device=config.device, precision=config.precision, trust_remote_code=config.trust_remote_code
        )
        source = Path(config.model).name if Path(config.model).is_dir() else config.model
        return cls(loaded, config.lora, source, config.memory_budget)

    @property
    def model(self) -> Any:
        """The Hugging Face model (adapters injected once there are roles)."""
        return self.loaded.model

    @property
    def roles(self) -> tuple[str, ...]:
        return tuple(self._trainable)

    @property
    def acting(self) -> str | None:
        """The role of the innermost `acting_as` block, None outside of any."""
        return self._acting[-1] if self._acting else None

    def _refuse_without_role(self, module: nn.Module, arguments: Any) -> None:
        if not self._acting:
            raise RoleError("a pass through the backbone outside of `with backbone.acting_as(role)`; say whose pass it is")

    # -- roles ------------------------------------------------------------------------------------------------------

    def add_role(
        self, role: str, *, seed: int = 0, copy_of: str | None = None, head: bool = False, trainable: bool = True
    ) -> None:
        """Adds a role: a LoRA adapter that starts as the bare base, or as a copy of another role.

        Args:
            role: its name.
            seed: of the adapter's random half (A); the other half (B) is zero.
            copy_of: role whose adapter is copied, and its head where both have one.
            head: give it a scalar head, fp32, zero at the start.
            trainable: whether its weights get gradients.

        Raises:
            RoleError: the role exists, or `copy_of` does not.
        """
        if role in self._trainable or role == BASE:
            raise RoleError(f'role "{role}" exists already; roles: {", ".join([BASE, *self.roles])}')
        if copy_of is not None and copy_of not in self._trainable:
            raise RoleError(f'role "{role}" cannot copy "{copy_of}", which does not exist; roles: {", ".join(self.roles)}')
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._inject(role)
        self._trainable[role] = trainable
        if head:
            self.heads[role] = nn.Linear(self.loaded.hidden_size, 1, device=self.loaded.device, dtype=torch.float32)
            nn.init.zeros_(self.heads[role].weight)
            nn.init.zeros_(self.heads[role].bias)
        if copy_of is not None:
            self._copy(copy_of, role)
        self._select(self.acting or BASE)

    def _inject(self, role: str) -> None:
        peft_config = PeftLoraConfig(
            task_type="CAUSAL_LM",
            r=self.lora.rank,
            lora_alpha=self.lora.alpha,
            use_rslora=self.lora.rslora,
            lora_dropout=0.0,
            target_modules=self.lora.targets if isinstance(self.lora.targets, str) else list(self.lora.targets),
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
            if self._peft is None:
                self._peft = get_peft_model(self.loaded.model, peft_config, adapter_name=role)
            else:
                self._peft.add_adapter(role, peft_config)
        self._tuners = [module for module in self.loaded.model.modules() if isinstance(module, BaseTunerLayer)]

    def _copy(self, source: str, target: str) -> None:
        with torch.no_grad():
            for theirs, ours in zip(self._adapter(source), self._adapter(target), strict=True):
                ours.copy_(theirs)
            if source in self.heads and target in self.heads:
                self.heads[target].load_state_dict(self.heads[source].state_dict())

    def _adapter(self, role: str) -> list[nn.Parameter]:
        return [p for name, p in self.loaded.model.named_parameters() if f".{role}." in name and "lora_" in name]

    def parameters(self, role: str) -> dict[str, nn.Parameter]:
        """The role's own weights by name: adapter, and head when it has one."""
        named = {n: p for n, p in self.loaded.model.named_parameters() if f".{role}." in n and "lora_" in n}
        head = self.heads.get(role)
        return named if head is None else {**named, **{f"head.{name}": p for name, p in head.named_parameters()}}

    def freeze(self, role: str) -> None:
        """No more gradients for this role."""
        self._trainable[role] = False
        self._select(self.acting or BASE)

    @contextmanager
    def acting_as(self, role: str) -> Iterator[None]:
        """Passes inside the block use this role's adapter; blocks nest, and an exception restores the outer role.

        Raises:
            RoleError: there is no such role.
        """
        if role != BASE and role not in self._trainable:
            raise RoleError(f'there is no role "{role}"; roles: {", ".join([BASE, *self.roles])}')
        self._acting.append(role)
        self._select(role)
        try:
            yield
        finally:
            self._acting.pop()
            self._select(self.acting or BASE)

    def _select(self, role: str) -> None:
        for tuner in self._tuners:
            tuner.set_adapter([] if role == BASE else [role], inference_mode=True)
            for name, trainable in self._trainable.items():
                if trainable:
                    tuner.set_requires_grad(name, True)
        for name, head in self.heads.items():
            head.requires_grad_(self._trainable[name])

    # -- passes -----------------------------------------------------------------------------------------------------

    def hidden(self, ids_BT: Tensor, attention_BT: Tensor) -> Tensor:
        """Last hidden states `[B, T, D]` of right-padded sequences under the acting role."""
        if not self._acting:
            raise RoleError("a pass through the backbone outside of `with backbone.acting_as(role)`; say whose pass it is")
        arguments: dict[str, Any] = {"input_ids": ids_BT, "attention_mask": attention_BT}
        if self.loaded.forward_accepts("position_ids"):
            arguments["position_ids"] = (attention_BT.long().cumsum(-1) - 1).clamp_min(0)
        return self.loaded.model.base_model(**arguments, use_cache=False).last_hidden_state  # type: ignore[operator, no-any-return]

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits, fp32, of hidden states `[..., D]`: the model's own, with its family's scale and cap."""
        head: Any = self.loaded.model.get_output_embeddings()  # type: ignore[operator]
        logits: Tensor = head(hidden).float() * self._logit_scale
        cap = getattr(self.loaded.model.config, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def score(self, role: str, hidden: Tensor) -> Tensor:
        """The role's scalar head on hidden states `[..., D]` -> `[...]`, computed in fp32."""
        scores: Tensor = self.heads[role](hidden.float())
        return scores.squeeze(-1)

    # -- files ------------------------------------------------------------------------------------------------------

    def save_role(self, role: str, folder: Path) -> None:
        """Writes the role in PEFT's layout, with `head.safetensors` when it has a head, and the base it belongs to."""
        if self._peft is None or role not in self._trainable:
            raise RoleError(f'there is no role "{role}" to save')
        folder.mkdir(parents=True, exist_ok=True)
        config = self._peft.peft_config[role]
        config.base_model_name_or_path = self.source
        prefix = "base_model.model."
        tensors = {
            prefix + n.replace(f".{role}.", "."): p.detach().cpu().contiguous()
            for n, p in self.parameters(role).items()
            if "lora_" in n
        }
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(str(folder))
        if role in self.heads:
            save_file({k: v.cpu() for k, v in self.heads[role].state_dict().items()}, folder / "head.safetensors")
        write_json(folder / "role.json", {"base": self.source, "base_fingerprint": self._base_fingerprint})

    def load_role(self, role: str, folder: Path, *, trainable: bool = False) -> None:
        """Adds the role that `save_role` wrote.

        Raises:
            RunFolderError: files are missing or the role was trained on another base.
        """
        origin = read_json(folder / "role.json")
        if origin["base_fingerprint"] != self._base_fingerprint:
            raise RunFolderError(
                f"the role in {folder} was trained on {origin['base']}, not on {self.source}; load it on its own base"
            )
        has_head = (folder / "head.safetensors").is_file()
        self.add_role(role, head=has_head, trainable=trainable)
        saved = load_file(folder / "adapter_model.safetensors")
        with torch.no_grad():
            for name, parameter in self.parameters(role).items():
                if "lora_" in name:
                    parameter.copy_(saved["base_model.model." + name.replace(f".{role}.", ".")])
        if has_head:
            self.heads[role].load_state_dict(load_file(folder / "head.safetensors"))

    # -- memory -----------------------------------------------------------------------------------------------------

    @property
    def base_bytes(self) -> int:
        """Bytes of the base weights."""
        return sum(self._base_storages.values())

    @property
    def adapter_bytes(self) -> int:
        """Bytes of all adapters and heads."""
        return sum(p.numel() * p.element_size() for role in self.roles for p in self.parameters(role).values())

    @property
    def parameter_count(self) -> int:
        return sum(p.numel() for n, p in self.loaded.model.named_parameters() if "lora_" not in n)

    def weight_copies(self) -> float:
        """How many copies of the base weights this process holds now, to two decimals: must be 1.

        Counted over every live matrix (parameter or plain tensor) that has the shape of a base weight, in any model and
        any precision, by distinct storage; adapters and heads are not weights.
        """
        gc.collect()  # what only waits for the collector is not held
        own = {id(p) for role in self.roles for p in self.parameters(role).values()}
        # type() and not isinstance(): lazy modules among the objects warn or import when they are asked for their class.
        live = [o for o in gc.get_objects() if issubclass(type(o), Tensor) and id(o) not in own]
        weights = [p for p in self.loaded.model.parameters() if tuple(p.shape) in self._base_shapes and id(p) not in own]
        return round(_elements(t for t in live if tuple(t.shape) in self._base_shapes) / _elements(weights), 2)


def _elements(tensors: Iterable[Tensor]) -> int:
    """Numbers that these tensors hold, those of a shared storage once."""
    real = [t for t in tensors if t.device.type != "meta" and t.is_floating_point()]
    return sum({(t.untyped_storage().data_ptr(), int(t.storage_offset())): t.numel() for t in real}.values())


def _logit_scale(config: Any) -> float:
    """What some families multiply the output layer's result by; it is not part of any module."""
    kind = str(config.model_type)
    if kind.startswith("granite"):
        return 1.0 / float(config.logits_scaling)
    factors = {
        "cohere": "logit_scale",
        "cohere2": "logit_scale",
        "falcon_h1": "lm_head_multiplier",
        "hyperclovax": "logits_scaling",
    }
    return float(getattr(config, factors[kind])) if kind in factors else 1.0


def _storages(model: nn.Module) -> dict[int, int]:
    """Address -> bytes of each distinct storage that the model's parameters use."""
    storages = [parameter.untyped_storage() for parameter in model.parameters()]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def _weights_fingerprint(model: Any) -> str:
    """Tells bases apart, whatever precision they are loaded in: names, shapes, and sums of a few elements rounded to bf16."""
    rows = []
    for name, parameter in sorted(model.named_parameters()):
        sample = parameter.detach().reshape(-1)[:: max(1, parameter.numel() // 64)].bfloat16().double().sum().item()
        rows.append([name, list(parameter.shape), f"{sample:.10e}"])
    return fingerprint(rows)
