"""The tokenizers of ChatGLM-6B, ChatGLM2-6B and ChatGLM3-6B, on the SentencePiece file that each was published with.

Features that the published code adds to SentencePiece, as implemented here:

    1   newlines, tabs and runs of spaces are pieces; [gMASK] <sop> stand behind a text; a chat is "[Round 0]\\n问：...\\n答："
    2   [gMASK] sop stand before a text, as numbers behind the last piece; a chat is "[Round 1]\\n\\n问：...\\n\\n答："
    3   as 2, and a chat is one number per role, its first line and its content, *each encoded apart*

Control tokens in a text stay text in 2 and 3 (in 1 they are pieces of the file). All pad on the left.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from transformers import AddedToken, BatchEncoding, PreTrainedTokenizer

from selfeval.errors import ModelError

__all__ = ["ChatGLM1Tokenizer", "ChatGLM2Tokenizer", "ChatGLM3Tokenizer", "ChatGLMTokenizer"]

Message = dict[str, str]

_CHAT_1 = (
    "{%- if messages | length == 1 and add_generation_prompt -%}{{ messages[0]['content'] }}{%- else -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{ '[Round ' ~ (loop.index0 // 2) ~ ']\n问：' ~ message['content'] ~ '\n答：' }}"
    "{%- elif message['role'] == 'assistant' -%}{{ message['content'] ~ ('' if loop.last else '\n') }}"
    "{%- else -%}{{ raise_exception('ChatGLM-6B knows the roles user and assistant only') }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
)
_CHAT_2 = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}"
    "{{ '[Round ' ~ (loop.index0 // 2 + 1) ~ ']\n\n问：' ~ message['content'] ~ '\n\n答：' }}"
    "{%- elif message['role'] == 'assistant' -%}{{ message['content'] ~ ('' if loop.last else '\n\n') }}"
    "{%- else -%}{{ raise_exception('ChatGLM2-6B knows the roles user and assistant only') }}{%- endif -%}"
    "{%- endfor -%}"
)
_CHAT_3 = (
    "{%- for message in messages -%}"
    "{{ '<|' ~ message['role'] ~ '|>' ~ (message['metadata'] if 'metadata' in message else '') ~ '\n' ~ message['content'] }}"
    "{%- endfor -%}{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)


class ChatGLMTokenizer(PreTrainedTokenizer):
    """Base of the three tokenizers: SentencePiece encodes, and ids after its last piece are control tokens.

    Args:
        vocab_file: the SentencePiece file.

    Raises:
        ModelError: SentencePiece is not installed, or this is not a file of it.
    """

    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012
    padding_side = "left"
    behind: tuple[str, ...] = ()
    """Control tokens numbered after the last piece."""
    stops: tuple[str, ...] = ()
    """Control tokens that end a reply besides the end-of-sequence token."""
    chat = ""

    def __init__(self, vocab_file: str, **kwargs: Any) -> None:
        # The base class looks tokens up while it is initialised, so the pieces and control tokens have to be there first.
        self.vocab_file = vocab_file
        self.pieces = _sentencepiece(vocab_file)
        self.piece_count: int = self.pieces.get_piece_size()
        self.controls = self._controls()
        added = {i: AddedToken(text, special=True, normalized=False) for text, i in self.controls.items()}
        # No text is a control token to the code around SentencePiece: who types <|user|> gets those characters.
        fixed = {"chat_template": self.chat, "added_tokens_decoder": added, "split_special_tokens": True}
        super().__init__(**{**kwargs, **self._named(), **fixed})

    def _named(self) -> dict[str, str]:
        """The tokens that transformers has names for."""
        raise NotImplementedError

    def _controls(self) -> dict[str, int]:
        """Every control token and its number."""
        named = {text: int(self.pieces.piece_to_id(text)) for text in self._named().values()}
        return named | {text: self.piece_count + i for i, text in enumerate(self.behind)}

    @property
    def vocab_size(self) -> int:
        return self.piece_count + len(self.behind)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Numbers of the control tokens that end a reply besides the end-of-sequence token."""
        return tuple(self.controls[text] for text in self.stops)

    def get_vocab(self) -> dict[str, int]:
        return {self._convert_id_to_token(i): i for i in range(self.piece_count)} | self.controls

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return list(self.pieces.encode(text, out_type=str))

    def _convert_token_to_id(self, token: str) -> int:
        return int(self.pieces.piece_to_id(token))

    def _convert_id_to_token(self, index: int) -> str:
        return str(self.pieces.id_to_piece(index)) if 0 <= index < self.piece_count else ""

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return self._decode(self.convert_tokens_to_ids(tokens))

    def _decode(self, token_ids: int | list[int], skip_special_tokens: bool = False, **kwargs: Any) -> str:
        """Text of the pieces, control tokens as their names or left out; numbers that mean nothing give nothing."""
        ids = [token_ids] if isinstance(token_ids, int) else [int(i) for i in token_ids]
        names = {i: text for text, i in self.controls.items()}
        parts = []
        # Decode runs of pieces as a whole: SentencePiece places the spaces between them.
        for control, run in groupby((i for i in ids if i < self.vocab_size), key=names.__contains__):
            if control:
                parts += [] if skip_special_tokens else [names[i] for i in run]
            else:
                parts.append(self._text(str(self.pieces.decode(list(run)))))
        return "".join(parts)

    def _text(self, decoded: str) -> str:
        return decoded

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        name = self.vocab_files_names["vocab_file"]
        target = Path(save_directory) / (f"{filename_prefix}-{name}" if filename_prefix else name)
        if target.resolve() != Path(self.vocab_file).resolve():
            shutil.copyfile(self.vocab_file, target)
        return (str(target),)

    # -- chats ------------------------------------------------------------------------------------------------------------

    def apply_chat_template(
        self,
        conversation: Any,
        *,
        add_generation_prompt: bool = False,
        tokenize: bool = True,
        return_dict: bool = True,
        return_tensors: str | None = None,
        padding: bool | str = False,
        **kwargs: Any,
    ) -> Any:
        """The published prompt of a conversation; as text it is for the eye, its numbers are what the model was trained on.

        Args:
            conversation: messages with `role` and `content`, or a list of such lists.
            add_generation_prompt: end where the model's answer begins. Without it a last answer gets its end token.
            tokenize: numbers, not text.
            return_dict: with the attention mask.
            return_tensors: "pt" for tensors.
            padding: to the longest of several.

        Raises:
            ValueError: `tools` or another option that the published format has no place for.
        """
        if not tokenize:
            return super().apply_chat_template(
                conversation, add_generation_prompt=add_generation_prompt, tokenize=False, **kwargs
            )
        unknown = sorted(name for name, value in kwargs.items() if value)
        if unknown:
            raise ValueError(f"ChatGLM's chat format does not support {', '.join(unknown)}")
        many = bool(conversation) and isinstance(conversation[0], list)
        rows = [self._chat_ids(messages, add_generation_prompt) for messages in (conversation if many else [conversation])]
        ids = rows if many or return_tensors else rows[0]
        out: BatchEncoding = self.pad({"input_ids": ids}, padding=padding, return_tensors=return_tensors)
        return out if return_dict else out["input_ids"]

    def _chat_ids(self, messages: Sequence[Message], prompt: bool) -> list[int]:
        """An answer at the end is encoded apart from its prompt, as in training."""
        if prompt or messages[-1]["role"] != "assistant":
            return self._prompt_ids(messages)
        answer = self.encode(messages[-1]["content"], add_special_tokens=False)
        return [*self._prompt_ids(messages[:-1]), *answer, int(self.eos_token_id)]

    def _prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        text = super().apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
        return [int(i) for i in self.encode(text, add_special_tokens=True)]


