from __future__ import annotations

import errno
import importlib
import importlib.util
import os
import re
import sys
from contextlib import nullcontext
from datetime import date
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import metadata_load
from jinja2 import Template, TemplateError
from jinja2.exceptions import SecurityError
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from sample_report import fig, sample_report
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, CohereConfig

import chatglm
import tiny_models
from processes import python, python_anew, selfeval
from selfeval.backbone.adapters import BASE
from selfeval.backbone.role_files import load_role, save_role
from selfeval.backbone.roles import Backbone
from selfeval.config import ContextConfig, EvaluatorConfig, PlacementConfig, RunConfig
from selfeval.errors import ExportError, ModelError, RunFolderError, StorageError
from selfeval.judging.dialogue import evaluator_ids, hostile
from selfeval.judging.templates import Templates, templates_folder
from selfeval.rollout.engine import generate
from selfeval.rollout.requests import Request
from selfeval.runs import export
from selfeval.runs.evaluator import Evaluator
from selfeval.runs.export import export_role, find_role
from selfeval.stages.prompts import load_templates
from selfeval.store import RunStore, read_json, write_json, write_sealed
from selfeval.training.evaluator import EVALUATOR, score_replies
from slow import slow

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft and transformers

QUESTION, REPLY = "How many apples are left?", "Five apples are left."
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


class Run:
    """A run folder with two roles that look trained, and their outputs."""

    def __init__(
        self,
        root: Path,
        made: Any = None,
        *,
        chat: bool = False,
        grade: str = "",
        reply: str = "",
        precision: str = "fp32",
        scaling: str = "none",
        special: tuple[str, ...] = (),
        reading: dict[str, Any] | None = None,
    ) -> None:
        self.folder, self.model = root / "run", root / "model"
        tokenizer = tiny_models.words_tokenizer(("<pad>", "<eos>", *special))
        tokenizer.chat_template = CHAT if chat else None
        tiny_models.save_model(made or tiny_models.model("llama", len(tokenizer)), tokenizer, self.model)
        if grade:
            self._own_templates(grade, reply)
        lora, context = {"rank": 4, "alpha": 8.0}, {"rope_scaling": scaling, "rope_factor": 1.0 if scaling == "none" else 4.0}
        values = {
            "model": str(self.model),
            "replies": {"max_new_tokens": 8},
            "name": "tiny",
            "backbone": {"lora": lora, "precision": precision, "context": context},
        }
        self.config = RunConfig.model_validate(values)
        self.backbone = Backbone.load(self.config.model, self.config.backbone)
        for role in ("policy", EVALUATOR):
            own = (reading or {}) if role == EVALUATOR else {}
            self.backbone.roles.add(role, seed=1, head=role == EVALUATOR, **own)
            tiny_models.scramble(self.backbone, role, seed=len(role))
            save_role(self.backbone, role, self.folder / "roles" / role)
        write_json(self.folder / "roles" / EVALUATOR / "evaluator.json", {"temperature": 0.5, "mean": 0.0, "deviation": 1.0})
        write_sealed(
            self.folder / "run.json",
            {
                "config": self.config.model_dump(mode="json"),
                "device": {"model": self.config.model, "asked": "auto", "device": "cpu", "precision": precision},
            },
        )
        store = RunStore(self.folder)
        self.templates = load_templates(self.config, store, self.backbone.loaded.tokenizer, date.today())
        store.close()

    def _own_templates(self, grade: str, reply: str) -> None:
        (self.model / "templates").mkdir()
        for path in templates_folder("none").iterdir():
            own = {"grade.jinja": grade, "reply.jinja": reply}.get(path.name)
            text = own or path.read_text(encoding="utf-8")
            if "reference_answer" in grade:
                text = text.replace("reference_answer = false", "reference_answer = true")
            (self.model / "templates" / path.name).write_text(text, encoding="utf-8")

    def export(
        self,
        role: str,
        target: Path,
        *,
        merge: bool = False,
        precision: str = "base",
        config: Any = None,
        base_id: str | None = None,
    ) -> Any:
        given: Any = {"merge": merge, "precision": precision, "base_id": base_id}
        return export_role(config or self.config, self.folder, role, target, **given)

    def score(self, question: str = QUESTION, reply: str = REPLY) -> float:
        prompt = self.templates.prompt("grade", question=question, reference_answer=self.reference_answer(question))
        ids = (*self.templates.reply_ids(reply), tiny_models.EOS)
        return score_replies(self.backbone, EVALUATOR, [prompt], [ids], 4096)[0]

    def reference_answer(self, question: str = QUESTION) -> str:
        return self.templates.text(self._greedy(BASE, question)) if self.templates.grades_with_reference_answer else ""

    def greedy(self) -> str:
        return str(self.backbone.loaded.tokenizer.decode(list(self._greedy("policy", QUESTION))))

    def _greedy(self, role: str, question: str) -> tuple[int, ...]:
        request = Request(self.templates.prompt("reply", question=question), temperature=0.0)
        with self.backbone.acting_as(role):
            return generate(self.backbone, [request], max_new_tokens=8, seed=0)[0].ids


def snippets_say(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return the values that the code of the folder's README prints, run in the folder."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    code = code.replace('"THE BASE\'S OWN REPLY"', repr(run.reference_answer())).replace("PATH OF THE BASE", str(run.model))
    code = code.replace("QUESTION", QUESTION).replace("REPLY", REPLY)
    printed: list[Any] = []
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "reward", raising=False)  # that of another folder
    importlib.invalidate_caches()
    exec(compile(code, "README.md", "exec"), {"print": printed.append})
    return [v.item() if isinstance(v, torch.Tensor) else v[0] if isinstance(v, list) else v for v in printed]


