"""The run's prompts as chat templates, for tools that build token ids from messages.

A classifier is usually called with `tokenizer.apply_chat_template([{user}, {assistant}])`. With a model's own chat template
this differs from what the evaluator was trained on: the `grade` template is missing, and often text follows the end token, so
the head is read at the wrong position. A policy on a base without a chat template is usually called with the bare question,
which is not the prompt that it was trained on either.

The templates built here produce exactly the run's token ids. They are tested on samples, including hostile ones; if a
tokenizer cannot reproduce the ids, there is no template.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from selfeval.judging.chat import jinja_string
from selfeval.judging.hostile import hostile_texts
from selfeval.judging.templates import Templates
from selfeval.judging.turns import MARKS, ROLES

__all__ = ["dialogue_tokenizer", "evaluator_ids", "hostile", "policy_tokenizer"]

Sample = tuple[str, str, str]
"""A question, a reply to it, and the base's reference answer."""


def evaluator_ids(templates: Templates, sample: Sample, end: Sequence[int]) -> tuple[int, ...]:
    """Return the evaluator's input: the `grade` prompt, the reply without its reasoning, and the end-of-sequence token."""
    question, reply, reference_answer = sample
    # An evaluator may read none although the template shows one.
    shown = reference_answer if templates.grades_with_reference_answer else ""
    return (
        *templates.grade_prompt(question, shown).ids,
        *templates.reply_ids(templates.without_thinking(reply)),
        *end,
    )


def hostile(templates: Templates) -> list[Sample]:
    """Return questions, replies and reference answers that contain control tokens."""
    texts = hostile_texts(templates.control.texts)
    return [(text, texts[-1 - i], text) for i, text in enumerate(texts)]


def dialogue_tokenizer(
    templates: Templates, tokenizer: PreTrainedTokenizerBase, end: Sequence[int], samples: Sequence[Sample]
) -> PreTrainedTokenizerBase | None:
    """Return a copy of `tokenizer` whose chat template produces the evaluator's ids from [user, assistant].

    If the grade prompt shows a reference answer, pass it as `apply_chat_template(..., reference_answer=...)`.

    Args:
        templates: the run's templates, with the tokenizer it used.
        tokenizer: the tokenizer to export.
        end: the end-of-sequence token, or empty.
        samples: texts on which its ids have to equal the evaluator's.

    Returns:
        None if no such template produces equal ids, on these and on texts that contain control tokens.
    """

    def equal(candidate: Any) -> bool:
        tried = (*samples, *hostile(templates))
        return all(_dialogue_ids(candidate, sample) == evaluator_ids(templates, sample, end) for sample in tried)

    return _first(tokenizer, _evaluator_templates(templates, _tokens(tokenizer, end)), equal)


def policy_tokenizer(
    templates: Templates,
    tokenizer: PreTrainedTokenizerBase,
    end: Sequence[int],
    samples: Sequence[Sample],
    *,
    keep_own: bool = True,
) -> PreTrainedTokenizerBase | None:
    """Return a copy of `tokenizer` whose chat template produces the run's `reply` prompt from a user message.

    A base with a chat template keeps it if the reply prompt is the bare question, so system messages and tools still work. Such
    a template does not remove control tokens from texts.

    Args:
        templates: the run's templates, with the tokenizer it used.
        tokenizer: the tokenizer to export.
        end: the end-of-sequence token, or empty.
        samples: texts on which its ids have to equal the run's; reference answers are not used.
        keep_own: keep the base's own template if it produces the ids of texts without control tokens. Default: True.

    Returns:
        None if no such template produces equal ids, on these and on texts that contain control tokens.
    """

    def equal(candidate: Any) -> bool:
        return all(_answers_alike(templates, candidate, sample, end) for sample in (*samples, *hostile(templates)))

    if keep_own and templates.uses_chat and all(_asks_alike(templates, tokenizer, sample[0]) for sample in samples):
        return copy.deepcopy(tokenizer)
    return _first(tokenizer, _policy_templates(templates, _tokens(tokenizer, end)), equal)


def _first(tokenizer: Any, sources: Iterator[str], equal: Callable[[Any], bool]) -> PreTrainedTokenizerBase | None:
    for source in sources:
        candidate = copy.deepcopy(tokenizer)
        candidate.chat_template = source
        if equal(candidate):
            found: PreTrainedTokenizerBase = candidate
            return found
    return None


