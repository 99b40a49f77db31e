"""Forward passes of one frozen base model under the role that acts.

The base is shared by several independent roles (`role_set.RoleSet`). `Backbone.acting_as` activates a role for the forward
passes inside its block. No role stays active afterwards: a forward pass outside such a block raises an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from selfeval.backbone.adapters import BASE, Acting, AdapterStack
from selfeval.backbone.body import text_body
from selfeval.backbone.budget import CPU_PASS_TOKENS, MemoryBudget
from selfeval.backbone.decode_step import DecodeStep
from selfeval.backbone.depth import first_layers
from selfeval.backbone.fingerprint import base_fingerprint
from selfeval.backbone.load import LoadedModel, load_model, pick_device
from selfeval.backbone.loss_scale import LossScale
from selfeval.backbone.meters import cap_gpus, keep_few_kernels, meter_for
from selfeval.backbone.output_head import OutputHead
from selfeval.backbone.picked_tokens import FEW, MlpAt, agrees_at_picked_tokens, last_mlp
from selfeval.backbone.reach import unread_layers
from selfeval.backbone.recompute import recompute
from selfeval.backbone.role_set import RoleSet
from selfeval.backbone.shared_prefixes import LayoutBlock, PrefixLayout, agrees_with_separate_rows, longest_span, recomputation
from selfeval.backbone.weight_census import WeightCensus
from selfeval.config import BackboneConfig, LoraConfig
from selfeval.errors import ModelError, RoleError, is_out_of_memory

__all__ = ["Backbone"]


class Backbone:
    """One frozen base and the passes through it.

    Attributes:
        roles: the roles on the base.
        census: counts of the weights in memory.
        fingerprint: identifies the base weights in role files.

    Args:
        loaded: the model.
        lora: Rank, scale and target modules of every adapter.
        source: name of the model in messages and in role files.
        memory_budget: optional memory limit of this process in bytes; on a GPU, `cap_gpus` enforces it. Default: no limit.
    """

    role_set: type[RoleSet] = RoleSet

    def __init__(self, loaded: LoadedModel, lora: LoraConfig, source: str, memory_budget: int | None = None) -> None:
        self.loaded = loaded
        meter = meter_for((p.device for p in loaded.model.parameters()), memory_budget)
        self.budget = MemoryBudget(meter, pass_tokens=CPU_PASS_TOKENS if loaded.device.type == "cpu" else None)
        self.loss_scale = LossScale(self._notify) if loaded.model.dtype == torch.float16 else None
        self.source = source
        self._stack = AdapterStack()
        self.roles = self.role_set(loaded, lora, source, self._stack, self.loss_scale, self._unread_layers)
        self.census = WeightCensus(loaded.model, self.roles)
        self.fingerprint = self._fingerprint()
        loaded.model.register_forward_pre_hook(self._refuse_without_role)
        # Autograd would otherwise keep all streamed weights until the backward pass, see `streaming`.
        if loaded.placement is not None:
            recompute(loaded.model, loaded.placement.streamed, self._recomputation)
        self._check_logits()
        self._steps_agree: bool | None = None
        self._shares_prefixes: bool | None = None
        self._picks_tokens: bool | None = None

    def _recomputation(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return recomputation(self._stack.checkpoint_contexts(), self.model)

    def _notify(self, sentence: str) -> None:
        if self.budget.notify is not None:
            self.budget.notify(sentence)

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
        # Not equal: in 16 bits the two ways round differently.
        if found is None or not torch.allclose(found, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max())):
            kind = self.model.config.model_type
            raise ModelError(
                f"{self.source}: models of type {kind} compute their logits in a way that this version does not support; use "
                "another model"
            )

    def _refuse_pass(self, error: Exception) -> NoReturn:
        if is_out_of_memory(error):
            raise error
        raise ModelError(
            f"{self.source}: a test forward pass of four tokens failed ({' '.join(str(error).split())[:300]}); either its "
            f"config.json does not match its weights, or transformers {transformers.__version__} cannot compute models of type "
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

    def _unread_layers(self, role: str) -> tuple[str, ...]:
        with self._stack.block(Acting.of(role)):
            return unread_layers(self, self.roles.parameters(role))

    @classmethod
    def load(cls, model: str, config: BackboneConfig, *, trust_remote_code: bool = False) -> Backbone:
        """Load a model as configured.

        Args:
            model: model folder or hub id.
            config: its settings. They may come from an untrusted run folder, so they never decide whether code runs.
            trust_remote_code: run code that ships with the model; set by the command-line option only. Default: False.
        """
        # Before the first product, at which oneDNN reads its settings.
        keep_few_kernels()
        if config.memory_budget is not None and pick_device(config.device).type == "cuda":
            cap_gpus(config.memory_budget)
        loaded = load_model(
            model,
            device=config.device,
            precision=config.precision,
            trust_remote_code=trust_remote_code,
            context=config.context,
            placement=config.placement,
            room=config.memory_budget,
        )
        source = Path(model).name if Path(model).is_dir() else model
        backbone = cls(loaded, config.lora, source, config.memory_budget)
        if config.pass_tokens != "auto":
            backbone.budget.pass_tokens = config.pass_tokens
        if config.checkpointing:
            backbone.recompute_layers()
        return backbone

    @property
    def model(self) -> Any:
        """The Hugging Face model, with adapters injected once a role exists."""
        return self.loaded.model

    @property
    def output_head(self) -> OutputHead:
        """The frozen output layer with its family's scale and cap, and the rows that the acting role adds for new tokens."""
        rows = self.roles.acting_rows
        return OutputHead.of(self.loaded.model, None if rows is None else rows.head)

    @property
    def base_name(self) -> str:
        """Name of the base in messages and role files, including any context extension."""
        return f"{self.source} ({self.loaded.stretch})" if self.loaded.stretch else self.source

    @property
    def acting(self) -> str | None:
        """Role of the innermost `acting_as` block (`a+b` if its rows have several roles), or None outside any block."""
        return self._stack.acting.name if self._stack.acting else None

    def _refuse_without_role(self, module: nn.Module, arguments: Any) -> None:
        if self._stack.acting is None:
            raise RoleError("forward pass outside of `with backbone.acting_as(role)`; select a role first")

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
            self.roles.check(name)
        with self._stack.block(acting):
            yield

    def recompute_layers(self) -> None:
        """Enable gradient checkpointing: keep only the inputs of each layer and recompute the layer in the backward pass.

        Gradients are unchanged, and the layer is recomputed under the same role (Chen et al. 2016,
        https://arxiv.org/abs/1604.06174).

        Raises:
            ModelError: this model family does not support recomputation.
        """
        layers = [name for name, module in self.model.named_modules() if isinstance(module, GradientCheckpointingLayer)]
        if not layers:
            raise ModelError(
                f"{self.source}: this kind of model cannot recompute its layers; set backbone.checkpointing = false"
            )
        # Streamed layers are recomputed from the start.
        streamed = self.loaded.placement.streamed if self.loaded.placement else ()
        recompute(self.model, [name for name in layers if name not in streamed], self._recomputation)

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
            raise RoleError(f"{work} reorders its rows; use one role at a time")

    def hidden(self, ids_BT: Tensor, attention_BT: Tensor) -> Tensor:
        """Compute the last hidden states `[B, T, D]` of right-padded sequences under the acting role.

        For a role that reads an earlier layer they are those of this layer, after the final norm.
        """
        arguments: dict[str, Any] = {"input_ids": ids_BT, "attention_mask": attention_BT}
        if self.loaded.forward_accepts("position_ids"):
            arguments["position_ids"] = (attention_BT.long().cumsum(-1) - 1).clamp_min(0)
        return self._body(**arguments)

    def hidden_at(self, ids_BT: Tensor, attention_BT: Tensor, rows_S: Tensor, places_S: Tensor) -> Tensor:
        """Compute the last hidden states `[S, D]` at some tokens of right-padded sequences under the acting role.

        Args:
            ids_BT, attention_BT: as of `hidden`.
            rows_S: row of each token.
            places_S: index of each token in its row.
        """
        flat_S = rows_S * ids_BT.shape[1] + places_S
        with self._only_at(flat_S, ids_BT.numel()):
            hidden_BTD = self.hidden(ids_BT, attention_BT)
        return hidden_BTD.flatten(0, 1).index_select(0, flat_S)

    def packed_hidden(self, ids_BT: Tensor, positions_BT: Tensor) -> Tensor:
        """Compute the last hidden states `[B, T, D]` of rows of several documents under the acting role.

        Args:
            ids_BT: token ids.
            positions_BT: position of each token within its document; a document ends where they restart. Only models for which
                `selfeval.backbone.packing.reads_packed_rows` is True separate the documents.
        """
        # Without an attention mask, transformers derives the mask of the documents from the positions.
        return self._body(input_ids=ids_BT, position_ids=positions_BT)

    def shares_prefixes(self, longest: int) -> bool:
        """Return whether replies to one prompt can share its pass, measured once on short texts.

        Args:
            longest: tokens of the longest prompt with a reply. With a sliding window, only shorter texts can share.
        """
        if self._stack.acting is not None and self._stack.acting.runs:
            return False
        if self._shares_prefixes is None:
            self._shares_prefixes = self._measure_sharing()
        return bool(self._shares_prefixes) and longest <= longest_span(self.model)

    def _measure_sharing(self) -> bool | None:
        """Measure whether replies can share the pass of their prompt; None where there was no memory to find out."""
        try:
            return agrees_with_separate_rows(self)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return None

    def layout_hidden(self, layout: PrefixLayout) -> Tensor:
        """Compute the last hidden states `[N, D]` of a layout under the acting role; requires `shares_prefixes`."""
        with LayoutBlock(self.model, layout):
            return self._body(input_ids=layout.ids_1N, position_ids=layout.positions_1N)[0]

    def layout_hidden_at(self, layout: PrefixLayout, places_S: Tensor) -> Tensor:
        """Compute the last hidden states `[S, D]` at some tokens of a layout; see `layout_hidden`."""
        with self._only_at(places_S, layout.ids_1N.numel()):
            return self.layout_hidden(layout).index_select(0, places_S)

    def _only_at(self, places_S: Tensor, tokens: int) -> AbstractContextManager[Any]:
        """Return the context of a pass of which only the states at these tokens are read."""
        # A pass with gradients may recompute the layer when the context is closed.
        is_plain = not torch.is_grad_enabled() and not (self._stack.acting and self._stack.acting.runs)
        if not is_plain or len(places_S) > FEW * tokens or not self.picks_tokens:
            return nullcontext()
        module = last_mlp(self.loaded.model, self._depth)
        assert module is not None, "it was found for the measurement"
        return MlpAt(module, places_S)

    @property
    def picks_tokens(self) -> bool:
        """Whether the last MLP can be computed at some tokens only (`selfeval.backbone.picked_tokens`), measured once."""
        if self._picks_tokens is None:
            self._picks_tokens = agrees_at_picked_tokens(self)
        return self._picks_tokens

    def check_layer(self, layer: int) -> None:
        """Check with a short pass that a role can read this layer.

        Args:
            layer: layer, counted from 1.

        Raises:
            ConfigError, ModelError: there is no such layer, no adapter fits the layers up to it, or the family does not compute
                its layers from a list.
        """
        role = f"check_layer_{layer}"
        self.roles.add(role, layer=layer, trainable=False)
        try:
            ids = torch.tensor([[0, 1, 2, 3]], device=self.loaded.device)
            with torch.no_grad(), self.acting_as(role):
                self.hidden(ids, torch.ones_like(ids))
        finally:
            self.roles.remove(role)

    def decode_step(self) -> DecodeStep | None:
        """Return a faster pass over one new token per row, or None if this model has its own pass only.

        Made again for each batch, because adding a role replaces modules.
        """
        # It knows nothing of rows of new tokens.
        if self._steps_agree is False or self.roles.rows or not DecodeStep.fits(self.loaded, self._stack):
            return None
        try:
            step = DecodeStep(self.loaded, self._stack)
            if self._steps_agree is None:
                self._steps_agree = step.agrees()
        except (AttributeError, KeyError, TypeError):  # a layer of another kind, or with other names
            self._steps_agree = False
        return step if self._steps_agree else None

    def _body(self, **arguments: Tensor) -> Tensor:
        # The hook on the whole model does not see passes through its body alone.
        if self._stack.acting is None:
            raise RoleError("forward pass outside of `with backbone.acting_as(role)`; select a role first")
        model = self.loaded.model
        with first_layers(model, self._depth):
            return text_body(model)(**arguments, use_cache=False).last_hidden_state  # type: ignore[no-any-return]

    @property
    def _depth(self) -> int | None:
        """Number of layers of the acting role; None: all of them."""
        depths = {self.roles.depths.get(role) for role in self._stack.acting.roles} if self._stack.acting else {None}
        if len(depths) > 1:
            raise RoleError(
                f"roles that read different layers cannot share a forward pass ({self.acting}); run one pass per role"
            )
        return depths.pop()

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute next-token logits in fp32 from hidden states `[..., D]`, with the scale and cap of the model family."""
        return self.output_head.logits(hidden)

    def score(self, role: str, hidden: Tensor) -> Tensor:
        """Apply the role's scalar head to hidden states in fp32: `[..., D]` -> `[...]`."""
        scores: Tensor = self.roles.heads[role](hidden.float())
        return scores.squeeze(-1)

    def training_state(self) -> dict[str, Any]:
        """Return the state that a checkpoint stores in addition to the roles: the loss scale, if the base needs one."""
        return {} if self.loss_scale is None else {"loss_scale": self.loss_scale.state()}

    def load_training_state(self, state: Mapping[str, Any]) -> None:
        """Restore the result of `training_state`; other keys are ignored."""
        if self.loss_scale is not None and "loss_scale" in state:
            self.loss_scale.load(state["loss_scale"])