def only(values: list[Any]) -> Any:
    assert len(values) == 1
    return values[0]


GRADES = {
    "default": "",
    "reference_answer": "Model: {{ reference_answer }}\nQuestion: {{ question }}\nAnswer:",
    "own code": '{% include "reply.jinja" %} {{ reference_answer }}',  # what no chat template can do
}


FAST = {(False, "default", True), (True, "default", False), (True, "reference_answer", True), (False, "own code", False)}
"""Every value of every parameter; `make test-slow` has all combinations."""


def combinations(*grades: str) -> list[Any]:
    """Return the cases of (chat, grade, merge) with these grades."""
    return [case if case in FAST else slow(*case) for case in product((False, True), grades, (True, False))]


@pytest.mark.parametrize(("chat", "grade", "merge"), combinations(*GRADES))
def test_the_readme_of_an_evaluator_scores_as_the_run_does(
    chat: bool, grade: str, merge: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path, chat=chat, grade=GRADES[grade])
    done = run.export("evaluator", tmp_path / "out", merge=merge)
    assert (done.role, done.tokenizers.dialogue) == (EVALUATOR, grade != "own code")
    assert done.layout == ("classifier" if merge else "classifier adapter")
    assert abs(run.score()) > 1e-2
    expected = [run.score()] * (2 if done.tokenizers.dialogue else 1)  # by reward.py, and with transformers alone
    assert snippets_say(run, done.folder, monkeypatch) == pytest.approx(expected, abs=1e-4)
    assert "sigmoid((s1 - s2) / 0.5)" in (done.folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("merge", [True, False], ids=["merged", "adapter"])
@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
def test_the_readme_of_a_policy_writes_as_the_run_does(
    chat: bool, merge: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path, chat=chat)
    done = run.export("policy", tmp_path / "out", merge=merge)
    assert done.layout == ("language model" if merge else "adapter")
    assert only(snippets_say(run, done.folder, monkeypatch)) == run.greedy()
    saved = AutoTokenizer.from_pretrained(done.folder).chat_template
    assert saved == CHAT if chat else saved is not None


def cohere() -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return AutoModelForCausalLM.from_config(
        CohereConfig(vocab_size=384, pad_token_id=0, eos_token_id=1, bos_token_id=2, initializer_range=0.25, **sizes)
    )


def test_an_evaluator_of_a_family_without_a_classifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, cohere())
    with pytest.raises(ExportError, match="models of type cohere"):
        run.export("evaluator", tmp_path / "merged", merge=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "run"]
    done = run.export("evaluator", tmp_path / "out")
    assert done.layout == "adapter and head"
    assert only(snippets_say(run, done.folder, monkeypatch)) == pytest.approx(run.score(), abs=1e-5)


@pytest.mark.parametrize("merge", [True, False], ids=["merged", "adapter"])
def test_an_evaluator_of_an_earlier_layer_scores_as_the_run_does(
    merge: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path, reading={"layer": 1})
    done = run.export("evaluator", tmp_path / "out", merge=merge)
    # PEFT's classifier cannot stop at a layer, so the adapter is scored by this package.
    assert done.layout == ("classifier" if merge else "adapter and head")
    expected = [run.score()] * (2 if merge else 1)
    assert snippets_say(run, done.folder, monkeypatch) == pytest.approx(expected, abs=1e-4)
    assert "after layer 1 of the base" in (done.folder / "README.md").read_text(encoding="utf-8")
    if merge:
        assert AutoConfig.from_pretrained(done.folder).num_hidden_layers == 1
    assert (done.folder / "reward.py").is_file() == merge


@pytest.mark.parametrize("merge", [True, False], ids=["merged", "adapter"])
def test_a_member_of_another_rank_scores_as_the_run_does(merge: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, reading={"rank": 2})
    done = run.export("evaluator", tmp_path / "out", merge=merge)
    # An adapter of any rank is one of PEFT, so other tools score with both layouts.
    assert done.layout == ("classifier" if merge else "classifier adapter")
    assert snippets_say(run, done.folder, monkeypatch) == pytest.approx([run.score()] * 2, abs=1e-4)
    assert read_json(done.folder / "export.json")["rank"] == 2


def test_a_member_that_pools_is_scored_by_this_package_and_not_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, reading={"rank": 2, "pooling": "mean"})
    with monkeypatch.context() as patched:
        # Refused before the base is loaded.
        patched.delattr(Backbone, "load")
        with pytest.raises(ExportError, match=r"evaluator-0 scores the mean of the hidden states .* without --merge"):
            run.export("evaluator", tmp_path / "out", merge=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "run"]
    done = run.export("evaluator", tmp_path / "out")
    assert done.layout == "adapter and head"
    assert only(snippets_say(run, done.folder, monkeypatch)) == pytest.approx(run.score(), abs=1e-5)
    card = (done.folder / "README.md").read_text(encoding="utf-8")
    assert "the mean over the tokens of the reply" in card
    assert "at which the score is read" not in card
    assert not (done.folder / "reward.py").exists()


