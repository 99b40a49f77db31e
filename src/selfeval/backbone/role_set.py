"""The roles on a frozen base: their adapters, their heads, and which of them are trainable."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from selfeval.backbone.adapters import BASE, AdapterStack, remove_adapters
from selfeval.backbone.depth import check_depth, first_layers
from selfeval.backbone.families.adapters import ALL_LINEAR, adapter_targets
from selfeval.backbone.load import LoadedModel
from selfeval.backbone.loss_scale import LossScale, Origin, mark
from selfeval.backbone.new_rows import NewRows
from selfeval.backbone.output_head import OutputHead
from selfeval.backbone.streaming import stand_in_weights
from selfeval.config import LoraConfig, Pooling
from selfeval.errors import ConfigError, ModelError, RoleError

__all__ = ["RoleSet"]

_PROBE = "probe"
"""Temporary role that exists only inside `check_targets`."""


class RoleSet:
    """The roles of a backbone.

    A role is a LoRA adapter (through PEFT) with an optional scalar head.

    Args:
        loaded: the base model, into which adapters are injected.
        lora: rank, scale and target modules of the adapters; a role may have another rank.
        source: name of the model in messages.
        stack: adapter layers and the acting role.
        loss_scale: scale of the losses of a fp16 base, which the roles' parameters are marked with; None otherwise.
        unread_layers: returns the names of layers whose adapters no forward pass of a role uses.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        lora: LoraConfig,
        source: str,
        stack: AdapterStack,
        loss_scale: LossScale | None,
        unread_layers: Callable[[str], tuple[str, ...]],
    ) -> None:
        self.lora = lora
        self.heads: dict[str, nn.Linear] = {}
        self.rows: dict[str, NewRows] = {}
        self.depths: dict[str, int] = {}
        self.ranks: dict[str, int] = {}
        self.poolings: dict[str, Pooling] = {}
        self._loaded, self._source, self._stack, self._loss_scale = loaded, source, stack, loss_scale
        self._unread_layers = unread_layers
        self._trainable: dict[str, bool] = {}
        self._peft: PeftModel | None = None
        self._unread: tuple[str, ...] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the roles in the order in which they were added."""
        return tuple(self._trainable)

    def check(self, role: str) -> None:
        """Check that a role, or the base, can act.

        Raises:
            RoleError: there is no such role.
        """
        if role != BASE and role not in self._trainable:
            raise RoleError(f'there is no role "{role}"; roles: {", ".join([BASE, *self.names])}')

    def add(
        self,
        role: str,
        *,
        seed: int = 0,
        copy_of: str | None = None,
        head: bool = False,
        trainable: bool = True,
        layer: int | None = None,
        rank: int | None = None,
        pooling: Pooling = "last",
    ) -> None:
        """Add a role: a LoRA adapter initialised to the base model or copied from another role.

        Args:
            role: name of the role.
            seed: seed of the adapter's random matrix A; B starts at zero. Default: 0.
            copy_of: optional role whose adapter is copied, along with its head if both roles have one.
            head: add a scalar head in fp32, initialised to zero. Default: False.
            trainable: whether its weights receive gradients. Default: True.
            layer: Optional. Layer whose hidden states the role reads, counted from 1; it has no adapters on later layers, which
                its passes do not compute. Default: that of `copy_of`, else the last one.
            rank: Optional. Rank of its adapter. Default: that of `copy_of`, else that of `backbone.lora`.
            pooling: hidden states that its head reads for the score of a reply. Default: that of the last token.

        Raises:
            RoleError: the role already exists, or `copy_of` does not.
            ModelError, ConfigError: `backbone.lora.targets` cannot have adapters, or there is no such layer; the backbone
                is left unchanged.
        """
        self._refuse_taken(role)
        if copy_of is not None and copy_of not in self._trainable:
            raise RoleError(f'role "{role}" cannot copy "{copy_of}", which does not exist; roles: {", ".join(self.names)}')
        if copy_of in self.rows:
            raise RoleError(f'role "{role}" cannot copy "{copy_of}", which trains rows of new tokens')
        depth = self.depths.get(copy_of or "") if layer is None else check_depth(self._loaded.model, layer)
        rank = self.ranks.get(copy_of or "") if rank is None else rank
        if depth is not None or rank is not None:
            # With all layers: the first ones may not have every kind of layer of a hybrid model.
            self.check_targets()
        self._remember(role, depth, rank)
        self._make_adapter(role, seed)
        # Once per backbone, with its first adapter.
        if self._unread is None:
            self._leave_out_unread(role, seed)
        self._trainable[role] = trainable
        if head:
            self._add_head(role)
        if pooling != "last":
            self.poolings[role] = pooling
        if copy_of is not None:
            self._copy(copy_of, role)
        self._mark_trainable()

    def add_rows(self, role: str, first: int, count: int) -> None:
        """Let a role train rows of the embedding and of the output layer, beginning at those of the base.

        Args:
            role: an existing role without rows.
            first: token of the first row.
            count: number of rows, one token each.

        Raises:
            RoleError: there is no such role, or it has rows already.
            ValueError: the model has no rows for these tokens.
        """
        self.check(role)
        if role == BASE or role in self.rows:
            raise RoleError(f'role "{role}" cannot get rows of new tokens: the base is frozen, and a role gets them once')
        rows = NewRows.of(self._loaded.model, first, count, self._loaded.device)
        if not self.rows:
            self._hook = self._loaded.model.get_input_embeddings().register_forward_hook(self._add_rows)  # type: ignore[operator]
        self.rows[role] = rows
        self._mark_trainable()

    @property
    def acting_rows(self) -> NewRows | None:
        """The rows of the acting role, if it has some.

        Raises:
            RoleError: the rows of a pass have several roles, and one of them has rows of new tokens.
        """
        if not self.rows or (acting := self._stack.acting) is None:
            return None
        if acting.runs and any(name in self.rows for name in acting.roles):
            raise RoleError("a role with rows of new tokens cannot share a forward pass; run one pass per role")
        return self.rows.get(acting.name)

    def _add_rows(self, embedding: nn.Module, arguments: Any, embedded_BTD: Tensor) -> Tensor:
        rows = self.acting_rows
        return embedded_BTD if rows is None else embedded_BTD + rows.embedded(embedding, arguments[0]).to(embedded_BTD)

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
            self.add(role, copy_of=of, trainable=False)

    def remove(self, role: str) -> None:
        """Remove a role completely, including one that was only partly injected."""
        remove_adapters(self._loaded.model, role)
        self._trainable.pop(role, None)
        self.heads.pop(role, None)
        if self.rows.pop(role, None) is not None and not self.rows:
            self._hook.remove()
        for settings in (self.depths, self.ranks, self.poolings):
            settings.pop(role, None)
        if self._peft is not None:
            self._peft.peft_config.pop(role, None)
        if self._peft is None or not self._peft.peft_config:
            self._peft = None
            vars(self._loaded.model).pop("peft_config", None)  # otherwise PEFT treats the next first role as a second one
        self._mark_trainable()

    def is_bare(self, role: str) -> bool:
        """Whether the role's adapter is still zero, so that a forward pass under it equals one of the base."""
        return all(not p.any() for n, p in self.parameters(role).items() if ".lora_B." in n or n.startswith("rows."))

    def parameters(self, role: str) -> dict[str, nn.Parameter]:
        """Return the role's own weights by name: the adapter, and an optional head and rows of new tokens."""
        head, rows = self.heads.get(role), self.rows.get(role)
        named = self.adapter(role) | ({} if rows is None else rows.parameters)
        return named if head is None else {**named, **{f"head.{name}": p for name, p in head.named_parameters()}}

    def adapter(self, role: str) -> dict[str, nn.Parameter]:
        """Return the weights of the role's adapter by name; empty for a snapshot of the base."""
        return {n: p for n, p in _parameters_of(self._loaded.model) if f".{role}." in n and "lora_" in n}

    def adapter_config(self, role: str) -> PeftLoraConfig:
        """Return PEFT's configuration of the role's adapter.

        Raises:
            RoleError: there is no such role, or it has no adapter.
        """
        if self._peft is None or role not in self._peft.peft_config:
            raise RoleError(f'there is no role "{role}" with an adapter to save')
        return self._peft.peft_config[role]

    def freeze(self, role: str) -> None:
        """Stop computing gradients for this role."""
        self._trainable[role] = False
        self._mark_trainable()

    def check_targets(self) -> None:
        """Check early that `backbone.lora.targets` can have adapters that forward passes use.

        Raises:
            ModelError, ConfigError: they cannot.
        """
        if self._unread is None:
            self.add(_PROBE)
            self.remove(_PROBE)

    def _refuse_taken(self, role: str) -> None:
        if role in self._trainable or role == BASE:
            raise RoleError(f'role "{role}" already exists; roles: {", ".join([BASE, *self.names])}')

    def _remember(self, role: str, depth: int | None, rank: int | None) -> None:
        """Record the layers and the rank of a role's adapter if they are not those of all roles."""
        if depth is not None:
            self.depths[role] = depth
        if rank is not None and rank != self.lora.rank:
            self.ranks[role] = rank

    def _add_head(self, role: str) -> None:
        head = nn.Linear(self._loaded.hidden_size, 1, device=self._loaded.device, dtype=torch.float32)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        self.heads[role] = head

    def _make_adapter(self, role: str, seed: int) -> None:
        # PEFT draws the matrices on the CPU, whatever the device of the layer, so that is the random state to restore.
        with stand_in_weights(self._loaded.model), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                # Of the whole model: a name in backbone.lora.targets may be that of a later layer only.
                targets = adapter_targets(self._loaded.model, self.lora.targets, self._unread or ())
                # PEFT adds adapters to the layers that it finds.
                with first_layers(self._loaded.model, self.depths.get(role)):
                    self._inject(role, targets)
            except BaseException:
                self.remove(role)
                raise

    def _leave_out_unread(self, role: str, seed: int) -> None:
        """Recreate the adapter without layers that no forward pass uses; raise if the user named such a layer."""
        try:
            unread = self._unread_layers(role)
            if unread and self.lora.targets != ALL_LINEAR:
                kind = self._loaded.model.config.model_type  # type: ignore[union-attr]
                raise ModelError(
                    f"backbone.lora.targets names {', '.join(unread)}, but no pass of models of type {kind} "
                    "would read adapters there: they use the weights of these layers without calling them; take them out of "
                    "backbone.lora.targets"
                )
        except BaseException:
            self.remove(role)
            raise
        self._unread = unread
        if unread:
            self._loaded.notes.append(f"no adapters on {', '.join(unread)}: no pass of this model would read them")
            self.remove(role)
            self._make_adapter(role, seed)

    def _inject(self, role: str, targets: dict[str, Any]) -> None:
        peft_config = PeftLoraConfig(
            task_type="CAUSAL_LM",
            r=self.ranks.get(role, self.lora.rank),
            lora_alpha=self.lora.alpha,
            use_rslora=self.lora.rslora,
            lora_dropout=0.0,
            **targets,
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
            warnings.filterwarnings("ignore", message=".*_pattern keys did not match.*")  # fused experts keep the plain rank
            try:
                if self._peft is None:
                    self._peft = get_peft_model(self._loaded.model, peft_config, adapter_name=role)
                else:
                    self._peft.add_adapter(role, peft_config)
            except ValueError as error:  # no such module, or one that cannot have an adapter
                depth = self.depths.get(role)
                where = "" if depth is None else f" in its first {depth} layers (evaluator.inputs)"
                raise ModelError(
                    f"{self._source} cannot have adapters on backbone.lora.targets = {self.lora.targets}{where}: {error}"
                ) from error
        if isinstance(OutputHead.of(self._loaded.model).module, BaseTunerLayer):
            raise ConfigError(
                "backbone.lora.targets names the output layer, which stays frozen; take it out of backbone.lora.targets"
            )
        self._stack.attach(self._loaded.model)

    def _copy(self, source: str, target: str) -> None:
        theirs = list(self.adapter(source).values())
        with torch.no_grad():
            # A snapshot of the base has no adapter; the copy's new one is equivalent, because its B is zero.
            for adapter, ours in zip(theirs, self.adapter(target).values() if theirs else [], strict=True):
                ours.copy_(adapter)
            if source in self.heads and target in self.heads:
                self.heads[target].load_state_dict(self.heads[source].state_dict())

    def _mark_trainable(self) -> None:
        """Reset `requires_grad` of every role, because PEFT changes it on other adapters when it injects one."""
        for role, trainable in self._trainable.items():
            for name, parameter in self.parameters(role).items():
                parameter.requires_grad_(trainable)
                mark(parameter, Origin(name if f".{role}." in name else f"{role}.{name}", self._loss_scale))


def _parameters_of(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield what `named_parameters` yields, in the same order, but tied ones twice.

    `named_parameters` hands every name up through all levels above it, and a role's weights are looked up often.
    """
    left = [("", model)]
    while left:
        prefix, module = left.pop()
        yield from ((prefix + name, parameter) for name, parameter in module._parameters.items() if parameter is not None)
        left += [(f"{prefix}{name}.", part) for name, part in reversed(module._modules.items()) if part is not None]
