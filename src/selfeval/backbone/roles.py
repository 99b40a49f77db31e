"""The backbone: one frozen base model shared by several independent roles.

A role is a LoRA adapter (through PEFT) with an optional scalar head. `acting_as` activates a role for the forward passes
inside its block. No role stays active afterwards: a forward pass outside such a block raises an error.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from selfeval.backbone.adapters import BASE, Acting, AdapterStack, remove_adapters
from selfeval.backbone.body import text_body
from selfeval.backbone.budget import MemoryBudget
from selfeval.backbone.families.adapters import ALL_LINEAR, adapter_targets
from selfeval.backbone.fingerprint import base_fingerprint
from selfeval.backbone.load import LoadedModel, load_model, pick_device
from selfeval.backbone.loss_scale import LossScale, Origin, mark
from selfeval.backbone.meters import cap_gpus, keep_few_kernels, meter_for, return_freed_memory
from selfeval.backbone.output_head import OutputHead
from selfeval.backbone.reach import unread_layers
from selfeval.backbone.recompute import recompute
from selfeval.backbone.role_files import check_role, save_adapter_config, seal_role
from selfeval.backbone.streaming import held_weights, stand_in_weights, weight_bytes
from selfeval.config import LoraConfig, RunConfig
from selfeval.errors import ConfigError, ModelError, RoleError, RunFolderError, is_out_of_memory
from selfeval.store import read_json

__all__ = ["Backbone"]

_PROBE = "probe"
"""Temporary role that exists only inside `check_targets`."""

_PACKED = (torch.int8, torch.uint8)
"""Storage dtypes of quantised weights."""


class Backbone:
    """One frozen base and its roles.

    Args:
        loaded: the model.
        lora: Rank, scale and target modules of every adapter.
        source: name of the model in messages and in role files.
        memory_budget: optional memory limit of this process in bytes; on a GPU, `cap_gpus` enforces it. Default: no limit.
    """

    def __init__(self, loaded: LoadedModel, lora: LoraConfig, source: str, memory_budget: int | None = None) -> None:
        self.loaded = loaded
        self.budget = MemoryBudget(meter_for((p.device for p in loaded.model.parameters()), memory_budget))
        self.loss_scale = LossScale(self._tell) if loaded.model.dtype == torch.float16 else None
        self.lora = lora
        self.source = source
        self.heads: dict[str, nn.Linear] = {}
        self._stack = AdapterStack()
        self._trainable: dict[str, bool] = {}
        self._peft: PeftModel | None = None
        self._unread: tuple[str, ...] | None = None
        self._base_bytes = weight_bytes(loaded.model)
        self._base_shapes = {tuple(p.shape) for p in loaded.model.parameters() if p.ndim > 1}
        self._base_fingerprint = self._fingerprint()
        loaded.model.register_forward_pre_hook(self._refuse_without_role)
        if loaded.placement is not None:
            recompute(loaded.model, loaded.placement.streamed, self._stack.checkpoint_contexts)
        self._check_logits()

    def _tell(self, sentence: str) -> None:
        if self.budget.tell is not None:
            self.budget.tell(sentence)

    def _fingerprint(self) -> str:
        return base_fingerprint(self.loaded)

    @torch.no_grad()
    def _check_logits(self) -> None:
        """Check with a short pass that `logits(hidden)` equals the model's own logits, which all log-probs rely on."""
        ids = torch.tensor([[0, 1, 2, 3]], device=self.loaded.device)
        mask = torch.ones_like(ids)
        with self.acting_as(BASE):
            try:
                expected = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
            except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
                self._refuse_pass(error)
            found = self._own_logits(ids, mask)
        if found is None or not torch.allclose(found, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max())):
            kind = self.model.config.model_type
            raise ModelError(
                f"{self.source}: models of type {kind} make their logits in a way this version does not know; use another model"
            )

    def _refuse_pass(self, error: Exception) -> NoReturn:
        if is_out_of_memory(error):
            raise error
        raise ModelError(
            f"{self.source}: a first pass of four tokens fails ({' '.join(str(error).split())[:300]}); its config.json "
            f"does not fit its weights, or transformers {transformers.__version__} cannot compute models of type "
            f"{self.model.config.model_type}"
        ) from error

    def _own_logits(self, ids: Tensor, mask: Tensor) -> Tensor | None:
        """Compute logits as rollouts and losses do; None if the output layer does not fit the hidden states."""
        try:
            return self.logits(self.hidden(ids, mask))
        except (RuntimeError, AttributeError) as error:
            if is_out_of_memory(error):
                raise
            return None

    @classmethod
    def load(cls, config: RunConfig, *, trust_remote_code: bool = False) -> Backbone:
        """Load the model named in the configuration.

        Args:
            config: configuration of a run. It may come from an untrusted run folder, so it never decides whether code runs.
            trust_remote_code: run code that ships with the model; set by the command-line option only. Default: False.
        """
        keep_few_kernels()
        if config.memory_budget is not None and pick_device(config.device).type == "cuda":
            cap_gpus(config.memory_budget)
        loaded = load_model(
            config.model,
            device=config.device,
            precision=config.precision,
            trust_remote_code=trust_remote_code,
            context=config.context,
            placement=config.placement,
            room=config.memory_budget,
        )
        source = Path(config.model).name if Path(config.model).is_dir() else config.model
        backbone = cls(loaded, config.lora, source, config.memory_budget)
        if loaded.device.type == "cpu":
            return_freed_memory(backbone.base_bytes)
        if config.checkpointing:
            backbone.recompute_layers()
        return backbone

    @property
    def model(self) -> Any:
        """The Hugging Face model, with adapters injected once a role exists."""
        return self.loaded.model

    @property
    def output_head(self) -> OutputHead:
        """The frozen output layer with its family's scale and cap."""
        return OutputHead.of(self.loaded.model)

    @property
    def base_name(self) -> str:
        """Name of the base in messages and role files, including any context extension."""
        return f"{self.source} ({self.loaded.stretch})" if self.loaded.stretch else self.source

    @property
    def roles(self) -> tuple[str, ...]:
        return tuple(self._trainable)

    @property
    def acting(self) -> str | None:
        """Role of the innermost `acting_as` block (`a+b` if its rows have several roles), or None outside any block."""
        return self._stack.acting.name if self._stack.acting else None

    def _refuse_without_role(self, module: nn.Module, arguments: Any) -> None:
        if self._stack.acting is None:
            raise RoleError("a pass through the backbone outside of `with backbone.acting_as(role)`; say whose pass it is")

    # -- roles ------------------------------------------------------------------------------------------------------

    def add_role(
        self, role: str, *, seed: int = 0, copy_of: str | None = None, head: bool = False, trainable: bool = True
    ) -> None:
        """Add a role: a LoRA adapter initialised to the base model or copied from another role.

        Args:
            role: name of the role.
            seed: seed of the adapter's random matrix A; B starts at zero. Default: 0.
            copy_of: optional role whose adapter is copied, along with its head if both roles have one.
            head: add a scalar head in fp32, initialised to zero. Default: False.
            trainable: whether its weights receive gradients. Default: True.

        Raises:
            RoleError: the role already exists, or `copy_of` does not.
            ModelError, ConfigError: `lora.targets` cannot have adapters; the backbone is left unchanged.
        """
        self._refuse_taken(role)
        if copy_of is not None and copy_of not in self._trainable:
            raise RoleError(f'role "{role}" cannot copy "{copy_of}", which does not exist; roles: {", ".join(self.roles)}')
        self._make_adapter(role, seed)
        if self._unread is None:
            self._leave_out_unread(role, seed)
        self._trainable[role] = trainable
        if head:
            self.heads[role] = nn.Linear(self.loaded.hidden_size, 1, device=self.loaded.device, dtype=torch.float32)
            nn.init.zeros_(self.heads[role].weight)
            nn.init.zeros_(self.heads[role].bias)
        if copy_of is not None:
            self._copy(copy_of, role)
        self._mark_trainable()

    def add_snapshot(self, role: str, of: str) -> None:
        """Add a frozen snapshot of another role, for example the reference policy of a KL penalty.

        An untrained role needs no second adapter: its snapshot is the base with all adapters disabled. Any other role (such
        as one that starts from a fine-tuned adapter) is copied.

        Raises:
            RoleError: the role exists, or `of` does not.
        """
        if of in self._trainable and self.is_bare(of):
            self._refuse_taken(role)
            self._trainable[role] = False
        else:
            self.add_role(role, copy_of=of, trainable=False)

    def is_bare(self, role: str) -> bool:
        """Whether the role's adapter is still zero, so that a forward pass under it equals one of the base."""
        return all(not p.any() for n, p in self.parameters(role).items() if ".lora_B." in n)

    def _refuse_taken(self, role: str) -> None:
        if role in self._trainable or role == BASE:
            raise RoleError(f'role "{role}" exists already; roles: {", ".join([BASE, *self.roles])}')

    def check_targets(self) -> None:
        """Check early that `lora.targets` can have adapters that forward passes use.

        Raises:
            ModelError, ConfigError: they cannot.
        """
        if self._unread is None:
            self.add_role(_PROBE)
            self._withdraw(_PROBE)

    def _make_adapter(self, role: str, seed: int) -> None:
        with stand_in_weights(self.loaded.model), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                self._inject(role)
            except BaseException:
                self._withdraw(role)
                raise

    def _leave_out_unread(self, role: str, seed: int) -> None:
        """Recreate the adapter without layers that no forward pass uses; raise if the user named such a layer."""
        try:
            unread = self._unread_layers(role)
            if unread and self.lora.targets != ALL_LINEAR:
                raise ModelError(
                    f"lora.targets names {', '.join(unread)}, but no pass of models of type {self.model.config.model_type} "
                    "would read adapters there: they use the weights of these layers without calling them; take them out of "
                    "lora.targets"
                )
        except BaseException:
            self._withdraw(role)
            raise
        self._unread = unread
        if unread:
            self.loaded.notes.append(f"no adapters on {', '.join(unread)}: no pass of this model would read them")
            self._withdraw(role)
            self._make_adapter(role, seed)

    def _unread_layers(self, role: str) -> tuple[str, ...]:
        with self._stack.block(Acting.of(role)):
            return unread_layers(self, self.parameters(role))

    def _inject(self, role: str) -> None:
        peft_config = PeftLoraConfig(
            task_type="CAUSAL_LM",
            r=self.lora.rank,
            lora_alpha=self.lora.alpha,
            use_rslora=self.lora.rslora,
            lora_dropout=0.0,
            **adapter_targets(self.loaded.model, self.lora.targets, self._unread or ()),
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
            warnings.filterwarnings("ignore", message=".*_pattern keys did not match.*")  # fused experts keep the plain rank
            try:
                if self._peft is None:
                    self._peft = get_peft_model(self.loaded.model, peft_config, adapter_name=role)
                else:
                    self._peft.add_adapter(role, peft_config)
            except ValueError as error:  # no such module, or one that cannot have an adapter
                raise ModelError(
                    f"{self.source} cannot have adapters on lora.targets = {self.lora.targets}: {error}"
                ) from error
        if isinstance(self.output_head.module, BaseTunerLayer):
            raise ConfigError("lora.targets names the output layer, which stays frozen; take it out of lora.targets")
        self._stack.attach(self.loaded.model)

    def _withdraw(self, role: str) -> None:
        """Remove a role completely, including one that was only partly injected."""
        remove_adapters(self.loaded.model, role)
        self._trainable.pop(role, None)
        self.heads.pop(role, None)
        if self._peft is not None:
            self._peft.peft_config.pop(role, None)
        if self._peft is None or not self._peft.peft_config:
            self._peft = None
            vars(self.loaded.model).pop("peft_config", None)  # otherwise PEFT treats the next first role as a second one
        self._mark_trainable()

    def _copy(self, source: str, target: str) -> None:
        theirs = self._adapter(source)
        with torch.no_grad():
            for adapter, ours in zip(theirs, self._adapter(target) if theirs else [], strict=True):
                ours.copy_(adapter)
            if source in self.heads and target in self.heads:
                self.heads[target].load_state_dict(self.heads[source].state_dict())

    def _adapter(self, role: str) -> list[nn.Parameter]:
        return [p for name, p in self.loaded.model.named_parameters() if f".{role}." in name and "lora_" in name]

    def parameters(self, role: str) -> dict[str, nn.Parameter]:
        """Return the role's own weights by name: the adapter and the optional head."""
        named = {n: p for n, p in self.loaded.model.named_parameters() if f".{role}." in n and "lora_" in n}
        head = self.heads.get(role)
        return named if head is None else {**named, **{f"head.{name}": p for name, p in head.named_parameters()}}

    def freeze(self, role: str) -> None:
        """Stop computing gradients for this role."""
        self._trainable[role] = False
        self._mark_trainable()

    @contextmanager
    def acting_as(self, role: str | Sequence[str]) -> Iterator[None]:
        """Run the forward passes inside the block with this role's adapter.

        Blocks nest. The outer role is restored on exit, also after an exception.

        Args:
            role: one role for all rows, or one role per row. Rows of different roles share a forward pass, and their
                results equal those of separate passes.

        Raises:
            RoleError: there is no such role.
        """
        acting = Acting.of(role)
        for name in acting.roles:
            if name != BASE and name not in self._trainable:
                raise RoleError(f'there is no role "{name}"; roles: {", ".join([BASE, *self.roles])}')
        with self._stack.block(acting):
            yield

    def _mark_trainable(self) -> None:
        """Reset `requires_grad` of every role, because PEFT changes it on other adapters when it injects one."""
        for role, trainable in self._trainable.items():
            for name, parameter in self.parameters(role).items():
                parameter.requires_grad_(trainable)
                mark(parameter, Origin(name if f".{role}." in name else f"{role}.{name}", self.loss_scale))

    def recompute_layers(self) -> None:
        """Enable gradient checkpointing: keep only the inputs of each layer and recompute the layer in the backward pass.

        Gradients are unchanged, and the layer is recomputed under the same role (Chen et al. 2016,
        https://arxiv.org/abs/1604.06174).

        Raises:
            ModelError: this model family does not support recomputation.
        """
        layers = [name for name, module in self.model.named_modules() if isinstance(module, GradientCheckpointingLayer)]
        if not layers:
            raise ModelError(f"{self.source}: this kind of model cannot recompute its layers; set checkpointing = false")
        streamed = self.loaded.placement.streamed if self.loaded.placement else ()
        recompute(self.model, [name for name in layers if name not in streamed], self._stack.checkpoint_contexts)

    @property
    def mixes_rows(self) -> bool:
        """Whether one forward pass may mix rows of several roles; False if fused experts have adapters."""
        return self._stack.mixes_rows

    def refuse_mixed_rows(self, work: str) -> None:
        """Raise an error if the acting block assigns a role to each row; for callers that reorder rows.

        Raises:
            RoleError: the acting block names a role for each row.
        """
        if self._stack.acting is not None and self._stack.acting.runs:
            raise RoleError(f"{work} puts its rows in an order of its own; let one role act at a time")

    # -- passes -----------------------------------------------------------------------------------------------------

    def hidden(self, ids_BT: Tensor, attention_BT: Tensor) -> Tensor:
        """Compute the last hidden states `[B, T, D]` of right-padded sequences under the acting role."""
        if self._stack.acting is None:
            raise RoleError("a pass through the backbone outside of `with backbone.acting_as(role)`; say whose pass it is")
        arguments: dict[str, Any] = {"input_ids": ids_BT, "attention_mask": attention_BT}
        if self.loaded.forward_accepts("position_ids"):
            arguments["position_ids"] = (attention_BT.long().cumsum(-1) - 1).clamp_min(0)
        return text_body(self.loaded.model)(**arguments, use_cache=False).last_hidden_state  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute next-token logits in fp32 from hidden states `[..., D]`, with the scale and cap of the model family."""
        return self.output_head.logits(hidden)

    def score(self, role: str, hidden: Tensor) -> Tensor:
        """Apply the role's scalar head to hidden states in fp32: `[..., D]` -> `[...]`."""
        scores: Tensor = self.heads[role](hidden.float())
        return scores.squeeze(-1)

    # -- files ------------------------------------------------------------------------------------------------------

    def save_role(self, role: str, folder: Path) -> None:
        """Save the role in PEFT's layout, with `head.safetensors` if it has a head, and record its base model."""
        if self._peft is None or role not in self._peft.peft_config:
            raise RoleError(f'there is no role "{role}" with an adapter to save')
        folder.mkdir(parents=True, exist_ok=True)
        config = self._peft.peft_config[role]
        config.base_model_name_or_path = self.source
        config.fan_in_fan_out = any(getattr(m, "fan_in_fan_out", False) for m in self.model.modules())  # PEFT notes it once
        prefix = "base_model.model."
        tensors = {
            prefix + n.replace(f".{role}.", "."): p.detach().cpu().contiguous()
            for n, p in self.parameters(role).items()
            if "lora_" in n
        }
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        save_adapter_config(config, folder)
        if role in self.heads:
            save_file({k: v.cpu() for k, v in self.heads[role].state_dict().items()}, folder / "head.safetensors")
        self.seal_role(folder)

    def seal_role(self, folder: Path) -> None:
        """Record the base and the hash of each file in a role's folder; call after the last change to its files."""
        seal_role(folder, self.base_name, self._base_fingerprint)

    def load_role(self, role: str, folder: Path, *, trainable: bool = False) -> None:
        """Load a role written by `save_role`.

        Raises:
            RunFolderError: files are missing or damaged, or the role was trained on another base or with other `[lora]` values.
        """
        origin = check_role(folder)
        if origin["base_fingerprint"] != self._base_fingerprint:
            raise RunFolderError(
                f"the role in {folder} was trained on {origin['base']} (weights {origin['base_fingerprint']}), not on "
                f"{self.base_name} (weights {self._base_fingerprint}); load it on its own base"
            )
        self._check_lora(folder)
        has_head = (folder / "head.safetensors").is_file()
        self.add_role(role, head=has_head, trainable=trainable)
        saved = load_file(folder / "adapter_model.safetensors")
        own = {
            "base_model.model." + name.replace(f".{role}.", "."): parameter
            for name, parameter in self.parameters(role).items()
            if "lora_" in name
        }
        if own.keys() != {name for name in saved if "lora_" in name}:
            self._withdraw(role)
            raise RunFolderError(
                f"the role in {folder} adapts other layers than lora.targets = {self.lora.targets} does; set its own targets"
            )
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(saved[name])
        if has_head:
            self.heads[role].load_state_dict(load_file(folder / "head.safetensors"))

    def training_state(self) -> dict[str, Any]:
        """Return the state that a checkpoint stores in addition to the roles: the loss scale, if the base needs one."""
        return {} if self.loss_scale is None else {"loss_scale": self.loss_scale.state()}

    def load_training_state(self, state: Mapping[str, Any]) -> None:
        """Restore the result of `training_state`; other keys are ignored."""
        if self.loss_scale is not None and "loss_scale" in state:
            self.loss_scale.load(state["loss_scale"])

    def _check_lora(self, folder: Path) -> None:
        """Check the LoRA settings: with a different scale the weights would still load, but scores would change."""
        saved = read_json(folder / "adapter_config.json")
        found = {"rank": saved["r"], "alpha": saved["lora_alpha"], "rslora": saved["use_rslora"]}
        wanted = self.lora.model_dump(include=set(found))
        if found != wanted:
            raise RunFolderError(f"the role in {folder} was trained with lora {found}, not with {wanted}; set its own values")

    # -- memory -----------------------------------------------------------------------------------------------------

    @property
    def base_bytes(self) -> int:
        """Bytes of the base weights on all devices, including disk."""
        return self._base_bytes

    @property
    def adapter_bytes(self) -> int:
        """Bytes of all adapters and heads."""
        return sum(p.numel() * p.element_size() for role in self.roles for p in self.parameters(role).values())

    @property
    def parameter_count(self) -> int:
        return sum(p.numel() for n, p in self.loaded.model.named_parameters() if "lora_" not in n)

    def weight_copies(self) -> float:
        """Return how many copies of the base weights are in memory, to two decimals; must be 1 (weights on disk do not count).

        The count covers every live matrix (parameter or plain tensor) with the shape of a base weight, in any model and
        any precision, by distinct storage. Adapters and heads are excluded.
        """
        gc.collect()  # do not count garbage that was not collected yet
        own = {id(p) for role in self.roles for p in self.parameters(role).values()}
        # type() instead of isinstance(): lazy modules among the objects warn or import when their __class__ is read.
        live = [o for o in gc.get_objects() if issubclass(type(o), Tensor) and id(o) not in own]
        weights = [p for p in held_weights(self.loaded.model) if tuple(p.shape) in self._base_shapes and id(p) not in own]
        return round(_elements(t for t in live if tuple(t.shape) in self._base_shapes) / _elements(weights), 2)


def _elements(tensors: Iterable[Tensor]) -> int:
    """Return the number of elements in these tensors, counting shared storage once."""
    real = [t for t in tensors if t.device.type != "meta" and (t.is_floating_point() or t.dtype in _PACKED)]
    return sum({(t.untyped_storage().data_ptr(), int(t.storage_offset())): t.numel() for t in real}.values())
