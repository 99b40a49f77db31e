"""Prompt templates: jinja files of the model's folder, or the package's own if the model has none.

`Templates.load` makes all checks: it renders every template on sample values, so a mistake in any of them is found before
the first stage rather than after a training. It needs a tokenizer but no model.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import DictLoader, Environment, TemplateError, TemplateRuntimeError, meta
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from transformers import PreTrainedTokenizerBase

from selfeval.backbone.tokens import ControlTokens
from selfeval.config import RUBRIC, TemplateKind
from selfeval.errors import ModelError
from selfeval.judging.chat import (
    CHAT_TEMPLATE,
    freeze_date,
    ignored_arguments,
    messages,
    reason,
    refuse_chance,
    settled,
    uses_parts,
    with_system,
)
from selfeval.judging.hostile import refuse_leak
from selfeval.judging.kinds import kinds_of_run, template_kinds
from selfeval.judging.labels import Labels, in_order, verdict_tokens
from selfeval.judging.reading import MARKERS, thinking_of
from selfeval.judging.rubric import Rubric, parse_rubric, with_rubric
from selfeval.judging.sandbox import PromptEnvironment
from selfeval.judging.turns import ROLES, Turn, turn_functions, turns_of, without_marks
from selfeval.judging.typed import TypedReplies
from selfeval.links import entries, refuse_links
from selfeval.prompt import GradePrompt, Prompt
from selfeval.quality.written_questions import bare_question
from selfeval.records import Message, Question
from selfeval.rollout.thinking import ThinkingTokens

__all__ = [
    "SETTINGS",
    "Settings",
    "Templates",
    "check_complete",
    "read_settings",
    "template_texts",
    "templates_folder",
]

SETTINGS = "templates.toml"

_OWN = Path(__file__).parent / "templates"
_CONTROL = re.compile(r"<\|\w+\|>")
_TURN = re.compile(r"<\|end\|><\|start\|>assistant(?:<\|channel\|>\w+)?")
"""Between two messages of harmony: the model writes its thinking and the reply as separate messages."""
_PROMPT_TAIL = 16
"""Number of last tokens of a prompt searched for an opening marker of reasoning."""
_OTHER_TEXT = "Something else entirely"
_OTHER: dict[str, Any] = {"examples": [], "grades": [_OTHER_TEXT]}
"""Values that differ from every sample."""


class Settings(BaseModel):
    """The values of templates.toml; all others are tables of verdict labels, by the kind of template that they belong to."""

    model_config = ConfigDict(frozen=True, extra="allow")
    __pydantic_extra__: dict[str, Labels]

    ask_stop: tuple[str, ...] = ()
    grade_reference_answer: bool = False

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, values: dict[str, Any]) -> dict[str, Any]:
        labelled = {kind.name: kind.labels for kind in template_kinds().values() if kind.labels}
        allowed = [*cls.model_fields, *labelled]
        if unknown := sorted(values.keys() - allowed):
            raise ValueError(f"unknown key {', '.join(unknown)}; allowed: {', '.join(allowed)}")
        return {name: in_order(name, value, labelled[name]) if name in labelled else value for name, value in values.items()}

    @property
    def labels(self) -> Mapping[str, Labels]:
        """The verdict labels by kind of template."""
        return self.__pydantic_extra__


def templates_folder(model: str, chosen: str = "") -> Path:
    """Return the folder of templates: the configured one, else the model's own if it has one, else the package's.

    Raises:
        ModelError: the configured folder is not a folder of templates.
    """
    if chosen:
        if not (Path(chosen) / "templates.toml").is_file():
            raise ModelError(
                f"templates folder {chosen} has no templates.toml; use a folder that contains it and the templates "
                f"{', '.join(kinds_of_run())} (.jinja)"
            )
        return Path(chosen)
    own = Path(model) / "templates"
    refuse_links(Path(model), [own], ModelError)
    return own if (own / "templates.toml").is_file() else _OWN


@dataclass(frozen=True)
class Templates:
    """Renders prompts and tokenizes them.

    Attributes:
        tokenizer: tokenizer with the chat template that is used.
        parts: whether the chat template expects message content as a list of parts.
        folder: folder of the templates, for messages.
        rubric: Optional. The rubric, if a kind that was loaded reads it.
    """

    tokenizer: PreTrainedTokenizerBase
    environment: PromptEnvironment
    settings: Settings
    parts: bool = False
    folder: Path = _OWN
    rubric: Rubric | None = None

    @classmethod
    def load(
        cls,
        folder: Path,
        tokenizer: PreTrainedTokenizerBase,
        day: date | None = None,
        texts: Mapping[str, str] | None = None,
        kinds: Collection[str] | None = None,
        arguments: Mapping[str, Any] | None = None,
        system: str = "",
        rubric: str = "",
    ) -> Templates:
        """Read a folder of templates and render each on sample values.

        Args:
            folder: folder with `templates.toml` and a template of every kind that is read; a `chat_template.jinja` in it
                replaces the tokenizer's.
            tokenizer: tokenizer of the model.
            day: Optional. Date shown by templates that print it. Default: today.
            texts: Optional. Texts of the folder's files, if they were already read.
            kinds: Optional. Kinds of templates that are read; others may be missing and are not checked. Default: those of a
                run with the default judge.
            arguments: Optional. Arguments of the chat template (`chat.arguments`). Default: none.
            system: Optional. System prompt of replies (`chat.system`). Default: none.
            rubric: Optional. The user's file of a rubric (`verdicts.pointwise.rubric`). Default: that of the folder.

        Raises:
            ConfigError: the file of the rubric cannot be used.
            ModelError: a file is missing, malformed, or cannot be rendered; a template does not show one of its texts.
        """
        day, texts = day or date.today(), template_texts(folder) if texts is None else texts
        read = [template_kinds()[kind] for kind in (kinds_of_run() if kinds is None else kinds)]
        texts = with_rubric(texts, rubric)
        check_complete(folder, texts, read)
        texts = with_system(texts, system)
        settings = read_settings(folder, texts)
        # Before the templates are rendered: whether there is a chat template decides how they are.
        tokenizer = settled(tokenizer, texts.get(CHAT_TEMPLATE), day, arguments or {})
        is_chat = bool(getattr(tokenizer, "chat_template", None))
        if system and not is_chat:
            raise ModelError(
                "chat.system needs a chat template, which this model does not have; remove it, or write the text in reply.jinja"
            )
        parts = is_chat and uses_parts(tokenizer)
        graded = parse_rubric(texts[RUBRIC], rubric or folder / RUBRIC) if any(kind.rubric for kind in read) else None
        templates = cls(tokenizer, _environment(folder, texts, day), settings, parts, folder, graded)
        for kind in read:
            _check(templates, kind, folder / f"{kind.name}.jinja")
            if kind.labels or kind.rubric:
                verdict_tokens(templates, templates.labels(kind.name))
        return templates

    @property
    def uses_chat(self) -> bool:
        return bool(getattr(self.tokenizer, "chat_template", None))

    def ignored_arguments(self, arguments: Mapping[str, Any]) -> list[str]:
        """Return those of the arguments with which it was loaded that the chat template does not read."""
        any_tokenizer: Any = self.tokenizer
        return ignored_arguments(str(any_tokenizer.get_chat_template()), arguments) if arguments else []

    @cached_property
    def control(self) -> ControlTokens:
        """The tokenizer's control tokens."""
        return ControlTokens(self.tokenizer)

    def labels(self, kind: str) -> Labels:
        """Return the verdict labels of a kind of template: its table in templates.toml, or the grades of the rubric."""
        if self.rubric is not None and template_kinds()[kind].rubric:
            return self.rubric.labels
        return self.settings.labels[kind]

    def prompt(self, kind: str, **values: Any) -> Prompt:
        """Return a prompt. The tokenizer's control tokens are removed from inserted texts first.

        Args:
            kind: one of the kinds that were loaded.
            values: variables of the template, as in the sample of its kind; flags that are not given are false.
        """
        text = self._rendered(kind, values)
        if self.uses_chat:
            ids = self._in_chat(turns_of(text), tokenize=True)
        else:
            ids = self.tokenizer.encode(text, add_special_tokens=True)
            # Some tokenizers append an end token to every text, after which nothing would be continued.
            ids = ids[:-1] if len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id else ids
        return Prompt(tuple(int(i) for i in ids))

    def reply_prompt(self, question: Question) -> Prompt:
        """Return the prompt of a reply to a question: that of its text, or the turns of a conversation.

        Raises:
            TemplateRuntimeError: a conversation, but the tokenizer has no chat template (see `check_conversations`).
        """
        return self.prompt_after(question.text, question.messages)

    def prompt_after(self, text: str, messages: Sequence[Message]) -> Prompt:
        """Return the prompt of a reply to a text, or to a conversation if there are messages; see `reply_prompt`."""
        if not messages:
            return self.prompt("reply", question=text)
        if not self.uses_chat:
            raise TemplateRuntimeError("a conversation needs a chat template")
        return Prompt(tuple(int(i) for i in self._in_chat(self.turns_after(messages), tokenize=True)))

    def turns_after(self, messages: Sequence[Message]) -> list[Turn]:
        """Return the turns before a reply to a conversation: the reply prompt of its last turn, with the others before that."""
        *before, last = messages
        turns = turns_of(self._rendered("reply", {"question": last.content}))
        history = [Turn(message.role, self.clean(message.content)) for message in before]
        asked = max(i for i, turn in enumerate(turns) if turn.role == "user")
        if history and history[0].role == "system":
            return [history[0], *turns[:asked], *history[1:], *turns[asked:]]
        return [*turns[:asked], *history, *turns[asked:]]

    def _in_chat(self, turns: Sequence[Turn], *, tokenize: bool) -> Any:
        """Apply the chat template; the model continues a last turn of the assistant, else it begins one."""
        prefilled = turns[-1].role == "assistant"
        return self.tokenizer.apply_chat_template(
            messages(turns, parts=self.parts),
            add_generation_prompt=not prefilled,
            continue_final_message=prefilled,
            tokenize=tokenize,
            return_dict=False,
        )

    def loss_of_system(self, turns: Sequence[Turn]) -> str:
        """Describe how the chat template fails to show the system turn that the conversation begins with; empty if it does."""
        return self._loss(turns, turns[:1], "a system message")

    def loss_of(self, turns: Sequence[Turn]) -> str:
        """Describe how the chat template fails to show the turns of a conversation; empty if it shows all of them."""
        return self._loss(turns, turns, "a turn")

    def _loss(self, turns: Sequence[Turn], needed: Sequence[Turn], what: str) -> str:
        try:
            shown = "".join(str(self._in_chat(turns, tokenize=False)).split())
        except Exception as error:  # a template is a program: it may raise anything
            return f"refuses {what} ({reason(error)})"
        lost = any("".join(turn.text.split()) not in shown for turn in needed)
        return f"drops the text of {what}" if lost else ""

    def _rendered(self, kind: str, values: dict[str, Any]) -> str:
        """Return the text of a prompt with cleaned values, before the chat template is applied."""
        return self.render(kind, **{name: self._clean_value(value) for name, value in values.items()})

    def _clean_value(self, value: Any) -> Any:
        if isinstance(value, bool):
            return value
        return [self.clean(text) for text in value] if isinstance(value, (list, tuple)) else self.clean(value)

    def conversation(self, kind: str, **values: Any) -> list[Turn]:
        """Return a prompt as the turns of a chat, for a model elsewhere that formats them itself; see `prompt`."""
        return turns_of(self._render(kind, {name: self._clean_value(value) for name, value in values.items()}, chat=True))

    def render(self, kind: str, **values: Any) -> str:
        """Return the text of a prompt, without the chat template; a turn begins with a mark (`turns_of`).

        Raises:
            ModelError: the template raises an error or exceeds a limit (`selfeval.judging.sandbox`).
        """
        return self._render(kind, values, chat=self.uses_chat)

    def _render(self, kind: str, values: Mapping[str, Any], *, chat: bool) -> str:
        functions, flags = turn_functions(chat=chat), dict.fromkeys(template_kinds()[kind].flags, False)
        try:
            return self.environment.render(f"{kind}.jinja", chat=chat, **functions, **{**flags, **values})
        except MemoryError:
            raise
        except Exception as error:  # a template is a program: it may raise anything
            raise ModelError(f"{self.folder / kind}.jinja cannot be rendered: {reason(error)}") from error

    def clean(self, text: str) -> str:
        """Return `text` without control tokens and marks of turns, so a reply cannot pose as part of the prompt."""
        return self.control.clean(without_marks(text))

    def reply_ids(self, text: str) -> tuple[int, ...]:
        """Return the token ids of a typed reply, as a model would have sampled them (after a space in plain-text prompts)."""
        return self._typed.encode(self.clean(text))

    @cached_property
    def _typed(self) -> TypedReplies:
        text = self._rendered("reply", {"question": "Which?"})
        prompt = self.prompt("reply", question="Which?")
        if self.uses_chat:
            text = str(self._in_chat(turns_of(text), tokenize=False))
        return TypedReplies(self.tokenizer, text, prompt.ids, "" if self.uses_chat else " ")

    def text(self, ids: tuple[int, ...]) -> str:
        """Decode a reply, omitting control tokens."""
        return str(self.tokenizer.decode(self.control.without_special(ids))).strip()

    # -- thinking -------------------------------------------------------------------------------------------------------

    @cached_property
    def _markers(self) -> tuple[tuple[str, str], ...]:
        """Markers of thinking, opening and closing, that are single tokens of this tokenizer or begin with control tokens."""
        vocabulary = self.tokenizer.get_vocab()
        # Without the tokens of its format, a text such as "<|channel|>analysis" is an ordinary one.
        needed = {marker: _CONTROL.findall(marker) or [marker] for pair in MARKERS for marker in pair}
        return tuple(pair for pair in MARKERS if all(token in vocabulary for marker in pair for token in needed[marker]))

    def thinking(self, limit: int | None = None) -> ThinkingTokens | None:
        """Return how the thinking before a reply is recognised; None if the tokenizer has no tokens for it.

        Args:
            limit: Optional. Token limit of the thinking (`replies.max_thinking_tokens`). Default: that of the reply.
        """
        if not self._markers:
            return None
        opening, closing = (frozenset(self._marker_ids(pair[i]) for pair in self._markers) for i in (0, 1))
        return ThinkingTokens(opening, closing, limit)

    def _marker_ids(self, marker: str) -> int | tuple[int, ...]:
        vocabulary = self.tokenizer.get_vocab()
        if marker in vocabulary:
            return int(vocabulary[marker])
        return tuple(int(i) for i in self.tokenizer.encode(marker, add_special_tokens=False))

    def thinking_text(self, ids: tuple[int, ...]) -> str:
        """Decode a chain of thought, omitting control tokens and the markers around it."""
        # The markers are removed before the control tokens, of which some consist.
        text = self._decoded(ids).strip()
        for opening, closing in self._markers:
            text = text.removeprefix(opening).removesuffix(closing).strip()
        return " ".join(filter(None, (self.clean(part) for part in _TURN.split(text))))

    def without_thinking(self, text: str) -> str:
        """Return the part of a typed reply after its thinking; the whole reply if it has none."""
        ends = [text.rfind(closing) + len(closing) for closing in self.thinking_ends if closing in text]
        return text[max(ends) :].strip() if ends else text

    @property
    def thinking_ends(self) -> tuple[str, ...]:
        """Markers that end a chain of thought."""
        return tuple(dict.fromkeys(closing for _, closing in self._markers))

    @property
    def grades_with_reference_answer(self) -> bool:
        """Whether evaluator and critic read the model's reference answer before the reply that they score."""
        return self.settings.grade_reference_answer

    def without_reference_answer(self) -> Templates:
        """Return the templates of an evaluator that reads no reference answer."""
        return replace(self, settings=self.settings.model_copy(update={"grade_reference_answer": False}))

    def grade_prompt(self, question: str, reference_answer: str, *, alone: bool = False) -> Prompt:
        """Return the prompt that evaluators read before a reply.

        Args:
            question: the question.
            reference_answer: the model's reference answer; empty if the template shows none.
            alone: whether to add the prompt without the reference answer (`GradePrompt`). Default: False.
        """
        whole = self.prompt("grade", question=question, reference_answer=reference_answer)
        if not alone:
            return whole
        return GradePrompt(whole.ids, whole.images, self.prompt("grade", question=question, reference_answer=""))

    @property
    def _ask_stop(self) -> tuple[str, ...]:
        """Texts that end a question. In a chat only the end token does, so questions may have several lines."""
        return () if self.uses_chat else self.settings.ask_stop

    @property
    def ask_stop_ids(self) -> tuple[int, ...]:
        """Stop texts that are a single token; a question that reaches one is finished."""
        encoded = [self.tokenizer.encode(stop, add_special_tokens=False) for stop in self._ask_stop]
        return tuple(int(ids[0]) for ids in encoded if len(ids) == 1)

    def question_from(self, ids: tuple[int, ...], prompt: Prompt | None = None) -> str | None:
        """Return the generated question: the text before the first stop text, without reasoning, label and preamble.

        Args:
            ids: the sampled tokens.
            prompt: Optional. The preceding prompt, which may open the reasoning. Default: it does not.

        Returns:
            None if the reasoning did not end.
        """
        # With control tokens, because they may mark the reasoning.
        text, before = self._decoded(ids), "" if prompt is None else self._decoded(prompt.ids[-_PROMPT_TAIL:])
        begin = thinking_of(text, before).end
        if begin is None:
            return None
        text = text[begin:].lstrip()
        for stop in self._ask_stop:
            text = text.split(stop)[0]
        return bare_question(self.clean(text))

    def has_stop(self, ids: tuple[int, ...]) -> bool:
        """Return whether a stop text was reached. It need not be a single token."""
        text = self._decoded(ids).lstrip()
        return any(stop in text for stop in self._ask_stop)

    def _decoded(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False))


