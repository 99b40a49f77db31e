"""A run as an object: its report, its records, and its trained models."""

from __future__ import annotations

import html
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from selfeval.config import RunConfig
from selfeval.errors import InputError, MissingPackageError
from selfeval.records import Pair, Split, to_json
from selfeval.report.reading import read_report
from selfeval.report.summary import summary_rows, verdict_sentences, warnings
from selfeval.runs.reader import KINDS, RunReader, SplitName

if TYPE_CHECKING:
    import datasets
    import pandas

    from selfeval.runs.evaluator import Evaluator
    from selfeval.runs.judge import Judge
    from selfeval.runs.model import RunModel
    from selfeval.runs.policy import Policy

__all__ = ["Run"]

_FORMATS = ("conversational", "standard")


class Run:
    """A run folder, opened for reading. No lock is taken: it can be opened while the run is in progress.

    Use `Run.open`, or `selfeval.run`, which returns one. The base model is loaded by the first call of `evaluator`, `policy` or
    `judge`, which share it.

    Example:
        >>> run = Run.open("runs/first")
        >>> run.status
        'finished'
        >>> run.report["policy"]["win_rate"]["n"] > 0
        True
        >>> type(run.records("pairs", split="test")[0]).__name__
        'Pair'
    """

    def __init__(self, reader: RunReader, *, trust_remote_code: bool = False) -> None:
        self._reader, self._trust_remote_code = reader, trust_remote_code

    @classmethod
    def open(cls, folder: str | Path, *, trust_remote_code: bool = False) -> Run:
        """Open a run folder.

        Args:
            folder: folder of the run, or of one of its rounds (`RUN/rounds/02`).
            trust_remote_code: run code that comes with the base when it is loaded. Default: False.

        Raises:
            RunFolderError: the folder is not a run, or its run.json is damaged or was written by an incompatible version.
        """
        return cls(RunReader(folder), trust_remote_code=trust_remote_code)

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r}, {self.status})"

    def _repr_html_(self) -> str:
        """Return name and status, and the report's figures and sentences if there is one, for a notebook."""
        title = f"<b>{html.escape(str(self.folder))}</b>: {html.escape(self.status)}"
        if not (self.folder / "report.json").is_file():
            return title
        report = read_report(self.folder / "report.json")
        rows = "".join(f"<tr><td>{html.escape(k)}</td><td>{html.escape(v)}</td></tr>" for k, v in summary_rows(report))
        said = "".join(f"<p>{html.escape(sentence)}</p>" for sentence in (*verdict_sentences(report), *warnings(report)))
        return f"{title}<table>{rows}</table>{said}"

    # -- files ----------------------------------------------------------------------------------------------------------

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self._reader.folder

    @property
    def config(self) -> RunConfig:
        """The resolved configuration."""
        return self._reader.config

    @property
    def status(self) -> str:
        """`running`, `finished`, `partial` (stopped after a stage) or `interrupted`."""
        return self._reader.status

    @property
    def rounds(self) -> list[Run]:
        """Round 1, which is this run, and the later rounds that have begun."""
        return [Run(reader, trust_remote_code=self._trust_remote_code) for reader in self._reader.rounds]

    @property
    def report(self) -> dict[str, Any]:
        """The content of report.json; a figure is a dict of `value`, `ci_low`, `ci_high` and `n`.

        Raises:
            RunFolderError: it is not written yet, or is damaged.
        """
        return self._reader.report()

    def metrics(self, stage: str) -> list[dict[str, Any]]:
        """Read the metrics of a stage, one dict per step; empty before its first step.

        Example:
            >>> Run.open("runs/first").metrics("policy")[0]["step"]
            1
        """
        return self._reader.metrics(stage)

    def records(self, kind: str, *, split: Split | SplitName | None = None) -> list[Any]:
        """Read records: frozen dataclasses of `selfeval.records`.

        Args:
            kind: `seeds`, `questions`, `replies`, `reference_answers`, `verdicts`, `pairs`, `sampled` (the policy's replies in
                training), `scored` (the judged test pairs with the evaluator's margins), `compared` (the replies before and
                after training), `labels` (of people, in the order in which they were given, also replaced ones; empty if
                there are none) or `dropped`.
            split: Optional. Only those of training (`train`) or of test questions (`test`). Default: all.

        Raises:
            RunFolderError: there is no such kind, none is written yet, or a file is damaged.
            InputError: these records have no split, or there is no such split.
        """
        return self._reader.records(kind, split=split)

    def to_pandas(self, kind: str, *, split: Split | SplitName | None = None) -> pandas.DataFrame:
        """Read records into a DataFrame, one row per record; see `records`.

        Raises:
            MissingPackageError: pandas is not installed.
            RunFolderError: see `records`.

        Example:
            >>> "confidence" in Run.open("runs/first").to_pandas("pairs").columns
            True
        """
        try:
            import pandas
        except ImportError as error:
            raise MissingPackageError("to_pandas", "pandas") from error
        found = self.records(kind, split=split)
        # Columns are given, so an empty list of records has them too.
        return pandas.DataFrame([to_json(record) for record in found], columns=KINDS[kind].fields)

    def to_datasets(
        self, split: Split | SplitName = "train", format: Literal["conversational", "standard"] = "conversational"
    ) -> datasets.Dataset:
        """Read the preference pairs of a split into a data set with the columns `prompt`, `chosen` and `rejected`.

        Args:
            split: `train`, or `test` for held-out pairs. Default: `train`.
            format: `conversational` for messages, as read by TRL's preference trainers; `standard` for plain text, with the
                question itself as the prompt. Default: `conversational`.

        Raises:
            MissingPackageError: datasets is not installed.
            InputError: there is no such split or format.
            RunFolderError: no pair is written yet, or a file is damaged.

        Example:
            >>> Run.open("runs/first").to_datasets("train").column_names
            ['prompt', 'chosen', 'rejected']
        """
        if format not in _FORMATS:
            raise InputError(f'there is no format "{format}"; use {" or ".join(_FORMATS)}')
        try:
            import datasets
        except ImportError as error:
            raise MissingPackageError("to_datasets", "datasets") from error
        made = _messages if format == "conversational" else _texts
        rows = [made(pair) for pair in self.records("pairs", split=split)]
        return datasets.Dataset.from_dict({name: [row[name] for row in rows] for name in ("prompt", "chosen", "rejected")})

    # -- models ---------------------------------------------------------------------------------------------------------

    @cached_property
    def _model(self) -> RunModel:
        from selfeval.runs.model import RunModel

        return RunModel.load(self._reader, trust_remote_code=self._trust_remote_code)

    def evaluator(self) -> Evaluator:
        """Load the trained evaluator; see `Evaluator.load`."""
        from selfeval.runs.evaluator import Evaluator

        Evaluator.check(self._reader)
        return Evaluator(self._model)

    def policy(self) -> Policy:
        """Load the trained policy; see `Policy.load`."""
        from selfeval.runs.policy import Policy

        Policy.check(self._reader)
        return Policy(self._model)

    def judge(self) -> Judge:
        """Load the judge that the run used; see `Judge.load`."""
        from selfeval.runs.judge import Judge

        return Judge.of_run(self._model)


def _texts(pair: Pair) -> dict[str, Any]:
    return {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}


def _messages(pair: Pair) -> dict[str, Any]:
    asked = [{"role": "user", "content": pair.prompt}]
    chosen, rejected = ([{"role": "assistant", "content": text}] for text in (pair.chosen, pair.rejected))
    return {"prompt": asked, "chosen": chosen, "rejected": rejected}
