"""All checks of the input that can be made before a run folder is created, cheapest first."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfeval.config import JudgeRole, RunConfig, judge_spec
from selfeval.errors import ConfigError, InputError, ModelError
from selfeval.records import Question, Split
from selfeval.stages.given import Given, read_given
from selfeval.stages.gold import check_gold
from selfeval.stages.seeds import seeds_of
from selfeval.stages.trackers import check_installed
from selfeval.store import RunStore

if TYPE_CHECKING:
    from selfeval.judging.templates import Templates

__all__ = ["check_base", "check_input", "check_texts", "run_folder"]

_PRODUCED = ("**/shard-*.jsonl", "roles/*", "checkpoints/*", "replaced/*", "rounds/*", "answers/*")
_ROLES: tuple[JudgeRole, ...] = ("judge", "referee")


def check_input(config: RunConfig, *, trust_remote_code: bool = False, allow_code_execution: bool = False) -> None:
    """Read a run's files and model far enough to know that they are usable.

    Args:
        config: configuration of the run.
        trust_remote_code: run code that comes with the model. Default: False.
        allow_code_execution: run code in replies with the unit tests of a gold file. Default: False.

    Raises:
        InputError: seeds, a user's file, gold, a tracker, the embedder, the engine, the model, its templates or its adapters
            cannot be used.
    """
    # Cheapest first: a typo in a file must not wait for the model's files.
    given = check_texts(config)
    tested = None if given is None else [question.text for question in given.questions if question.split == Split.TEST]
    check_gold(config, tested, allow_code_execution=allow_code_execution)
    check_installed(config.trackers)
    _check_servers(config)
    _check_embedder(config)
    _check_engine(config)
    check_base(config, () if given is None else given.questions, trust_remote_code=trust_remote_code)


def check_texts(config: RunConfig) -> Given | None:
    """Check the seeds and the file of questions, replies or pairs, and return the latter.

    Raises:
        InputError: one of them cannot be used.
    """
    given = read_given(config)
    seeds_of(config, given)
    return given


def check_base(config: RunConfig, questions: Sequence[Question] = (), *, trust_remote_code: bool = False) -> None:
    """Check model, templates and adapters without reading a weight.

    Args:
        config: configuration of the run.
        questions: questions of the user's file, whose conversations must fit the chat template. Default: none.
        trust_remote_code: run code that comes with the model. Default: False.

    Raises:
        InputError: one of them cannot be used.
    """
    # Imported here so that a misspelt seeds file is refused without waiting for torch.
    from selfeval.backbone.adapter_check import check_adapters
    from selfeval.backbone.check import read_parts
    from selfeval.judging.kinds import kinds_of_run
    from selfeval.judging.templates import Templates, templates_folder
    from selfeval.runs.conversations import check_conversations

    parts = read_parts(config.model, trust_remote_code=trust_remote_code, context=config.backbone.context, download=False)
    folder = templates_folder(config.model, config.templates)
    kinds, chat = kinds_of_run(config.verdicts), config.chat
    templates = Templates.load(
        folder,
        parts.tokenizer,
        kinds=kinds,
        arguments=chat.arguments,
        system=chat.system,
        rubric=config.verdicts.rubric,
    )
    if config.replies.max_thinking_tokens is not None and templates.thinking() is None:
        raise ModelError(
            f"replies.max_thinking_tokens is set, but the tokenizer of {config.model} has no tokens that begin and end a "
            "chain of thought, such as <think> and </think>; set it to none"
        )
    _check_leads(config, templates)
    check_conversations(templates, questions)
    check_adapters(parts.shell, config.backbone.lora, config.model)
    _check_inputs(config, templates, parts.shell)


def _check_inputs(config: RunConfig, templates: Templates, shell: Any) -> None:
    """Check that the members of the ensemble can read what `evaluator.inputs` says. The shell has adapters."""
    from selfeval.backbone.adapter_check import check_rank
    from selfeval.backbone.depth import check_depth

    for read in config.evaluator.inputs:
        if read.layer is not None:
            check_depth(shell, read.layer)
        if read.rank is not None:
            check_rank(shell, read.rank, config.model, "evaluator.inputs: rank")
    if config.evaluator.varies_reference and not templates.grades_with_reference_answer:
        raise ConfigError(
            "evaluator.inputs: reference_answer = false has no effect, because the grade template shows no reference answer; "
            "remove it, or set grade_reference_answer = true in templates.toml and show {{ reference_answer }} in grade.jinja"
        )


def _check_servers(config: RunConfig) -> None:
    if config.servers:
        # Imported here: torch is loaded along with it.
        from selfeval.judging.server.client import check_endpoint

        for section, settings in config.servers.items():
            check_endpoint(settings, section)


def _check_embedder(config: RunConfig) -> None:
    if config.evaluation.map_points and config.embeddings.embedder != "backbone":
        # Imported here for the same reason.
        from selfeval.quality.embeddings.registry import check_embedder

        check_embedder(config.embeddings)


def _check_engine(config: RunConfig) -> None:
    if config.backbone.engine != "own":
        # Imported here for the same reason.
        from selfeval.rollout.engines import make_engine

        make_engine(config.model, config.backbone).close()


def _check_leads(config: RunConfig, templates: Templates) -> None:
    from selfeval.judging.judges.endpoint import check_lead

    for role in _ROLES:
        spec = judge_spec(role, config.judging(role).judge)
        for kind in spec.kinds(role) if spec.is_remote else ():
            check_lead(templates, kind)


@contextmanager
def run_folder(root: Path) -> Iterator[RunStore]:
    """Open and lock the run folder; remove it again if the input is refused before any stage produced something.

    Raises:
        RunFolderError: the folder is in use, or is not a run.
    """
    was_there, was_empty = root.exists(), root.is_dir() and not any(root.iterdir())
    store = RunStore(root)
    try:
        yield store
    except InputError:
        # The lock is a file in this folder, so it is released before the folder is cleared.
        store.close()
        if not any(path for pattern in _PRODUCED for path in root.glob(pattern)):
            _clear(root, keep=was_there, only_if=not was_there or was_empty)
        raise
    finally:
        store.close()


def _clear(root: Path, *, keep: bool, only_if: bool) -> None:
    """Empty the folder if `only_if`, and remove it unless `keep`."""
    if not only_if or not root.is_dir():  # removed while this process was using it
        return
    for path in root.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if not keep:
        root.rmdir()
