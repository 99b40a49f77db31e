"""Sample the first stages of a run in rounds that grow: questions, replies, pairs, and the verdicts of every judge on them.

The work of the stages is called as in a run (`WriteQuestions`, `WriteReplies`, `draw_pair`, `JudgePairs`), without a folder.

The sizes of the rounds depend on the clock, never on whether verdicts are right or consistent: a sample that grew until a test
succeeds would succeed too often. Only a judge that is hopeless by the probe of a run is left out of later rounds, which can
only turn a "can" into a "cannot".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from time import monotonic

from selfeval.config import RunConfig
from selfeval.evaluation.judge_probe import PROBED, diagnose
from selfeval.judging.sources import fixed_text
from selfeval.judging.templates import templates_folder
from selfeval.records import Drop, Question, Reply, Split, Verdict
from selfeval.stages.draws import Draws
from selfeval.stages.given import Given
from selfeval.stages.judge_fit import fitted_again
from selfeval.stages.questions import WriteQuestions
from selfeval.stages.replies import Asked, WriteReplies
from selfeval.stages.shards import Batch, ModelHandle
from selfeval.stages.verdicts import JudgePairs, ReplyPair, draw_pair, without_dropped
from selfeval.suitability.candidates import Candidate

__all__ = ["ENOUGH", "Judged", "Sample", "grow"]

FIRST = 8
"""Pairs of the first round; each further round has twice as many, or as many as fit the time that is left."""
ENOUGH = 256
"""Pairs from which on the sample is large enough: a share is known to six points."""
RETESTED = 64
"""Most pairs that a judge judges twice."""
RETEST_TEMPERATURE = 0.7
"""Sampling temperature of the second judgement of a judge that is otherwise greedy."""
_FEWEST = 4
"""Smallest round that is worth its set-up."""
_UNUSABLE = 64
"""Samples without a usable question after which no more are written."""
_LARGEST_FACTOR = 4
"""Most samples per wanted question."""
_WANTED = 1_000_000
"""More questions than any check writes, so that `WriteQuestions` uses every sample of a shard."""


@dataclass
class Judged:
    """The verdicts of one judge: on the first pairs of the sample, in order.

    Attributes:
        verdicts: the verdicts.
        retests: second verdicts on the first of these pairs.
        seconds: time of the first verdicts.
        is_hopeless: whether the probe found the judge unusable, so it was left out of later rounds.
    """

    verdicts: list[Verdict] = field(default_factory=list)
    retests: list[Verdict] = field(default_factory=list)
    seconds: float = 0.0
    is_hopeless: bool = False


@dataclass
class Sample:
    """Everything that was sampled so far.

    Attributes:
        questions: accepted questions, in the order of writing.
        dropped: rejected samples of questions.
        asked: the questions that were replied to: written, given by the user, or seeds where too few were written.
        replies: all replies, loops included.
        pairs: pairs of distinct replies, one per question.
        identical: number of questions without two different replies, those of loops left out.
        judged: verdicts by the name of the judge.
        seconds: time that the rounds took.
        interrupted: whether the user ended the rounds.
    """

    questions: list[Question] = field(default_factory=list)
    dropped: list[Drop] = field(default_factory=list)
    asked: list[Question] = field(default_factory=list)
    replies: list[Reply] = field(default_factory=list)
    pairs: list[ReplyPair] = field(default_factory=list)
    identical: int = 0
    judged: dict[str, Judged] = field(default_factory=dict)
    seconds: float = 0.0
    interrupted: bool = False

    @property
    def samples(self) -> int:
        """Number of samples of questions."""
        return len(self.questions) + len(self.dropped)

    @property
    def figures(self) -> str:
        """Describe the size, for a progress bar."""
        return f"{self.samples} questions, {len(self.replies)} replies, {len(self.pairs)} pairs"


def grow(
    config: RunConfig,
    model: ModelHandle,
    candidates: Sequence[Candidate],
    seeds: Sequence[str],
    given: Given | None,
    seconds: float,
    on_sample: Callable[[Sample], None] = lambda sample: None,
) -> Sample:
    """Sample in rounds until the time is spent, there are `ENOUGH` pairs, or every judge is hopeless.

    The first verdicts of the first judge are always made, so a slow model may take longer than `seconds`. Ctrl-C ends the
    rounds, and the sample is what there is then.

    Args:
        config: configuration of the run.
        model: the model and the templates of all judges.
        candidates: the judges.
        seeds: the user's seed questions.
        given: Optional. The user's questions, which are used instead of written ones.
        seconds: time for all rounds.
        on_sample: Optional. Called after every step.
    """
    sample = Sample(judged={candidate.name: Judged() for candidate in candidates})
    rounds = _Rounds(config, model, candidates, tuple(seeds), given, sample)
    start = monotonic()
    try:
        for _ in rounds.steps(lambda: seconds - (monotonic() - start)):
            sample.seconds = monotonic() - start
            on_sample(sample)
    except KeyboardInterrupt:
        sample.interrupted = True
    sample.seconds = monotonic() - start
    return sample


@dataclass
class _Rounds:
    config: RunConfig
    model: ModelHandle
    candidates: Sequence[Candidate]
    seeds: tuple[str, ...]
    given: Given | None
    sample: Sample
    number: int = 0

    def steps(self, time_left: Callable[[], float]) -> Iterator[None]:
        """Run the rounds, and yield after each step. After the first verdicts, a step begins only while there is time left."""
        size = FIRST
        while size >= _FEWEST:
            before = time_left()
            for step in self._round(size):
                step()
                yield
                if time_left() <= 0 and any(judged.verdicts for judged in self.sample.judged.values()):
                    return
            self.number += 1
            if self._is_enough():
                return
            # As if the time were proportional to the size: batches make larger rounds cheaper than that.
            fitting = int(size * time_left() / max(before - time_left(), 1e-6))
            size = min(2 * size, fitting, ENOUGH - len(self.sample.pairs))

    def _round(self, size: int) -> Iterator[Callable[[], None]]:
        yield lambda: self._write(size)
        yield lambda: self._reply(size)
        for candidate in self.candidates:
            if not self.sample.judged[candidate.name].is_hopeless:
                yield lambda candidate=candidate: self._judge(candidate)  # type: ignore[misc]
                yield lambda candidate=candidate: self._retest(candidate)  # type: ignore[misc]

    def _is_enough(self) -> bool:
        left = [judged for judged in self.sample.judged.values() if not judged.is_hopeless]
        exhausted = not self._unused() and not self._can_write()
        return exhausted or not left or len(self.sample.pairs) >= ENOUGH

    # -- questions and replies ------------------------------------------------------------------------------------------

    def _can_write(self) -> bool:
        is_given = self.given is not None and not self.config.questions.extend
        return not is_given and bool(self.sample.questions or self.sample.samples < _UNUSABLE)

    def _write(self, size: int) -> None:
        if not self._can_write():
            return
        sample, usable = self.sample, len(self.sample.questions)
        factor = 2.0 if not sample.samples else 1.5 * sample.samples / max(usable, 1)
        shard = round(size * min(factor, _LARGEST_FACTOR))
        settings = self.config.questions.model_copy(update={"train": _WANTED, "test": 0, "shard": shard})
        work = WriteQuestions(
            settings,
            self.config.backbone.rollout_batch_size,
            Draws(self.config.seed),
            self.seeds,
            fixed_text(templates_folder(self.config.model, self.config.templates), "ask"),
        )
        output = work(self.model, Batch(self.number, tuple(sample.questions)))
        sample.questions += output.records
        sample.dropped += output.drops or ()

    def _unused(self) -> list[Question]:
        """Return the questions without replies: the written or given ones, then the seeds."""
        given = [] if self.given is None else self.given.questions
        seeds = [Question(f"seed-{n}", text, Split.TRAIN, "seed") for n, text in enumerate(self.seeds)]
        used = {question.id for question in self.sample.asked}
        return [question for question in (*given, *self.sample.questions, *seeds) if question.id not in used]

    def _reply(self, size: int) -> None:
        config, sample, draws = self.config, self.sample, Draws(self.config.seed)
        asked = self._unused()[:size]
        if not asked:
            return
        work = WriteReplies(
            *(config.replies, config.backbone.rollout_batch_size, config.backbone.batch_tokens, draws),
            limit=config.replies.longest,
            test_temperature=config.evaluation.temperature,
            test_top_p=config.evaluation.top_p,
        )
        output = work(self.model, Batch(self.number, [Asked(question) for question in asked]))
        replies = without_dropped(output.records, output.drops or ())
        sample.asked += asked
        sample.replies += output.records
        drawn = [draw_pair(q, [r for r in replies if r.question_id == q.id], draws) for q in asked]
        sample.pairs += [pair for pair in drawn if not isinstance(pair, Drop)]
        sample.identical += sum(isinstance(pair, Drop) for pair in drawn)

    # -- verdicts -------------------------------------------------------------------------------------------------------

    def _judge(self, candidate: Candidate) -> None:
        judged, start = self.sample.judged[candidate.name], monotonic()
        judged.verdicts += self._verdicts(candidate, self.sample.pairs[len(judged.verdicts) :], self.config.seed, 0.0)
        judged.verdicts = fitted_again(judged.verdicts, judged.verdicts, candidate.config.verdicts)
        judged.seconds += monotonic() - start
        if len(judged.verdicts) >= PROBED:
            judged.is_hopeless = not diagnose(judged.verdicts, candidate.config).usable

    def _retest(self, candidate: Candidate) -> None:
        judged = self.sample.judged[candidate.name]
        pairs = self.sample.pairs[len(judged.retests) : min(len(judged.verdicts), RETESTED)]
        if candidate.is_sampled and not judged.is_hopeless:
            judged.retests += self._verdicts(candidate, pairs, self.config.seed + 1, RETEST_TEMPERATURE)
            judged.retests = fitted_again(judged.retests, judged.verdicts, candidate.config.verdicts)

    def _verdicts(self, candidate: Candidate, pairs: Sequence[ReplyPair], seed: int, temperature: float) -> list[Verdict]:
        if not pairs:
            return []
        work = JudgePairs(candidate.config.verdicts, self.config.backbone.rollout_batch_size, seed, temperature)
        return list(work(self.model, Batch(self.number, pairs)).records)
