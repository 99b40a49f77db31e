"""Let people label the pairs of a run: the next pair to show, the answers, and the figures so far.

`LabelTask` reads a run once and may serve any number of raters; `LabelSession` is one rater. Neither imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import get_args

from selfeval.errors import InputError, RunFolderError, StorageError
from selfeval.labelling.agreement import Agreement, answered_pairs, measure_agreement
from selfeval.labelling.label_file import LabelFile
from selfeval.labelling.pairs import (
    CurrentLabels,
    LabelPair,
    PairKey,
    current_labels,
    key_of,
    latest_labels,
    of_scored,
    of_verdicts,
)
from selfeval.labelling.queue import Draw, Preference, draw_queue, is_turned, training_queue
from selfeval.labelling.queue_file import QUEUE, queue_id, read_preference, read_queue, write_queue
from selfeval.labelling.threshold import label_threshold, uniform_sample
from selfeval.labelling.threshold_file import has_threshold, write_threshold
from selfeval.labelling.training import training_labels
from selfeval.quality.selective_risk import Threshold
from selfeval.records import Label, LabelChoice, Split
from selfeval.runs.reader import RunReader
from selfeval.store import read_object
from selfeval.texts import visible

__all__ = ["LabelSession", "LabelTask", "ShownPair", "densities_of_questions"]

_LONGEST_NAME = 100
_SOURCES = ("evaluation/scored.jsonl", "evaluation/figures.json", "verdicts/manifest.json")
"""Files whose change gives a task other pairs or other scores."""

FileState = tuple[int, int] | None
"""Time of the last change in ns, and size; None without a file."""
_AGAIN = "reload the page, or run the command again; this answer was not saved"


@dataclass(frozen=True)
class ShownPair:
    """A pair as a rater sees it, without anything that reveals what the judge or the evaluator thinks.

    Attributes:
        question_id: id of the question.
        first, second: ids of the replies, in the order shown.
        question: text of the question.
        first_text, second_text: texts of the replies, in the order shown.
        texts: fingerprint of the three texts, which an answer gives back: an answer is about texts, and ids may be reused.
    """

    question_id: str
    first: str
    second: str
    question: str
    first_text: str
    second_text: str
    texts: str


@dataclass(frozen=True)
class _Given:
    """The labels as they were read from a state of the file.

    Attributes:
        state: the state of the file.
        latest: the latest labels, used or not, in the order in which they were given.
        current: those of the pairs of the task, in its order, by pair.
    """

    state: FileState
    latest: Sequence[Label]
    current: CurrentLabels


class LabelTask:
    """The pairs of a run to label, in the order in which they are shown.

    Args:
        folder: folder of the run, or of one of its rounds.
        for_training: pairs of training questions, whose labels may be trained on, instead of judged test pairs. Default: False.
        prefer: Optional. Pairs that come early: `uncertain`, `central` or `both`; the last two need an index of the questions
            (`selfeval search DIR`). Default: as the saved order, or `uncertain`.

    Raises:
        RunFolderError: the folder is not a run, has no such pairs yet, or a file is damaged.
        InputError: the order is saved with another preference, there is no such preference or no index of the questions, or the
            pairs are for training.
        MissingPackageError: faiss is not installed, and the index is needed.

    Example:
        >>> LabelTask("runs/first").agreement().labelled
        0
    """

    def __init__(self, folder: str | Path, *, for_training: bool = False, prefer: str | None = None) -> None:
        self._reader, self.for_training = RunReader(folder), for_training
        self._prefer = _preference(prefer, for_training=for_training)
        self.folder, self.file = self._reader.folder, LabelFile(self._reader.folder)
        # Before the files are read: a change while they are read is noticed, too.
        self._sources, self._queue_state = self._source_states(), _state(self.folder / QUEUE)
        self._is_queue_saved = False
        self._known: _Given | None = None
        self._questions = {question.id: question.text for question in self._reader.records("questions")}
        self._replies = {reply.id: reply.text for reply in self._reader.records("replies")}
        self.queue: Sequence[Draw] = [] if for_training else self._drawn()
        self.pairs: Sequence[LabelPair] = self._training_pairs() if for_training else [draw.pair for draw in self.queue]

    def _drawn(self) -> list[Draw]:
        pairs = of_scored(self._reader.records("scored"), self._questions, self._replies)
        saved = read_queue(self.folder, pairs)
        self._is_queue_saved = saved is not None
        if saved is not None:
            self._refuse_other_preference()
            return saved
        prefer = self._prefer or "uncertain"
        densities = None if prefer == "uncertain" else densities_of_questions(self.folder, self._questions, pairs)
        return draw_queue(pairs, self.temperature, self._reader.config.seed, prefer, densities)

    def _refuse_other_preference(self) -> None:
        if self._prefer is not None and self._prefer != (saved := read_preference(self.folder)):
            raise InputError(
                f'the order of the pairs was saved with the first label and prefers "{saved}"; omit the preference '
                f'"{self._prefer}", because labels in another order would be weighted by other probabilities'
            )

    def _training_pairs(self) -> list[LabelPair]:
        verdicts = self._reader.records("verdicts", split=Split.TRAIN)
        return training_queue(of_verdicts(verdicts, self._questions, self._replies), self._reader.config.seed)

    @cached_property
    def temperature(self) -> float:
        """Temperature of the evaluator's confidence."""
        path = self.folder / "evaluation" / "figures.json"
        self._reader.check([path])
        return float(read_object(path, "evaluator")["evaluator"]["temperature"])

    @cached_property
    def queue_id(self) -> str:
        """Fingerprint of the order of the pairs, saved with each label; empty for labels for training, which need none."""
        return "" if self.for_training else queue_id(self.queue)

    @property
    def is_current(self) -> bool:
        """Whether the files from which the task was read, and the saved queue, are unchanged."""
        return self._source_states() == self._sources and _state(self.folder / QUEUE) == self._queue_state

    def _source_states(self) -> list[FileState]:
        return [_state(self.folder / name) for name in _SOURCES]

    @cached_property
    def _by_key(self) -> dict[PairKey, LabelPair]:
        return {pair.key: pair for pair in self.pairs}

    # -- labels ---------------------------------------------------------------------------------------------------------

    def labels(self) -> CurrentLabels:
        """Return the current labels by pair; the file is read again if it has changed.

        Raises:
            RunFolderError: a line of the file is damaged.
        """
        return self._given().current

    def _given(self) -> _Given:
        known, state = self._known, _state(self.file.path)
        if known is None or known.state != state:
            latest = latest_labels(label for label in self.file.read() if label.for_training == self.for_training)
            in_order = [label for label in latest if label.queue == self.queue_id]
            known = self._known = _Given(state, latest, current_labels(in_order, self._by_key))
        return known

    def last_label(self, rater: str) -> Label | None:
        """Return the most recent of a rater's current labels; None without one."""
        given = self._given()
        current = {label for on_pair in given.current.values() for label in on_pair if label.rater == rater}
        return next((label for label in reversed(given.latest) if label in current), None)

    def count_for_training(self) -> int:
        """Return the number of labels for training that were not taken back or skipped."""
        return len(training_labels(self.file.read()))

    def shown(self, pair: LabelPair, rater: str) -> ShownPair:
        """Return a pair with its texts, in a random order that is the same whenever this rater sees it."""
        turned = is_turned(pair, rater, self._reader.config.seed)
        first, second = (pair.second, pair.first) if turned else (pair.first, pair.second)
        texts = self._questions[pair.question_id], self._replies[first], self._replies[second]
        return ShownPair(pair.question_id, first, second, *texts, pair.texts)

    def record(self, rater: str, question_id: str, first: str, second: str, choice: LabelChoice | str, *, texts: str) -> Label:
        """Save an answer, and the threshold that now follows from the labels.

        Args:
            rater: name of the person.
            question_id: id of the question.
            first: id of the reply that was shown first.
            second: id of the other one.
            choice: `first`, `second`, `tie`, `skip` or `undo`.
            texts: fingerprint of the texts that the person saw (`ShownPair.texts`).

        Raises:
            InputError: there is no such pair or choice, or the run has changed since the pair was shown; nothing is saved.
            StorageError: the answer cannot be written, and is not saved; or, if the message says so, only the threshold cannot.
        """
        pair = self._by_key.get(key_of(question_id, first, second))
        if pair is None:
            raise InputError(f"the replies {first} and {second} to question {question_id} are not among the pairs to label")
        if pair.texts != texts:
            raise InputError(f"the question {question_id} or its replies have changed since they were shown; {_AGAIN}")
        label = Label(
            *(question_id, first, second, _choice(choice), rater),
            time=datetime.now(UTC).isoformat(timespec="seconds"),
            for_training=self.for_training,
            texts=pair.texts,
            queue=self.queue_id,
        )
        # One lock for all three files: otherwise an older threshold of another rater could replace a newer one.
        with self.file.writing() as append:
            self._refuse_changes()
            self._save_queue()
            append(label)
            self._update_threshold()
        return label

    def _refuse_changes(self) -> None:
        if self._source_states() != self._sources:
            raise InputError(f"the pairs or the evaluator of {self.folder} have changed since they were read; {_AGAIN}")

    def _save_queue(self) -> None:
        # Before the first label: afterwards its probability could no longer be known.
        path = self.folder / QUEUE
        if self.for_training or (self._is_queue_saved and _state(path) == self._queue_state):
            return
        saved = read_queue(self.folder, self.pairs)
        if saved is None:
            write_queue(self.folder, self.queue, self._prefer or "uncertain")
        elif queue_id(saved) != self.queue_id:
            raise InputError(f"another process has saved another order of the pairs in {path}; {_AGAIN}")
        self._queue_state, self._is_queue_saved = _state(path), True

    def _update_threshold(self) -> None:
        try:
            if not self.for_training:
                write_threshold(self.folder, self.threshold())
        except (RunFolderError, StorageError) as error:
            raise StorageError(f"the answer is saved, but the threshold that follows from it is not: {error}") from error

    # -- figures --------------------------------------------------------------------------------------------------------

    def agreement(self) -> Agreement:
        """Estimate from all labels so far how far evaluator and judge agree with people.

        Raises:
            InputError: the labels are for training, which are no random sample of anything.
        """
        self._refuse_training()
        given = self._given()
        return measure_agreement(self.queue, given.current, len(given.latest))

    def threshold(self) -> Threshold:
        """Choose the evaluator's threshold from all labels so far.

        Raises:
            InputError: the labels are for training.
        """
        self._refuse_training()
        return label_threshold(answered_pairs(self.queue, self.labels()), self.temperature)

    def uniform_labels(self) -> list[tuple[tuple[str, str, str], LabelChoice | None]]:
        """Return the labelled pairs that are a uniform sample of all judged test pairs (`uniform_sample`).

        Returns:
            Question and both replies in the order of the verdict, and people's majority; None without one.

        Raises:
            InputError: the labels are for training.
        """
        self._refuse_training()
        found = uniform_sample(answered_pairs(self.queue, self.labels()))
        return [(self._texts_of(one.draw.pair), one.choice) for one in found]

    def _texts_of(self, pair: LabelPair) -> tuple[str, str, str]:
        return self._questions[pair.question_id], self._replies[pair.first], self._replies[pair.second]

    def save_threshold(self) -> None:
        """Write the threshold to the run folder, where the evaluator reads it; remove it if the labels give none.

        Raises:
            StorageError: the file cannot be written.
        """
        # Without the lock, which a folder that is only readable cannot have, if there is nothing to write.
        if self.for_training or has_threshold(self.folder, self.threshold()):
            return
        with self.file.writing():
            write_threshold(self.folder, self.threshold())

    def _refuse_training(self) -> None:
        if self.for_training:
            raise InputError(
                "labels for training are on pairs chosen because the judge was unsure, so no figure about all pairs follows "
                "from them; open the run without for_training (--use-for-training)"
            )


