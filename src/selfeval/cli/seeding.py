"""`selfeval seeds`: its options, and what it prints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from selfeval.cli.failures import clear_errors
from selfeval.cli.libraries import quiet_libraries
from selfeval.texts import safe_json, visible

if TYPE_CHECKING:
    from selfeval.documents.seeding import Seeded

__all__ = ["seeds"]

_RESUMES = "The questions so far are kept in NAME.partial next to the file of seeds: rerun the same command to resume."


def seeds(
    documents: Annotated[
        list[Path], typer.Argument(metavar="DOCS...", help="Text, Markdown, HTML and PDF files, or folders of them.")
    ],
    to: Annotated[Path, typer.Option("--to", metavar="FILE", help="New file of seeds, such as seeds.jsonl.")],
    model: Annotated[str, typer.Option(help="Model that writes the questions: a Hugging Face model folder or hub id.")],
    count: Annotated[int, typer.Option(min=1, help="Number of questions, spread evenly over the documents.")] = 50,
    chunk_tokens: Annotated[
        int | None,
        typer.Option(min=32, help="Maximum tokens of a passage (default: 256, or a quarter of the model's context)."),
    ] = None,
    check_replies: Annotated[
        bool,
        typer.Option(
            "--check-replies/--no-check-replies",
            help="Let the model answer each question, and drop those to which its reply is not in the passage.",
        ),
    ] = True,
    seed: Annotated[int, typer.Option(min=0, help="Random seed.")] = 0,
    assign: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a value, e.g. questions.temperature=0.7.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Execute custom code shipped with the model.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Hide progress; print only errors and the result.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the full traceback on errors.")] = False,
) -> None:
    """Write seed questions from documents, each with the passage that answers it.

    Documents are cut into passages at headings and paragraphs. The model writes a question about each passage and answers it
    from the passage. Dropped are near-duplicates, questions that refer to the passage ("according to the text"), and those to
    which its reply is not in the passage; seeds.dropped.jsonl has them with their reasons.

    `selfeval run --seeds FILE` then asks these questions, and replies, judge and evaluator read the passage. No passage is in
    both training and test. PDF files need the extra `data`.

    Ctrl-C loses at most the current batch; the same command resumes. --set accepts templates, and the keys of the sections
    backbone, chat and questions (temperature, top_p, max_new_tokens, shortest, near_duplicate, attempts). Examples:

    selfeval seeds handbook/ faq.html --to seeds.jsonl --model path/to/model

    selfeval seeds manual.pdf --to seeds.jsonl --model path/to/model --count 200 --chunk-tokens 400

    selfeval run --model path/to/model --seeds seeds.jsonl --output runs/support
    """
    with clear_errors(debug, interrupted=_RESUMES):
        from selfeval.documents.reading import read_documents
        from selfeval.stages.running import new_config

        read = read_documents(documents)  # a mistyped path must not wait for torch
        quiet_libraries()
        from selfeval.documents.seeding import check_target, seeds_from_documents
        from selfeval.stages.terminal import Terminal

        check_target(to)
        assignments = [*(assign or []), f"seed={seed}"]
        config = new_config(model=model, assignments=assignments, trust_remote_code=trust_remote_code)
        done = seeds_from_documents(
            config,
            read,
            to,
            count=count,
            chunk_tokens=chunk_tokens,
            terminal=Terminal(quiet),
            checks_replies=check_replies,
            trust_remote_code=trust_remote_code,
        )
        typer.echo(safe_json(done.as_json(), indent=2) if as_json else _as_text(done))


def _as_text(done: Seeded) -> str:
    found = done.as_json()
    lines = [
        f"{done.questions} questions about {done.chunks} passages of {done.documents} documents: {done.target}",
        *(f"  {number:4}  {name}" for name, number in done.by_document.items()),
    ]
    if done.dropped:
        reasons = ", ".join(f"{reason} {number}" for reason, number in done.dropped.items())
        lines.append(f"dropped {sum(done.dropped.values())} of {len(done.outcomes)} samples ({reasons}): {found['dropped_to']}")
    if done.skipped:
        lines.append(f"skipped {len(done.skipped)} files:")
        lines += [f"  {skip.reason}" for skip in done.skipped]
    return "\n".join(visible(line) for line in lines)
