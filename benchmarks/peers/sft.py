"""The loss of supervised fine-tuning on the same batches as TRL's SFTTrainer, with the same token ids and masks.

python benchmarks/peers/sft.py [--model FOLDER]

Conversations of several turns, prompts with completions, and plain texts, on a random Llama; with --model also on an instruct
model whose chat template has no `{% generation %}` marks. There, TRL gets a copy of the template with marks, and this package
finds the turns by itself. TRL runs in its own environment, which is built first (`environment.py`).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from common import write
from environment import build

from chats import CHATML, MARKED, chat_tokenizer
from selfeval.backbone.load import load_model
from selfeval.backbone.roles import Backbone
from selfeval.config import LoraConfig
from selfeval.judging.conversations import ConversationEncoder
from selfeval.judging.templates import Templates, templates_folder
from selfeval.stages.tuning_chats import read_conversations
from selfeval.training.documents import Document, pack_documents
from selfeval.training.sft import documents_loss
from tiny_models import model as tiny_model
from tiny_models import save_model

ROW, ROLE, MOST_TOKENS = 256, "tuned", 4096
NAMES = ("Tom", "Lily", "Mary", "Ben", "Mia")
NUMBERS = ("two", "three", "five", "seven", "nine")


@dataclass(frozen=True)
class Case:
    """A batch.

    Attributes:
        name: name in the results.
        kind: which loss TRL is asked for: `assistant` or `completion`.
        rows: lines of the file of conversations.
        template: chat template of the model; None: it has none.
        marked: Optional. Chat template that TRL gets instead. Default: the same.
    """

    name: str
    kind: str
    rows: Sequence[dict[str, Any]]
    template: str | None
    marked: str | None = None


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def conversations() -> list[dict[str, Any]]:
    """Return ten conversations of one to three turns of the assistant, half of them with a system message."""
    rows = []
    for index, (name, number) in enumerate(zip(NAMES * 2, NUMBERS + NUMBERS[::-1], strict=True)):
        turns = [said("system", "Answer in one word.")] if index % 2 else []
        for turn in range(1 + index % 3):
            asked = f"{name} has {number} apples and gives away {NUMBERS[turn]} of them. How many apples are left?"
            turns += [said("user", asked), said("assistant", f"{NUMBERS[(index + turn) % 5]} apples are left.")]
        rows.append({"messages": turns})
    return rows


def completions() -> list[dict[str, Any]]:
    """Return the same conversations as prompts with their last reply."""
    return [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in conversations()]


def texts() -> list[dict[str, Any]]:
    """Return ten questions with answers as plain text."""
    last = [row["messages"][-2:] for row in conversations()]
    return [{"prompt": f"Question: {q['content']} Answer:", "completion": f" {a['content']}"} for q, a in last]


def tiny_cases() -> list[Case]:
    return [
        Case("messages", "assistant", conversations(), MARKED),
        Case("messages, no marks", "assistant", conversations(), CHATML, MARKED),
        Case("prompt and completion", "completion", completions(), CHATML),
        Case("plain text", "completion", texts(), None),
    ]


def instruct_cases(template: str) -> list[Case]:
    """Return the cases of an instruct model in the ChatML format."""
    shown = "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    if shown not in template:
        raise SystemExit("the chat template of --model is not SmolLM2's, and its turns cannot be marked for TRL")
    marked = template.replace(
        shown,
        "{{'<|im_start|>' + message['role'] + '\n'}}{% if message['role'] == 'assistant' %}{% generation %}"
        "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
        "{{ '\n' }}",
    )
    return [
        Case("messages, no marks", "assistant", conversations(), template, marked),
        Case("prompt and completion", "completion", completions(), template),
    ]


def of_trl(python: Path, model: Path, case: Case, file: Path) -> dict[str, Any]:
    """Return TRL's loss, token ids and labels."""
    arguments: list[str | Path] = [Path(__file__).with_name("trl_sft.py"), model, file, case.kind]
    if case.marked is not None:
        changed = file.with_suffix(".jinja")
        changed.write_text(case.marked, encoding="utf-8")
        arguments.append(changed)
    done = subprocess.run([python, *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{case.name}: TRL failed:\n{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(done.stdout.rsplit("RESULT ", 1)[1])
    return found


def compare(python: Path, backbone: Backbone, model: Path, case: Case, folder: Path) -> dict[str, Any]:
    """Return the figures of one case."""
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in case.rows), encoding="utf-8")
    encoder = ConversationEncoder(Templates.load(templates_folder(str(model)), backbone.loaded.tokenizer))
    encoded = [encoder.encode(conversation) for conversation in read_conversations([file])]
    documents = [Document(each.ids, each.trained) for each in encoded]
    theirs = of_trl(python, model, case, file)
    labels = [[i if counts else -100 for i, counts in zip(d.ids, d.trained, strict=True)] for d in documents]
    losses = {
        "packed": documents_loss(backbone, ROLE, pack_documents(documents, ROW), MOST_TOKENS),
        "one_by_one": documents_loss(backbone, ROLE, [(document,) for document in documents], MOST_TOKENS),
    }
    return {
        "n": len(documents),
        "tokens": sum(document.trained_tokens for document in documents),
        "equal_ids": [list(d.ids) for d in documents] == [row["ids"] for row in theirs["rows"]],
        "equal_masks": labels == [row["labels"] for row in theirs["rows"]],
        "trl": theirs["loss"],
        **losses,
        "difference": max(abs(loss - theirs["loss"]) for loss in losses.values()),
        "peers": theirs["versions"],
    }


def measure(python: Path, folder: Path, model: Path | None = None) -> dict[str, Any]:
    """Return the figures of all cases on the random model and, if it is given, on an instruct model."""
    found: dict[str, Any] = {"tiny": {}}
    for number, case in enumerate(tiny_cases()):
        tokenizer, place = chat_tokenizer(case.template), folder / f"model-{number}"
        save_model(tiny_model("llama", len(tokenizer), seed=number), tokenizer, place)
        found["tiny"][case.name] = compare(python, _backbone(place), place, case, folder)
    if model is not None:
        backbone = _backbone(model)
        template = str(backbone.loaded.tokenizer.get_chat_template())
        cases = instruct_cases(template)
        found[model.name] = {case.name: compare(python, backbone, model, case, folder) for case in cases}
    found["peers"] = next(iter(found["tiny"].values()))["peers"]
    for cases_found in (found["tiny"], found[model.name] if model else {}):
        for figures in cases_found.values():
            del figures["peers"]
    return found


def _backbone(model: Path) -> Backbone:
    backbone = Backbone(load_model(str(model), device="cpu", precision="fp32"), LoraConfig(), model.name)
    backbone.roles.add(ROLE)  # an adapter starts as the bare base
    return backbone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of an instruct model: SmolLM2")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(build(), Path(folder), given.model)
    command = "python benchmarks/peers/sft.py" + (f" --model {given.model.name}" if given.model else "")
    write("sft", command, figures)


if __name__ == "__main__":
    main()
