"""The verdicts stage with a combined judge: accuracies are estimated once, from the first pairs, and kept in the run folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from judged_runs import PAIRS, WORKS, run_of, shards
from selfeval.config import RunConfig, load_config
from selfeval.errors import InputError, LoopError, RunFolderError
from selfeval.judge_benchmark.subject import subject_of
from selfeval.judging.judges.combined import fit_members
from selfeval.judging.protocol import JudgeFit
from selfeval.records import CombinedEvidence, Question, Verdict
from selfeval.runs.judge_fit import FIT_FILE, read_fit
from selfeval.stages import verdicts
from selfeval.stages.context import Context
from selfeval.stages.evaluation import _verdicts
from selfeval.stages.graph import stage_keys
from selfeval.stages.judge_probe import PROBE_FILE
from toy import LAB

MEMBERS = ["pairwise", "pointwise", "agreement"]
COMBINED: dict[str, Any] = {
    **WORKS,
    "judge": "combined",
    "max_new_tokens": 4,
    "combined": {"judges": MEMBERS, "pairs": 16, "agreement": {"votes": 2}},
}

SEED = 5
"""Of a random model whose gradings and comparisons often choose the same reply."""


def evidence(run: Context) -> list[CombinedEvidence]:
    found = [verdict.evidence for verdict in run.store.read("verdicts", Verdict)]
    return [one for one in found if isinstance(one, CombinedEvidence)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Context:
    run = run_of(tmp_path_factory.mktemp("combined") / "run", COMBINED, seed=SEED)
    verdicts.run(run)
    run.store.close()
    return run


def test_the_accuracies_are_those_of_the_first_pairs(finished: Context) -> None:
    rows = evidence(finished)
    assert len(rows) == PAIRS
    written = json.loads((finished.store.root / FIT_FILE).read_text())
    assert written["judges"] == MEMBERS
    assert written["accuracies"] == pytest.approx(fit_members(rows[:16]), abs=1e-6)
    assert written["accuracies"] != pytest.approx(fit_members(rows), abs=1e-4)  # not those of all pairs
    assert written["votes"] == [sum(map(bool, votes)) for votes in zip(*(row.votes for row in rows[:16]), strict=True)]
    assert written["pairs"] == 16
    assert {row.accuracies for row in rows} == {tuple(written["accuracies"])}
    assert read_fit(finished.config.verdicts, finished.store.root).accuracies == tuple(written["accuracies"])


def test_the_report_has_every_member(finished: Context) -> None:
    questions = {question.id: question for question in finished.store.read("questions", Question)}
    members = _verdicts(finished, questions, None).members
    assert members is not None
    assert [member.judge for member in members] == MEMBERS
    pairwise, pointwise, agreement = members
    rows = [row.votes for row in evidence(finished)]
    assert pairwise.voted.value == sum(bool(votes[0]) for votes in rows) / PAIRS
    both = [votes[0] == votes[1] for votes in rows if votes[0] and votes[1]]
    assert pairwise.agreement.value == pointwise.agreement.value == pytest.approx(sum(both) / len(both))
    assert (agreement.voted.value, agreement.agreement.n, agreement.accuracy) == (0.0, 0, 0.5)  # no vote ends in four tokens


def copy_of(finished: Context, folder: Path) -> Context:
    run = run_of(folder, COMBINED, seed=SEED)
    for path in finished.store.shards("verdicts"):
        (folder / "verdicts").mkdir(exist_ok=True)
        (folder / "verdicts" / path.name).write_bytes(path.read_bytes())
    (folder / FIT_FILE).write_bytes((finished.store.root / FIT_FILE).read_bytes())
    return run


def test_a_lost_shard_is_judged_with_the_accuracies_of_the_file(finished: Context, tmp_path: Path) -> None:
    run = copy_of(finished, tmp_path / "run")
    run.store.shards("verdicts")[-1].unlink()
    verdicts.run(run)
    assert shards(run) == shards(finished)
    run.store.shards("verdicts")[-1].unlink()
    written = json.loads((run.store.root / FIT_FILE).read_text())
    (run.store.root / FIT_FILE).write_text(json.dumps({**written, "accuracies": [0.7, 0.8, 0.9]}))
    verdicts.run(run)
    assert [row.accuracies for row in evidence(run)][-4:] == [(0.7, 0.8, 0.9)] * 4


def test_without_a_shard_the_accuracies_are_estimated_again(finished: Context, tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", COMBINED, seed=SEED)
    (run.store.root / FIT_FILE).write_text("of other settings")
    verdicts.run(run)
    assert shards(run) == shards(finished)
    run.store.close()
    other = run_of(tmp_path / "other", {**WORKS, "calibration": {"method": "off"}})
    (other.store.root / FIT_FILE).write_text("of other settings")
    verdicts.run(other)
    assert not (other.store.root / FIT_FILE).exists()


def test_an_unusable_judge_is_found_before_its_accuracies_are_estimated(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", {**COMBINED, "label_mass": 1.0})
    with pytest.raises(LoopError, match="unparsable"):
        verdicts.run(run)
    assert (run.store.root / PROBE_FILE).is_file()
    assert not (run.store.root / FIT_FILE).exists()


@pytest.mark.parametrize(
    "text",
    [
        '{"judges": ["pairwise", "pointwise"], "accuracies": [0.7, 0.8]}',
        '{"judges": ["pairwise", "pointwise", "agreement"], "accuracies": [0.7, 0.8, 1.0]}',
        '{"judges": ["pairwise", "pointwise", "agreement"], "accuracies": [0.7, 0.8]}',
        '{"judges": ["pairwise", "pointwise", "agreement"], "accuracies": 0.7}',
    ],
)
def test_a_damaged_file_is_refused(text: str, tmp_path: Path) -> None:
    config = RunConfig(verdicts=COMBINED).verdicts
    with pytest.raises(RunFolderError, match="has no accuracies of pairwise, pointwise, agreement yet"):
        read_fit(config, tmp_path)
    (tmp_path / FIT_FILE).write_text(text)
    with pytest.raises(RunFolderError, match="numbers between 0 and 1; remove it"):
        read_fit(config, tmp_path)
    assert read_fit(RunConfig(verdicts={"judge": "pointwise"}).verdicts, tmp_path) == JudgeFit()


def test_the_members_and_their_settings_are_part_of_the_key() -> None:
    def key(*given: str) -> str:
        return stage_keys(load_config(None, {}, ["verdicts.judge=combined", *given]), [])["verdicts"]

    two = 'verdicts.combined.judges=["pairwise", "pointwise"]'
    settings = ("verdicts.combined.pairs=64", "verdicts.combined.agreement.votes=4", two)
    assert len({key(), *map(key, settings)}) == 4


def test_a_combined_judge_of_a_model_is_not_benchmarked() -> None:
    with pytest.raises(InputError, match="accuracies of a combined judge are estimated in a run"):
        subject_of(model=str(LAB / "word_problems"), judge="combined", settings=())
