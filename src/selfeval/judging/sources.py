"""Sources of the prompts: the files and settings that a stage's output depends on."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import date
from pathlib import Path
from typing import Any

from jinja2 import Environment, TemplateError, meta

from selfeval.backbone.snapshot import model_folder
from selfeval.judging.chat import CHAT_TEMPLATE, freeze_date
from selfeval.judging.kinds import template_kinds
from selfeval.judging.rubric import with_rubric
from selfeval.judging.templates import check_complete, read_settings, template_texts

__all__ = ["fixed_text", "prompt_sources", "tokenizer_files"]


def fixed_text(folder: Path, kind: str) -> str:
    """Return the text of a template that is the same in every prompt."""
    return "\n".join(_pieces(template_texts(folder)[f"{kind}.jinja"]))


def _pieces(source: str) -> list[str]:
    # Lexed rather than rendered: the text outside of all tags is in every prompt.
    return [value for _, token, value in Environment(autoescape=False).lex(source) if token == "data"]


def prompt_sources(folder: Path, day: date, kinds: Collection[str], rubric: str = "") -> dict[str, Any]:
    """Return the sources of each kind of prompt: templates, including those that they include, and settings.

    A stage that reads prompts of one kind depends on that entry alone. The kind `chat` holds the folder's chat template.

    Args:
        folder: folder of templates.
        day: date that they print; part of the sources of those kinds that print it.
        kinds: kinds of prompts that are read.
        rubric: Optional. The user's file of a rubric. Default: that of the folder.

    Raises:
        ConfigError: the file of the rubric cannot be used.
        ModelError: the folder lacks one of them.
    """
    texts, read = with_rubric(template_texts(folder), rubric), [template_kinds()[kind] for kind in kinds]
    check_complete(folder, texts, read)
    settings = read_settings(folder, texts).model_dump(mode="json")
    frozen = {name: freeze_date(text, day) for name, text in texts.items()}
    found: dict[str, Any] = {"chat": frozen.get(CHAT_TEMPLATE)}
    for kind in read:
        # Labels are a table in templates.toml under the name of their kind.
        names = (*kind.settings, kind.name) if kind.labels else kind.settings
        further = {name: texts[name] for name in kind.files if name != f"{kind.name}.jinja"}
        found[kind.name] = [_with_included(f"{kind.name}.jinja", frozen) | further, {name: settings[name] for name in names}]
    return found


def _with_included(name: str, texts: Mapping[str, str]) -> dict[str, str]:
    """Return a template and all that it includes, extends or imports; every template if a name is only known at run time."""
    found: dict[str, str] = {}
    waiting: list[str | None] = [name]
    while waiting:
        part = waiting.pop()
        # jinja reports None for a name that is an expression.
        if part is None:
            return dict(texts)
        if part in texts and part not in found:
            found[part] = texts[part]
            waiting += _referenced(texts[part])
    return found


def _referenced(source: str) -> list[str | None]:
    try:
        return list(meta.find_referenced_templates(Environment(autoescape=False).parse(source)))
    except TemplateError:  # `Templates.load` reports it
        return []


_TOKENIZER_FILES = (
    *("tokenizer*", "vocab*", "merges*", "special_tokens_map.json", "added_tokens.json", "*.model", "*.tiktoken"),
    *("chat_template*", "additional_chat_templates/*", "tokenization_*.py"),
)


def tokenizer_files(model: str) -> list[Path]:
    """Return every file of a model that affects tokenization; empty for a hub id that is not in the cache."""
    folder = model_folder(model)
    if folder is None:
        return []
    return sorted({path for pattern in _TOKENIZER_FILES for path in folder.glob(pattern) if path.is_file()})
