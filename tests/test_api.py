"""The Python API: what `import selfeval` offers, and that it does what the commands do."""

from __future__ import annotations

import ast
import inspect
import json
import math
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import selfeval
from processes import environment, start
from processes import selfeval as command
from selfeval import errors
from selfeval.quality.margin_signals import MarginCalibration
from selfeval.runs.members import Temperature
from selfeval.runs.pair_confidence import PairConfidence
from toy import SIZES, ToyRun, toy_arguments

QUESTION = "Tom has 3 pens. He buys 2 more. How many pens does Tom have now?"
REPLIES = ["3 + 2 = 5. The answer is 5.", "3 - 2 = 1. The answer is 1.", "Well, 6"]


# -- names --------------------------------------------------------------------------------------------------------------


def test_every_name_is_there_documented_and_listed() -> None:
    assert set(selfeval.__all__) <= set(dir(selfeval))
    for name in selfeval.__all__:
        found = getattr(selfeval, name)
        assert name == "__version__" or inspect.getdoc(found), name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = selfeval.nothing


def test_all_errors_are_exported() -> None:
    assert {name for name in selfeval.__all__ if name.endswith("Error")} == {n for n in errors.__all__ if n.endswith("Error")}


def test_type_checkers_see_every_name_where_it_is_loaded_from() -> None:
    tree = ast.parse(Path(selfeval.__file__).read_text(encoding="utf-8"))
    seen = {
        alias.name: node.module
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert set(seen) == set(selfeval.__all__) - {"__version__"}
    for name, module in seen.items():
        assert f"{getattr(selfeval, name).__module__}.".startswith(f"{module}."), name


def test_reading_a_run_imports_no_torch() -> None:
    code = (
        "import sys, selfeval\n"
        "assert 'pydantic' not in sys.modules, 'import selfeval imports more than it needs'\n"
        "selfeval.Run, selfeval.run, selfeval.load_config, selfeval.InputError\n"
        "print([name for name in ('torch', 'transformers', 'peft') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment())
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"


# -- run ----------------------------------------------------------------------------------------------------------------


def _value(text: str) -> Any:
    """Read a value as `--set` does: JSON's and TOML's forms are the same here, and anything else is a text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _settings() -> dict[str, Any]:
    """The toy sizes as keywords."""
    found: dict[str, Any] = {}
    for size in SIZES:
        key, _, value = size.partition("=")
        section, _, name = key.partition(".")
        found.setdefault(section, {})[name] = _value(value)
    return found


@pytest.fixture(scope="module")
def recipe(toy_run: ToyRun) -> Path:
    return toy_run.recipe


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, toy_run: ToyRun) -> selfeval.Run:
    return selfeval.Run.open(shutil.copytree(toy_run.folder, tmp_path_factory.mktemp("api") / "run"))


def test_run_does_what_the_command_does(finished: selfeval.Run, recipe: Path) -> None:
    """It finds nothing left to do in the command's folder: the same keys, and so the same configuration, stage by stage."""
    before = (finished.folder / "report.json").stat().st_mtime_ns
    again = selfeval.run(recipe, output=finished.folder, progress=False, **_settings())
    assert (again.status, again.report) == ("finished", finished.report)
    assert (finished.folder / "report.json").stat().st_mtime_ns == before


def test_the_records_of_the_evaluation_give_the_figures_of_the_report(finished: selfeval.Run) -> None:
    scored, compared = finished.records("scored"), finished.records("compared")
    report, questions = finished.report, {question.id for question in finished.records("questions", split="test")}
    assert {row.question_id for row in (*scored, *compared)} <= questions
    labelled = [row for row in scored if {row.gold_first, row.gold_second} == {True, False}]
    right = [row.margin != 0 and (row.margin > 0) == row.gold_first for row in labelled]
    assert report["evaluator"]["accuracy_gold"]["n"] == len(right) > 0
    assert report["evaluator"]["accuracy_gold"]["value"] == pytest.approx(sum(right) / len(right), abs=1e-6)
    outcomes = Counter(row.outcome for row in compared)
    assert {name: report["policy"][name] for name in ("win", "tie", "loss", "unparsable")} == {
        name: outcomes[name] for name in ("win", "tie", "loss", "unparsable")
    }
    known = [row.gold_after for row in compared if row.gold_after is not None]
    assert report["policy"]["gold_after"]["value"] == pytest.approx(sum(known) / len(known), abs=1e-6)
    assert report["policy"]["kl"]["value"] == pytest.approx(sum(row.kl for row in compared) / len(compared), abs=1e-5)
    replies = {reply.id: reply.text for reply in finished.records("replies")}
    by_texts = {(replies[row.before], row.after): row for row in compared}
    for sample in report["samples"]:
        row = by_texts[sample["before"], sample["after"]]
        assert (row.score_before, row.score_after) == pytest.approx(
            (sample["evaluator_before"], sample["evaluator_after"]), abs=1e-4
        )


def test_a_stage_that_run_makes_again_has_the_same_content(finished: selfeval.Run, recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = selfeval.run(recipe, output=folder, until="questions", progress=False, **_settings())
    assert run.records("questions") == finished.records("questions")
    assert "is already finished" in command(*toy_arguments(recipe, folder, "--until", "questions")).stdout


def test_a_finished_run_is_returned_as_it_is(finished: selfeval.Run) -> None:
    before = (finished.folder / "report.json").stat().st_mtime_ns
    assert selfeval.run(output=finished.folder, progress=False).report == finished.report
    assert (finished.folder / "report.json").stat().st_mtime_ns == before


def test_a_configuration_object_is_run_and_keywords_override_it(finished: selfeval.Run, tmp_path: Path) -> None:
    run = selfeval.run(finished.config, output=tmp_path / "run", until="questions", progress=False, questions={"train": 16})
    assert run.status == "partial"
    assert run.config.questions.train == 16
    assert run.config.questions.test == finished.config.questions.test
    assert len(run.records("questions", split="train")) == 16


def test_changed_settings_are_refused_and_nobody_is_asked(
    finished: selfeval.Run, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.console import Console

    monkeypatch.setattr(Console, "is_terminal", True)
    monkeypatch.setattr("sys.stdin", None)  # asking would fail
    changed = {**_settings(), "policy": {**_settings()["policy"], "iterations": 2}}
    with pytest.raises(selfeval.RunFolderError, match=r"policy\.iterations: 4, now 2.*--restart"):
        selfeval.run(recipe, output=finished.folder, progress=True, **changed)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"policy": {"iteration": 3}}, 'unknown key "policy.iteration"; did you mean "iterations"?'),
        ({"seed": -1}, "seed: got -1"),
        ({"until": "pair"}, 'there is no stage "pair"; did you mean "pairs"?'),
        ({"model": "./none", "seeds": "none.txt"}, "seeds file .* does not exist"),
    ],
)
def test_input_that_cannot_be_used_leaves_no_folder(tmp_path: Path, given: dict[str, Any], said: str) -> None:
    with pytest.raises(selfeval.InputError, match=said):
        selfeval.run(output=tmp_path / "run", progress=False, **given)
    assert not (tmp_path / "run").exists()


