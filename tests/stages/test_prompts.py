"""A run keeps its prompts: later changes in the model folder change no score and no export."""

from __future__ import annotations

import io
import json
import shutil
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import tiny_models
from selfeval.backbone.role_files import save_role
from selfeval.backbone.roles import Backbone
from selfeval.config import RunConfig
from selfeval.errors import ModelError, RunFolderError
from selfeval.judging.dialogue import policy_tokenizer
from selfeval.judging.templates import template_texts, templates_folder
from selfeval.runs.evaluator import Evaluator
from selfeval.runs.export import export_role
from selfeval.runs.templates import day_of, templates_of_run
from selfeval.stages.context import Context
from selfeval.stages.prompts import has_lost_chat_template, keep_templates, load_templates
from selfeval.stages.terminal import Terminal
from selfeval.store import RunStore, write_json, write_sealed
from selfeval.training.evaluator import EVALUATOR

CHAT = "{% for m in messages %}{{ strftime_now('%Y') }} {{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
ROLES = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
DAY = date(2024, 7, 6)


class Run:
    """A run folder with an evaluator, on a model with custom templates and a chat template that prints the year."""

    def __init__(
        self,
        root: Path,
        chat: str | None = CHAT,
        arguments: dict[str, Any] | None = None,
        own: str | None = None,
        system: str = "",
    ) -> None:
        self.folder, self.model = root / "run", root / "model"
        tokenizer = tiny_models.words_tokenizer()
        tokenizer.chat_template = chat
        tiny_models.save_model(tiny_models.model("llama", len(tokenizer)), tokenizer, self.model)
        shutil.copytree(templates_folder("none"), self.model / "templates")
        if own is not None:
            (self.model / "templates" / "chat_template.jinja").write_text(own)
        self.config = RunConfig.model_validate(
            {
                "model": str(self.model),
                "backbone": {"precision": "fp32", "lora": {"rank": 4}},
                "chat": {"arguments": arguments or {}, "system": system},
            }
        )
        backbone = Backbone.load(self.config.model, self.config.backbone)
        backbone.roles.add(EVALUATOR, seed=1, head=True)
        tiny_models.scramble(backbone, EVALUATOR, seed=2)
        save_role(backbone, EVALUATOR, self.folder / "roles" / EVALUATOR)
        write_json(self.folder / "roles" / EVALUATOR / "evaluator.json", {"temperature": 0.5, "mean": 0.0, "deviation": 1.0})
        write_sealed(self.folder / "run.json", {"config": self.config.model_dump(mode="json")})
        self.tokenizer = backbone.loaded.tokenizer
        store = RunStore(self.folder)
        load_templates(self.config, store, self.tokenizer, DAY)
        store.close()

    def score(self, folder: Path | None = None) -> float:
        return Evaluator.load(folder or self.folder).score("How many?", ["five"])[0]

    def export(self, target: Path) -> Path:
        given: Any = {"merge": True, "precision": "base"}
        export_role(self.config, self.folder, EVALUATOR, target, **given)
        return target

    def keep(self) -> None:
        store = RunStore(self.folder)
        keep_templates(self.config, store, day_of(store.run))
        store.close()


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def test_scores_and_exports_come_from_the_prompts_of_the_run(run: Run, tmp_path: Path) -> None:
    before, texts = run.score(), template_texts(run.folder / "templates")
    (run.model / "templates" / "grade.jinja").write_text("Is this any good? {{ question }}")
    (run.model / "templates" / "reply.jinja").write_text("{{ nothing }}")
    (run.model / "chat_template.jinja").write_text("<<" + CHAT + ">>")
    assert run.score() == before
    exported = run.export(tmp_path / "exported")
    assert template_texts(exported / "templates") == texts
    assert "<<" not in (exported / "chat_template.jinja").read_text()
    shutil.rmtree(run.model / "templates")
    assert run.score() == before


def test_the_day_of_the_run_is_in_its_prompts_and_exports(run: Run, tmp_path: Path) -> None:
    templates = templates_of_run(run.folder, run.tokenizer, run.config.verdicts)
    assert templates.tokenizer.decode(list(templates.prompt("reply", question="x").ids)) == "2024 user: x\n"
    exported = run.export(tmp_path / "exported")
    said: Any = type(run.tokenizer).from_pretrained(exported)
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    assert said.apply_chat_template(messages, tokenize=False).startswith("2024 user: ")
    assert json.loads((run.folder / "run.json").read_text())["date"] == "2024-07-06"


def test_a_run_without_a_chat_template_stays_without(tmp_path: Path) -> None:
    run = Run(tmp_path, chat=None)
    before = run.score()
    assert (run.folder / "templates" / "chat_template.jinja").read_text() == ""
    (run.model / "chat_template.jinja").write_text(CHAT)
    assert run.score() == before


