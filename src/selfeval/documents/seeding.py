"""`selfeval seeds`: seed questions from documents, each with the passage that answers it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfeval.backbone.fingerprint import model_identity
from selfeval.backbone.roles import Backbone
from selfeval.backbone.snapshot import ensure_snapshot
from selfeval.config import RunConfig
from selfeval.documents.chunks import Chunk, chunks_of
from selfeval.documents.progress import Progress, dropped_file, failed_file, unfinished_file, write_result
from selfeval.documents.questions import Accepted, Outcome, QuestionWriter, in_turn
from selfeval.documents.reading import Read, Skipped
from selfeval.errors import DataError, InputError, LoopError
from selfeval.judging.kinds import PASSAGE_KINDS
from selfeval.judging.templates import Templates, template_texts, templates_folder
from selfeval.stages.draws import Draws
from selfeval.stages.terminal import Terminal
from selfeval.store import fingerprint

__all__ = ["LONGEST_CHUNK", "Seeded", "check_target", "seeds_from_documents"]

LONGEST_CHUNK = 256
"""Default of the maximum tokens of a passage; a quarter of the model's context if that is less."""
_PROMPTS = Path(__file__).parent / "prompts"
_FEWEST_AT_ONCE, _MOST_AT_ONCE = 4, 32
"""Samples of a batch: a batch is lost on Ctrl-C, and small ones are slow."""


@dataclass(frozen=True)
class Seeded:
    """The result of `selfeval seeds`.

    Attributes:
        target: the file of seeds.
        documents: number of documents with text.
        skipped: files that were not used.
        chunks: number of passages that were long enough to ask about.
        wanted: number of questions that were requested.
        outcomes: the outcome of every sample.
    """

    target: Path
    documents: int
    skipped: tuple[Skipped, ...]
    chunks: int
    wanted: int
    outcomes: tuple[Outcome, ...]

    @property
    def questions(self) -> int:
        """Number of seeds."""
        return sum(outcome.reason is None for outcome in self.outcomes)

    @property
    def dropped(self) -> dict[str, int]:
        """Number of dropped questions by reason, most frequent first."""
        return dict(Counter(o.reason for o in self.outcomes if o.reason is not None).most_common())

    @property
    def by_document(self) -> dict[str, int]:
        """Number of seeds by document, in the order of the first one."""
        return dict(Counter(o.values["source"]["file"] for o in self.outcomes if o.reason is None))

    def as_json(self) -> dict[str, Any]:
        """Return the result for `--json`."""
        return {
            "to": str(self.target),
            "documents": self.documents,
            "skipped": [{"file": skip.file, "reason": skip.reason} for skip in self.skipped],
            "passages": self.chunks,
            "wanted": self.wanted,
            "samples": len(self.outcomes),
            "questions": self.questions,
            "by_document": self.by_document,
            "dropped": self.dropped,
            "dropped_to": str(dropped_file(self.target)) if self.dropped else None,
        }


def check_target(target: Path) -> None:
    """Refuse a file that cannot be written, before the model is loaded.

    Raises:
        InputError: it or the file of dropped questions exists, it is not a file of JSON lines, or its folder does not exist.
    """
    if target.suffix.lower() not in (".jsonl", ".json"):
        raise InputError(f"--to {target}: seeds are written as JSON lines; use a name such as seeds.jsonl")
    if not target.parent.is_dir():
        raise InputError(f"--to {target}: the folder {target.parent} does not exist; create it, or use another one")
    # An interrupted command may have written the dropped questions and not yet the seeds.
    for path in (target,) if unfinished_file(target).exists() else (target, dropped_file(target)):
        if path.exists():
            raise InputError(f"--to {target}: {path} exists and is not replaced; use another name, or remove it")


def seeds_from_documents(
    config: RunConfig,
    read: Read,
    target: Path,
    *,
    count: int,
    chunk_tokens: int | None,
    terminal: Terminal,
    checks_replies: bool = True,
    trust_remote_code: bool = False,
) -> Seeded:
    """Write questions about documents to a file of seeds, or resume an interrupted command.

    Args:
        config: model, seed, templates, and the sections backbone, chat and questions.
        read: the documents.
        target: the file of seeds.
        count: number of questions.
        chunk_tokens: maximum tokens of a passage; None for the default.
        terminal: shows progress.
        checks_replies: drop questions to which the model's reply is not in the passage. Default: True.
        trust_remote_code: run code that comes with the model. Default: False.

    Raises:
        InputError: model or target cannot be used, or the passages exceed the model's context.
        LoopError: no question was usable.
    """
    check_target(target)
    for skip in read.skipped:
        terminal.note(f"skipped: {skip.reason}")
    writer, limit = _writer(config, read, chunk_tokens, terminal, checks_replies, trust_remote_code)
    writer.check_context(limit)
    progress = Progress(target, _made_of(config, writer))
    _write(writer, progress, count, math.ceil(config.questions.attempts * count), terminal)
    done = Seeded(target, len(read.documents), read.skipped, len(writer.chunks), count, _first(progress.outcomes, count))
    write_result(target, done.outcomes)
    progress.remove()
    if not done.questions:
        raise LoopError(_no_question(done))
    return done


