"""A new judge is one file and one row of the registry: a throw-away one is configured, run and loaded."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner

import tiny_models
from selfeval.cli.app import app
from selfeval.config import JUDGES, JudgeConfig, JudgeSpec, RunConfig, TemplateKind, VerdictsConfig, load_config
from selfeval.config.fields import Share
from selfeval.errors import ConfigError, ModelError
from selfeval.judging.judges import make_judge
from selfeval.judging.kinds import kinds_of_run
from selfeval.judging.labels import verdict_tokens
from selfeval.judging.protocol import Comparison, Judge, JudgeContext, Judgement
from selfeval.judging.sources import prompt_sources
from selfeval.judging.templates import Templates, templates_folder
from selfeval.records import VerdictState
from selfeval.runs.judge import Judge as LoadedJudge
from selfeval.runs.reader import RunReader
from selfeval.stages.graph import stage_keys
from toy import copy_lab, toy_arguments

OWN = templates_folder("no such model")
KIND = "throw-away-kind"
"""A kind of template with a name that no real one has."""
LABELS = ("poor", "fair", "good", "excellent")


class Longer(Judge):
    """Prefers the longer reply; it reads no prompt, and gives neither ties nor evidence."""

    def __init__(self, context: JudgeContext) -> None:
        self.kinds = context.kinds

    def judge(self, comparisons: Sequence[Comparison], advance: Callable[[int], None] | None = None) -> list[Judgement]:
        differences = [len(c.first) - len(c.second) for c in comparisons]
        return [Judgement(0.5 + 0.45 * ((d > 0) - (d < 0))) for d in differences]


@pytest.fixture
def longer(monkeypatch: pytest.MonkeyPatch) -> JudgeSpec:
    module = ModuleType("selfeval.judging.judges.longer")
    module.Longer = Longer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    spec = JudgeSpec("longer", "longer:Longer", "Prefers the longer reply.")
    monkeypatch.setitem(JUDGES, "longer", spec)
    return spec


class LongerConfig(JudgeConfig):
    """Settings of a judge that prefers the longer reply."""

    sureness: Share = 0.9
    """How sure it is."""


@pytest.fixture
def own_kind(longer: JudgeSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kind of template that the judge requests, with labels that no other judge has."""
    kind = TemplateKind(KIND, {"question": "How many apples?", "reply": "Five."}, labels=LABELS)
    monkeypatch.setitem(JUDGES, "longer", replace(longer, templates={"judge": (kind,)}))


def keys(*given: str, model: str = "") -> dict[str, str]:
    return stage_keys(load_config(None, {"model": model}, given), [])


@pytest.mark.parametrize(("given", "suggestion"), [("longr", 'did you mean "longer"? '), ("people", "")])
def test_an_unknown_judge_is_refused_with_those_that_there_are(longer: JudgeSpec, given: str, suggestion: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, {}, [f"verdicts.judge={given}"])
    allowed = ", ".join(JUDGES)
    said = f'verdicts.judge: got "{given}"; unknown judge; {suggestion}allowed: {allowed}'
    assert str(caught.value) == f"--set verdicts.judge={given}: {said}"


