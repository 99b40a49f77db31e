"""Everything that can be refused about the input before a run folder is created, cheapest first."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from selfeval.config import RunConfig
from selfeval.errors import InputError
from selfeval.records import Split
from selfeval.stages.given import read_given
from selfeval.stages.gold import check_gold
from selfeval.stages.seeds import read_seeds
from selfeval.stages.trackers import check_installed
from selfeval.store import RunStore

__all__ = ["check_base", "check_input", "run_folder"]

_PRODUCED = ("**/shard-*.jsonl", "roles/*", "checkpoints/*", "replaced/*", "rounds/*")


def check_input(config: RunConfig, *, trust_remote_code: bool = False) -> None:
    """Reads the files and the model that a run is given as far as is needed to know that they can be used.

    Args:
        config: of the run.
        trust_remote_code: run code that comes with the model.

    Raises:
        InputError: seeds, a file of the user's, gold, a tracker, the model, its templates or its adapters cannot be used.
    """
    given = read_given(config)
    if config.seeds or given is None:
        read_seeds(config.seeds)
    tested = None if given is None else [question.text for question in given.questions if question.split == Split.TEST]
    check_gold(config.domain, config.gold, tested)
    check_installed(config.trackers)
    check_base(config, trust_remote_code=trust_remote_code)


def check_base(config: RunConfig, *, trust_remote_code: bool = False) -> None:
    """Checks model, templates and adapters, without reading a weight.

    Raises:
        InputError: one of them cannot be used.
    """
    # Here, so that a misspelt seeds file is refused without waiting for torch.
    from selfeval.backbone.adapter_check import check_adapters
    from selfeval.backbone.check import read_parts
    from selfeval.judging.templates import Templates, templates_folder

    parts = read_parts(config.model, trust_remote_code=trust_remote_code, context=config.context, download=False)
    Templates.load(templates_folder(config.model, config.templates), parts.tokenizer)
    check_adapters(parts.shell, config.lora, config.model)


@contextmanager
def run_folder(root: Path) -> Iterator[RunStore]:
    """The run folder, held by this process; removed again if the input is refused before any stage produced something.

    Raises:
        RunFolderError: it is in use, or not a run.
    """
    was_there, was_empty = root.exists(), root.is_dir() and not any(root.iterdir())
    store = RunStore(root)
    try:
        yield store
    except InputError:
        store.close()
        if not any(path for pattern in _PRODUCED for path in root.glob(pattern)):
            _clear(root, keep=was_there, only_if=not was_there or was_empty)
        raise
    finally:
        store.close()


def _clear(root: Path, *, keep: bool, only_if: bool) -> None:
    """Takes away what this command has put there."""
    if not only_if:
        return
    for path in root.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if not keep:
        root.rmdir()
