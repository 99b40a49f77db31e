"""Rubrics: those of the repository, errors of a user's file, and the stages that depend on its content."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import tiny_models
from selfeval.config import RUBRIC, RunConfig, load_config
from selfeval.errors import ConfigError, InputError, ModelError, RunFolderError
from selfeval.judging.kinds import kinds_of_run
from selfeval.judging.rubric import Rubric, parse_rubric, with_rubric
from selfeval.judging.templates import Templates, template_texts, templates_folder
from selfeval.stages.graph import stage_keys
from selfeval.stages.input_files import file_fingerprints, refuse_other_files

OWN = templates_folder("no such model")
ROOT = Path(__file__).resolve().parents[2]
SCALE = """criterion = "Is it polite?"
lead = "Grade:"
[[grades]]
label = " low"
value = 1
[[grades]]
label = " high"
value = 3
meaning = "polite throughout"
"""


def config(rubric: Path | str = "") -> RunConfig:
    return load_config(None, {"verdicts.judge": "pointwise"}, [f"verdicts.pointwise.rubric={rubric}"])


def loaded(rubric: Path | str = "", folder: Path = OWN) -> Templates:
    kinds = kinds_of_run(config().verdicts)
    return Templates.load(folder, tiny_models.words_tokenizer(), kinds=kinds, rubric=str(rubric))


@pytest.fixture
def scale(tmp_path: Path) -> Path:
    (tmp_path / "scale.toml").write_text(SCALE)
    return tmp_path / "scale.toml"


def test_a_rubric_gives_labels_values_and_texts_of_the_prompt(scale: Path) -> None:
    found = loaded(scale)
    assert found.rubric is not None
    assert (found.labels("pointwise").lead, found.labels("pointwise").all) == ("Grade:", (" low", " high"))
    assert found.rubric.values == (1.0, 3.0)
    shown = found.rubric.shown
    assert shown == {
        "criterion": "Is it polite?",
        "grades": ["high: polite throughout"],
        "answers": ["Grade: low", "Grade: high"],
    }
    prompt = found.render("pointwise", question="Why?", reply="So.", **shown)
    assert "Is it polite?" in prompt
    assert "- high: polite throughout" in prompt
    assert 'Answer with one line that says "Grade: low", or "Grade: high".' in prompt
    assert "step by step" not in prompt
    assert "cut off" not in prompt
    other = found.render("pointwise", question="Why?", reply="So.", cut=True, reasoning=True, **shown)
    assert "The reply was cut off here" in other
    assert "step by step" in other


def test_every_rubric_of_the_repository_is_valid_and_its_prompts_can_be_told_apart() -> None:
    folders = sorted(path.parent for path in [*ROOT.glob("src/**/rubric.toml"), *ROOT.glob("recipes/**/rubric.toml")])
    assert {"src", "recipes"} == {folder.relative_to(ROOT).parts[0] for folder in folders}
    for folder in folders:
        rubric = loaded(folder=folder).rubric
        assert rubric is not None
        assert min(rubric.values) < max(rubric.values), folder


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("criterion = ", "is not valid TOML"),
        ("a = " + "[" * 5000, "is not valid TOML"),
        ("criterion = 'x'", "grades: Field required"),
        (SCALE[: SCALE.index('[[grades]]\nlabel = " high')], "grades: Tuple should have at least 2 items"),
        (SCALE.replace(" high", "LOW"), 'grades have the labels " low" and "LOW"; give each grade a different one'),
        (SCALE.replace(" high", " "), 'grades have the labels " low" and " "; give each grade a different one'),
        (SCALE.replace("value = 3", "value = 1"), "the grades low and high have the same value, 1; set different ones"),
        (SCALE.replace("value = 3", "value = nan"), "grades.1.value: Input should be a finite number"),
        (SCALE.replace("meaning", "meanin"), "unknown key grades.1.meanin; allowed: label, value, meaning"),
        (SCALE.replace("lead", "leed"), "unknown key leed; allowed: criterion, lead, grades"),
    ],
)
def test_a_file_that_is_no_rubric_says_why(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        with_rubric({}, str(path))
    assert str(caught.value).startswith(f"rubric {path}")
    assert said in str(caught.value)


def test_a_missing_file_is_refused_with_the_form_of_a_rubric(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml.*pass the path of a rubric, a \.toml file with criterion, lead and"):
        loaded(tmp_path / "nowhere.toml")


def test_a_template_that_hides_the_rubric_is_refused(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(OWN, tmp_path / "templates"))
    (folder / "pointwise.jinja").write_text("{{ question }} {{ reply }} {% for g in grades %}{{ g }}{% endfor %}")
    with pytest.raises(ModelError, match=r"pointwise\.jinja does not use the criterion"):
        loaded(folder=folder)
    (folder / RUBRIC).unlink()
    with pytest.raises(ModelError, match=r"lacks rubric\.toml; this configuration needs ask, grade, reply, pointwise, referee"):
        loaded(folder=folder)


def test_grades_that_a_tokenizer_cannot_tell_apart_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(SCALE.replace(" high", " lower"))
    with pytest.raises(ModelError, match=r'cannot distinguish the verdict labels " low", " lower"'):
        loaded(path)


def test_the_content_of_the_rubric_is_part_of_the_key_and_its_path_is_not(scale: Path, tmp_path: Path) -> None:
    own, first = stage_keys(config(), []), stage_keys(config(scale), [])
    elsewhere = Path(shutil.copy(scale, tmp_path / "same.toml"))
    assert stage_keys(config(elsewhere), []) == first
    scale.write_text(SCALE.replace("polite throughout", "polite at the end"))
    edited = stage_keys(config(scale), [])
    for one, other in ((own, first), (first, edited)):
        assert {name for name in one if one[name] == other[name]} == {"questions", "replies"}
    assert template_texts(OWN)[RUBRIC] == with_rubric(template_texts(OWN), "")[RUBRIC]


def test_a_run_folder_cannot_name_a_rubric_that_the_run_was_not_made_of(scale: Path, tmp_path: Path) -> None:
    run, chosen = tmp_path / "run", config(scale)
    made_of = file_fingerprints(chosen, [])
    refuse_other_files(run, made_of, chosen, lambda key: False)
    scale.write_text(SCALE.replace("polite", "short"))
    refuse_other_files(run, made_of, chosen, lambda key: key == "verdicts.pointwise.rubric")
    with pytest.raises(RunFolderError, match=r"sets verdicts\.pointwise\.rubric = .*scale\.toml, which is outside of the run"):
        refuse_other_files(run, made_of, chosen, lambda key: False)


def test_a_rubric_beside_a_recipe_is_found_from_anywhere(scale: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = scale.parent / "recipe.toml"
    recipe.write_text('[verdicts]\njudge = "pointwise"\n[verdicts.pointwise]\nrubric = "scale.toml"\n')
    monkeypatch.chdir("/")
    assert load_config(recipe, {}).verdicts.rubric == str(scale)


def test_errors_of_a_folder_and_of_a_file_have_their_class() -> None:
    for error in (ModelError, ConfigError):
        with pytest.raises(error) as caught:
            parse_rubric("x = 1", "here", error)
        assert isinstance(caught.value, InputError)
    assert isinstance(parse_rubric(SCALE, "here"), Rubric)