class LabelSession:
    """One person who labels.

    Args:
        task: the pairs.
        rater: name of the person.
        most: Optional. Number of pairs to answer in this session, > 0. Default: all.

    Raises:
        InputError: the name is empty, too long or not printable, or the number is not positive.
    """

    def __init__(self, task: LabelTask, rater: str, most: int | None = None) -> None:
        if not rater.strip() or len(rater) > _LONGEST_NAME or not rater.isprintable():
            raise InputError(
                f'rater "{visible(rater[:_LONGEST_NAME])}" is not a name of 1 to {_LONGEST_NAME} printable characters; '
                "pass another --rater"
            )
        if most is not None and most < 1:
            raise InputError(f"the number of pairs must be at least 1, got {most}")
        self.task, self.rater = task, rater.strip()
        self._end = None if most is None else len(self._answered()) + most

    def _answered(self) -> set[PairKey]:
        labels = self.task.labels()
        return {key for key, on_pair in labels.items() if any(label.rater == self.rater for label in on_pair)}

    @property
    def progress(self) -> tuple[int, int]:
        """Number of pairs that this rater has answered, and number of all pairs."""
        return len(self._answered()), len(self.task.pairs)

    def next_pair(self) -> ShownPair | None:
        """Return the next pair; None at the end of the session."""
        answered = self._answered()
        if self._end is not None and len(answered) >= self._end:
            return None
        return next((self.task.shown(pair, self.rater) for pair in self.task.pairs if pair.key not in answered), None)

    def answer(self, shown: ShownPair, choice: LabelChoice | str) -> Label:
        """Save the answer to a pair; a second answer replaces the first. See `LabelTask.record`."""
        return self.task.record(self.rater, shown.question_id, shown.first, shown.second, choice, texts=shown.texts)

    def undo(self) -> ShownPair | None:
        """Take back this rater's most recent answer.

        Returns:
            The pair, which is next again; None if there is no answer to take back.
        """
        last = self.task.last_label(self.rater)
        if last is None:
            return None
        self.task.record(self.rater, last.question_id, last.first, last.second, LabelChoice.UNDO, texts=last.texts)
        pair = next(p for p in self.task.pairs if p.key == key_of(last.question_id, last.first, last.second))
        return self.task.shown(pair, self.rater)


