"""Prompt templates: jinja files that lie with the model, or the package's own for a model that brings none."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import BaseModel, ConfigDict, ValidationError
from transformers import PreTrainedTokenizerBase

from selfeval.backbone.tokens import ControlTokens
from selfeval.errors import ModelError
from selfeval.judging.typed import TypedReplies

__all__ = ["KINDS", "Labels", "Templates", "template_texts", "templates_folder"]

KINDS = ("ask", "grade", "judge", "referee", "reply")
"""ask: write a question. reply: answer one. grade: what evaluator and critic read first. judge, referee: compare two."""

_OWN = Path(__file__).parent / "templates"


class Labels(BaseModel):
    """The words of a verdict."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    lead: str = ""
    first: str
    second: str
    tie: str

    @property
    def all(self) -> tuple[str, str, str]:
        return self.first, self.second, self.tie


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    ask_stop: tuple[str, ...] = ()
    grade_working: bool = False
    judge: Labels
    referee: Labels


def templates_folder(model: str, chosen: str = "") -> Path:
    """The folder of templates: the one that was chosen, else the model's own where it has one, else the package's.

    Raises:
        ModelError: the chosen folder is no folder of templates.
    """
    if chosen:
        if not (Path(chosen) / "templates.toml").is_file():
            raise ModelError(
                f"templates folder {chosen} has no templates.toml; give a folder with it and {', '.join(KINDS)} (.jinja)"
            )
        return Path(chosen)
    own = Path(model) / "templates"
    return own if (own / "templates.toml").is_file() else _OWN


@dataclass(frozen=True)
class Templates:
    """Renders prompts as token ids."""

    tokenizer: PreTrainedTokenizerBase
    environment: Environment
    settings: _Settings

    @classmethod
    def load(cls, folder: Path, tokenizer: PreTrainedTokenizerBase) -> Templates:
        """Reads a folder of templates.

        Raises:
            ModelError: a file is missing or malformed.
        """
        missing = [f"{kind}.jinja" for kind in KINDS if not (folder / f"{kind}.jinja").is_file()]
        if missing:
            raise ModelError(
                f"templates folder {folder} lacks {', '.join(missing)}; a templates folder holds all of {', '.join(KINDS)}"
            )
        try:
            settings = _Settings.model_validate(tomllib.loads((folder / "templates.toml").read_text(encoding="utf-8")))
            loader = FileSystemLoader(folder)  # a model's own templates are somebody's files: they may not run code
            environment = ImmutableSandboxedEnvironment(loader=loader, undefined=StrictUndefined, autoescape=False)
            for kind in KINDS:
                environment.get_template(f"{kind}.jinja")
        except (tomllib.TOMLDecodeError, ValidationError, TemplateError) as error:
            raise ModelError(f"templates folder {folder}: {error}") from error
        return cls(tokenizer, environment, settings)

    @property
    def uses_chat(self) -> bool:
        return bool(getattr(self.tokenizer, "chat_template", None))

    @cached_property
    def control(self) -> ControlTokens:
        """The tokenizer's control tokens."""
        return ControlTokens(self.tokenizer)

    def labels(self, kind: str) -> Labels:
        labels: Labels = getattr(self.settings, kind)
        return labels

    def prompt(self, kind: str, **values: Any) -> tuple[int, ...]:
        """Token ids of a prompt; inserted texts are cleaned of the tokenizer's control tokens first.

        Args:
            kind: one of `KINDS`.
            values: `examples` (ask), `question` (all others), `first` and `second` (judge, referee), `working` (grade).
        """
        text = self._rendered(kind, values)
        if self.uses_chat:
            message = [{"role": "user", "content": text}]
            ids = self.tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=True, return_dict=False)
        else:
            ids = self.tokenizer.encode(text, add_special_tokens=True)
            ids = ids[:-1] if len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id else ids
        return tuple(int(i) for i in ids)

    def _rendered(self, kind: str, values: dict[str, Any]) -> str:
        """A prompt's text, before the chat template is put around it."""
        clean = {k: [self.clean(x) for x in v] if isinstance(v, (list, tuple)) else self.clean(v) for k, v in values.items()}
        return self.environment.get_template(f"{kind}.jinja").render(chat=self.uses_chat, **clean)

    def clean(self, text: str) -> str:
        """`text` without control tokens, so that a reply cannot speak for the prompt."""
        return self.control.clean(text)

    def reply_ids(self, text: str) -> tuple[int, ...]:
        """Token ids of a typed reply, as a model would have sampled them (after a space in plain-text prompts)."""
        return self._typed.encode(self.clean(text))

    @cached_property
    def _typed(self) -> TypedReplies:
        text = self._rendered("reply", {"question": "Which?"})
        ids = self.prompt("reply", question="Which?")
        if self.uses_chat:
            message = [{"role": "user", "content": text}]
            text = str(self.tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False))
        return TypedReplies(self.tokenizer, text, ids, "" if self.uses_chat else " ")

    def text(self, ids: tuple[int, ...]) -> str:
        """What a reply says, control tokens left out."""
        return str(self.tokenizer.decode(self.control.without_special(ids))).strip()

    @property
    def grades_with_working(self) -> bool:
        """Whether evaluator and critic read the model's own greedy reply before the reply that they score."""
        return self.settings.grade_working

    @property
    def ask_stop_ids(self) -> tuple[int, ...]:
        """The stop texts that are one token: a question that reaches one is finished."""
        encoded = [self.tokenizer.encode(stop, add_special_tokens=False) for stop in self.settings.ask_stop]
        return tuple(int(ids[0]) for ids in encoded if len(ids) == 1)

    def question_from(self, ids: tuple[int, ...]) -> str:
        """The question that was written: its first line or whatever stands before the first stop text."""
        text = str(self.tokenizer.decode(list(ids), skip_special_tokens=False)).lstrip()
        for stop in self.settings.ask_stop:
            text = text.split(stop)[0]
        return self.clean(text)

    def has_stop(self, ids: tuple[int, ...]) -> bool:
        """Whether a stop text was reached (it need not be a token of its own)."""
        text = str(self.tokenizer.decode(list(ids), skip_special_tokens=False)).lstrip()
        return any(stop in text for stop in self.settings.ask_stop)


def template_texts(folder: Path) -> dict[str, str]:
    """File name -> text of everything in a templates folder."""
    return {p.name: p.read_text(encoding="utf-8") for p in sorted(folder.iterdir()) if p.suffix in (".jinja", ".toml")}
