"""The engines that sample replies: the backbone's own, or vLLM with a second copy of the weights (docs/concepts/engines.md)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from selfeval.backbone.roles import Backbone
from selfeval.config import BackboneConfig
from selfeval.rollout.engine import generate
from selfeval.rollout.guide import Guide
from selfeval.rollout.requests import Request, Rollout
from selfeval.rollout.thinking import ThinkingTokens

__all__ = ["OwnEngine", "RolloutEngine", "make_engine"]


class RolloutEngine(Protocol):
    """An engine that samples replies of the acting role.

    Attributes:
        max_weight: upper bound of the importance weights in policy training; None if the log-probs of the engine are those of
            the backbone, so that none are needed.
    """

    @property
    def max_weight(self) -> float | None: ...

    def check(self, backbone: Backbone) -> None:
        """Refuse a backbone for which the engine cannot sample.

        Raises:
            ConfigError: see above.
        """

    def generate(
        self,
        backbone: Backbone,
        requests: Sequence[Request],
        *,
        max_new_tokens: int,
        seed: int,
        batch_size: int = 256,
        stop: Sequence[int] = (),
        watch: Sequence[int] = (),
        guide: Guide | None = None,
        thinking: ThinkingTokens | None = None,
        first: int = 0,
        advance: Callable[[int], None] | None = None,
    ) -> list[Rollout]:
        """Sample one rollout per request under the acting role; arguments and result as in `engine.generate`."""
        ...

    def close(self) -> None:
        """Release all memory and files of the engine."""


class OwnEngine:
    """The engine on the backbone's own weights."""

    max_weight: float | None = None

    def check(self, backbone: Backbone) -> None:
        """Do nothing: it samples from every backbone."""

    def generate(self, backbone: Backbone, requests: Sequence[Request], **settings: Any) -> list[Rollout]:
        """Call `engine.generate`."""
        return generate(backbone, requests, **settings)

    def close(self) -> None:
        """Do nothing: it has no separate memory."""


def make_engine(model: str, config: BackboneConfig) -> RolloutEngine:
    """Create the engine that the configuration selects. Nothing is loaded before the first reply.

    Args:
        model: folder or hub id of the base.
        config: settings of the backbone.

    Raises:
        ConfigError: vLLM is selected, and it is not installed, or there is no GPU.
    """
    if config.engine == "own":
        return OwnEngine()
    # Imported here: nobody else needs the module.
    from selfeval.rollout.vllm_engine import VLLMEngine

    return VLLMEngine(model, config)
