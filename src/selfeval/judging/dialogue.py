"""The evaluator's prompt as a chat template, so that tools which only know [user, assistant] build it right.

A classifier is usually fed with `tokenizer.apply_chat_template([{user}, {assistant}])`. Under a model's own chat template that
is not what the evaluator was trained on: the `grade` template is missing, and often something stands behind the end token, so
that the head is read at the wrong place. The template made here gives exactly the evaluator's token ids; it is tried on
samples, and where a tokenizer cannot reproduce them there is none.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from selfeval.judging.hostile import hostile_texts
from selfeval.judging.templates import Templates

__all__ = ["dialogue_tokenizer", "evaluator_ids"]

Sample = tuple[str, str, str]
"""A question, a reply to it, and the base's own working."""


def evaluator_ids(templates: Templates, sample: Sample, end: Sequence[int]) -> tuple[int, ...]:
    """What the evaluator reads: the `grade` prompt, the reply, and the end-of-sequence token."""
    question, reply, working = sample
    return (*templates.prompt("grade", question=question, working=working), *templates.reply_ids(reply), *end)


def dialogue_tokenizer(
    templates: Templates, tokenizer: PreTrainedTokenizerBase, end: Sequence[int], samples: Sequence[Sample]
) -> PreTrainedTokenizerBase | None:
    """A copy of `tokenizer` whose chat template makes the evaluator's ids of [user, assistant].

    Where the grade prompt shows a working, it is given as `apply_chat_template(..., working=...)`.

    Args:
        templates: the run's, with the tokenizer it used.
        tokenizer: the one to be exported.
        end: the end-of-sequence token, or nothing.
        samples: texts on which its ids have to equal the evaluator's.

    Returns:
        None where no such template gives equal ids, on these and on texts that hold control tokens.
    """
    for begin in _BEGINNINGS:
        candidate: Any = copy.deepcopy(tokenizer)
        candidate.chat_template = _template(templates, candidate.convert_ids_to_tokens(list(end)), begin)
        wanted = ((sample, evaluator_ids(templates, sample, end)) for sample in (*samples, *_hostile_samples(templates)))
        if all(_dialogue_ids(candidate, sample) == ids for sample, ids in wanted):
            found: PreTrainedTokenizerBase = candidate
            return found
    return None


_BEGINNINGS = ("", "{{- bos_token -}}", "{{- bos_token + ' ' -}}")
"""What a plain-text prompt begins with: the last one for tokenizers that put a space before a text, but not behind a token."""


def _hostile_samples(templates: Templates) -> list[Sample]:
    """Questions, replies and workings that hold control tokens."""
    texts = hostile_texts(templates.control.texts)
    return [(text, texts[-1 - i], text) for i, text in enumerate(texts)]


def _dialogue_ids(tokenizer: Any, sample: Sample) -> tuple[int, ...] | None:
    question, reply, working = sample
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    try:
        return tuple(tokenizer.apply_chat_template(messages, working=working, tokenize=True, return_dict=False))
    except (TemplateError, TypeError):  # the grade template needs what chat templates do not have: a filter, another file
        return None


def _template(templates: Templates, end: Sequence[str], begin: str) -> str:
    """The grade prompt, put into the model's own chat template where it has one, then the reply and the end token."""
    chat = templates.uses_chat
    parts = [
        _CHECK,
        _CLEAN.replace("TOKENS", ", ".join(map(_literal, templates.control.texts))),
        _NEEDS_WORKING if templates.grades_with_working else "{%- set working = '' -%}",
        "{%- set question = clean(messages[0]['content']) -%}",
        "{%- set reply = clean(messages[1]['content']) -%}",
        f"{{%- set chat = {str(chat).lower()} -%}}",
        f"{{%- set graded +%}}{_untrimmed(_grade_source(templates))}{{%+ endset -%}}",
    ]
    if chat:
        content = "[{'type': 'text', 'text': graded}]" if templates.parts else "graded"
        parts += [
            f"{{%- set messages = [{{'role': 'user', 'content': {content}}}] -%}}{{%- set add_generation_prompt = true -%}}",
            templates.tokenizer.get_chat_template().removesuffix("\n"),
            "{{ reply }}",
        ]
    else:
        parts += [begin, "{{ graded }}{{ ' ' + reply }}"]
    return "".join([*parts, *(f"{{{{ {_literal(token)} }}}}" for token in end)])


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # jinja would take an escaped pair of surrogates for two characters


_CHECK = """{%- if messages | length != 2 or messages[0]['role'] != 'user' or messages[1]['role'] != 'assistant' -%}
{{- raise_exception('this evaluator scores one reply: give one user message (the question) and one assistant message') -}}
{%- endif -%}
"""

_NEEDS_WORKING = """{%- if working is not defined -%}
{{- raise_exception('this evaluator also reads the own greedy reply of its base to the question: give it as working=...') -}}
{%- endif -%}
{%- set working = clean(working) -%}
"""

_CLEAN = """{%- macro clean(text) -%}
{%- set ns = namespace(text=text, before=none) -%}
{%- for _ in range(100) -%}{%- if ns.text != ns.before -%}
{%- set ns.before = ns.text -%}
{%- for token in [TOKENS] -%}{%- set ns.text = ns.text | replace(token, ' ') -%}{%- endfor -%}
{%- endif -%}{%- endfor -%}
{{- ns.text | trim -}}
{%- endmacro -%}
"""
"""`ControlTokens.clean` for chat templates: what a reply says can then not speak for the prompt, wherever it is scored."""


def _grade_source(templates: Templates) -> str:
    loader: Any = templates.environment.loader
    source: str = loader.get_source(templates.environment, "grade.jinja")[0]
    return source.removesuffix("\n")


def _untrimmed(source: str) -> str:
    """Chat templates are rendered with trimmed blocks, ours are not: every tag says that nothing is to be trimmed."""
    return re.sub(r"(?<!-)%}", "+%}", re.sub(r"{%(?![-+])", "{%+", source))