def _first(outcomes: Sequence[Outcome], count: int) -> tuple[Outcome, ...]:
    """Return the outcomes up to the last wanted seed: an interrupted command may have wanted more."""
    ends = [number for number, outcome in enumerate(outcomes, start=1) if outcome.reason is None]
    return tuple(outcomes[: ends[count - 1]] if len(ends) >= count else outcomes)


def _write(writer: QuestionWriter, progress: Progress, count: int, most: int, terminal: Terminal) -> None:
    accepted = Accepted(writer.config.near_duplicate)
    for outcome in progress.outcomes:
        if outcome.reason is None:
            accepted.add(outcome.question)
    with terminal.bar("seeds", count, accepted.count) as bar:
        while accepted.count < count and len(progress.outcomes) < most:
            needed = max(_FEWEST_AT_ONCE, (count - accepted.count) * 3 // 2)
            size = min(needed, _MOST_AT_ONCE, most - len(progress.outcomes))
            before = accepted.count
            progress.add([*writer.outcomes(len(progress.outcomes), size, accepted, count)])
            bar.say(f"{len(progress.outcomes)} samples")
            bar.advance(accepted.count - before)
    if accepted.count < count:
        terminal.note(
            f"{accepted.count} of {count} wanted questions after {most} samples (questions.attempts); the others were dropped"
        )


def _no_question(done: Seeded) -> str:
    reasons = ", ".join(f"{reason} {number}" for reason, number in done.dropped.items())
    return (
        f"none of {len(done.outcomes)} questions about {done.chunks} passages was usable ({reasons}; see "
        f"{failed_file(done.target)}). Use a model that follows instructions, or raise questions.max_new_tokens if they are "
        "unfinished"
    )


# -- model and passages -------------------------------------------------------------------------------------------------


def _writer(
    config: RunConfig,
    read: Read,
    chunk_tokens: int | None,
    terminal: Terminal,
    checks_replies: bool,
    trust_remote_code: bool,
) -> tuple[QuestionWriter, int]:
    """Load the model, cut the documents by its tokenizer, and return the writer and the limit of a passage."""
    if not Path(config.model).is_dir():
        with terminal.waiting(f"downloading missing files of {config.model}"):
            ensure_snapshot(config.model)
    with terminal.waiting(f"loading {config.model}"):
        backbone = Backbone.load(config.model, config.backbone, trust_remote_code=trust_remote_code)
    texts = _prompt_texts(config)
    templates = Templates.load(
        templates_folder(config.model, config.templates),
        backbone.loaded.tokenizer,
        texts=texts,
        kinds=[kind.name for kind in PASSAGE_KINDS],
        arguments=config.chat.arguments,
    )
    limit = chunk_tokens or min(LONGEST_CHUNK, (backbone.loaded.context_length or 4 * LONGEST_CHUNK) // 4)
    draws = Draws(config.seed)
    chunks = in_turn(_chunks(read, limit, backbone.loaded.tokenizer), draws)
    if not chunks:
        raise DataError("no passage of the documents is long enough to ask about: all have fewer than eight words")
    writer = QuestionWriter(
        backbone,
        templates,
        config.questions,
        chunks,
        draws,
        config.backbone.rollout_batch_size,
        "\n".join(texts[f"{kind.name}.jinja"] for kind in PASSAGE_KINDS),
        checks_replies,
    )
    return writer, limit


def _prompt_texts(config: RunConfig) -> dict[str, str]:
    """Return the prompts of this package, or those of the same name in the folder of templates, with its settings."""
    own = {path.name: path.read_text(encoding="utf-8") for path in sorted(_PROMPTS.glob("*.jinja"))}
    return {**own, **template_texts(templates_folder(config.model, config.templates))}


def _chunks(read: Read, limit: int, tokenizer: Any) -> list[Chunk]:
    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False))

    return [chunk for document in read.documents for chunk in chunks_of(document, limit, count)]


def _made_of(config: RunConfig, writer: QuestionWriter) -> str:
    """Return the fingerprint of everything that the outcomes depend on, except for their number.

    With the precision that was chosen: `auto` may choose another one on the next day, when less memory is free.
    """
    questions = config.questions.model_dump(
        mode="json", include={"temperature", "top_p", "max_new_tokens", "near_duplicate", "shortest"}
    )
    passages = [[chunk.passage, chunk.source] for chunk in writer.chunks]
    chat = config.chat.model_dump(mode="json")
    model = [model_identity(config.model), writer.backbone.loaded.precision]
    return fingerprint([model, config.seed, questions, chat, writer.instruction, passages, writer.checks_replies])
