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
from collections.abc import Iterator
from itertools import islice

from selfeval.errors import LoopError
from selfeval.judging.coverage import check_seeds
from selfeval.judging.reading import thinking_of
from selfeval.judging.sources import fixed_text
from selfeval.judging.templates import templates_folder
from selfeval.quality.dedupe import NearDuplicates, normalise
from selfeval.quality.question_filters import QuestionFilters
from selfeval.records import Drop, Question, Split
from selfeval.rollout.engine import Request, generate
from selfeval.stages.context import Context
from selfeval.stages.given import Given

__all__ = ["run"]


_CHECKED = 1000
"""Number of seeds checked for whether the tokenizer can represent them."""


class _Acceptance:
    """Decides, sample by sample and in order, which samples become questions."""

    def __init__(self, context: Context) -> None:
        self._context, self.config = context, context.config.questions
        self.index = NearDuplicates(self.config.near_duplicate)
        instruction = fixed_text(templates_folder(context.config.model, context.config.templates), "ask")
        self.filters = QuestionFilters.of([seed.question for seed in context.seeds], instruction)
        self.accepted: list[Question] = []
        self._counts: Counter[Split] = Counter()
        self.tests = [q for q in context.first.read("questions", Question) if q.split == Split.TEST] if context.earlier else []
        self._prefix = "q" if context.round == 1 else f"r{context.round}q"
        for number, seed in enumerate(context.seeds):
            self.index.add(f"seed-{number}", seed.question)
        for store in context.earlier:
            for question in store.read("questions", Question):
                self.index.add(question.id, question.text)

    @property
    def wanted_tests(self) -> int:
        return len(self.tests) if self._context.earlier else self.config.test

    @property
    def wanted(self) -> int:
        return self.config.train + self.wanted_tests

    def consider(self, text: str, finished: bool) -> Question | Drop | None:
        """Return the accepted question, the drop, or None if there are enough questions already."""
        if len(self.accepted) >= self.wanted:
            return None
        if not finished:
            return Drop("questions", "unfinished", text)
        if reason := self._junk(text):
            return Drop("questions", reason, text)
        twin = self.index.find(text)
        if twin is not None:
            return Drop("questions", "near_duplicate", text, {"of": twin})
        return self.accept(Question(f"{self._prefix}{len(self.accepted):06d}", text, self._split(), "self"))

    def _junk(self, text: str) -> str | None:
        if len(normalise(text)) < self.config.shortest:
            return "too_short"
        return "thinking" if thinking_of(text).end != 0 else self.filters.reason(text)

    def _split(self) -> Split:
        """Draw train or test at random, in the requested proportion, until one of them is full."""
        if self._counts[Split.TEST] >= self.wanted_tests:
            return Split.TRAIN
        if self._counts[Split.TRAIN] >= self.config.train:
            return Split.TEST
        draw = self._context.random("split", len(self.accepted)).random()
        return Split.TEST if draw < self.wanted_tests / self.wanted else Split.TRAIN

    def accept(self, question: Question) -> Question:
        self.index.add(question.id, question.text)
        self.accepted.append(question)
        self._counts[question.split] += 1
        return question


_FEWEST_AT_ONCE = 16
"""Minimum number of samples per batch; fewer do not fill it."""


def _requests(context: Context, shard: int, earlier: list[Question]) -> Iterator[Request]:
    """Yield one shard of prompts, each with its own examples: some seeds, the rest training questions of earlier shards."""
    config, rng = context.config.questions, context.random("questions", shard)
    seeds = [seed.question for seed in context.seeds]
    pool = [q.text for q in earlier if q.split == Split.TRAIN]
    for _ in range(config.shard):
        from_pool = min(len(pool), max(0, config.examples - config.seed_examples))
        from_seeds = min(len(seeds), config.examples - from_pool)
        examples = rng.sample(seeds, from_seeds) + rng.sample(pool, from_pool)
        rng.shuffle(examples)
        yield Request(context.templates.prompt("ask", examples=examples), config.temperature, config.top_p)


