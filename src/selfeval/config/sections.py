"""The sections of a recipe, one frozen model per stage; policy and learners are in separate modules.

Every field has a docstring with its unit and its range.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    SerializeAsAny,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from selfeval.config.choices import check_name, read_settings
from selfeval.config.fields import Count, CountOrAuto, CountOrNone, Nucleus, Positive, PositiveOrNone, Section, Share
from selfeval.config.judges import (
    JUDGES,
    AgreementConfig,
    CalibrationConfig,
    CombinedConfig,
    EndpointConfig,
    JudgeConfig,
    JudgeRole,
    PointwiseConfig,
    judge_spec,
)

__all__ = [
    "EvaluationConfig",
    "EvaluatorConfig",
    "MemberInput",
    "PairsConfig",
    "Pooling",
    "QuestionsConfig",
    "RepliesConfig",
    "TuningConfig",
    "VerdictsConfig",
]

Pooling = Literal["last", "mean"]
"""Hidden states that the head of an evaluator reads."""


class TuningConfig(Section):
    """Supervised fine-tuning of an adapter on plain text or conversations, by `selfeval tune`; not used by a run's stages."""

    steps: Count = 100
    """Gradient steps."""
    batch: Count = 1
    """Batch size: rows per step. A row has the tokens of `--length`; without `packing`, it is one conversation."""
    learning_rate: Positive = 1e-3
    """Peak learning rate of AdamW."""
    warmup: Share = 0.05
    """Warmup as a share of the steps; after it, the learning rate decays to zero."""
    max_grad_norm: Positive = 1.0
    """Gradient norm above which gradients are scaled down."""
    checkpoint_every: Count = 50
    """Steps between checkpoints, and between measurements of the held-out loss."""
    packing: bool = True
    """Pack conversations into rows without attention between them. Plain text is always concatenated, with attention."""
    too_long: Literal["drop", "cut"] = "drop"
    """Conversations longer than a row: `drop` them, or `cut` their ends off. Their number is reported."""
    held_out: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.05
    """Share of the conversations whose loss is measured instead of trained on; the weights with the lowest are written."""
    extend_vocabulary: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """Maximum number of new tokens (`--extend-vocabulary`); if above 0, `held_out` is also the share of plain text held out."""
    neftune_alpha: PositiveOrNone = None
    """Optional. Scale of NEFTune's noise on the input embeddings in training (https://arxiv.org/abs/2310.05914), e.g. 5."""


class QuestionsConfig(Section):
    """Self-instruct: the model writes new questions in the domain of the seeds (https://arxiv.org/abs/2212.10560)."""

    file: str = ""
    """Optional. File of questions that replaces generated ones (docs/guides/your-own-data.md); split as `test` to `train`."""
    extend: bool = False
    """Generate further questions until there are `train` and `test` of them, those of `file` included."""
    train: Count = 400
    """Number of training questions, after near-duplicates are removed."""
    test: Count = 200
    """Number of questions held out for evaluation; never trained on."""
    examples: Annotated[int, Field(ge=0, le=32)] = 4
    """Example questions shown in each prompt, drawn from the seeds and from earlier questions."""
    seed_examples: Annotated[int, Field(ge=0, le=32)] = 2
    """Minimum number of examples that are the user's own seeds (if there are that many)."""
    temperature: Positive = 1.0
    """Sampling temperature."""
    top_p: Nucleus = 0.98
    """Nucleus (top-p) of the sampling distribution."""
    max_new_tokens: Count = 64
    """Token limit of a question."""
    shortest: Count = 8
    """Minimum length of a question in characters; shorter ones are dropped."""
    near_duplicate: Annotated[float, Field(gt=0.0, le=1.0)] = 0.8
    """Two questions are near-duplicates when their word shingles overlap by this Jaccard share and their numbers agree."""
    paraphrase: PositiveOrNone = None
    """Optional. Drop questions nearer to one with equal numbers than this multiple of the seeds' median distance, e.g. 0.3."""
    off_domain: Annotated[float, Field(ge=1.0)] | None = None
    """Optional. Drop questions whose nearest seed is farther than this multiple of the seeds' own distances, e.g. 1.5."""
    coverage: bool = False
    """Draw the examples from clusters of similar questions, each equally often, so that rare topics are shown more often."""
    attempts: Positive = 4.0
    """Maximum number of samples, as a multiple of the requested number of questions."""
    shard: Count = 512
    """Maximum samples per shard; no more are drawn than needed."""
    sketch_above: CountOrNone = None
    """Optional. Number of questions above which near-duplicates are found by MinHash, e.g. 100000: less memory, more time."""


