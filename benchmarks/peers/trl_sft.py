"""TRL's SFTTrainer on one batch: its loss, token ids and labels, printed as one JSON line.

Run by benchmarks/peers/sft.py with the interpreter of the peers:
    python trl_sft.py MODEL ROWS.jsonl assistant|completion [CHAT_TEMPLATE.jinja]
"""

from __future__ import annotations

import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer


def trainer_on(model: str, rows: list[dict[str, Any]], kind: str, template: str | None, folder: str) -> SFTTrainer:
    tokenizer = AutoTokenizer.from_pretrained(model)
    if template is not None:
        tokenizer.chat_template = template
    arguments = SFTConfig(
        output_dir=folder, per_device_train_batch_size=len(rows), assistant_only_loss=kind == "assistant",
        completion_only_loss=kind == "completion", max_length=None, packing=False, report_to="none", save_strategy="no",
        use_cpu=True, bf16=False, gradient_checkpointing=False, seed=0,
    )  # fmt: skip
    return SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=arguments,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(rows),
    )


def main() -> None:
    model, path, kind, *templates = sys.argv[1:]
    rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    template = Path(templates[0]).read_text(encoding="utf-8") if templates else None
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_on(model, rows, kind, template, folder)
        batch = next(iter(trainer.get_train_dataloader()))
        with torch.no_grad():
            tokens = (batch["labels"][:, 1:] != -100).sum()
            loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=tokens)
        seen = [{"ids": row["input_ids"], "labels": row["labels"]} for row in trainer.train_dataset]
    libraries = {name: version(name) for name in ("torch", "transformers", "trl", "datasets")}
    print("\nRESULT " + json.dumps({"loss": float(loss), "rows": seen, "versions": libraries}))


if __name__ == "__main__":
    main()
