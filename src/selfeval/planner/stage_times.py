"""Estimate how long each stage of a run takes: tokens that its settings ask for, times seconds per token on this machine.

A probe samples a few replies to the seeds, scores them and computes a gradient on them. It measures three rates, in seconds per
token: writing (sampling), reading (a forward pass) and learning (a forward and a backward pass). Lengths that the probe cannot
know are the measured length of its replies; a reply that it cut off counts with the limit of the run.

For a stage with W tokens written, R read and L learned:

    seconds = W * write + R * read + L * learn

Loading the model, drops of questions that are sampled in vain, checkpoints and the report are not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

from selfeval.backbone.logprobs import token_logprobs
from selfeval.backbone.roles import Backbone
from selfeval.backbone.sequences import pad_sequences, reply_hidden, reply_logprobs
from selfeval.config import AgreementConfig, CombinedConfig, MemberInput, RunConfig, VerdictsConfig, judge_spec
from selfeval.errors import ModelError
from selfeval.evaluation.attacks import KINDS
from selfeval.judging.kinds import kinds_of_run
from selfeval.judging.steps import split_steps
from selfeval.judging.templates import Templates, templates_folder
from selfeval.prompt import Prompt
from selfeval.rollout.engine import generate
from selfeval.rollout.requests import Request, Rollout
from selfeval.stages.given import read_given
from selfeval.stages.seeds import asks_seeds, seeds_of
from selfeval.training.gradient_accumulation import add_gradients

__all__ = ["Lengths", "Probe", "RunTime", "StageTime", "Tokens", "estimate", "probe_speed", "stage_tokens", "time_of_run"]

_ROLE = "probe"
_MOST_REPLIES, _MOST_TOKENS, _ROWS = 512, 128, 16
"""The probe's replies and tokens of each, and the sequences of its gradient."""
_SECONDS = 15.0
"""Time for its replies. If it is too short for whole replies, they are cut off."""


@dataclass(frozen=True)
class Tokens:
    """Tokens of a stage.

    Attributes:
        written: sampled, one at a time.
        read: of forward passes.
        learned: of forward and backward passes.
    """

    written: float = 0.0
    read: float = 0.0
    learned: float = 0.0


@dataclass(frozen=True)
class Lengths:
    """Mean lengths in tokens.

    Attributes:
        ask, reply_prompt, grade, judge: prompts of questions, replies, evaluator and judge; that of the judge with its replies.
        grade_alone: prompt of the evaluator without the reference answer.
        question, reply, reasoning: what the model writes; the judge's chain of thought is as long as a reply unless its limit
            is lower.
        steps: number of steps of a reply; 0 if the stage steps is off.
    """

    ask: float
    reply_prompt: float
    grade: float
    grade_alone: float
    judge: float
    question: float
    reply: float
    reasoning: float
    steps: float = 0.0


@dataclass(frozen=True)
class Probe:
    """Measured rates in seconds per token, and lengths.

    Attributes:
        write, read, learn: see the module.
        unfinished: share of the replies that the probe cut off, whose length is therefore the limit.
        lengths: mean lengths.
    """

    write: float
    read: float
    learn: float
    unfinished: float
    lengths: Lengths


@dataclass(frozen=True)
class StageTime:
    """Estimated time of a stage: its tokens, and seconds."""

    stage: str
    tokens: Tokens
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """Return the values with tokens rounded to whole numbers and seconds to tenths."""
        tokens = {name: round(getattr(self.tokens, name)) for name in ("written", "read", "learned")}
        return {"stage": self.stage, "tokens": tokens, "seconds": round(self.seconds, 1)}


@dataclass(frozen=True)
class RunTime:
    """Estimated time of a run: what the probe measured, and the stages."""

    probe: Probe
    stages: tuple[StageTime, ...]

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    def as_json(self) -> dict[str, Any]:
        probe = self.probe
        rates = {name: getattr(probe, name) for name in ("write", "read", "learn")}
        return {
            "seconds_per_token": rates,
            "unfinished": probe.unfinished,
            "lengths": asdict(probe.lengths),
            "stages": [stage.as_json() for stage in self.stages],
            "seconds": round(self.seconds, 1),
        }


