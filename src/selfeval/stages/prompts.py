"""The prompt templates of a run, as written to its folder.

A model folder can change: a template is edited, or a new revision is pulled. Scores and exports of a finished run have to
use the prompts that its evaluator was trained on. Therefore RUN/templates/ holds all of them: the templates with the date of
the run in place of today's, their settings, and the chat template in use (an empty file if the tokenizer has none).
`selfeval.runs.templates` reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from selfeval.config import RunConfig
from selfeval.judging.chat import CHAT_TEMPLATE, freeze_date, with_arguments, with_system
from selfeval.judging.kinds import kinds_of_run
from selfeval.judging.rubric import with_rubric
from selfeval.judging.templates import Templates, template_texts, templates_folder
from selfeval.runs.templates import TEMPLATES, stored_texts, text_hash, write_texts
from selfeval.store import RunStore, writing

__all__ = ["has_lost_chat_template", "keep_templates", "load_templates"]


def keep_templates(config: RunConfig, store: RunStore, day: date) -> None:
    """Copy the templates into the run folder if they differ, and record the date and their hashes in run.json.

    An existing chat template is kept: `load_templates` writes it, because that needs a tokenizer.

    Args:
        config: configuration of the run.
        store: folder of round 1, for any round.
        day: date that templates print.
    """
    # The date is replaced by the run's before the comparison: a template that prints it would differ every day.
    wanted, stored = _sources(config, day), stored_texts(store.root)
    if CHAT_TEMPLATE in stored:
        wanted.setdefault(CHAT_TEMPLATE, stored[CHAT_TEMPLATE])
    if wanted != stored:
        _write(store.root, wanted)
    hashes = {name: text_hash(text) for name, text in wanted.items()}
    # The recorded hash stays even if the file is gone, so `has_lost_chat_template` can notice that.
    known = (store.run.get(TEMPLATES) or {}).get(CHAT_TEMPLATE)
    _note(store, day, hashes if known is None else {**hashes, CHAT_TEMPLATE: known})


def has_lost_chat_template(store: RunStore) -> bool:
    """Return whether the chat template that the run used is missing from its folder or has changed."""
    known, text = (store.run.get(TEMPLATES) or {}).get(CHAT_TEMPLATE), stored_texts(store.root).get(CHAT_TEMPLATE)
    return known is not None and (text is None or text_hash(text) != known)


def load_templates(config: RunConfig, store: RunStore, tokenizer: PreTrainedTokenizerBase, day: date) -> Templates:
    """Load and check the templates of a run in progress, and write the chat template in use to the run folder.

    Raises:
        ModelError: see `Templates.load`.
    """
    # `selfeval tune` begins without `start_round`, which writes them in a run.
    if not (store.root / TEMPLATES).is_dir():
        keep_templates(config, store, day)
    source = templates_folder(config.model, config.templates)
    texts = {name: text for name, text in stored_texts(store.root).items() if name != CHAT_TEMPLATE}
    # From the source, not from the run folder: there, the tokenizer's own chat template is stored under this name as well.
    chat = template_texts(source).get(CHAT_TEMPLATE)
    given = texts if chat is None else {**texts, CHAT_TEMPLATE: chat}
    templates = Templates.load(
        source, tokenizer, day, given, kinds_of_run(config.verdicts), config.chat.arguments, config.chat.system
    )
    used: Any = templates.tokenizer
    whole = {**texts, CHAT_TEMPLATE: used.get_chat_template() if templates.uses_chat else ""}
    if whole != stored_texts(store.root):
        _write(store.root, whole)
    _note(store, day, {name: text_hash(text) for name, text in whole.items()})
    return templates


def _sources(config: RunConfig, day: date) -> dict[str, str]:
    source = template_texts(templates_folder(config.model, config.templates))
    texts = with_system(with_rubric(source, config.verdicts.rubric), config.chat.system)
    frozen = {name: freeze_date(text, day, trims=name == CHAT_TEMPLATE) for name, text in texts.items()}
    if CHAT_TEMPLATE in frozen:
        frozen[CHAT_TEMPLATE] = with_arguments(frozen[CHAT_TEMPLATE], config.chat.arguments)
    return frozen


def _write(root: Path, texts: Mapping[str, str]) -> None:
    with writing(root / TEMPLATES) as part:
        write_texts(texts, part)


def _note(store: RunStore, day: date, hashes: Mapping[str, str]) -> None:
    values = {"date": day.isoformat(), TEMPLATES: dict(sorted(hashes.items()))}
    if any(store.run.get(name) != value for name, value in values.items()):
        store.update_run(**values)
