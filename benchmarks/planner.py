"""Compare the planner's figures with the measured memory of the loop, each model in a separate process.

python benchmarks/planner.py

Every case loads a model and runs two iterations of policy training: sampling, scoring, updating. On a CPU, the peak of each
phase is the largest resident memory of the process during it (VmHWM, reset before the phase). Compared twice: as it is,
with the plan's total, whose `runtime` the planner measured in a separate process; and less what the process held before the
model was loaded, with the plan less its runtime. Weights are mapped from their file, where a page counts once it was read:
loading counts with every page read. On a GPU it is torch's largest allocated memory, and there is no runtime.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import write

import selfeval as package

EMBEDDED = Path(package.__file__).parent / "lab" / "word_problems"


@dataclass(frozen=True)
class Case:
    """A model and a workload: `--set` values, and the tokens of the longest prompts and replies."""

    shape: dict[str, int] | None
    settings: dict[str, Any]
    reply_prompt: int
    grade_prompt: int
    reply: int
    device: str = "cpu"
    precision: str = "fp32"


_FEW = {
    "policy.questions_per_iteration": 4, "policy.replies_per_question": 2, "policy.minibatch": 4,
}  # fmt: skip
_SMALL = {"policy.questions_per_iteration": 8, "policy.replies_per_question": 4, "policy.minibatch": 16}
CASES = {
    "embedded": Case(None, {"backbone.batch_tokens": 4096, "backbone.rollout_batch_size": 256, **_SMALL}, 60, 90, 128),
    "tiny": Case(
        {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 2048},
        {"backbone.batch_tokens": 4096, "backbone.rollout_batch_size": 256, **_SMALL}, 60, 90, 128,
    ),
    "llama-100m": Case(
        {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 10, "num_attention_heads": 12,
         "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 32000},
        {"backbone.batch_tokens": 512, "backbone.rollout_batch_size": 32, **_FEW}, 60, 90, 32,
    ),
    "llama-100m-bf16": Case(
        {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 10, "num_attention_heads": 12,
         "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 32000},
        {"backbone.batch_tokens": 512, "backbone.rollout_batch_size": 32, **_FEW}, 60, 90, 32, precision="bf16",
    ),
    "qwen2.5-7b": Case(
        {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
         "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 152064},
        {"backbone.batch_tokens": 4096, "backbone.rollout_batch_size": 64, "policy.minibatch": 32},
        100, 200, 128, device="cuda", precision="bf16",
    ),
}  # fmt: skip


# -- in the process of one case -----------------------------------------------------------------------------------------


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


class _Meter:
    """Measure the peak bytes of blocks, and the bytes at the start."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.peaks: dict[str, list[int]] = {}
        self.before = 0 if device == "cuda" else _status("VmRSS")

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._reset()
        yield
        self.peaks.setdefault(name, []).append(self._peak())

    def _reset(self) -> None:
        if self.device == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats()
        else:
            from selfeval.backbone.meters import CpuMeter

            CpuMeter().between_phases()  # as the loop does when a phase begins
            Path("/proc/self/clear_refs").write_text("5")

    def _peak(self) -> int:
        if self.device == "cuda":
            import torch

            return torch.cuda.max_memory_allocated()
        return _status("VmHWM")

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def measured(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return function(*args, **kwargs)

        return measured


def _warm_up() -> None:
    """Trigger one-time initialization of the libraries: thread pools, autograd, sampling."""
    import torch

    weight = torch.randn(64, 64, requires_grad=True)
    torch.nn.functional.scaled_dot_product_attention(
        *(torch.randn(1, 2, 8, 16, requires_grad=True) for _ in range(3))
    ).sum().backward()
    torch.log_softmax(torch.randn(64, 64) @ weight, dim=-1).sum().backward()
    torch.optim.AdamW([weight]).step()


def _save_model(case: Case, folder: Path) -> Path:
    """Create a random Llama of the case's shape as an ordinary folder, with the embedded model's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    assert case.shape is not None
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[case.precision]
    with torch.device(case.device):
        torch.set_default_dtype(dtype)
        model = LlamaForCausalLM(LlamaConfig(**case.shape, max_position_embeddings=2048, tie_word_embeddings=False))
        torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(EMBEDDED).save_pretrained(folder)
    return folder


def _prompts(case: Case, count: int, vocabulary: int) -> list[Any]:
    """Return random prompts, up to a few tokens shorter than the longest."""
    import random

    from selfeval.prompt import Prompt
    from selfeval.training.context import QuestionPrompts

    source = random.Random(0)

    def ids(longest: int) -> tuple[int, ...]:
        return tuple(source.randrange(3, min(vocabulary, 600)) for _ in range(longest - source.randrange(4)))

    return [QuestionPrompts(f"q{i}", Prompt(ids(case.reply_prompt)), Prompt(ids(case.grade_prompt))) for i in range(count)]


def _config(case: Case, model: str) -> Any:
    from selfeval.config import load_config

    settings = {"policy.iterations": 2, "policy.kl_target": 1000, "replies.max_new_tokens": case.reply, **case.settings}
    overrides = {"model": model, "backbone.device": case.device, "backbone.precision": case.precision}
    return load_config(None, overrides, [f"{key}={value}" for key, value in settings.items()])


def measure(case: Case, model: str) -> dict[str, Any]:
    """Return bytes before loading, and peaks by phase."""
    import selfeval.training.policy as policy
    from selfeval.backbone.roles import Backbone
    from selfeval.training.context import POLICY, REFERENCE, LearnerContext
    from selfeval.training.evaluator import EVALUATOR
    from selfeval.training.learners import policy_gradient
    from selfeval.training.learners.ppo import PPO
    from selfeval.training.recorder import CheckpointRecorder
    from selfeval.training.scoring import EvaluatorScorer

    config = _config(case, model)
    Backbone.load(str(EMBEDDED), _config(CASES["embedded"], str(EMBEDDED)).backbone)  # triggers late imports
    _warm_up()
    meter = _Meter(case.device)
    with meter.phase("load"):
        backbone = Backbone.load(model, config.backbone)
        for weight in backbone.model.parameters():
            weight.view(-1)[::1024].sum()  # every page of a mapped file
    backbone.loaded.eos_ids = ()  # every reply is as long as planned for
    backbone.roles.add(EVALUATOR, head=True)
    backbone.roles.freeze(EVALUATOR)
    backbone.roles.add(POLICY)
    backbone.roles.add_snapshot(REFERENCE, of=POLICY)
    policy_gradient.collect = meter.around("rollout", policy_gradient.collect)
    policy.build_experience = meter.around("score", policy.build_experience)
    EvaluatorScorer.__call__ = meter.around("score", EvaluatorScorer.__call__)  # type: ignore[method-assign]
    PPO.advantages = meter.around("score", PPO.advantages)  # type: ignore[method-assign]
    PPO.update = meter.around("update", PPO.update)  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        context = LearnerContext(
            backbone,
            config.policy,
            EvaluatorScorer(backbone, config.backbone.batch_tokens),
            seed=0,
            limit=case.reply,
            batch_size=config.backbone.rollout_batch_size,
            batch_tokens=config.backbone.batch_tokens,
            evaluator=EVALUATOR,
        )
        policy.train_policy(
            context,
            _prompts(case, config.policy.questions_per_iteration, backbone.model.config.vocab_size),
            CheckpointRecorder(Path(folder), backbone),
        )
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "system_seconds": usage.ru_stime,
        "before": meter.before,
        "peaks": {phase: max(values) for phase, values in meter.peaks.items()},
    }


# -- all cases ----------------------------------------------------------------------------------------------------------


def planned(case: Case, model: Path) -> dict[str, dict[str, int]]:
    """Return the planner's figures for the same work, in bytes by phase and kind."""
    from selfeval.backbone.placement import meta_model, plan_placement
    from selfeval.planner.machine import Machine
    from selfeval.planner.measurement import Measured
    from selfeval.planner.model_configs import model_facts
    from selfeval.planner.workload import Workload

    config, facts = _config(case, str(model)), model_facts(str(model))
    device, policy = "cuda:0" if case.device == "cuda" else "cpu", config.policy
    runtime = Machine.of(config.backbone, {device: 1 << 40}).runtime
    work = Workload(case.reply_prompt, case.grade_prompt, case.reply_prompt, case.reply, 1)
    placement = plan_placement(meta_model(facts.config), {device: 1 << 40}, case.precision)
    measured = Measured(facts, config, case.precision, placement, work, False, runtime)
    sampling = measured.of_policy(policy.questions_per_iteration * policy.replies_per_question)
    learning = measured.learning(max(1, config.backbone.batch_tokens // work.longest))
    return {phase: dict(peaks[device]) for phase, peaks in {"load": measured.load(), "rollout": sampling, **learning}.items()}


def _in_own_process(environment: dict[str, str], *arguments: str) -> Any:
    command = [sys.executable, __file__, *arguments]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}).stdout
    return json.loads(output.splitlines()[-1])


def _mib(sizes: dict[str, int]) -> dict[str, float]:
    return {name: round(size / 2**20, 1) for name, size in sizes.items() if size}


def _against(plan: dict[str, int], measured: dict[str, int]) -> dict[str, Any]:
    return {
        "planned_mib": _mib(plan),
        "measured_mib": _mib(measured),
        "error": {phase: round(plan[phase] / size - 1, 3) for phase, size in measured.items()},
    }


def compare(name: str, folder: Path) -> dict[str, Any]:
    """Return planned and measured MiB by phase, with and without the runtime of the process."""
    model = folder / name if CASES[name].shape else EMBEDDED
    if CASES[name].shape:
        _in_own_process({}, "save", name, str(model))
    plan = _in_own_process({}, "plan", name, str(model))
    found = _in_own_process({}, "measure", name, str(model))
    whole = {phase: sum(kinds.values()) for phase, kinds in plan.items()}
    beside = {phase: size - plan[phase].get("runtime", 0) for phase, size in whole.items()}
    above = {phase: size - found["before"] for phase, size in found["peaks"].items()}
    return {
        "runtime_mib": {
            "planned": round(plan["load"].get("runtime", 0) / 2**20, 1),
            "measured": round(found["before"] / 2**20, 1),
        },
        "process": _against(whole, found["peaks"]),
        "beside_runtime": _against(beside, above),
        "kinds_mib": {phase: _mib(kinds) for phase, kinds in plan.items()},
        "cpu_seconds": round(found["cpu_seconds"], 1),
        "system_seconds": round(found["system_seconds"], 1),
    }


def main() -> None:
    import torch

    names = [name for name, case in CASES.items() if case.device == "cpu" or torch.cuda.is_available()]
    with tempfile.TemporaryDirectory() as folder:
        cases = {name: compare(name, Path(folder)) for name in names}
    skipped = [f"{name}: no GPU here" for name in CASES if name not in names]
    write("planner", "python benchmarks/planner.py", {"cases": cases, "skipped": skipped})


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        case, folder = CASES[sys.argv[2]], Path(sys.argv[3])
        if sys.argv[1] == "save":
            _save_model(case, folder)
            print("{}")
        else:
            print(json.dumps(planned(case, folder) if sys.argv[1] == "plan" else measure(case, str(folder))))
