"""The configuration of a run: one frozen model per stage, every field with its unit and range.

A recipe is a TOML file with these names; `--set policy.iterations=20` overrides one. An unknown name is an error that
suggests the nearest one. Nothing here imports torch.
"""

from __future__ import annotations

import difflib
import json
import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ByteSize,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from selfeval.errors import ConfigError
from selfeval.texts import has_half_character, read_text, shortened, visible

__all__ = [
    "ContextConfig",
    "EvaluationConfig",
    "EvaluatorConfig",
    "LoraConfig",
    "PairsConfig",
    "PlacementConfig",
    "PolicyConfig",
    "QuestionsConfig",
    "RepliesConfig",
    "RunConfig",
    "TuningConfig",
    "VerdictsConfig",
    "load_config",
    "nearest",
]

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Nucleus = Annotated[float, Field(gt=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1, strict=True)]
DeviceName = Annotated[str, Field(pattern=r"^(cpu|disk|cuda:\d+)$")]
Size = Annotated[ByteSize, Field(gt=0)]


_LARGEST_NUMBER, _LARGEST_COUNT, _LARGEST_BYTES = 1e9, 2**31 - 1, 2**63 - 1


def _is_wide(name: str | None) -> bool:
    """Whether a whole number may take 64 bits: seeds and sizes; torch takes no larger seed."""
    return name in ("seed", "memory_budget")


