"""The parts of a run on W workers, counted from its configuration, for given costs of a worker.

The counts are those of `selfeval.planner.stage_times`, with the structure that it does not need: shards, batches, steps,
passes, messages. `scale_hardware.py` derives the costs of a worker from data sheets, `scale_costs.py` measures them on this
machine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from scale_formula import Alone, Map, Part, Phase, Training, all_reduce_seconds

from selfeval.config import RunConfig
from selfeval.evaluation.attacks import KINDS
from selfeval.planner.stage_times import Lengths

WAVES = 2
"""Shards per worker: at least two or three (docs/guides/scale.md)."""
_BYTES_PER_TOKEN = (13.5, 4)
"""Bytes of a token of a reply with its log-prob, measured for short replies by `scale_costs.py`, and of a number per token."""


@dataclass(frozen=True)
class Costs:
    """Costs of one worker in seconds, and its connections.

    Attributes:
        step: of a decoding step, whatever the number of rows.
        row: of a row in a decoding step, in addition.
        reading, learning: of a pass without and with gradients, whatever the number of tokens.
        read, learn: of a token in such a pass, in addition.
        optimizer: of an optimizer step, which every worker takes.
        handled: of a reply that every worker receives after each pass over a batch, and of its rewards and advantages.
        driver: of a shard, in the process of the command.
        start: from the start of a process until its model is loaded.
        save: of a checkpoint, with the hash of the weights, whose interval the other workers wait.
        gradients: bytes of the gradients of a role.
        bandwidth, latency: of gradients between workers.
        object_bandwidth, object_latency: of replies and numbers between workers.
        most: tokens of a pass, `backbone.batch_tokens`.
    """

    step: float
    row: float
    reading: float
    read: float
    learning: float
    learn: float
    optimizer: float
    handled: float
    driver: float
    start: float
    save: float
    gradients: float
    bandwidth: float = math.inf
    latency: float = 0.0
    object_bandwidth: float = math.inf
    object_latency: float = 0.0
    most: int = 16384

    def generated(
        self, rows: float, prompt: float, mean: float, limit: float, batch: int, prompts: float | None = None
    ) -> float:
        """Return the time to sample replies: steps x step + tokens x row, and the reading of the prompts.

        With as many places as rows, the steps are those of the longest reply. Otherwise finished rows are replaced, all
        places are busy until the last replies, and the steps are tokens / places + limit - mean.

        Args:
            rows: number of replies.
            prompt, mean, limit: tokens of a prompt, mean and limit of the tokens of a reply.
            batch: places, `backbone.rollout_batch_size`.
            prompts: prompts that are read, if several replies share one.
        """
        if rows <= 0:
            return 0.0
        steps = limit if rows <= batch else rows * mean / batch + limit - mean
        return steps * self.step + rows * mean * self.row + self.passed((rows if prompts is None else prompts) * prompt)

    def passed(self, tokens: float) -> float:
        """Return the time of passes without gradients."""
        return math.ceil(tokens / self.most) * self.reading + tokens * self.read

    def learned(self, tokens: float) -> float:
        """Return the time of passes with gradients."""
        return math.ceil(tokens / self.most) * self.learning + tokens * self.learn

    def reduced(self, workers: int) -> float:
        """Return the time to sum the gradients of a role and to take its step."""
        return self.optimizer + all_reduce_seconds(self.gradients, workers, self.bandwidth, self.latency)

    def gathered(self, size: float, workers: int) -> float:
        """Return the time of a gather: first the sizes, then the objects, W - 1 messages each."""
        if workers == 1:
            return 0.0
        return (workers - 1) / workers * size / self.object_bandwidth + 2 * (workers - 1) * self.object_latency


@dataclass(frozen=True)
class Load:
    """A run: its settings, and the lengths of its texts.

    Attributes:
        kept: share of the sampled questions that the filters keep, and of the verdicts that are kept.
        reference: whether the evaluator reads a reference answer, which is one more reply to every question.
    """

    name: str
    config: RunConfig
    lengths: Lengths
    kept: tuple[float, float] = (1.0, 1.0)
    reference: bool = False

    @property
    def questions(self) -> int:
        return self.config.questions.train + self.config.questions.test

    @property
    def batch(self) -> int:
        return self.config.backbone.rollout_batch_size


def parts_of(load: Load, costs: Costs, workers: int) -> tuple[Part, ...]:
    """Return the parts of a run on W workers, in their order."""
    # A training in one process uses the model of the driver; several workers are started anew for each training.
    trainers = (Alone("start", costs.start),) if workers > 1 else ()
    return (
        Alone("start", 2 * costs.start),
        questions_part(load, costs),
        replies_part(load, costs, workers),
        verdicts_part(load, costs, workers),
        *trainers,
        evaluator_part(load, costs, workers),
        *trainers,
        policy_part(load, costs, workers),
        *trainers,
        # The workers that compute shards were stopped for the trainings.
        Alone("start", costs.start),
        evaluation_part(load, costs, workers),
    )


def questions_part(load: Load, costs: Costs) -> Alone:
    """Return the questions: shard after shard on one worker, because each reads the questions before it."""
    settings, lengths = load.config.questions, load.lengths
    if settings.file:
        return Alone("questions", 0.0)
    samples = load.questions / load.kept[0]
    shards = math.ceil(samples / settings.shard)
    one = costs.generated(samples / shards, lengths.ask, lengths.question, settings.max_new_tokens, load.batch)
    return Alone("questions", shards * (one + costs.driver))


def shards_of(count: int, largest: int, workers: int) -> tuple[int, float]:
    """Return the number of shards, and the mean of their records.

    They have as many records as the settings allow, but there are enough of them for all workers.
    """
    size = max(1, min(largest, math.ceil(count / (WAVES * workers))))
    shards = math.ceil(count / size)
    return shards, count / shards


def replies_part(load: Load, costs: Costs, workers: int) -> Map:
    """Return the sampling of replies to all questions."""
    settings, lengths = load.config.replies, load.lengths
    shards, size = shards_of(load.questions, settings.shard, workers)
    rows = size * (settings.per_question + load.reference)
    one = costs.generated(rows, lengths.reply_prompt, lengths.reply, settings.longest, load.batch, prompts=size)
    return Map("replies", shards, one, costs.driver)


def verdicts_part(load: Load, costs: Costs, workers: int) -> Map:
    """Return the judge's verdicts in both orders, with a chain of thought."""
    settings, lengths = load.config.verdicts, load.lengths
    shards, size = shards_of(load.questions, settings.shard, workers)
    one = costs.generated(2 * size, lengths.judge, lengths.reasoning, settings.max_new_tokens, load.batch)
    return Map("verdicts", shards, one, costs.driver)