def _state(path: Path) -> FileState:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_mtime_ns, found.st_size


def densities_of_questions(folder: Path, questions: Mapping[str, str], pairs: Sequence[LabelPair]) -> dict[str, float]:
    """Return the density of the question of each pair among the questions of all pairs, by id, from the saved index.

    Args:
        folder: the run folder.
        questions: texts by question id.
        pairs: the pairs.

    Raises:
        InputError: there is no index of these questions.
        MissingPackageError: faiss is not installed.
    """
    from selfeval.quality.centrality import densities
    from selfeval.quality.vector_index import VectorIndex, text_hash
    from selfeval.runs.search import index_path

    index, asked = VectorIndex.open(index_path(folder, "questions")), list(dict.fromkeys(pair.question_id for pair in pairs))
    known = {} if index is None else dict(zip(index.contents.keys, enumerate(index.contents.hashes), strict=True))
    if index is None or any(known.get(key, (0, ""))[1] != text_hash(questions[key]) for key in asked):
        raise InputError(
            f"{folder} has no vectors of its questions, by which central pairs are found; make them: selfeval search {folder}"
        )
    found = densities(index.vectors([known[key][0] for key in asked]))
    return dict(zip(asked, found.tolist(), strict=True))


def _preference(value: str | None, *, for_training: bool) -> Preference | None:
    if value is None:
        return None
    kinds: dict[str, Preference] = {kind: kind for kind in get_args(Preference)}
    if value not in kinds:
        raise InputError(f'there is no preference "{value}"; use {", ".join(kinds)}')
    if for_training:
        raise InputError("pairs for training are shown in the order of the judge's verdicts; omit the preference")
    return kinds[value]


def _choice(value: LabelChoice | str) -> LabelChoice:
    try:
        return LabelChoice(value)
    except ValueError:
        raise InputError(f'there is no answer "{value}"; use {", ".join(choice.value for choice in LabelChoice)}') from None
