"""The sections of a recipe, one frozen model per stage; the policy and its learners have modules of their own.

Every field has a docstring with its unit and its range.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ByteSize, Field, field_validator, model_validator

from selfeval.config.fields import Count, DeviceName, Nucleus, Positive, Section, Share

__all__ = [
    "ContextConfig",
    "EvaluationConfig",
    "EvaluatorConfig",
    "LoraConfig",
    "PairsConfig",
    "PlacementConfig",
    "QuestionsConfig",
    "RepliesConfig",
    "TuningConfig",
    "VerdictsConfig",
]


class ContextConfig(Section):
    """How far and how the model attends: longer text than it was trained on, by scaling its rotary positions (RoPE)."""

    rope_scaling: Literal["none", "linear", "dynamic", "yarn"] = "none"
    """Position interpolation, dynamic NTK or YaRN (docs/concepts/long-context.md); `none`: as the model's config says."""
    rope_factor: Annotated[float, Field(ge=1.0)] = 1.0
    """Context as a multiple of the trained one; 1 changes nothing."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """How attention is computed; `auto` leaves it to transformers (sdpa where the family has it)."""

    @field_validator("rope_scaling", mode="before")
    @classmethod
    def _none(cls, value: Any) -> Any:
        return "none" if value is None else value  # `--set context.rope_scaling=none`

    @model_validator(mode="after")
    def _factor_has_a_method(self) -> ContextConfig:
        if self.rope_scaling == "none" and self.rope_factor != 1.0:
            raise ValueError(f"rope_factor {self.rope_factor:g} needs a rope_scaling: linear, dynamic or yarn")
        return self


class TuningConfig(Section):
    """Next-token tuning of an adapter on plain text, by `selfeval tune`; no stage of a run reads it."""

    steps: Count = 100
    """Gradient steps."""
    batch: Count = 1
    """Rows of text per step."""
    learning_rate: Positive = 1e-3
    """Peak learning rate of AdamW."""
    warmup: Share = 0.05
    """Share of the steps with a rising learning rate; it falls to zero from there."""
    max_grad_norm: Positive = 1.0
    """Gradient norm above which gradients are scaled down."""
    checkpoint_every: Count = 50
    """Steps between checkpoints."""


class LoraConfig(Section):
    """The LoRA adapters that the roles are (Hu et al. 2021, https://arxiv.org/abs/2106.09685)."""

    rank: Count = 16
    """Rank of every adapter."""
    alpha: Positive = 32.0
    """Scale: the update is (alpha / rank) B A, or (alpha / sqrt(rank)) B A with rslora."""
    rslora: bool = False
    """Rank-stabilised scaling (https://arxiv.org/abs/2312.03732)."""
    targets: str | tuple[str, ...] = "all-linear"
    """Which modules get adapters: `all-linear`, or names of modules."""

    @field_validator("targets")
    @classmethod
    def _names_modules(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        names = (value,) if isinstance(value, str) else value
        if not names or not all(name.strip() for name in names):
            raise ValueError('name at least one module, such as ["q_proj", "v_proj"], or give "all-linear"')
        return value


class PlacementConfig(Section):
    """Which devices hold the frozen base, from their free memory (see concepts/placement.md)."""

    mode: Literal["auto", "single"] = "auto"
    """`auto` spreads a model that fits on no single device over cards, cpu and disk; `single` puts it on one device."""
    max_memory: dict[DeviceName, ByteSize] = Field(default={})
    """Most bytes of weights on a device, by its name: `cuda:0`, `cpu`, `disk`; for example "10GiB"."""
    reserve: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.2
    """Share of each device's free memory that weights leave to activations, caches, adapters and optimizers."""
    folder: str = ""
    """Where weights are written that cannot be read from the model's own files; a temporary folder unless given."""


class QuestionsConfig(Section):
    """Self-instruct: the model writes new questions in the domain of the seeds (https://arxiv.org/abs/2212.10560)."""

    file: str = ""
    """File of questions to use instead of writing any (docs/guides/your-own-data.md); `test` to `train` is their proportion."""
    train: Count = 400
    """Questions to train on, after near-duplicates are removed."""
    test: Count = 200
    """Questions held out for evaluation; never trained on."""
    examples: Annotated[int, Field(ge=0, le=32)] = 4
    """Example questions shown in each prompt, drawn from the seeds and from earlier questions."""
    seed_examples: Annotated[int, Field(ge=0, le=32)] = 2
    """At least so many of them are the user's own seeds (when there are that many)."""
    temperature: Positive = 1.0
    """Sampling temperature."""
    top_p: Nucleus = 0.98
    """Nucleus of the sampling distribution."""
    max_new_tokens: Count = 64
    """Token limit of a question."""
    shortest: Count = 8
    """Shorter questions, in characters, are dropped."""
    near_duplicate: Annotated[float, Field(gt=0.0, le=1.0)] = 0.8
    """Two questions are near-duplicates when their word shingles overlap by this Jaccard share and their numbers agree."""
    attempts: Positive = 4.0
    """Give up after this many times the wanted number of samples."""
    shard: Count = 512
    """Most samples per shard; no more are drawn than are needed."""


class RepliesConfig(Section):
    """Replies to the training questions are diverse (for collecting only); those to test questions are plain samples."""

    file: str = ""
    """File of questions with replies to use instead of writing any; the judge compares them (docs/guides/your-own-data.md)."""
    per_question: Annotated[int, Field(ge=2)] = 2
    """Replies per question."""
    temperature: tuple[Positive, Positive] = (0.8, 1.2)
    """Range from which each reply to a training question draws its own temperature."""
    top_p: tuple[Nucleus, Nucleus] = (0.9, 1.0)
    """Range from which each reply to a training question draws its own nucleus."""
    beam_share: Share = 0.1
    """Share of training questions whose last reply comes from beam search."""
    beams: Annotated[int, Field(ge=2)] = 4
    """Beams of the beam search."""
    max_new_tokens: Count = 128
    """Token limit of a reply, here and in policy training."""
    shard: Count = 512
    """Questions per shard."""

    @model_validator(mode="after")
    def _ranges(self) -> RepliesConfig:
        for name in ("temperature", "top_p"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name} is a range [low, high]; got low {low} > high {high}")
        return self


class VerdictsConfig(Section):
    """The judge compares two replies in both orders; what it is unsure of is thrown away."""

    keep: Annotated[float, Field(ge=0.5, le=1.0)] = 0.8
    """A verdict is kept when the averaged probability of the better reply is at least this."""
    tie: Share = 0.5
    """A verdict is a tie when the averaged probability of `neither is better` is above this."""
    label_mass: Share = 0.5
    """An order whose verdict labels together have less probability than this is unparsable."""
    max_new_tokens: Count = 256
    """Token limit of the judge's working; working that is cut there gives no verdict."""
    working: bool = True
    """Let the judge work the answer out before it names the better reply; false reads its verdict at once."""
    shard: Count = 256
    """Pairs per shard."""


class PairsConfig(Section):
    """Preference pairs: the kept verdicts, or those of a file."""

    file: str = ""
    """File of pairs to use; nothing is written and nothing is judged before the evaluator (docs/guides/your-own-data.md)."""


class EvaluatorConfig(Section):
    """The evaluator: LoRA and a scalar head, Bradley-Terry on the kept pairs, soft labels from the judge."""

    members: Count = 1
    """Evaluators that are trained, each from first weights and an order of pairs of its own; together they are an ensemble."""
    learning_rate: Positive = 1e-3
    """Peak learning rate of AdamW."""
    epochs: Count = 2
    """Passes over the training pairs."""
    batch: Count = 32
    """Pairs per step."""
    held_out: Annotated[float, Field(gt=0.0, lt=0.5)] = 0.1
    """Share of the training questions kept aside for the temperature of its confidence."""
    warmup: Share = 0.05
    """Share of the steps with a rising learning rate."""
    max_grad_norm: Positive = 1.0
    """Gradient norm above which gradients are scaled down."""
    centering: Annotated[float, Field(ge=0.0)] = 0.01
    """Weight of the squared sum of a pair's scores, which keeps scores around zero (https://arxiv.org/abs/2312.09244)."""
    checkpoint_every: Count = 50
    """Steps between checkpoints."""


class EvaluationConfig(Section):
    """The evidence."""

    questions: Count = 200
    """Test questions answered before and after, and judged by the held-out judge."""
    samples: Count = 12
    """Replies shown side by side on the page."""
    gold_replies: Count = 128
    """Rollouts per policy iteration that are checked against gold for the curve (when the domain has gold)."""
