"""The section of the backbone: how the frozen base is loaded, adapted and run."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ByteSize, Field, field_validator, model_validator

from selfeval.config.fields import Count, CountOrAuto, CountOrNone, DeviceName, Positive, Section, Size

__all__ = ["BackboneConfig", "ContextConfig", "LoraConfig", "PlacementConfig", "VLLMConfig"]

_MOST_RANK = 512
"""Largest rank of an adapter that vLLM loads."""


class ContextConfig(Section):
    """Context length and attention: longer text than the model was trained on, by scaling its rotary positions (RoPE)."""

    rope_scaling: Literal["none", "linear", "dynamic", "yarn"] = "none"
    """Position interpolation, dynamic NTK or YaRN (docs/concepts/long-context.md); `none`: as in the model's config."""
    rope_factor: Annotated[float, Field(ge=1.0)] = 1.0
    """Context length as a multiple of the trained one; 1 changes nothing."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Attention implementation; `auto` leaves the choice to transformers (sdpa if the family supports it)."""

    @field_validator("rope_scaling", mode="before")
    @classmethod
    def _none(cls, value: Any) -> Any:
        return "none" if value is None else value  # `--set backbone.context.rope_scaling=none`

    @model_validator(mode="after")
    def _factor_has_a_method(self) -> ContextConfig:
        if self.rope_scaling == "none" and self.rope_factor != 1.0:
            raise ValueError(f"rope_factor {self.rope_factor:g} needs a rope_scaling: linear, dynamic or yarn")
        return self


class PlacementConfig(Section):
    """Placement of the frozen base on devices, by their free memory (see concepts/placement.md)."""

    mode: Literal["auto", "single"] = "auto"
    """`auto` spreads a model that fits on no single device over cards, cpu and disk; `single` puts it on one device."""
    max_memory: dict[DeviceName, ByteSize] = Field(default={})
    """Optional. Maximum bytes of weights per device, by its name: `cuda:0`, `cpu`, `disk`; for example "10GiB"."""
    reserve: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.2
    """Share of each device's free memory that is reserved for activations, caches, adapters and optimizers."""
    folder: str = ""
    """Optional. Folder for weights that cannot be read from the model's own files. Default: a temporary folder."""


class LoraConfig(Section):
    """LoRA adapters, one per role (Hu et al. 2021, https://arxiv.org/abs/2106.09685)."""

    rank: Count = 16
    """Rank of every adapter."""
    alpha: Positive = 32.0
    """Scale: the update is (alpha / rank) B A, or (alpha / sqrt(rank)) B A with rslora."""
    rslora: bool = False
    """Use rank-stabilised scaling (https://arxiv.org/abs/2312.03732)."""
    targets: str | tuple[str, ...] = "all-linear"
    """Modules that get adapters: `all-linear`, or names of modules."""

    @field_validator("targets")
    @classmethod
    def _names_modules(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        names = (value,) if isinstance(value, str) else value
        if not names or not all(name.strip() for name in names):
            raise ValueError('list at least one module, such as ["q_proj", "v_proj"], or use "all-linear"')
        return value


class VLLMConfig(Section):
    """vLLM, used if `backbone.engine = "vllm"` (docs/concepts/engines.md)."""

    memory_share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.4
    """Share of the GPU's memory for vLLM's copy of the weights and its KV cache (`gpu_memory_utilization`)."""
    max_length: CountOrNone = None
    """Optional. Maximum tokens of a prompt with its reply (`max_model_len`). Default: the model's context."""
    sleep: bool = True
    """Move vLLM's weights to the CPU's memory and free its KV cache after every sampling (sleep mode, level 1)."""
    max_weight: Annotated[float, Field(ge=1.0)] = 2.0
    """Upper bound of a token's importance weight in policy training (truncated importance sampling)."""
    max_difference: Positive = 0.1
    """Stop if the log-probs of vLLM and of the base differ by more than this on average, in nats per token."""


class BackboneConfig(Section):
    """The backbone: the frozen base with its adapters, and the size of its forward passes."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the backbone; `auto` uses a GPU if there is one."""
    precision: Literal["auto", "fp32", "bf16", "fp16", "int8", "nf4"] = "auto"
    """Precision of the frozen base; `auto` chooses by device and free memory. Adapters and heads are always fp32."""
    checkpointing: bool = False
    """Activation checkpointing: recompute each layer in the backward pass. Far less memory, about a third more time."""
    memory_budget: Size | None = None
    """Optional. Memory that this process may use, such as 2GiB (on a GPU: torch's memory there); batches shrink to fit."""
    batch_tokens: Count = 16384
    """Maximum tokens per micro-batch when training, and per forward pass when scoring."""
    pass_tokens: CountOrAuto = "auto"
    """Maximum tokens per forward pass when scoring; `auto` measures up to 4,096 on a CPU, and is `batch_tokens` on a GPU."""
    rollout_batch_size: Count = 256
    """Batch size of generation, in replies."""
    engine: Literal["own", "vllm"] = "own"
    """Engine that samples replies and the policy's rollouts; `vllm` keeps a second copy of the weights on the GPU."""
    context: ContextConfig = ContextConfig()
    placement: PlacementConfig = PlacementConfig()
    lora: LoraConfig = LoraConfig()
    vllm: VLLMConfig = VLLMConfig()

    @model_validator(mode="after")
    def _vllm_samples_from_the_same_model(self) -> BackboneConfig:
        if self.engine != "vllm":
            return self
        if self.device == "cpu":
            raise ValueError('engine = "vllm" needs a GPU; set device = "auto" or "cuda", or engine = "own"')
        if self.precision in ("int8", "nf4"):
            raise ValueError(
                f'engine = "vllm" would sample from the weights that are not quantised; set precision to bf16, fp16 or fp32 '
                f'instead of {self.precision}, or engine = "own"'
            )
        if self.context.rope_scaling != "none":
            raise ValueError('engine = "vllm" does not scale positions; set context.rope_scaling = "none", or engine = "own"')
        if self.lora.rank > _MOST_RANK:
            raise ValueError(f'engine = "vllm" loads adapters of rank {_MOST_RANK} at most, got lora.rank = {self.lora.rank}')
        return self
