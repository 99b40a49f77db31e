"""Chat tokenizers for tests: a byte-level tokenizer with the control tokens and the chat templates of common kinds."""

from __future__ import annotations

from datetime import date
from pathlib import Path

from transformers import PreTrainedTokenizerFast

import selfeval.judging
import tiny_models
from selfeval.judging.templates import Templates

__all__ = ["CHATML", "CONTROL", "DAY", "LATER_CHANGES", "MARKED", "chat_tokenizer", "templates"]

CONTROL = ("<pad>", "<eos>", "<|im_start|>", "<|im_end|>")
DAY = date(2026, 1, 31)

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LATER_CHANGES = CHATML.replace(
    "{{ message['content'] }}",
    "{{ message['content'] }}{% if loop.last and message['role'] == 'assistant' %} (last){% endif %}",
)
"""Renders a turn differently when another one follows, as templates do that drop earlier reasoning."""


def chat_tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    """Return a tokenizer with a chat template; None: a base model without one."""
    tokenizer = tiny_models.words_tokenizer(CONTROL)
    tokenizer.add_special_tokens({"additional_special_tokens": list(CONTROL[2:])})
    tokenizer.chat_template = template
    return tokenizer


def templates(template: str | None) -> Templates:
    """Return the package's templates for such a tokenizer."""
    return Templates.load(Path(selfeval.judging.__file__).parent / "templates", chat_tokenizer(template), DAY)
