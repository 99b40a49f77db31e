"""Let people label the pairs of a run: the next pair to show, the answers, and the figures so far.

`LabelTask` reads a run once and may serve any number of raters; `LabelSession` is one rater. Neither imports torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

from selfeval.errors import InputError
from selfeval.labelling.agreement import Agreement, answered_pairs, measure_agreement
from selfeval.labelling.label_file import LabelFile
from selfeval.labelling.pairs import CurrentLabels, LabelPair, PairKey, current_labels, key_of, of_scored, of_verdicts
from selfeval.labelling.queue import Draw, draw_queue, is_turned, training_queue
from selfeval.labelling.queue_file import read_queue, write_queue
from selfeval.labelling.threshold import label_threshold
from selfeval.labelling.threshold_file import write_threshold
from selfeval.quality.selective_risk import Threshold
from selfeval.records import Label, LabelChoice, Split
from selfeval.runs.reader import RunReader
from selfeval.store import read_object
from selfeval.texts import visible

__all__ = ["LabelSession", "LabelTask", "ShownPair"]

_LONGEST_NAME = 100


@dataclass(frozen=True)
class ShownPair:
    """A pair as a rater sees it, without anything that reveals what the judge or the evaluator thinks.

    Attributes:
        question_id: id of the question.
        first, second: ids of the replies, in the order shown.
        question: text of the question.
        first_text, second_text: texts of the replies, in the order shown.
    """

    question_id: str
    first: str
    second: str
    question: str
    first_text: str
    second_text: str


class LabelTask:
    """The pairs of a run to label, in the order in which they are shown.

    Args:
        folder: folder of the run, or of one of its rounds.
        for_training: pairs of training questions, whose labels may be trained on, instead of judged test pairs. Default: False.

    Raises:
        RunFolderError: the folder is not a run, has no such pairs yet, or a file is damaged.

    Example:
        >>> LabelTask("runs/first").agreement().labelled
        0
    """

    def __init__(self, folder: str | Path, *, for_training: bool = False) -> None:
        self._reader, self.for_training = RunReader(folder), for_training
        self.folder, self.file = self._reader.folder, LabelFile(self._reader.folder)
        self._questions = {question.id: question.text for question in self._reader.records("questions")}
        self._replies = {reply.id: reply.text for reply in self._reader.records("replies")}
        self.queue: Sequence[Draw] = [] if for_training else self._drawn()
        self.pairs: Sequence[LabelPair] = self._training_pairs() if for_training else [draw.pair for draw in self.queue]

    def _drawn(self) -> list[Draw]:
        pairs = of_scored(self._reader.records("scored"), self._questions, self._replies)
        saved = read_queue(self.folder, pairs)
        return draw_queue(pairs, self.temperature, self._reader.config.seed) if saved is None else saved

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
    def _by_key(self) -> dict[PairKey, LabelPair]:
        return {pair.key: pair for pair in self.pairs}

    # -- labels ---------------------------------------------------------------------------------------------------------

    def labels(self) -> CurrentLabels:
        """Return the current labels by pair; the file is read anew.

        Raises:
            RunFolderError: a line of the file is damaged.
        """
        return current_labels(self._given(), self.pairs)

    def _given(self) -> list[Label]:
        return [label for label in self.file.read() if label.for_training == self.for_training]

    def count_for_training(self) -> int:
        """Return the number of labels for training that were not taken back or skipped."""
        latest = {
            (one.rater, key_of(one.question_id, one.first, one.second)): one for one in self.file.read() if one.for_training
        }
        return sum(one.choice not in (LabelChoice.SKIP, LabelChoice.UNDO) for one in latest.values())

    def shown(self, pair: LabelPair, rater: str) -> ShownPair:
        """Return a pair with its texts, in a random order that is the same whenever this rater sees it."""
        turned = is_turned(pair, rater, self._reader.config.seed)
        first, second = (pair.second, pair.first) if turned else (pair.first, pair.second)
        texts = self._questions[pair.question_id], self._replies[first], self._replies[second]
        return ShownPair(pair.question_id, first, second, *texts)

    def record(self, rater: str, question_id: str, first: str, second: str, choice: LabelChoice | str) -> Label:
        """Save an answer, and the threshold that now follows from the labels.

        Args:
            rater: name of the person.
            question_id: id of the question.
            first: id of the reply that was shown first.
            second: id of the other one.
            choice: `first`, `second`, `tie`, `skip` or `undo`.

        Raises:
            InputError: there is no such pair or choice.
            StorageError: the answer cannot be written, and is not saved.
        """
        pair = self._by_key.get(key_of(question_id, first, second))
        if pair is None:
            raise InputError(f"the replies {first} and {second} to question {question_id} are not among the pairs to label")
        label = Label(
            *(question_id, first, second, _choice(choice), rater),
            time=datetime.now(UTC).isoformat(timespec="seconds"),
            for_training=self.for_training,
            texts=pair.texts,
        )
        self._save_queue()
        self.file.append(label)
        self.save_threshold()
        return label

    def _save_queue(self) -> None:
        # Before the first label: afterwards its probability could no longer be known.
        if not self.for_training and read_queue(self.folder, self.pairs) is None:
            write_queue(self.folder, self.queue)

    # -- figures --------------------------------------------------------------------------------------------------------

    def agreement(self) -> Agreement:
        """Estimate from all labels so far how far evaluator and judge agree with people.

        Raises:
            InputError: the labels are for training, which are no random sample of anything.
        """
        self._refuse_training()
        given = self._given()
        latest = {(one.rater, key_of(one.question_id, one.first, one.second)): one.choice for one in given}
        standing = sum(choice != LabelChoice.UNDO for choice in latest.values())
        return measure_agreement(self.queue, current_labels(given, self.pairs), standing)

    def threshold(self) -> Threshold:
        """Choose the evaluator's threshold from all labels so far.

        Raises:
            InputError: the labels are for training.
        """
        self._refuse_training()
        return label_threshold(answered_pairs(self.queue, self.labels()), self.temperature)

    def save_threshold(self) -> None:
        """Write the threshold to the run folder, where the evaluator reads it; remove it if the labels give none.

        Raises:
            StorageError: the file cannot be written.
        """
        if not self.for_training:
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
        return self.task.record(self.rater, shown.question_id, shown.first, shown.second, choice)

    def undo(self) -> ShownPair | None:
        """Take back this rater's most recent answer.

        Returns:
            The pair, which is next again; None if there is no answer to take back.
        """
        labels = [label for on_pair in self.task.labels().values() for label in on_pair if label.rater == self.rater]
        given = self.task.file.read()
        # By the place in the file: several answers may have the same second.
        last = max(labels, key=lambda label: max(n for n, one in enumerate(given) if one == label), default=None)
        if last is None:
            return None
        self.task.record(self.rater, last.question_id, last.first, last.second, LabelChoice.UNDO)
        pair = next(p for p in self.task.pairs if p.key == key_of(last.question_id, last.first, last.second))
        return self.task.shown(pair, self.rater)


def _choice(value: LabelChoice | str) -> LabelChoice:
    try:
        return LabelChoice(value)
    except ValueError:
        raise InputError(f'there is no answer "{value}"; use {", ".join(choice.value for choice in LabelChoice)}') from None
