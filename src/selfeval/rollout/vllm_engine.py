"""Sampling with vLLM, which holds a second copy of the base's weights; the adapter of the acting role is swapped in.

vLLM is imported when the engine is created, and the engine only if the configuration selects it. What was tested is described
in docs/concepts/engines.md. The calls follow vLLM's sources of 2026: `LLM.generate` on token ids with one `SamplingParams` per
request, and a `LoRARequest` for the adapter.

The differences from the engine on the backbone's weights are covered in three ways. End tokens and lengths are passed
explicitly, because vLLM would use those of the generation config. Log-probs are those of the distribution that was sampled from
(`processed_logprobs`), and a sample of them is compared with the backbone's after every change of an adapter. Policy training
corrects for the rest by truncated importance weights.
"""

from __future__ import annotations

import hashlib
import itertools
import shutil
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from selfeval.backbone.adapters import BASE
from selfeval.backbone.load import pick_device
from selfeval.backbone.role_files import save_role
from selfeval.backbone.roles import Backbone
from selfeval.backbone.sequences import reply_logprobs
from selfeval.backbone.snapshot import model_folder
from selfeval.config import BackboneConfig
from selfeval.errors import ConfigError, LoopError, RoleError
from selfeval.rollout.engine import add_to_tally, check_prompts
from selfeval.rollout.guide import Guide
from selfeval.rollout.requests import Request, Rollout
from selfeval.rollout.thinking import ReplyProgress, ThinkingTokens

__all__ = ["VLLMEngine"]