class ChatGLM1Tokenizer(ChatGLMTokenizer):
    """ChatGLM-6B: `ice_text.model`, whose last pieces are the control tokens and the white space."""

    vocab_files_names = {"vocab_file": "ice_text.model"}  # noqa: RUF012
    chat = _CHAT_1
    _LONGEST = 80
    _INSIDE = ("<pad>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<ENC>", "<dBLOCK>")

    def __init__(self, vocab_file: str, **kwargs: Any) -> None:
        super().__init__(vocab_file, **kwargs)
        for text in ("[gMASK]", "<sop>", "<eop>", "<pad>"):
            if text not in self.controls:
                raise ModelError(f"{vocab_file} has no piece {text}; use the ice_text.model published with ChatGLM-6B")

    def _named(self) -> dict[str, str]:
        unknown = str(self.pieces.id_to_piece(self.pieces.unk_id()))
        named = {"bos_token": "<sop>", "eos_token": "<eop>", "pad_token": "<pad>", "mask_token": "[MASK]"}
        return named | {"unk_token": unknown}

    def _controls(self) -> dict[str, int]:
        inside = {text: int(self.pieces.piece_to_id(text)) for text in self._INSIDE}
        unknown = int(self.pieces.unk_id())
        return {str(self.pieces.id_to_piece(unknown)): unknown} | {text: i for text, i in inside.items() if i != unknown}

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
        text = re.sub(f" {{2,{self._LONGEST}}}", lambda run: f"<|blank_{len(run[0])}|>", text)
        return super()._tokenize(text)

    def _text(self, decoded: str) -> str:
        decoded = re.sub(r"<\|blank_(\d{1,2})\|>", lambda run: " " * int(run[1]), decoded)
        return decoded.replace("<n>", "\n").replace("<|tab|>", "\t")

    def build_inputs_with_special_tokens(self, token_ids_0: list[int], token_ids_1: list[int] | None = None) -> list[int]:
        """`context [gMASK] <sop>`, and `answer <eop>` when there is one."""
        prompt = [*token_ids_0, self.controls["[gMASK]"], int(self.bos_token_id)]
        return prompt if token_ids_1 is None else [*prompt, *token_ids_1, int(self.eos_token_id)]


