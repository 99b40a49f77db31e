"""Conversations to fine-tune on: JSON lines with `messages`, or with `prompt` and `completion`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any, ClassVar

from selfeval.config import RunConfig
from selfeval.errors import TextError
from selfeval.judging.conversations import Conversation, ConversationEncoder
from selfeval.judging.turns import ROLES, Turn
from selfeval.stages.context import Context
from selfeval.stages.tuning_rows import TuningRows, conversation_rows
from selfeval.stages.tuning_split import held_out_conversations
from selfeval.stages.tuning_texts import LARGEST
from selfeval.texts import Line, json_lines, read_text, shortened
from selfeval.training.documents import Document

__all__ = ["ChatFiles", "read_conversations"]

_MESSAGES = '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'
_COMPLETION = '{"prompt": "...", "completion": "..."}'
_EXAMPLE = f"{_MESSAGES} or {_COMPLETION}"
_UNREAD_LINE = ("tools", "chat_template_kwargs", "images")
_UNREAD_MESSAGE = ("tool_calls", "tool_call_id", "function_call", "reasoning_content", "thinking")
"""Fields that would change the text of the conversation, and that this package does not read."""


@dataclass(frozen=True)
class ChatFiles:
    """Files of conversations; see `read_conversations`."""

    paths: Sequence[Path]
    also_read: ClassVar[tuple[str, ...]] = ("chat",)

    @cached_property
    def _conversations(self) -> list[Conversation]:
        return read_conversations(self.paths)

    def check(self, config: RunConfig) -> None:
        """Read the files, before anything is written or loaded.

        Raises:
            TextError: see `read_conversations`.
        """
        _ = self._conversations

    def texts(self, config: RunConfig) -> list[str]:
        """Return the messages of the conversations that are trained on."""
        held = self._held_out(config)
        kept = [each for index, each in enumerate(self._conversations) if index not in held]
        return [turn.text for conversation in kept for turn in conversation.turns]

    def _held_out(self, config: RunConfig) -> dict[int, int]:
        """Return the conversations to hold out, each with the number of its group of copies.

        They do not depend on the tokenizer, which learns from the others.
        """
        asked = (takewhile(lambda turn: turn.role != "assistant", each.turns) for each in self._conversations)
        prompts = [tuple((turn.role, turn.text) for turn in turns) for turns in asked]
        texts = ["\n".join(turn.text for turn in each.turns) for each in self._conversations]
        groups = held_out_conversations(texts, prompts, config.tuning.held_out, f"{config.seed}/held out")
        return {index: number for number, group in enumerate(groups) for index in group}

    def rows(self, context: Context, length: int | None) -> TuningRows:
        """Render the conversations with the model's chat template and pack them."""
        encoder = ConversationEncoder(context.templates, context.config.chat.system)
        with context.terminal.waiting("reading the conversations"):
            encoded = [encoder.encode(conversation) for conversation in self._conversations]
        if cleaned := sum(each.cleaned for each in encoded):
            context.terminal.note(f"{cleaned:,} conversations contain control tokens of the model, which are read as spaces")
        if endless := sum(each.endless for each in encoded):
            context.terminal.note(
                f"in {endless:,} conversations the {{% generation %}} marks of the chat template leave out the end-of-turn "
                "token, so the model does not learn to end its turns; move the token in front of {% endgeneration %}"
            )
        held = self._held_out(context.config) if context.config.tuning.extend_vocabulary else None
        if held == {} and context.config.tuning.held_out:
            context.terminal.note(
                "no conversation is held out, because those that were drawn and their near-copies are too many of all; the "
                "effect of the new tokens is not measured"
            )
        documents = [Document(e.ids, e.trained, (held or {}).get(index, 0)) for index, e in enumerate(encoded)]
        return conversation_rows(context, "conversations", documents, length, held)


def read_conversations(paths: Sequence[Path]) -> list[Conversation]:
    """Read files of conversations, one JSON object per line.

    A line has `messages`, a list of objects with `role` (system, user or assistant) and `content`; or `prompt` and
    `completion`, either two texts or two lists of messages. Other fields are ignored, except those that would change the text.

    Raises:
        TextError: a file is missing, empty or not UTF-8, or a line is malformed; the message names and quotes the line.
    """
    return [conversation for path in paths for conversation in _read(path)]


