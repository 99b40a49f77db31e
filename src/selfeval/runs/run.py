"""A run as an object: its report, its records, and its trained models."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from warnings import warn

from selfeval.config import RunConfig
from selfeval.errors import InputError, MissingPackageError
from selfeval.records import Pair, Split, to_json
from selfeval.report.reading import read_report
from selfeval.report.summary import summary_rows, verdict_sentences, warnings
from selfeval.runs.reader import KINDS, RunReader, SplitName
from selfeval.store import has_manifest
from selfeval.store.remote.places import local_run

if TYPE_CHECKING:
    import datasets
    import pandas

    from selfeval.quality.embeddings.protocol import Embedder, Vectors
    from selfeval.runs.evaluator import Evaluator
    from selfeval.runs.judge import Judge
    from selfeval.runs.model import RunModel
    from selfeval.runs.policy import Policy
    from selfeval.runs.search import Found, RunSearch, SearchKind
    from selfeval.runs.seed_recommendation import RecommendedSeed

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

    def __init__(self, reader: RunReader, *, trust_remote_code: bool = False, servers: Sequence[str] = ()) -> None:
        self._reader, self._trust_remote_code, self._servers = reader, trust_remote_code, servers

    @classmethod
    def open(cls, folder: str | Path, *, trust_remote_code: bool = False, servers: Sequence[str] = ()) -> Run:
        """Open a run folder.

        Args:
            folder: folder or URL of the run, or of one of its rounds (`RUN/rounds/02`).
            trust_remote_code: run code that comes with the base when it is loaded. Default: False.
            servers: Optional. `key=value` strings for `url` and `key_variable` of the servers of the run. `search`, `embed`
                and `judge` ask no server that is not named here, because a run folder may come from somebody else.

        Raises:
            RunFolderError: the folder is not a run, or its run.json is damaged or was written by an incompatible version.

        Example:
            >>> named = ["embeddings.endpoint.url=http://localhost:8000/v1"]
            >>> Run.open("runs/first", servers=named).status
            'finished'
        """
        return cls(RunReader(local_run(folder)), trust_remote_code=trust_remote_code, servers=servers)

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
        return [Run(reader, trust_remote_code=self._trust_remote_code, servers=self._servers) for reader in self._reader.rounds]

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

    # -- search ---------------------------------------------------------------------------------------------------------

    def search(
        self,
        text: str,
        kind: SearchKind = "questions",
        count: int = 10,
        *,
        report_progress: Callable[[int, int], None] = lambda done, total: None,
        note: Callable[[str], None] = lambda text: None,
    ) -> list[Found]:
        """Find the records whose texts are most similar to a text, by the vectors of the run's embedder.

        The vectors are saved in `embeddings/` and the index in `search/` in the run folder, if it is writable.

        Args:
            text: any text.
            kind: `questions`, `replies`, or `pairs`, which are found by their questions. Default: `questions`.
            count: maximum number of records, > 0. Default: 10.
            report_progress: Optional. Receives the number of embedded texts and that of all texts, while the index is built.
            note: Optional. Receives a message if the index cannot be saved.

        Returns:
            The records, the most similar first.

        Raises:
            InputError: the text is empty, the count is not positive, or there is no such kind.
            MissingPackageError: faiss is not installed.
            RunFolderError: no such record is written yet, or a file is damaged.

        Example:
            >>> [found] = Run.open("runs/first").search("How many pens are left?", "pairs", 1)
            >>> found.confidence >= 0.5
            True
        """
        return self._search(report_progress, note).search(text, kind, count)

    def build_index(
        self,
        kind: SearchKind = "questions",
        *,
        report_progress: Callable[[int, int], None] = lambda done, total: None,
        note: Callable[[str], None] = lambda text: None,
    ) -> int:
        """Build and save the index for `search`, if there is none of the present texts, and return its number of texts.

        Args:
            kind, report_progress, note: see `search`. `pairs` have the index of the questions.

        Raises:
            InputError, MissingPackageError, RunFolderError: see `search`.
        """
        from selfeval.runs.search import check_kind

        searched = self._search(report_progress, note)
        return len(searched.replies if check_kind(kind) == "replies" else searched.questions)

    def recommend_seeds(
        self,
        count: int,
        *,
        report_progress: Callable[[int, int], None] = lambda done, total: None,
        note: Callable[[str], None] = lambda text: None,
    ) -> list[RecommendedSeed]:
        """Recommend training questions as seeds of a next run: where the evaluator is least certain.

        They differ from each other and from the seeds; see `selfeval.runs.seed_recommendation`.

        Args:
            count: maximum number of seeds, > 0.
            report_progress, note: see `search`.

        Raises:
            InputError: the count is not positive.
            MissingPackageError: faiss is not installed.
            RunFolderError: the run has no evaluation yet, or a file is damaged.
        """
        from selfeval.runs.seed_recommendation import recommend_seeds

        return recommend_seeds(self._reader, self._search(report_progress, note).questions, self._embedder, count)

    def _search(self, report_progress: Callable[[int, int], None], note: Callable[[str], None]) -> RunSearch:
        from selfeval.quality.vector_index import check_packages
        from selfeval.runs.search import RunSearch

        check_packages()  # before the model is loaded
        # Not kept: a run in progress has more records at the next call. The model is kept, because loading it is slow.
        return RunSearch(self._reader, self._embedder, report_progress=report_progress, note=note)

    # -- models ---------------------------------------------------------------------------------------------------------

    @cached_property
    def _model(self) -> RunModel:
        from selfeval.runs.model import RunModel

        return RunModel.load(self._reader, trust_remote_code=self._trust_remote_code)

    @cached_property
    def _embedder(self) -> Embedder:
        from selfeval.quality.embeddings.cache import EMBEDDINGS
        from selfeval.quality.embeddings.registry import embedder_of
        from selfeval.runs.servers import with_embedding_server

        asked = self.records("questions") if has_manifest(self.folder, "questions") else []
        texts = [seed.question for seed in self.records("seeds")] + [question.text for question in asked]
        config = with_embedding_server(self.folder, self.config, self._servers)
        backbone = self._model.backbone if config.embeddings.spec.needs_backbone else None
        return embedder_of(config, backbone, texts, folder=self.folder / EMBEDDINGS, note=warn)

    def embed(self, texts: Sequence[str]) -> Vectors:
        """Embed texts with the embedder of `[embeddings]`, fitted to the seeds and questions (docs/concepts/embeddings.md).

        The vectors are kept in the run folder, so that a text is embedded once. The default embedder loads the base model.

        Args:
            texts: N texts in any language.

        Returns:
            `[N, D]` in fp32, rows of length 1, so a dot product is the cosine; a blank text has a row of zeros.

        Raises:
            MissingPackageError: a package of the embedder is not installed.
            EndpointError: the embedder is a server that refuses or cannot be reached.

        Example:
            >>> vectors = Run.open("runs/first").embed(["Tom has 3 apples.", "Anna reads 4 books."])
            >>> len(vectors), bool(vectors[0] @ vectors[1] < 0.99)
            (2, True)
        """
        return self._embedder.embed(texts)

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
        from selfeval.runs.servers import with_judge_server

        with_judge_server(self.folder, self.config, self._servers)  # before the model is loaded
        return Judge.of_run(self._model, servers=self._servers)


def _texts(pair: Pair) -> dict[str, Any]:
    return {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}


def _messages(pair: Pair) -> dict[str, Any]:
    asked = [{"role": "user", "content": pair.prompt}]
    chosen, rejected = ([{"role": "assistant", "content": text}] for text in (pair.chosen, pair.rejected))
    return {"prompt": asked, "chosen": chosen, "rejected": rejected}