def _tokens(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    return [str(token) for token in tokenizer.convert_ids_to_tokens(list(ids))]


_BEGINNINGS = ("", "{{- bos_token -}}", "{{- bos_token + ' ' -}}")
"""Possible beginnings of a plain-text prompt.

The last one is for tokenizers that put a space before a text, but not after a token.
"""


# -- token ids ----------------------------------------------------------------------------------------------------------


def _dialogue_ids(tokenizer: Any, sample: Sample) -> tuple[int, ...] | None:
    question, reply, reference_answer = sample
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    return _ids(tokenizer, messages, reference_answer=reference_answer)


def _asks_alike(templates: Templates, tokenizer: Any, question: str) -> bool:
    asked = _ids(tokenizer, [{"role": "user", "content": question}], add_generation_prompt=True)
    return asked == templates.prompt("reply", question=question).ids


def _answers_alike(templates: Templates, tokenizer: Any, sample: Sample, end: Sequence[int]) -> bool:
    """Return whether prompts, and prompts with a reply, equal the run's.

    A base's own chat template decides what follows a reply.
    """
    question, reply, _ = sample
    if templates.uses_chat or not _asks_alike(templates, tokenizer, question):
        return _asks_alike(templates, tokenizer, question)
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    return _ids(tokenizer, messages) == (*templates.prompt("reply", question=question).ids, *templates.reply_ids(reply), *end)


def _ids(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> tuple[int, ...] | None:
    """Return the ids of a conversation as tools compute them; None if the template cannot render it or the two ways differ."""
    try:
        ids = tuple(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options))
        text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except (TemplateError, TypeError):  # the template needs a filter or another file, which chat templates cannot have
        return None
    return ids if tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) == ids else None


# -- template sources ---------------------------------------------------------------------------------------------------


def _evaluator_templates(templates: Templates, end: Sequence[str]) -> Iterator[str]:
    """Yield the grade prompt, in the model's own chat template if it has one, followed by the reply and the end token."""
    chat = templates.uses_chat
    start = [
        _CHECK,
        _cleaning(templates),
        _turn_macros(),
        _NEEDS_REFERENCE_ANSWER if templates.grades_with_reference_answer else "{%- set reference_answer = '' -%}",
        "{%- set question = cleaned(messages[0]['content']) -%}",
        *_without_thinking(templates),
        "{%- set reply = cleaned(said) -%}",
        f"{{%- set chat = {str(chat).lower()} -%}}",
        f"{{%- set graded +%}}{_untrimmed(_source(templates, 'grade'))}{{%+ endset -%}}",
    ]
    if chat:
        asked = f"{{%- set asked = namespace(messages=[]) -%}}{_add_turns(templates, 'graded', 'asked')}"
        messages = f"{asked}{{%- set messages = asked.messages -%}}{{%- set add_generation_prompt = true -%}}"
        middles = [f"{messages}{_own_template(templates)}{{{{ reply }}}}"]
    else:
        middles = [f"{begin}{{{{ graded }}}}{{{{ ' ' + reply }}}}" for begin in _BEGINNINGS]
    for middle in middles:
        yield "".join([*start, middle, *(_literal(token) for token in end)])


def _without_thinking(templates: Templates) -> Iterator[str]:
    """Yield statements that set `said` to the reply without its reasoning, as `Templates.without_thinking` returns it.

    They precede the cleaning, which removes markers that are control tokens.
    """
    yield (
        "{%- set said = messages[1]['content'] -%}"
        "{%- if said is not string -%}{%- set said = said | map(attribute='text') | join -%}{%- endif -%}"
    )
    # Split at each marker in turn: what is left follows the last marker of any kind.
    for end in map(jinja_string, templates.thinking_ends):
        yield f"{{%- if {end} in said -%}}{{%- set said = said.split({end})[-1].strip() -%}}{{%- endif -%}}"


def _policy_templates(templates: Templates, end: Sequence[str]) -> Iterator[str]:
    """Yield templates that render every user message as the `reply` prompt.

    They use the model's own chat template if it has one, else the prompts are concatenated.
    """
    source = f"{{%- set prompt +%}}{_untrimmed(_source(templates, 'reply'))}{{%+ endset -%}}"
    asked = f"{{%- set question = cleaned(message['content']) -%}}{source}"
    if templates.uses_chat:
        turns = _add_turns(templates, "prompt", "rewritten")
        yield "".join([_cleaning(templates), _turn_macros(), _rewritten(asked, turns), _own_template(templates)])
        return
    for begin in _BEGINNINGS:
        yield "".join(
            [
                _cleaning(templates),
                "{%- set chat = false -%}{%- for message in messages -%}{%- if message['role'] == 'user' -%}",
                asked,
                f"{{%- if loop.first -%}}{begin}{{%- endif -%}}",
                "{{- prompt -}}{%- elif message['role'] == 'assistant' -%}{{- ' ' + cleaned(message['content']) -}}",
                *(f"{{{{- {jinja_string(token)} -}}}}" for token in end),
                "{%- else -%}",
                "{{- raise_exception('this model supports user and assistant messages only, not ' + message['role']) -}}",
                "{%- endif -%}{%- endfor -%}",
            ]
        )


