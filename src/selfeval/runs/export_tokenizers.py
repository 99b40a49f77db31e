"""The tokenizers of an exported folder: their chat templates produce the prompts that the role was trained on."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfeval.backbone.merging import classifier_class, padding_tokenizer
from selfeval.backbone.roles import Backbone
from selfeval.judging.dialogue import dialogue_tokenizer, policy_tokenizer
from selfeval.judging.templates import Templates

__all__ = ["Tokenizers", "pick_tokenizers"]

_MESSAGES = (
    ("Tom has 3 pens.\nHe buys 2 more. How many pens has he now?", "3 + 2 = 5\n\nThe answer is 5.", "He has 5 pens."),
    ("Wie heißt „Straße“ auf Französisch? 😀", "« rue »", "rue"),
)
"""Questions, replies and reference answers with special characters, for which a chat template must reproduce the run's ids."""

_MARK = "QuestionOfThisPrompt"


@dataclass(frozen=True)
class Tokenizers:
    """The tokenizers that are saved with a role.

    Attributes:
        main: the folder's main tokenizer.
        asking: Optional. Asks the base for the reference answer that the evaluator reads; None if it reads none.
        dialogue: whether the chat template of `main` is the evaluator's prompt.
        chat_template: whether `main` has a chat template that produces the prompt of the role.
        around_question: text before and after the question in the policy's prompt; None if it is not known.
        own: whether `main` is a class that transformers does not have: `family_tokenizer` loads it, `AutoTokenizer` cannot.
    """

    main: Any
    asking: Any
    dialogue: bool
    chat_template: bool
    around_question: tuple[str, str] | None = None
    own: bool = False

    def save(self, folder: Path) -> None:
        """Write the tokenizers to an exported folder."""
        self.main.save_pretrained(folder)
        if self.asking is not None:
            self.asking.save_pretrained(folder / "reference")


def pick_tokenizers(backbone: Backbone, role: str, templates: Templates, *, dialogue: bool = True) -> Tokenizers:
    """Return the tokenizers of a role; for a classifier, the padding token differs from the end token.

    Args:
        backbone: model of the role.
        role: name of the role.
        templates: the templates that it was trained with.
        dialogue: whether other tools than this package can score with the exported folder, so an evaluator needs a chat
            template that builds its prompt. Default: True.
    """
    own = type(backbone.loaded.tokenizer).__module__.startswith("selfeval.")
    end, scores = backbone.loaded.eos_ids[:1], role in backbone.roles.heads
    tokenizer = _as_in_the_run(copy.copy(backbone.loaded.tokenizer), backbone, None if own else templates)
    if own:  # transformers can load neither it nor its template
        return Tokenizers(tokenizer, None, dialogue=False, chat_template=templates.uses_chat, own=True)
    # A policy keeps the base's template if possible, for tools; an evaluator's base has to ask exactly as in the run.
    asking = policy_tokenizer(templates, tokenizer, end, _MESSAGES, keep_own=not scores)
    around = None if asking is None else _around_question(asking)
    if not scores:
        return Tokenizers(asking or tokenizer, None, dialogue=False, chat_template=asking is not None, around_question=around)
    # transformers finds the last token of a sequence by its padding token, which must then differ from the end token.
    if classifier_class(backbone.model.config) is not None or tokenizer.pad_token is None:
        tokenizer = _as_in_the_run(padding_tokenizer(backbone.loaded), backbone, templates)
    found = dialogue_tokenizer(templates, tokenizer, end, _MESSAGES) if dialogue else None
    if found is None or (templates.grades_with_reference_answer and asking is None):
        return Tokenizers(tokenizer, None, dialogue=False, chat_template=False)
    needed = asking if templates.grades_with_reference_answer else None
    return Tokenizers(found, needed, dialogue=True, chat_template=True, around_question=around)


def _as_in_the_run(tokenizer: Any, backbone: Backbone, templates: Templates | None) -> Any:
    """Set the chat template of the run, which the base may have changed since, and the length of an extended context."""
    if templates is not None:
        tokenizer.chat_template = templates.tokenizer.chat_template
    if backbone.loaded.stretch:  # tools truncate texts at this length
        tokenizer.model_max_length = max(tokenizer.model_max_length, backbone.loaded.stretch.reach)
    return tokenizer


def _around_question(tokenizer: Any) -> tuple[str, str] | None:
    """Return the text before and after the question in the policy's prompt; None if it does not occur exactly once."""
    asked = [{"role": "user", "content": _MARK}]
    text = str(tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False))
    before, found, after = text.partition(_MARK)
    # A template that repeats the question would make the cut ambiguous.
    return (before, after) if found and _MARK not in after else None