def estimate(config: RunConfig, report_progress: Callable[[str], None] = lambda text: None) -> RunTime:
    """Load the model, measure its speed, and return the time of each stage of one round.

    Args:
        config: configuration of the run, with the sizes that fit.
        report_progress: called with the current step.

    Raises:
        InputError: the model or the seeds cannot be used.
    """
    if not config.model:
        raise ModelError("no model was given; use --model with a model folder")
    report_progress(f"loading {config.model}")
    backbone = Backbone.load(config.model, config.backbone)
    folder = templates_folder(config.model, config.templates)
    chat = config.chat
    templates = Templates.load(
        folder,
        backbone.loaded.tokenizer,
        kinds=kinds_of_run(config.verdicts),
        arguments=chat.arguments,
        system=chat.system,
        rubric=config.verdicts.rubric,
    )
    report_progress("sampling, scoring and learning a few replies")
    return time_of_run(backbone, templates, config)


def time_of_run(backbone: Backbone, templates: Templates, config: RunConfig) -> RunTime:
    """Measure the speed of a loaded model, and return the time of each stage of one round; see `estimate`."""
    probe = probe_speed(backbone, templates, config)
    layers = backbone.model.config.get_text_config().num_hidden_layers
    tokens = stage_tokens(config, probe.lengths, reference=templates.grades_with_reference_answer, layers=layers)
    return RunTime(probe, tuple(StageTime(name, found, _seconds(probe, found)) for name, found in tokens.items()))


def _seconds(probe: Probe, tokens: Tokens) -> float:
    return tokens.written * probe.write + tokens.read * probe.read + tokens.learned * probe.learn


# -- the probe ----------------------------------------------------------------------------------------------------------


def probe_speed(backbone: Backbone, templates: Templates, config: RunConfig) -> Probe:
    """Measure the rates with replies to the seeds; a first, small round is not timed, because it sets things up."""
    questions = _questions(config)
    prompts = [templates.prompt("reply", question=questions[n % len(questions)]) for n in range(_MOST_REPLIES)]
    prompts = prompts[: config.backbone.rollout_batch_size]
    backbone.roles.add(_ROLE)
    with backbone.acting_as(_ROLE):
        _sample(backbone, prompts[:2], 2, config)
        _, two_steps = _timed(lambda: _sample(backbone, prompts, 2, config))
        limit = max(2, min(_MOST_TOKENS, config.replies.longest, int(2 * _SECONDS / two_steps)))
        rollouts, writing = _timed(lambda: _sample(backbone, prompts, limit, config))
        replies = [rollout.ids or (backbone.loaded.pad_id,) for rollout in rollouts]
        budget = config.backbone.batch_tokens
        reply_logprobs(backbone, prompts[:1], replies[:1], batch_tokens=budget)
        _, reading = _timed(lambda: reply_logprobs(backbone, prompts, replies, batch_tokens=budget))
        _learn(backbone, prompts[:1], replies[:1])
        _, learning = _timed(lambda: _learn(backbone, prompts[:_ROWS], replies[:_ROWS]))
    backbone.roles.remove(_ROLE)
    sizes = [len(prompt.ids) + len(reply) for prompt, reply in zip(prompts, replies, strict=True)]
    # The prompts of the samples are read before the first token; their time is small and is part of the rate of writing.
    return Probe(
        write=writing / sum(map(len, replies)),
        read=reading / sum(sizes),
        learn=learning / sum(sizes[:_ROWS]),
        unfinished=sum(not rollout.finished for rollout in rollouts) / len(rollouts),
        lengths=_lengths(templates, config, questions, rollouts),
    )


def _questions(config: RunConfig) -> list[str]:
    given = read_given(config)
    found = [seed.question for seed in seeds_of(config, given)]
    if given is not None and (not found or asks_seeds(config)):  # with their passages
        found = [question.text for question in given.questions]
    return found[:_MOST_REPLIES]


def _sample(backbone: Backbone, prompts: Sequence[Prompt], limit: int, config: RunConfig) -> list[Rollout]:
    requests = [Request(prompt, config.evaluation.temperature, config.evaluation.top_p) for prompt in prompts]
    return generate(backbone, requests, max_new_tokens=limit, seed=0, batch_size=len(prompts))


