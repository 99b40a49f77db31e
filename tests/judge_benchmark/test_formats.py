"""The formats of public data sets: real files where they are present, and one message for a damaged row."""

from __future__ import annotations

import gzip
import json
import lzma
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from selfeval.errors import DataError, InputError
from selfeval.judge_benchmark.formats import FORMATS, read_data
from selfeval.judge_benchmark.pairs import LabelledPair, in_random_order, merged, sampled
from shared_data import FOLDER

TURN = [{"role": "user", "content": "Q1"}, {"role": "assistant", "content": "one"}]
MORE = [*TURN, {"role": "user", "content": "Q2"}, {"role": "assistant", "content": "two"}]
OTHER = [MORE[0], {"role": "assistant", "content": "eins"}, MORE[2], {"role": "assistant", "content": "zwei"}]
SOLVED = {"is_correct": True, "solution": "It is 4."}
WRONG = {"is_correct": False, "solution": "It is 5."}
ROWS: dict[str, dict[str, Any]] = {
    "llmbar": {"input": "Q", "output_1": "a", "output_2": "b", "label": 2},
    "pandalm": {
        "cmp_key": "x_y", "instruction": "Do", "input": "this", "response1": "a", "response2": "",
        "annotator1": 1, "annotator2": 0, "annotator3": 1,
    },
    "mtbench": {"conversation_a": MORE, "conversation_b": OTHER, "turn": 2, "winner": "model_b"},
    "rewardbench": {"prompt": "Q", "chosen": "a", "rejected": "b", "subset": "math"},
    "judgebench": {"source": "mmlu", "question": "Q", "response_A": "a", "response_B": "b", "label": "B>A"},
    "gsm8k-solutions": {
        "question": "2 + 2?", "6b_finetuning": SOLVED, "6b_verification": WRONG,
        "175b_finetuning": SOLVED, "175b_verification": WRONG,
    },
}  # fmt: skip