class RepliesConfig(Section):
    """Replies: diverse ones to training questions, which are used only to collect pairs; plain samples to test questions."""

    file: str = ""
    """Optional. File of questions with replies for the judge, instead of generated ones (docs/guides/your-own-data.md)."""
    per_question: Annotated[int, Field(ge=2)] = 2
    """Replies per question."""
    temperature: tuple[Positive, Positive] = (0.8, 1.2)
    """Range of the sampling temperature, drawn separately for each reply to a training question."""
    top_p: tuple[Nucleus, Nucleus] = (0.9, 1.0)
    """Range of the nucleus (top-p), drawn separately for each reply to a training question."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Number of likeliest tokens that replies to training questions are sampled from; 0: all."""
    min_p: Share = 0.0
    """Minimum probability of a token of these replies, as a share of the likeliest one's (arXiv 2407.01082); 0: none."""
    repetition_penalty: Positive = 1.0
    """Penalty for tokens that the prompt or the reply already has, in replies to training questions; 1: none."""
    stop_strings: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Texts at which a reply to a training question ends; they are cut off. For base models that write on, e.g. "Question:"."""
    beam_share: Share = 0.1
    """Share of training questions whose last reply comes from beam search."""
    beams: Annotated[int, Field(ge=2)] = 4
    """Number of beams of the beam search."""
    max_new_tokens: CountOrAuto = 128
    """Token limit of a reply, also in policy training; `auto` decides it from the first shard (docs/concepts/loop.md)."""
    max_new_tokens_cap: Count = 512
    """Largest limit that `max_new_tokens = "auto"` can choose, and the limit of the replies from which it chooses."""
    max_thinking_tokens: CountOrNone = None
    """Optional. Separate token limit of the thinking before a reply. Default: thinking and reply share `max_new_tokens`."""
    loops: Literal["drop", "keep"] = "drop"
    """Replies to training questions that repeat themselves until the token limit: `drop` or `keep` them before judging."""
    shard: Count = 512
    """Questions per shard."""

    @property
    def longest(self) -> int:
        """The token limit, or the largest limit that can be chosen; for plans that are made before any reply is sampled."""
        return self.max_new_tokens_cap if self.max_new_tokens == "auto" else self.max_new_tokens

    @property
    def limiting(self) -> str:
        """Dotted name of the setting that determines `longest`."""
        return "replies.max_new_tokens_cap" if self.max_new_tokens == "auto" else "replies.max_new_tokens"

    @model_validator(mode="after")
    def _ranges(self) -> RepliesConfig:
        for name in ("temperature", "top_p"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name} must be a range [low, high], got low {low} > high {high}")
        return self


_JUDGE = "pairwise"
_SETTINGS = "settings of the judge"
"""Alias of the field that holds the judge's section. Not a recipe key: recipes use the judge's name."""


class VerdictsConfig(Section):
    """The judge compares two replies; verdicts with low confidence are dropped. Settings of one judge: `[verdicts.JUDGE]`."""

    judge: str = _JUDGE
    """The judge that labels pairs of replies (docs/algorithms/judging.md)."""
    settings: SerializeAsAny[JudgeConfig] | None = Field(default=None, validation_alias=_SETTINGS)
    keep: Annotated[float, Field(ge=0.5, le=1.0)] = 0.8
    """Minimum confidence of a kept verdict: the judge's probability of the better reply."""
    tie: Share = 0.5
    """A verdict is a tie if the judge's probability of `neither is better` is above this."""
    label_mass: Share = 0.5
    """An order is unparsable if its verdict labels together have less probability than this."""
    max_new_tokens: Count = 256
    """Token limit of the judge's chain of thought, or of a vote; see `truncated` for one that is cut off there."""
    truncated: Literal["drop", "force"] = "drop"
    """A chain of thought that is cut off: `drop` has no verdict, `force` reads one after an appended lead."""
    reasoning: bool = True
    """Let the judge write a chain of thought before its verdict; false: read the verdict at once."""
    votes: Annotated[int, Field(ge=1, le=64, strict=True)] = 1
    """Chains of thought that `pairwise` samples per order, or `pointwise` per reply, and averages. Default: one, greedy."""
    vote_temperature: Positive = 0.7
    """Sampling temperature of the votes, if there are several."""
    shard: Count = 256
    """Pairs per shard."""
    calibration: CalibrationConfig = CalibrationConfig()
    """How the judge's probabilities are calibrated before `keep` is applied."""

    @property
    def fits_consistency(self) -> bool:
        """Whether the calibration is fitted to the agreement of both orders."""
        return self.calibration.method == "consistency" and JUDGES[self.judge].asks_both_orders

    @property
    def rubric(self) -> str:
        """The user's file of a rubric; empty if the judge reads none, or that of the templates folder."""
        return self.settings.rubric if isinstance(self.settings, PointwiseConfig) else ""

    @property
    def members(self) -> tuple[VerdictsConfig, ...]:
        """Settings of the judges that are combined; of another judge, these settings alone."""
        combined = self.settings
        return tuple(map(self._member, combined.judges)) if isinstance(combined, CombinedConfig) else (self,)

    def _member(self, name: str) -> VerdictsConfig:
        assert isinstance(self.settings, CombinedConfig)
        section = JUDGES[name].config
        settings = self.settings.agreement if section is AgreementConfig else section() if section else None
        votes = self.votes if JUDGES[name].samples_votes else 1
        # Their accuracies are estimated in place of a calibration; `given` is one of the pooled verdict.
        off = CalibrationConfig(method="off")
        return self.model_copy(update={"judge": name, "settings": settings, "votes": votes, "calibration": off})

    def kinds(self, role: JudgeRole = "judge") -> tuple[str, ...]:
        """Return the names of the kinds of templates that the judge reads in a role."""
        found = (kind for member in self.members for kind in judge_spec(role, member.judge).kinds(role))
        return tuple(dict.fromkeys(found))

    @field_validator("judge")
    @classmethod
    def _is_registered(cls, value: str) -> str:
        return check_name(value, JUDGES, "judge")

    @model_validator(mode="before")
    @classmethod
    def _read_settings(cls, values: Any) -> Any:
        """Validate the chosen judge's section and store it in the field. Other judges' sections remain, as unknown keys."""
        return read_settings(values, "judge", _JUDGE, JUDGES, _SETTINGS)

    @model_validator(mode="after")
    def _can_vote(self) -> VerdictsConfig:
        if self.votes > 1 and not JUDGES[self.judge].samples_votes:
            names = " or ".join(name for name, spec in JUDGES.items() if spec.samples_votes)
            raise ValueError(f'votes = {self.votes} needs judge = {names}, and judge is "{self.judge}"; set votes = 1')
        if self.votes > 1 and not self.reasoning:
            raise ValueError(
                f"votes = {self.votes} needs reasoning = true, because without a chain of thought all votes are equal; set "
                "votes = 1, or reasoning = true"
            )
        return self

    @model_serializer(mode="wrap")
    def _with_settings_by_name(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Serialise the fields as in a recipe: the judge's section under its name, if it has one."""
        values: dict[str, Any] = handler(self)
        settings = values.pop("settings")
        return values if settings is None else {**values, self.judge: settings}


class PairsConfig(Section):
    """Preference pairs: the kept verdicts, or pairs from a file."""

    file: str = ""
    """Optional. File of pairs to use; nothing is generated or judged before the evaluator (docs/guides/your-own-data.md)."""


def _without_defaults(section: Section, values: dict[str, Any], *names: str) -> dict[str, Any]:
    """Leave out settings that were added later and have their default, so the evaluators of earlier runs keep their key."""
    fields = type(section).model_fields
    unset = {name for name in names if getattr(section, name) == fields[name].default}
    return {name: value for name, value in values.items() if name not in unset}


class MemberInput(Section):
    """Input of a member of an ensemble of evaluators, and the rank of its adapter. The defaults are those of a single one."""

    layer: CountOrNone = None
    """Optional. Layer whose hidden states its head reads, counted from 1; later layers are not computed. Default: the last."""
    reference_answer: bool = True
    """Read the model's reference answer before the reply, if the grade template shows one."""
    rank: CountOrNone = None
    """Optional. Rank of its adapter; `backbone.lora.alpha` remains. Default: `backbone.lora.rank`."""
    pooling: Pooling = "last"
    """Hidden states that its head reads: `last`, that of the last token; `mean`, the mean over the tokens of the reply."""

    @model_serializer(mode="wrap")
    def _without_later_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return _without_defaults(self, handler(self), "rank", "pooling")


class EvaluatorConfig(Section):
    """The evaluator: LoRA and a scalar head, trained with a Bradley-Terry loss on the kept pairs."""

    members: Count = 1
    """Number of evaluators in the ensemble, each with a separate initialisation and order of pairs."""
    inputs: tuple[MemberInput, ...] = ()
    """Optional. Input of each member: a list of tables in the order of the members, repeated if there are more members
    (docs/algorithms/evaluator.md). Default: all members read the same."""
    labels: Literal["soft", "hard"] = "soft"
    """Targets of the loss: `soft`, the judge's probability of the better reply; `hard`, 1 for the reply that it prefers."""
    learning_rate: Positive = 1e-3
    """Peak learning rate of AdamW."""
    epochs: Count = 2
    """Passes over the training pairs."""
    batch: Count = 32
    """Batch size: pairs per step."""
    held_out: Annotated[float, Field(gt=0.0, lt=0.5)] = 0.1
    """Share of the training questions held out to fit the temperature of the confidence."""
    warmup: Share = 0.05
    """Warmup: share of the steps with a rising learning rate."""
    max_grad_norm: Positive = 1.0
    """Gradient norm above which gradients are scaled down."""
    centering: Annotated[float, Field(ge=0.0)] = 0.01
    """Weight of the squared sum of a pair's scores, which keeps scores near zero (https://arxiv.org/abs/2312.09244)."""
    checkpoint_every: Count = 50
    """Steps between checkpoints."""
    margin: Annotated[float, Field(ge=0.0)] = 0.0
    """Margin of the loss, scaled by 2 y - 1 for the judge's probability y (https://arxiv.org/abs/2307.09288). 0: none."""
    length_balanced: bool = False
    """Balance each batch: as many pairs whose chosen reply is the longer one as pairs whose chosen reply is the shorter one."""
    mismatched: Share = 0.0
    """Additional pairs, as a share of the training pairs: a chosen reply against the chosen reply to a similar question."""
    attacks: Share = 0.0
    """Additional pairs, as a share of the training pairs: a chosen reply against an attack reply, as the report has them."""
    garbled: Share = 0.0
    """Additional pairs, as a share of the training pairs: a reply against a garbled text, or in another style. None is of the
    report's attacks (docs/algorithms/evaluator.md)."""
    bag: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Share of the training questions that each member of the ensemble is trained on, drawn for each member."""
    confidence: Literal["slope", "temperature", "isotonic"] = "slope"
    """Confidence in a preference: `slope`, of the margin alone; `temperature`, `isotonic`: of margin and disagreement of
    the members, by a regression, then a temperature or an isotonic regression, which needs 200 held-out questions."""
    early_stopping: bool = False
    """Keep the weights with the lowest held-out loss, measured every `checkpoint_every` steps, instead of the last ones."""

    def input_of(self, member: int) -> MemberInput:
        """Return what a member reads, by its number from 0."""
        return self.inputs[member % len(self.inputs)] if self.inputs else MemberInput()

    @property
    def varies_reference(self) -> bool:
        """Whether a member reads no reference answer."""
        return not all(read.reference_answer for read in self.inputs)

    @model_validator(mode="after")
    def _one_input_per_member(self) -> EvaluatorConfig:
        if len(self.inputs) > self.members:
            raise ValueError(
                f"inputs has {len(self.inputs)} tables for {self.members} members; raise evaluator.members or remove tables"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_later_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return _without_defaults(self, handler(self), "inputs", "labels", "garbled", "confidence")


class EvaluationConfig(Section):
    """The evidence: evaluation of evaluator and policy."""

    questions: Count = 200
    """Test questions that are answered before and after training, and judged by the held-out judge."""
    temperature: Positive = 1.0
    """Sampling temperature of replies to test questions, before and after training, and of the held-out judge's readings."""
    top_p: Nucleus = 1.0
    """Nucleus (top-p) of the same replies."""
    samples: Count = 12
    """Pairs of replies, before and after training, that the page shows."""
    gold_replies: Count = 128
    """Rollouts per policy iteration that are checked against gold for the curve (if the domain has gold)."""
    attacks: Annotated[int, Field(ge=0, strict=True)] = 50
    """Test questions to which the evaluator scores attack replies (empty, repeated, an injected verdict...); 0: none."""
    map_points: Annotated[int, Field(ge=0, le=2000, strict=True)] = 1000
    """Texts on the report's map of the domain: questions, seeds and dropped questions; 0: no map."""
    referee: EndpointConfig | None = None
    """Optional. A server that compares the policy with its start, in place of the model of the run; the keys are those of
    `[verdicts.endpoint]`."""

    @model_serializer(mode="wrap")
    def _without_no_referee(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out a referee that is not set: its keys can be added with `--set`, and the evaluation keeps its key."""
        values: dict[str, Any] = handler(self)
        return values if self.referee is not None else {name: value for name, value in values.items() if name != "referee"}
