"""`selfeval export` with the real command, on a run of the embedded model at toy size."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from jinja2 import Template
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from processes import selfeval, selfeval_on_a_full_disk, start
from selfeval.backbone.adapters import BASE
from selfeval.backbone.role_files import load_role
from selfeval.backbone.roles import Backbone
from selfeval.config import RunConfig
from selfeval.judging.templates import Templates
from selfeval.prompt import Prompt
from selfeval.rollout.engine import generate
from selfeval.rollout.requests import Request
from selfeval.training.evaluator import EVALUATOR, score_replies
from toy import ToyRun

QUESTION = "Tom has 3 pens. He buys 2 more. How many pens does Tom have now?"
REPLIES = ("3 + 2 = 5. The answer is 5.", "3 - 2 = 1. The answer is 1.", "The answer is 7.")


@pytest.fixture(scope="module")
def run(toy_run: ToyRun) -> Path:
    return toy_run.folder


@pytest.fixture(scope="module")
def backbone(run: Path) -> Backbone:
    config = RunConfig.model_validate(json.loads((run / "run.json").read_text())["config"])
    backbone = Backbone.load(config.model, config.backbone)
    for role in ("policy", EVALUATOR):
        load_role(backbone, role, run / "roles" / role)
    return backbone


@pytest.fixture(scope="module")
def templates(run: Path, backbone: Backbone) -> Templates:
    return Templates.load(run.parent / "lab" / "word_problems" / "templates", backbone.loaded.tokenizer)


def greedy(backbone: Backbone, role: str, prompts: list[Prompt]) -> list[tuple[int, ...]]:
    with backbone.acting_as(role):
        rollouts = generate(backbone, [Request(p, temperature=0.0) for p in prompts], max_new_tokens=40, seed=0)
    return [r.ids for r in rollouts]


@pytest.mark.slow
def test_transformers_generates_the_policys_tokens(run: Path, backbone: Backbone, templates: Templates, tmp_path: Path) -> None:
    done = selfeval("export", str(run), "--role", "policy", "--merge", "--to", str(tmp_path / "policy"))
    assert done.returncode == 0, done.stderr
    assert f"policy as language model: {tmp_path / 'policy'}" in done.stdout
    assert "verified: the reloaded logits differ from the role's by at most" in done.stdout
    questions = [QUESTION, *(q.replace("Tom", name) for name, q in (("Ann", QUESTION), ("Sam", QUESTION.replace("3", "9"))))]
    expected = greedy(backbone, "policy", [templates.prompt("reply", question=q) for q in questions])
    assert (
        expected != greedy(backbone, BASE, [templates.prompt("reply", question=q) for q in questions]) or len(set(expected)) > 1
    )
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "policy")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    prompt = Template((tmp_path / "policy" / "templates" / "reply.jinja").read_text())
    for question, ids in zip(questions, expected, strict=True):
        given = tokenizer(prompt.render(question=question, chat=False), return_tensors="pt").input_ids
        made = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=40, do_sample=False)
        assert tuple(made[0, given.shape[1] :].tolist()) == ids


def test_a_sequence_classifier_gives_the_evaluators_scores(
    run: Path, backbone: Backbone, templates: Templates, tmp_path: Path
) -> None:
    done = selfeval("export", str(run), "--role", "evaluator", "--merge", "--to", str(tmp_path / "evaluator"))
    assert done.returncode == 0, done.stderr
    assert f"evaluator-0 as classifier: {tmp_path / 'evaluator'}" in done.stdout
    reference_answer = templates.text(greedy(backbone, BASE, [templates.prompt("reply", question=QUESTION)])[0])
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "evaluator")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "evaluator")
    asked = [[{"role": "user", "content": QUESTION}, {"role": "assistant", "content": reply}] for reply in REPLIES]
    texts = [tokenizer.apply_chat_template(messages, tokenize=False, reference_answer=reference_answer) for messages in asked]
    batch = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    found = model(**batch).logits.detach()[:, 0] + model.config.score_bias
    prompt = templates.prompt("grade", question=QUESTION, reference_answer=reference_answer)
    ids = [(*templates.reply_ids(reply), *backbone.loaded.eos_ids[:1]) for reply in REPLIES]
    expected = torch.tensor(score_replies(backbone, EVALUATOR, [prompt] * len(ids), ids, 4096))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert (expected - expected.mean()).abs().max() > 1e-3
    options = [part for reply in REPLIES for part in ("--reply", reply)]
    shown = selfeval("score", str(run), "--question", QUESTION, *options).stdout.splitlines()
    assert [float(line.split()[0]) for line in shown[: len(REPLIES)]] == pytest.approx(found.tolist(), abs=1e-3)


def test_wrong_requests_get_one_sentence(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other_problems"
    shutil.copytree(run.parent / "lab" / "word_problems", other)
    weights = load_file(other / "model.safetensors")
    save_file({name: tensor * 1.1 for name, tensor in weights.items()}, other / "model.safetensors", {"format": "pt"})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    new = ("--to", str(tmp_path / "new"))
    wrong = {
        ("--role", "critic", *new): 'has no role "critic"; its roles: evaluator-0, policy',
        ("--role", "policy", "--to", str(tmp_path / "full")): "exists and is not empty",
        ("--role", "policy", *new, "--precision", "fp32"): "needs --merge",
        ("--role", "policy", *new, "--merge", "--precision", "fp8"): 'there is no precision "fp8"',
        ("--role", "policy", *new, "--model", str(other)): "was trained on word_problems (weights",
    }
    for arguments, sentence in wrong.items():
        done = selfeval("export", str(run), *arguments)
        assert done.returncode == 2, arguments
        last = done.stderr.splitlines()[-1]
        assert last.startswith("Error: ")
        assert sentence in last
        assert "Traceback" not in done.stderr
    assert "not on other_problems (weights" in last
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full", "other_problems"]


def test_a_full_disk_leaves_nothing_half_written(run: Path, tmp_path: Path) -> None:
    done = selfeval_on_a_full_disk(100_000, "export", str(run), "--role", "policy", "--merge", "--to", str(tmp_path / "out"))
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"Error: cannot write {tmp_path / 'out'}: ")
    assert list(tmp_path.iterdir()) == []


def test_a_killed_export_leaves_nothing_under_its_name_and_can_be_repeated(run: Path, tmp_path: Path) -> None:
    arguments = ["export", str(run), "--role", "policy", "--merge", "--to", str(tmp_path / "out")]
    process = start(arguments)
    deadline = time.monotonic() + 200
    while not list(tmp_path.glob(".out.part/*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "killed while it wrote"
    assert {p.name for p in tmp_path.iterdir()} == {".out.part", ".out.lock"}
    done = selfeval(*arguments)
    assert done.returncode == 0, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
