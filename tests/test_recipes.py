"""Every recipe with a tiny chat model: its plan, and a run to its replies, with templates and gold checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import bigram_chat
import selfeval
from selfeval.cli.app import app
from selfeval.config import load_config
from selfeval.errors import ConfigError, DataError
from selfeval.execution.sandbox import check_sandbox
from slow import slow

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
OWN_MODEL = ("chinese-mathematics", "code", "instruct", "mathematics", "own-model", "small-model", "writing")
"""Recipes that name a model of the Hub."""

_THINGS = ("apples", "letters", "stamps", "candles", "bottles", "pencils", "marbles", "tickets", "lemons", "buttons")
_CHINESE = ("苹果", "信", "邮票", "蜡烛", "瓶子", "铅笔", "弹珠", "车票", "柠檬", "扣子")
FILES: dict[str, list[dict[str, Any]]] = {
    "mathematics": [
        {"question": f"Ann has {n} {thing} and buys 3 more. How many does she have?", "answer": f"#### {n + 3}"}
        for n, thing in enumerate(_THINGS, 11)
    ],
    "small-model": [
        {"question": f"Ann has {n} {thing} and buys 3 more. How many has she?"} for n, thing in enumerate(_THINGS, 11)
    ],
    "chinese-mathematics": [
        {"question": f"小明有{n}个{thing}，又买了3个，现在有几个？", "answer": str(n + 3)}
        for n, thing in enumerate(_CHINESE, 11)
    ],
    "code": [
        {"text": f"Write a function to count {thing}.", "test_list": [f"assert count_{thing}('{thing}') == 1"], "code": ""}
        for thing in _THINGS
    ],
}
"""Examples of the files that a recipe needs from its user."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    files = [RECIPES / name for name in ("example-seeds.jsonl", "support-seeds.jsonl", "writing-seeds.jsonl")]
    texts = [json.loads(line)["question"] for file in files for line in file.read_text("utf-8").splitlines()]
    return bigram_chat.write(tmp_path_factory.mktemp("model") / "bigrams", texts)


def test_every_recipe_is_here() -> None:
    assert {path.stem for path in RECIPES.glob("*.toml")} == {*OWN_MODEL, "embedded", "toy"}


@pytest.mark.parametrize("name", OWN_MODEL)
def test_a_recipe_runs_to_its_replies(name: str, model: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "questions": {"train": 6, "test": 3, "shard": 16},
        "replies": {"max_new_tokens": 8},
        "backbone": {"precision": "fp32"},
    }
    if name in FILES:
        file = tmp_path / "questions.jsonl"
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in FILES[name]), encoding="utf-8")
        settings["questions"]["file"] = str(file)
    if name == "code":
        _skip_without_sandbox()
        with pytest.raises(ConfigError, match="--allow-code-execution"):
            _run(name, model, tmp_path, settings)
    run = _run(name, model, tmp_path, settings, allow_code_execution=name == "code")
    questions = run.records("questions")
    if name in FILES:
        assert len(questions) == len(FILES[name])
    else:
        assert len(questions) == 9
        assert {question.source for question in questions} == {"self"}
    assert {reply.question_id for reply in run.records("replies")} == {question.id for question in questions}


def _skip_without_sandbox() -> None:
    try:
        check_sandbox()
    except ConfigError as error:
        pytest.skip(str(error))


def _run(name: str, model: Path, folder: Path, settings: dict[str, Any], **options: bool) -> selfeval.Run:
    recipe = RECIPES / f"{name}.toml"
    options |= {"progress": False}
    return selfeval.run(recipe, model=str(model), output=folder / "run", until="replies", **options, **settings)


@pytest.mark.parametrize("name", FILES)
def test_a_recipe_without_its_file_says_so(name: str, model: Path, tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.jsonl")
    with pytest.raises(DataError, match=r"questions\.file .*missing\.jsonl does not exist"):
        _run(name, model, tmp_path, {"questions": {"file": missing}}, allow_code_execution=True)


@pytest.mark.parametrize("name", [*OWN_MODEL[:2], *map(slow, OWN_MODEL[2:])])
def test_a_recipe_is_planned(name: str, model: Path) -> None:
    small = ("replies.max_new_tokens=32", "verdicts.max_new_tokens=32", "backbone.precision=fp32")
    options = [part for setting in small for part in ("--set", setting)]
    done = CliRunner().invoke(app, ["plan", str(RECIPES / f"{name}.toml"), "--model", str(model), *options])
    assert done.exit_code == 0, done.output


def test_the_table_of_recipes_is_complete() -> None:
    page = (RECIPES / "README.md").read_text(encoding="utf-8")
    for path in RECIPES.glob("*.toml"):
        assert f"[{path.name}]({path.name})" in page


@pytest.mark.parametrize("name", OWN_MODEL)
def test_a_recipe_states_what_it_needs_and_what_to_expect(name: str) -> None:
    text = (RECIPES / f"{name}.toml").read_text(encoding="utf-8")
    for fact in ("# hardware:", "# minutes:", "# numbers:"):
        assert fact in text
    config = load_config(RECIPES / f"{name}.toml", {})
    assert not config.templates or (Path(config.templates) / "templates.toml").is_file()


@pytest.mark.parametrize("name", ["judge", "referee"])
def test_the_judges_of_a_recipe_are_informed_of_replies_that_were_cut_off(name: str) -> None:
    texts = [path.read_text(encoding="utf-8") for path in RECIPES.glob(f"templates/*/{name}.jinja")]
    assert texts
    for text in texts:
        assert "{{ first }}{% if first_cut %}\n\n" in text
        assert "{{ second }}{% if second_cut %}\n\n" in text