def template_texts(folder: Path) -> dict[str, str]:
    """Return file name -> text of all templates of a folder, its templates.toml and its rubric.

    Raises:
        ModelError: a file is not UTF-8 text, or is a link out of the folder.
    """
    refuse_links(folder, entries(folder), ModelError)  # any file of the folder can be included by a template
    paths = [path for path in sorted(folder.rglob("*.jinja")) if path.is_file()]
    paths += [folder / name for name in (SETTINGS, RUBRIC) if (folder / name).is_file()]
    return {path.relative_to(folder).as_posix(): _text(path) for path in paths}


_LARGEST_TEMPLATE = 1 << 20


def _text(path: Path) -> str:
    if path.stat().st_size > _LARGEST_TEMPLATE:
        raise ModelError(f"{path} is larger than {_LARGEST_TEMPLATE >> 20} MiB, too large for a prompt template")
    try:
        return path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ModelError(f"{path} is not UTF-8 text (byte {error.start}: {error.reason}); save it as UTF-8") from error


def read_settings(folder: Path, texts: Mapping[str, str]) -> Settings:
    """Return the settings among the texts of a folder.

    Raises:
        ModelError: there is no templates.toml, or it is malformed.
    """
    path = folder / SETTINGS
    if SETTINGS not in texts:
        raise ModelError(f"templates folder {folder} has no {SETTINGS}, which defines the stop texts and the verdict labels")
    try:
        return Settings.model_validate(tomllib.loads(texts[SETTINGS]))
    except tomllib.TOMLDecodeError as error:
        raise ModelError(f"templates folder {folder}: {path} is not valid TOML: {error}") from error
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, p['loc']))}: {p['msg']}" for p in error.errors())
        raise ModelError(f"templates folder {folder}: {path}: {problems}") from error


