"""The verdicts stage with a calibration on the agreement of both orders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from judged_runs import WORKS, run_of, shards
from selfeval.backbone.adapters import BASE
from selfeval.config import RunConfig, load_config
from selfeval.config.load import config_of_run
from selfeval.errors import ConfigError, LoopError, RunFolderError
from selfeval.judging.calibrated import calibrated, looks_of
from selfeval.judging.protocol import Judgement, state_of
from selfeval.quality.judge_calibration import Calibration, fit_to_consistency, log_odds
from selfeval.quality.judge_signals import SIGNALS, SignalCalibration, fit_signals_to_consistency
from selfeval.quality.statistics import rounded, sigmoid
from selfeval.records import CombinedEvidence, Question, Reply, Split, Verdict, VerdictState
from selfeval.runs.judge_fit import FIT_FILE, read_fit
from selfeval.stages import verdicts
from selfeval.stages.context import Context
from selfeval.stages.evaluation import _verdicts
from selfeval.stages.given import Given, Labelled
from selfeval.stages.graph import stage_keys
from selfeval.stages.judge_fit import fitted_again
from selfeval.stages.shards import Batch, ModelHandle, ShardOutput
from selfeval.stages.terminal import Terminal
from selfeval.stages.verdicts import compared

COUNT, FITTED = 80, 64
SEED = 7
"""Of a random model whose orders agree."""
SETTINGS: dict[str, Any] = {**WORKS, "keep": 0.8, "shard": 16, "calibration": {"pairs": 50}}


def calibrated_run(folder: Path, seed: int = SEED, **settings: Any) -> Context:
    return run_of(folder, {**SETTINGS, **settings}, count=COUNT, seed=seed)


def judgement(verdict: Verdict) -> Judgement:
    return Judgement(verdict.probability, verdict.tie, verdict.evidence)


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> list[Verdict]:
    run = calibrated_run(tmp_path_factory.mktemp("raw") / "run", calibration={"method": "off"})
    verdicts.run(run)
    assert not (run.store.root / FIT_FILE).exists()
    return run.store.read("verdicts", Verdict)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Context:
    run = calibrated_run(tmp_path_factory.mktemp("calibrated") / "run")
    verdicts.run(run)
    run.store.close()
    return run


def test_verdicts_have_the_probability_that_the_first_pairs_give(finished: Context, raw: list[Verdict]) -> None:
    looks = [looks_of(judgement(verdict)) for verdict in raw[:FITTED]]
    fitted = fit_to_consistency([one for one in looks if one is not None])
    assert fitted is not None
    assert fitted.slope > 1.0
    found = read_fit(finished.config.verdicts, finished.store.root).calibration
    assert found == Calibration(*(round(value, 6) for value in (fitted.slope, fitted.truncated_slope, fitted.bias)))
    assert json.loads((finished.store.root / FIT_FILE).read_text())["pairs"] == FITTED
    made = finished.store.read("verdicts", Verdict)
    assert [verdict.evidence for verdict in made] == [verdict.evidence for verdict in raw]
    expected = [rounded(calibrated(judgement(verdict), found).probability) for verdict in raw]
    assert [verdict.probability for verdict in made] == expected
    assert expected != [verdict.probability for verdict in raw]
    config = finished.config.verdicts
    assert [verdict.state for verdict in made] == [state_of(judgement(verdict), config) for verdict in made]


def test_what_is_not_kept_is_among_the_drops(finished: Context) -> None:
    made = finished.store.read("verdicts", Verdict)
    files = sorted((finished.store.root / "dropped" / "verdicts").iterdir())
    dropped = [json.loads(line) for path in files for line in path.read_text().splitlines()]
    unkept = [verdict for verdict in made if verdict.state != VerdictState.KEPT]
    assert 0 < len(unkept) < len(made)
    assert [drop["reason"] for drop in dropped] == [verdict.state.value for verdict in unkept]
    assert [drop["detail"]["probability"] for drop in dropped] == [verdict.probability for verdict in unkept]


@pytest.mark.parametrize("lost", [(0,), (4,), (1, 2, 3, 4), (0, 1, 2, 3, 4)], ids=str)
def test_lost_shards_are_judged_to_the_same_bytes(
    finished: Context, lost: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, folder = calibrated_run(tmp_path / "run"), tmp_path / "run"
    shutil.copytree(finished.store.root, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".lock"))
    for number in lost:
        (folder / "verdicts" / f"shard-{number:05d}.jsonl").unlink()
    judged: list[int] = []
    work = verdicts.JudgePairs.__call__

    def noted(self: verdicts.JudgePairs, model: ModelHandle, batch: Batch[Any]) -> ShardOutput:
        judged.append(batch.index)
        return work(self, model, batch)

    monkeypatch.setattr(verdicts.JudgePairs, "__call__", noted)
    verdicts.run(run)
    assert shards(run) == shards(finished)
    probed = [0] if len(lost) == 5 else []
    assert judged == [*probed, *lost]  # none is judged twice


def test_a_lost_fit_is_made_again(finished: Context, tmp_path: Path) -> None:
    run, folder = calibrated_run(tmp_path / "run"), tmp_path / "run"
    shutil.copytree(finished.store.root, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".lock"))
    (folder / FIT_FILE).unlink()
    (folder / "verdicts" / "shard-00004.jsonl").unlink()
    verdicts.run(run)
    assert shards(run) == shards(finished)
    assert (folder / FIT_FILE).read_bytes() == (finished.store.root / FIT_FILE).read_bytes()


def test_the_judge_of_the_run_is_calibrated_and_the_referee_is_not(finished: Context, tmp_path: Path) -> None:
    run = calibrated_run(tmp_path / "run")
    (tmp_path / "run" / FIT_FILE).write_bytes((finished.store.root / FIT_FILE).read_bytes())
    questions = {question.id: question for question in finished.store.read("questions", Question)}
    replies = {reply.id: reply for reply in finished.store.read("replies", Reply)}
    made = finished.store.read("verdicts", Verdict)[:16]
    pairs = [compared(questions[v.question_id], replies[v.first], replies[v.second]) for v in made]
    with run.backbone.acting_as(BASE):
        found = run.judge().judge(pairs)
    assert [rounded(one.probability) for one in found] == [verdict.probability for verdict in made]
    assert type(run.judge("referee")).__name__ == "PairwiseJudge"


def test_a_judge_without_consistency_ends_the_run_early_and_keeps_nothing(tmp_path: Path) -> None:
    run = calibrated_run(tmp_path / "run", seed=0)
    with pytest.raises(LoopError, match=r"prefer the same reply in 10\.9% of 64 pairs \(of 64; "):
        verdicts.run(run)
    assert not run.store.shards("verdicts")
    run.store.close()
    run = run_of(tmp_path / "run", SETTINGS, count=COUNT, force=True)
    counts = verdicts.run(run)
    assert (counts["judged"], counts["kept"]) == (COUNT, 0)
    assert {verdict.probability for verdict in run.store.read("verdicts", Verdict)} == {0.5}


def test_a_fit_does_not_stay_with_labels_that_are_not_the_judges(tmp_path: Path) -> None:
    run = calibrated_run(tmp_path / "run", seed=0)
    with pytest.raises(LoopError):
        verdicts.run(run)
    assert (tmp_path / "run" / FIT_FILE).is_file()
    run.__dict__["given"] = Given("pairs", (), (), {}, {"q0": (Labelled("this", "that", 1.0),)})
    verdicts.run(run)
    assert not (tmp_path / "run" / FIT_FILE).exists()


def test_few_pairs_are_not_calibrated(tmp_path: Path, raw: list[Verdict]) -> None:
    run = run_of(tmp_path / "run", SETTINGS, count=32, seed=SEED)
    verdicts.run(run)
    assert json.loads((run.store.root / FIT_FILE).read_text()) == {"calibration": None, "pairs": 32}
    assert [verdict.probability for verdict in run.store.read("verdicts", Verdict)] == [v.probability for v in raw[:32]]


def test_given_values_are_used(tmp_path: Path, raw: list[Verdict]) -> None:
    given = {"method": "given", "slope": 0.5, "truncated_slope": 0.1, "bias": 0.3}
    run = run_of(tmp_path / "run", {**SETTINGS, "calibration": given}, count=16, seed=SEED)
    verdicts.run(run)
    expected = [rounded(calibrated(judgement(v), Calibration(0.5, 0.1, 0.3)).probability) for v in raw[:16]]
    assert [verdict.probability for verdict in run.store.read("verdicts", Verdict)] == expected
    assert not (run.store.root / FIT_FILE).exists()


def test_given_values_calibrate_a_combined_judge_wherever_it_is_pooled(tmp_path: Path) -> None:
    evidence = CombinedEvidence(("pairwise", "pointwise"), (0.9, 0.8), (0.0, 0.0), (1, 1), (), (None, None))
    first = Verdict("q", Split.TRAIN, "a", "b", VerdictState.KEPT, 0.9, 0.0, evidence)
    given = {"method": "given", "slope": 0.1}
    found = [
        fitted_again([first] * 60, [first] * 60, RunConfig(verdicts={"judge": "combined", "calibration": one}).verdicts)[0]
        for one in ({"method": "off"}, given)
    ]
    assert found[0].state == VerdictState.KEPT
    assert found[1].state == VerdictState.UNSURE
    assert found[1].probability == rounded(sigmoid(0.1 * log_odds(found[0].probability or 0.0)))


@pytest.mark.parametrize(
    "text",
    [
        '{"calibration": {"slope": -1.0, "truncated_slope": 1.0, "bias": 0}}',
        '{"calibration": {"slope": 1.0}}',
        '{"calibration": 1}',
    ],
)
def test_a_damaged_file_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / FIT_FILE).write_text(text)
    with pytest.raises(RunFolderError, match="expected a calibration with slope, truncated_slope, bias, or null; remove it"):
        read_fit(RunConfig().verdicts, tmp_path)


def test_a_run_from_before_there_were_calibrations_has_none(tmp_path: Path) -> None:
    values = RunConfig().model_dump(mode="json")
    assert config_of_run(values, tmp_path).verdicts.calibration.method == "consistency"
    del values["verdicts"]["calibration"]
    assert config_of_run(values, tmp_path).verdicts.calibration.method == "off"


# -- signals ------------------------------------------------------------------------------------------------------------


def signals_run(folder: Path, shape: str, pairs: int = 50) -> Context:
    return calibrated_run(folder, calibration={"pairs": pairs, "map": shape})


def test_the_signals_are_fitted_once_and_a_resumed_run_judges_to_the_same_bytes(tmp_path: Path, raw: list[Verdict]) -> None:
    run, folder = signals_run(tmp_path / "run", "temperature"), tmp_path / "run"
    verdicts.run(run)
    looks = [looks_of(judgement(verdict)) for verdict in raw[:FITTED]]
    fitted = fit_signals_to_consistency([one for one in looks if one is not None], "temperature")
    assert fitted is not None
    assert fitted.weights["margin"] > 0.0
    found = read_fit(run.config.verdicts, folder).calibration
    assert found == fitted.rounded()
    expected = [rounded(calibrated(judgement(verdict), found).probability) for verdict in raw]
    assert [verdict.probability for verdict in run.store.read("verdicts", Verdict)] == expected
    before, written = shards(run), (folder / FIT_FILE).read_bytes()
    run.store.close()
    (folder / "verdicts" / "shard-00000.jsonl").unlink()
    (folder / "verdicts" / "shard-00004.jsonl").unlink()
    again = signals_run(folder, "temperature")
    verdicts.run(again)
    assert shards(again) == before
    assert (folder / FIT_FILE).read_bytes() == written
    report = _verdicts(again, {q.id: q for q in again.store.read("questions", Question)}, None).calibration
    assert report is not None
    assert report.signals is not None
    assert report.signals.margin == found.weights["margin"]
    assert report.slope == found.scale


def test_an_isotonic_regression_of_few_pairs_is_a_temperature_and_the_run_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = signals_run(tmp_path / "run", "isotonic")  # 64 pairs have 128 looks
    run.terminal = Terminal()
    verdicts.run(run)
    found = read_fit(run.config.verdicts, tmp_path / "run").calibration
    assert isinstance(found, SignalCalibration)
    assert not found.steps
    said = " ".join(capsys.readouterr().err.split())
    assert "an isotonic regression needs 200 looks (two of each question), so it is a temperature" in said


GOOD: dict[str, Any] = {
    "weights": dict.fromkeys(SIGNALS, 0.5),
    "bias": 0.0,
    "scale": 1.0,
    "steps": [[0.0, 0.5], [1.0, 0.9]],
    "of": "looks",
}


@pytest.mark.parametrize(
    "change",
    [
        {"weights": {"margin": 1.0}},
        {"scale": -1.0},
        {"steps": [[1.0, 0.9], [0.0, 0.5]]},
        {"steps": [[1.0, 1.5]]},
        {"of": "pair"},
    ],
    ids=str,
)
def test_a_damaged_file_of_signals_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    config = RunConfig(verdicts={"calibration": {"map": "isotonic"}}).verdicts
    (tmp_path / FIT_FILE).write_text(json.dumps({"calibration": GOOD}))
    assert read_fit(config, tmp_path).calibration == SignalCalibration(
        GOOD["weights"], 0.0, 1.0, ((0.0, 0.5), (1.0, 0.9)), "looks"
    )
    (tmp_path / FIT_FILE).write_text(json.dumps({"calibration": {**GOOD, **change}}))
    with pytest.raises(RunFolderError, match="expected a calibration with weights, bias, scale, steps, of, or null; remove it"):
        read_fit(config, tmp_path)


def test_given_weights_are_checked_and_part_of_the_key() -> None:
    section = "verdicts.calibration"
    given = (f"{section}.method=given", f"{section}.map=temperature")

    def key(*assignments: str) -> str:
        return stage_keys(load_config(None, {}, assignments), [])["verdicts"]

    weights = f"{section}.weights=[0,1,0,0,0]"
    assert len({key(), key(given[1]), key(*given, weights), key(*given, f"{section}.weights=[0,2,0,0,0]")}) == 4
    isotonic = (given[0], f"{section}.map=isotonic", weights)
    for wrong, words in (
        ((*given, f"{section}.weights=[1,2]"), "needs 5 weights, got 2"),
        (isotonic, "steps has 0 points"),
        ((*isotonic, f"{section}.steps=[[1,0.9],[0,0.5]]"), "steps must ascend"),
        ((given[0], weights), "set map, or remove them"),
    ):
        with pytest.raises(ConfigError, match=words):
            load_config(None, {}, wrong)
    assert load_config(None, {}, (*isotonic, f"{section}.steps=[[0,0.5],[1,0.9]]")).verdicts.calibration.steps[1] == (1.0, 0.9)


def test_settings_are_part_of_the_key_and_checked() -> None:
    def key(*given: str) -> str:
        return stage_keys(load_config(None, {}, given), [])["verdicts"]

    section = "verdicts.calibration"
    off, given = f"{section}.method=off", f"{section}.method=given"
    assert len({key(), key(off), key(f"{section}.pairs=64"), key(given), key(given, f"{section}.bias=1")}) == 5
    # Settings without an effect rerun nothing.
    assert key(off, f"{section}.pairs=64", f"{section}.bias=1") == key(off)
    assert key(given, f"{section}.pairs=64") == key(given)
    assert key("verdicts.judge=pointwise") == key("verdicts.judge=pointwise", off)
    with pytest.raises(ConfigError, match=r"slope: .* greater than or equal to 0"):
        load_config(None, {}, [f"{section}.slope=-1"])
