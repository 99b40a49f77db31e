"""The reward function refuses a folder that it cannot score with, before it reads a tokenizer or weights."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from selfeval.runs import reward
from selfeval.runs.reward import Evaluator

FACTS: dict[str, Any] = {
    "role": "evaluator-0", "layout": "classifier", "precision": "fp32", "positions": None, "bias": 0.5,
    "reference_answer": False, "reply_prompt": None, "control": ["</s>"], "end": [2], "thinking_ends": [],
    "max_new_tokens": 96,
}  # fmt: skip


def exported(folder: Path, facts: Any) -> Path:
    (folder / "export.json").write_text(facts if isinstance(facts, str) else json.dumps(facts))
    return folder


@pytest.mark.parametrize("missing", sorted(FACTS))
def test_an_export_of_another_version_is_one_message_with_the_remedy(tmp_path: Path, missing: str) -> None:
    folder = exported(tmp_path, {name: value for name, value in FACTS.items() if name != missing})
    remedy = r"another version .* wrote it; use the reward\.py in that folder, .* selfeval export DIR --role evaluator --to OUT"
    with pytest.raises(ValueError, match=rf'export\.json has no "{missing}": {remedy}'):
        Evaluator(folder)


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ("{", r"export\.json is not JSON"),
        ("[]", r"export\.json is not a JSON object"),
        ({**FACTS, "control": "</s>"}, r'"control" is "</s>", expected an array'),
        ({**FACTS, "max_new_tokens": True}, r'"max_new_tokens" is true, expected a whole number'),
        ({**FACTS, "bias": None, "role": "policy"}, r"the role policy, which scores no replies"),
    ],
)  # fmt: skip
def test_a_damaged_export_and_another_role_are_one_message(tmp_path: Path, facts: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Evaluator(exported(tmp_path, facts))


def test_a_folder_that_is_no_export_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no export\.json; pass a folder written by `selfeval export`"):
        Evaluator(tmp_path)


def test_every_fact_that_is_read_is_checked() -> None:
    source = Path(reward.__file__).read_text(encoding="utf-8")
    assert set(re.findall(r'facts\["(\w+)"\]', source)) == set(reward._FACTS) == set(FACTS)
