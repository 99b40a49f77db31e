"""Write the records of a run as logs of Inspect, which `inspect view` opens: one log each for policy, evaluator and judge.

The format is that of `inspect_ai.log`, https://inspect.aisi.org.uk/eval-logs.html. A score that does not exist (a verdict that
could not be read, a question without gold) is an unscored one, never 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from sys import stderr
from typing import TYPE_CHECKING, Any

from selfeval.errors import MissingPackageError, RunFolderError
from selfeval.records import ComparedReplies, Question, Reply, ScoredPair, Verdict, VerdictState
from selfeval.runs.export_folder import free_folder
from selfeval.runs.reader import RunReader
from selfeval.store import writing

if TYPE_CHECKING:
    from inspect_ai.log import EvalLog, EvalSample, EvalScore
    from inspect_ai.scorer import Score

__all__ = ["LOGS", "export_log"]

LOGS = {"policy": "compared", "evaluator": "scored", "judge": "verdicts"}
"""The logs, and the kind of records that each is written from."""


def export_log(reader: RunReader, target: Path) -> dict[str, int]:
    """Write the logs to a folder, whole or not at all.

    Args:
        reader: reader of the run, or of one of its rounds. A run in progress has fewer logs.
        target: a new or empty folder.

    Returns:
        Number of samples of each log.

    Raises:
        MissingPackageError: Inspect is not installed.
        RunFolderError: the run has no verdicts yet, or a file is damaged.
        ExportError: the target is not empty.
        StorageError: the disk is full or cannot be written; nothing is left at the target.
    """
    try:
        from inspect_ai.log import write_eval_log
    except ImportError as error:
        raise MissingPackageError("selfeval export-log", "inspect_ai", extra="inspect") from error
    target, logs = free_folder(target), _Run(reader).logs()
    with writing(target, new=True) as folder:
        folder.mkdir()
        # It prints its progress to the standard output, which belongs to the command.
        with redirect_stdout(stderr):
            for name, log in logs.items():
                write_eval_log(log, folder / f"{name}.eval")
    return {name: len(log.samples or ()) for name, log in logs.items()}


class _Run:
    """The records of a run that the logs share."""

    def __init__(self, reader: RunReader) -> None:
        self.reader = reader
        self.questions: Mapping[str, Question] = {row.id: row for row in reader.records("questions")}
        self.replies: Mapping[str, Reply] = {row.id: row for row in reader.records("replies")}
        self.report = reader.report() if reader.is_finished("report") else {}

    def logs(self) -> dict[str, EvalLog]:
        """Return the logs whose records are written; the verdicts come first in a run."""
        found: dict[str, EvalLog] = {"judge": self._log("judge", self._of_judge(), {})}
        if self.reader.is_finished("evaluation"):
            shares = self.report.get("evaluator", {}), self.report.get("policy", {})
            found["evaluator"] = self._log("evaluator", self._of_evaluator(), _figures(shares[0], _EVALUATOR))
            found["policy"] = self._log("policy", self._of_policy(), _figures(shares[1], _POLICY))
        return found

    def _log(self, name: str, samples: Iterator[EvalSample], metrics: Mapping[str, Mapping[str, Any]]) -> EvalLog:
        from inspect_ai.log import EvalConfig, EvalDataset, EvalLog, EvalResults, EvalSpec

        config, made = self.reader.config, list(samples)
        versions = {key: str(value) for key, value in (self.reader.run.get("versions") or {}).items() if key != "python"}
        spec = EvalSpec(
            eval_id=f"{config.name}-{name}-{self.reader.round}",
            run_id=f"{config.name}-{self.reader.round}",
            created=f"{self.reader.run.get('date') or '1970-01-01'}T00:00:00+00:00",
            task=f"{config.name}-{name}",
            task_id=f"{config.name}-{name}",
            dataset=EvalDataset(name=LOGS[name], samples=len(made)),
            model=f"selfeval/{Path(config.model).name}",
            config=EvalConfig(),
            packages=versions,
            metadata={"run": config.name, "round": self.reader.round, "seed": config.seed, "domain": config.domain},
        )
        results = EvalResults(
            total_samples=len(made), completed_samples=len(made), scores=[_metrics(*row) for row in metrics.items()]
        )
        return EvalLog(status="success", eval=spec, results=results, samples=made)

    # -- samples --------------------------------------------------------------------------------------------------------

    def _of_policy(self) -> Iterator[EvalSample]:
        for row in self._rows("policy", ComparedReplies):
            before = self.replies[row.before].text
            scores = {
                "win": _score({"win": 1.0, "tie": 0.5, "loss": 0.0}.get(row.outcome), row.outcome, "invalid_response_format"),
                "gold": _score(row.gold_after, None),
                "evaluator_gain": _score(row.score_after - row.score_before, None),
            }
            yield self._sample(row.question_id, row.question_id, row.after, scores, {"before": before, **asdict(row)})

    def _of_evaluator(self) -> Iterator[EvalSample]:
        for row in self._rows("evaluator", ScoredPair):
            better = _better(row.gold_first, row.gold_second)
            chosen = "A" if row.margin > 0 else "B"
            scores = {
                "gold": _score(None if better is None else row.margin != 0 and chosen == better, chosen),
                "margin": _score(row.margin, chosen),
            }
            yield self._pair(row.question_id, row.first, row.second, chosen, scores, asdict(row), better or "")

    def _of_judge(self) -> Iterator[EvalSample]:
        for row in self._rows("judge", Verdict):
            chosen = None if row.probability is None or row.state == VerdictState.TIE else "AB"[row.probability < 0.5]
            said = "\n\n".join(row.evidence.raw_output) if row.evidence is not None else ""
            score = _score(row.probability, chosen or row.state.value, "invalid_response_format", said)
            yield self._pair(row.question_id, row.first, row.second, said, {"probability_of_a": score}, asdict(row), "")

    def _rows(self, log: str, kind: type[Any]) -> Iterable[Any]:
        rows = self.reader.records(LOGS[log])
        assert all(isinstance(row, kind) for row in rows)
        return rows

    def _pair(
        self,
        question: str,
        first: str,
        second: str,
        output: str,
        scores: dict[str, Score],
        metadata: dict[str, Any],
        target: str,
    ) -> EvalSample:
        """Return a sample that has two replies as its choices, A and B."""
        choices = [self.replies[first].text, self.replies[second].text]
        return self._sample(f"{first} and {second}", question, output, scores, metadata, choices, target)

    def _sample(
        self,
        name: str,
        question: str,
        output: str,
        scores: dict[str, Score],
        metadata: dict[str, Any],
        choices: list[str] | None = None,
        target: str = "",
    ) -> EvalSample:
        from inspect_ai.log import EvalSample
        from inspect_ai.model import ChatMessageAssistant, ModelOutput

        asked = self._asked(question)
        model = f"selfeval/{Path(self.reader.config.model).name}"
        return EvalSample(
            id=name,
            epoch=1,
            input=asked,
            choices=choices,
            target=target,
            messages=[*asked, ChatMessageAssistant(content=output, source="generate")],
            output=ModelOutput.from_content(model, output),
            scores=scores,
            metadata=metadata,
        )

    def _asked(self, name: str) -> list[Any]:
        """Return the messages of a question."""
        from inspect_ai.model import ChatMessageAssistant, ChatMessageSystem, ChatMessageUser

        kinds = {"system": ChatMessageSystem, "user": ChatMessageUser, "assistant": ChatMessageAssistant}
        question = self.questions.get(name)
        if question is None:
            raise RunFolderError(f"{self.reader.folder} has a record of question {name}, which is not among its questions")
        if not question.messages:
            return [ChatMessageUser(content=question.text)]
        return [kinds[message.role](content=message.content) for message in question.messages]


def _score(value: float | None, answer: str | None, reason: str | None = None, explanation: str | None = None) -> Score:
    """Return a score; without a value an unscored one with a reason."""
    from inspect_ai.scorer import Score

    if value is None:
        return Score.unscored(reason=reason, answer=answer, explanation=explanation)
    return Score(value=float(value), answer=answer, explanation=explanation)


def _better(gold_first: bool | None, gold_second: bool | None) -> str | None:
    """Return the better reply by gold, `A` or `B`; None if gold has none."""
    return None if gold_first is None or gold_second is None or gold_first == gold_second else "A" if gold_first else "B"


# -- figures of the report ----------------------------------------------------------------------------------------------

_EVALUATOR = {"gold": ("accuracy_gold",), "judge": ("accuracy_judge",)}
_POLICY = {"win": ("win_rate", "length_controlled"), "gold": ("gold_after", "gold_before", "gold_gain")}


def _figures(part: Mapping[str, Any], names: Mapping[str, Iterable[str]]) -> dict[str, dict[str, Any]]:
    """Return the figures of a part of the report by scorer and name, without those that are absent."""
    return {scorer: {name: part[name] for name in figures if part.get(name)} for scorer, figures in names.items()}


def _metrics(scorer: str, figures: Mapping[str, Any]) -> EvalScore:
    """Return figures as metrics; the interval and the number of questions are their metadata."""
    from inspect_ai.log import EvalMetric, EvalScore

    metrics = {
        name: EvalMetric(name=name, value=figure["value"], metadata={key: figure[key] for key in ("ci_low", "ci_high", "n")})
        for name, figure in figures.items()
        if figure["value"] is not None
    }
    return EvalScore(name=scorer, scorer=scorer, metrics=metrics)