def check_complete(folder: Path, texts: Mapping[str, str], kinds: Collection[TemplateKind]) -> None:
    """Refuse a folder that lacks a template or the verdict labels of a kind that is read.

    Args:
        folder: the folder, for the message.
        texts: texts of its files.
        kinds: the kinds that are read.

    Raises:
        ModelError: see above; the message names what is missing.
    """
    names = ", ".join(kind.name for kind in kinds)
    if missing := [name for kind in kinds for name in kind.files if name not in texts]:
        raise ModelError(
            f"templates folder {folder} lacks {', '.join(missing)}; this configuration needs {names}; add the missing ones, "
            f"for example copies from {_OWN}"
        )
    labels = read_settings(folder, texts).labels
    if unlabelled := [kind for kind in kinds if kind.labels and kind.name not in labels]:
        raise ModelError(
            f"templates folder {folder}: {folder / SETTINGS} lacks [{unlabelled[0].name}]; set the verdict labels "
            f"{', '.join(unlabelled[0].labels)}, and optionally `lead`, in that table"
        )


def _environment(folder: Path, texts: Mapping[str, str], day: date) -> PromptEnvironment:
    """Return an environment with the date of the run. A model's own templates are untrusted: they must not run code."""
    frozen = {name: freeze_date(text, day) for name, text in texts.items()}
    environment = PromptEnvironment(DictLoader(frozen))
    for name in texts:
        if name not in (SETTINGS, CHAT_TEMPLATE, RUBRIC):
            refuse_chance(texts[name], str(folder / name))
            try:
                environment.get_template(name)
            except TemplateError as error:
                raise ModelError(f"templates folder {folder}: {name}, {reason(error)}") from error
    return environment