def _learn(backbone: Backbone, prompts: Sequence[Prompt], replies: Sequence[Sequence[int]]) -> None:
    batch = pad_sequences(backbone, prompts, replies)
    found = token_logprobs(backbone, reply_hidden(backbone, batch), batch.reply_BR, batch.mask_BR)
    trained = list(backbone.roles.parameters(_ROLE).values())
    add_gradients(-found.logprobs.sum(), trained)
    for parameter in trained:
        parameter.grad = None


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = perf_counter()
    return work(), perf_counter() - start


def _lengths(templates: Templates, config: RunConfig, questions: Sequence[str], rollouts: Sequence[Rollout]) -> Lengths:
    reply = _mean([len(rollout.ids) if rollout.finished else config.replies.longest for rollout in rollouts])
    question = _mean([len(templates.tokenizer.encode(text, add_special_tokens=False)) for text in questions])
    grade = {"reference_answer": ""} if templates.grades_with_reference_answer else {}
    reference = reply if templates.grades_with_reference_answer else 0.0

    def prompt(kind: str, **values: Any) -> float:
        return _mean([len(templates.prompt(kind, **({"question": text} | values)).ids) for text in questions])

    examples = questions[: config.questions.examples]
    return Lengths(
        ask=len(templates.prompt("ask", examples=examples).ids),
        reply_prompt=prompt("reply"),
        grade=prompt("grade", **grade) + reference,
        grade_alone=prompt("grade", **grade),
        judge=prompt("referee", first="", second="") + 2 * reply,
        question=question,
        reply=reply,
        reasoning=min(reply, config.verdicts.max_new_tokens) if config.verdicts.reasoning else 1.0,
        steps=_steps(templates, config, rollouts) if config.steps.enabled else 0.0,
    )


def _steps(templates: Templates, config: RunConfig, rollouts: Sequence[Rollout]) -> float:
    texts = [templates.tokenizer.decode(list(rollout.ids), skip_special_tokens=True) for rollout in rollouts]
    return _mean([len(split_steps(text, config.steps.form)) for text in texts])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


# -- tokens of each stage -----------------------------------------------------------------------------------------------


def stage_tokens(config: RunConfig, lengths: Lengths, *, reference: bool, layers: int) -> dict[str, Tokens]:
    """Return the tokens of each stage that the settings of one round ask for.

    Args:
        config: configuration of the run.
        lengths: mean lengths.
        reference: whether evaluator and critic read a reference answer of the model.
        layers: number of layers of the model.
    """
    return {
        "questions": _of_questions(config, lengths),
        "replies": _of_replies(config, lengths, reference),
        "verdicts": _of_verdicts(config, lengths),
        "evaluator": _of_evaluator(config, lengths, layers),
        **({"steps": _of_steps(config, lengths)} if config.steps.enabled else {}),
        "policy": _of_policy(config, lengths, layers),
        "evaluation": _of_evaluation(config, lengths, layers),
    }


def _of_questions(config: RunConfig, lengths: Lengths) -> Tokens:
    count = config.questions.train + config.questions.test
    if _is_given(config) and not config.questions.extend:
        return Tokens()
    return Tokens(written=count * lengths.question, read=count * lengths.ask)


def _of_replies(config: RunConfig, lengths: Lengths, reference: bool) -> Tokens:
    if config.replies.file or config.pairs.file:
        return Tokens()
    replies = (config.questions.train + config.questions.test) * (config.replies.per_question + reference)
    return Tokens(written=replies * lengths.reply, read=replies * lengths.reply_prompt)


def _of_verdicts(config: RunConfig, lengths: Lengths) -> Tokens:
    pairs = config.questions.train + config.questions.test
    if config.pairs.file or judge_spec("judge", config.verdicts.judge).is_remote:
        return Tokens()
    combined = config.verdicts.settings
    # The first pairs are judged twice by a combined judge.
    judged = pairs + (min(combined.pairs, pairs) if isinstance(combined, CombinedConfig) else 0)
    found = [_of_judge(member, judged, lengths) for member in config.verdicts.members]
    return Tokens(written=sum(tokens.written for tokens in found), read=sum(tokens.read for tokens in found))


