"""Compare policies on the same questions: `selfeval compare`.

Sampled replies and judgements are kept in the output folder under fingerprints of what they depend on. The same command
resumes, and a command with one more policy or judge computes only what is new.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path

from selfeval.errors import ConfigError, DataError, InputError
from selfeval.evaluation.policy import Outcome
from selfeval.judge_benchmark.benchmark import loaded_once, refuse_server_of_run, results_store
from selfeval.judge_benchmark.subject import ROLES, subject_of
from selfeval.judging.protocol import Comparison
from selfeval.policy_comparison.figures import Pair, agreement, measure_gold, measure_judge
from selfeval.policy_comparison.judging import GoldJudge, ModelJudge, PairJudge
from selfeval.policy_comparison.page import render
from selfeval.policy_comparison.replying import Answer, replies_of
from selfeval.policy_comparison.result import PolicyComparison
from selfeval.policy_comparison.sources import Questions, Source, read_source, shared_questions
from selfeval.records import Question
from selfeval.runs.reader import RunReader
from selfeval.runs.templates import day_of
from selfeval.stages.gold import Gold, ask_ahead, gold_file, gold_key, load_gold
from selfeval.stages.terminal import Terminal
from selfeval.store import RunStore, write_file
from selfeval.store.remote.places import local_run
from selfeval.texts import nearest

__all__ = ["JUDGES", "compare"]

GOLD = "gold"
JUDGES = ("referee", "judge", "evaluator", GOLD)
"""Judges of a comparison: three of a run, and gold."""

_KIND = "comparison"
_JSON, _PAGE = "comparison.json", "index.html"


def compare(
    policies: Sequence[str | Path],
    *,
    judges: Sequence[str] = ("referee",),
    judge_run: str | Path | None = None,
    questions: str | Path | None = None,
    limit: int | None = None,
    output: str | Path | None = None,
    progress: bool = True,
    trust_remote_code: bool = False,
    allow_code_execution: bool = False,
) -> PolicyComparison:
    """Compare two or more policies on the same questions, pair by pair.

    Args:
        policies: run folders, `RUN@base` for the unchanged base model of a run, or files of JSON lines with `question` and
            `reply`, such as those of another model.
        judges: `referee` (default), `judge`, `evaluator`, or `gold`; the ranking of the first one is the main result. With
            several, their agreement is measured.
        judge_run: Optional. Run whose judges and gold are used. Default: the first run among the policies.
        questions: Optional. File of questions, JSON lines or plain text. Default: the common test questions of the runs.
        limit: Optional. Maximum number of questions. Default: all.
        output: Optional. Folder of the results, with which the same call resumes. Default: nothing is kept.
        progress: write progress to standard error. Default: True.
        trust_remote_code: run code that comes with the models. Default: False.
        allow_code_execution: run the unit tests of a gold file in a sandbox. Default: False.

    Raises:
        InputError: an argument cannot be used.
        DataError: there are no common questions, or a file is malformed.
        RunFolderError: a run cannot be read.
        ModelError: a model cannot be loaded.

    Example:
        >>> found = compare(["runs/first", "runs/first@base"], progress=False)  # doctest: +SKIP
        >>> found.judges[0].pairs[0].win_rate.value  # doctest: +SKIP
        0.625
    """
    _check(policies, judges, limit)
    sources = [read_source(str(policy)) for policy in policies]
    _refuse_repeated(sources)
    asked = shared_questions(sources, None if questions is None else Path(questions), limit)
    run = _judge_run(sources, judge_run)
    gold, gold_note = _gold(RunReader(run), wanted=GOLD in judges, allow_code_execution=allow_code_execution)
    terminal, texts = Terminal(quiet=not progress), [question.text for question in asked.used]
    with results_store(output, _KIND) as store:
        store.update_run(kind=_KIND)
        # First, because it refuses judges that cannot be asked, before replies are sampled for hours.
        asking = _judges(judges, run, gold, store, terminal, trust_remote_code=trust_remote_code)
        answers = [replies_of(store, one, asked.used, terminal, trust_remote_code=trust_remote_code) for one in sources]
        outcomes = [_outcomes(judge, sources, answers, asked.used) for judge in asking]
        names, lengths = [one.name for one in sources], [[len(answer.text) for answer in row] for row in answers]
        result = PolicyComparison(
            policies=tuple(names),
            judge_run=str(run),
            questions=asked,
            judges=tuple(
                measure_judge(judge.name, names, found, lengths) for judge, found in zip(asking, outcomes, strict=True)
            ),
            agreement=agreement(outcomes),
            gold=measure_gold(names, _right(gold, texts, answers)) if gold else None,
            notes=(*_notes(sources, asked, judges, run), *([gold_note] if gold_note else [])),
        )
        store.write_json(store.root / _JSON, result.as_json())
        write_file(store.root / _PAGE, render(result))
    return result


def _check(policies: Sequence[str | Path], judges: Sequence[str], limit: int | None) -> None:
    names = [str(policy) for policy in policies]
    if len(names) < 2:
        raise InputError(f"a comparison needs at least two policies, got {len(names)}; pass RUN RUN, or RUN RUN@base")
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise InputError(f"{twice[0]} is given twice; pass each policy once")
    if not judges or len(set(judges)) < len(judges):
        raise InputError(f"pass one or more different judges, got {', '.join(judges) or 'none'}; allowed: {', '.join(JUDGES)}")
    for judge in judges:
        if judge not in JUDGES:
            raise InputError(f'there is no judge "{judge}"{nearest(judge, JUDGES)}')
    if limit is not None and limit < 1:
        raise InputError(f"limit must be at least 1, got {limit}")


def _refuse_repeated(sources: Sequence[Source]) -> None:
    """Refuse two spellings of one policy, whose replies would all be equal."""
    seen: dict[tuple[str, Path], str] = {}
    for one in sources:
        before = seen.setdefault((one.kind, one.path.resolve()), one.name)
        if before != one.name:
            raise InputError(f"{one.name} and {before} are the same policy; pass each policy once")


def _judge_run(sources: Sequence[Source], judge_run: str | Path | None) -> Path:
    found = [one.path for one in sources if one.kind != "file"] if judge_run is None else [local_run(judge_run)]
    if not found:
        raise InputError("files of replies have no judge; pass --judge-run RUN, a run whose referee compares them")
    return found[0]


def _judges(
    names: Sequence[str], run: Path, gold: Gold | None, store: RunStore, terminal: Terminal, *, trust_remote_code: bool
) -> list[PairJudge]:
    """Return the judges. Those that are models share one, which is loaded when the first comparison is left to judge."""
    loading = subject_of(run, judge="referee")
    day = day_of(RunReader(run).run)
    model = loaded_once(partial(loading.load, day, trust_remote_code=trust_remote_code), terminal, store)
    found: list[PairJudge] = []
    for name in names:
        if name in ROLES:
            subject = subject_of(run, judge=name)
            refuse_server_of_run(subject, "another --judge, or --judge-run RUN with a run whose judges are models here")
            found.append(ModelJudge(name, subject, store, terminal, model))
        else:
            assert gold is not None
            found.append(GoldJudge(gold))
    return found


def _outcomes(
    judge: PairJudge, sources: Sequence[Source], answers: Sequence[Sequence[Answer]], questions: Sequence[Question]
) -> dict[Pair, list[Outcome]]:
    found = {}
    for first, second in combinations(range(len(sources)), 2):
        comparisons = [
            Comparison(question.text, a.text, b.text, not a.finished, not b.finished, question.messages)
            for question, a, b in zip(questions, answers[first], answers[second], strict=True)
        ]
        found[first, second] = judge.outcomes(comparisons, f"{sources[first].name} and {sources[second].name}")
    return found


# -- gold ---------------------------------------------------------------------------------------------------------------


def _gold(reader: RunReader, *, wanted: bool, allow_code_execution: bool) -> tuple[Gold | None, str | None]:
    """Return the gold of a run, and a note if the run has gold that is not used.

    Args:
        reader: the run of the judges.
        wanted: gold is one of the judges, so a comparison without it is refused.
        allow_code_execution: the user agreed that unit tests are run.

    Raises:
        InputError: gold is wanted, and the run has none that can be used.
    """
    try:
        _check_gold_file(reader)
        gold = load_gold(reader.config, allow_code_execution=allow_code_execution)
    except (ConfigError, DataError) as problem:
        if wanted:
            raise
        return None, f"no figures by gold: {problem}"
    if gold is None and wanted:
        raise InputError(f"{reader.folder} has no gold (domain or gold file), so it cannot judge; choose another --judge")
    return gold, None


def _check_gold_file(reader: RunReader) -> None:
    """Refuse a gold file whose content is not the recorded one: a run folder of somebody else may name any file."""
    path = Path(gold_file(reader.config))
    recorded = (reader.run.get("made_of") or {}).get("the gold file")
    if path != Path() and (not path.is_file() or gold_key(reader.config) != recorded):
        raise DataError(f"the gold file {path} of {reader.folder} is missing or was changed; restore it")


def _right(gold: Gold, questions: Sequence[str], answers: Sequence[Sequence[Answer]]) -> list[list[bool | None]]:
    ask_ahead(gold, [(q, answer.text) for row in answers for q, answer in zip(questions, row, strict=True)])
    return [[gold.is_right(q, answer.text) for q, answer in zip(questions, row, strict=True)] for row in answers]


# -- notes --------------------------------------------------------------------------------------------------------------

_TRAINED = {
    "judge": "the judge of {run} labelled the pairs that its policy learned from",
    "evaluator": "the evaluator of {run} was the reward of its policy",
}


def _notes(sources: Sequence[Source], asked: Questions, judges: Sequence[str], run: Path) -> list[str]:
    notes = []
    if asked.trained:
        notes.append(f"questions left out, because a policy was trained on them: {asked.trained:,}")
    if asked.missing:
        notes.append(f"questions left out, because a file has no reply to them: {asked.missing:,}")
    compared = _by_path(sources)
    for judge in judges:
        if judge in _TRAINED and Path(run).resolve() in compared:
            name = compared[Path(run).resolve()]
            notes.append(f"{_TRAINED[judge].format(run=name)}, so it is no independent judge of {name}")
    return notes


def _by_path(sources: Sequence[Source]) -> Mapping[Path, str]:
    """Return the names of the policies that runs trained, by folder."""
    return {one.path.resolve(): one.name for one in sources if one.kind == "policy"}
