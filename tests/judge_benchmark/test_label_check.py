"""The judge of a run against human labels, and the pairs that are written to label."""

from __future__ import annotations

import io
import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from labelled_run import write_run
from selfeval.cli.app import app
from selfeval.cli.judge_figures import print_check
from selfeval.config import RunConfig, VerdictsConfig, load_config
from selfeval.errors import DataError, InputError
from selfeval.judge_benchmark.figures import Case
from selfeval.judge_benchmark.judging import Outcome
from selfeval.judge_benchmark.label_check import JudgeCheck, judge_check, write_unlabelled
from selfeval.judge_benchmark.label_figures import LabelCheck, check_labels, length_slope
from selfeval.judge_benchmark.pairs import Label, LabelledPair
from selfeval.judging.calibrated import calibration_of
from selfeval.judging.protocol import UNFITTED, Judgement
from selfeval.quality.judge_calibration import Calibration
from selfeval.quality.judge_signals import SignalCalibration
from selfeval.records import PairwiseEvidence, Question, Reply, Split, Verdict, VerdictState, to_json
from selfeval.runs.labelling import LabelSession, LabelTask
from selfeval.stages.judge_fit import calibrated_verdict
from selfeval.store import RunStore

CONFIG = VerdictsConfig(keep=0.8)
PAIRS = 60


def verdict_of(number: int) -> Judgement:
    """Sure and right in three of four pairs; in the others unsure, because both orders choose the reply shown first."""
    first_is_right = number % 2 == 0
    if number % 4 == 3:
        return Judgement(0.55, 0.0, PairwiseEvidence(0.9, 0.2, (0.0, 0.0), ("", "")))
    p = 0.9 if first_is_right else 0.1
    return Judgement(p, 0.0, PairwiseEvidence(p, p, (0.0, 0.0), ("", "")))


def texts(number: int) -> tuple[str, str, str]:
    good, bad = "A good reply, which is longer.", "A bad one."
    return (f"Question {number}?", good, bad) if number % 2 == 0 else (f"Question {number}?", bad, good)


