"""Replies that a person typed, as the token ids that a model would have sampled for them.

Encoded alone, a text is not always what it is behind a prompt: tokenizers of Llama 2's kind put a space before every text that
they encode, so that " five" becomes two spaces and a word. A reply is therefore encoded behind a prompt, and the prompt's ids
are taken off again.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

__all__ = ["TypedReplies"]


@dataclass(frozen=True)
class TypedReplies:
    """Encodes replies behind one prompt.

    Attributes:
        prompt: a prompt as text, its control tokens included.
        ids: the same as the model reads it.
        lead: what stands between prompt and reply: a space in plain-text prompts, nothing in a chat.
    """

    tokenizer: PreTrainedTokenizerBase
    prompt: str
    ids: tuple[int, ...]
    lead: str

    def encode(self, reply: str) -> tuple[int, ...]:
        """Token ids of a reply without control tokens.

        Where the prompt's own last token changes with what follows, the reply is encoded alone, with or without the space that
        the tokenizer may put before it: as it reads right behind the prompt. So it is where a chat is made of parts that are
        encoded apart (ChatGLM).
        """
        text = self.lead + reply
        before, both = self._encoded(self.prompt), self._encoded(self.prompt + text)
        if before == self.ids[-len(before) :] and both[: len(before)] == before and len(both) > len(before):
            return both[len(before) :]
        alone = self._encoded(text), self._encoded(reply)
        expected = self._decoded(self.ids) + text
        return next((ids for ids in alone if self._decoded((*self.ids, *ids)) == expected), alone[0])

    def _decoded(self, ids: tuple[int, ...]) -> str:
        return str(self.tokenizer.decode(list(ids)))

    def _encoded(self, text: str) -> tuple[int, ...]:
        return tuple(int(i) for i in self.tokenizer.encode(text, add_special_tokens=False))