@pytest.mark.parametrize("merge", [True, False], ids=["merged", "adapter"])
def test_an_evaluator_that_reads_no_reference_answer_needs_none(
    merge: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path, grade=GRADES["reference_answer"])
    path = run.folder / "roles" / EVALUATOR / "evaluator.json"
    write_json(path, {**read_json(path), "reference_answer": False})
    done = run.export("evaluator", tmp_path / "out", merge=merge)
    monkeypatch.setattr(run, "reference_answer", lambda question=QUESTION: "")
    assert snippets_say(run, done.folder, monkeypatch) == pytest.approx([run.score()] * 2, abs=1e-4)
    assert not (done.folder / "reference").exists()
    exported = Templates.load(done.folder / "templates", AutoTokenizer.from_pretrained(run.model))
    assert not exported.grades_with_reference_answer


def test_a_member_of_an_ensemble_has_no_temperature(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.config = run.config.model_copy(update={"evaluator": EvaluatorConfig(members=2)})
    done = run.export("evaluator", tmp_path / "out")
    assert read_json(done.folder / "export.json")["temperature"] is None
    assert "sigmoid((s1" not in (done.folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("case", "pad"), [("end is padding", "<pad>"), ("padding ends too", "<|pad|>")])
def test_a_base_without_a_padding_token_of_its_own_scores_a_padded_batch(case: str, pad: str, tmp_path: Path) -> None:
    rows = len(tiny_models.words_tokenizer())  # not one to spare
    run = Run(tmp_path, tiny_models.model("gpt2", rows))
    tokenizer = AutoTokenizer.from_pretrained(run.model)
    if case == "end is padding":
        tokenizer.pad_token = tokenizer.eos_token
        tokenizer.save_pretrained(run.model)
    else:
        write_json(run.model / "generation_config.json", {"eos_token_id": [1, 0], "pad_token_id": 0})
    done = run.export("evaluator", tmp_path / "out", merge=True)
    stranger: Any = AutoTokenizer.from_pretrained(done.folder)
    model = AutoModelForSequenceClassification.from_pretrained(done.folder)
    assert stranger.pad_token == pad
    assert model.config.pad_token_id == stranger.pad_token_id
    assert model.config.vocab_size == rows + (pad == "<|pad|>")
    replies = [REPLY, "Two.", "It is not known how many apples are left, step by step."]
    asked = [[{"role": "user", "content": QUESTION}, {"role": "assistant", "content": reply}] for reply in replies]
    texts = [stranger.apply_chat_template(messages, tokenize=False) for messages in asked]
    batch = stranger(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    found = model(**batch).logits[:, 0] + model.config.score_bias
    prompt = run.templates.prompt("grade", question=QUESTION, reference_answer="")
    ids = [(*run.templates.reply_ids(reply), tiny_models.EOS) for reply in replies]
    expected = score_replies(run.backbone, EVALUATOR, [prompt] * 3, ids, 4096)
    torch.testing.assert_close(found.detach(), torch.tensor(expected), rtol=0, atol=1e-4)


def test_the_prompts_and_the_facts_come_along(tmp_path: Path) -> None:
    run = Run(tmp_path, grade=GRADES["reference_answer"])
    done = run.export("evaluator", tmp_path / "out", merge=True)
    assert (done.folder / "templates" / "grade.jinja").read_text(encoding="utf-8") == GRADES["reference_answer"]
    facts = read_json(done.folder / "export.json")
    assert facts["role"] == EVALUATOR
    assert facts["base"] == run.model.name
    assert facts["fingerprint"] == read_json(run.folder / "roles" / EVALUATOR / "role.json")["base_fingerprint"]
    assert facts["agreement"]["difference"] == done.agreement.difference <= 1e-4
    assert facts["temperature"] == 0.5
    assert facts["bias"] == pytest.approx(run.backbone.roles.heads[EVALUATOR].bias.item(), abs=1e-6)


@pytest.mark.parametrize(
    ("pairs", "said"),
    [(0, "This confidence is not calibrated: there were too few"), (64, "The temperature was fitted on 64 held-out")],
)
def test_the_card_says_whether_the_confidence_is_calibrated(pairs: int, said: str, tmp_path: Path) -> None:
    run = Run(tmp_path)
    calibration = {"temperature": 0.5, "temperature_pairs": pairs, "mean": 0.0, "deviation": 1.0}
    write_json(run.folder / "roles" / EVALUATOR / "evaluator.json", calibration)
    folder = run.export("evaluator", tmp_path / "out").folder
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert text.count("sigmoid((s1 - s2) / 0.5).\n  ") == 1
    assert said in text
    assert "\n- Scores of replies to different questions" in text
    assert read_json(folder / "export.json")["temperature_pairs"] == pairs


def test_the_precision_is_the_runs_unless_another_is_asked_for(tmp_path: Path) -> None:
    run = Run(tmp_path, precision="bf16")
    backbone = run.config.backbone.model_copy(update={"precision": "auto"})  # which was bf16 on the run's GPU
    config = run.config.model_copy(update={"backbone": backbone})
    for precision, dtype in (("base", torch.bfloat16), ("fp32", torch.float32)):
        done = run.export("policy", tmp_path / precision, merge=True, precision=precision, config=config)
        assert {t.dtype for t in load_file(done.folder / "model.safetensors").values()} == {dtype}


# -- what is refused ----------------------------------------------------------------------------------------------------


def test_roles_are_found_by_name(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="no trained role yet"):
        find_role(tmp_path, "policy")
    for role in ("policy", "evaluator-0"):
        write_json(tmp_path / "roles" / role / "role.json", {})
    assert find_role(tmp_path, "policy") == "policy"
    assert find_role(tmp_path, "evaluator") == find_role(tmp_path, "evaluator-0") == "evaluator-0"
    for wrong in ("evaluater", "critic", "evaluator-1", ""):
        with pytest.raises(ExportError, match=f'has no role "{wrong}"; its roles: evaluator-0, policy'):
            find_role(tmp_path, wrong)
    write_json(tmp_path / "roles" / "evaluator-1" / "role.json", {})
    with pytest.raises(ExportError, match='2 roles called "evaluator": evaluator-0, evaluator-1; pass one'):
        find_role(tmp_path, "evaluator")


def test_a_folder_that_holds_something_is_refused_and_left_alone(tmp_path: Path) -> None:
    run = Run(tmp_path)
    full, file, empty = tmp_path / "full", tmp_path / "file", tmp_path / "empty"
    for folder in (full, empty):
        folder.mkdir()
    (full / "thesis.txt").write_text("mine")
    file.write_text("mine too")
    for target, reason in ((full, "is not empty"), (file, "is a file"), (run.folder, "is not empty")):
        with pytest.raises(ExportError, match=reason):
            run.export("policy", target)
    assert (full / "thesis.txt").read_text() == "mine"
    assert file.read_text() == "mine too"
    assert (run.export("policy", empty).folder / "adapter_config.json").is_file()


def test_a_role_of_another_base_is_refused_naming_both(tmp_path: Path) -> None:
    run = Run(tmp_path)
    other = tiny_models.save_model(tiny_models.model("llama", 384, seed=3), tiny_models.words_tokenizer(), tmp_path / "other")
    for merge in (True, False):
        with pytest.raises(RunFolderError, match=r"was trained on model \(weights \w+\), not on other \(weights \w+\)"):
            run.export("policy", tmp_path / "out", merge=merge, config=run.config.model_copy(update={"model": str(other)}))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()], ids=["full", "stopped"]
)
def test_nothing_stands_under_the_name_when_writing_fails(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path)

    def fail(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(export, "write_json", fail)  # of the last files: the weights are written by then
    with pytest.raises((StorageError, KeyboardInterrupt)) as found:
        run.export("evaluator", tmp_path / "out", merge=True)
    assert isinstance(error, KeyboardInterrupt) or "the disk is full" in str(found.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "run"]


# -- a folder from somebody else ----------------------------------------------------------------------------------------

FOREIGN = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

Path(__file__).parent.joinpath("RAN").touch()
Path({mark!r}).touch()


class ForeignConfig(LlamaConfig):
    model_type = "foreign"


class ForeignForCausalLM(LlamaForCausalLM):
    config_class = ForeignConfig
"""


def with_code(run: Run, mark: Path) -> None:
    """Make the model of a run one that needs its own code, which leaves a mark when it runs."""
    config = read_json(run.model / "config.json")
    classes = {"AutoConfig": "foreign.ForeignConfig", "AutoModelForCausalLM": "foreign.ForeignForCausalLM"}
    named = {"model_type": "foreign", "architectures": ["ForeignForCausalLM"], "auto_map": classes}
    write_json(run.model / "config.json", {**config, **named})
    (run.model / "foreign.py").write_text(FOREIGN.format(mark=str(mark)))


WITH_MODULES_IN = """
import runpy, sys
from transformers import dynamic_module_utils

dynamic_module_utils.HF_MODULES_CACHE = sys.argv.pop(1)
sys.argv[0] = "selfeval"
runpy.run_module("selfeval", run_name="__main__", alter_sys=True)
"""


def test_only_the_option_of_this_command_lets_a_models_code_run(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with_code(run, tmp_path / "RAN")
    score = ("score", str(run.folder), "--question", QUESTION, "--reply", REPLY)
    export = ("export", str(run.folder), "--role", "policy", "--to", str(tmp_path / "out"))
    for command in (score, export):
        refused = selfeval(*command)
        assert refused.returncode == 2, refused.stderr
        assert "executed only on request" in refused.stderr
        assert "--trust-remote-code" in refused.stderr
        assert not (tmp_path / "RAN").exists()
    written = read_json(run.folder / "run.json")
    write_sealed(run.folder / "run.json", {**written, "config": {**written["config"], "trust_remote_code": True}})
    for command in (score, export):
        assert selfeval(*command).returncode == 2
        assert not (tmp_path / "RAN").exists()
    write_sealed(run.folder / "run.json", written)
    trusted = python(WITH_MODULES_IN, str(tmp_path / "modules"), *score, "--trust-remote-code")
    assert trusted.returncode == 0, trusted.stderr
    assert (tmp_path / "modules").is_dir()
    assert (tmp_path / "RAN").exists()  # so the assertions above could fail


def test_weights_that_a_foreign_folder_wants_on_disk_go_to_a_temporary_folder(tmp_path: Path) -> None:
    run = Run(tmp_path)
    chosen = {"placement": PlacementConfig(folder=str(tmp_path / "chosen by them"))}
    config = run.config.model_copy(update={"backbone": run.config.backbone.model_copy(update=chosen)})
    store = RunStore(run.folder)
    store.update_run(config=config.model_dump(mode="json"))
    store.close()
    Evaluator.load(run.folder).score(QUESTION, [REPLY])
    assert not (tmp_path / "chosen by them").exists()


def linked(run: Run, name: str) -> Path:
    """Replace a file of a run or of its model by a link to a copy of it somewhere else."""
    root = run.folder if (run.folder / name).exists() else run.model
    elsewhere = root.parent / "elsewhere"
    elsewhere.mkdir()
    (root / name).rename(elsewhere / Path(name).name)
    (root / name).symlink_to(elsewhere / Path(name).name)
    return root / name


ROLE = f"roles/{EVALUATOR}"


@pytest.mark.parametrize(
    "name",
    [
        *(f"{ROLE}/{name}" for name in ("evaluator.json", "role.json", "adapter_config.json", "adapter_model.safetensors")),
        *(f"{ROLE}/head.safetensors", ROLE, "roles", "run.json"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "config.json"),
        *("templates/reply.jinja", "templates/grade.jinja", "templates/templates.toml", "templates"),
    ],
)
def test_no_file_comes_into_an_export_through_a_link(name: str, tmp_path: Path) -> None:
    run = Run(tmp_path, chat=True, grade=GRADES["reference_answer"])
    link = linked(run, name)
    with pytest.raises(
        (ExportError, ModelError, RunFolderError), match=rf"{re.escape(str(link))} is a link to .*; replace it with a copy"
    ):
        run.export("evaluator", tmp_path / "out", merge=True)
    assert not (tmp_path / "out").exists()


def test_a_link_to_another_file_beside_the_templates_is_not_copied(tmp_path: Path) -> None:
    run = Run(tmp_path, grade=GRADES["reference_answer"], chat=True)
    (tmp_path / "id_rsa").write_text("a key")
    (run.model / "templates" / "notes.txt").symlink_to(tmp_path / "id_rsa")
    with pytest.raises(ExportError, match=r"notes\.txt is a link"):
        run.export("policy", tmp_path / "out")
    (run.model / "templates" / "notes.txt").unlink()
    (run.model / "templates" / "notes.txt").write_text("not a template")
    copied = {path.name for path in (run.export("policy", tmp_path / "out").folder / "templates").iterdir()}
    assert copied == {*(path.name for path in templates_folder("none").iterdir()), "chat_template.jinja"}


def test_weights_may_be_links(tmp_path: Path) -> None:
    """They are often kept on another disk, and nothing of them but a model that fits the role can come into an export."""
    run = Run(tmp_path)
    linked(run, "model.safetensors")
    assert (run.export("policy", tmp_path / "out").folder / "adapter_config.json").is_file()


# -- a base with scaled positions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scaling", "merge"), [("linear", True), slow("linear", False), slow("yarn", True), ("yarn", False)])
def test_the_readmes_of_a_stretched_base_say_what_the_run_says(
    scaling: str, merge: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path, scaling=scaling)
    policy, evaluator = (run.export(role, tmp_path / role, merge=merge) for role in ("policy", "evaluator"))
    assert only(snippets_say(run, policy.folder, monkeypatch)) == run.greedy()
    assert snippets_say(run, evaluator.folder, monkeypatch) == pytest.approx([run.score()] * 2, abs=1e-4)
    assert f"| positions | scaled: {scaling} x4 |" in (policy.folder / "README.md").read_text(encoding="utf-8")
    assert read_json(policy.folder / "export.json")["positions"] == f"{scaling} x4"
    ids = torch.tensor([[5, 9, 22, 17, 30]])
    with torch.no_grad(), run.backbone.acting_as("policy"):
        expected = run.backbone.model(input_ids=ids).logits
    config = AutoConfig.from_pretrained(policy.folder)
    assert config.rope_parameters["rope_type"] == scaling
    base = AutoModelForCausalLM.from_pretrained(run.model)  # on its own positions
    plain = base if merge else PeftModel.from_pretrained(base, policy.folder).eval()
    assert (plain(input_ids=ids).logits - expected).abs().max() > 1e-2  # else the snippets above could not fail


@pytest.mark.slow
def test_the_adapter_of_a_stretched_base_does_not_find_a_base_by_itself(tmp_path: Path) -> None:
    """It would take the base's own config, and score on other positions without a word."""
    run = Run(tmp_path, scaling="yarn")
    folder = run.export("policy", tmp_path / "out").folder
    with pytest.raises((OSError, ValueError, TypeError)):
        AutoPeftModelForCausalLM.from_pretrained(folder)
    with pytest.raises((OSError, ValueError, TypeError)):
        AutoModelForCausalLM.from_pretrained(folder)
    again = Backbone.load(run.config.model, run.config.backbone)
    load_role(again, "again", folder)
    plain = Backbone.load(run.config.model, run.config.backbone.model_copy(update={"context": ContextConfig()}))
    with pytest.raises(RunFolderError, match=r"trained on model \(yarn x4\)"):
        load_role(plain, "again", folder)


@pytest.mark.parametrize("layout", ["own ids", "head alone"])
def test_other_readmes_of_a_stretched_base(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no chat template makes the ids, and where the family has no classifier."""
    run = Run(tmp_path, cohere() if layout == "head alone" else None, grade=GRADES["own code"], scaling="yarn")
    done = run.export("evaluator", tmp_path / "out")
    assert done.layout == ("adapter and head" if layout == "head alone" else "classifier adapter")
    assert only(snippets_say(run, done.folder, monkeypatch)) == pytest.approx(run.score(), abs=1e-5)


# -- ChatGLM, whose tokenizer transformers does not have ----------------------------------------------------------------

LOADS = """
import sys
from transformers import AutoTokenizer
try:
    AutoTokenizer.from_pretrained(sys.argv[1])
except Exception as error:
    print("stopped")
else:
    print("loaded")
assert "selfeval" not in sys.modules
"""


def elsewhere(code: str, folder: Path) -> str:
    """Return the output of code run in a separate process, inside a folder."""
    found = python_anew("import warnings; warnings.simplefilter('ignore')\n" + code, str(folder), cwd=folder)
    assert found.returncode == 0, found.stderr
    return found.stdout


@pytest.mark.parametrize(("generation", "merge"), [slow(1, True), (2, False), slow(3, True)])
def test_the_readme_of_a_chatglm_works_in_a_process_of_its_own(generation: int, merge: bool, tmp_path: Path) -> None:
    folder = chatglm.model_folder(generation, tmp_path / f"chatglm{generation}", room=1024)
    settings = {"lora": {"rank": 4}, "precision": "fp32"}
    values = {"model": str(folder), "backbone": settings, "replies": {"max_new_tokens": 8}, "name": "glm"}
    config = RunConfig.model_validate(values)
    backbone = Backbone.load(config.model, config.backbone)
    backbone.roles.add("policy", seed=1)
    tiny_models.scramble(backbone, "policy")
    save_role(backbone, "policy", tmp_path / "run" / "roles" / "policy")
    write_sealed(tmp_path / "run" / "run.json", {"config": config.model_dump(mode="json")})
    store = RunStore(tmp_path / "run")
    load_templates(config, store, backbone.loaded.tokenizer, date.today())
    store.close()
    done = export_role(config, tmp_path / "run", "policy", tmp_path / "out", merge=merge, precision="base")
    assert done.tokenizers.own
    text = (done.folder / "README.md").read_text(encoding="utf-8")
    assert "AutoTokenizer.from_pretrained" not in text
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    templates = Templates.load(templates_folder(str(folder)), backbone.loaded.tokenizer)
    with backbone.acting_as("policy"):
        request = Request(templates.prompt("reply", question="QUESTION"), temperature=0.0)
        ids = generate(backbone, [request], max_new_tokens=8, seed=0)[0].ids
    said = "stopped\n"  # AutoTokenizer does not guess
    assert elsewhere(LOADS + code, done.folder) == said + str(backbone.loaded.tokenizer.decode(list(ids))) + "\n"


# -- the reward function ------------------------------------------------------------------------------------------------


def reward_of(folder: Path) -> Any:
    """The reward.py of an exported folder."""
    spec: Any = importlib.util.spec_from_file_location("reward", folder / "reward.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("chat", "grade", "merge"), combinations("default", "reference_answer"))
def test_the_reward_function_scores_as_the_run_whatever_the_texts(chat: bool, grade: str, merge: bool, tmp_path: Path) -> None:
    run = Run(tmp_path, chat=chat, grade=GRADES[grade])
    folder = run.export("evaluator", tmp_path / "out", merge=merge).folder
    evaluator = reward_of(folder).Evaluator(batch_size=2)
    hostile_question, hostile_reply, _ = hostile(run.templates)[0]
    cases = [
        (QUESTION, REPLY),
        (QUESTION, "Two."),
        (hostile_question, "It is not known how many, step by step."),
        ("Why?\n\n", hostile_reply),
        (hostile_question, " " + hostile_reply),
    ]
    expected = [run.score(question, reply) for question, reply in cases]
    assert len({round(score, 4) for score in expected}) == len(cases)
    assert evaluator.scores(*zip(*cases, strict=True)) == pytest.approx(expected, abs=1e-4)
    asked = [[{"role": "user", "content": question}] for question, _ in cases]
    replied = [[{"role": "assistant", "content": reply}] for _, reply in cases]
    assert evaluator(prompts=asked, completions=replied, completion_ids=[], trainer_state=None) == pytest.approx(
        expected, abs=1e-4
    )
    if grade == "reference_answer":
        assert evaluator.reference_answers([QUESTION, QUESTION]) == [run.reference_answer(QUESTION)] * 2


def test_the_reward_function_does_not_read_a_thinking(tmp_path: Path) -> None:
    run = Run(tmp_path, chat=True)
    folder = run.export("evaluator", tmp_path / "out", merge=False).folder
    evaluator = reward_of(folder).Evaluator()
    assert evaluator.facts["thinking_ends"] == [], "this tokenizer has no tokens for it"
    evaluator.facts["thinking_ends"] = ["</think>"]
    wanted = [run.score(QUESTION, REPLY)] * 2
    assert evaluator.scores([QUESTION] * 2, [REPLY, f"<think>Two.</think> {REPLY}"]) == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
def test_an_exported_classifier_does_not_score_reasoning(chat: bool, tmp_path: Path) -> None:
    run = Run(tmp_path, chat=chat, special=("<think>", "</think>"))
    folder = run.export("evaluator", tmp_path / "out", merge=True).folder
    wanted = evaluator_ids(run.templates, (QUESTION, REPLY, ""), (tiny_models.EOS,))
    tokenizer, reply = AutoTokenizer.from_pretrained(folder), f"<think>Two? No.</think>\n\n{REPLY}"
    for text in (REPLY, reply, f"Two? No.</think>{REPLY}"):
        messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": text}]
        assert tuple(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)) == wanted
    rows = {"prompt": [QUESTION], "chosen": [reply], "rejected": ["Two."]}
    assert reward_of(folder).Evaluator().conversations(rows)["chosen"] == [[{"role": "assistant", "content": REPLY}]]
    assert "which ends with `</think>`, is not scored" in (folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
def test_plain_prompts_are_put_on_the_evaluators_prompt_or_refused(chat: bool, tmp_path: Path) -> None:
    run = Run(tmp_path, chat=chat)
    evaluator = reward_of(run.export("evaluator", tmp_path / "out", merge=True).folder).Evaluator()
    before, after = evaluator.facts["reply_prompt"]
    assert (before + after).replace("<|user|>", "").startswith("<eos>" if chat else "Question:")
    expected = run.score()
    for prompt in (QUESTION, f"{before}{QUESTION}{after}"):
        assert evaluator([prompt], [" " + REPLY]) == pytest.approx([expected], abs=1e-4)
    with pytest.raises(ValueError, match=r"control token '<eos>', but is not the policy's prompt"):
        evaluator([f"Be kind.<eos>{QUESTION}"], [REPLY])
    turns = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": REPLY},
        {"role": "user", "content": "Why?"},
    ]
    text = f"User: {QUESTION}\n\nAssistant: {REPLY}\n\nUser: Why?"
    assert evaluator([turns], [REPLY]) == pytest.approx([run.score(text)], abs=1e-4)
    with pytest.raises(ValueError, match="end with a message of the user; got: user, assistant"):
        evaluator([turns[:2]], [REPLY])


def test_rows_of_texts_become_the_conversations_that_trl_tokenizes(tmp_path: Path) -> None:
    run = Run(tmp_path, grade=GRADES["reference_answer"])
    evaluator = reward_of(run.export("evaluator", tmp_path / "out", merge=True).folder).Evaluator()
    rows = evaluator.conversations({"prompt": [QUESTION], "chosen": [REPLY], "rejected": ["Two."]})
    (prompt,), (chosen,), (kwargs,) = rows["prompt"], rows["chosen"], rows["chat_template_kwargs"]
    ids = evaluator.tokenizer.apply_chat_template(prompt + chosen, tokenize=True, return_dict=False, **kwargs)
    assert tuple(ids) == evaluator_ids(run.templates, (QUESTION, REPLY, run.reference_answer()), (tiny_models.EOS,))
    turns = [{"role": role, "content": "Why?"} for role in ("user", "assistant", "user")]
    with pytest.raises(ValueError, match="reads a reference answer, which it asks for single questions only"):
        evaluator([turns], [REPLY])


# -- the model card -----------------------------------------------------------------------------------------------------


def front_matter(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = metadata_load(folder / "README.md")
    return found


def report() -> dict[str, Any]:
    """The sample report with these counts and figures, and no gold."""
    found = sample_report()
    found["data"] |= {"seeds": 3, "questions": 40}
    found["verdicts"] |= {"judged": 50, "kept": 39, "tie": 6, "unsure": 4, "unparsable": 1}
    found["evaluator"] |= {"accuracy_judge": fig(0.9, 0.8, 0.95, 9), "accuracy_gold": None}
    found["policy"] |= {"win_rate": fig(0.7, 0.6, 0.8, 200), "gold_before": None, "gold_after": None, "gold_gain": None}
    return found


@pytest.mark.parametrize(
    ("role", "merge", "library", "task", "tags"),
    [
        ("policy", True, "transformers", "text-generation", ["self-evaluator", "reinforcement-learning"]),
        ("policy", False, "peft", "text-generation", ["self-evaluator", "reinforcement-learning", "lora"]),
        ("evaluator", True, "transformers", "text-classification", ["self-evaluator", "reward-model"]),
        ("evaluator", False, "peft", "text-classification", ["self-evaluator", "reward-model", "lora"]),
    ],
)
def test_the_card_says_what_the_hub_and_a_reader_need(
    role: str, merge: bool, library: str, task: str, tags: list[str], tmp_path: Path
) -> None:
    run = Run(tmp_path)
    write_json(run.folder / "report.json", report())
    (run.model / "README.md").write_text("---\nlicense: other\nlicense_name: tiny-1\nlicense_link: https://a.example\n---\n")
    folder = run.export(role, tmp_path / "out", merge=merge, base_id="org/tiny").folder
    assert front_matter(folder) == {
        "license": "other",
        "license_name": "tiny-1",
        "license_link": "https://a.example",
        "base_model": "org/tiny",
        "base_model_relation": "finetune" if merge else "adapter",
        "library_name": library,
        "pipeline_tag": task,
        "tags": tags,
    }
    text = (folder / "README.md").read_text(encoding="utf-8")
    figure = "90.0% (interval 80.0% to 95.0%, n = 9)" if role == "evaluator" else "70.0% (interval 60.0% to 80.0%, n = 200)"
    assert figure in text
    assert "by gold" not in text.split("## Figures")[1].split("## Data")[0], "not measured here"
    assert "39 kept, 6 ties, 4 unsure, 1 without a readable verdict" in text
    assert "## Limits" in text
    assert merge or read_json(folder / "adapter_config.json")["base_model_name_or_path"] == "org/tiny"


@pytest.mark.parametrize(
    ("kind", "told", "untold"),
    [
        ("pairs", "labelled pairs from a file", "judged by the model itself"),
        ("replies", "pairs of replies from a file, judged by the model itself", "seed questions;"),
        ("questions", "test questions from a file", "generated by the base"),
    ],
)
def test_the_card_tells_what_came_from_a_file(kind: str, told: str, untold: str, tmp_path: Path) -> None:
    run = Run(tmp_path)
    write_json(run.folder / "report.json", report())
    section = getattr(run.config, kind).model_copy(update={"file": "mine.jsonl"})
    folder = run.export("evaluator", tmp_path / "out", merge=False, config=run.config.model_copy(update={kind: section})).folder
    text = " ".join((folder / "README.md").read_text(encoding="utf-8").split())
    assert told in text
    assert untold not in text
    assert ("There are no human labels" in text) == (kind != "pairs")


@pytest.mark.parametrize("merge", [True, False], ids=["merged", "adapter"])
@pytest.mark.parametrize("role", ["policy", "evaluator"])
def test_no_card_names_a_path_of_this_computer(role: str, merge: bool, tmp_path: Path) -> None:
    run = Run(tmp_path, grade=GRADES["reference_answer"])
    folder = run.export(role, tmp_path / "out", merge=merge).folder
    assert "base_model" not in front_matter(folder)
    assert front_matter(folder)["license"] == "other", "unknown"
    naming = {p.name for p in folder.rglob("*") if p.is_file() and str(tmp_path).encode() in p.read_bytes()}
    assert naming == (set() if merge else {"adapter_config.json"}), (
        "PEFT finds the base there; --base-id names it by its hub id"
    )


def test_a_base_in_the_hubs_cache_is_named_by_its_hub_id(tmp_path: Path) -> None:
    run = Run(tmp_path)
    snapshot = tmp_path / "models--org--tiny" / "snapshots" / "0123abc"
    snapshot.parent.mkdir(parents=True)
    run.model.rename(snapshot)
    config = run.config.model_copy(update={"model": str(snapshot)})
    folder = run.export("policy", tmp_path / "out", merge=True, config=config).folder
    assert front_matter(folder)["base_model"] == "org/tiny"
    assert read_json(folder / "export.json")["base_revision"] == "0123abc"


def test_a_base_id_that_is_none_and_a_card_that_cannot_be_read(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with pytest.raises(ExportError, match=r"--base-id /home/me/tiny is not a hub id; expected organisation and name"):
        run.export("policy", tmp_path / "out", merge=True, base_id="/home/me/tiny")
    (run.model / "README.md").write_text("---\nlicense: [: }\n---\n")
    assert front_matter(run.export("policy", tmp_path / "out", merge=True).folder)["license"] == "other"


def test_a_name_cannot_write_into_the_card(tmp_path: Path) -> None:
    run = Run(tmp_path)
    config = run.config.model_copy(update={"name": "x\n---\nlicense: mit\n---\n# <script> `x`"})
    folder = run.export("policy", tmp_path / "out", merge=True, config=config).folder
    assert front_matter(folder)["license"] == "other"
    assert "# policy of the run x --- license: mit --- # script x\n" in (folder / "README.md").read_text(encoding="utf-8")


SHELL = "{{ self.__init__.__globals__.__builtins__.__import__('pathlib').Path('RAN').touch() }}"


@pytest.mark.parametrize("kind", ["reply", "grade"])
def test_a_foreign_template_runs_no_code_in_the_snippets(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Harmless unless rendered; a plain `jinja2.Template` would run it."""
    guarded = "{% if question == 'QUESTION OF THE ATTACK' %}" + SHELL + "{% endif %}{{ question }}"
    run = Run(tmp_path, grade=guarded) if kind == "grade" else Run(tmp_path, grade=GRADES["reference_answer"], reply=guarded)
    for role in ("evaluator",) if kind == "grade" else ("policy", "evaluator"):
        folder = run.export(role, tmp_path / role, merge=True).folder
        monkeypatch.setattr(sys.modules[__name__], "QUESTION", "QUESTION OF THE ATTACK")
        with pytest.raises((SecurityError, TemplateError)):
            snippets_say(run, folder, monkeypatch)
        assert not (folder / "RAN").exists()
        monkeypatch.setattr(sys.modules[__name__], "QUESTION", "How many apples are left?")
    Template(SHELL).render()
    assert Path("RAN").exists(), "outside of a sandbox it runs"


def test_files_that_appear_in_the_target_during_an_export_stay(tmp_path: Path) -> None:
    run, target = Run(tmp_path), tmp_path / "out"

    def add_a_file(step: str) -> Any:
        target.mkdir(exist_ok=True)
        (target / "thesis.txt").write_text("mine")
        return nullcontext()

    with pytest.raises(StorageError, match=r"out: files have appeared in that folder.*use another folder"):
        export_role(run.config, run.folder, "policy", target, merge=False, precision="base", waiting=add_a_file)
    assert [(path.name, path.read_text()) for path in target.iterdir()] == [("thesis.txt", "mine")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out", "run"]


def test_two_exports_to_one_folder_do_not_mix(tmp_path: Path) -> None:
    run, target = Run(tmp_path), tmp_path / "out"
    refused: list[str] = []

    def export_again(step: str) -> Any:
        if step.startswith("writing"):
            with pytest.raises(ExportError, match="another process is exporting to") as caught:
                run.export(EVALUATOR, target)
            refused.append(str(caught.value))
        return nullcontext()

    export_role(run.config, run.folder, "policy", target, merge=False, precision="base", waiting=export_again)
    assert len(refused) == 1
    assert read_json(target / "export.json")["role"] == "policy"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out", "run"]


def test_a_process_that_opened_the_lock_of_a_finished_export_does_not_get_past_a_later_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, opened = tmp_path / "out", os.open
    first, third = (export._locked(target) for _ in range(2))
    first.__enter__()

    def late(path: Any, *arguments: Any, **options: Any) -> int:
        """Open a file; if it is the lock, the first export ends and a third begins before this process can lock it."""
        found = opened(path, *arguments, **options)
        if os.path.basename(path) == ".out.lock":
            monkeypatch.setattr(os, "open", opened)
            first.__exit__(None, None, None)
            third.__enter__()
        return found

    monkeypatch.setattr(os, "open", late)
    with pytest.raises(ExportError, match="another process is exporting to"), export._locked(target):
        pass
    third.__exit__(None, None, None)
    assert list(tmp_path.iterdir()) == []