_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM allows for `max_lora_rank`, in all versions."""
_COMPARED = 8
"""Replies whose log-probs are compared after every change of an adapter."""
_QUANTISED = ("int8", "nf4")


@dataclass(frozen=True)
class _Adapter:
    """The adapter of a role as vLLM has it.

    Attributes:
        digest: hash of its weights.
        folder: its files, which vLLM may read again.
        request: vLLM's `LoRARequest`.
    """

    digest: str
    folder: Path
    request: Any


class VLLMEngine:
    """An engine on a copy of the base in vLLM.

    Args:
        model: folder or hub id of the base.
        config: settings of the backbone.

    Raises:
        ConfigError: vLLM is not installed, or there is no GPU.
    """

    def __init__(self, model: str, config: BackboneConfig) -> None:
        self._vllm = _library()
        if pick_device(config.device).type != "cuda":
            raise ConfigError('backbone.engine = "vllm" needs a GPU, and torch sees none here; set backbone.engine = "own"')
        self._model, self._config = model, config
        self._folder = Path(tempfile.mkdtemp(prefix="selfeval-vllm-"))
        self._remove_folder = weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._llm: Any = None
        self._adapters: dict[str, _Adapter] = {}
        self._numbers = itertools.count(1)
        self._compared: set[str] = set()

    @property
    def max_weight(self) -> float | None:
        return self._config.vllm.max_weight

    def check(self, backbone: Backbone) -> None:
        """Refuse a base that vLLM would load with other weights, or for whose copy there is no room.

        Raises:
            ConfigError: the base is quantised, or is spread over several devices.
        """
        loaded = backbone.loaded
        if loaded.precision in _QUANTISED:
            raise ConfigError(
                f'backbone.engine = "vllm" would sample from the weights that are not quantised, and this base is in '
                f'{loaded.precision}; set backbone.precision = "bf16", or backbone.engine = "own"'
            )
        if loaded.placement is not None and not loaded.placement.is_whole:
            raise ConfigError(
                'backbone.engine = "vllm" needs room for a second copy of the weights on one GPU, and this base is spread over '
                'several devices; set backbone.engine = "own"'
            )

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
        """Sample one rollout per request under the acting role, as `engine.generate` does.

        vLLM forms its own batches, so `batch_size` has no effect, and `advance` is called once.

        Raises:
            LoopError: a prompt fills the context, the call needs logits (`watch`, `guide`), or the log-probs of vLLM and of the
                backbone differ by more than `backbone.vllm.max_difference`.
            ModelError: a prompt has an image.
            RoleError: no role, or several, are acting.
        """
        if watch or guide is not None:
            raise LoopError("vLLM returns no logits, which watched tokens and guides need; sample with the own engine")
        if thinking is not None and any(request.stop_strings for request in requests):
            raise LoopError(
                "vLLM searches stop strings in the chain of thought as well; unset replies.stop_strings, or set "
                'backbone.engine = "own"'
            )
        backbone.refuse_mixed_rows("sampling")
        if backbone.acting is None:
            raise RoleError("sampling outside of `with backbone.acting_as(role)`; select a role first")
        check_prompts(backbone, [request.prompt for request in requests])
        self._check_lengths(requests)
        if not requests:
            return []
        ends = sorted({*backbone.loaded.eos_ids, *stop})
        limits = [
            ReplyProgress(r.most(max_new_tokens), self._context(backbone) - len(r.prompt.ids), r.prompt, thinking).most
            for r in requests
        ]
        seeds = [_seed(seed, first + i if r.stream is None else r.stream) for i, r in enumerate(requests)]
        parameters = [self._parameters(*row, ends) for row in zip(requests, limits, seeds, strict=True)]
        with self._awake(backbone) as llm:
            outputs = llm.generate(
                [{"prompt_token_ids": list(request.prompt.ids)} for request in requests],
                parameters,
                use_tqdm=False,
                lora_request=self._adapter(llm, backbone),
            )
        rollouts = [
            _rollout(output.outputs[0], ends).within(request.most(max_new_tokens), request.prompt, thinking)
            for output, request in zip(outputs, requests, strict=True)
        ]
        self._compare(backbone, requests, rollouts)
        rollouts = self._with_full_logprobs(backbone, requests, rollouts)
        add_to_tally(requests, rollouts)
        if advance:
            advance(len(rollouts))
        return rollouts

    def _parameters(self, request: Request, limit: int, seed: int, ends: list[int]) -> Any:
        """Return vLLM's sampling parameters of a request; greedy requests have no filters."""
        sampled = request.temperature > 0
        return self._vllm.SamplingParams(
            temperature=request.temperature,
            top_p=request.top_p if sampled else 1.0,
            top_k=request.top_k if sampled else 0,
            min_p=request.min_p if sampled else 0.0,
            repetition_penalty=request.repetition_penalty,
            stop=list(request.stop_strings),
            seed=seed,
            max_tokens=limit,
            # Exactly these tokens end a reply: without `ignore_eos`, those of the generation config would as well.
            stop_token_ids=ends,
            ignore_eos=True,
            logprobs=0,  # of the sampled token alone
            detokenize=bool(request.stop_strings),  # stop strings are searched in the text
        )

    def close(self) -> None:
        """Drop the copy of the weights and the files of the adapters."""
        self._llm = None
        self._adapters.clear()
        self._remove_folder()

    # -- the copy ---------------------------------------------------------------------------------------------------------

    def _context(self, backbone: Backbone) -> int:
        """Return the maximum number of tokens of a prompt with its reply."""
        own = backbone.loaded.context_length or sys.maxsize
        return min(own, self._config.vllm.max_length or own)

    def _check_lengths(self, requests: Sequence[Request]) -> None:
        most, longest = self._config.vllm.max_length, max((len(request.prompt.ids) for request in requests), default=0)
        if most is not None and longest >= most:
            raise LoopError(f"a prompt of {longest} tokens leaves no room for a reply in backbone.vllm.max_length = {most}")

    @contextmanager
    def _awake(self, backbone: Backbone) -> Iterator[Any]:
        """Yield vLLM's copy of the base, loaded if needed; put it to sleep afterwards if configured."""
        sleeps = self._config.vllm.sleep
        if self._llm is None:
            self.check(backbone)
            self._llm = self._load(backbone)
        elif sleeps:
            self._llm.wake_up()
        try:
            yield self._llm
        finally:
            if sleeps:
                # Level 1 keeps the weights in the CPU's memory. Level 2 drops them, and fails with adapters (vLLM issue 39934).
                self._llm.sleep(level=1)

    def _load(self, backbone: Backbone) -> Any:
        settings = self._config.vllm
        return self._vllm.LLM(
            # The folder of the snapshot that the backbone was loaded from, not a hub id that may have a new commit.
            model=str(model_folder(self._model) or self._model),
            dtype=str(backbone.model.dtype).removeprefix("torch."),
            seed=0,
            max_model_len=settings.max_length or backbone.loaded.context_length,
            gpu_memory_utilization=settings.memory_share,
            enable_lora=True,
            max_loras=1,
            max_lora_rank=next(rank for rank in _RANKS if rank >= self._config.lora.rank),
            enable_prefix_caching=True,
            enable_sleep_mode=settings.sleep,
            logprobs_mode="processed_logprobs",
            # Otherwise vLLM takes defaults from the model's generation config, a repetition penalty among them.
            generation_config="vllm",
        )

    def _adapter(self, llm: Any, backbone: Backbone) -> Any:
        """Return the request for the acting role's adapter, written again if its weights have changed; None for the base."""
        role = backbone.acting
        assert role is not None
        if role == BASE or not backbone.roles.adapter(role):
            return None
        digest, known = _digest(backbone, role), self._adapters.get(role)
        if known is not None:
            if known.digest == digest:
                return known.request
            llm.llm_engine.remove_lora(known.request.lora_int_id)
            shutil.rmtree(known.folder)
        # A new number and name for every version: vLLM identifies adapters, and the prefixes it caches, by them.
        number = next(self._numbers)
        name = f"{role}-{number}"
        folder = self._folder / name
        save_role(backbone, role, folder)
        request = self._vllm.lora.request.LoRARequest(lora_name=name, lora_int_id=number, lora_path=str(folder))
        self._adapters[role] = _Adapter(digest, folder, request)
        self._compared.discard(role)
        return request

    # -- log-probs --------------------------------------------------------------------------------------------------------

    def _compare(self, backbone: Backbone, requests: Sequence[Request], rollouts: Sequence[Rollout]) -> None:
        """Compare log-probs with the backbone's on a few replies, once for each version of an adapter.

        Raises:
            LoopError: the mean absolute difference exceeds `backbone.vllm.max_difference`.
        """
        role, most = backbone.acting or BASE, self._config.vllm.max_difference
        # vLLM's log-probs with filters are those of the filtered distribution, which the backbone does not compute.
        few = [i for i, request in enumerate(requests) if not _is_filtered(request)][:_COMPARED]
        if role in self._compared or not few:
            return
        scored = self._scored(backbone, [requests[i] for i in few], [rollouts[i] for i in few])
        pairs = zip([rollouts[i].logprobs for i in few], scored, strict=True)
        difference = fmean(abs(a - b) for theirs, ours in pairs for a, b in zip(theirs, ours, strict=True))
        if not difference <= most:  # NaN is not
            raise LoopError(
                f"the log-probs of vLLM and of the base differ by {difference:.3g} nats per token on average for the role "
                f'"{role}", more than backbone.vllm.max_difference = {most:g}: they compute different distributions; check '
                'that vLLM supports this model and its adapters, or set backbone.engine = "own"'
            )
        self._compared.add(role)

    def _with_full_logprobs(
        self, backbone: Backbone, requests: Sequence[Request], rollouts: Sequence[Rollout]
    ) -> list[Rollout]:
        """Replace log-probs of filtered distributions by those of the full one, which the backbone computes."""
        found = list(rollouts)
        filtered = [i for i, request in enumerate(requests) if _is_filtered(request)]
        scored = self._scored(backbone, [requests[i] for i in filtered], [rollouts[i] for i in filtered])
        for i, logprobs in zip(filtered, scored, strict=True):
            found[i] = Rollout(found[i].ids, logprobs, found[i].finished, hidden=found[i].hidden)
        return found

    def _scored(self, backbone: Backbone, requests: Sequence[Request], rollouts: Sequence[Rollout]) -> list[tuple[float, ...]]:
        """Compute the log-probs of replies on the backbone, each at the temperature of its request."""
        return reply_logprobs(
            backbone,
            [request.prompt for request in requests],
            [rollout.ids for rollout in rollouts],
            batch_tokens=self._config.batch_tokens,
            temperature=[request.temperature or 1.0 for request in requests],
        )


