"""The judge under test: the judge, the referee or the evaluator of a run, or any judge of any model."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal

from selfeval.backbone.roles import Backbone
from selfeval.config import JudgeRole, RunConfig, judge_spec
from selfeval.config.judges import REPLY
from selfeval.errors import InputError
from selfeval.judging.protocol import JudgeFit
from selfeval.judging.templates import Templates, templates_folder
from selfeval.labelling.threshold_file import saved_sure
from selfeval.report.labels import DEFAULT_SURE
from selfeval.runs.comparison import check_sure
from selfeval.runs.evaluator import Evaluator
from selfeval.runs.judge_fit import read_fit
from selfeval.runs.members import member_roles
from selfeval.runs.model import RunModel
from selfeval.runs.reader import RunReader, round_seed
from selfeval.stages.running import new_config
from selfeval.stages.shards import ModelHandle
from selfeval.store import content_hash, fingerprint
from selfeval.texts import nearest

__all__ = ["ROLES", "Subject", "subject_of"]

Role = Literal["judge", "referee", "evaluator"]
ROLES: tuple[Role, ...] = ("judge", "referee", "evaluator")
"""Roles of a run that can be measured."""


@dataclass(frozen=True)
class Subject:
    """A judge under test. Nothing is loaded until `load`.

    Attributes:
        role: its role.
        config: settings; `verdicts.keep` is the confidence from which a verdict counts.
        run: Optional. Folder of the run that it belongs to. Default: none, it is a judge of a model.
        seed: seed of what it samples. Default: 0.
    """

    role: Role
    config: RunConfig
    run: Path | None = None
    seed: int = 0

    @property
    def name(self) -> str:
        """Name of the judge: that of the registry, or `evaluator`."""
        if self.role == "evaluator":
            return self.role
        return judge_spec(self.role, self.config.judging(self.judge_role).judge).name

    @property
    def asks_server(self) -> bool:
        """Whether it sends texts to a server."""
        return self.role != "evaluator" and judge_spec(self.role, self.config.judging(self.judge_role).judge).is_remote

    @property
    def judge_role(self) -> JudgeRole:
        """The role of its prompts."""
        return "referee" if self.role == "referee" else "judge"

    @property
    def fit(self) -> JudgeFit:
        """Estimates of the run for its judge; none for another role, or without a run."""
        if self.run is None or self.role != "judge":
            return JudgeFit()
        return read_fit(self.config.verdicts, RunReader(self.run).folder)

    @property
    def key(self) -> str:
        """Fingerprint of everything that its judgements depend on. The threshold `keep` is applied to them afterwards."""
        verdicts = self.config.judging(self.judge_role).model_copy(update={"keep": 1.0})
        return fingerprint([
            *(self.role, str(self.run), self.seed, self.config.model, self.config.templates),
            *(part.model_dump(mode="json") for part in (verdicts, self.config.chat, self.config.backbone.context)),
            *(self.config.backbone.precision, self._of_run()),
        ])  # fmt: skip

    def _of_run(self) -> list[Any]:
        """Return what a run folder may replace without another setting: prompts, model, and the weights of the evaluator."""
        if self.run is None:
            return []
        reader = RunReader(self.run)
        known = [reader.run.get(name) for name in ("templates", "made_of", "commit", "date")]
        if self.role != "evaluator":
            return [*known, *(str(part) for part in vars(self.fit).values() if part is not None)]
        folders = [reader.roles_folder / role for role in member_roles(self.config)]
        files = sorted(file for folder in folders for file in folder.rglob("*") if file.is_file())
        return [*known, [(file.relative_to(reader.roles_folder).as_posix(), content_hash(file)) for file in files]]

    def as_json(self) -> dict[str, Any]:
        """Return role, name, model, run and the settings of the verdicts."""
        return {
            "role": self.role,
            "judge": self.name,
            "model": self.config.model,
            "run": None if self.run is None else str(self.run),
            "verdicts": self.config.verdicts.model_dump(mode="json"),
        }

    def load(self, day: date, *, trust_remote_code: bool = False) -> ModelHandle:
        """Load the model and its prompts.

        Args:
            day: date that chat templates print; not used for a run, which has its own.
            trust_remote_code: run code that comes with the model. Default: False.

        Raises:
            ModelError: the model or its templates cannot be used.
            RunFolderError: the run or its prompts cannot be read.
        """
        if self.run is not None:
            model = RunModel.load(RunReader(self.run), trust_remote_code=trust_remote_code)
            return ModelHandle(model.backbone, model.templates)
        config = self.config
        backbone = Backbone.load(config.model, config.backbone, trust_remote_code=trust_remote_code)
        # Also the prompt of a reply, after which the log-probs of the baseline are computed.
        kinds = dict.fromkeys((*config.verdicts.kinds(self.judge_role), REPLY.name))
        folder = templates_folder(config.model, config.templates)
        tokenizer, chat = backbone.loaded.tokenizer, config.chat
        return ModelHandle(backbone, Templates.load(folder, tokenizer, day, None, tuple(kinds), chat.arguments, chat.system))


def subject_of(
    run: Path | None = None,
    model: str | None = None,
    judge: str | None = None,
    settings: Sequence[str] = (),
    sure: float | None = None,
    *,
    trust_remote_code: bool = False,
) -> Subject:
    """Return the judge that the arguments name, without loading it.

    Args:
        run: folder of a run; either this or `model`.
        model: model folder or hub id.
        judge: for a run `judge` (default), `referee` or `evaluator`; for a model a judge of the registry (default: the setting
            `verdicts.judge`) or `referee`.
        settings: `key=value` strings, for a model only: a run has its own settings.
        sure: Optional. Confidence from which a verdict counts. Default: `verdicts.keep`.
        trust_remote_code: run code that comes with the model, to know its size. Default: False.

    Raises:
        InputError: not exactly one of run and model, or a judge or setting that does not exist.
        RunFolderError: the folder is not a run, or has no evaluator yet.
    """
    if (run is None) == (model is None):
        raise InputError("pass either the folder of a run, or --model MODEL")
    if sure is not None:
        check_sure(sure)
    if run is not None:
        return _of_run(run, judge or "judge", settings, sure)
    return _of_model(str(model), judge, settings, sure, trust_remote_code)


def _of_run(run: Path, judge: str, settings: Sequence[str], sure: float | None) -> Subject:
    if settings:
        raise InputError(
            f"{run} is a run, which has its own settings; remove --set {settings[0]}, or pass its model as --model"
        )
    named: Mapping[str, Role] = {role: role for role in ROLES}
    if judge not in named:
        raise InputError(f'a run has no judge "{judge}"{nearest(judge, ROLES)}; other judges are measured with --model MODEL')
    role, reader = named[judge], RunReader(run)
    if role == "evaluator":
        Evaluator.check(reader)
    config = reader.config
    # No setting of a run holds this for the evaluator, only its labels: a score and a reward do not abstain.
    keep = sure if sure is not None else _sure_of(reader) if role == "evaluator" else config.verdicts.keep
    return Subject(role, _with_keep(config, keep), Path(os.path.abspath(run)), round_seed(config.seed, reader.round))


def _sure_of(reader: RunReader) -> float:
    found = saved_sure(reader.folder)
    return DEFAULT_SURE if found is None else found


def _of_model(model: str, judge: str | None, settings: Sequence[str], sure: float | None, trusted: bool) -> Subject:
    named = () if judge in (None, "referee") else (f"verdicts.judge={judge}",)
    config = new_config(model=model, assignments=[*settings, *named], trust_remote_code=trusted)
    role: Role = "referee" if judge == "referee" else "judge"
    if role == "judge" and judge_spec(role, config.verdicts.judge).combines:
        raise InputError(
            "the accuracies of a combined judge are estimated in a run; pass the folder of a run with this judge, or measure "
            "its members one by one with --judge"
        )
    return Subject(role, _with_keep(config, config.verdicts.keep if sure is None else sure), None, config.seed)


def _with_keep(config: RunConfig, keep: float) -> RunConfig:
    return config.model_copy(update={"verdicts": config.verdicts.model_copy(update={"keep": keep})})
