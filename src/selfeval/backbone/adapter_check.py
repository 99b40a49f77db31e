"""Whether a model can have the adapters of `backbone.lora.targets`, found out on the meta device, without its weights."""

from __future__ import annotations

import warnings
from typing import Any

from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer

from selfeval.backbone.families.adapters import adapter_targets
from selfeval.backbone.output_head import OutputHead
from selfeval.config import LoraConfig
from selfeval.errors import ConfigError, ModelError

__all__ = ["check_adapters", "check_rank"]


def check_adapters(shell: Any, lora: LoraConfig, name: str) -> None:
    """Refuse targets that name no module of the model, or one that no role can adapt, and a rank above every layer's width.

    Args:
        shell: the model on the meta device; it has adapters afterwards.
        lora: targets and rank of the adapters.
        name: of the model, for messages.

    Raises:
        ModelError, ConfigError: the targets cannot have adapters, or none of this rank.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # loading warns of the same once more, or not at all
        try:
            # Rank 1 is enough to see which modules get adapters; `_check_rank` looks at the configured rank.
            config = PeftLoraConfig(task_type="CAUSAL_LM", r=1, **adapter_targets(shell, lora.targets))
            get_peft_model(shell, config, low_cpu_mem_usage=True)
        except ValueError as error:
            raise ModelError(f"{name} cannot have adapters on backbone.lora.targets = {lora.targets}: {error}") from error
    if isinstance(OutputHead.of(shell).module, BaseTunerLayer):
        raise ConfigError(
            "backbone.lora.targets names the output layer, which stays frozen; take it out of backbone.lora.targets"
        )
    for layer, module in shell.named_modules():
        if isinstance(module, LoraLayer) and module.lora_embedding_A:
            raise ModelError(
                f"backbone.lora.targets puts an adapter on the embedding {layer}; choose linear layers, e.g. all-linear"
            )
    check_rank(shell, lora.rank, name)


def check_rank(shell: Any, rank: int, name: str, setting: str = "backbone.lora.rank") -> None:
    """Refuse a rank above the width of every adapted layer.

    It changes nothing but the memory it takes; 1,000,000 would fail only when the evaluator is made.

    Args:
        shell: the model on the meta device, with adapters.
        rank: rank of an adapter.
        name: of the model, for messages.
        setting: name of the rank, for messages. Default: that of all roles.

    Raises:
        ConfigError: the rank is larger than every layer.
    """
    layers = [module for module in shell.modules() if isinstance(module, LoraLayer)]
    widest = max((max(layer.in_features, layer.out_features) for layer in layers), default=rank)
    if rank > widest:
        raise ConfigError(f"{setting} = {rank} is larger than the widest layer of {name} with an adapter ({widest}); lower it")
