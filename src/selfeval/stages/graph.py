"""The stages of a round: what each reads, writes and depends on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any, Literal

from selfeval.backbone.fingerprint import model_identity
from selfeval.config import BackboneConfig, EmbeddingEndpointConfig, EndpointConfig, RunConfig, VerdictsConfig
from selfeval.judging.kinds import kinds_of_run
from selfeval.judging.sources import prompt_sources, tokenizer_files
from selfeval.judging.templates import templates_folder
from selfeval.labelling.label_file import LabelFile
from selfeval.labelling.training import labels_key, training_key
from selfeval.records import Label, Split
from selfeval.report.map_points import MAP_FILE
from selfeval.runs.judge_fit import FIT_FILE
from selfeval.runs.members import member_roles
from selfeval.runs.reader import pairs_of
from selfeval.runs.reply_limit import LIMIT_FILE
from selfeval.stages import evaluation, evaluator, pairs, policy, questions, replies, report, steps, verdicts
from selfeval.stages.context import Context
from selfeval.stages.given import given_key
from selfeval.stages.gold import gold_key
from selfeval.stages.input_files import file_fingerprints
from selfeval.stages.judge_probe import PROBE_FILE
from selfeval.stages.seeds import replied_seeds
from selfeval.store import Expected, Ledger, Output, fingerprint
from selfeval.training.step_evaluator import STEP_EVALUATOR

__all__ = ["STAGES", "Edge", "Stage", "input_fingerprints", "ledger_of", "source_of", "stage_keys", "with_labels"]


@dataclass(frozen=True)
class Edge:
    """A stage whose output another stage reads.

    Attributes:
        stage: name of the stage that is read.
        rounds: the round in which it is read: the reader's own round (`this`), the one before it (`previous`), or all rounds
            after it that are up to date (`later`; only round 1 of a run with several rounds has this edge).
    """

    stage: str
    rounds: Literal["this", "previous", "later"] = "this"


@dataclass(frozen=True)
class Stage:
    """One stage of the pipeline.

    Attributes:
        run: does the work and returns counts for the manifest.
        reads: stages whose output it reads. The nearest ones are enough: an output's fingerprint covers its own inputs.
        sections: configuration sections and settings, by dotted name, that its output depends on, in addition to those of the
            stages that it reads.
        prompts: kinds of prompts that it reads, in addition to those of the stages that it reads and of its judges.
        outputs: files and folders that must exist when it is finished, in addition to its shards.
        roles: returns the names of the roles that it writes, which are outputs too.
        owned: further files of the run folder that it writes.
        notes: files about its work, which are moved with its results, but alone are no work that could be lost.
        trains: whether it trains a role. If one of its files is lost, it restarts from scratch instead of filling the gap.
        gathers: whether it only combines the output of other stages, and is overwritten when that changes.
        computes: whether it runs the model. Default: yes.
        maps: whether it computes shards or batches, which workers can do.
        labels: returns a fingerprint of the labels of people that it reads, from all labels of the round; empty without any.
        wanted: whether it is a stage of a run. The stages after it read the one before it if it is not. Default: of every run.
    """

    name: str
    run: Callable[[Context], dict[str, Any]]
    reads: tuple[Edge, ...]
    sections: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    roles: Callable[[RunConfig], tuple[str, ...]] | None = None
    owned: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    trains: bool = False
    gathers: bool = False
    computes: bool = True
    maps: bool = False
    labels: Callable[[Sequence[Label]], str] | None = None
    wanted: Callable[[RunConfig], bool] = lambda config: True

    def output_paths(self, root: Path, config: RunConfig) -> list[Path]:
        roles = self.roles(config) if self.roles else ()
        return [*(root / path for path in self.outputs), *(root / "roles" / role for role in roles)]

    def prompts_read(self, config: RunConfig) -> tuple[str, ...]:
        """Return the kinds of prompts that its output depends on, including those of the judge or referee that it asks.

        Policy training depends on the referee only if the held-out judge is enabled.
        """
        if self.name == "verdicts":
            return (*self.prompts, *config.verdicts.kinds("judge"))
        if self.name == "evaluation" or (self.name == "policy" and config.policy.judge_every is not None):
            return (*self.prompts, *config.verdicts.kinds("referee"))
        return self.prompts

    def owned_paths(self, root: Path, config: RunConfig) -> list[Path]:
        return [*self.output_paths(root, config), *(root / path for path in self.owned)]

    def moved_paths(self, root: Path, config: RunConfig) -> list[Path]:
        """Return all files and folders outside its folder that are set aside and restored with its results."""
        return [*self.owned_paths(root, config), *(root / path for path in self.notes)]

    def kept_paths(self, root: Path) -> list[Path]:
        """Return outputs that no stage reads but that must be intact: metrics, dropped records and the points of the map."""
        return [root / path for path in self.owned if path.startswith(("dropped/", "metrics/", MAP_FILE))]


STAGES: tuple[Stage, ...] = (
    Stage(
        "questions",
        questions.run,
        # Round 1 starts from the model and the user's files, which are part of the first key.
        reads=(Edge("policy", "previous"),),
        sections=(
            "backbone.precision",
            "backbone.context",
            "seed",
            "backbone.rollout_batch_size",
            "chat.arguments",
            "questions",
        ),
        prompts=("ask",),
        owned=("dropped/questions",),
        maps=True,
    ),
    Stage(
        "replies",
        replies.run,
        reads=(Edge("questions"),),
        sections=("replies", "chat.system", "evaluation.temperature", "evaluation.top_p"),
        prompts=("reply",),
        outputs=("reference_answers", LIMIT_FILE),
        owned=("dropped/replies",),
        maps=True,
    ),
    Stage(
        "verdicts",
        verdicts.run,
        reads=(Edge("replies"),),
        sections=("verdicts",),
        owned=("dropped/verdicts",),
        notes=(PROBE_FILE, FIT_FILE),
        maps=True,
    ),
    Stage(
        "pairs",
        pairs.run,
        reads=(Edge("verdicts"),),
        outputs=tuple(pairs_of(split) for split in Split),
        computes=False,
        labels=training_key,
    ),
    Stage(
        "evaluator",
        evaluator.run,
        reads=(Edge("pairs"),),
        sections=("backbone.lora", "backbone.batch_tokens", "evaluator"),
        prompts=("grade",),
        roles=member_roles,
        owned=("checkpoints/evaluator", "metrics/evaluator.jsonl"),
        trains=True,
    ),
    Stage(
        "steps",
        steps.run,
        # It reads replies; after the evaluator, so that enabling it reruns no verdict.
        reads=(Edge("evaluator"),),
        sections=("steps",),
        outputs=(f"roles/{STEP_EVALUATOR}",),
        owned=("dropped/steps", "checkpoints/steps", "metrics/steps.jsonl"),
        trains=True,
        wanted=lambda config: config.steps.enabled,
        maps=True,
    ),
    Stage(
        "policy",
        policy.run,
        reads=(Edge("steps"),),
        sections=("policy",),
        roles=policy.output_roles,
        owned=("checkpoints/policy", "metrics/policy.jsonl", "metrics/watchdogs.jsonl"),
        trains=True,
    ),
    Stage(
        "evaluation",
        evaluation.run,
        reads=(Edge("policy"),),
        sections=("domain", "gold", "evaluation"),
        outputs=("evaluation/figures.json", f"evaluation/{evaluation.FIRST_PAIRS}", evaluation.SCORED, evaluation.COMPARED),
        owned=("metrics/evaluation.jsonl", MAP_FILE),
        maps=True,
    ),
    Stage(
        "report",
        report.run,
        reads=(Edge("evaluation"), Edge("evaluation", "later")),
        sections=("name",),
        outputs=("report.json",),
        owned=("index.html",),
        gathers=True,
        computes=False,
        labels=labels_key,
    ),
)


# -- the ledger ---------------------------------------------------------------------------------------------------------


def ledger_of(context: Context) -> Ledger:
    """Return the ledger of a round, with the configuration and the inputs that its stages should have."""
    root, config = context.store.root, context.config
    keys, labels = stage_keys(config, context.seeds, context.round, context.day), LabelFile(root).read()
    expected = {
        stage.name: Expected(
            keys[stage.name], _outputs_read(context, stage), stage.owned_paths(root, config), _labels_read(labels, stage)
        )
        for stage in STAGES
        if stage.wanted(config)
    }
    return Ledger(root, expected)


def with_labels(ledger: Ledger, context: Context, stage: Stage) -> Ledger:
    """Return the ledger with the labels of people as they are now, which the stage reads from the context.

    People may label while the stages before it run, so those at the start of the round would be too old. They are read once:
    the fingerprint is that of the labels that are used.
    """
    if stage.labels is None:
        return ledger
    context.labels = LabelFile(ledger.root).read()
    expected = replace(ledger.expected[stage.name], added=_labels_read(context.labels, stage))
    return Ledger(ledger.root, {**ledger.expected, stage.name: expected})


def source_of(name: str, config: RunConfig) -> str:
    """Return the stage that is read where this one is named: itself, or the nearest wanted one before it."""
    stage = next(stage for stage in STAGES if stage.name == name)
    return name if stage.wanted(config) else source_of(stage.reads[0].stage, config)


def _outputs_read(context: Context, stage: Stage) -> list[Output | int]:
    """Follow the edges of a stage to the folders of their rounds."""
    found: list[Output | int] = []
    for edge in stage.reads:
        if edge.rounds == "this":
            found.append(Output(context.store.root, source_of(edge.stage, context.config)))
        elif edge.rounds == "previous":
            # Empty in round 1, which has no previous round.
            found += [Output(store.root, edge.stage) for store in context.earlier[-1:]]
        elif context.round == 1 < context.config.rounds:
            # The number of rounds counts too: a report of one round of three differs from that of a run of one round.
            found += [context.config.rounds, *(Output(store.root, edge.stage) for store in context.later)]
    return found


def _labels_read(labels: Sequence[Label], stage: Stage) -> list[str]:
    key = stage.labels(labels) if stage.labels else ""
    return [key] if key else []  # without labels, a run keeps the fingerprints that it had before there were any


# -- keys ---------------------------------------------------------------------------------------------------------------


def stage_keys(config: RunConfig, seeds: Sequence[Any], number: int = 1, day: date | None = None) -> dict[str, str]:
    """Compute, for each stage, a fingerprint of everything that its output depends on.

    Args:
        config: configuration of the run.
        seeds: seeds of the run.
        number: number of the round; a later round depends on the previous round's policy. Default: 1.
        day: Optional. Date that templates print. Default: today.
    """
    # Computed once for all rounds and stages; each of these reads files.
    values, day = _with_contents(config), day or date.today()
    folder, verdicts = templates_folder(config.model, config.templates), config.verdicts
    sources = prompt_sources(folder, day, kinds_of_run(verdicts), verdicts.rubric)
    replies_of_seeds = _seed_replies(config, seeds)
    previous: dict[str, str] = {}
    for round_number in range(1, number + 1):
        keys: dict[str, str] = {}
        for stage in STAGES:
            # Chained: a stage's key changes whenever the key of a stage that it reads does, also across rounds.
            read: list[Any] = [keys[edge.stage] for edge in stage.reads if edge.rounds == "this"]
            if previous:
                read += [["round", round_number, previous[edge.stage]] for edge in stage.reads if edge.rounds == "previous"]
            # Exactly one predecessor, since a round is a chain. The first stage of round 1 has none and starts from the inputs.
            [before] = read or [_origin(config, seeds, sources["chat"], day)]
            if not stage.wanted(config):
                keys[stage.name] = before  # the stages after it depend on the one before it
                continue
            # Dotted names such as `backbone.lora` descend into the nested configuration.
            sections = {name: reduce(getitem, name.split("."), values) for name in stage.sections}
            prompts = {kind: sources[kind] for kind in stage.prompts_read(config)}
            if "referee" in prompts and (referee := values["evaluation"].get("referee")):
                sections["evaluation.referee"] = referee
            sections |= _engine(config.backbone, stage.name) | _embedder(values, stage.name)
            sections |= replies_of_seeds if stage.name == "evaluation" else {}
            keys[stage.name] = fingerprint([before, stage.name, sections, prompts])
        previous = keys
    return previous


def _origin(config: RunConfig, seeds: Sequence[Any], chat: Any, day: date) -> list[Any]:
    """Return the identity of everything that round 1 starts from."""
    tokenizer = [_tokenizer_day(config.model, day), chat]
    # Only the questions of the seeds: their replies are read by the evaluation alone (`_seed_replies`), other fields never.
    return [model_identity(config.model), tokenizer, [seed.question for seed in seeds], *given_key(config)]


def _seed_replies(config: RunConfig, seeds: Sequence[Any]) -> dict[str, Any]:
    """Return the replies of the seeds, on which the evaluation depends; empty without any: such runs keep their keys."""
    found = replied_seeds(config, seeds)
    return {"replies of seeds": found} if found else {}


def _with_contents(config: RunConfig) -> dict[str, Any]:
    """Return the configuration with user files identified by content instead of by path."""
    values = config.model_dump(mode="json")
    for section in ("questions", "replies"):
        del values[section]["file"]  # part of the first key
    # Without these settings, where they have their defaults, runs from before there were any keep their keys.
    for section, name in _ADDED:
        if values[section][name] == type(getattr(config, section)).model_fields[name].default:
            del values[section][name]
    values["verdicts"].get("pointwise", {}).pop("rubric", None)  # its content is among the prompts
    if values["verdicts"]["votes"] == 1:
        # A single vote is greedy; without the settings, runs from before there were votes keep their keys.
        del values["verdicts"]["votes"], values["verdicts"]["vote_temperature"]
    if calibration := _calibration(config.verdicts):
        values["verdicts"]["calibration"] = calibration
    else:
        del values["verdicts"]["calibration"]
    for settings in (values["verdicts"].get("endpoint", {}), values["evaluation"].get("referee", {})):
        for name in EndpointConfig.WITHOUT_EFFECT & settings.keys():
            del settings[name]
    for name in EmbeddingEndpointConfig.WITHOUT_EFFECT & values["embeddings"].get("endpoint", {}).keys():
        del values["embeddings"]["endpoint"][name]
    del values["policy"]["gate"]  # whether the policy is trained, not how
    return {**values, "gold": gold_key(config)}


_ADDED = (
    *(("questions", name) for name in ("paraphrase", "off_domain", "coverage", "sketch_above")),
    ("replies", "loops"),
    ("evaluation", "map_points"),  # earlier runs have no map
)
"""Settings, by section, that were added later."""


def _engine(config: BackboneConfig, stage: str) -> dict[str, Any]:
    """Return the settings of the engine on which a stage depends; none for the own engine, so that its runs keep their keys."""
    if config.engine == "own" or stage not in ("replies", "policy"):
        return {}
    lengths = {"backbone.engine": config.engine, "backbone.vllm.max_length": config.vllm.max_length}
    return {**lengths, "backbone.vllm.max_weight": config.vllm.max_weight} if stage == "policy" else lengths


def _embedder(values: Mapping[str, Any], stage: str) -> dict[str, Any]:
    """Return the settings of the embedder if the stage uses another one than the default: earlier runs keep their keys."""
    default = RunConfig.model_fields["embeddings"].default.model_dump(mode="json")
    is_used = stage == "evaluation" and values["evaluation"].get("map_points") != 0
    return {"embeddings": values["embeddings"]} if is_used and values["embeddings"] != default else {}


def _calibration(config: VerdictsConfig) -> dict[str, Any]:
    """Return the settings on which calibrated probabilities depend; nothing if they are not calibrated."""
    found = config.calibration
    # Of a slope, the settings from before there were other maps: earlier runs keep their keys.
    signals = {"map"} if found.map != "slope" else set()
    if found.method == "given":
        more = {"weights", "steps"} if signals else set()
        return found.model_dump(mode="json", include={"method", "slope", "truncated_slope", "bias", *signals, *more})
    return found.model_dump(mode="json", include={"method", "pairs", *signals}) if config.fits_consistency else {}


def _tokenizer_day(name: str, day: date) -> str | None:
    """Return the date if a chat template of the model may print it, else None."""
    texts = (path.read_text(encoding="utf-8", errors="replace") for path in tokenizer_files(name) if _is_text(path))
    # Otherwise the key would change every day although no prompt does.
    return day.isoformat() if any("strftime_now" in text for text in texts) else None


def _is_text(path: Path) -> bool:
    return path.suffix == ".jinja" or path.name == "tokenizer_config.json" or path.name.startswith("chat_template")


def input_fingerprints(context: Context) -> dict[str, str]:
    """Return fingerprints of the inputs that the keys cover besides the configuration, to report which of them changed."""
    config = context.config
    return {
        "the model's files": fingerprint(model_identity(config.model)),
        **file_fingerprints(config, context.seeds),
    }
