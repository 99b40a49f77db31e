"""A stand-in of vLLM's Python API on transformers and PEFT, for tests on a machine without a GPU.

The names, arguments and results are those of vLLM's sources of 2026 (vllm/entrypoints/llm.py, sampling_params.py, outputs.py;
lora/request.py of 0.26.0), as far as `selfeval.rollout.vllm_engine` uses them: `LLM(...)`,
`LLM.generate`, `LLM.sleep`, `LLM.wake_up`, `LLM.llm_engine.remove_lora`, `SamplingParams` and `LoRARequest`. Any other argument
raises a TypeError. The model is read from its folder and the adapter from the folder of the request, so it really samples, and
really swaps adapters. It has none of vLLM's kernels, batching, memory management or processes.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from selfeval.backbone.families.cache import CACHE_FIELD, cache_of

__all__ = ["LLM", "LoRARequest", "SamplingParams", "install"]


@dataclass(frozen=True)
class LoRARequest:
    """Names an adapter: vLLM identifies it by name and number, and never reads the same number twice."""

    lora_name: str
    lora_int_id: int
    lora_path: str = ""
    load_inplace: bool = False

    def __post_init__(self) -> None:
        if self.lora_int_id < 1:
            raise ValueError(f"id must be > 0, got {self.lora_int_id}")
        if not self.lora_path:
            raise ValueError("lora_path cannot be empty")


@dataclass
class SamplingParams:
    """Settings of one request, with vLLM's defaults and checks."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: str | list[str] | None = None
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    logprobs: int | None = None
    detokenize: bool = True

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"temperature {self.temperature}, top_p {self.top_p}")
        if self.top_k < -1 or not 0 <= self.min_p <= 1 or not 0 < self.repetition_penalty <= 2:
            raise ValueError(f"top_k {self.top_k}, min_p {self.min_p}, repetition_penalty {self.repetition_penalty}")
        if self.stop and not self.detokenize:
            raise ValueError("stop strings are only supported when detokenize is True")
        if self.max_tokens is None or self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise OverflowError("the seed is serialised as a signed number of 64 bits")


