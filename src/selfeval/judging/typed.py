"""Typed replies, encoded as the token ids that a model would have sampled for them.

Encoding a text alone can differ from encoding it after a prompt: Llama 2-style tokenizers put a space before every text that
they encode, so " five" becomes two spaces and a word. A reply is therefore encoded after a prompt, and the prompt's ids are
removed again.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

__all__ = ["TypedReplies"]


@dataclass(frozen=True)
class TypedReplies:
    """Encodes replies after one prompt.

    Attributes:
        prompt: a prompt as text, its control tokens included.
        ids: the same prompt as token ids for the model.
        lead: text between prompt and reply: a space in plain-text prompts, empty in a chat.
    """

    tokenizer: PreTrainedTokenizerBase
    prompt: str
    ids: tuple[int, ...]
    lead: str

    def encode(self, reply: str) -> tuple[int, ...]:
        """Return the token ids of a reply without control tokens.

        If the prompt's last token depends on the text after it, the reply is encoded alone, with or without the space that the
        tokenizer may put before it, whichever decodes correctly after the prompt. This is the case for chats whose parts are
        encoded separately (ChatGLM).
        """
        text = self.lead + reply
        # Two conditions: the prompt's text encodes to the prompt's ids, and they stay the same with the reply behind them.
        before, both = self._encoded(self.prompt), self._encoded(self.prompt + text)
        if before == self.ids[-len(before) :] and both[: len(before)] == before and len(both) > len(before):
            return both[len(before) :]
        alone = self._encoded(text), self._encoded(reply)
        # Judged by decoding, because it shows whether a space was added or lost between prompt and reply.
        expected = self._decoded(self.ids) + text
        return next((ids for ids in alone if self._decoded((*self.ids, *ids)) == expected), alone[0])

    def _decoded(self, ids: tuple[int, ...]) -> str:
        return str(self.tokenizer.decode(list(ids)))

    def _encoded(self, text: str) -> tuple[int, ...]:
        return tuple(int(i) for i in self.tokenizer.encode(text, add_special_tokens=False))
