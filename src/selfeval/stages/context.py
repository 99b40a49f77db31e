"""The context passed to every stage: configuration, run folder, backbone, templates, and progress display."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from selfeval.backbone.meters import peak_resident_bytes
from selfeval.backbone.pass_size import measures_passes, pick_pass_tokens
from selfeval.backbone.process_group import SINGLE_PROCESS, ProcessGroup, by_first
from selfeval.backbone.roles import Backbone
from selfeval.backbone.snapshot import commit_of
from selfeval.backbone.threads import is_set_by_user
from selfeval.config import JudgeRole, RunConfig
from selfeval.errors import ModelError, RunFolderError
from selfeval.judging.judges import make_judge
from selfeval.judging.protocol import Judge, JudgeFit
from selfeval.judging.server.cache import ANSWERS
from selfeval.judging.templates import Templates
from selfeval.prompt import Prompt
from selfeval.quality.vector_groups import VectorGroups
from selfeval.records import Label, Pair, Question, ReferenceAnswer, Reply, Seed, Split
from selfeval.rollout.engines import RolloutEngine, make_engine
from selfeval.rollout.thinking import ThinkingTokens
from selfeval.runs.judge_fit import FIT_FILE, read_fit
from selfeval.runs.members import load_members
from selfeval.runs.reader import backbone_config, pairs_of, round_seed
from selfeval.runs.reply_limit import reply_limit
from selfeval.runs.templates import day_of
from selfeval.stages.draws import Draws
from selfeval.stages.given import Given, read_given
from selfeval.stages.prompts import load_templates
from selfeval.stages.seeds import seeds_of
from selfeval.stages.shards import POISONED, Executor, InProcess, ModelHandle
from selfeval.stages.terminal import Terminal
from selfeval.stages.trackers import Trackers
from selfeval.store import RunStore, writing
from selfeval.training.context import POLICY
from selfeval.training.scoring import EvaluatorScorer, Member, Pessimism

if TYPE_CHECKING:
    from selfeval.stages.workers import Workers

__all__ = ["Context", "Trainer", "Training", "WorkersMemory", "in_process", "in_this_process"]

Training = Callable[["Context"], dict[str, Any]]
"""Trains and saves the roles of a stage, and returns its counts. A trainer may pickle it, so it is a function of a module."""

Trainer = Callable[["Context", Training], dict[str, Any]]
"""Calls a training, in this process or in several that train together."""


@dataclass(frozen=True)
class WorkersMemory:
    """Memory of the workers of a stage.

    Attributes:
        peak_bytes: largest resident memory of one of them, in bytes.
        events: changes to their batch limits, as in run.json.
    """

    peak_bytes: int
    events: tuple[dict[str, Any], ...] = ()

    def __or__(self, other: WorkersMemory) -> WorkersMemory:
        """Return the memory of all workers of both. Equal events are one, with their number of occurrences."""
        events: dict[tuple[Any, ...], dict[str, Any]] = {}
        for event in (*self.events, *other.events):
            key = tuple(event[name] for name in ("phase", "kind", "from", "to"))
            before = events.get(key, {"times": 0})
            events[key] = {**event, "times": event["times"] + before["times"]}
        return WorkersMemory(max(self.peak_bytes, other.peak_bytes), tuple(events.values()))


def in_process(context: Context) -> Executor:
    """Return an executor that computes shards in this process."""
    return InProcess(lambda: context.model)


def in_this_process(context: Context, training: Training) -> dict[str, Any]:
    """Train in this process."""
    return training(context)


@dataclass
class Context:
    """One round of a run in this process. The backbone is loaded when a stage first needs it.

    Attributes:
        store: folder of this round; for round 1, the run folder itself.
        earlier: folders of the previous rounds, in order.
        later: folders of the following rounds, which the report of round 1 covers.
        trust_remote_code: run code that comes with the model; set by the user on the command line.
        allow_code_execution: run code in replies with the unit tests of a gold file; set by the user on the command line.
        restart: whether the user agrees to set aside finished or partial work that has to be redone.
        force: continue although a check found that the result cannot be useful.
        labels: labels of people as they were when the current stage began, which its fingerprint of the inputs covers.
        executor_of: returns the executor of a stage that writes shards. Default: shards are computed in this process.
        workers: processes that compute shards; None if there are none but this one. Default: None.
        trainer: calls the training of a stage. Default: in this process.
        processes: the processes that train together, in a worker of a training. Default: this one alone.
        workers_memory: memory of the workers of the current stage; None if there were none. Default: None.
    """

    config: RunConfig
    store: RunStore
    terminal: Terminal
    earlier: Sequence[RunStore] = ()
    later: list[RunStore] = field(default_factory=list)
    trust_remote_code: bool = False
    allow_code_execution: bool = False
    restart: bool = False
    force: bool = False
    labels: Sequence[Label] = ()
    executor_of: Callable[[Context], Executor] = in_process
    workers: Workers | None = None
    trainer: Trainer = in_this_process
    processes: ProcessGroup = SINGLE_PROCESS
    workers_memory: WorkersMemory | None = None

    @property
    def round(self) -> int:
        """Number of this round, counted from 1."""
        return len(self.earlier) + 1

    @property
    def first(self) -> RunStore:
        """Folder of round 1."""
        return self.earlier[0] if self.earlier else self.store

    @property
    def name(self) -> str:
        """Name of the run, including the round if it is a later one."""
        return self.config.name if self.round == 1 else f"{self.config.name}, round {self.round}"

    @cached_property
    def backbone(self) -> Backbone:
        with self.terminal.waiting(f"loading {self.config.model}"):
            # With the precision that round 1 resolved, so a resumed run does not change it on another machine.
            settings = backbone_config(self.config, self.first.run)
            backbone = Backbone.load(self.config.model, settings, trust_remote_code=self.trust_remote_code)
            self._refuse_other_commit()
            # Now rather than when the first role is added, after hours of sampling.
            backbone.roles.check_targets()
            for layer in dict.fromkeys(read.layer for read in self.config.evaluator.inputs if read.layer is not None):
                backbone.check_layer(layer)
            self.engine.check(backbone)
            measured = self._set_pass_tokens(backbone)
        backbone.budget.notify = self.terminal.note
        backbone.budget.processes = self.processes
        for note in backbone.loaded.notes:
            self.terminal.note(note)
        loaded, plan = backbone.loaded, backbone.loaded.placement
        device: dict[str, Any] = {
            "device": str(loaded.device),
            "model": self.config.model,
            "asked": self.config.backbone.precision,
            "precision": loaded.precision,
            "notes": loaded.notes,
            **measured,
        }
        self.store.update_run(device=device if plan is None else {**device, "placement": plan.as_json()})
        return backbone

    def _set_pass_tokens(self, backbone: Backbone) -> dict[str, int]:
        """Set the size of scoring passes to that of round 1, or measure it, and return what run.json records of it.

        Nothing is measured if a variable of the environment sets the number of threads: a user who does so repeats runs bit for
        bit.
        """
        kind, settings = backbone.loaded.device.type, self.config.backbone
        if kind != "cpu" or settings.pass_tokens != "auto":
            return {}
        # Results depend on it in their last bits, so a resumed run continues with the size that it began with.
        earlier = self.first.run.get("device") or {}
        if earlier.get("device") == kind and earlier.get("model") == self.config.model:
            tokens = earlier.get("pass_tokens")
            if tokens is not None and (type(tokens) is not int or tokens < 1):
                raise RunFolderError(
                    f"{self.first.root / 'run.json'} is damaged: device.pass_tokens is {tokens!r} instead of a number of "
                    "tokens; restore it from a backup"
                )
        elif measures_passes(backbone) and not is_set_by_user():
            tokens = pick_pass_tokens(backbone, settings.batch_tokens)
            self.terminal.note(f"scoring passes of {tokens:,} tokens, the fastest size on this machine")
        else:
            tokens = None
        if tokens is None:
            return {}
        backbone.budget.pass_tokens = tokens
        return {"pass_tokens": tokens}

    def _refuse_other_commit(self) -> None:
        """Refuse a hub commit that differs from the one in the stages' keys.

        Loading queries the hub again, and a new commit may have been published in the meantime.
        """
        known, now = self.first.run.get("commit"), commit_of(self.config.model)
        if known != now and known is not None:
            raise ModelError(
                f"model {self.config.model} changed on the hub while this command ran (commit {known}, now {now}); rerun the "
                "same command"
            )

    def release(self) -> None:
        """Release the backbone and all its roles to free memory for the next round."""
        # A cached property is in the instance's __dict__; without the entry, the next access loads the model again.
        if self.__dict__.pop("backbone", None) is not None:
            gc.collect()  # a model and its hooks form a reference cycle
        if (engine := self.__dict__.pop("engine", None)) is not None:
            engine.close()

    @cached_property
    def _vectors(self) -> VectorGroups:
        return VectorGroups()

    @property
    def model(self) -> ModelHandle:
        """The part of the context that the work of a stage needs."""
        start = self.earlier[-1].root / "roles" / POLICY if self.earlier else None
        return ModelHandle(self.backbone, self.templates, start, self.answers, self.engine, vectors=self._vectors)

    @cached_property
    def engine(self) -> RolloutEngine:
        """The engine that samples replies and the policy's rollouts."""
        return make_engine(self.config.model, self.config.backbone)

    @cached_property
    def executor(self) -> Executor:
        """Calls the work of a stage that writes shards. A stage has its own, made when it first needs one."""
        return self.executor_of(self) if self.workers is None else self.workers.executor(self)

    def close_executor(self) -> None:
        """Close the executor at the end of a stage, if the stage used one."""
        if (executor := self.__dict__.pop("executor", None)) is not None:
            executor.close()

    def ensure_start(self) -> str:
        """Load the role that this round starts from if needed, and return its name."""
        return self.model.start()

    def load_evaluators(self) -> list[Member]:
        """Load the trained evaluator members into the backbone if needed, and return them."""
        return load_members(self.backbone, self.store.root / "roles", self.config)

    def scorer(self, pessimism: Pessimism = "mean") -> EvaluatorScorer:
        """Return the evaluator members as one scorer.

        Args:
            pessimism: how the members' scores are combined. Default: their mean, as the evidence uses it.
        """
        config, members = self.config, self.load_evaluators()
        return EvaluatorScorer(
            self.backbone, config.backbone.batch_tokens, members, pessimism, config.policy.uncertainty_weight
        )

    def judge(self, role: JudgeRole = "judge") -> Judge:
        """Return the judge of the run, or the referee. It runs under the active role of the backbone.

        Args:
            role: Optional. `referee` for evaluation. Default: the judge that labels training pairs.
        """
        return make_judge(
            *(self.backbone, self.templates, self.config.judging(role)),
            batch_size=self.config.backbone.rollout_batch_size,
            role=role,
            seed=self.round_seed,
            answers=self.answers,
            fit=self.judge_fit() if role == "judge" else JudgeFit(),
        )

    def judge_fit(self) -> JudgeFit:
        """Return what the stage verdicts estimated for the judge; nothing before it, or if there is nothing to estimate."""
        # A run with the user's own pairs has none: its judge is only timed.
        root = self.store.root
        return read_fit(self.config.verdicts, root) if (root / FIT_FILE).is_file() else JudgeFit()

    @property
    def answers(self) -> Path:
        """Folder of the answers of servers, for all rounds."""
        return self.first.root / ANSWERS

    def take_memory_events(self) -> list[dict[str, Any]]:
        """Return the changes to the batch limits of the backbone, here and in workers, since the last call."""
        backbone: Backbone | None = self.__dict__.get("backbone")
        own = [event.as_json() for event in backbone.budget.take_events()] if backbone else []
        memory, self.workers_memory = self.workers_memory, None
        return own if memory is None else [*own, *memory.events]

    def add_workers_memory(self, memory: WorkersMemory) -> None:
        """Add the memory of workers to that of the current stage."""
        self.workers_memory = memory if self.workers_memory is None else self.workers_memory | memory

    def peak_bytes(self) -> int:
        """Return the largest resident memory, in bytes: of the workers if the stage had some, or of this process."""
        return peak_resident_bytes() if self.workers_memory is None else self.workers_memory.peak_bytes

    @cached_property
    def templates(self) -> Templates:
        """The templates that were copied into the run folder at the start of the run."""
        found = load_templates(self.config, self.first, self.backbone.loaded.tokenizer, self.day)
        if unread := found.ignored_arguments(self.config.chat.arguments):
            self.terminal.note(f"chat.arguments: the model's chat template does not read {', '.join(unread)}")
        return found

    @cached_property
    def day(self) -> date:
        """The date that templates print instead of today's: the day the run began."""
        return day_of(self.first.run)

    @cached_property
    def trackers(self) -> Trackers:
        named = self.config.model_copy(update={"name": self.name})
        return Trackers(named, self.store.root / "trackers", self.terminal)

    def log(self, stage: str, values: Mapping[str, Any]) -> None:
        """Write one line of a stage's metrics to its file and to the configured trackers."""
        self.store.add_metrics(stage, values)
        if self.processes.rank == 0:
            self.trackers.log(stage, values)

    def train(self, training: Training) -> dict[str, Any]:
        """Call the training of a stage, and return its counts.

        Args:
            training: takes the context of the process in which it runs.
        """
        return self.trainer(self, training)

    @contextmanager
    def writing_role(self, role: str) -> Iterator[Path]:
        """Write the folder of a role in one step. Of several processes, one writes it; the others find it at the end."""
        if self.processes.rank == 0:
            self.store.check_writable()
            with writing(self.role_folder(role)) as folder:
                yield folder
                self.store.check_writable()  # again, as a large role takes long to write
        else:
            with TemporaryDirectory() as unused:
                yield Path(unused)
        by_first(self.processes, f"writing the role {role}", lambda: None)

    @cached_property
    def seeds(self) -> list[Seed]:
        return seeds_of(self.config, self.given)

    @cached_property
    def given(self) -> Given | None:
        """The questions, replies or pairs of the user's file; None if the model writes them."""
        return read_given(self.config)

    def questions(self, split: Split) -> list[Question]:
        """Return the questions of a split, without those whose replies could not be written."""
        poisoned = [drop for drop in self.store.read_dropped("replies") if drop.reason == POISONED]
        lost = {name for drop in poisoned for name in drop.detail.get("questions", ())}
        return [q for q in self.store.read("questions", Question) if q.split == split and q.id not in lost]

    def training_pairs(self) -> list[Pair]:
        """Return the kept pairs of the training questions of all rounds so far."""
        return [p for store in (*self.earlier, self.store) for p in store.read(pairs_of(Split.TRAIN), Pair)]

    @cached_property
    def _reference_answers(self) -> dict[str, str]:
        return {
            w.question_id: w.text
            for store in (*self.earlier, self.store)
            for w in store.read("reference_answers", ReferenceAnswer)
        }

    def grade_prompt(self, question_id: str, question: str) -> Prompt:
        """Return the prompt that evaluator and critic read before a reply.

        It includes the model's reference answer if the template shows one.
        """
        # Looked up only if needed, because the folder is empty without a template that shows reference answers.
        reference_answer = self._reference_answers[question_id] if self.templates.grades_with_reference_answer else ""
        return self.templates.grade_prompt(question, reference_answer, alone=self.config.evaluator.varies_reference)

    def typed_ids(self, prompt: Prompt, text: str) -> tuple[int, ...]:
        """Return the token ids of a typed reply with its end token, shortened so that prompt and reply fit the context."""
        loaded, ids = self.backbone.loaded, self.templates.reply_ids(text)
        if loaded.context_length is not None:
            ids = ids[: max(0, loaded.context_length - len(prompt.ids) - 1)]
        return (*ids, *loaded.eos_ids[:1])

    def replies(self, store: RunStore | None = None) -> dict[str, Reply]:
        """Return the replies of a round by id.

        Args:
            store: Optional. Folder of the round. Default: this round.
        """
        return {r.id: r for r in (store or self.store).read("replies", Reply)}

    @property
    def reply_limit(self) -> int:
        """Token limit of replies; decided by the stage replies if the setting is `auto`."""
        return reply_limit(self.config.replies, self.store.root)

    @property
    def thinking(self) -> ThinkingTokens | None:
        """Markers and limit of the thinking before a reply; None if the model has no tokens for it."""
        return self.templates.thinking(self.config.replies.max_thinking_tokens)

    @property
    def round_seed(self) -> int:
        """The run's seed in round 1; in a later round, a seed derived only from the run's seed and the round number."""
        return round_seed(self.config.seed, self.round)

    @property
    def draws(self) -> Draws:
        """The random numbers of this round."""
        return Draws(self.round_seed)

    def random(self, *names: object) -> random.Random:
        """Return a generator seeded only by the run's seed, the round and these names."""
        return self.draws.random(*names)

    def seed(self, *names: object) -> int:
        """Return a seed derived only from the run's seed, the round and these names."""
        return self.draws.seed(*names)

    def role_folder(self, role: str) -> Path:
        return self.store.root / "roles" / role

    def has_role(self, role: str) -> bool:
        """Return whether the folder of a role exists; it is written in one rename, so it is complete.

        Process 0 looks. On a shared file system another process may not see yet what an earlier worker wrote.
        """
        return by_first(self.processes, f"whether {role} is trained", self.role_folder(role).is_dir)

    def checkpoint_folder(self, stage: str) -> Path:
        return self.store.root / "checkpoints" / stage