def _library() -> Any:
    """Import vLLM.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import vllm
        import vllm.lora.request
    except ImportError as error:
        raise ConfigError(
            f'backbone.engine = "vllm" needs the package vllm ({error}); install it with: pip install vllm, or set '
            'backbone.engine = "own"'
        ) from error
    return vllm


def _seed(seed: int, stream: int) -> int:
    """Return the seed of a request, which depends on the call's seed and its stream alone."""
    digest = hashlib.blake2b(f"{seed}/{stream}".encode(), digest_size=8).digest()
    # 63 bits: the largest signed number of vLLM's serialisation.
    return int.from_bytes(digest, "big") >> 1


def _digest(backbone: Backbone, role: str) -> str:
    """Return a hash of the weights of the role's adapter."""
    found = hashlib.sha256()
    for name, parameter in backbone.roles.adapter(role).items():
        found.update(name.encode())
        found.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()


def _rollout(output: Any, ends: Sequence[int]) -> Rollout:
    """Return vLLM's `CompletionOutput` as a rollout."""
    ids = tuple(output.token_ids)
    logprobs = tuple(float(step[token].logprob) for token, step in zip(ids, output.logprobs, strict=True))
    return Rollout(ids, logprobs, finished=ids[-1] in ends or isinstance(output.stop_reason, str))


def _is_filtered(request: Request) -> bool:
    filters = request.top_p < 1 or request.top_k > 0 or request.min_p > 0
    return request.repetition_penalty != 1 or (bool(request.temperature) and filters)
