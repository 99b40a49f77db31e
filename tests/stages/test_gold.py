from __future__ import annotations

import json
import logging
import platform
import re
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from selfeval.config import RunConfig
from selfeval.errors import ConfigError, DataError
from selfeval.execution.sandbox import Reason, check_sandbox
from selfeval.execution.tasks import code_task, syntax_error
from selfeval.report.schema import UnitTests
from selfeval.stages import gold as module
from selfeval.stages.evaluation import _unit_tests
from selfeval.stages.given import read_given
from selfeval.stages.gold import FileGold, ask_ahead, check_gold, count_outcomes, gold_key, load_gold
from shared_data import shared_lines


def _config(domain: str | None = None, gold: str = "", **settings: Any) -> RunConfig:
    return RunConfig(domain=domain, gold=gold, **settings)


def test_the_embedded_domain_is_found_by_its_name() -> None:
    gold = load_gold(_config("word-problems"))
    assert gold is not None
    assert gold.name == "word-problems"
    question = "Ben has 18 eggs. He buys 11 more and gives 10 to Mia. How many eggs does Ben have now?"
    assert gold.is_right(question, "18 + 11 = 29. 29 - 10 = 19. The answer is 19") is True
    assert gold.is_right(question, "The answer is 18") is False
    assert gold.is_right("What is love?", "The answer is 19") is None


def test_no_domain_is_no_gold() -> None:
    assert load_gold(_config(None)) is None


def test_an_unknown_domain_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match='domain "word-problem" is not installed; did you mean "word-problems"'):
        load_gold(_config("word-problem"))


class Coin:
    """A gold domain as another package would provide it."""

    name = "coin"

    def is_right(self, question: str, reply: str) -> bool | None:
        return reply == "heads" if question == "coin" else None


def test_any_package_can_bring_a_domain(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("coin", "somewhere:Coin", "selfeval.domains")
    monkeypatch.setattr(EntryPoint, "load", lambda self: Coin)

    def installed(group: str) -> list[EntryPoint]:
        return [point] if group == "selfeval.domains" else []

    monkeypatch.setattr(module, "entry_points", installed)
    gold = load_gold(_config("coin"))
    assert gold is not None
    assert (gold.is_right("coin", "heads"), gold.is_right("coin", "tails"), gold.is_right("x", "heads")) == (True, False, None)


# -- files --------------------------------------------------------------------------------------------------------------


def _gold(folder: Path, *rows: Any) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "gold.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_file_of_answers_knows_its_questions_only(tmp_path: Path) -> None:
    gold = FileGold(
        _gold(tmp_path, {"question": "What is 2 + 3?", "answer": 5}, {"prompt": "Capital?", "answer": ["Rome", "Roma"]})
    )
    assert gold.is_right("What is  2 + 3?\n", "2 + 3 = 5. The answer is 5") is True
    assert gold.is_right("What is 2 + 3?", "The answer is 6") is False
    assert gold.is_right("Capital?", "roma") is True
    assert gold.is_right("What is 2 + 4?", "6") is None


def test_a_file_of_labels_knows_its_replies_only(tmp_path: Path) -> None:
    rows = [{"question": "Why?", "reply": "So.", "label": True}, {"question": "Why?", "reply": "No.", "label": 0}]
    gold = FileGold(_gold(tmp_path, *rows))
    assert (gold.is_right("Why?", "So."), gold.is_right("Why?", "No."), gold.is_right("Why?", "Perhaps.")) == (
        True,
        False,
        None,
    )


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"answer": 5}, 'line 2: missing or empty "question"'),
        ({"question": "Why?"}, 'line 2: expected an "answer", a "reply" with a "label" of true or false, or "tests"'),
        ({"question": "Why?", "reply": "So.", "label": "yes"}, 'line 2: expected an "answer", a "reply" with a "label"'),
        ({"question": "Why?", "reply": "So.", "label": 2}, 'line 2: expected an "answer", a "reply" with a "label"'),
        ({"question": "Why?", "answer": []}, 'line 2: "answer" must be a string, a number or a list of them'),
        ({"question": "Why?", "answer": True}, 'line 2: "answer" must be a string, a number or a list of them'),
        ({"question": " What is 2 + 3? ", "answer": 6}, "line 2: an earlier line has a different answer to the same question"),
    ],
)
def test_a_line_without_gold_is_named(tmp_path: Path, row: Any, said: str) -> None:
    path = _gold(tmp_path, {"question": "What is 2 + 3?", "answer": 5}, row)
    with pytest.raises(DataError, match=re.escape(f"{path}, {said}")):
        FileGold(path)


