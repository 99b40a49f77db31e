"""Peak memory of one side in its own process: `python -m selfeval.bench.memory_worker JOB_AS_JSON` prints a JSON object.

On a CPU a peak is the resident memory of the process, whose mark is reset before each phase; on a GPU it is torch's largest
allocated memory. `before` is the memory of the process before the model is loaded, which is subtracted from the peaks.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from selfeval.backbone.budget import MemoryBudget, Phase
from selfeval.backbone.load import pick_device
from selfeval.backbone.meters import peak_resident_bytes, resident_bytes, return_freed_memory
from selfeval.bench.hugging_face import load_causal, load_classifier, reply_scores, sample_replies, with_adapter
from selfeval.bench.step import StepShape, run_iterations, step_prompts
from selfeval.bench.workloads import BenchOptions, Replies, add_random_role, bench_config, load_backbone, own_threads
from selfeval.prompt import Prompt
from selfeval.training.context import POLICY
from selfeval.training.evaluator import EVALUATOR

__all__ = ["Job", "Work", "main"]

R = TypeVar("R")
Work = Literal["ours", "rollout", "score"]
"""An iteration of policy learning by this package, or sampling or scoring by Hugging Face."""
_CLEAR = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Job:
    """Work of one process.

    Attributes:
        work: what is measured.
        options: model, device, precision and threads.
        shape: sizes of an iteration.
        learner: ppo, grpo or rloo.
        rows: batch size of Hugging Face.
    """

    work: Work
    options: BenchOptions
    shape: StepShape
    learner: str
    rows: int

    def as_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def of(cls, text: str) -> Job:
        values = json.loads(text)
        return cls(**values | {"options": BenchOptions(**values["options"]), "shape": StepShape(**values["shape"])})


class _Peaks:
    """The highest memory of each phase.

    Args:
        device: device of the model.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._phase: str | None = None
        self.before = 0 if self._on_gpu else resident_bytes()
        self.bytes: dict[str, int] = {}

    def begin(self, phase: str) -> None:
        """Begin a phase, which ends the one before; the peak starts from the memory in use now."""
        if phase == self._phase:
            return
        self.end()
        self._phase = phase
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            _CLEAR.write_text("5")  # resets VmHWM

    def end(self) -> None:
        if self._phase is not None:
            peak = torch.cuda.max_memory_allocated() if self._on_gpu else peak_resident_bytes()
            self.bytes[self._phase] = max(peak, self.bytes.get(self._phase, 0))
            self._phase = None

    def as_json(self) -> dict[str, Any]:
        self.end()
        return {"before": self.before, "peaks": {name: size - self.before for name, size in self.bytes.items()}}


class _PhaseBudget(MemoryBudget):
    """A memory budget that notes the peak of each phase."""

    def __init__(self, own: MemoryBudget, peaks: _Peaks) -> None:
        super().__init__(own.meter, pass_tokens=own.pass_tokens)
        self._peaks = peaks

    def in_groups(
        self,
        phase: Phase,
        sizes: Sequence[int],
        limit: int,
        work: Callable[[list[int]], R],
        prompts: Sequence[int] | None = None,
        turns: int = 1,
    ) -> Iterator[tuple[list[int], R]]:
        self._peaks.begin(phase.value)
        yield from super().in_groups(phase, sizes, limit, work, prompts, turns)


def _ours(job: Job, peaks: _Peaks) -> None:
    config = bench_config(job.options)
    backbone = load_backbone(config, trust_remote_code=job.options.trust_remote_code)
    backbone.budget = _PhaseBudget(backbone.budget, peaks)
    run_iterations(backbone, job.shape, job.learner, batch_tokens=config.backbone.batch_tokens)


def _theirs(job: Job, peaks: _Peaks) -> None:
    """Sample or score by Hugging Face. The adapter is written by a backbone, which is freed before the peak starts."""
    config, trusted = bench_config(job.options), job.options.trust_remote_code
    backbone, role = load_backbone(config, trust_remote_code=trusted), POLICY if job.work == "rollout" else EVALUATOR
    add_random_role(backbone, role, head=role == EVALUATOR)
    load = load_causal if job.work == "rollout" else load_classifier
    model = with_adapter(load(config, backbone, trust_remote_code=trusted), backbone, role)
    prompts = tuple(Prompt(tuple(ids)) for ids in step_prompts(job.shape))
    replies = Replies(prompts, (job.shape.reply_tokens,) * len(prompts), job.shape.replies)
    # Its facts are still needed, its weights are not.
    backbone.model.to("meta")
    peaks.begin(job.work)
    if job.work == "rollout":
        sample_replies(model, backbone, replies, job.rows)
    else:
        reply_scores(model, backbone, [[*prompt.ids, *prompt.ids[:1] * job.shape.reply_tokens] for prompt in prompts], job.rows)


def _warm_up(job: Job) -> None:
    """Do a small job on the embedded model, so that imports, threads and kernels are in memory before the model is loaded."""
    small = replace(job, options=replace(job.options, model=None), shape=StepShape(4, 2, 4, 4), rows=4)
    _run(small, _Peaks(pick_device(job.options.device)))
    gc.collect()
    return_freed_memory()


def _run(job: Job, peaks: _Peaks) -> None:
    (_ours if job.work == "ours" else _theirs)(job, peaks)


def main(arguments: Sequence[str]) -> None:
    """Do the job and print the peaks, in bytes above the memory before the model is loaded."""
    job = Job.of(arguments[0])
    with own_threads(job.options):
        _warm_up(job)
        peaks = _Peaks(pick_device(job.options.device))
        _run(job, peaks)
    print(json.dumps(peaks.as_json()))


if __name__ == "__main__":
    main(sys.argv[1:])