def _content(templates: Templates, text: str) -> str:
    """Return message content in the form that the model's own template expects."""
    return f"[{{'type': 'text', 'text': {text}}}]" if templates.parts else text


def _turn_macros() -> str:
    """Return macros equivalent to `turn_functions`."""
    return "".join(f"{{%- macro {role}() -%}}{{{{ {jinja_string(role.join(MARKS))} }}}}{{%- endmacro -%}}" for role in ROLES)


def _add_turns(templates: Templates, text: str, target: str) -> str:
    """Return statements that split a rendered text into turns, as `turns_of` does, and append them to `target.messages`.

    A system turn is left out if there is a message before it, because chat templates accept one at the beginning only.
    """
    begin, end = map(jinja_string, MARKS)
    whole, part = (_content(templates, content) for content in (text, f"(turn.split({end})[1] | trim)"))
    append = f"{{%- set {target}.messages = {target}.messages + [{{'role': ROLE, 'content': CONTENT}}] -%}}"
    return (
        f"{{%- if {begin} not in {text} -%}}{append.replace('ROLE', repr('user')).replace('CONTENT', whole)}{{%- else -%}}"
        f"{{%- for turn in {text}.split({begin})[1:] -%}}"
        f"{{%- if turn.split({end})[0] != 'system' or not {target}.messages -%}}"
        f"{append.replace('ROLE', f'turn.split({end})[0]').replace('CONTENT', part)}"
        "{%- endif -%}{%- endfor -%}{%- endif -%}"
    )


def _rewritten(asked: str, turns: str) -> str:
    """Replace the user messages with prompts before the model's own template reads them.

    Args:
        asked: statements that set `prompt` from `message`.
        turns: statements that append the turns of `prompt` to `rewritten.messages`.
    """
    return (
        "{%- set chat = true -%}{%- set rewritten = namespace(messages=[]) -%}{%- for message in messages -%}"
        f"{{%- if message['role'] == 'user' -%}}{asked}{turns}"
        "{%- else -%}{%- set rewritten.messages = rewritten.messages + [message] -%}{%- endif -%}{%- endfor -%}"
        "{%- set messages = rewritten.messages -%}"
    )


def _own_template(templates: Templates) -> str:
    source: str = templates.tokenizer.get_chat_template()
    return source.removesuffix("\n")


def _cleaning(templates: Templates) -> str:
    """Return a macro equivalent to `Templates.clean`; content in parts, as some chat clients send it, is joined to its text."""
    tokens = ", ".join(jinja_string(token) for token in (*MARKS, *templates.control.texts))
    return _CLEANED.replace("TOKENS", tokens)


_CLEANED = """{%- macro cleaned(content) -%}
{%- set kept = namespace(text='', before=none) -%}
{%- if content is string -%}{%- set kept.text = content -%}
{%- else -%}{%- for part in content -%}{%- set kept.text = kept.text + part['text'] -%}{%- endfor -%}{%- endif -%}
{%- for pass in range(kept.text | length + 1) -%}{%- if kept.text != kept.before -%}{%- set kept.before = kept.text -%}
{%- for token in [TOKENS] -%}{%- set kept.text = kept.text | replace(token, ' ') -%}{%- endfor -%}
{%- endif -%}{%- endfor -%}
{{- kept.text | trim -}}
{%- endmacro -%}
"""

_CHECK = """{%- if messages | length != 2 or messages[0]['role'] != 'user' or messages[1]['role'] != 'assistant' -%}
{{- raise_exception('this evaluator scores one reply: pass one user message (the question) and one assistant message') -}}
{%- endif -%}
"""

_NEEDS_REFERENCE_ANSWER = """{%- if reference_answer is not defined -%}
{{- raise_exception('this evaluator also needs the greedy reply of its base to the question: use reward.py in its folder, which generates it, or pass it as reference_answer=...') -}}
{%- endif -%}
{%- set reference_answer = cleaned(reference_answer) -%}
"""  # noqa: E501


def _literal(token: str) -> str:
    return f"{{{{ {jinja_string(token)} }}}}"


def _source(templates: Templates, kind: str) -> str:
    loader: Any = templates.environment.loader
    source: str = loader.get_source(templates.environment, f"{kind}.jinja")[0]
    return source.removesuffix("\n")


def _untrimmed(source: str) -> str:
    """Disable trimming in every tag, because chat templates are rendered with trimmed blocks and ours are not."""
    return re.sub(r"(?<!-)%}", "+%}", re.sub(r"{%(?![-+])", "{%+", source))