def test_gold_that_could_not_be_asked_is_refused_early(tmp_path: Path) -> None:
    path = str(_gold(tmp_path, {"question": "What is 2 + 3?", "answer": 5}))
    check_gold(_config(None, path), ["What is 2 + 3?"])
    with pytest.raises(ConfigError, match="are both set; remove one"):
        check_gold(_config("word-problems", path), ["What is 2 + 3?"])
    with pytest.raises(
        ConfigError, match=r"the model would generate new ones; also set questions\.file, replies\.file or pairs\.file"
    ):
        check_gold(_config(None, path), None)
    with pytest.raises(DataError, match="contains none of this run's 1 test questions"):
        check_gold(_config(None, path), ["What is 9 + 9?"])
    with pytest.raises(ConfigError, match="is not installed"):
        check_gold(_config("word-problem", ""), None)


@pytest.mark.parametrize(
    ("said", "understood"), [(1, True), (np.False_, False), (None, None), (0.5, ConfigError), ("no", ConfigError)]
)
def test_an_answer_is_yes_no_or_unknown(said: object, understood: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Odd:
        name = "odd"

        def is_right(self, question: str, reply: str) -> object:
            return said

    monkeypatch.setattr(EntryPoint, "load", lambda self: Odd)
    monkeypatch.setattr(module, "entry_points", lambda group: [EntryPoint("odd", "somewhere:Odd", "selfeval.domains")])
    gold = load_gold(_config("odd"))
    assert gold is not None
    if understood is ConfigError:
        with pytest.raises(ConfigError, match=r'domain "odd" returned .*; its is_right must return True, False, or None'):
            gold.is_right("x", "y")
    else:
        assert gold.is_right("x", "y") is understood


def test_answers_in_a_file_of_questions_are_gold(tmp_path: Path) -> None:
    rows = ({"question": "What is 2 + 3?", "answer": 5}, {"question": "Why?"}, {"question": "How?", "answer": None})
    path = str(_gold(tmp_path, *rows))
    config = _config(questions={"file": path})
    check_gold(config, ["Why?"])
    gold = load_gold(config)
    assert gold is not None
    assert [gold.is_right(row["question"], "The answer is 5") for row in rows] == [True, None, None]
    assert gold_key(config) == gold_key(_config(gold=path))
    other = str(_gold(tmp_path / "other", {"question": "What is 2 + 3?", "answer": 6}))
    own = load_gold(_config(gold=other, questions={"file": path}))
    assert own is not None
    assert own.is_right("What is 2 + 3?", "6"), "the gold file comes first"


def test_a_file_of_questions_without_answers_is_no_gold(tmp_path: Path) -> None:
    path = str(_gold(tmp_path, {"question": 'Is "answer" a word?'}))
    assert load_gold(_config(questions={"file": path})) is None
    assert gold_key(_config(questions={"file": path})) == ""


def test_a_wrong_answer_in_a_file_of_questions_is_refused_early(tmp_path: Path) -> None:
    path = str(_gold(tmp_path, {"question": "What is 2 + 3?", "answer": {"value": 5}}))
    with pytest.raises(DataError, match=r'line 1: "answer" must be a string, a number or a list'):
        check_gold(_config(questions={"file": path}), ["What is 2 + 3?"])


# -- unit tests ---------------------------------------------------------------------------------------------------------

TASK = {"question": "Write double(x).", "tests": ["assert double(2) == 4"]}
RIGHT, WRONG = "```python\ndef double(x): return 2 * x\n```", "```python\ndef double(x): return x\n```"


@pytest.fixture
def _sandbox() -> None:
    try:
        check_sandbox()
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.mark.usefixtures("_sandbox")
def test_the_code_of_a_reply_is_right_if_it_passes_the_tests(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = _gold(tmp_path, TASK, {"question": "What is 2 + 3?", "answer": 5})
    gold = FileGold(path, allow_code_execution=True)
    caplog.set_level(logging.DEBUG, logger="selfeval.stages.gold")
    replies = (RIGHT, WRONG, "", "```python\ndef double(x): return y\n```")
    assert [gold.is_right("Write  double(x).", reply) for reply in replies] == [True, False, False, False]
    assert [text.split(";")[0] for text in caplog.messages] == [
        "unit tests: passed ",
        "unit tests: failed AssertionError: ",
        "unit tests: no code ",
        "unit tests: error NameError: name 'y' is not defined",
    ]
    assert gold.is_right("What is 2 + 3?", "5") is True
    assert gold.is_right("Write triple(x).", RIGHT) is None
    assert gold.is_right("Write double(x).", WRONG) is False
    assert count_outcomes(gold) == {"passed": 1, "failed": 1, "no code": 1, "error": 1}, "each reply once"
    assert count_outcomes(FileGold(_gold(tmp_path, {"question": "What is 2 + 3?", "answer": 5}))) is None
    found = _unit_tests(gold)
    assert found == UnitTests(n=4, passed=1, failed=1, error=1, no_code=1)
    assert set(UnitTests.model_fields) == {"n", *(reason.replace(" ", "_") for reason in get_args(Reason))}


@pytest.mark.usefixtures("_sandbox")
def test_tests_that_were_run_ahead_are_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gold = FileGold(_gold(tmp_path, TASK), allow_code_execution=True)
    ask_ahead(gold, [(TASK["question"], RIGHT), (TASK["question"], WRONG), (TASK["question"], ""), ("Why?", "So.")])
    monkeypatch.setattr(module, "run_programs", lambda programs: [1 / 0] if programs else [])
    assert [gold.is_right(str(TASK["question"]), reply) for reply in (RIGHT, WRONG, "")] == [True, False, False]
    ask_ahead(None, [("Why?", "So.")])


def test_tests_are_refused_unless_the_command_allows_them(tmp_path: Path) -> None:
    path = str(_gold(tmp_path, TASK))
    for config in (_config(gold=path), _config(questions={"file": path})):
        questions = [str(TASK["question"])]
        with pytest.raises(ConfigError, match=rf"gold file {re.escape(path)} has unit tests.* pass --allow-code-execution"):
            check_gold(config, questions)
        with pytest.raises(ConfigError, match="--allow-code-execution"):
            load_gold(config)


@pytest.mark.usefixtures("_sandbox")
def test_tests_are_allowed_where_the_sandbox_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(_gold(tmp_path, TASK))
    questions = [str(TASK["question"])]
    check_gold(_config(gold=path), questions, allow_code_execution=True)
    assert isinstance(load_gold(_config(questions={"file": path}), allow_code_execution=True), FileGold)
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    for config in (_config(gold=path), _config(questions={"file": path})):
        with pytest.raises(ConfigError, match="code cannot be run in a sandbox here"):
            check_gold(config, questions, allow_code_execution=True)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question": "Why?", "tests": 3}, 'line 2: "tests" must be a list of strings with code'),
        ({"question": "Why?", "tests": ["assert f()"], "answer": "x"}, "line 2: the question has both an answer and tests"),
        ({**TASK, "tests": ["assert f()"]}, "line 2: an earlier line has different tests for the same question"),
        ({"tests": ["assert f()"]}, 'line 2: missing or empty "question"'),
    ],
)
def test_a_line_with_malformed_tests_is_named(tmp_path: Path, row: Any, said: str) -> None:
    path = _gold(tmp_path, TASK, row)
    with pytest.raises(DataError, match=re.escape(f"{path}, {said}")):
        FileGold(path, allow_code_execution=True)


