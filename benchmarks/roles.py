"""Measure the cost of four roles on one base: memory compared with TRL's PPO, RLOO and GRPO, and time of a mixed pass.

python benchmarks/roles.py                  everything; the peers are installed into build/peers, each into its own environment
python benchmarks/roles.py --without-peers  our own figures only
python benchmarks/roles.py --learners       PPO next to RLOO only, several times; writes results/roles-learners.json

Every variant runs in a fresh process, on the same random Llama of 100 million parameters, the same prompts, batch, reply
length, rank and precision (fp32). Peak memory is the process's high-water mark less what it held before a model was loaded.
Non-activation bytes are weights, adapters, their gradients and optimizer states.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import write

HERE = Path(__file__).parent
PEERS = HERE.parent / "build" / "peers"
SHAPE = {"prompts": 16, "prompt_tokens": 32, "reply_tokens": 32, "rank": 16, "epochs": 2}
TRL = {
    "trl-ppo": ("trl==1.12.0", ["ppo"]),
    "trl-ppo-lora-critic": ("trl==1.12.0", ["ppo", "--lora-critic"]),
    "trl-rloo": ("trl==1.16.0", ["rloo"]),
    "trl-grpo": ("trl==1.16.0", ["grpo"]),
}


def make_model(folder: Path) -> Path:
    """Create a random Llama of 100 million parameters, with the embedded model's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    import selfeval

    shape = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=20_000, pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=True, **shape)
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(Path(selfeval.__file__).parent / "lab" / "word_problems").save_pretrained(folder)
    return folder


def prompts() -> list[list[int]]:
    return [[3 + (i * 7 + j) % 500 for j in range(SHAPE["prompt_tokens"])] for i in range(SHAPE["prompts"])]


def _status(name: str) -> int:
    """Return a field of this process's status in bytes: VmRSS is the current size, VmHWM the peak."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def _backbone(folder: str) -> Any:
    from selfeval.backbone.load import load_model
    from selfeval.backbone.roles import Backbone
    from selfeval.config import LoraConfig

    return Backbone(load_model(folder, device="cpu", precision="fp32"), LoraConfig(rank=SHAPE["rank"]), "random-100m")


def _ours_ppo(folder: str) -> dict[str, Any]:
    return _ours_learning(folder, "ppo", replies=1)


def _ours_rloo(folder: str) -> dict[str, Any]:
    """As many replies as PPO's, two per question: the baseline is the other replies to it."""
    return _ours_learning(folder, "rloo", replies=2)


def _ours_learning(folder: str, learner: Any, replies: int) -> dict[str, Any]:
    from selfeval.config import PolicyConfig
    from selfeval.prompt import Prompt
    from selfeval.training.checkpoint import Checkpoints
    from selfeval.training.context import POLICY, REFERENCE, LearnerContext, QuestionPrompts
    from selfeval.training.evaluator import EVALUATOR
    from selfeval.training.policy import train_policy
    from selfeval.training.recorder import CheckpointRecorder
    from selfeval.training.scoring import EvaluatorScorer

    backbone = _backbone(folder)
    backbone.roles.add(EVALUATOR, head=True, trainable=False)
    backbone.roles.add(POLICY)
    backbone.roles.add_snapshot(REFERENCE, of=POLICY)
    count = SHAPE["prompts"]
    config = PolicyConfig(
        learner=learner,
        iterations=1,
        questions_per_iteration=count // replies,
        replies_per_question=replies,
        epochs=SHAPE["epochs"],
        minibatch=count,
    )
    held = {"gradients": 0}

    class SizeRecorder(CheckpointRecorder):
        """Record the bytes of optimizers and gradients after every step."""

        def checkpoints(self, roles: Any, optimizers: Any) -> Checkpoints:
            for role, optimizer in optimizers.items():

                def note(stepped: Any, *_: Any, role: str = role) -> None:
                    held[role] = sum(t.nbytes for state in stepped.state.values() for t in state.values())
                    held["gradients"] = max(held["gradients"], _gradients(backbone.model))

                optimizer.register_step_post_hook(note)
            return super().checkpoints(roles, optimizers)

    context = LearnerContext(
        backbone,
        config,
        EvaluatorScorer(backbone, 1 << 20),
        seed=0,
        limit=SHAPE["reply_tokens"],
        batch_size=count,
        batch_tokens=1 << 20,
        evaluator=EVALUATOR,
    )
    train_policy(
        context,
        [QuestionPrompts(str(i), Prompt(tuple(p)), Prompt(tuple(p))) for i, p in enumerate(prompts())],
        SizeRecorder(Path(tempfile.mkdtemp()), backbone),
    )
    states = sum(held.values())
    return {
        "base_bytes": backbone.census.base_bytes,
        "adapter_bytes": backbone.census.adapter_bytes,
        "optimizer_and_gradient_bytes": states,
        "non_activation_bytes": backbone.census.base_bytes + backbone.census.adapter_bytes + states,
        "weight_copies": backbone.census.weight_copies(),
    }