def test_a_run_can_be_read_while_another_process_works_in_it(recipe: Path, tmp_path: Path) -> None:
    """From before its first file to its last record: whole records, or one sentence that says that there are none yet."""
    folder, said, most = tmp_path / "run", set(), 0
    process = start(toy_arguments(recipe, folder, "--until", "pairs"))
    try:
        while process.poll() is None:
            time.sleep(0.05)
            for kind in ("seeds", "questions", "replies", "verdicts", "pairs", "dropped"):
                try:
                    most = max(most, len(selfeval.Run.open(folder).records(kind)))
                except selfeval.RunFolderError as error:
                    said.add(str(error).split(";")[0].split(":")[0].replace(str(folder), "RUN"))
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 0
    kinds = ("seeds", "questions", "replies", "verdicts", "pairs", "dropped records")
    assert said - {f"RUN has no {kind} yet" for kind in kinds} <= {
        "RUN is not a run (no run.json)",
        "RUN has no run.json yet",
        "RUN has no configuration yet",
    }
    assert said
    assert most > 0


# -- records ------------------------------------------------------------------------------------------------------------


def test_records_are_as_many_as_the_stages_say(finished: selfeval.Run) -> None:
    stages = json.loads((finished.folder / "run.json").read_text())["stages"]
    assert len(finished.records("questions", split="test")) == stages["questions"]["counts"]["test"] == 16
    assert len(finished.records("replies")) == stages["replies"]["counts"]["replies"]
    kept = [verdict for verdict in finished.records("verdicts", split="train") if verdict.state == "kept"]
    assert len(kept) == len(finished.records("pairs", split="train")) == stages["pairs"]["counts"]["train"]
    assert [step["step"] for step in finished.metrics("policy")] == list(range(1, 5))
    assert {sampled.step for sampled in finished.records("sampled")} == set(range(1, 5))