def _read(path: Path) -> list[Conversation]:
    text = read_text(path, "conversations", TextError, most=LARGEST, remedy=f"write JSON lines, one {_EXAMPLE} per line")
    found = [_conversation(str(path), line) for line in json_lines(text, str(path), TextError, _EXAMPLE)]
    if not found:
        raise TextError(f"conversations {path} is empty; write JSON lines, one {_EXAMPLE} per line")
    return found


def _conversation(path: str, line: Line) -> Conversation:
    number, values = line
    where = f"{path}, line {number}"
    if unread := [name for name in _UNREAD_LINE if values.get(name)]:
        raise TextError(f'{where}: "{unread[0]}" is not supported; remove it, or the conversations that need it')
    if "messages" in values and not {"prompt", "completion"} & values.keys():
        turns = _turns(where, "messages", values["messages"])
        _check_order(where, turns)
        return Conversation(where, turns)
    if {"prompt", "completion"} <= values.keys() and "messages" not in values:
        return _completion(where, values["prompt"], values["completion"])
    shown = shortened(json.dumps(values, ensure_ascii=False))
    raise TextError(f'{where}: needs "messages", or "prompt" and "completion"; got {shown}; write one {_EXAMPLE} per line')


def _completion(where: str, prompt: Any, completion: Any) -> Conversation:
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion.strip():
            raise TextError(f'{where}: "completion" is empty; write the reply, or remove the line')
        return Conversation(where, (Turn("user", prompt), Turn("assistant", completion)), prompt=1, plain=True)
    if not (isinstance(prompt, list) and isinstance(completion, list)):
        kinds = " and ".join(type(value).__name__ for value in (prompt, completion))
        raise TextError(f'{where}: "prompt" and "completion" must be two texts or two lists of messages; got {kinds}')
    before, after = _turns(where, "prompt", prompt), _turns(where, "completion", completion)
    if before[-1].role != "user":
        raise TextError(f'{where}: "prompt" ends with a message of the {before[-1].role}; it must end with one of the user')
    if after[0].role != "assistant":
        raise TextError(f'{where}: "completion" begins with a message of the {after[0].role}; it must be one of the assistant')
    _check_order(where, (*before, *after))
    return Conversation(where, (*before, *after), prompt=len(before))


def _turns(where: str, name: str, given: Any) -> tuple[Turn, ...]:
    if not isinstance(given, list) or not given:
        raise TextError(f'{where}: "{name}" must be a list of messages; got {shortened(json.dumps(given, ensure_ascii=False))}')
    return tuple(_turn(f'{where}: message {index} of "{name}"', message) for index, message in enumerate(given, start=1))


def _turn(where: str, message: Any) -> Turn:
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        shown = shortened(json.dumps(message, ensure_ascii=False))
        raise TextError(f'{where} must be {{"role": "...", "content": "..."}}; got {shown}')
    if unread := [name for name in _UNREAD_MESSAGE if message.get(name)]:
        raise TextError(f'{where} has "{unread[0]}", which is not supported; remove it, or the conversations that need it')
    if message["role"] not in ROLES:
        shown = shortened(json.dumps(message["role"], ensure_ascii=False))
        raise TextError(f"{where} has the role {shown}; allowed: {', '.join(ROLES)}")
    text = _text(message["content"])
    if text is None or not text.strip():
        shown = shortened(json.dumps(message["content"], ensure_ascii=False))
        raise TextError(f"{where} has no text; got {shown}; write it as a text, or remove the message")
    return Turn(message["role"], text)


def _text(content: Any) -> str | None:
    """Return the text of a message, whose content may be a list of text parts; None if it has other content."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [None]
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in parts]
    return "".join(map(str, texts)) if all(isinstance(text, str) for text in texts) else None


def _check_order(where: str, turns: Sequence[Turn]) -> None:
    roles = [turn.role for turn in turns]
    if "system" in roles[1:]:
        raise TextError(f"{where}: message {roles.index('system', 1) + 1} is a system message; it must be the first message")
    if roles[-1] != "assistant":
        raise TextError(
            f"{where}: the last message is one of the {roles[-1]}; a conversation must end with one of the assistant, because "
            "only these are learned: add the reply, or remove the message"
        )