def test_its_section_is_read_stored_and_documented(longer: JudgeSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(JUDGES, "longer", replace(longer, config=LongerConfig))
    config = load_config(None, {}, ["verdicts.judge=longer", "verdicts.longer.sureness=0.7"])
    assert config.verdicts.settings == LongerConfig(sureness=0.7)
    stored = config.model_dump(mode="json")
    assert stored["verdicts"]["longer"] == {"sureness": 0.7}
    assert RunConfig.model_validate(stored) == config
    resumed = load_config(None, stored, ["verdicts.judge=pairwise"])
    assert (resumed.verdicts.judge, resumed.verdicts.settings) == ("pairwise", None)
    assert "pairwise" not in resumed.model_dump()["verdicts"]
    one, other = keys("verdicts.judge=longer"), keys("verdicts.judge=longer", "verdicts.longer.sureness=0.7")
    assert {name for name in one if one[name] == other[name]} == {"questions", "replies"}
    for given, said in [
        (["verdicts.longer.sureness=0.7"], 'verdicts.judge is "pairwise", so only that section is allowed'),
        (["verdicts.judge=longer", "verdicts.longer.surenes=0.7"], 'did you mean "sureness"?'),
        (["verdicts.judge=longer", "verdicts.sureness=0.7"], "write it as verdicts.longer.sureness"),
        (["verdicts.judge=longer", "verdicts.longer.sureness=7"], "verdicts.longer.sureness: got 7;"),
        (["verdicts.sureness=0.7"], "is not a setting of pairwise; judges that have it: longer"),
        (["verdicts.pairwise.keep=0.7"], 'unknown key "verdicts.pairwise"'),
    ]:
        with pytest.raises(ConfigError) as caught:
            load_config(None, {}, given)
        assert said in str(caught.value)


def test_the_factory_makes_the_judge_that_is_configured_and_its_referee(longer: JudgeSpec) -> None:
    backbone = tiny_models.backbone("llama", 384)
    templates = Templates.load(OWN, backbone.loaded.tokenizer)
    config = VerdictsConfig(judge="longer")
    judge = make_judge(backbone, templates, config, batch_size=8)
    assert isinstance(judge, Longer)
    assert judge.kinds == ()
    assert judge.judge([Comparison("q", "aa", "b"), Comparison("q", "a", "bb"), Comparison("q", "a", "b")]) == [
        Judgement(0.95), Judgement(pytest.approx(0.05)), Judgement(0.5),
    ]  # fmt: skip
    assert type(make_judge(backbone, templates, config, batch_size=8, role="referee")).__name__ == "PairwiseJudge"


def test_the_judge_is_part_of_the_key_of_the_verdicts(longer: JudgeSpec) -> None:
    one, other = keys(), keys("verdicts.judge=longer")
    assert {name for name in one if one[name] == other[name]} == {"questions", "replies"}


def test_a_folder_needs_no_template_that_the_judge_does_not_read(longer: JudgeSpec, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(OWN, tmp_path / "templates"))
    (copy / "judge.jinja").unlink()
    settings = (copy / "templates.toml").read_text()
    (copy / "templates.toml").write_text(settings[: settings.index("[judge]")] + settings[settings.index("[referee]") :])
    tokenizer = tiny_models.words_tokenizer()
    assert "judge" not in kinds_of_run(VerdictsConfig(judge="longer"))
    Templates.load(copy, tokenizer, kinds=kinds_of_run(VerdictsConfig(judge="longer")))
    model = str(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert set(keys("verdicts.judge=longer", model=model)) == set(keys())
    with pytest.raises(ModelError, match=r"lacks judge\.jinja; this configuration needs ask, grade, reply, judge, referee"):
        keys(model=model)


def test_a_kind_that_a_new_judge_adds_is_asked_of_no_one_else(own_kind: None, tmp_path: Path) -> None:
    tokenizer = tiny_models.words_tokenizer()
    Templates.load(OWN, tokenizer)  # the folders that there are
    read = kinds_of_run(VerdictsConfig(judge="longer"))
    assert read == ("ask", "grade", "reply", KIND, "referee")
    with pytest.raises(ModelError, match=rf"lacks {KIND}\.jinja; this configuration needs .*{KIND}"):
        Templates.load(OWN, tokenizer, kinds=read)
    copy = Path(shutil.copytree(OWN, tmp_path / "templates"))
    (copy / f"{KIND}.jinja").write_text("{{ question }} {{ reply }}")
    with pytest.raises(ModelError, match=rf"templates\.toml lacks \[{KIND}\]; set the verdict labels {', '.join(LABELS)}, and"):
        Templates.load(copy, tokenizer, kinds=read)
    settings = (copy / "templates.toml").read_text()
    for table, said in [
        ('poor = " 1"\nfair = " 2"\ngood = " 3"', "lacks excellent; set poor, fair, good, excellent, and optionally lead"),
        ('poor = " 1"\nfair = " 2"\ngood = " 3"\nexcellent = " 4"\nbest = " 5"', "has unknown labels: best; set poor"),
        ('poor = 1\nfair = " 2"\ngood = " 3"\nexcellent = " 4"', "poor: Input should be a valid string"),
    ]:
        (copy / "templates.toml").write_text(f"{settings}\n[{KIND}]\n{table}\n")
        with pytest.raises(ModelError, match=said):
            Templates.load(copy, tokenizer, kinds=read)
    # In another order than declared; probabilities are in the declared one.
    table = 'excellent = " 4"\npoor = " 1"\ngood = " 3"\nfair = " 2"'
    (copy / "templates.toml").write_text(f"{settings}\n[{KIND}]\n{table}\n")
    templates = Templates.load(copy, tokenizer, kinds=read)
    assert templates.labels(KIND).all == (" 1", " 2", " 3", " 4")
    assert len(verdict_tokens(templates, templates.labels(KIND)).paths) == 4
    sources = prompt_sources(copy, date(2026, 1, 1), read)
    expected = {"lead": "", "poor": " 1", "fair": " 2", "good": " 3", "excellent": " 4"}
    assert sources[KIND][1] == {KIND: expected}
    (copy / f"{KIND}.jinja").write_text("{{ question }}")
    with pytest.raises(ModelError, match=rf"{KIND}\.jinja does not use the reply"):
        Templates.load(copy, tokenizer, kinds=read)


@pytest.mark.slow
def test_a_run_is_judged_by_it(longer: JudgeSpec, tmp_path: Path) -> None:
    recipe, output = copy_lab(tmp_path / "lab"), tmp_path / "run"
    (tmp_path / "lab" / "word_problems" / "templates" / "judge.jinja").unlink()
    done = CliRunner().invoke(app, toy_arguments(recipe, output, "--set", "verdicts.judge=longer"))
    assert done.exit_code == 0, done.output
    reader = RunReader(output)
    texts = {reply.id: reply.text for reply in reader.records("replies")}
    verdicts = reader.records("verdicts")
    assert sum(v.state == VerdictState.KEPT for v in verdicts) >= 10
    for verdict in verdicts:
        first, second = len(texts[verdict.first]), len(texts[verdict.second])
        expected = 0.95 if first > second else 0.05 if first < second else 0.5
        assert (verdict.probability, verdict.tie, verdict.evidence) == (pytest.approx(expected), None, None)
    report = reader.report()
    assert report["verdicts"]["swap_consistency"]["n"] == 0
    assert report["evaluator"]["baselines"]["judge"]["value"] == report["evaluator"]["baselines"]["longer_wins"]["value"]
    assert report["policy"]["win_rate"]["n"] + report["policy"]["unparsable"] == 16  # the referee is pairwise
    found = LoadedJudge.load(output).compare("What is 1 + 1?", "It is 2.", "2")
    assert (found.preferred, found.probability, found.judgement) == ("a", 0.95, Judgement(0.95))
