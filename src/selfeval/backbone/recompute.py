"""Gradient checkpointing: keep only the inputs of layers and recompute the layers in the backward pass.

Chen et al. 2016, https://arxiv.org/abs/1604.06174. Transformers' own switch would also put the layers in training mode, and
take the cache of every pass away, that of sampling among them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from selfeval.backbone.families.cache import is_cache

__all__ = ["recompute"]

Contexts = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]


def recompute(model: nn.Module, layers: Iterable[str], contexts: Contexts) -> None:
    """Make each of these layers keep only its input for the backward, which computes it again.

    Args:
        model: whose layers they are.
        layers: their names.
        contexts: called in the forward pass; returns the contexts of the forward pass and of the recomputation.
    """
    for name in layers:
        layer = model.get_submodule(name)
        # This wraps accelerate's forward as well, so the recomputation of a streamed layer brings its weights in again.
        layer.forward = _recomputed(layer.forward, contexts)


def _recomputed(forward: Callable[..., Any], contexts: Contexts) -> Callable[..., Any]:
    def run(*arguments: Any, **options: Any) -> Any:
        has_cache = any(is_cache(value) for value in (*arguments, *options.values()))
        if not torch.is_grad_enabled() or has_cache:  # a cache is written to: computing twice would write twice
            return forward(*arguments, **options)
        # An early stop would leave a streamed module in which it happens before the module drops its weights.
        with set_checkpoint_early_stop(False):
            # There is no random state to restore: the model is in eval mode, and the adapters have no dropout.
            return checkpoint(
                forward, *arguments, use_reentrant=False, preserve_rng_state=False, context_fn=contexts, **options
            )

    return run