def _check(templates: Templates, template: TemplateKind, path: Path) -> None:
    """Render a sample, then change each of its texts in turn: if the prompt stays the same, it does not show that text."""
    kind, values = template.name, dict(template.sample)
    # The run would pass an empty reference answer, so the template need not show it.
    if kind == "grade" and not templates.grades_with_reference_answer:
        values["reference_answer"] = ""
    if template.rubric and templates.rubric is not None:
        values |= templates.rubric.shown
    _refuse_unknown(templates.environment, kind, path, {*values, *template.flags, "chat", *ROLES})
    _refuse_lost_system(templates, kind, values, path)
    try:
        ids, sample = templates.prompt(kind, **values).ids, templates.render(kind, **values)
        # Empty values are left alone: the template may omit the sentence around them.
        others = {name: _OTHER.get(name, _OTHER_TEXT) for name, value in values.items() if value}
        changed = {name: templates.render(kind, **{**values, name: other}) for name, other in others.items()}
    except ModelError:
        raise
    except Exception as error:  # the chat template may raise anything
        raise ModelError(f"{path} cannot be rendered: {reason(error)}") from error
    if not ids:
        raise ModelError(f"{path} renders to an empty prompt; add the prompt text")
    if lost := [name for name, text in changed.items() if text == sample and name not in ("examples", "answers")]:
        raise ModelError(f"{path} does not use the {lost[0]}: its prompt does not depend on it; insert {{{{ {lost[0]} }}}}")
    refuse_leak(templates, kind, values, path)
    if template.flags:
        _check_flags(templates, template, values, path)


