"""CPU time of an iteration of policy learning: this package with and without shared prompts, TRL, and the passes alone.

python benchmarks/step.py [--without-peers] [--models embedded llama-30m] [--learners ppo grpo rloo] [--rounds 2]

PPO, GRPO and RLOO with LoRA of rank 16 on questions with 8 replies each, two epochs of one minibatch, one thread. Replies have
the same length on every side, because the end token is off, and evaluator and critic read the policy's prompt. A process
runs a few iterations, of which the first is left out, and the sides take turns, so that all meet the same load of the machine.
Models and learners that are not asked for keep their earlier figures.

`limit` is the time of the same number of plain passes of the model, without adapters, over prompts once and replies: forward
for the rollout, the reference, the evaluator and the critic's values, forward and backward for each role and epoch. TRL's PPO
trains its critic in full by default; here it has LoRA as well.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import RESULTS, write
from roles import HERE, peer_python, run

LEARNERS = ("ppo", "grpo", "rloo")
TRL = {
    "ppo": ("trl==1.12.0", ["ppo", "--lora-critic"]),
    "grpo": ("trl==1.16.0", ["grpo"]),
    "rloo": ("trl==1.16.0", ["rloo"]),
}
SHAPES = {
    "embedded": {
        "prompts": 128,
        "replies": 8,
        "prompt_tokens": 23,
        "reply_tokens": 19,
        "rank": 16,
        "epochs": 2,
        "iterations": 4,
    },
    "llama-30m": {
        "prompts": 16,
        "replies": 8,
        "prompt_tokens": 256,
        "reply_tokens": 64,
        "rank": 16,
        "epochs": 2,
        "iterations": 2,
    },
}


def make_model(name: str, folder: Path) -> Path:
    """Return the folder of the embedded model, or create a random Llama of 30 million parameters with its tokenizer."""
    import selfeval

    embedded = Path(selfeval.__file__).parent / "lab" / "word_problems"
    if name == "embedded":
        return embedded
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=8000, pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=True, **shape)
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(embedded).save_pretrained(folder)
    return folder


def prompts(shape: dict[str, int]) -> list[list[int]]:
    """Return one prompt per reply; the replies to a question are neighbours."""
    from selfeval.bench.step import StepShape, step_prompts

    return step_prompts(StepShape(**shape))


def ours(folder: str, shape: dict[str, int], learner: str, *, shared: bool) -> list[float]:
    """Return the CPU seconds of each iteration but the first."""
    from selfeval.backbone.load import load_model
    from selfeval.backbone.roles import Backbone
    from selfeval.bench.step import SeparateRows, StepShape, run_iterations
    from selfeval.config import LoraConfig

    kind = Backbone if shared else SeparateRows
    backbone = kind(load_model(folder, device="cpu", precision="fp32"), LoraConfig(rank=shape["rank"]), "bench")
    return [seconds.cpu for seconds in run_iterations(backbone, StepShape(**shape), learner).seconds]


def limit(folder: str, shape: dict[str, int], learner: str) -> list[float]:
    """Return the CPU seconds of the passes of an iteration, a few times."""
    import torch
    from transformers import AutoModelForCausalLM

    from selfeval.bench.step import StepShape, limit_seconds

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    return [limit_seconds(model, StepShape(**shape), learner).cpu for _ in range(4)][1:]


def measure(side: str, learner: str, folder: str, shape: dict[str, int]) -> None:
    """Run one side in this process and print a JSON line."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    found = limit(folder, shape, learner) if side == "limit" else ours(folder, shape, learner, shared=side == "shared")
    print(json.dumps({"iteration_cpu_seconds": [round(seconds, 3) for seconds in found]}))


def one_round(learner: str, folder: str, shape: dict[str, int], *, peers: bool) -> dict[str, Any]:
    """Run all sides once, in separate processes; return the median CPU seconds of each."""
    own = ["limit", "shared", "separate"]
    commands = {
        side: [sys.executable, __file__, "--measure", side, learner, folder, json.dumps(shape)] for side in own
    }  # fmt: skip
    if peers:
        requirement, arguments = TRL[learner]
        script = str(HERE / "peers" / "trl_memory.py")
        commands[requirement] = [
            str(peer_python(requirement)),
            script,
            folder,
            json.dumps({**shape, "ids": prompts(shape)}),
            *arguments,
        ]
    found = {}
    for side, command in commands.items():
        told = run(command)
        # TRL's first iteration is left out, as ours is.
        seconds = told.get("iteration_cpu_seconds", [])
        seconds = seconds if side in own else seconds[1:]
        found[side] = round(statistics.median(seconds), 3) if seconds else told
        print(learner, side, told.get("failed", seconds), flush=True)
    return found


def ratios(rounds: list[dict[str, Any]]) -> dict[str, float]:
    """Return the median over the rounds of the time of shared prompts over that of each other side."""
    others = [side for side in rounds[0] if side != "shared" and all(isinstance(found[side], float) for found in rounds)]
    return {f"shared_over_{side}": round(statistics.median(r["shared"] / r[side] for r in rounds), 3) for side in others}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--without-peers", action="store_true")
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--learners", nargs="+", choices=LEARNERS, default=list(LEARNERS))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--measure", nargs=4, metavar=("SIDE", "LEARNER", "FOLDER", "SHAPE"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.measure:
        side, learner, folder, shape = asked.measure
        measure(side, learner, folder, json.loads(shape))
        return
    known = RESULTS / "step.json"
    before = json.loads(known.read_text(encoding="utf-8")) if known.is_file() else {}
    figures: dict[str, Any] = {name: before[name] for name in SHAPES if name in before}
    for name in asked.models:
        with tempfile.TemporaryDirectory() as home:
            folder, shape = str(make_model(name, Path(home) / "model")), SHAPES[name]
            rounds = {
                learner: [one_round(learner, folder, shape, peers=not asked.without_peers) for _ in range(asked.rounds)]
                for learner in asked.learners
            }
        figures[name] = {
            **figures.get(name, {}),
            "shape": shape,
            **{learner: {"cpu_seconds": found, **ratios(found)} for learner, found in rounds.items()},
        }
    write("step", "python benchmarks/step.py", figures)


if __name__ == "__main__":
    main()
