"""Bodies of the requests: every parameter that is read, and those that are accepted at their neutral value only.

An unknown parameter is an error, because ignoring it would change the result without a notice.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from selfeval.texts import has_half_character

__all__ = [
    "NEUTRAL",
    "ChatBody",
    "ChatMessage",
    "CompareBody",
    "CompletionBody",
    "EmbeddingBody",
    "RerankBody",
    "ScoreBody",
    "ScoreItem",
]

NEUTRAL = {
    "dimensions": "null",
    "echo": "false",
    "frequency_penalty": "0",
    "logit_bias": "{}",
    "max_chunks_per_doc": "null",
    "max_tokens_per_doc": "null",
    "modalities": '["text"]',
    "presence_penalty": "0",
    "rank_fields": "null",
    "reasoning_effort": "null",
    "response_format": '{"type": "text"}',
    "suffix": "null",
    "tool_choice": '"none" or "auto"',
    "tools": "[]",
}
"""Parameters of other servers that are accepted with this value only."""

Text = Annotated[str, Field(min_length=1, pattern=r"\S")]
"""A text that is not empty and not white space alone."""
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


def _refuse_true(value: bool) -> bool:
    if value:
        raise ValueError("only false is supported")
    return value


# Not Literal[False], which accepts 0.
No = Annotated[bool, AfterValidator(_refuse_true), Field(json_schema_extra={"const": False})]
Zero = Annotated[float, Field(ge=0, le=0)]
Sure = Annotated[float, Field(ge=0.5, le=1)]
_SURE = "Default: the threshold from labels of people, or 0.8."
StopString = Annotated[str, Field(min_length=1, max_length=256)]


class Body(BaseModel):
    """Base of all bodies: unknown parameters, values of another type, NaN and infinity are errors."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)


class RequestBody(Body):
    """Base of the bodies of whole requests, whose texts are valid Unicode."""

    @model_validator(mode="before")
    @classmethod
    def _check_texts(cls, values: Any) -> Any:
        try:
            broken = has_half_character(values)
        except RecursionError:
            raise ValueError("lists and objects are nested too deeply") from None
        if broken:
            raise ValueError("a text has half of a surrogate pair, which is not valid Unicode; send UTF-8, or both halves")
        return values


class TextPart(Body):
    """A part of the content of a message."""

    type: Literal["text"]
    text: str


class ChatMessage(Body):
    """A message of a conversation. The content is a text, or a list of text parts."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]
    name: str | None = Field(None, description="Not shown to the model.")
    refusal: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None

    @property
    def as_turn(self) -> dict[str, str]:
        """The message with its content as one text; a developer message is a system message."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(Body):
    """Options of a stream."""

    include_usage: bool = False
    include_obfuscation: bool = False


class _Harmless(RequestBody):
    """Parameters that change no result, and are not read."""

    user: str | None = None
    metadata: dict[str, Any] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: No | None = None