def test_a_notebook_shows_the_figures(finished: selfeval.Run) -> None:
    shown = finished._repr_html_()
    assert f"<b>{finished.folder}</b>: finished" in shown
    assert "<td>win rate, after vs. before</td>" in shown


def test_records_as_a_data_frame(finished: selfeval.Run) -> None:
    pytest.importorskip("pandas")
    frame = finished.to_pandas("verdicts")
    records = finished.records("verdicts")
    assert list(frame["question_id"]) == [verdict.question_id for verdict in records]
    assert list(frame["state"]) == [verdict.state for verdict in records]
    assert list(finished.to_pandas("reference_answers", split="test").columns) == ["question_id", "text"]


def test_pairs_as_a_data_set(finished: selfeval.Run) -> None:
    pytest.importorskip("datasets")
    pairs = finished.records("pairs", split="test")
    rows = finished.to_datasets("test")
    assert rows[0] == {
        "prompt": [{"role": "user", "content": pairs[0].prompt}],
        "chosen": [{"role": "assistant", "content": pairs[0].chosen}],
        "rejected": [{"role": "assistant", "content": pairs[0].rejected}],
    }
    plain = finished.to_datasets("test", format="standard")
    assert [row["chosen"] for row in plain] == [pair.chosen for pair in pairs]
    with pytest.raises(selfeval.InputError, match='no format "chat"; use conversational or standard'):
        finished.to_datasets("test", format="chat")  # type: ignore[arg-type]