def _write_shard(context: Context, shard: int, acceptance: _Acceptance) -> None:
    """Sample a shard, or as much of it as is needed. The samples do not depend on how many of them are needed."""
    requests, sampled = _requests(context, shard, list(acceptance.accepted)), 0
    outcomes: list[Question | Drop | None] = []
    while len(acceptance.accepted) < acceptance.wanted:
        # Sample 50% more than needed, because some are dropped; doubling the total bounds the number of batches.
        needed = (acceptance.wanted - len(acceptance.accepted)) * 3 // 2
        batch = list(islice(requests, max(needed, _FEWEST_AT_ONCE, sampled)))
        if not batch:
            break
        outcomes += _consider(context, shard, sampled, batch, acceptance)
        sampled += len(batch)
    context.store.write_shard(
        "questions", shard, [o for o in outcomes if isinstance(o, Question)], [o for o in outcomes if isinstance(o, Drop)]
    )


def _consider(
    context: Context, shard: int, first: int, requests: list[Request], acceptance: _Acceptance
) -> list[Question | Drop | None]:
    """Return the outcome of consecutive samples of a shard, starting at number `first`."""
    config, templates = context.config, context.templates
    with context.backbone.acting_as(context.ensure_start()):
        rollouts = generate(
            context.backbone,
            requests,
            max_new_tokens=config.questions.max_new_tokens,
            seed=context.seed("questions", shard),
            rows=config.rollout_rows,
            stop=templates.ask_stop_ids,
            first=first,
        )
    return [acceptance.consider(templates.question_from(r.ids), r.finished or templates.has_stop(r.ids)) for r in rollouts]


def run(context: Context) -> dict[str, int]:
    """Write questions until there are enough; return counts.

    Raises:
        LoopError: far too few samples are usable.
        SeedsError: the model's tokenizer cannot represent the seeds.
    """
    store, config = context.store, context.config.questions
    if context.given:
        return _take_given(context, context.given)
    if context.round == 1:
        _check_seeds(context)
    acceptance, shard = _Acceptance(context), 0
    while store.has_shard("questions", shard, drops=True):
        for question in store.read_shard("questions", shard, Question):
            acceptance.accept(question)
        shard += 1
    # A later round takes over round 1's test questions as its first shard.
    if acceptance.tests and not shard:
        store.write_shard("questions", 0, [acceptance.accept(question) for question in acceptance.tests], [])
        shard = 1
    most = int(config.attempts * acceptance.wanted / config.shard) + 1
    with context.terminal.bar("questions", acceptance.wanted, len(acceptance.accepted)) as bar:
        while len(acceptance.accepted) < acceptance.wanted and shard < most:
            before = len(acceptance.accepted)
            _write_shard(context, shard, acceptance)
            bar.advance(len(acceptance.accepted) - before)
            shard += 1
    return _counts(context, acceptance)


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


def _counts(context: Context, acceptance: _Acceptance) -> dict[str, int]:
    questions, config = acceptance.accepted, context.config.questions
    train = sum(q.split == Split.TRAIN for q in questions)
    drops = Counter(d.reason for d in context.store.read_dropped("questions"))
    if train < 2 or train < config.train // 10:
        seen = ", ".join(f"{reason} {count}" for reason, count in drops.most_common()) or "none"
        raise LoopError(
            f"the model wrote only {len(questions)} usable questions of {acceptance.wanted} (dropped: {seen}). Give more "
            "varied seeds, raise questions.attempts or questions.max_new_tokens, or lower questions.train and questions.test"
        )
    if len(questions) < acceptance.wanted:
        context.terminal.note(f"questions: {len(questions)} of {acceptance.wanted} wanted; going on with these")
    return {"train": train, "test": len(questions) - train, **{f"dropped_{k}": v for k, v in sorted(drops.items())}}