@dataclass
class Logprob:
    """Log-prob of a token, and its rank."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    """One reply to a request."""

    index: int
    text: str
    token_ids: Sequence[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass
class RequestOutput:
    """The replies to a request."""

    request_id: str
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = True


@dataclass
class _Engine:
    """`LLM.llm_engine`: loaded adapters by number."""

    loaded: dict[int, str] = field(default_factory=dict)
    removed: list[int] = field(default_factory=list)

    def remove_lora(self, lora_id: int) -> bool:
        self.removed.append(lora_id)
        return self.loaded.pop(lora_id, None) is not None


class LLM:
    """vLLM's offline engine.

    Attributes:
        noise: class attribute: standard deviation of the noise on the logits, which makes its distribution another one.
        misreported: class attribute: added to every log-prob that it reports, although it samples from the right distribution.
        made: class attribute: all instances.
    """

    noise: ClassVar[float] = 0.0
    misreported: ClassVar[float] = 0.0
    made: ClassVar[list[LLM]] = []

    def __init__(
        self,
        model: str,
        *,
        dtype: str = "auto",
        seed: int = 0,
        max_model_len: int | None = None,
        gpu_memory_utilization: float = 0.9,
        enable_lora: bool = False,
        max_loras: int = 1,
        max_lora_rank: int = 16,
        enable_prefix_caching: bool | None = None,
        enable_sleep_mode: bool = False,
        logprobs_mode: str = "raw_logprobs",
        generation_config: str = "auto",
    ) -> None:
        assert max_lora_rank in (1, 8, 16, 32, 64, 128, 256, 320, 512)
        assert logprobs_mode == "processed_logprobs", "the stand-in reports no others"
        assert (Path(model) / "config.json").is_file()
        self.model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.max_model_len, self.lora_rank = max_model_len, max_lora_rank if enable_lora else 0
        self.can_sleep, self.asleep, self.naps = enable_sleep_mode, False, 0
        self.llm_engine = _Engine()
        self.calls: list[tuple[str | None, int]] = []
        self._noise = torch.Generator().manual_seed(seed)
        LLM.made.append(self)

    def sleep(self, level: int = 1, mode: str = "abort") -> None:
        assert self.can_sleep, "Sleep mode is not enabled in the model config"
        assert level == 1
        self.asleep, self.naps = True, self.naps + 1

    def wake_up(self, tags: list[str] | None = None) -> None:
        assert self.asleep
        self.asleep = False

    def generate(
        self,
        prompts: Sequence[dict[str, list[int]]],
        sampling_params: Sequence[SamplingParams],
        *,
        use_tqdm: bool = True,
        lora_request: LoRARequest | None = None,
    ) -> list[RequestOutput]:
        """Sample one reply per prompt."""
        assert not self.asleep, "a sleeping engine computes garbage"
        assert len(prompts) == len(sampling_params)
        self.calls.append((lora_request.lora_name if lora_request else None, len(prompts)))
        model = self._adapted(lora_request)
        rows = zip(prompts, sampling_params, strict=True)
        return [self._reply(model, str(i), p["prompt_token_ids"], settings) for i, (p, settings) in enumerate(rows)]

    def _adapted(self, request: LoRARequest | None) -> Any:
        # Removing PEFT's layers returns the plain base, as if each adapter were loaded onto a fresh copy.
        if isinstance(self.model, PeftModel):
            self.model = self.model.unload()
        if request is None:
            return self.model
        # What vLLM has loaded under a number, it does not read again.
        folder = self.llm_engine.loaded.setdefault(request.lora_int_id, request.lora_path)
        with warnings.catch_warnings(action="ignore"):  # of transformers, about an attribute that PEFT reads
            self.model = PeftModel.from_pretrained(self.model, folder).eval()
        rank = self.model.peft_config["default"].r
        assert rank <= self.lora_rank, f"LoRA rank {rank} is greater than max_lora_rank {self.lora_rank}"
        return self.model

    @torch.no_grad()
    def _reply(self, model: Any, name: str, prompt: list[int], settings: SamplingParams) -> RequestOutput:
        generator = None if settings.seed is None else torch.Generator().manual_seed(settings.seed)
        ids, steps, reason, stopped = list(prompt), [], "length", None
        state, unread = None, torch.tensor([prompt])
        for _ in range(settings.max_tokens or 0):
            found = model(input_ids=unread, **{CACHE_FIELD: state}, use_cache=True)
            state = cache_of(found)
            logits_V = found.logits[0, -1].float()
            logits_V = logits_V + self.noise * torch.randn(logits_V.shape, generator=self._noise)
            logits_V = RepetitionPenaltyLogitsProcessor(settings.repetition_penalty)(torch.tensor([ids]), logits_V[None])[0]
            token, logprob = _draw(logits_V, settings, generator)
            ids.append(token)
            steps.append({token: Logprob(logprob + self.misreported)})
            unread = torch.tensor([[token]])
            if token in (settings.stop_token_ids or ()):
                reason = "stop"
                break
            text = self.tokenizer.decode(ids[len(prompt) :]) if settings.stop else ""
            if stopped := next((string for string in settings.stop or () if string in text), None):
                reason = "stop"
                break
            if self.max_model_len is not None and len(ids) >= self.max_model_len:
                break
        logprobs = None if settings.logprobs is None else steps
        reply = CompletionOutput(0, "", ids[len(prompt) :], None, logprobs, reason, stopped)
        return RequestOutput(name, list(prompt), [reply])


def _draw(logits_V: Tensor, settings: SamplingParams, generator: torch.Generator | None) -> tuple[int, float]:
    """Draw a token, and return its log-prob after temperature and nucleus, as `processed_logprobs` is defined."""
    if not settings.temperature:
        logprobs_V = logits_V.log_softmax(-1)
        token = int(logprobs_V.argmax())
        return token, float(logprobs_V[token])
    # The warpers of transformers, and not the filters of the engine under test.
    warpers: list[Any] = [TemperatureLogitsWarper(settings.temperature)]
    if settings.top_k > 0:
        warpers.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1:
        warpers.append(TopPLogitsWarper(settings.top_p))
    if settings.min_p:
        warpers.append(MinPLogitsWarper(settings.min_p))
    for warper in warpers:
        logits_V = warper(torch.zeros(1, 1, dtype=torch.long), logits_V[None])[0]
    logprobs_V = logits_V.log_softmax(-1)
    token = int(torch.multinomial(logprobs_V.exp(), 1, generator=generator))
    return token, float(logprobs_V[token])


def install(monkeypatch: pytest.MonkeyPatch, *, noise: float = 0.0, misreported: float = 0.0) -> type[LLM]:
    """Make `import vllm` import the stand-in, on a machine that seems to have a GPU."""
    from selfeval.rollout import vllm_engine

    package, lora, request = ModuleType("vllm"), ModuleType("vllm.lora"), ModuleType("vllm.lora.request")
    request.LoRARequest = LoRARequest  # type: ignore[attr-defined]
    lora.request = request  # type: ignore[attr-defined]
    package.lora, package.LLM, package.SamplingParams = lora, LLM, SamplingParams  # type: ignore[attr-defined]
    for module in (package, lora, request):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(vllm_engine, "pick_device", lambda wanted: torch.device("cuda"))
    monkeypatch.setattr(LLM, "noise", noise)
    monkeypatch.setattr(LLM, "misreported", misreported)
    monkeypatch.setattr(LLM, "made", [])
    return LLM