def written(folder: Path, rows: list[Any], name: str = "data.jsonl") -> Path:
    path = folder / name
    text = "".join(json.dumps(row) + "\n" for row in rows)
    data = {".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix, bytes)(text.encode())
    path.write_bytes(data)
    return path


def read(name: str, path: Path) -> list[LabelledPair]:
    return read_data(name, [path])


def test_every_format_reads_its_row(tmp_path: Path) -> None:
    found = {name: read(name, written(tmp_path, [row])) for name, row in ROWS.items()}
    assert found["llmbar"] == [LabelledPair("Q", "a", "b", ("second",), "data")]
    assert found["pandalm"] == [LabelledPair("Do\n\nthis", "a", "", ("first", "tie", "first"), "x_y")]
    assert found["mtbench"] == [LabelledPair("Q1\n\nQ2", "one\n\ntwo", "eins\n\nzwei", ("second",), "turn 2")]
    assert found["rewardbench"] == [in_random_order("Q", "a", "b", "math")]
    assert found["judgebench"] == [LabelledPair("Q", "a", "b", ("second",), "mmlu")]
    # Two right and two wrong solutions are four pairs.
    pairs = found["gsm8k-solutions"]
    assert len(pairs) == 4
    assert {pair.first if pair.label == "first" else pair.second for pair in pairs} == {"It is 4."}
    assert found.keys() == FORMATS.keys()


@pytest.mark.parametrize(("name", "field"), [(name, field) for name, row in ROWS.items() for field in row])
def test_a_damaged_field_is_named_with_file_and_row(name: str, field: str, tmp_path: Path) -> None:
    row = {**ROWS[name], field: 7}
    with pytest.raises(DataError, match=rf'data\.jsonl, line 2: field "{field}" must be .*got 7; a valid row is'):
        read(name, written(tmp_path, [ROWS[name], row]))
    del row[field]
    with pytest.raises(DataError, match=rf'data\.jsonl, line 2: field "{field}" must be .*got nothing'):
        read(name, written(tmp_path, [ROWS[name], row]))


@pytest.mark.parametrize("name", ["d.json", "d.jsonl.gz", "d.jsonl.xz"])
def test_lists_and_compressed_files_are_read(name: str, tmp_path: Path) -> None:
    rows = [ROWS["llmbar"], ROWS["llmbar"]]
    path = written(tmp_path, [rows] if name == "d.json" else rows, name)
    assert len(read("llmbar", path)) == 2
    path.write_bytes(b"{")
    with pytest.raises(DataError, match=r"d\.json"):
        read("llmbar", path)


def test_own_pairs_in_both_forms(tmp_path: Path) -> None:
    rows = [
        {"question": "Q", "chosen": "good", "rejected": "bad", "subset": "s"},
        {"question": "R", "first": "x", "second": "y", "label": "tie"},
        {"question": "R", "first": "y", "second": "x", "label": "first"},
        {"question": "S", "first": "x", "second": "y", "label": None},
    ]
    first, second, third = read_data(str(written(tmp_path, rows)))
    assert (first.label, first.subset) == ("first" if first.first == "good" else "second", "s")
    # Two people labelled the same pair, once in each order.
    assert second.labels == ("tie", "second")
    assert third.labels == ()
    with pytest.raises(DataError, match='field "label" must be one of "first", "second", "tie", got "A"'):
        read_data(str(written(tmp_path, [{**rows[1], "label": "A"}])))
    with pytest.raises(DataError, match='field "rejected" must be a text that is not empty, got ""'):
        read_data(str(written(tmp_path, [{**rows[0], "rejected": ""}])))
    # The model of a run may have written nothing, and judge-check --write writes such pairs.
    assert read_data(str(written(tmp_path, [{**rows[1], "first": ""}])))[0].first == ""


def test_files_and_names_are_checked(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--data llmbar needs its file, because nothing is downloaded: pass --file PATH"):
        read_data("llmbar")
    with pytest.raises(InputError, match='no data set and no file "llmbra"; did you mean "llmbar"'):
        read_data("llmbra")
    own = written(tmp_path, [{"question": "Q", "chosen": "a", "rejected": "b"}])
    with pytest.raises(InputError, match="remove --file"):
        read_data(str(own), [own])
    with pytest.raises(DataError, match="has no file of llmbar"):
        read("llmbar", tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        read("llmbar", tmp_path / "no.json.xz")
    (tmp_path / "empty.json").write_text("[]")
    with pytest.raises(DataError, match="has no rows"):
        read("llmbar", tmp_path / "empty.json")


def test_the_published_folders_name_the_subsets(tmp_path: Path) -> None:
    for folder in ("Natural", "Adversarial/GPTInst"):
        (tmp_path / folder).mkdir(parents=True)
        written(tmp_path / folder, [[ROWS["llmbar"]]], "dataset.json")
    assert [pair.subset for pair in read("llmbar", tmp_path)] == ["Adversarial/GPTInst", "Natural"]


def test_chosen_is_shown_first_in_about_half_of_the_pairs() -> None:
    pairs = [in_random_order(f"Q{number}", "good", "bad") for number in range(400)]
    # Within four standard deviations of 200.
    assert 160 < sum(pair.label == "first" for pair in pairs) < 240
    assert all((pair.first if pair.label == "first" else pair.second) == "good" for pair in pairs)


def test_a_sample_is_reproducible_and_in_order() -> None:
    pairs = [LabelledPair(f"Q{number}", "a", "b", ("first",)) for number in range(50)]
    picked = sampled(pairs, 10, seed=1)
    assert picked == sampled(pairs, 10, seed=1) != sampled(pairs, 10, seed=2)
    assert picked == sorted(picked, key=pairs.index)
    assert sampled(pairs, 60, seed=1) == pairs


def test_labels_of_the_same_pair_are_merged_in_either_order() -> None:
    one, other = LabelledPair("Q", "a", "b", ("first",)), LabelledPair("Q", "b", "a", ("first",))
    assert merged([one, other, one]) == [LabelledPair("Q", "a", "b", ("first", "second", "first"))]


def test_the_real_files_are_read() -> None:
    if not FOLDER.is_dir():
        pytest.skip("the data sets are not here: shared/data beside the repository")
    llmbar = read("llmbar", FOLDER / "judge")
    assert Counter(pair.subset for pair in llmbar) == {
        "adversarial_gptinst": 92, "adversarial_gptout": 47, "adversarial_manual": 46, "adversarial_neighbor": 134,
        "natural": 100,
    }  # fmt: skip
    pandalm = read("pandalm", FOLDER / "judge")
    assert len(pandalm) == 999
    assert {len(pair.labels) for pair in pandalm} == {3}
    solutions = read("gsm8k-solutions", FOLDER / "math")
    assert {pair.label for pair in solutions} == {"first", "second"}
    assert len({pair.question for pair in solutions}) <= 1319 < len(solutions)