class ChatGLM2Tokenizer(ChatGLMTokenizer):
    """ChatGLM2-6B: `tokenizer.model`, control tokens behind its last piece."""

    vocab_files_names = {"vocab_file": "tokenizer.model"}  # noqa: RUF012
    behind: tuple[str, ...] = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
    chat = _CHAT_2

    def _named(self) -> dict[str, str]:
        numbers = (self.pieces.unk_id(), self.pieces.bos_id(), self.pieces.eos_id())
        unknown, begin, end = (str(self.pieces.id_to_piece(i)) for i in numbers)
        return {"unk_token": unknown, "pad_token": unknown, "bos_token": begin, "eos_token": end}

    def get_added_vocab(self) -> dict[str, int]:
        """Without `sop` and `eop`: texts are cleaned of the names in here, which would cut "philosophy" in two.

        No text is encoded to their ids in any case.
        """
        return {text: i for text, i in self.controls.items() if not text.isalpha()}

    @property
    def prefix(self) -> list[int]:
        """[gMASK] sop, the prefix of every text."""
        return [self.controls["[gMASK]"], self.controls["sop"]]

    def build_inputs_with_special_tokens(self, token_ids_0: list[int], token_ids_1: list[int] | None = None) -> list[int]:
        """`[gMASK] sop text`, and a second text with its end token when there is one."""
        text = [*self.prefix, *token_ids_0]
        return text if token_ids_1 is None else [*text, *token_ids_1, int(self.eos_token_id)]


class ChatGLM3Tokenizer(ChatGLM2Tokenizer):
    """ChatGLM3-6B: the same file, four roles more."""

    behind = (*ChatGLM2Tokenizer.behind, "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
    stops = ("<|user|>", "<|observation|>")
    chat = _CHAT_3

    def _prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        ids = self.prefix
        for message in messages:
            role = f"<|{message['role']}|>"
            if role not in self.controls:
                raise ValueError(f"ChatGLM3-6B has no role {message['role']}; use system, user, assistant or observation")
            first_line = message.get("metadata", "") + "\n"
            ids += [self.controls[role], *self.pieces.encode(first_line), *self.pieces.encode(message["content"])]
        return [*ids, self.controls["<|assistant|>"]]

    def _chat_ids(self, messages: Sequence[Message], prompt: bool) -> list[int]:
        ids = self._prompt_ids(messages)
        if prompt:
            return ids
        # The prompt ends with the next <|assistant|>, which a finished conversation does not have.
        return [*ids[:-1], *([int(self.eos_token_id)] if messages[-1]["role"] == "assistant" else [])]


def _sentencepiece(file: str) -> Any:
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise ModelError(
            "ChatGLM's tokenizer file needs SentencePiece, which is not installed; run: "
            "pip install 'self-evaluator[sentencepiece]'"
        ) from error
    try:
        return SentencePieceProcessor(model_file=str(file))
    except (OSError, RuntimeError) as error:
        raise ModelError(f"{file} is not a SentencePiece file; download it again") from error