def evaluator_part(load: Load, costs: Costs, workers: int) -> Training:
    """Return the training of one evaluator on pairs. A pair is not cut, so a step has at most `evaluator.batch` shares."""
    settings, lengths = load.config.evaluator, load.lengths
    pairs = load.config.questions.train * (1 - settings.held_out) * load.kept[1]
    share = math.ceil(settings.batch / workers)
    # The replies of a pair share the pass of their prompt.
    learned = costs.learned(share * (lengths.grade + 2 * lengths.reply))
    common = costs.reduced(workers) + costs.gathered(100.0 * settings.batch, workers)
    steps = settings.epochs * math.ceil(pairs / settings.batch)
    return Training("evaluator", steps, (Phase(learned, common),), settings.checkpoint_every, costs.save)


def policy_part(load: Load, costs: Costs, workers: int) -> Training:
    """Return the iterations of PPO: sample, three passes of scores, then the steps of policy and critic."""
    policy, lengths = load.config.policy, load.lengths
    batch = policy.questions_per_iteration * policy.replies_per_question
    # The reference reads the prompt of a reply; evaluator and critic read that of a grade.
    own, graded = lengths.reply_prompt, lengths.grade
    updates = (_update(load, costs, own, workers), _update(load, costs, graded, workers))
    phases = (
        _sampling(load, costs, batch, workers),
        *(_scoring(load, costs, prompt, batch, workers) for prompt in (own, graded, graded)),
        *updates * (policy.epochs * math.ceil(batch / policy.minibatch)),
    )
    # The two trained roles are saved.
    return Training("policy", policy.iterations, phases, policy.checkpoint_every, 2 * costs.save)


def _sampling(load: Load, costs: Costs, batch: int, workers: int) -> Phase:
    lengths, group = load.lengths, load.config.policy.replies_per_question
    rows = math.ceil(batch / workers)
    sampled = costs.generated(
        rows, lengths.reply_prompt, lengths.reply, load.config.replies.longest, load.batch, prompts=math.ceil(rows / group)
    )
    return Phase(sampled, costs.gathered(_BYTES_PER_TOKEN[0] * batch * lengths.reply, workers) + batch * costs.handled)


def _scoring(load: Load, costs: Costs, prompt: float, batch: int, workers: int) -> Phase:
    tokens = _shared(load, prompt, math.ceil(batch / workers))
    return Phase(costs.passed(tokens), costs.gathered(_BYTES_PER_TOKEN[1] * batch * load.lengths.reply, workers))


def _update(load: Load, costs: Costs, prompt: float, workers: int) -> Phase:
    tokens = _shared(load, prompt, math.ceil(load.config.policy.minibatch / workers))
    return Phase(costs.learned(tokens), costs.reduced(workers) + costs.gathered(100.0 * workers, workers))


def _shared(load: Load, prompt: float, rows: int) -> float:
    """Return the tokens of replies; those to a question share its prompt (docs/concepts/speed.md#shared-prompts)."""
    return math.ceil(rows / load.config.policy.replies_per_question) * prompt + rows * load.lengths.reply


def evaluation_part(load: Load, costs: Costs, workers: int) -> Map:
    """Return the evaluation: replies after training, verdicts and scores of replies before and after, and attack replies.

    Its batches are of replies, of verdicts or of scores; the mean of all is taken here.
    """
    settings, lengths = load.config.evaluation, load.lengths
    questions = min(settings.questions, load.config.questions.test)
    batches, size = shards_of(questions, load.config.verdicts.shard, workers)
    sampled = costs.generated(size, lengths.reply_prompt, lengths.reply, load.config.replies.longest, load.batch)
    sampled += costs.passed(size * (lengths.reply_prompt + lengths.reply))  # log-probs under the start
    limit = load.config.verdicts.max_new_tokens
    judged = costs.generated(2 * size, lengths.judge, lengths.reasoning, limit, load.batch)
    scored = (2 * questions + _attacked(load) + 2 * load.config.questions.test) / batches
    one = sampled + judged + costs.passed(scored * (lengths.grade + lengths.reply))
    return Map("evaluation", batches, one, 3 * costs.driver)


def _attacked(load: Load) -> int:
    return min(load.config.evaluation.attacks, load.config.questions.test) * (1 + len(KINDS))
