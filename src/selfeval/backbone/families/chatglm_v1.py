"""ChatGLM-6B as a native model: the published weights under their own names, no code from the checkpoint.

Differences from other decoders (GLM, https://arxiv.org/abs/2103.10360; this is the last public revision, vocabulary
130528): a sequence is `context [gMASK] <sop> answer`. The context, everything before the first `<sop>`, sees itself in both
directions; from `<sop>` on the sequence is causal. Every token has two positions, each turning one half of a head (2-D rotary):

    first   0, 1, 2, ... in the context, then for ever that of the mask token
    second  0 in the context, then 1, 2, 3, ...  (`<sop>` is 1)

Both follow from the ids and the 2-D attention mask alone, whatever the padding. While decoding only new ids come in, so the
cache remembers per row where the answer began (`AnswerStart`). A sequence without `<sop>` is plain causal, first positions
counting.

Left out: the prefix encoder (p-tuning), 1-D positions and the revision of March 2023; they are refused when the config is read.

Shapes: B rows, T tokens of this pass, S tokens so far (cached ones included), D hidden, N heads, H size of a head, R = H / 2.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from selfeval.backbone.families.cache import CACHE_FIELD, RowFacts, cache_of, empty_cache

__all__ = [
    "AnswerStart",
    "ChatGLMConfig",
    "ChatGLMForCausalLM",
    "ChatGLMModel",
    "answer_start",
    "inverse_frequencies",
    "layout",
]

_NEVER = 1 << 30
"""Index of an answer that never begins."""


class ChatGLMConfig(PreTrainedConfig):
    """The fields of the published config.json, under their own names; the values of ChatGLM-6B are the defaults."""

    model_type = "chatglm"
    attribute_map = {  # noqa: RUF012
        "num_hidden_layers": "num_layers",
        "intermediate_size": "inner_hidden_size",
        "max_position_embeddings": "max_sequence_length",
    }
    keys_to_ignore_at_inference = [CACHE_FIELD]  # noqa: RUF012

    vocab_size: int = 130528
    hidden_size: int = 4096
    num_layers: int = 28
    num_attention_heads: int = 32
    inner_hidden_size: int = 16384
    layernorm_epsilon: float = 1e-5
    max_sequence_length: int = 2048
    mask_token_id: int = 130000
    gmask_token_id: int = 130001
    bos_token_id: int | None = 130004
    eos_token_id: int | list[int] | None = 130005
    pad_token_id: int | None = 3
    use_cache: bool = True
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False


class AnswerStart(RowFacts):
    """Two numbers of each row in a cache: the token at which the answer began, and the first position of all its tokens.

    Both count real tokens, not columns: padding cannot move them.
    """

    @property
    def start_B2(self) -> Tensor:
        return self.facts_BN


def answer_start(ids_BT: Tensor, attention_BT: Tensor, config: ChatGLMConfig) -> Tensor:
    """Where the answer begins in whole sequences, and the first position that its tokens share.

    Args:
        ids_BT: token ids.
        attention_BT: 1 at real tokens; padding may be on either side.

    Returns:
        `[B, 2]`, counted in real tokens: the index of the first `<sop>` (very large where there is none), and that of the first
        [gMASK] before it, else of the first [MASK].

    Raises:
        ValueError: an answer begins without a mask token before it.
    """
    # Count real tokens only, so padding on either side changes nothing.
    real_BT = attention_BT.bool()
    index_BT = real_BT.long().cumsum(-1) - 1
    start_B = _first(index_BT, real_BT & (ids_BT == config.bos_token_id))
    context_BT = real_BT & (index_BT < start_B[:, None])
    gmask_B = _first(index_BT, context_BT & (ids_BT == config.gmask_token_id))
    mask_B = _first(index_BT, context_BT & (ids_BT == config.mask_token_id))
    shared_B = torch.where(gmask_B < _NEVER, gmask_B, mask_B)
    if bool(((start_B < _NEVER) & (shared_B == _NEVER)).any()):
        raise ValueError("a sequence has <sop> but neither [gMASK] nor [MASK] before it; encode prompts with special tokens")
    return torch.stack([start_B, shared_B], dim=-1)


def _first(index_BT: Tensor, wanted_BT: Tensor) -> Tensor:
    return torch.where(wanted_BT, index_BT, _NEVER).amin(-1)


def layout(start_B2: Tensor, attention_BS: Tensor, new: int) -> tuple[Tensor, Tensor]:
    """Positions of the last `new` tokens and what they may see.

    Args:
        start_B2: the result of `answer_start`.
        attention_BS: 1 at real tokens, of all tokens so far.
        new: T, tokens of this pass.

    Returns:
        positions_B2T, allowed_B1TS (True where token t may attend to token s; padding attends to itself, so no row is empty).
    """
    index_BS = (attention_BS.long().cumsum(-1) - 1).clamp_min(0)
    start_B1, shared_B1 = start_B2[:, :1], start_B2[:, 1:]
    index_BT = index_BS[:, -new:]
    first_BT = torch.where(index_BT < start_B1, index_BT, shared_B1)
    second_BT = (index_BT - start_B1 + 1).clamp_min(0)
    column_S = torch.arange(attention_BS.shape[1], device=attention_BS.device)
    row_T = column_S[-new:]
    causal_TS = column_S <= row_T[:, None]
    # A sequence without <sop> has no context: plain causal attention.
    context_B1S = (index_BS < start_B1)[:, None] & (start_B1 < _NEVER)[:, None]
    allowed_BTS = (causal_TS | context_B1S) & attention_BS.bool()[:, None] | (column_S == row_T[:, None])
    return torch.stack([first_BT, second_BT], dim=1), allowed_BTS[:, None]


def inverse_frequencies(size: int, device: torch.device | None = None) -> Tensor:
    """`10000^(-2j / size)` for j = 0 .. size/2 - 1, rounded to fp16 as the published model has them, in fp32."""
    exponents = torch.arange(0, size, 2, device=device, dtype=torch.float32) / size
    frequencies: Tensor = 1.0 / 10000**exponents
    return frequencies.half().float()


def _rotary(positions_B2T: Tensor, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin `[B, 1, T, 2, R]`, one for each half of a head.

    In fp16 the angles are rounded too, because the published model multiplies in fp16: at position 1024 that is up to 0.4 rad.
    """
    inverse = inverse_frequencies(size, positions_B2T.device)
    angles = positions_B2T.transpose(1, 2)[:, None, ..., None].float() * inverse
    if dtype == torch.float16:
        angles = angles.half().float()
    doubled = torch.cat([angles, angles], dim=-1)
    return doubled.cos().to(dtype), doubled.sin().to(dtype)


