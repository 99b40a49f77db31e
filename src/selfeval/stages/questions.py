"""questions: the model writes new questions in the domain of the seeds; near-duplicates and junk are dropped.

`quality/question_filters.py` detects junk. Every drop is recorded with its reason in dropped/questions/. On request, questions
outside the domain of the seeds and paraphrases are dropped too, and the examples cover all topics (`question_meaning.py`).

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
from selfeval.quality.dedupe import normalise
from selfeval.quality.embeddings import Embedder
from selfeval.quality.embeddings.plain import plain_embedder
from selfeval.quality.minhash import duplicate_index
from selfeval.quality.question_filters import QuestionFilters
from selfeval.quality.vector_groups import VectorGroups
from selfeval.records import Drop, Question, Split
from selfeval.rollout.engine import generate
from selfeval.rollout.requests import Request, Rollout
from selfeval.stages.context import Context
from selfeval.stages.draws import Draws
from selfeval.stages.given import Given
from selfeval.stages.question_meaning import Meaning, MeaningGroup, compares_meaning, draw_from_topics, topic_weights
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
        batch_tokens: maximum tokens of a pass that computes vectors. Default: 16,384.
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
    batch_tokens: int = 16_384

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
        embedder = self._embedder(model)
        acceptance = _Acceptance(self, batch.records, embedder, model.vectors)
        requests, sampled = self._requests(model, batch, embedder), 0
        outcomes: list[Question | Drop | None] = []
        while len(acceptance.accepted) < self.wanted:
            # Sample 50% more than needed, because some are dropped; doubling the total bounds the number of batches.
            needed = (self.wanted - len(acceptance.accepted)) * 3 // 2
            asked = list(islice(requests, max(needed, _FEWEST_AT_ONCE, sampled)))
            if not asked:
                break
            # Judged in the order of the samples: whether one is a near-duplicate depends on those before it.
            advance = self._counting(model.report_progress, len(batch.records), len(acceptance.accepted), len(asked))
            outcomes += acceptance.consider_all(self._samples(model, batch.index, sampled, asked, advance))
            sampled += len(asked)
        return ShardOutput([o for o in outcomes if isinstance(o, Question)], [o for o in outcomes if isinstance(o, Drop)])

    def _embedder(self, model: ModelHandle) -> Embedder | None:
        """Return what computes vectors, if a filter or the examples need any."""
        if not compares_meaning(self.config) and not self.config.coverage:
            return None
        return plain_embedder(model.backbone, model.start(), batch_tokens=self.batch_tokens)

    def _requests(self, model: ModelHandle, batch: Batch[Question], embedder: Embedder | None) -> Iterator[Request]:
        """Yield a shard of prompts, each with its own examples: some seeds, the rest training questions of earlier shards."""
        config, rng = self.config, self.draws.random("questions", batch.index)
        # Without a file of seeds, training questions of the user's file are the seeds.
        pool = [q.opening for q in batch.records if q.split == Split.TRAIN and q.opening not in self.seeds]
        by_topic: list[list[float]] | list[None] = [None, None]
        if config.coverage and embedder is not None and pool:
            by_topic = self._by_topic(model, batch, embedder, pool)
        for _ in range(config.shard):
            # The first shard has no questions yet, and its prompts show seeds only.
            from_pool = min(len(pool), max(0, config.examples - config.seed_examples))
            from_seeds = min(len(self.seeds), config.examples - from_pool)
            examples = draw_from_topics(rng, self.seeds, by_topic[0], from_seeds)
            examples += draw_from_topics(rng, pool, by_topic[1], from_pool)
            rng.shuffle(examples)
            yield Request(model.templates.prompt("ask", examples=examples), config.temperature, config.top_p)

    def _by_topic(
        self, model: ModelHandle, batch: Batch[Question], embedder: Embedder, pool: Sequence[str]
    ) -> list[list[float]]:
        """Return weights of the seeds and of the questions of the pool, with which each topic is drawn equally often."""
        # All questions in order, because the filters use the vectors of the same groups.
        openings = [question.opening for question in batch.records]
        rows = {opening: row for row, opening in enumerate(openings)}
        vectors = model.vectors.embed(embedder, openings)[[rows[opening] for opening in pool]]
        seeds = model.vectors.embed(embedder, self.seeds)
        return topic_weights(seeds, vectors, self.draws.seed("topics", batch.index))

    def _counting(self, report_progress: Callable[[float], None], before: int, now: int, asked: int) -> Callable[[int], None]:
        """Return a callback that counts samples and reports the share of the missing questions, as if most were good.

        Args:
            report_progress: receives the share.
            before: number of questions before the shard.
            now: number of questions before these samples.
            asked: number of samples.
        """
        missing = self.wanted - before
        return counting(lambda share: report_progress((now - before + share * min(self.wanted - now, asked)) / missing), asked)

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
        embedder: Optional. Computes vectors for the filters that compare questions by meaning. Default: there are none.
        vectors: Optional. Vectors that were computed for earlier shards. Default: none.
    """

    def __init__(
        self,
        work: WriteQuestions,
        accepted: Sequence[Question],
        embedder: Embedder | None = None,
        vectors: VectorGroups | None = None,
    ) -> None:
        self._work, self.config = work, work.config
        self.index = duplicate_index(self.config.near_duplicate, self.config.sketch_above)
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
        self._meaning: Meaning | None = None
        if embedder is not None and compares_meaning(self.config):
            self._meaning = Meaning(self.config, embedder, work.seeds, vectors)
            # Separately, because only the second list grows.
            for known in (work.earlier, accepted):
                self._meaning.add_all([question.id for question in known], [question.text for question in known])

    def consider_all(self, samples: Sequence[_Sample]) -> list[Question | Drop | None]:
        """Return the outcome of each sample of a group, in order."""
        whole = [sample.text for sample in samples if self._fault(sample) is None] if self._meaning is not None else []
        group = None if self._meaning is None else self._meaning.group(whole)
        return [self.consider(sample, group) for sample in samples]

    def consider(self, sample: _Sample, group: MeaningGroup | None = None) -> Question | Drop | None:
        """Return the accepted question, the drop, or None if there are enough questions already.

        Args:
            sample: the sample.
            group: Optional. The group of the sample, in which it is compared by meaning. Default: it is not.
        """
        text = sample.text
        if len(self.accepted) >= self._work.wanted:
            return None
        if reason := self._fault(sample):
            return Drop("questions", reason, text)
        twin = self.index.find(text)
        if twin is not None:
            return Drop("questions", "near_duplicate", text, {"of": twin})
        if group is not None and (drop := group.drop(text)) is not None:
            return drop
        # The number is that of the accepted question, so ids have no gaps.
        question = Question(f"{self._prefix}{len(self.accepted):06d}", text, self._split(), "self")
        if group is not None:
            group.accept(question.id, text)
        return self._accept(question)

    def _fault(self, sample: _Sample) -> str | None:
        """Return the reason to drop a sample that does not depend on other questions."""
        if not sample.finished:
            # Checked first: the other filters expect a whole question.
            return "unfinished"
        return "thinking" if sample.is_reasoning else self._junk(sample.text)

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
    shards = StageShards(context.store, context.terminal, "questions", drops=True, poisoned=context.config.scale.poisoned)
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
        config.backbone.batch_tokens,
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
    dropped = context.store.read_dropped("questions")
    drops = Counter(d.reason for d in dropped)
    # Fewer than a tenth is a failure of the prompt or the seeds; more is reported, and the run continues.
    if train < 2 or train < config.train // 10:
        seen = ", ".join(f"{reason} {count}" for reason, count in drops.most_common()) or "none"
        raise LoopError(
            f"the model generated only {len(questions)} usable questions out of {wanted} (dropped: {seen}). Use more varied "
            "seeds, "
            "raise questions.attempts or questions.max_new_tokens, or lower questions.train and questions.test"
        )
    if any(drop.detail.get("limited") for drop in dropped):
        context.terminal.note(
            "questions.off_domain: in some groups more than half of the samples were beyond the threshold; "
            "only the farthest half was dropped. Use seeds of the whole domain, or a larger questions.off_domain"
        )
    if len(questions) < wanted:
        context.terminal.note(f"questions: {len(questions)} of {wanted} wanted; continuing with these")
    return {"train": train, "test": len(questions) - train, **{f"dropped_{k}": v for k, v in sorted(drops.items())}}
