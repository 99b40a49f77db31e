"""Questions that are conversations: messages from a file or a caller, as text for judge and evaluator, and as checked prompts.

Replies are sampled after the turns, formatted by the chat template. Everything else reads the conversation as text in which
each turn begins with its name, which is the `text` of the question.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from selfeval.errors import DataError, InputError, ModelError
from selfeval.records import Message, Question, Split
from selfeval.texts import safe_json, shortened

if TYPE_CHECKING:  # it imports transformers, which a check of the user's files must not wait for
    from selfeval.judging.templates import Templates

__all__ = ["AnyQuestion", "check_conversations", "conversation_text", "question_from", "questions_from", "read_messages"]

AnyQuestion = str | Sequence[Mapping[str, Any]]
"""A question as text, or as a conversation: a list of messages with "role" and "content", the last of which is the user's."""

_NAMES = {"system": "System", "user": "User", "assistant": "Assistant"}


def read_messages(value: Any) -> tuple[Message, ...]:
    """Read the turns of a conversation that a reply continues.

    Args:
        value: parsed JSON, such as `[{"role": "user", "content": "..."}]`.

    Raises:
        ValueError: it is not a list of turns, a system turn is not the first, or the last turn is not the user's.
    """
    if not isinstance(value, list) or not value:
        raise ValueError('must be a list of turns, each with "role" and "content"')
    messages = tuple(map(_message, value))
    if any(message.role == "system" for message in messages[1:]):
        raise ValueError("may have a system turn at the beginning only")
    if messages[-1].role != "user":
        raise ValueError(f"must end with a turn of the user, got {messages[-1].role}")
    return messages


def _message(value: Any) -> Message:
    role, content = (value.get("role"), value.get("content")) if isinstance(value, dict) else (None, None)
    if not isinstance(role, str) or role not in _NAMES:
        raise ValueError(f"has a turn of an unknown role; allowed: {', '.join(_NAMES)}")
    if not isinstance(content, str) or not content.strip():
        raise ValueError('has a turn with a missing or empty "content"')
    return Message(role, content.strip())


def conversation_text(messages: Sequence[Message]) -> str:
    """Return a conversation as text with named turns; a single turn is its content.

    Example:
        >>> conversation_text([Message("user", "Hi."), Message("assistant", "Hello."), Message("user", "Why?")])
        'User: Hi.\\n\\nAssistant: Hello.\\n\\nUser: Why?'
    """
    if len(messages) == 1:
        return messages[0].content
    return "\n\n".join(f"{_NAMES[message.role]}: {message.content}" for message in messages)


def question_from(asked: AnyQuestion) -> Question:
    """Return a caller's question as the question that a run would read from a file.

    Args:
        asked: text, or a conversation.

    Raises:
        InputError: the question is empty, or the conversation is malformed (see `read_messages`).

    Example:
        >>> question_from([{"role": "user", "content": "Why?"}]).text
        'Why?'
    """
    if isinstance(asked, str):
        if not asked.strip():
            raise InputError("questions must not be empty")
        return Question("", asked, Split.TEST, "file")
    try:
        messages = read_messages(list(asked))
    except ValueError as error:
        example = '[{"role": "user", "content": "..."}]'
        raise InputError(f"a conversation {error}; got {shortened(safe_json(list(asked)))}; pass {example}") from None
    # As in a file: a single turn is a question like any other, also for a model without a chat template.
    return Question("", conversation_text(messages), Split.TEST, "file", messages if len(messages) > 1 else ())


def questions_from(asked: AnyQuestion | Sequence[AnyQuestion]) -> tuple[list[Question], bool]:
    """Return one or several questions, and whether a single one was passed instead of a list.

    Raises:
        InputError: see `question_from`.
    """
    if isinstance(asked, str) or (asked and isinstance(asked[0], Mapping)):
        return [question_from(cast(AnyQuestion, asked))], True
    return [question_from(one) for one in cast(Sequence[AnyQuestion], asked)], False


def check_conversations(templates: Templates, questions: Sequence[Question]) -> None:
    """Refuse conversations that the chat template cannot format, before the first stage.

    Raises:
        DataError: the model has no chat template, or both a conversation and the reply prompt begin with a system turn.
        ModelError: the chat template refuses a conversation, or does not show one of its turns.
    """
    conversations = [question for question in questions if question.messages]
    if not conversations:
        return
    if not templates.uses_chat:
        raise DataError(
            f"{len(conversations)} questions are conversations (messages), but this model has no chat template to format their "
            "turns; add a chat_template.jinja to the templates folder, or use single questions"
        )
    for question in conversations:
        _check(templates, question)


def _check(templates: Templates, question: Question) -> None:
    turns, shown = templates.turns_after(question.messages), _shown_as(question)
    if [turn.role for turn in turns].count("system") > 1:
        raise DataError(f"{shown} begins with a system turn, and so does the prompt of replies; remove it or chat.system")
    if problem := templates.loss_of(turns):
        raise ModelError(f"the chat template of this model {problem} of a conversation: {shown}")


def _shown_as(question: Question) -> str:
    text = " ".join(question.text.split())
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