def test_a_round_reads_the_prompts_of_its_run(run: Run) -> None:
    inner = run.folder / "rounds" / "02"
    shutil.copytree(run.folder / "roles", inner / "roles")
    write_sealed(inner / "run.json", {"round": 2, "config": run.config.model_dump(mode="json")})
    assert run.score(inner) == run.score()


def test_prompts_that_are_not_those_of_the_run_are_refused_and_the_remedy_works(run: Run) -> None:
    before, place = run.score(), run.folder / "templates"
    (place / "grade.jinja").write_text("{{ question }}!")
    with pytest.raises(RunFolderError, match=r"grade.jinja differs from the version that the run used.*selfeval run"):
        run.score()
    run.keep()
    assert run.score() == before
    shutil.rmtree(place)
    with pytest.raises(RunFolderError, match=r"templates does not contain the prompt templates.*selfeval run"):
        run.score()
    run.keep()
    store = RunStore(run.folder)
    assert has_lost_chat_template(store)
    load_templates(run.config, store, run.tokenizer, day_of(store.run))  # as `selfeval run` does next
    assert not has_lost_chat_template(store)
    store.close()
    assert run.score() == before


def test_a_link_out_of_the_run_is_refused(run: Run, tmp_path: Path) -> None:
    shutil.move(run.folder / "templates", tmp_path / "elsewhere")
    (run.folder / "templates").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunFolderError, match="link"):
        run.score()


def test_a_message_names_the_users_own_file(run: Run) -> None:
    (run.model / "templates" / "referee.jinja").write_text("{{ question }} {{ frist }} {{ second }}")
    run.keep()
    store = RunStore(run.folder)
    with pytest.raises(ModelError, match=rf"{run.model}/templates/referee.jinja uses frist"):
        load_templates(run.config, store, run.tokenizer, DAY)
    store.close()


# -- arguments of the chat template -------------------------------------------------------------------------------------

THINKS = "{% if enable_thinking | default(true) %}think {% endif %}{% for m in messages %}{{ m['content'] }}{% endfor %}"


def test_arguments_of_the_chat_template_are_in_the_prompts_of_the_run_and_its_exports(tmp_path: Path) -> None:
    run = Run(tmp_path, THINKS, {"enable_thinking": False})
    templates = templates_of_run(run.folder, run.tokenizer, run.config.verdicts)
    assert templates.tokenizer.decode(list(templates.prompt("reply", question="x").ids)) == "x"
    exported = run.export(tmp_path / "exported")
    said: Any = type(run.tokenizer).from_pretrained(exported)
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    assert "think" not in said.apply_chat_template(messages, tokenize=False)
    assert "sets `enable_thinking` to `false` unless" in (exported / "README.md").read_text()


def test_a_note_names_an_argument_that_the_chat_template_does_not_read(tmp_path: Path) -> None:
    run = Run(tmp_path, THINKS, {"enable_thinking": False, "thinking": False})
    notes = io.StringIO()
    store = RunStore(run.folder)
    context = Context(run.config, store, Terminal(console=Console(file=notes, width=200)))
    assert context.templates.uses_chat
    store.close()
    assert "chat.arguments: the model's chat template does not read thinking\n" in notes.getvalue()


def test_arguments_are_set_once_in_a_chat_template_of_the_folder(tmp_path: Path) -> None:
    run = Run(tmp_path, None, {"enable_thinking": False}, own=THINKS)
    stored = template_texts(run.folder / "templates")
    assert stored["chat_template.jinja"].count("enable_thinking is not defined") == 1
    run.keep()  # as a resumed run does first
    assert template_texts(run.folder / "templates") == stored
    store = RunStore(run.folder)
    assert not has_lost_chat_template(store)
    store.close()


# -- the system prompt --------------------------------------------------------------------------------------------------


def test_the_system_prompt_is_in_the_replies_of_the_run_and_of_an_exported_policy(tmp_path: Path) -> None:
    run = Run(tmp_path, ROLES, system="Be brief.")
    run.keep()  # as a resumed run does first
    templates = templates_of_run(run.folder, run.tokenizer, run.config.verdicts)
    asked = "system: Be brief.\nuser: x\n"
    assert templates.tokenizer.decode(list(templates.prompt("reply", question="x").ids)) == asked
    samples = [("Why?", "So.", ""), ("Who?", "Me.", "")]
    said: Any = policy_tokenizer(templates, run.tokenizer, (tiny_models.EOS,), samples, keep_own=True)
    assert said.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False, add_generation_prompt=True) == asked