def _turn(states_BNTH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn both halves of every head, each by its own positions (pairs j and j + R/2 of a half)."""
    halves = states_BNTH.unflatten(-1, (2, -1))
    one, two = halves.chunk(2, dim=-1)
    turned: Tensor = halves * cos + torch.cat([-two, one], dim=-1) * sin
    return turned.flatten(-2)


class ChatGLMAttention(nn.Module):
    """Attention over one packed projection: query, key and value of each head are adjacent.

    The published code divides the scores by (layer + 1) in fp16 and multiplies them back in fp32; the factor cancels, and the
    fused attention sums in fp32 anyway.
    """

    def __init__(self, config: ChatGLMConfig, index: int) -> None:
        super().__init__()
        self.index, self.heads = index, config.num_attention_heads
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_BTD: Tensor, rotary: tuple[Tensor, Tensor], allowed: Tensor, cache: Any) -> Tensor:
        packed = self.query_key_value(hidden_BTD).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        query, key, value = packed.chunk(3, dim=-1)
        query, key = _turn(query, *rotary), _turn(key, *rotary)
        if cache is not None:
            key, value = cache.update(key, value, self.index)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed)
        out: Tensor = self.dense(mixed.transpose(1, 2).flatten(-2))
        return out


class ChatGLMFeedForward(nn.Module):
    """Two layers with the tanh form of GELU between them."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.inner_hidden_size)
        self.dense_4h_to_h = nn.Linear(config.inner_hidden_size, config.hidden_size)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        out: Tensor = self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(hidden_BTD), approximate="tanh"))
        return out


class ChatGLMBlock(GradientCheckpointingLayer):
    """A layer whose residual is the *normed* input, times sqrt(2 L) (DeepNorm's constant).

    The published file takes L = 28 whatever the config says; the real checkpoints have 28 layers, so both rules agree on them.
    """

    def __init__(self, config: ChatGLMConfig, index: int) -> None:
        super().__init__()
        self.alpha = math.sqrt(2 * config.num_layers)
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.attention = ChatGLMAttention(config, index)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.mlp = ChatGLMFeedForward(config)

    def forward(self, hidden_BTD: Tensor, rotary: tuple[Tensor, Tensor], allowed: Tensor, cache: Any = None) -> Tensor:
        normed = self.input_layernorm(hidden_BTD)
        hidden_BTD = self.alpha * normed + self.attention(normed, rotary, allowed, cache)
        normed = self.post_attention_layernorm(hidden_BTD)
        out: Tensor = self.alpha * normed + self.mlp(normed)
        return out