def _gradients(model: Any) -> int:
    return sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)


def _batch() -> Any:
    import torch

    width = SHAPE["prompt_tokens"] + SHAPE["reply_tokens"]
    return torch.randint(3, 500, (SHAPE["prompts"], width), generator=torch.Generator().manual_seed(0))


def _ours_sft(folder: str) -> dict[str, Any]:
    """Run two steps of LoRA-SFT with our chunked log-probs."""
    import torch

    from selfeval.backbone.logprobs import token_logprobs
    from selfeval.backbone.sequences import pad_sequences, reply_hidden
    from selfeval.prompt import Prompt

    backbone = _backbone(folder)
    backbone.roles.add("policy")
    optimizer = torch.optim.AdamW(backbone.roles.parameters("policy").values(), lr=1e-4)
    batch = pad_sequences(
        backbone, [Prompt(tuple(row[:1].tolist())) for row in _batch()], [row[1:].tolist() for row in _batch()]
    )
    for _ in range(2):
        with backbone.acting_as("policy"):
            found = token_logprobs(backbone, reply_hidden(backbone, batch), batch.reply_BR, batch.mask_BR)
            (-found.logprobs.sum() / batch.mask_BR.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"base_bytes": backbone.census.base_bytes}


def _plain_sft(folder: str) -> dict[str, Any]:
    """Run two steps of LoRA-SFT with plain transformers and PEFT."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    size = sum(p.nbytes for p in base.parameters())
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=SHAPE["rank"], target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    for _ in range(2):
        model(input_ids=_batch(), labels=_batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"base_bytes": size}


def _mixed_time(folder: str) -> dict[str, Any]:
    """Return median seconds of a pass with rows of four roles, of four passes, and of one bare pass over the same rows."""
    import torch

    backbone = _backbone(folder)
    roles = ("policy", "reference", "evaluator-0", "critic")
    for number, role in enumerate(roles):
        backbone.roles.add(role, seed=number)
        for name, parameter in backbone.roles.parameters(role).items():
            if ".lora_B." in name:
                parameter.data.normal_(std=0.01)
    ids = _batch().repeat(2, 1)
    mask, rows = torch.ones_like(ids), len(ids) // 4

    def mixed() -> None:
        with backbone.acting_as([r for r in roles for _ in range(rows)]):
            backbone.hidden(ids, mask)

    def apart() -> None:
        for number, role in enumerate(roles):
            with backbone.acting_as(role):
                backbone.hidden(ids[number * rows : (number + 1) * rows], mask[:rows])

    def plain() -> None:
        with backbone.acting_as("base"):
            backbone.hidden(ids, mask)

    variants = {"mixed": mixed, "apart": apart, "plain": plain}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    with torch.no_grad():
        for turn in range(8):
            for name, run in variants.items():
                started = time.perf_counter()
                run()
                if turn:
                    seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "rows": len(ids),
        "tokens": ids.numel(),
        "seconds": {n: round(v, 3) for n, v in medians.items()},
        "mixed_over_plain": round(statistics.median(a / b for a, b in zip(seconds["mixed"], seconds["plain"], strict=True)), 3),
        "apart_over_plain": round(statistics.median(a / b for a, b in zip(seconds["apart"], seconds["plain"], strict=True)), 3),
    }


VARIANTS = {
    "ours-ppo": _ours_ppo,
    "ours-rloo": _ours_rloo,
    "ours-sft": _ours_sft,
    "plain-sft": _plain_sft,
    "mixed-time": _mixed_time,
}


def measure(variant: str, folder: str) -> None:
    """Run one variant in this process and print a JSON line."""
    import peft  # noqa: F401 - imported before the measurement
    import torch
    import transformers  # noqa: F401

    import selfeval.training.policy  # noqa: F401

    idle = _status("VmRSS")
    torch.manual_seed(0)
    started = time.monotonic()
    found = VARIANTS[variant](folder)
    print(json.dumps({**found, "peak_bytes": _status("VmHWM") - idle, "seconds": round(time.monotonic() - started, 1)}))


def peer_python(requirement: str) -> Path:
    """Return the interpreter of the environment with this peer; create it if it does not exist."""
    home = PEERS / requirement.replace("==", "-")
    python = home / "bin" / "python"
    if not (home / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        constraints = str(HERE.parent / "constraints.txt")
        subprocess.run([str(python), "-m", "pip", "install", "-q", requirement, "peft", "-c", constraints], check=True)
        (home / "ready").touch()
    return python


def run(command: list[str]) -> dict[str, Any]:
    """Return the JSON on the last line that a process prints, or the last line of its error."""
    environment = {**os.environ, "TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1", "WANDB_DISABLED": "true"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit {done.returncode}"}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--without-peers", action="store_true")
    parser.add_argument("--learners", action="store_true")
    parser.add_argument("--measure", nargs=2, metavar=("VARIANT", "FOLDER"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.measure:
        measure(*asked.measure)
        return
    with tempfile.TemporaryDirectory() as home:
        folder = str(make_model(Path(home) / "model"))
        if asked.learners:
            _compare_learners(folder)
            return
        found = {}
        for variant in VARIANTS:
            found[variant] = run([sys.executable, __file__, "--measure", variant, folder])
            print(variant, found[variant], flush=True)
        for name, (requirement, arguments) in {} if asked.without_peers else TRL.items():
            script = [str(HERE / "peers" / "trl_memory.py"), folder, json.dumps({**SHAPE, "ids": prompts()}), *arguments]
            found[name] = run([str(peer_python(requirement)), *script]) | {"version": requirement}
            print(name, found[name], flush=True)
    write("roles", "python benchmarks/roles.py", {"shape": SHAPE, "variants": found, "ratios": _ratios(found)})


def _compare_learners(folder: str, times: int = 3) -> None:
    """Return the peaks of PPO and RLOO at equal replies, alternating, and the ratio of their medians."""
    peaks: dict[str, list[int]] = {"ours-ppo": [], "ours-rloo": []}
    for _ in range(times):
        for variant, seen in peaks.items():
            seen.append(run([sys.executable, __file__, "--measure", variant, folder])["peak_bytes"])
    ppo, rloo = (statistics.median(seen) for seen in peaks.values())
    figures = {"shape": SHAPE, "peak_bytes": peaks, "ppo_over_rloo": round(ppo / rloo, 3)}
    write("roles-learners", "python benchmarks/roles.py --learners", figures)


def _ratios(found: dict[str, Any]) -> dict[str, float]:
    ratios = {
        f"non_activation_over_base/{name}": value["non_activation_bytes"] / found["ours-ppo"]["base_bytes"]
        for name, value in found.items()
        if "non_activation_bytes" in value
    }
    peak = found["ours-ppo"]["peak_bytes"]
    ratios |= {
        f"ppo_peak_over/{n}": peak / v["peak_bytes"] for n, v in found.items() if "peak_bytes" in v and n != "mixed-time"
    }
    return {name: round(value, 3) for name, value in ratios.items()} | {
        "mixed_over_plain": found["mixed-time"]["mixed_over_plain"]
    }


if __name__ == "__main__":
    main()
