"""TRL's PPO (1.12, the last version that had one), RLOO and GRPO on a model folder: bytes held, peak memory and CPU time.

Run by benchmarks/roles.py and benchmarks/step.py with the interpreter of an environment that holds TRL:
    python trl_memory.py FOLDER SHAPE_AS_JSON ppo|rloo|grpo [--lora-critic]
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

FOLDER, SHAPE, KIND = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
REPLIES, ITERATIONS = SHAPE.get("replies", 2), SHAPE.get("iterations", 1)
OUTPUT = str(Path(FOLDER).parent / "out")


def status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def causal() -> Any:
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)


def classifier() -> Any:
    model = AutoModelForSequenceClassification.from_pretrained(FOLDER, num_labels=1, dtype=torch.float32)
    model.config.pad_token_id = 0
    return model


def lora(task: str) -> LoraConfig:
    return LoraConfig(task_type=task, r=SHAPE["rank"], lora_alpha=2 * SHAPE["rank"], target_modules="all-linear")


def nbytes(tensors: Any) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


class Held(TrainerCallback):
    """Record gradients and optimizer states after the first optimizer step."""

    def __init__(self) -> None:
        self.bytes = 0
        self.ends: list[float] = []

    def on_step_end(self, *arguments: Any, **options: Any) -> None:
        self.ends.append(time.process_time())

    def watch(self, optimizer: Any, models: list[Any]) -> None:
        def note(inner: Any, *_: Any) -> None:
            states = [t for s in inner.state.values() for t in s.values() if torch.is_tensor(t)]
            gradients = [p.grad for m in models for p in m.parameters() if p.grad is not None]
            self.bytes = max(self.bytes, nbytes(states) + nbytes(gradients))

        optimizer.register_step_post_hook(note)


def ppo() -> tuple[Any, list[Any]]:
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    count = SHAPE["prompts"]
    policy, reward, value = causal(), classifier(), classifier()
    if "--lora-critic" in sys.argv:
        value = get_peft_model(value, lora("SEQ_CLS"))
    rows = Dataset.from_list([{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in SHAPE["ids"]])
    arguments = PPOConfig(
        output_dir=OUTPUT, per_device_train_batch_size=count, gradient_accumulation_steps=1, num_mini_batches=1,
        num_ppo_epochs=SHAPE["epochs"],
        total_episodes=count * ITERATIONS, local_rollout_forward_batch_size=count,
        response_length=SHAPE["reply_tokens"], temperature=1.0, num_sample_generations=0, report_to="none", save_strategy="no",
        use_cpu=True, bf16=False, gradient_checkpointing=False, seed=0,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(FOLDER, padding_side="left")
    trainer = PPOTrainer(
        args=arguments, processing_class=tokenizer, model=policy, ref_model=None, reward_model=reward, value_model=value,
        train_dataset=rows, eval_dataset=rows, peft_config=lora("CAUSAL_LM"),
    )  # fmt: skip
    return trainer, [policy, reward, value]


def group() -> tuple[Any, list[Any]]:
    import trl

    config, trainer_class = (trl.RLOOConfig, trl.RLOOTrainer) if KIND == "rloo" else (trl.GRPOConfig, trl.GRPOTrainer)
    count = SHAPE["prompts"]
    tokenizer = AutoTokenizer.from_pretrained(FOLDER, padding_side="left")
    texts = [tokenizer.decode(ids) for ids in SHAPE["ids"][: count // REPLIES]]
    reward = classifier()
    arguments = config(
        output_dir=OUTPUT, per_device_train_batch_size=count, gradient_accumulation_steps=1, num_generations=REPLIES,
        num_iterations=SHAPE["epochs"], max_steps=SHAPE["epochs"] * ITERATIONS, temperature=1.0, beta=0.05,
        max_completion_length=SHAPE["reply_tokens"], generation_kwargs={"min_new_tokens": SHAPE["reply_tokens"]},
        report_to="none", save_strategy="no", use_cpu=True, bf16=False, gradient_checkpointing=False, seed=0,
    )  # fmt: skip
    policy = causal()
    trainer = trainer_class(
        model=policy, reward_funcs=reward, args=arguments, processing_class=tokenizer, reward_processing_classes=tokenizer,
        train_dataset=Dataset.from_list([{"prompt": t} for t in texts]), peft_config=lora("CAUSAL_LM"),
    )  # fmt: skip
    return trainer, [policy, reward]


def _iterations(ends: list[float]) -> list[float]:
    """Return the CPU seconds of each iteration; TRL's PPO has one step per iteration, the others one per epoch."""
    steps = 1 if KIND == "ppo" else SHAPE["epochs"]
    return [round(after - before, 3) for before, after in zip(ends[::steps], ends[steps::steps], strict=False)]


def main() -> None:
    import trl  # noqa: F401 - imported before the measurement

    idle, started = status("VmRSS"), time.monotonic()
    torch.manual_seed(0)
    trainer, models = ppo() if KIND == "ppo" else group()
    held = Held()
    if trainer.optimizer is None:
        trainer.create_optimizer()
    held.watch(getattr(trainer.optimizer, "optimizer", trainer.optimizer), models)
    trainer.add_callback(held)
    started_cpu = time.process_time()
    trainer.train()
    weights = nbytes([p for m in models for p in m.parameters()])
    print(
        json.dumps(
            {
                "weight_bytes": weights,
                "optimizer_and_gradient_bytes": held.bytes,
                "non_activation_bytes": weights + held.bytes,
                "peak_bytes": status("VmHWM") - idle,
                "iteration_cpu_seconds": _iterations([started_cpu, *held.ends]),
                "seconds": round(time.monotonic() - started, 1),
            }
        )
    )


if __name__ == "__main__":
    main()