@pytest.mark.parametrize(("package", "call"), [("pandas", "to_pandas"), ("datasets", "to_datasets")])
def test_a_missing_package_names_its_extra(
    finished: selfeval.Run, package: str, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(selfeval.MissingPackageError, match=rf"{call} needs .* pip install 'self-evaluator\[{package}\]'"):
        getattr(finished, call)("pairs" if package == "pandas" else "train")


# -- evaluator ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluator(finished: selfeval.Run) -> selfeval.Evaluator:
    return selfeval.Evaluator.load(finished.folder)


def test_scores_are_those_of_the_command(finished: selfeval.Run, evaluator: selfeval.Evaluator) -> None:
    given = [part for reply in REPLIES for part in ("--reply", reply)]
    done = command("score", str(finished.folder), "--question", QUESTION, *given, "--json")
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert [round(score, 6) for score in evaluator.score(QUESTION, REPLIES)] == pytest.approx(printed["scores"], abs=2e-6)
    (ranking,) = evaluator.rank([(QUESTION, REPLIES)])
    assert ranking.preferred == printed["preferred"]
    assert ranking.confidence == pytest.approx(printed["confidence"], abs=2e-6)


def test_one_question_per_reply(evaluator: selfeval.Evaluator) -> None:
    other = "Ann has 7 pens. She gives 3 away. How many pens does Ann have now?"
    together = evaluator.score([QUESTION, other, QUESTION], [REPLIES[0], "4", REPLIES[1]])
    apart = [evaluator.score(QUESTION, REPLIES[:1]), evaluator.score(other, ["4"]), evaluator.score(QUESTION, REPLIES[1:2])]
    assert together == pytest.approx([scores[0] for scores in apart], abs=1e-4)
    with pytest.raises(selfeval.InputError, match="got 1 questions and 2 replies"):
        evaluator.score([QUESTION], REPLIES[:2])
    with pytest.raises(selfeval.InputError, match="replies must be a list of strings"):
        evaluator.score(QUESTION, REPLIES[0])
    with pytest.raises(selfeval.InputError, match="must not be empty"):
        evaluator.score(QUESTION, [" "])


def test_a_comparison_follows_the_scores_and_abstains(evaluator: selfeval.Evaluator) -> None:
    a, b = sorted(REPLIES[:2], key=lambda reply: -evaluator.score(QUESTION, [reply])[0])
    found, swapped = evaluator.compare(QUESTION, a, b, sure=0.5), evaluator.compare(QUESTION, b, a, sure=0.5)
    assert (found.preferred, swapped.preferred) == ("a", "b")
    assert found.probability is not None
    assert swapped.probability is not None
    assert found.probability + swapped.probability == pytest.approx(1.0, abs=1e-6)
    assert found.probability > 0.5
    assert evaluator.compare(QUESTION, a, b, sure=1.0).preferred == "unsure"
    assert evaluator.compare(QUESTION, a, a, sure=0.5).preferred == "unsure"
    for sure in (0.3, 1.5, float("nan")):
        with pytest.raises(selfeval.InputError, match="sure must be between"):
            evaluator.compare(QUESTION, a, b, sure=sure)
        with pytest.raises(selfeval.InputError, match="sure must be between"):
            evaluator.rank([(QUESTION, [a, b])], sure=sure)
    assert not found.calibrated, "a toy run holds out too few pairs to fit a temperature"


def test_a_ranking_is_unsure_where_a_comparison_is(evaluator: selfeval.Evaluator) -> None:
    a, b = sorted(REPLIES[:2], key=lambda reply: -evaluator.score(QUESTION, [reply])[0])
    clear, equal, equal_first = evaluator.rank([(QUESTION, [b, a]), (QUESTION, [a, a]), (QUESTION, [b, a, a])], sure=0.5)
    assert (clear.preferred, clear.unsure) == (1, False)
    assert equal.unsure
    assert equal_first.unsure, "neither of the two best replies is better"


def test_the_confidence_of_an_ensemble_depends_on_its_disagreement(
    evaluator: selfeval.Evaluator, monkeypatch: pytest.MonkeyPatch
) -> None:
    (a, b), scorer = evaluator.score(QUESTION, REPLIES[:2]), evaluator._scorer
    # The second member is the first one with half of its scores, so the margins are m and m / 2.
    half = replace(scorer.members[0], deviation=2.0 * scorer.members[0].deviation)
    monkeypatch.setattr(evaluator, "_scorer", replace(scorer, members=(scorer.members[0], half)))
    signals = MarginCalibration({"choice": 0.0, "margin": 1.0, "disagreement": 2.0})
    monkeypatch.setattr(evaluator, "_confidence", PairConfidence(Temperature(1.0, 100), signals))
    found = evaluator.compare(QUESTION, *REPLIES[:2], sure=0.5)
    # Mean margin 3 m / 4, deviation m / 4.
    assert found.confidence == pytest.approx(1 / (1 + math.exp(-abs(a - b) * (0.75 + 0.5))), abs=1e-5)
    assert found.scores == pytest.approx((0.75 * a, 0.75 * b), abs=1e-5)
    (ranking,) = evaluator.rank([(QUESTION, REPLIES[:2])], sure=0.5)
    assert ranking.confidence == found.confidence
    assert max(evaluator.confidences(evaluator.score(QUESTION, REPLIES[:2]))) == found.confidence


def test_the_reward_function_takes_messages_questions_and_the_policys_prompt(
    finished: selfeval.Run, evaluator: selfeval.Evaluator
) -> None:
    expected = evaluator.score(QUESTION, REPLIES)
    reward = evaluator.as_reward_fn()
    assert reward.__name__ == "evaluator_reward"
    asked = [[{"role": "user", "content": QUESTION}]] * 3
    replied = [[{"role": "assistant", "content": reply}] for reply in REPLIES]
    assert reward(prompts=asked, completions=replied, trainer_state=None, answer=[1, 2, 3]) == expected
    assert reward(prompts=[QUESTION] * 3, completions=REPLIES) == expected
    templates = evaluator._model.templates
    whole = str(templates.tokenizer.decode(list(templates.prompt("reply", question=QUESTION).ids)))
    assert whole != QUESTION
    assert reward(prompts=[whole] * 3, completions=REPLIES) == expected
    with pytest.raises(selfeval.InputError, match="must end with a turn of the user, got assistant"):
        reward(prompts=[[*asked[0], *replied[0]]], completions=[REPLIES[0]])


# -- policy and judge ---------------------------------------------------------------------------------------------------


def test_the_policy_replies_as_it_was_trained(finished: selfeval.Run) -> None:
    policy = selfeval.Policy.load(finished.folder)
    questions = [question.text for question in finished.records("questions", split="test")]
    replies = policy.reply(questions, n=2, seed=3)
    assert [len(group) for group in replies] == [2] * len(questions)
    assert policy.reply(questions, n=2, seed=3) == replies
    assert policy.reply(questions, n=2, seed=4) != replies
    assert len({*policy.reply(questions[0], n=3, temperature=0)}) == 1
    backbone = policy._model.backbone
    adapter = list(backbone.roles.parameters("policy").values())
    kept = [p.detach().clone() for p in adapter]
    for parameter in adapter:
        parameter.data.zero_()
    assert policy.reply(questions, n=2, seed=3) != replies, "it replied with its adapter"
    for parameter, value in zip(adapter, kept, strict=True):
        parameter.data.copy_(value)


@pytest.mark.parametrize("given", [{"n": 0}, {"temperature": -1.0}, {"max_new_tokens": 0}, {"temperature": float("nan")}])
def test_numbers_that_the_policy_cannot_use(finished: selfeval.Run, given: dict[str, Any]) -> None:
    policy = selfeval.Policy.load(finished.folder)
    with pytest.raises(selfeval.InputError, match=f"{next(iter(given))} must be at least"):
        policy.reply(QUESTION, **given)


def test_the_judge_says_what_the_run_recorded(finished: selfeval.Run) -> None:
    judge = selfeval.Judge.load(finished.folder)
    texts = {reply.id: reply.text for reply in finished.records("replies")}
    questions = {question.id: question.text for question in finished.records("questions")}
    verdicts = finished.records("verdicts")[:12]
    cases = [(questions[v.question_id], texts[v.first], texts[v.second]) for v in verdicts]
    for found, recorded in zip(judge.compare_all(cases), verdicts, strict=True):
        assert found.state == recorded.state
        assert found.probability == pytest.approx(recorded.probability, abs=1e-3)
        assert (found.preferred == "unsure") == (recorded.state != "kept")
    alone = judge.compare(*cases[0])
    assert alone.probability == pytest.approx(verdicts[0].probability, abs=1e-3)
    assert judge.compare(*cases[0], sure=1.0).preferred == "unsure"
    with pytest.raises(selfeval.InputError, match="sure must be between"):
        judge.compare(*cases[0], sure=80)


def test_a_judge_from_a_model_folder(finished: selfeval.Run) -> None:
    judge = selfeval.Judge.load(finished.config.model, precision="fp32")
    of_run = finished.judge()
    case = (QUESTION, REPLIES[0], REPLIES[1])
    found, expected = judge.compare(*case), of_run.compare(*case)
    outputs = [c.judgement.evidence.raw_output for c in (found, expected) if c.judgement and c.judgement.evidence]
    assert len(outputs) == 2
    assert outputs[0] == outputs[1] or finished.config.verdicts.max_new_tokens < 256
    with pytest.raises(selfeval.InputError, match="is a run, which has its own precision"):
        selfeval.Judge.load(finished.folder, precision="bf16")


def test_a_run_shares_one_base(finished: selfeval.Run) -> None:
    run = selfeval.Run.open(finished.folder)
    evaluator, policy = run.evaluator(), run.policy()
    assert evaluator._model is policy._model
    alone = selfeval.Evaluator.load(finished.folder)
    policy.reply(QUESTION)
    assert evaluator.score(QUESTION, REPLIES) == alone.score(QUESTION, REPLIES), "the policy on the same base changes nothing"


@pytest.mark.parametrize(("load", "said"), [("evaluator", "no evaluator yet"), ("policy", "no policy yet")])
def test_roles_that_are_not_trained_yet(finished: selfeval.Run, tmp_path: Path, load: str, said: str) -> None:
    (tmp_path / "run.json").write_text((finished.folder / "run.json").read_text())
    with pytest.raises(selfeval.RunFolderError, match=said):
        getattr(selfeval.Run.open(tmp_path), load)()