def _reply(number: int, position: int, text: str) -> Reply:
    return Reply(f"q{number}-r{position}", f"q{number}", text, (1,), "sample", 1.0, 1.0, -1.0, finished=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has judged its pairs, without a model."""
    store = RunStore(tmp_path_factory.mktemp("check") / "run")
    store.update_run(status="partial", config=RunConfig(verdicts=CONFIG).model_dump(mode="json"))
    shown = [texts(number) for number in range(PAIRS)]
    verdicts = []
    for number in range(PAIRS):
        found = Outcome(verdict_of(number)).verdict(CONFIG)
        ids = f"q{number}-r0", f"q{number}-r1"
        verdicts.append(Verdict(f"q{number}", Split.TRAIN, *ids, found.state, found.probability, found.tie, found.evidence))
    store.write_shard("questions", 0, [Question(f"q{n}", shown[n][0], Split.TRAIN, "self") for n in range(PAIRS)])
    store.write_shard("replies", 0, [_reply(n, k, shown[n][k + 1]) for n in range(PAIRS) for k in (0, 1)])
    store.write_shard("verdicts", 0, verdicts)
    store.close()
    return store.root


def labelled(source: Path, target: Path) -> Path:
    """Label like a person who always finds the good reply."""
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    for row in rows:
        row["label"] = "first" if "good" in row["first"] else "second"
    target.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return target


def test_written_pairs_are_blind_and_their_labels_find_the_verdicts_of_the_run(run: Path, tmp_path: Path) -> None:
    assert write_unlabelled(run, tmp_path / "open.jsonl", n=1000) == PAIRS
    rows = [json.loads(line) for line in (tmp_path / "open.jsonl").read_text().splitlines()]
    assert all(row.keys() == {"question", "first", "second", "label"} and row["label"] is None for row in rows)
    assert [row["question"] for row in rows] != [texts(n)[0] for n in range(PAIRS)]
    # The first reply of the run is shown first in about half of the pairs: within four standard deviations of 30.
    assert 14 < sum((row["question"], row["first"], row["second"]) in map(texts, range(PAIRS)) for row in rows) < 46
    found = judge_check(run, labelled(tmp_path / "open.jsonl", tmp_path / "labels.jsonl"), error=0.1, progress=False)
    assert (found.recorded, found.unlabelled, found.figures.pairs) == (PAIRS, 0, PAIRS)
    # Right on 45 pairs; of the 15 with a position bias the preferred one is the bad reply, because odd pairs show it first.
    assert found.figures.agreement.value == 0.75
    # 45 sure pairs without an error: 0.9^45 < 0.01, so all thresholds down to the confidence of the others, 0.55, pass.
    assert found.figures.setting == "verdicts.keep=0.56"
    assert found.figures.threshold.coverage.value == 0.75


def test_of_the_labels_of_the_label_command_only_a_uniform_sample_counts(tmp_path: Path) -> None:
    """Half of that queue is drawn by the expected error; these labels would bias every figure."""
    folder = write_run(tmp_path / "run", pairs=40)
    ids = [(f"q{n}", Split.TEST, f"q{n}-r0", f"q{n}-r1") for n in range(40)]
    verdicts = [to_json(Verdict(*one, VerdictState.KEPT, 0.9, 0.0, None)) for one in ids]
    (folder / "verdicts").mkdir()
    (folder / "verdicts" / "shard-00000.jsonl").write_text("".join(json.dumps(row) + "\n" for row in verdicts))
    session = LabelSession(LabelTask(folder), "ann")
    for _ in range(20):
        pair = session.next_pair()
        assert pair is not None
        session.answer(pair, "first" if "good" in pair.first_text else "second")
    drawn = json.loads((folder / "label_queue.json").read_text())["draws"][:20]
    end = max(row["rank"] for row in drawn if row["uniform"])
    uniform = sum(row["rank"] < end for row in drawn)
    found = judge_check(folder, folder / "labels.jsonl", progress=False)
    assert (found.recorded, found.figures.pairs, found.informed) == (uniform, uniform, 20 - uniform)
    assert 0 < uniform < 20
    assert found.figures.agreement.value == 1.0
    shown = CliRunner().invoke(app, ["judge-check", str(folder), "--labels", str(folder / "labels.jsonl")]).stdout
    assert f"{20 - uniform} further labelled pairs are left out" in " ".join(shown.split())


def test_a_sample_can_be_drawn_again_and_no_file_is_overwritten(run: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert write_unlabelled(run, tmp_path / name, n=7, seed=seed) == 7
    assert (tmp_path / "a").read_text() == (tmp_path / "b").read_text() != (tmp_path / "c").read_text()
    with pytest.raises(InputError, match="exists and may contain labels"):
        write_unlabelled(run, tmp_path / "a")
    with pytest.raises(DataError, match=r"no pair of .* has a label; set label to first, second or tie"):
        judge_check(run, tmp_path / "a")
    with pytest.raises(InputError, match=r"error must be between 0 and 1, got 1\.5"):
        judge_check(run, tmp_path / "a", error=1.5)


def test_the_command_prints_the_setting_to_use(run: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    written = runner.invoke(app, ["judge-check", str(run), "--write", str(tmp_path / "open.jsonl"), "--n", "60"])
    assert written.exit_code == 0, written.output
    labels = str(labelled(tmp_path / "open.jsonl", tmp_path / "labels.jsonl"))
    shown = runner.invoke(app, ["judge-check", str(run), "--labels", labels])
    assert "use verdicts.keep=0.56: the error rate is at most 10% at 95% confidence" in shown.stdout
    assert "Cohen's kappa" in shown.stdout
    strict = runner.invoke(app, ["judge-check", str(run), "--labels", labels, "--error", "0.01"])
    assert "no threshold has an error rate of at most 1%" in strict.stdout
    printed = json.loads(runner.invoke(app, ["judge-check", str(run), "--labels", labels, "--json"]).stdout)
    assert printed["setting"] == "verdicts.keep=0.56"
    assert printed["agreement"]["value"] == 0.75
    assert printed["calibration"] is None  # 60 labels are too few to fit on a half of them
    assert runner.invoke(app, ["judge-check", str(run)]).exit_code == 2


# -- figures ------------------------------------------------------------------------------------------------------------


def case(probability: float, label: Label, name: str, *, replies: tuple[str, str] = ("a", "b"), **orders: Any) -> Case:
    evidence = PairwiseEvidence(*orders["orders"], (0.0, 0.0), ("", "")) if orders else None
    return Case(LabelledPair(name, *replies, (label,)), Outcome(Judgement(probability, 0.0, evidence)).verdict(CONFIG))


def test_order_and_length_bias() -> None:
    # Always the reply shown first, in both orders.
    biased = [case(0.5 + n / 1000, "first", f"Q{n}", orders=(0.9, 0.1)) for n in range(1, 21)]
    assert check_labels(biased, 0.1, CONFIG).shown_first.value == 1.0
    # Always the longer reply, whatever people prefer.
    longer = [case(0.9, label, f"{label}{n}", replies=("x" * 31, "x" * 7)) for n in range(10) for label in ("first", "second")]
    found = check_labels(longer, 0.1, CONFIG)
    assert (found.longer_better.value, found.shorter_better.value) == (1.0, 0.0)
    # From -2 to 2 doublings, 32 / 8, the agreement rises from 0 to 1.
    assert found.length_slope.value == pytest.approx(0.25)
    assert found.kappa.value == 0.0
    assert length_slope([1.0, 1.0], [0.0, 1.0]).value is None


def test_ties_and_pairs_of_one_question_do_not_count_for_the_threshold() -> None:
    sure = [case(0.9, "first", f"Q{n}") for n in range(44)]
    assert check_labels(sure, 0.1, CONFIG).threshold.value == 0.5
    # The same label 44 times is one independent case.
    assert check_labels([case(0.9, "first", "Q") for _ in range(44)], 0.1, CONFIG).threshold.value is None
    ties = [case(0.9, "tie", f"T{n}") for n in range(44)]
    found = check_labels([*sure[:10], *ties], 0.1, CONFIG)
    assert (found.pairs, found.ties, found.threshold.value, found.agreement.n) == (54, 44, None, 10)


def test_calibration_of_a_calibrated_judge() -> None:
    rng = random.Random(0)
    cases = [case(p, "first" if rng.random() < p else "second", f"Q{n}") for n in range(600) for p in [rng.uniform(0.5, 1)]]
    found: LabelCheck = check_labels(cases, 0.1, CONFIG)
    assert found.ece.ci_low == 0.0
    assert found.aurc is not None
    # Risk of the k surest of a uniform confidence: 1 - (1 - k / 4)..., 1/8 on average.
    assert found.aurc == pytest.approx(1 / 8, abs=0.04)
    assert found.risk_coverage[-1] == (1.0, pytest.approx(0.25, abs=0.06))


# -- calibration --------------------------------------------------------------------------------------------------------


def overconfident(n: int, seed: int) -> list[Case]:
    """Cases of a judge whose log-odds are twice too large, and that favours the reply shown first."""
    rng = random.Random(seed)
    cases = []
    for number in range(n):
        is_first = rng.random() < 0.5
        orders = [2 * 2 * rng.gauss(1.0 if is_first else -1.0, 1.0) + bias for bias in (3.0, -3.0)]
        in_order, swapped = (1 / (1 + math.exp(-x)) for x in orders)
        label: Label = "first" if is_first else "second"
        cases.append(case((in_order + swapped) / 2, label, f"{seed}/{number}", orders=(in_order, swapped)))
    return cases


def test_a_calibration_on_labels_is_measured_on_other_labels() -> None:
    found = check_labels(overconfident(600, 0), 0.1, CONFIG).calibration
    assert found is not None
    assert 250 < found.fitted < 350
    assert found.slope == pytest.approx(1 / 2, rel=0.3)
    assert found.bias == pytest.approx(3.0, abs=0.6)
    assert found.ece_before.known > 0.03 > found.ece.known
    # As many others as there are labels less those of the fit; those without a preference of the judge do not count.
    assert found.ece.n <= 600 - found.fitted
    assert found.threshold.value is not None
    assert found.threshold.value > 0.5
    assert check_labels(overconfident(90, 0), 0.1, CONFIG).calibration is None


def test_a_run_with_the_printed_settings_has_the_calibrated_confidences() -> None:
    found = check_labels(overconfident(600, 0), 0.1, CONFIG).calibration
    assert found is not None
    config = load_config(None, {}, found.settings).verdicts
    assert config.keep == found.threshold.value
    calibration = calibration_of(config, UNFITTED)
    assert calibration == Calibration(found.slope, found.truncated_slope, found.bias)
    # Of new pairs, whose confidence is right; and the error rate of what is kept is below that which was wanted.
    new = [replace(one, verdict=calibrated_verdict(one.verdict, calibration, config)) for one in overconfident(3000, 1)]
    again = check_labels(new, 0.1, config)
    assert again.ece.known < 0.03
    kept = [one for one in new if one.verdict.state == VerdictState.KEPT]
    wrong = [(one.verdict.probability or 0.0) > 0.5 for one in kept if one.pair.label == "second"]
    assert len(kept) > 1500
    assert sum(wrong) / len(kept) < 0.1


@pytest.mark.parametrize("shape", ["temperature", "isotonic"])
def test_the_signals_are_fitted_to_labels_and_printed_as_settings(shape: str) -> None:
    cases = overconfident(600, 0)
    found = check_labels(cases, 0.1, VerdictsConfig(calibration={"map": shape})).calibration
    assert found is not None
    assert found.ece_before.known > 0.05 > found.ece.known
    config = load_config(None, {}, found.settings).verdicts
    assert (config.calibration.map, config.calibration.method) == (shape, "given")
    calibration = calibration_of(config, UNFITTED)
    assert isinstance(calibration, SignalCalibration)
    assert tuple(calibration.weights.values()) == pytest.approx(found.weights)
    assert calibration.weights["margin"] > 0.2
    assert calibration.steps == found.steps
    assert bool(found.steps) == (shape == "isotonic")
    new = [replace(one, verdict=calibrated_verdict(one.verdict, calibration, config)) for one in overconfident(3000, 1)]
    assert check_labels(new, 0.1, config).ece.known < 0.05


def test_probabilities_that_cannot_be_traced_back_are_not_calibrated() -> None:
    rng = random.Random(0)
    alone = [case(rng.uniform(0.5, 1), "first", f"Q{n}") for n in range(200)]
    given = {"judge": "pointwise", "calibration": {"method": "given", "slope": 0.5}}
    assert check_labels(alone, 0.1, VerdictsConfig(judge="pointwise")).calibration is not None
    assert check_labels(alone, 0.1, VerdictsConfig(**given)).calibration is None


def test_the_command_prints_the_calibration() -> None:
    shown = io.StringIO()
    judge = {"run": "runs/mine", "role": "judge", "judge": "pairwise"}
    print_check(JudgeCheck(judge, 600, 0, 0, check_labels(overconfident(600, 0), 0.1, CONFIG)), Console(file=shown, width=100))
    assert "--set verdicts.calibration.method=given --set verdicts.calibration.slope=0." in shown.getvalue()
    assert "at this threshold the error rate is at most 10%" in shown.getvalue()