def test_lines_of_mbpp_and_human_eval_are_questions_with_gold(tmp_path: Path) -> None:
    mbpp = {"text": "Double a number.", "test_list": ["assert double(2) == 4", "assert double(0) == 0"], "code": "x"}
    stub = 'def double(x):\n    """Return twice x."""\n'
    human_eval = {"prompt": stub, "entry_point": "double", "test": "def check(f):\n    assert f(2) == 4\n", "split": "test"}
    tasks = [{**mbpp, "text": f"{mbpp['text']} {topic}", "split": "train"} for topic in ("Apples", "Wages", "Songs", "Ideas")]
    path = str(_gold(tmp_path, human_eval, *tasks))
    given = read_given(_config(questions={"file": path, "near_duplicate": 1.0}))
    assert given is not None
    texts = [question.text for question in given.questions]
    shown = "Double a number. Apples\n\nThe code must pass this test:\nassert double(2) == 4"
    assert texts[:2] == [stub.strip(), shown]
    gold = FileGold(Path(path), partial=True, allow_code_execution=True)
    assert all(gold.knows(text) for text in texts)


@pytest.mark.usefixtures("_sandbox")
@pytest.mark.parametrize(
    "row",
    [
        {"question": "Write f.", "tests": ["assert f( == 1"]},
        {"question": "Write f.", "tests": ["assert f() == 1"], "setup": "import"},
        {"prompt": "class A:\n    def f(self):\n", "entry_point": "f", "test": "def check(f): pass"},
    ],
)
def test_tests_that_no_reply_can_pass_are_refused_early(tmp_path: Path, row: Any) -> None:
    path = str(_gold(tmp_path, TASK, row))
    said = rf"gold file {re.escape(path)} has tests that no reply can pass: \w+Error: .* \(entry of line 2, line \d\)"
    with pytest.raises(DataError, match=said):
        check_gold(_config(questions={"file": path}), [], allow_code_execution=True)


@pytest.mark.usefixtures("_sandbox")
def test_the_public_tasks_are_checked_in_seconds() -> None:
    rows = [*shared_lines("code/mbpp.jsonl.xz"), *shared_lines("code/HumanEval.jsonl.gz")]
    assert syntax_error({str(row["task_id"]): task for row in rows if (task := code_task(row))}) is None