def _check_flags(templates: Templates, template: TemplateKind, values: Mapping[str, Any], path: Path) -> None:
    """Render the sample with all flags set, which may reach other parts of the template."""
    flagged = {**values, **dict.fromkeys(template.flags, True)}
    try:
        templates.prompt(template.name, **flagged)
    except ModelError:
        raise
    except Exception as error:  # the chat template may raise anything
        raise ModelError(f"{path} cannot be rendered: {reason(error)}") from error
    refuse_leak(templates, template.name, flagged, path)


def _refuse_lost_system(templates: Templates, kind: str, values: Mapping[str, Any], path: Path) -> None:
    """Refuse a system turn that the chat template does not show. Many templates have no system role: they raise or skip it."""
    try:
        turns = turns_of(templates.render(kind, **values)) if templates.uses_chat else []
    except Exception:  # reported by the caller, which renders it again
        return
    if not turns or turns[0].role != "system":
        return
    problem = templates.loss_of_system(turns)
    if problem:
        raise ModelError(
            f"the chat template of this model {problem}, and {path} begins with one; remove chat.system or, if the template "
            f"calls it, system(), or add a {CHAT_TEMPLATE} that shows system messages to the templates folder"
        )


def _refuse_unknown(environment: Environment, kind: str, path: Path, known: set[str]) -> None:
    """Refuse a name that no prompt of this kind has: it is a typo, possibly in a branch that the samples do not reach."""
    loader: Any = environment.loader
    tree = environment.parse(loader.get_source(environment, f"{kind}.jinja")[0])
    unknown = sorted(meta.find_undeclared_variables(tree) - known - set(environment.globals))
    if unknown:
        raise ModelError(
            f"{path} uses {', '.join(unknown)}, which this prompt does not provide; available: {', '.join(sorted(known))}"
        )
