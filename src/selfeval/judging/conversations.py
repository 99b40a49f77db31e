"""Conversations as token ids with the mask of the loss: what supervised fine-tuning reads.

The loss counts on what the model has to write, and nowhere else:

- In `messages`, on every assistant turn with its end-of-turn token. The `{% generation %}` marks of the chat template say where
  the turns are. Without marks, the conversation is rendered up to each turn: the tokens of a turn are those between the prompt
  for it and the end of the conversation that ends with it.
- In prompt and completion, on everything after the prompt.
- Two plain texts for a model without a chat template: on the completion and the end-of-sequence token.

Control tokens are removed from all texts, as in every prompt of this package.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from selfeval.backbone.tokens import EndOfTurn, end_of_turn
from selfeval.errors import TextError
from selfeval.judging.chat import CHAT_TEMPLATE, messages, reason
from selfeval.judging.templates import Templates
from selfeval.judging.turns import Turn
from selfeval.texts import shortened

__all__ = ["Conversation", "ConversationEncoder", "Encoded"]

_MARKS = re.compile(r"{%-?\s*generation\s*-?%}")
_NO_CHAT = (
    "this model has no chat template, so messages cannot be rendered; write "
    f'{{"prompt": "...", "completion": "..."}} with plain texts, or add a {CHAT_TEMPLATE} to a templates folder '
    "(--set templates=DIR)"
)
_SPLIT = (
    f'write one line with "prompt" and "completion" for each reply, or add a {CHAT_TEMPLATE} with '
    "{% generation %} marks to a templates folder (--set templates=DIR)"
)


@dataclass(frozen=True)
class Conversation:
    """A conversation to learn from.

    Attributes:
        where: its origin, for messages: file and line.
        turns: all turns; the last is the assistant's.
        prompt: Optional. Number of turns before the completion. None: the loss counts on every assistant turn.
        plain: whether prompt and completion were given as two texts.
    """

    where: str
    turns: tuple[Turn, ...]
    prompt: int | None = None
    plain: bool = False


class Encoded(NamedTuple):
    """A conversation as the model reads it.

    Attributes:
        ids: token ids.
        trained: per token, True where its loss counts.
        cleaned: whether control tokens were removed from a text.
        endless: whether the marks of the chat template leave out the end-of-turn token of a trained turn.
    """

    ids: tuple[int, ...]
    trained: tuple[bool, ...]
    cleaned: bool = False
    endless: bool = False


@dataclass(frozen=True)
class ConversationEncoder:
    """Encodes conversations with the chat template of a model.

    Attributes:
        templates: templates of the model, with its tokenizer.
        system: Optional. System message of conversations without one. Default: none.
    """

    templates: Templates
    system: str = ""

    def encode(self, conversation: Conversation) -> Encoded:
        """Return token ids and mask of a conversation.

        Raises:
            TextError: the model has no chat template and the conversation needs one; the template refuses the conversation,
                drops one of its texts, or renders its beginning differently depending on what follows.
        """
        if not self.templates.uses_chat:
            if not conversation.plain:
                raise TextError(f"{conversation.where}: {_NO_CHAT}")
            return self._plain(conversation)
        turns = [Turn(turn.role, self.templates.clean(turn.text)) for turn in conversation.turns]
        cleaned = any(new.text != old.text.strip() for new, old in zip(turns, conversation.turns, strict=True))
        added = 1 if self.system and turns[0].role != "system" else 0
        whole = [Turn("system", self.system)] * added + turns
        if conversation.prompt is not None:
            found = self._completion(conversation.where, whole, conversation.prompt + added)
        elif self._has_marks:
            found = self._marked(conversation.where, whole)
        else:
            found = self._turn_by_turn(conversation.where, whole)
        self._check_shown(conversation.where, whole)
        if True not in found.trained:
            raise TextError(f"{conversation.where}: the chat template writes no token of a reply")
        return found._replace(cleaned=cleaned)

    # -- in a chat ------------------------------------------------------------------------------------------------------

    @cached_property
    def _has_marks(self) -> bool:
        """Whether the chat template marks what the assistant writes; slow tokenizers cannot map the marks to tokens."""
        tokenizer: Any = self.templates.tokenizer
        return bool(tokenizer.is_fast and _MARKS.search(str(tokenizer.get_chat_template())))

    @cached_property
    def _end(self) -> EndOfTurn | None:
        return end_of_turn(self.templates.tokenizer)

    def _render(self, where: str, turns: Sequence[Turn], **options: Any) -> Any:
        try:
            return self.templates.tokenizer.apply_chat_template(messages(turns, parts=self.templates.parts), **options)
        except Exception as error:  # a template is a program: it may raise anything
            raise TextError(
                f"{where}: the chat template refuses the messages ({reason(error)}); change the order of the roles, or add a "
                f"{CHAT_TEMPLATE} that accepts them to a templates folder (--set templates=DIR)"
            ) from error

    def _ids(self, where: str, turns: Sequence[Turn], *, asks: bool = False) -> tuple[int, ...]:
        """Return the ids of a conversation, which `asks` for another turn of the assistant."""
        found = self._render(where, turns, tokenize=True, return_dict=False, add_generation_prompt=asks)
        return tuple(int(i) for i in found)

    def _check_shown(self, where: str, turns: Sequence[Turn]) -> None:
        """Refuse a conversation of which the template drops a text: many have no system role, and some drop earlier turns."""
        shown = _squeezed(str(self._render(where, turns, tokenize=False)))
        for turn in turns:
            if _squeezed(turn.text) not in shown:
                raise TextError(
                    f"{where}: the chat template drops or changes the text of a message of the {turn.role} "
                    f"({shortened(turn.text)}); remove the message, or add a {CHAT_TEMPLATE} that shows it to a templates "
                    "folder (--set templates=DIR)"
                )

    def _completion(self, where: str, turns: Sequence[Turn], prompt: int) -> Encoded:
        ids, before = self._ids(where, turns), self._ids(where, turns[:prompt], asks=True)
        _check_prefix(where, before, ids, f'correct the {CHAT_TEMPLATE}, or write "messages" instead')
        return self._ended(ids, [(len(before), len(ids))])

    def _marked(self, where: str, turns: Sequence[Turn]) -> Encoded:
        found = self._render(where, turns, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        ids, trained = tuple(int(i) for i in found["input_ids"]), tuple(map(bool, found["assistant_masks"]))
        ends = [i for i in range(1, len(ids)) if trained[i - 1] and not trained[i]]
        return Encoded(ids, trained, endless=any(self._end is not None and ids[i] == self._end.id for i in ends))

    def _turn_by_turn(self, where: str, turns: Sequence[Turn]) -> Encoded:
        ids, spans = self._ids(where, turns), []
        for index, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            before, through = self._ids(where, turns[:index], asks=True), self._ids(where, turns[: index + 1])
            _check_prefix(where, before, ids, _SPLIT)
            _check_prefix(where, through, ids, _SPLIT)
            spans.append((len(before), self._end_of_span(through, len(before))))
        return self._ended(ids, spans)

    def _end_of_span(self, ids: Sequence[int], start: int) -> int:
        """Return the end of a turn that begins at `start`: behind its last end-of-turn token, if it has one."""
        if self._end is None or self._end.id not in ids[start:]:
            return len(ids)
        return max(i for i in range(start, len(ids)) if ids[i] == self._end.id) + 1

    def _ended(self, ids: tuple[int, ...], spans: Sequence[tuple[int, int]]) -> Encoded:
        """Return the mask of the spans. A template without an end-of-turn token gets an end-of-sequence token at the end."""
        trained = [False] * len(ids)
        for start, stop in spans:
            trained[start:stop] = [True] * (stop - start)
        eos: Any = self.templates.tokenizer.eos_token_id
        if self._end is None and eos is not None and ids[-1] != eos:
            return Encoded((*ids, int(eos)), (*trained, True))
        return Encoded(ids, tuple(trained))

    # -- plain text -----------------------------------------------------------------------------------------------------

    def _plain(self, conversation: Conversation) -> Encoded:
        given = [turn.text for turn in conversation.turns]
        prompt, completion = (self._clean_inside(text) for text in given)
        before, ids = self._encode(prompt), self._encode(prompt + completion)
        # Where a token spans both texts, each is encoded alone, which is what the model sees when it is asked the prompt.
        if ids[: len(before)] != before or len(ids) == len(before):
            ids = (*before, *self._encode(completion, begins=False))
        eos: Any = self.templates.tokenizer.eos_token_id
        if eos is not None and ids[-1] != eos:
            ids = (*ids, int(eos))
        trained = (False,) * len(before) + (True,) * (len(ids) - len(before))
        return Encoded(ids, trained, cleaned=[prompt, completion] != given)

    def _clean_inside(self, text: str) -> str:
        """Return a text without control tokens, but with the whitespace around it."""
        inside = text.strip()
        start = text.index(inside)
        return f"{text[:start]}{self.templates.clean(inside)}{text[start + len(inside) :]}"

    def _encode(self, text: str, *, begins: bool = True) -> tuple[int, ...]:
        tokenizer: Any = self.templates.tokenizer
        ids = tuple(int(i) for i in tokenizer.encode(text, add_special_tokens=begins))
        # Some tokenizers append an end token to every text.
        return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _check_prefix(where: str, part: Sequence[int], whole: Sequence[int], remedy: str) -> None:
    if tuple(whole[: len(part)]) == tuple(part):
        return
    equal = next((i for i, (one, other) in enumerate(zip(part, whole, strict=False)) if one != other), len(whole))
    raise TextError(
        f"{where}: the chat template renders the messages before a reply differently when the reply follows (from token "
        f"{equal + 1} on), so the tokens of the reply are not known; {remedy}"
    )
