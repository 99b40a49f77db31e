"""`selfeval metrics`: its options, and what it prints.

On a terminal it is a table. Elsewhere each metric is one line with tabs between its cells, for `selfeval metrics | cut -f2`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from selfeval.cli.failures import clear_errors
from selfeval.cli.judge_figures import text_table
from selfeval.errors import InputError
from selfeval.texts import safe_json, visible

if TYPE_CHECKING:
    from rich.console import Console

    from selfeval.quality.statistics import Figure
    from selfeval.quality.text_metrics.scoring import MetricScore, TextMetrics

__all__ = ["metrics", "print_scores"]


def metrics(
    hypotheses: Annotated[Path, typer.Argument(metavar="HYP", help="Texts to score: one per line, or JSON lines.")],
    references: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[REF...]", help="References, one or more files. Without them: distinct-n and self-BLEU."),
    ] = None,
    names: Annotated[
        str | None,
        typer.Option("--metrics", metavar="NAMES", help="Metrics, separated by commas (default: all but chrf++)."),
    ] = None,
    language: Annotated[
        str,
        typer.Option(
            help="Language of the texts, such as en, de, zh, or other (default: found from the references, which it needs)."
        ),
    ] = "auto",
    tokenizer: Annotated[
        str | None, typer.Option(help="Tokenizer of BLEU and METEOR: 13a, intl, zh, char or none (default: by language).")
    ] = None,
    against: Annotated[
        Path | None, typer.Option("--against", metavar="HYP2", help="Texts of another system: print the paired differences.")
    ] = None,
    field: Annotated[str, typer.Option(help="Field of JSON lines with the text to score.")] = "reply",
    reference_field: Annotated[
        str | None, typer.Option(help="Field of JSON lines with the reference, or a list of references (default: as --field).")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Random seed of the bootstrap.")] = 0,
    sentences: Annotated[bool, typer.Option("--sentences", help="With --json: include the scores of each line.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the full traceback on errors.")] = False,
) -> None:
    """Score texts against references: BLEU, chrF, TER, ROUGE, METEOR; and their repetition: distinct-n, self-BLEU.

    Line i of every file belongs to the same case. Each score has a 95% interval over lines, and with --against the difference
    HYP minus HYP2 has a paired one. The scores equal those of sacrebleu, rouge_score and nltk (extra `data`). METEOR uses
    synonyms only if the data of nltk on this machine has WordNet; nothing is downloaded. Examples:

    selfeval metrics replies.txt references.txt

    selfeval metrics new.txt ref1.txt ref2.txt --against old.txt --metrics bleu,chrf

    selfeval metrics replies.jsonl seeds.jsonl --field text --reference-field reply --json
    """
    with clear_errors(debug, interrupted="Nothing was written; the same command starts from the beginning."):
        from selfeval.quality.text_metrics.line_files import read_hypotheses, read_other, read_references
        from selfeval.quality.text_metrics.scoring import text_metrics

        if sentences and not as_json:
            raise InputError("--sentences adds the scores of each line to the JSON output; add --json")
        texts = read_hypotheses(hypotheses, field)
        found = read_references(references, reference_field or field, hypotheses, len(texts)) if references else None
        other = None if against is None else read_other(against, field, hypotheses, len(texts))
        result = text_metrics(
            texts,
            found,
            metrics=None if names is None else [name.strip() for name in names.split(",") if name.strip()],
            language=language,
            tokenizer=tokenizer,
            against=other,
            seed=seed,
        )
        if as_json:
            typer.echo(safe_json(result.as_json(sentences=sentences), indent=2))
        else:
            print_scores(result)


def print_scores(result: TextMetrics, console: Console | None = None) -> None:
    """Print the scores with their intervals, and how the texts were split."""
    from rich.console import Console

    console = console or Console()
    paired = any(score.difference is not None for score in result.scores.values())
    header = ["metric", "score", "interval", *(["other", "difference", "interval"] if paired else [])]
    rows = [_row(score) for score in result.scores.values()]
    if console.is_terminal:
        console.print(text_table(header, rows))
    else:
        for row in rows:
            typer.echo("\t".join(map(visible, row)))
    typer.echo(_split_sentence(result), err=not console.is_terminal)


def _row(score: MetricScore) -> list[str]:
    from selfeval.quality.text_metrics.scoring import LOWER_IS_BETTER

    name = f"{score.name} (lower is better)" if score.name in LOWER_IS_BETTER else score.name
    cells = [name, _number(score.figure.value), _interval(score.figure)]
    if score.difference is not None and score.other is not None:
        cells += [_number(score.other.value), _number(score.difference.value, "+"), _interval(score.difference)]
    return cells


def _number(value: float | None, sign: str = "") -> str:
    # Four decimals are those that sacrebleu, rouge_score and nltk print, or more.
    return "–" if value is None else f"{value:{sign}.4f}"


def _interval(figure: Figure) -> str:
    return "no interval" if figure.ci_low is None else f"{_number(figure.ci_low)} to {_number(figure.ci_high)}"


def _split_sentence(result: TextMetrics) -> str:
    from selfeval.quality.text_metrics.scoring import DIVERSITY
    from selfeval.quality.text_metrics.statistics_of_lines import FEWEST_LINES

    parts = [f"{result.lines:,} lines"]
    # Distinct-n and self-BLEU split words in one way, whatever the language and the tokenizer.
    if any(name not in DIVERSITY for name in result.scores):
        parts.append(f"language {result.language}, tokenizer {result.tokenizer}")
    if result.meteor_stages:
        parts.append(f"METEOR aligns words by {result.meteor_stages} matches")
    if result.lines < FEWEST_LINES:
        parts.append(f"intervals need {FEWEST_LINES} lines")
    return "; ".join(parts)