class _SamplingBody(_Harmless):
    """Parameters of both endpoints that reply."""

    model: str
    n: int | None = Field(None, ge=1, description="Number of choices. Default: 1.")
    best_of: int | None = Field(None, ge=1, description="Replies to sample, of which the evaluator picks the best n.")
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: StopString | Annotated[list[StopString], Field(max_length=8)] | None = None
    temperature: float | None = Field(None, ge=0, le=2, description="Default: 1; below 0.001 it is greedy.")
    # Smaller values are 0 in fp32, or give infinite logits.
    top_p: float | None = Field(None, ge=1e-4, le=1)
    top_k: int | None = Field(None, ge=0, le=2**31, description="Number of tokens to sample from; 0: all.")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=10)
    max_tokens: int | None = Field(None, ge=1, description="Default: the limit of the run's replies with their thinking.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def choices(self) -> int:
        """Number of choices for each prompt."""
        return self.n or 1

    @property
    def sampled(self) -> int:
        """Number of replies to sample for each prompt."""
        return self.best_of or self.choices

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @model_validator(mode="after")
    def _check_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream = true")
        if self.best_of is not None and self.best_of < self.choices:
            raise ValueError(f"best_of ({self.best_of}) must be at least n ({self.choices})")
        if self.best_of is not None and self.stream:
            raise ValueError(
                "best_of cannot be streamed, because the replies are ranked when all have ended; remove one of them"
            )
        return self


class ResponseFormat(Body):
    """Only text is supported."""

    type: Literal["text"]


class ChatBody(_SamplingBody):
    """Body of `/v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: int | None = Field(None, ge=1, description="The same as max_tokens.")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: None = None

    @property
    def top(self) -> int | None:
        """Number of alternatives for each token; None without log-probs."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @model_validator(mode="after")
    def _check_chat(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs = true")
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise ValueError("max_tokens and max_completion_tokens differ; pass one of them")
        return self


class CompletionBody(_SamplingBody):
    """Body of `/v1/completions`: the model continues the prompt as it is, without a template."""

    prompt: (
        Annotated[str, Field(min_length=1)]
        | TokenIds
        | Annotated[list[Annotated[str, Field(min_length=1)]] | list[TokenIds], Field(min_length=1)]
    )
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: No | None = None
    suffix: None = None

    @property
    def top(self) -> int | None:
        """Number of alternatives for each token; None without log-probs."""
        return self.logprobs

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts as a list of texts or of token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if isinstance(self.prompt[0], int) else self.prompt


class EmbeddingBody(RequestBody):
    """Body of `/v1/embeddings`."""

    model: str
    input: Text | TokenIds | Annotated[list[Text] | list[TokenIds], Field(min_length=1)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: None = None
    user: str | None = None

    @property
    def inputs(self) -> list[str] | list[list[int]]:
        """The inputs as a list of texts or of token ids."""
        if isinstance(self.input, str):
            return [self.input]
        return [self.input] if isinstance(self.input[0], int) else self.input


class _Asked(Body):
    """A question: a text, or a conversation that ends with a message of the user."""

    question: Text | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None

    @property
    def asked(self) -> str | list[dict[str, str]]:
        """The question as the evaluator takes it."""
        if self.messages is not None:
            return [message.as_turn for message in self.messages]
        return self.question or ""

    def _check_question(self) -> None:
        if (self.question is None) == (self.messages is None):
            raise ValueError('pass either "question" or "messages"')


class ScoreItem(_Asked):
    """A question with its replies."""

    replies: Annotated[list[Text], Field(min_length=1)]

    @model_validator(mode="after")
    def _check(self) -> Self:
        self._check_question()
        return self


class ScoreBody(_Asked, RequestBody):
    """Body of `/v1/score`: a question with its replies, or `items` with several of them."""

    model: str | None = None
    replies: Annotated[list[Text], Field(min_length=1)] | None = None
    items: Annotated[list[ScoreItem], Field(min_length=1)] | None = None
    sure: Sure | None = Field(None, description=f"Confidence below which no reply is preferred. {_SURE}")

    @property
    def all_items(self) -> list[ScoreItem]:
        """The questions with their replies."""
        return self.items or [ScoreItem(question=self.question, messages=self.messages, replies=self.replies or [])]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.items is not None:
            if (self.question, self.messages, self.replies) != (None, None, None):
                raise ValueError('"items" replaces "question", "messages" and "replies"; pass one or the other')
            return self
        self._check_question()
        if self.replies is None:
            raise ValueError('"replies" is missing')
        return self


class CompareBody(_Asked, RequestBody):
    """Body of `/v1/compare`: a question and two replies."""

    model: str | None = None
    a: Text
    b: Text
    sure: Sure | None = Field(None, description=f"Confidence below which neither reply is preferred. {_SURE}")

    @model_validator(mode="after")
    def _check(self) -> Self:
        self._check_question()
        return self


class Document(Body):
    """A document of a rerank request."""

    text: Text


class RerankBody(RequestBody):
    """Body of `/v1/rerank` and `/v2/rerank`, as in the APIs of Cohere and Jina."""

    model: str
    query: Text
    documents: Annotated[list[Text | Document], Field(min_length=1)]
    top_n: int | None = Field(None, ge=1)
    return_documents: bool | None = None
    max_chunks_per_doc: None = None
    max_tokens_per_doc: None = None
    rank_fields: None = None

    @property
    def texts(self) -> list[str]:
        """The documents as texts."""
        return [document if isinstance(document, str) else document.text for document in self.documents]
