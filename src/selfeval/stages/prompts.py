"""The prompt templates of a run: copied into its folder when it begins, and read from there from then on.

A model folder changes: somebody edits a template or pulls a new revision. Scores and exports of a finished run have to come
from the prompts that its evaluator was trained on, so RUN/templates/ holds them all: the templates with the date of the run in
place of today's, their settings, and the chat template in use (an empty file where the tokenizer has none).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from selfeval.config import RunConfig
from selfeval.errors import RunFolderError
from selfeval.judging.chat import CHAT_TEMPLATE, freeze_date
from selfeval.judging.templates import Templates, template_texts, templates_folder
from selfeval.links import refuse_links
from selfeval.store import RunStore, read_run, writing

__all__ = [
    "TEMPLATES",
    "copy_templates",
    "day_of",
    "has_lost_chat_template",
    "keep_templates",
    "load_templates",
    "templates_of_run",
]

TEMPLATES = "templates"


def day_of(run: Mapping[str, Any]) -> date:
    """The day that templates print: that on which the run began; today before it has.

    Args:
        run: the content of run.json.

    Raises:
        RunFolderError: it holds no date.
    """
    found = run.get("date")
    try:
        return date.today() if found is None else date.fromisoformat(found)
    except (TypeError, ValueError) as error:
        raise RunFolderError(f'run.json has the date {found!r}; write the day of the run as "2026-01-31"') from error


def keep_templates(config: RunConfig, store: RunStore, day: date) -> None:
    """Copies the templates into the run folder, unless the same are there, and notes the date and their hashes in run.json.

    The chat template there is kept: `load_templates` writes it, because it takes a tokenizer.

    Args:
        config: of the run.
        store: of round 1, whatever the round.
        day: that templates print.
    """
    wanted, stored = _sources(config, day), _stored(store.root)
    if CHAT_TEMPLATE in stored:
        wanted.setdefault(CHAT_TEMPLATE, stored[CHAT_TEMPLATE])
    if wanted != stored:
        _write(store.root, wanted)
    hashes = {name: _hash(text) for name, text in wanted.items()}
    known = (store.run.get(TEMPLATES) or {}).get(CHAT_TEMPLATE)
    _note(store, day, hashes if known is None else {**hashes, CHAT_TEMPLATE: known})


def has_lost_chat_template(store: RunStore) -> bool:
    """Whether the chat template that the run used is not in its folder any more as it was."""
    known, text = (store.run.get(TEMPLATES) or {}).get(CHAT_TEMPLATE), _stored(store.root).get(CHAT_TEMPLATE)
    return known is not None and (text is None or _hash(text) != known)


def load_templates(config: RunConfig, store: RunStore, tokenizer: PreTrainedTokenizerBase, day: date) -> Templates:
    """The templates of a run that is at work, checked; the chat template in use is written to the run folder.

    Raises:
        ModelError: see `Templates.load`.
    """
    if not (store.root / TEMPLATES).is_dir():
        keep_templates(config, store, day)
    source = templates_folder(config.model, config.templates)
    texts = {name: text for name, text in _stored(store.root).items() if name != CHAT_TEMPLATE}
    chat = template_texts(source).get(CHAT_TEMPLATE)
    templates = Templates.load(source, tokenizer, day, texts if chat is None else {**texts, CHAT_TEMPLATE: chat})
    used: Any = templates.tokenizer
    whole = {**texts, CHAT_TEMPLATE: used.get_chat_template() if templates.uses_chat else ""}
    if whole != _stored(store.root):
        _write(store.root, whole)
    _note(store, day, {name: _hash(text) for name, text in whole.items()})
    return templates


def templates_of_run(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Templates:
    """The templates that a run used, whatever its model folder holds now.

    Args:
        folder: of the run or of one of its rounds.
        tokenizer: of its model.

    Raises:
        RunFolderError: they are not there, or not as the run wrote them.
    """
    root = _root(folder)
    refuse_links(root, [root / TEMPLATES], RunFolderError)
    run = read_run(root)
    known, texts = run.get(TEMPLATES) or {}, _stored(root)
    remedy = "give the run's own command again (`selfeval run`), which copies them there"
    if not known or not texts:
        raise RunFolderError(f"{root / TEMPLATES} does not hold the prompt templates that the run used; {remedy}")
    changed = sorted(name for name in {*known, *texts} if name not in texts or known.get(name) != _hash(texts[name]))
    if changed:
        raise RunFolderError(f"{root / TEMPLATES / changed[0]} is not what the run used; put it back, or {remedy}")
    return Templates.load(root / TEMPLATES, tokenizer, day_of(run), texts)


def copy_templates(folder: Path, target: Path) -> None:
    """Copies the templates that a run used, for an export to bring along; `templates_of_run` has checked them."""
    _write_texts(_stored(_root(folder)), target)


def _root(folder: Path) -> Path:
    """The folder of the run that a round is in.

    Raises:
        RunFolderError: the folder is a round that was copied without its run.
    """
    number = read_run(folder).get("round", 1)
    if number == 1:
        return folder
    whole = folder.resolve()
    if whole.parent.name != "rounds" or not (whole.parents[1] / "run.json").is_file():
        raise RunFolderError(
            f"{folder} is round {number} of a run, and the run that holds the prompt templates is not around it; copy the "
            f"whole run folder and give RUN/rounds/{number:02d}"
        )
    return whole.parents[1]


def _sources(config: RunConfig, day: date) -> dict[str, str]:
    texts = template_texts(templates_folder(config.model, config.templates))
    return {name: freeze_date(text, day, trims=name == CHAT_TEMPLATE) for name, text in texts.items()}


def _stored(root: Path) -> dict[str, str]:
    return template_texts(root / TEMPLATES) if (root / TEMPLATES).is_dir() else {}


def _write(root: Path, texts: Mapping[str, str]) -> None:
    with writing(root / TEMPLATES) as part:
        _write_texts(texts, part)


def _write_texts(texts: Mapping[str, str], target: Path) -> None:
    for name, text in texts.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text(text, encoding="utf-8", newline="")


def _note(store: RunStore, day: date, hashes: Mapping[str, str]) -> None:
    values = {"date": day.isoformat(), TEMPLATES: dict(sorted(hashes.items()))}
    if any(store.run.get(name) != value for name, value in values.items()):
        store.update_run(**values)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