def _of_judge(verdicts: VerdictsConfig, pairs: int, lengths: Lengths) -> Tokens:
    if isinstance(verdicts.settings, AgreementConfig):
        votes = pairs * verdicts.settings.votes
        return Tokens(written=votes * lengths.reply, read=votes * lengths.reply_prompt)
    # Two prompts a pair: both orders, or both replies. `lengths.judge` is that of a prompt with two replies.
    prompt = lengths.judge - (2 - judge_spec("judge", verdicts.judge).replies_per_prompt) * lengths.reply
    # The votes on a prompt share the reading of it.
    return Tokens(written=2 * pairs * verdicts.votes * lengths.reasoning, read=2 * pairs * prompt)


def _scored(config: RunConfig, lengths: Lengths, layers: int) -> float:
    """Return the tokens that the members read to score a reply; those of a pass of half the layers count half."""
    inputs = [config.evaluator.input_of(member) for member in range(config.evaluator.members)]
    return sum(_layer_share(read, layers) * (_grade(read, lengths) + lengths.reply) for read in inputs)


def _grade(read: MemberInput, lengths: Lengths) -> float:
    return lengths.grade if read.reference_answer else lengths.grade_alone


def _layer_share(read: MemberInput, layers: int) -> float:
    return 1.0 if read.layer is None else read.layer / layers


def _of_evaluator(config: RunConfig, lengths: Lengths, layers: int) -> Tokens:
    # As if every verdict were kept; two sequences a pair.
    sequences = 2 * _scored(config, lengths, layers)
    settings = config.evaluator
    pairs = config.questions.train * (1 - settings.held_out) * (1 + settings.mismatched + settings.attacks) * settings.bag
    trained = pairs * settings.epochs
    return Tokens(read=config.questions.test * sequences, learned=trained * sequences)


def _of_steps(config: RunConfig, lengths: Lengths) -> Tokens:
    settings = config.steps
    questions = min(settings.questions, config.questions.train)
    replies, votes = questions * config.replies.per_question, questions * settings.votes
    # Completions start at the end of every step except the last; half of the reply is left on average.
    completions = replies * max(0.0, lengths.steps - 1.0) * settings.completions
    sequence = lengths.grade + lengths.reply
    return Tokens(
        written=(votes + completions / 2) * lengths.reply,
        read=votes * lengths.reply_prompt + completions * (lengths.reply_prompt + lengths.reply / 2),
        learned=replies * settings.epochs * sequence,
    )


def _of_policy(config: RunConfig, lengths: Lengths, layers: int) -> Tokens:
    policy, has_critic = config.policy, "critic" in config.policy.spec.extra_roles
    replies = policy.iterations * policy.questions_per_iteration * policy.replies_per_question
    own = lengths.reply_prompt + lengths.reply
    # The critic is a copy of the first evaluator, so it has as many layers; it reads the whole grade prompt.
    graded = has_critic * _layer_share(config.evaluator.input_of(0), layers) * (lengths.grade + lengths.reply)
    stepped = (policy.steps != "off") * (lengths.grade + lengths.reply)
    # The reference, the evaluators, the evaluator of steps, the critic's values.
    read = own + _scored(config, lengths, layers) + stepped + graded
    learned = policy.epochs * (own + graded)
    return Tokens(written=replies * lengths.reply, read=replies * (lengths.reply_prompt + read), learned=replies * learned)


def _of_evaluation(config: RunConfig, lengths: Lengths, layers: int) -> Tokens:
    questions = min(config.evaluation.questions, config.questions.test)
    # Replies before and after, their scores, and the referee's verdicts on them in both orders.
    is_local = config.evaluation.referee is None
    written = questions * 2 * (lengths.reply + is_local * lengths.reasoning)
    read = questions * 2 * (lengths.reply_prompt + is_local * lengths.judge + _scored(config, lengths, layers))
    # An ordinary reply and one of each kind of attack, as if all were of a reply's length.
    attacked = min(config.evaluation.attacks, config.questions.test) * (1 + len(KINDS))
    read += attacked * _scored(config, lengths, layers)
    return Tokens(written=written, read=read)


def _is_given(config: RunConfig) -> bool:
    return bool(config.questions.file or config.replies.file or config.pairs.file)
