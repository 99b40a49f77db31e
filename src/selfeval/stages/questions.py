"""questions: the model writes new questions in the domain of the seeds; near-duplicates and junk are dropped.

`quality/question_filters.py` detects junk. Every drop is recorded with its reason in dropped/questions/.

In a later round, the previous round's policy writes new training questions. All rounds use the test questions of round 1, so
rounds can be compared and no test question is ever trained on.

Every accepted question is assigned to the training or the test split at random, by the run's seed. The near-duplicate check
covers both splits, so no question has a near-duplicate in the other one. A prompt's examples are seeds and training questions
only.

With a file of questions, replies or pairs (`stages/given.py`) the model writes no questions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from selfeval.config import QuestionsConfig
from selfeval.errors import LoopError
from selfeval.judging.coverage import check_seeds
from selfeval.judging.sources import fixed_text
from selfeval.judging.templates import Templates, templates_folder
from selfeval.prompt import Prompt
from selfeval.quality.dedupe import NearDuplicates, normalise
from selfeval.quality.question_filters import QuestionFilters
from selfeval.records import Drop, Question, Split
from selfeval.rollout.engine import generate
from selfeval.rollout.requests import Request, Rollout
from selfeval.stages.context import Context
from selfeval.stages.draws import Draws
from selfeval.stages.given import Given
from selfeval.stages.shards import Batch, ModelHandle, ShardOutput, StageShards, counting, grow_shards

__all__ = ["WriteQuestions", "run"]

_CHECKED = 1000
"""Number of seeds checked for whether the tokenizer can represent them."""

_FEWEST_AT_ONCE = 16
"""Minimum number of samples per batch; fewer do not fill it."""


@dataclass(frozen=True)
class WriteQuestions:
    """Work of the stage: sample a shard, and accept or drop each sample, given the questions accepted so far.

    Attributes:
        config: settings of the stage.
        batch_size: batch size of the sampling.
        draws: random numbers of the round.
        seeds: the user's seed questions.
        instruction: the fixed text of the prompt, which is not a question.
        round: number of the round. Default: 1.
        earlier: questions of earlier rounds. Default: none.
        fixed: questions that are the first shard as they are: those of the user's file, and in a later round the test questions
            of round 1. Default: none.
        dropped: drops of the first shard. Default: none.
    """

    config: QuestionsConfig
    batch_size: int
    draws: Draws
    seeds: tuple[str, ...]
    instruction: str
    round: int = 1
    earlier: tuple[Question, ...] = ()
    fixed: tuple[Question, ...] = ()
    dropped: tuple[Drop, ...] = ()

    def fixed_in(self, split: Split) -> int:
        return sum(question.split == split for question in self.fixed)

    @property
    def wanted_tests(self) -> int:
        return max(self.config.test, self.fixed_in(Split.TEST)) if self.round == 1 else self.fixed_in(Split.TEST)

    @property
    def wanted_train(self) -> int:
        return max(self.config.train, self.fixed_in(Split.TRAIN))

    @property
    def wanted(self) -> int:
        return self.wanted_train + self.wanted_tests

    def __call__(self, model: ModelHandle, batch: Batch[Question]) -> ShardOutput:
        """Sample a shard, or as much of it as is needed. The samples do not depend on how many of them are needed."""
        if self.fixed and not batch.index:
            return ShardOutput(self.fixed, self.dropped)
        acceptance, requests, sampled = _Acceptance(self, batch.records), self._requests(model, batch), 0
        outcomes: list[Question | Drop | None] = []
        while len(acceptance.accepted) < self.wanted:
            # Sample 50% more than needed, because some are dropped; doubling the total bounds the number of batches.
            needed = (self.wanted - len(acceptance.accepted)) * 3 // 2
            asked = list(islice(requests, max(needed, _FEWEST_AT_ONCE, sampled)))
            if not asked:
                break
            # Judged in the order of the samples: whether one is a near-duplicate depends on those before it.
            tell = self._told(model.tell, len(batch.records), len(acceptance.accepted), len(asked))
            outcomes += [acceptance.consider(sample) for sample in self._samples(model, batch.index, sampled, asked, tell)]
            sampled += len(asked)
        return ShardOutput([o for o in outcomes if isinstance(o, Question)], [o for o in outcomes if isinstance(o, Drop)])

    def _requests(self, model: ModelHandle, batch: Batch[Question]) -> Iterator[Request]:
        """Yield a shard of prompts, each with its own examples: some seeds, the rest training questions of earlier shards."""
        config, rng = self.config, self.draws.random("questions", batch.index)
        # Without a file of seeds, training questions of the user's file are the seeds.
        pool = [q.opening for q in batch.records if q.split == Split.TRAIN and q.opening not in self.seeds]
        for _ in range(config.shard):
            # The first shard has no questions yet, and its prompts show seeds only.
            from_pool = min(len(pool), max(0, config.examples - config.seed_examples))
            from_seeds = min(len(self.seeds), config.examples - from_pool)
            examples = rng.sample(self.seeds, from_seeds) + rng.sample(pool, from_pool)
            rng.shuffle(examples)
            yield Request(model.templates.prompt("ask", examples=examples), config.temperature, config.top_p)

    def _told(self, tell: Callable[[float], None], before: int, now: int, asked: int) -> Callable[[int], None]:
        """Return a callback that counts samples and reports the share of the missing questions, as if most were good.

        Args:
            tell: receives the share.
            before: number of questions before the shard.
            now: number of questions before these samples.
            asked: number of samples.
        """
        missing = self.wanted - before
        return counting(lambda share: tell((now - before + share * min(self.wanted - now, asked)) / missing), asked)

    def _samples(
        self, model: ModelHandle, shard: int, first: int, requests: list[Request], advance: Callable[[int], None]
    ) -> list[_Sample]:
        """Return consecutive samples of a shard, starting at number `first`."""
        templates = model.templates
        with model.backbone.acting_as(model.start()):
            rollouts = generate(
                model.backbone,
                requests,
                max_new_tokens=self.config.max_new_tokens,
                seed=self.draws.seed("questions", shard),
                batch_size=self.batch_size,
                stop=templates.ask_stop_ids,
                first=first,
                advance=advance,
            )
        return [_sample(templates, r, request.prompt) for r, request in zip(rollouts, requests, strict=True)]


class _Sample(NamedTuple):
    """A text in place of a question; whether it is complete, and whether it is nothing but reasoning."""

    text: str
    finished: bool
    is_reasoning: bool = False


def _sample(templates: Templates, rollout: Rollout, prompt: Prompt) -> _Sample:
    finished, question = rollout.finished or templates.has_stop(rollout.ids), templates.question_from(rollout.ids, prompt)
    if question is None:
        return _Sample(templates.text(rollout.ids), finished, is_reasoning=True)
    return _Sample(question, finished)


class _Acceptance:
    """Decides, sample by sample and in order, which samples become questions.

    Args:
        work: settings, seeds, and questions of earlier rounds.
        accepted: questions of this round so far.
    """

    def __init__(self, work: WriteQuestions, accepted: Sequence[Question]) -> None:
        self._work, self.config = work, work.config
        self.index = NearDuplicates(self.config.near_duplicate)
        self.filters = QuestionFilters.of(work.seeds, work.instruction)
        self.accepted: list[Question] = []
        self._counts: Counter[Split] = Counter()
        self._prefix = "q" if work.round == 1 else f"r{work.round}q"
        # A question that copies a seed, or one of an earlier round, is a near-duplicate too.
        for number, seed in enumerate(work.seeds):
            self.index.add(f"seed-{number}", seed)
        for question in work.earlier:
            self.index.add(question.id, question.text)
        for question in accepted:
            self._accept(question)

    def consider(self, sample: _Sample) -> Question | Drop | None:
        """Return the accepted question, the drop, or None if there are enough questions already."""
        text = sample.text
        if len(self.accepted) >= self._work.wanted:
            return None
        if not sample.finished:
            # Checked first: the other filters expect a whole question.
            return Drop("questions", "unfinished", text)
        if reason := "thinking" if sample.is_reasoning else self._junk(text):
            return Drop("questions", reason, text)
        twin = self.index.find(text)
        if twin is not None:
            return Drop("questions", "near_duplicate", text, {"of": twin})
        # The number is that of the accepted question, so ids have no gaps.
        return self._accept(Question(f"{self._prefix}{len(self.accepted):06d}", text, self._split(), "self"))

    def _junk(self, text: str) -> str | None:
        if len(normalise(text)) < self.config.shortest:
            return "too_short"
        return self.filters.reason(text)

    def _split(self) -> Split:
        """Draw train or test at random, in the requested proportion, until one of them is full."""
        if self._counts[Split.TEST] >= self._work.wanted_tests:
            return Split.TRAIN
        if self._counts[Split.TRAIN] >= self._work.wanted_train:
            return Split.TEST
        draw = self._work.draws.random("split", len(self.accepted)).random()
        # The proportion among the questions to generate, because the fixed ones have their splits already.
        tests = self._work.wanted_tests - self._work.fixed_in(Split.TEST)
        return Split.TEST if draw < tests / (self._work.wanted - len(self._work.fixed)) else Split.TRAIN

    def _accept(self, question: Question) -> Question:
        self.index.add(question.id, question.text)
        self.accepted.append(question)
        self._counts[question.split] += 1
        return question


def run(context: Context) -> dict[str, int]:
    """Write questions until there are enough; return counts.

    Raises:
        LoopError: far too few samples are usable.
        SeedsError: the model's tokenizer cannot represent the seeds.
    """
    if context.given and not context.config.questions.extend:
        return _take_given(context, context.given)
    if context.round == 1:
        _check_seeds(context)
    config, work = context.config.questions, _work(context)
    shards = StageShards(context.store, context.terminal, "questions", drops=True)
    # A limit on the samples, for a model that writes hardly any usable question.
    most = int(config.attempts * work.wanted / config.shard) + 1
    questions = grow_shards(shards, Question, work, context.executor, wanted=work.wanted, most=most)
    return _counts(context, questions, work.wanted)


def _work(context: Context) -> WriteQuestions:
    config = context.config
    earlier = [store.read("questions", Question) for store in context.earlier]
    fixed, dropped = (context.given.questions, context.given.dropped) if context.given else ((), ())
    if earlier:
        fixed, dropped = tuple(q for q in earlier[0] if q.split == Split.TEST or q.source == "file"), ()
    return WriteQuestions(
        config.questions,
        config.backbone.rollout_batch_size,
        context.draws,
        tuple(seed.question for seed in context.seeds),
        fixed_text(templates_folder(config.model, config.templates), "ask"),
        context.round,
        tuple(question for questions in earlier for question in questions),
        fixed,
        dropped,
    )


def _check_seeds(context: Context) -> None:
    seeds = [seed.question for seed in context.seeds[:_CHECKED]]
    if note := check_seeds(context.templates.tokenizer, seeds, context.config.model or "the model"):
        context.terminal.note(note)


def _take_given(context: Context, given: Given) -> dict[str, int]:
    """Take the questions of the user's file. Every round has the same ones."""
    context.store.write_shard("questions", 0, given.questions, given.dropped)
    train = sum(q.split == Split.TRAIN for q in given.questions)
    drops = Counter(d.reason for d in given.dropped)
    return {"train": train, "test": len(given.questions) - train, **{f"dropped_{k}": v for k, v in sorted(drops.items())}}


def _counts(context: Context, questions: Sequence[Question], wanted: int) -> dict[str, int]:
    config = context.config.questions
    train = sum(q.split == Split.TRAIN for q in questions)
    drops = Counter(d.reason for d in context.store.read_dropped("questions"))
    # Fewer than a tenth is a failure of the prompt or the seeds; more is reported, and the run continues.
    if train < 2 or train < config.train // 10:
        seen = ", ".join(f"{reason} {count}" for reason, count in drops.most_common()) or "none"
        raise LoopError(
            f"the model generated only {len(questions)} usable questions out of {wanted} (dropped: {seen}). Use more varied "
            "seeds, "
            "raise questions.attempts or questions.max_new_tokens, or lower questions.train and questions.test"
        )
    if len(questions) < wanted:
        context.terminal.note(f"questions: {len(questions)} of {wanted} wanted; continuing with these")
    return {"train": train, "test": len(questions) - train, **{f"dropped_{k}": v for k, v in sorted(drops.items())}}