class ChatGLMPreTrainedModel(PreTrainedModel):
    """Attributes that transformers needs to load, place and checkpoint this family."""

    config_class = ChatGLMConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["ChatGLMBlock"]  # noqa: RUF012
    _skip_keys_device_placement = ["cache", "past_key_values"]  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq$"]  # noqa: RUF012


class ChatGLMModel(ChatGLMPreTrainedModel):
    """The decoder without its output layer."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([ChatGLMBlock(config, index) for index in range(config.num_layers)])
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.word_embeddings = value

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states after the final norm; positions and mask are worked out here, from the ids.

        Args:
            input_ids: `[B, T]`, the new tokens; a context must come in one pass.
            attention_mask: `[B, S]`, 1 at real tokens, cached ones included; all ones when None.
            cache: a cache of transformers.
            use_cache: make a cache when there is none.
            output_hidden_states: also return the input of every layer, and the last state after the final norm.
            past_key_values: name of `cache` in transformers before 5.24.

        Raises:
            ValueError: the mask is not 2-D, or a context came in pieces.
        """
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = empty_cache(self.config)
        positions_B2T, allowed = self._layout(input_ids, attention_mask, cache)
        hidden_BTD = self.word_embeddings(input_ids)
        # Half a head, because each half is turned by its own positions.
        size = self.config.hidden_size // self.config.num_attention_heads // 2
        rotary = _rotary(positions_B2T, size, hidden_BTD.dtype)
        states = []
        for layer in self.layers:
            states.append(hidden_BTD)
            hidden_BTD = layer(hidden_BTD, rotary, allowed, cache=cache)
        hidden_BTD = self.final_layernorm(hidden_BTD)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_BTD,
            hidden_states=(*states, hidden_BTD) if output_hidden_states else None,
            **{CACHE_FIELD: cache},
        )

    def _layout(self, ids_BT: Tensor, attention_BS: Tensor | None, cache: Any) -> tuple[Tensor, Tensor]:
        past = 0 if cache is None else int(cache.get_seq_length())
        if attention_BS is None:
            attention_BS = ids_BT.new_ones(len(ids_BT), past + ids_BT.shape[1])
        if attention_BS.ndim != 2:
            raise ValueError(f"attention_mask must be 2-D (1 = a real token), got {attention_BS.ndim} dimensions")
        start_B2 = self._start(ids_BT, attention_BS, cache, past)
        return layout(start_B2, attention_BS, ids_BT.shape[1])

    def _start(self, ids_BT: Tensor, attention_BS: Tensor, cache: Any, past: int) -> Tensor:
        """Where answers begin: read from the ids of a first pass and kept in the cache, then from the cache."""
        known = AnswerStart.of(cache)
        if past == 0:
            start_B2 = answer_start(ids_BT, attention_BS, self.config)
            if cache is not None:
                AnswerStart(start_B2).put_in(cache)
            return start_B2
        if known is None:
            raise ValueError(
                "this cache was not created by ChatGLM: it does not record where replies start; start with an empty cache"
            )
        if (
            ids_BT.shape[1] > 1
            and bool((known.start_B2[:, 0] == _NEVER).any())
            and bool((ids_BT == self.config.bos_token_id).any())
        ):
            raise ValueError(
                "attention within the context is bidirectional, so the whole context and its <sop> must be in one forward pass"
            )
        return known.start_B2


class ChatGLMForCausalLM(ChatGLMPreTrainedModel, GenerationMixin):
    """ChatGLM-6B with its output layer."""

    keeps_row_facts = True  # `AnswerStart`, in its cache
    _tied_weights_keys = {"lm_head.weight": "transformer.word_embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As transformers does it, from safetensors alone: the hub has this model as pickles, and none is opened."""
        return super().from_pretrained(*args, **{"use_safetensors": True, **kwargs})

    def get_input_embeddings(self) -> nn.Module:
        return self.transformer.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.transformer.word_embeddings = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Next-token logits `[B, T, V]`, of the last `logits_to_keep` tokens (or at these positions) when that is not 0.

        The other arguments are those of `ChatGLMModel`.
        """
        outputs = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            cache=past_key_values if cache is None else cache,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep  # slice(0, None) is all
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, **{CACHE_FIELD: cache_of(outputs)}
        )
