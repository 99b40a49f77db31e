"""Chat with a role of a run: a conversation whose replies arrive in pieces while they are sampled.

Reply number i is reply i of `Policy.reply` to the same conversation with the same seed. The chat template formats the turns, as
in the run; a model without one is asked every question alone.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field

from selfeval.errors import InputError
from selfeval.judging.templates import Templates
from selfeval.prompt import Prompt
from selfeval.records import Question
from selfeval.rollout.guide import Guide
from selfeval.rollout.live import LiveBatch, NewToken
from selfeval.rollout.requests import Request
from selfeval.rollout.thinking import ReplyProgress, ThinkingTokens
from selfeval.runs.conversations import AnyQuestion, check_conversations, question_from
from selfeval.runs.model import RunModel
from selfeval.runs.policy import check_sampling, load_policy
from selfeval.training.context import POLICY

__all__ = ["Conversation", "Exchange", "Sampling", "Speaker", "StreamedReply", "sampling_of"]


# -- conversations ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exchange:
    """A question and the reply that it got."""

    question: str
    reply: str


@dataclass
class Conversation:
    """The turns so far.

    Attributes:
        system: system message; empty for none.
        remembers: whether the replies to later questions see earlier turns. A model without a chat template cannot.
        exchanges: questions with their replies, in order.
    """

    system: str = ""
    remembers: bool = True
    exchanges: list[Exchange] = field(default_factory=list)

    def asked(self, question: str) -> AnyQuestion:
        """Return a question with the turns before it."""
        before = self.exchanges if self.remembers else []
        if not before and not self.system:
            return question
        turns = [{"role": "system", "content": self.system}] if self.system else []
        for exchange in before:
            turns += [{"role": "user", "content": exchange.question}, {"role": "assistant", "content": exchange.reply}]
        return [*turns, {"role": "user", "content": question}]


# -- replies ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampling:
    """How replies are sampled.

    Attributes:
        temperature: at least 0; 0 is greedy.
        top_p: nucleus, above 0 and at most 1.
        limit: token limit of a reply.
        seed: sampling seed. Each reply has its own random stream of it.
    """

    temperature: float
    top_p: float
    limit: int
    seed: int = 0


def sampling_of(
    model: RunModel, temperature: float | None, top_p: float | None, max_new_tokens: int | None, seed: int
) -> Sampling:
    """Return how replies are sampled; numbers that are None are those of the evidence of the run.

    Raises:
        InputError: a number is out of its range.
    """
    evaluated = model.config.evaluation
    found = Sampling(
        evaluated.temperature if temperature is None else temperature,
        evaluated.top_p if top_p is None else top_p,
        model.reply_limit if max_new_tokens is None else max_new_tokens,
        seed,
    )
    check_sampling(found.temperature, found.top_p, found.limit)
    return found


class Speaker:
    """A role of a run that replies.

    Args:
        model: the model of the run, onto which the policy is loaded if it is the role.
        role: `policy` or `base`.
        sampling: how its replies are sampled.
    """

    def __init__(self, model: RunModel, role: str, sampling: Sampling) -> None:
        self.role, self.sampling = role, sampling
        self._model = model
        self._guide = load_policy(model.backbone, model.roles) if role == POLICY else None

    def reply(self, asked: AnyQuestion, number: int = 0) -> StreamedReply:
        """Begin a reply; nothing is sampled before it is iterated.

        Args:
            asked: a question, or a conversation that ends with one.
            number: number of the random stream: another number is another sample.

        Raises:
            InputError: the question is empty, the conversation cannot be formatted, or it fills the model's context.
        """
        question = question_from(asked)
        check_conversations(self._model.templates, [question])
        return StreamedReply(self._model, self.role, question, self.sampling, number, self._guide)


class StreamedReply:
    """A reply while it is sampled. Iterate to receive its text in pieces; stop iterating to end it early.

    The pieces together are `text`. A piece never ends inside of a character, and whitespace at the end of a reply is left out.

    Attributes:
        text: the text so far.
        finished: whether the reply has ended by itself, and not at its limit.
        tokens: number of tokens so far, those of a chain of thought included.
    """

    def __init__(
        self, model: RunModel, role: str, question: Question, sampling: Sampling, number: int, guide: Guide | None
    ) -> None:
        self._model, self._role, self._guide, self._seed = model, role, guide, sampling.seed
        prompt = model.templates.reply_prompt(question)
        self._request = Request(prompt, sampling.temperature, sampling.top_p, stream=number)
        self._limit, self._room = _limits(model, prompt, sampling.limit)
        self._reply = _TextSoFar(model.templates, ReplyProgress(self._limit, self._room, prompt, model.thinking))
        self._errors: list[Exception] = []
        self.text, self.finished = "", False
        self._hidden = 0

    @property
    def tokens(self) -> int:
        return len(self._reply.ids)

    @property
    def is_thinking(self) -> bool:
        """Whether the last token is in a chain of thought, which is not part of the text."""
        return self._reply.progress.is_open

    def __iter__(self) -> Generator[str]:
        """Sample, and yield the text in pieces; an empty piece after a token without news.

        Raises:
            MemoryLimitError: the reply does not fit in memory.
            NotFiniteError: the model's logits are NaN or infinite.
        """
        model, most = self._model, len(self._request.prompt.ids) + self._room
        # A separate batch: its cache is as long as this reply needs, and an interrupted step leaves nothing behind.
        batch = LiveBatch(model.backbone, self._role, places=1, max_tokens=most, guide=self._guide, thinking=model.thinking)
        ticket = batch.add(
            self._request, seed=self._seed, limit=self._limit, on_token=self._reply.add, on_error=self._errors.append
        )
        is_left = True
        while is_left:
            is_left = batch.step()
            yield self._news(self._reply.stable())
        for error in self._errors:
            raise error
        assert ticket.rollout is not None, "a request that is neither waiting nor running has ended"
        self.finished = ticket.rollout.finished
        yield self._news(model.templates.text(ticket.rollout.reply_ids), is_last=True)

    def _news(self, text: str, *, is_last: bool = False) -> str:
        """Return the part of the text that was not yielded yet."""
        hidden = self._reply.hidden
        if text.startswith(self.text):
            news = text[len(self.text) :]
        elif is_last or (hidden != self._hidden and not self.is_thinking):
            # The text before a closing marker turned out to be thinking, so the reply begins again, on a new line.
            news = f"\n{text}" if text or not is_last else ""
        else:
            # A tokenizer may change the last characters when more follow; they wait until it does not.
            return ""
        self.text, self._hidden = text, hidden
        return news


def _limits(model: RunModel, prompt: Prompt, limit: int) -> tuple[int, int]:
    """Return the token limit of a reply, lowered to what the context allows, and that with a chain of thought before it.

    Raises:
        InputError: the prompt fills the context.
    """
    thinking, context = _thinking_limit(model.thinking), model.backbone.loaded.context_length
    room = limit + thinking if context is None else min(limit + thinking, context - len(prompt.ids))
    if room < 1:
        raise InputError(
            f"the conversation has {len(prompt.ids)} tokens, which leaves no room for a reply in this model's context of "
            f"{context}; remove turns (/undo), or begin again (/reset)"
        )
    return min(limit, room), room


def _thinking_limit(thinking: ThinkingTokens | None) -> int:
    return 0 if thinking is None else thinking.limit or 0


class _TextSoFar:
    """The text of a reply of which more tokens may follow."""

    def __init__(self, templates: Templates, progress: ReplyProgress) -> None:
        self._templates, self.progress = templates, progress
        self.ids: list[int] = []

    def add(self, token: NewToken) -> None:
        self.ids.append(token.id)
        self.progress.add(token.id)

    @property
    def hidden(self) -> int:
        """Number of leading tokens that are thinking, as far as is known."""
        return self.progress.hidden(finished=False)

    def stable(self) -> str:
        """Return the text without what later tokens may change: the beginning of a character, and whitespace at the end."""
        if self.progress.is_open:
            return ""
        reply = self.ids[self.hidden :]
        # A tokenizer decodes the bytes of an incomplete character to U+FFFD, as many as it likes.
        return self._templates.text(tuple(reply)).rstrip("\ufffd").rstrip()