class Section(BaseModel):
    """Base of all sections: frozen, unknown keys refused, field docstrings become descriptions."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _none_is_no_text(cls, value: Any, info: ValidationInfo) -> Any:
        """`--set seeds=none` takes a recipe's text away."""
        is_text = info.field_name in cls.model_fields and cls.model_fields[info.field_name].annotation is str
        return "" if value is None and is_text else value

    @field_validator("*")
    @classmethod
    def _can_be_used(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuses numbers that overflow in 32 bits once the work has begun, and text that no file name or terminal takes."""
        if isinstance(value, float) and abs(value) > _LARGEST_NUMBER:
            raise ValueError(f"must be between -{_LARGEST_NUMBER:g} and {_LARGEST_NUMBER:g}")
        if isinstance(value, int) and abs(value) > (_LARGEST_BYTES if _is_wide(info.field_name) else _LARGEST_COUNT):
            raise ValueError(f"must be at most {_LARGEST_BYTES if _is_wide(info.field_name) else _LARGEST_COUNT:,}")
        if isinstance(value, str) and visible(value) != value:
            raise ValueError("must not hold control characters")
        return value


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
    max_memory: dict[DeviceName, ByteSize] = {}
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


class PolicyConfig(Section):
    """Policy learning against the evaluator; which algorithm is `learner`, the rest is common to them."""

    learner: Literal["ppo", "trpo", "grpo", "rloo", "reinforce_pp", "remax", "dpo", "raft", "ilql", "soft_q"] = "ppo"
    """The algorithm; docs/algorithms/learners.md tells them apart."""
    pairs: Literal["sampled", "kept"] = "sampled"
    """What dpo learns from: pairs of the replies just sampled, or the pairs that the judge labelled."""
    iterations: Count = 30
    """Rounds of sampling and updating."""
    questions_per_iteration: Count = 32
    """Training questions sampled for each iteration."""
    replies_per_question: Count = 4
    """Replies sampled to each."""
    epochs: Count = 2
    """Passes over an iteration's replies."""
    minibatch: Count = 64
    """Replies per gradient step."""
    learning_rate: Positive = 1e-3
    """Peak learning rate of the policy adapter."""
    critic_learning_rate: Positive = 1e-3
    """Peak learning rate of the critic adapter and head."""
    warmup_iterations: Annotated[int, Field(ge=0)] = 2
    """Iterations with a rising learning rate."""
    temperature: Positive = 1.0
    """The one temperature at which the policy samples and its log-probs are taken."""
    gamma: Share = 1.0
    """Discount per token."""
    gae_lambda: Share = 0.95
    """Lambda of generalised advantage estimation."""
    clip: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    """PPO clip range of the probability ratio."""
    clip_high: Annotated[float, Field(ge=0.0)] = 0.0
    """Upper half-width of the clip range where it differs from `clip` (0.28 in DAPO); 0: the same."""
    dual_clip: Annotated[float, Field(ge=0.0)] = 0.0
    """Bound of the loss of a bad token that became likelier, in units of the ratio (3 is usual); 0: none."""
    step_kl: Annotated[float, Field(ge=0.0)] = 5e-3
    """An iteration that moves the policy further (approximate KL, nats per token) shortens the steps after it; 0: never."""
    trust_region: Positive = 0.01
    """Most that a step of trpo moves the policy: exact KL, in nats per token, at the peak of the learning rate's schedule."""
    value_clip: Annotated[float, Field(ge=0.0)] = 0.2
    """Clip range of the value update, in units of the whitened reward; 0: none."""
    whiten_advantages: bool = True
    """Shift and scale advantages to mean 0 and variance 1 over the tokens of an iteration."""
    advantage_clip: Annotated[float, Field(ge=0.0)] = 0.0
    """Advantages are clipped to plus or minus this; 0: not at all."""
    replay: Count = 2048
    """Newest replies that value learners draw from."""
    target_share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.1
    """Share of the way to the value functions that their targets go after each step."""
    expectile: Annotated[float, Field(ge=0.5, lt=1.0)] = 0.8
    """Expectile of its tokens' values that ilql takes for the value of a state: 0.5 is their mean, near 1 the best."""
    kl_target: Positive = 4.0
    """Wanted KL divergence from the reference, in nats per reply."""
    kl_coefficient: Positive = 0.05
    """Initial weight of the KL penalty."""
    kl_control: Literal["dual", "adaptive", "fixed"] = "dual"
    """How the weight of the KL penalty is moved towards the target: as a damped multiplier, slowly in proportion, or not."""
    kl_rate: Positive = 0.5
    """Dual: change of the log weight in an iteration whose KL is off by its whole target."""
    kl_horizon: Count = 2000
    """Adaptive: samples over which the weight changes by 20% at most, and never more in one iteration (Ziegler et al. 2019)."""
    whiten_rewards: bool = True
    """Scores in units of the first iteration's: mean 0, deviation 1."""
    reward_clip: Annotated[float, Field(ge=0.0)] = 4.0
    """Whitened scores are clipped to plus or minus this; 0: not at all."""
    unfinished_penalty: Annotated[float, Field(ge=0.0)] = 2.0
    """Whitened reward taken from a reply that hits the token limit without ending."""
    length_guard: Annotated[float, Field(ge=0.0)] = 0.0
    """Replies longer than this many times the mean at the start lose reward in proportion to the excess; 0: none do."""
    entropy_floor: Share = 0.0
    """Below this share of the entropy at the start, a bonus for entropy is added; 0: never."""
    reference_ema: Share = 0.0
    """Share of the way to the policy that the reference goes after each iteration; 0: it stays what it was."""
    pessimism: Literal["mean", "worst", "uncertainty"] = "mean"
    """How the scores of several evaluators become one: mean, lowest, or mean less `uncertainty_weight` times the variance."""
    uncertainty_weight: Annotated[float, Field(ge=0.0)] = 0.5
    """Weight of the variance over the evaluators, with `pessimism = "uncertainty"`."""
    watchdogs: Literal["act", "warn"] = "act"
    """Whether watchdogs roll back, finish or stop the training, or only tell; broken numbers (NaN) are never only told."""
    judge_every: Annotated[int, Field(ge=0)] = 0
    """Iterations between looks of the held-out judge, which ends a training that exploits the evaluator; 0: it never looks."""
    judge_questions: Count = 64
    """Training questions kept aside for its looks."""
    max_grad_norm: Annotated[float, Field(ge=0.0)] = 1.0
    """Gradient norm above which gradients are scaled down; 0: never."""
    checkpoint_every: Count = 5
    """Iterations between checkpoints."""

    @model_validator(mode="after")
    def _learner_can_learn(self) -> PolicyConfig:
        compares = self.learner in ("grpo", "rloo", "raft") or (self.learner == "dpo" and self.pairs == "sampled")
        if compares and self.replies_per_question < 2:
            raise ValueError(f"{self.learner} compares replies to one question; replies_per_question must be at least 2")
        if self.learner == "dpo" and self.minibatch < 2:
            raise ValueError(f"dpo learns from pairs; minibatch counts replies and must be at least 2, got {self.minibatch}")
        return self


class EvaluationConfig(Section):
    """The evidence."""

    questions: Count = 200
    """Test questions answered before and after, and judged by the held-out judge."""
    samples: Count = 12
    """Replies shown side by side on the page."""
    gold_replies: Count = 128
    """Rollouts per policy iteration that are checked against gold for the curve (when the domain has gold)."""


class RunConfig(Section):
    """Everything a run depends on."""

    name: str = "run"
    """Name of the run; the output folder is runs/NAME unless --output says otherwise."""
    model: str = ""
    """Model folder or hub id; a relative path in a recipe is relative to the recipe."""
    templates: str = ""
    """Folder of prompt templates; by default the model's own `templates/`, else the package's."""
    seeds: str = ""
    """Seeds file: JSON lines with a `question`, or plain text with one question a line."""
    domain: str | None = None
    """Name of an installed gold domain (entry point `selfeval.domains`), read by evaluation only."""
    gold: str = ""
    """File of gold answers or labels, read by evaluation only (docs/guides/your-own-data.md); instead of a domain."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of every random choice."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the backbone lives."""
    precision: Literal["auto", "fp32", "bf16", "fp16", "int8", "nf4"] = "auto"
    """Precision of the frozen base, by device and free memory unless given; adapters and heads are always fp32."""
    batch_tokens: Count = 16384
    """Tokens per forward pass when scoring, and per micro-batch when training."""
    checkpointing: bool = False
    """Recompute each layer in the backward pass instead of keeping what it needs: far less memory, about a third more time."""
    rollout_rows: Count = 256
    """Replies generated side by side."""
    memory_budget: Size | None = None
    """Memory that this process may take, such as 2GiB (on a GPU, torch's there); passes shrink to stay within it."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = ()
    """Where curves go besides metrics/*.jsonl; each needs its package: pip install 'self-evaluator[tensorboard]'."""
    context: ContextConfig = ContextConfig()
    placement: PlacementConfig = PlacementConfig()
    lora: LoraConfig = LoraConfig()
    tuning: TuningConfig = TuningConfig()
    questions: QuestionsConfig = QuestionsConfig()
    replies: RepliesConfig = RepliesConfig()
    verdicts: VerdictsConfig = VerdictsConfig()
    pairs: PairsConfig = PairsConfig()
    evaluator: EvaluatorConfig = EvaluatorConfig()
    policy: PolicyConfig = PolicyConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    rounds: Count = 1
    """How often the loop is gone through; each later round starts from the policy of the one before (docs/concepts/loop.md)."""

    @field_validator("name")
    @classmethod
    def _names_a_folder(cls, value: str) -> str:
        if value.strip() in ("", ".", "..") or "/" in value or "\\" in value:
            raise ValueError("is the name of a folder below runs/: some text without / and \\, and neither . nor ..")
        return value

    @field_validator("rounds")
    @classmethod
    def _rounds_move_the_policy(cls, value: int, info: ValidationInfo) -> int:
        policy = info.data.get("policy")
        if value > 1 and policy is not None and policy.learner in ("ilql", "soft_q"):
            raise ValueError(
                f'policy.learner = "{policy.learner}" leaves the policy\'s weights alone, so a later round would start where '
                "the first did; take another learner, or rounds = 1"
            )
        return value


def nearest(name: str, allowed: Sequence[str]) -> str:
    """`; did you mean "x"?` for the closest allowed name, or the list of allowed names when none is close."""
    close = difflib.get_close_matches(name, allowed, n=1, cutoff=0.5)
    return f'; did you mean "{close[0]}"?' if close else f"; allowed: {', '.join(sorted(allowed))}"


def _allowed_at(location: Sequence[str | int]) -> list[str]:
    model: type[BaseModel] = RunConfig
    for part in location:
        found = model.model_fields.get(str(part))
        annotation = found.annotation if found else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return list(model.model_fields)
        model = annotation
    return list(model.model_fields)


_OPTIONS = {
    "trust_remote_code": (
        "a recipe cannot allow a model's own code to run; give the option --trust-remote-code to the command if you trust "
        "that code"
    )
}
"""Former keys that are options of the commands, so that no file can set them."""


def _explain(error: ValidationError, sources: Mapping[str, str], recipe: str) -> ConfigError:
    """One sentence on everything that is wrong, each after the place that it was given at.

    Args:
        error: of pydantic.
        sources: by dotted key, where a value came from that is not the recipe's.
        recipe: the place of all others.
    """
    found: dict[str, list[str]] = {}
    for problem in error.errors():
        found.setdefault(_source(problem["loc"], sources, recipe), []).append(_problem(problem))
    return ConfigError("; ".join(f"{source}: {'; '.join(lines)}" for source, lines in found.items()))


def _problem(problem: Any) -> str:
    key = visible(".".join(str(part) for part in problem["loc"]))
    if key in _OPTIONS:
        return f'unknown key "{key}": {_OPTIONS[key]}'
    if problem["type"] == "extra_forbidden":
        return f'unknown key "{key}"{nearest(str(problem["loc"][-1]), _allowed_at(problem["loc"][:-1]))}'
    try:
        got = json.dumps(problem["input"], default=str)
    except ValueError:  # an integer of thousands of digits
        got = "a number of thousands of digits"
    return f"{key}: got {shortened(got)}; {problem['msg'].removeprefix('Value error, ')}"


def _source(location: Sequence[str | int], sources: Mapping[str, str], recipe: str) -> str:
    """Where the value came from: the longest key that was given and holds the place of the problem, or is held by it."""
    key = ".".join(str(part) for part in location) + "."
    above = [given for given in sources if key.startswith(f"{given}.")]
    below = [given for given in sources if f"{given}.".startswith(key)]
    given = max(above, key=len, default=None) or next(iter(below), None)
    return recipe if given is None else sources[given]


def _parse_value(text: str) -> Any:
    if text in ("", "none"):
        return None
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):  # plain words; or what no field takes, and is refused with its key
        return text


def _override(values: dict[str, Any], assignment: str) -> str:
    """Sets one value; returns its dotted key."""
    key, separator, text = assignment.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"--set {assignment}: expected key=value, for example --set policy.iterations=20")
    *path, last = key.strip().split(".")
    section = values
    for part in path:
        section = section.setdefault(part, {})
        if not isinstance(section, dict):
            raise ConfigError(f'--set {assignment}: "{part}" is a value, not a section')
    section[last] = _parse_value(text.strip())
    return key.strip()


_LARGEST_RECIPE = 1 << 20


def _read_recipe(path: Path) -> dict[str, Any]:
    remedy = "give the path of a .toml recipe"
    text = read_text(path, "recipe", ConfigError, most=_LARGEST_RECIPE, remedy=remedy)
    try:
        values = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # not TOML, an integer of thousands of digits, or nested too deeply
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise ConfigError(f"recipe {path} is not valid TOML: {reason}") from error
    if has_half_character(values):
        raise ConfigError(f"recipe {path} holds half a surrogate pair; write whole characters")
    for place, key in _paths_in(values):
        if _is_there(beside := Path(os.path.realpath(path)).parent / place[key]):
            place[key] = str(beside)
    return values


_PATHS = ("model", "seeds", "templates", "gold", "questions.file", "replies.file", "pairs.file")


def _paths_in(values: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Each path among the values: the section that holds it, and its key there."""
    for dotted in _PATHS:
        *sections, key = dotted.split(".")
        place: Any = values
        for name in sections:
            place = place.get(name) if isinstance(place, dict) else None
        if isinstance(place, dict) and isinstance(place.get(key), str) and place[key]:
            yield place, key


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that no file can have
        return False


_FOLDER_NAME = "the last part of the folder that was given (it names the run)"


def load_config(recipe: Path | None, overrides: Mapping[str, Any], assignments: Sequence[str] = ()) -> RunConfig:
    """The resolved configuration of a run.

    Args:
        recipe: a TOML file, or None for the defaults.
        overrides: top-level values that win over the recipe (from options such as `--model`).
        assignments: `key=value` strings that win over both, keys dotted, values in TOML or plain words.

    Raises:
        ConfigError: a file that is no TOML, an unknown key (with the nearest known one), a value of the wrong type or range.
    """
    values = _read_recipe(recipe) if recipe else {}
    given = {key: value for key, value in overrides.items() if value is not None}
    values.update(given)
    sources = {key: _FOLDER_NAME if key == "name" else f"--{key.replace('_', '-')} {value}" for key, value in given.items()}
    for assignment in assignments:
        sources[_override(values, assignment)] = f"--set {assignment}"
    for place, key in _paths_in(values):
        if _is_there(Path(place[key])):  # the run goes on from wherever the next command is given
            place[key] = os.path.abspath(place[key])
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise _explain(error, sources, f"recipe {recipe}" if recipe else "configuration") from error
