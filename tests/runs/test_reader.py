"""Reading a run folder without its lock: records that are present, not yet written, or damaged."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from selfeval.cli.showing import first_rows, layout
from selfeval.config import BackboneConfig, RunConfig
from selfeval.errors import InputError, RunFolderError
from selfeval.records import Pair, Question, ReferenceAnswer, Reply, Seed, Split
from selfeval.runs import reader as reading
from selfeval.runs.reader import KINDS, RunReader, backbone_config
from selfeval.store import RUN_SCHEMA, RunStore, write_json, write_sealed, writing


@pytest.fixture
def run(tmp_path: Path) -> RunReader:
    """A run that has started but written no record."""
    write_sealed(tmp_path / "run.json", {"status": "running", "config": RunConfig().model_dump(mode="json")})
    return RunReader(tmp_path)


@pytest.fixture
def store(run: RunReader) -> Any:
    """The process that works in the run."""
    held = RunStore(run.folder)
    yield held
    held.close()


def _shard(run: RunReader, name: str, rows: list[dict[str, Any]]) -> Path:
    path = run.folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def _reply(question_id: str, number: int = 0) -> Reply:
    return Reply(f"{question_id}-{number}", question_id, "five", (5, 1), "sample", 1.0, 1.0, -0.5, True)


# -- rows, as `selfeval show` prints them --------------------------------------------------------------------------------


def test_the_first_records_are_shown_in_order(run: RunReader) -> None:
    _shard(run, "pairs/train/shard-00001.jsonl", [{"n": 3}])
    _shard(run, "pairs/train/shard-00000.jsonl", [{"n": 1}, {"n": 2, "text": "a\u2028b"}])
    assert first_rows(run, "pairs", 2) == [{"n": 1}, {"n": 2, "text": "a\u2028b"}]
    assert [row["n"] for row in first_rows(run, "pairs", 9)] == [1, 2, 3]


def test_dropped_records_come_from_every_stage(run: RunReader) -> None:
    _shard(run, "dropped/verdicts/shard-00000.jsonl", [{"stage": "verdicts", "reason": "tie"}] * 3)
    _shard(run, "dropped/questions/shard-00000.jsonl", [{"stage": "questions", "reason": "too_short"}])
    assert [row["reason"] for row in first_rows(run, "dropped", 2)] == ["too_short", "tie", "tie"]


def test_reading_takes_no_lock_and_writes_nothing(run: RunReader, store: RunStore) -> None:
    _shard(run, "pairs/train/shard-00000.jsonl", [{"n": 1}])
    before = sorted(p.name for p in run.folder.rglob("*"))
    assert len(list(RunReader(run.folder).rows("pairs"))) == 1
    assert sorted(p.name for p in run.folder.rglob("*")) == before


def test_an_unknown_kind_suggests_the_nearest(run: RunReader) -> None:
    with pytest.raises(RunFolderError, match='no records "verdict"; did you mean "verdicts"'):
        run.records("verdict")


NOUNS = {
    "reference_answers": "reference answers",
    "sampled": "sampled replies",
    "scored": "scored pairs",
    "compared": "compared replies",
    "dropped": "dropped records",
}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "labels"])
def test_a_kind_that_is_not_written_yet_says_so(run: RunReader, kind: str) -> None:
    with pytest.raises(RunFolderError, match=rf"has no {NOUNS.get(kind, kind)} yet: the stage \w+ has not written any"):
        run.records(kind)


def test_nobody_has_to_label(run: RunReader) -> None:
    assert run.records("labels") == []


def test_a_label_that_was_cut_off_is_not_read(run: RunReader) -> None:
    path = _shard(run, "labels.jsonl", [{"question_id": "q0"}])
    path.write_text(path.read_text() + '{"question_id": "q')
    assert [row["question_id"] for row in run.rows("labels")] == ["q0"]
    path.write_text('{"question_id": "q\n' + path.read_text())
    with pytest.raises(RunFolderError, match=r"labels\.jsonl, line 1 is damaged .* restore the file from a backup"):
        list(run.rows("labels"))


def test_a_finished_stage_that_wrote_none_has_none(run: RunReader, store: RunStore) -> None:
    store.begin("replies", "key")
    store.write_shard("replies", 0, [_reply("q0")])
    store.finish("replies", "key", {})
    assert run.is_finished("replies")
    assert run.records("reference_answers") == [], "no grade template shows one"


@pytest.mark.parametrize("damage", ['{"n": ', "3"])
def test_a_damaged_record_names_file_and_line(run: RunReader, damage: str) -> None:
    path = _shard(run, "pairs/train/shard-00000.jsonl", [{"n": 1}])
    path.write_text(path.read_text() + damage + "\n")
    with pytest.raises(RunFolderError, match=r"shard-00000\.jsonl, line 2 is damaged"):
        list(run.rows("pairs"))


def test_training_pairs_come_before_held_out_ones(run: RunReader) -> None:
    _shard(run, "pairs/test/shard-00000.jsonl", [{"split": "test"}])
    _shard(run, "pairs/train/shard-00000.jsonl", [{"split": "train"}])
    assert [row["split"] for row in run.rows("pairs")] == ["train", "test"]
    assert [row["split"] for row in run.rows("pairs", split="test")] == ["test"]


def test_a_record_has_a_line_for_each_field_and_long_lists_are_cut() -> None:
    row = {"text": "a\u009b2J\u2028b", "ids": list(range(20)), "short": [1, 2], "words": ["x"] * 20}
    lines = layout(row).splitlines()
    assert lines[0] == "{"
    assert lines[1] == r'  "text": "a\u009b2J\u2028b",'
    assert lines[2] == f'  "ids": {json.dumps([*range(16), "... 20 in all"])},'
    assert lines[3] == '  "short": [1, 2],'
    shown = json.loads(layout(row))
    assert shown["text"] == row["text"]
    assert shown["words"] == row["words"]


# -- records ------------------------------------------------------------------------------------------------------------


def test_records_are_what_the_stages_wrote(run: RunReader, store: RunStore) -> None:
    seeds = [Seed("How many?", None, {"level": 3, "of": ["a", None]})]
    store.write_records("seeds.jsonl", seeds)
    pair = Pair("q0", "How many?", "five", "six", 0.9, (5, 1), (6, 1), Split.TEST)
    store.write_shard("pairs/test", 0, [pair])
    assert run.records("seeds") == seeds
    assert run.records("pairs") == [pair]


def test_records_that_name_a_question_follow_its_split(run: RunReader, store: RunStore) -> None:
    splits = {"q0": Split.TRAIN, "q1": Split.TEST, "q2": Split.TRAIN}
    store.write_shard("questions", 0, [Question(name, f"{name}?", split, "self") for name, split in splits.items()])
    store.write_shard("replies", 0, [_reply(name, number) for name in splits for number in range(2)])
    store.write_shard("reference_answers", 0, [ReferenceAnswer(name, "five") for name in splits])
    assert [q.id for q in run.records("questions", split="test")] == ["q1"]
    assert [r.id for r in run.records("replies", split=Split.TRAIN)] == ["q0-0", "q0-1", "q2-0", "q2-1"]
    assert [w.question_id for w in run.records("reference_answers", split="test")] == ["q1"]


def test_a_split_that_there_is_not(run: RunReader, store: RunStore) -> None:
    store.write_records("seeds.jsonl", [Seed("Why?")])
    with pytest.raises(InputError, match='no split "tset"; did you mean "test"'):
        run.records("seeds", split="tset")  # type: ignore[arg-type]
    with pytest.raises(InputError, match='records "seeds" have no split'):
        run.records("seeds", split="test")


def test_a_changed_shard_of_a_finished_stage_is_refused(run: RunReader, store: RunStore) -> None:
    store.begin("replies", "key")
    store.write_shard("replies", 0, [_reply("q0")])
    store.finish("replies", "key", {})
    assert len(run.records("replies")) == 1
    _shard(run, "replies/shard-00000.jsonl", [{"id": "other"}])
    with pytest.raises(RunFolderError, match=r"shard-00000\.jsonl is damaged: its content does not match its recorded hash"):
        run.records("replies")


# -- while the run is in progress ---------------------------------------------------------------------------------------


def test_a_reader_never_sees_part_of_a_shard(run: RunReader, store: RunStore) -> None:
    """Another thread writes shards of 200 replies while this one reads: every shard is there whole, or not at all."""
    size, written, stop = 200, 30, threading.Event()

    def write() -> None:
        for shard in range(written):
            store.write_shard("replies", shard, [_reply(f"q{shard}", number) for number in range(size)])
        stop.set()

    store.write_shard("replies", 0, [_reply("q0", number) for number in range(size)])
    thread = threading.Thread(target=write)
    thread.start()
    seen = []
    while not stop.is_set():
        seen.append(len(list(run.rows("replies"))))
    thread.join()
    assert all(count % size == 0 for count in seen), seen
    assert len(run.records("replies")) == size * written
    assert seen == sorted(seen)
    assert seen, "it read while the other wrote"


def test_a_shard_that_is_being_written_is_not_seen(run: RunReader, store: RunStore) -> None:
    store.write_shard("replies", 0, [_reply("q0", number) for number in range(3)])
    text = (run.folder / "replies" / "shard-00000.jsonl").read_text()
    with writing(run.folder / "replies" / "shard-00001.jsonl") as part:
        part.write_text(text[: len(text) // 2])  # ends in the middle of a record
        assert len(run.records("replies")) == 3
        part.write_text(text)
    assert len(run.records("replies")) == 6


def test_a_file_that_is_replaced_while_it_is_read_is_read_again(run: RunReader, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(run.folder / "report.json", {"schema": 1})
    real, calls = reading.check_files, []

    def first_call_fails(root: Path, paths: Any) -> None:
        calls.append(paths)
        if len(calls) == 1:
            raise RunFolderError("report.json is damaged")
        real(root, paths)

    monkeypatch.setattr(reading, "check_files", first_call_fails)
    assert run.report() == {"schema": 1}
    assert len(calls) == 2


def test_shards_that_are_set_aside_while_they_are_read_are_named(run: RunReader) -> None:
    path = _shard(run, "pairs/train/shard-00000.jsonl", [{"n": 1}])
    later = _shard(run, "pairs/train/shard-00001.jsonl", [{"n": 2}])
    rows = run.rows("pairs")
    assert next(rows) == {"n": 1}
    later.unlink()
    with pytest.raises(RunFolderError, match=r"shard-00001\.jsonl was just set aside by a run with other settings"):
        next(rows)
    assert path.exists()


def test_a_link_that_leads_out_of_the_run_is_refused(run: RunReader, tmp_path: Path) -> None:
    secret = tmp_path.parent / "secret.jsonl"
    secret.write_text("{}\n")
    (run.folder / "questions").mkdir(exist_ok=True)
    (run.folder / "questions" / "shard-00009.jsonl").symlink_to(secret)
    with pytest.raises(RunFolderError, match=r"shard-00009\.jsonl is a link to .*secret\.jsonl, outside of"):
        RunReader(run.folder)


def test_a_link_that_a_tracker_made_is_no_reason_to_refuse_a_run(run: RunReader, tmp_path: Path) -> None:
    logs = run.folder / "trackers" / "wandb" / "run-1" / "logs"
    logs.mkdir(parents=True)
    (logs / "debug-core.log").symlink_to(tmp_path.parent / "debug-core.log")
    assert RunReader(run.folder).config == run.config
    RunStore(run.folder).close()
    (run.folder / "trackers" / "other").symlink_to(tmp_path.parent)
    with pytest.raises(RunFolderError, match=r"trackers/other is a link to"):
        RunStore(run.folder)


def test_a_run_that_is_just_starting_says_so(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    with pytest.raises(RunFolderError, match=r"has no run\.json yet; the run is just starting"):
        RunReader(tmp_path)
    write_sealed(tmp_path / "run.json", {"schema": RUN_SCHEMA, "status": "running"})
    with pytest.raises(RunFolderError, match="has no configuration yet; the run is just starting"):
        RunReader(tmp_path)


def test_the_report_and_the_metrics_of_a_run_in_progress(run: RunReader, store: RunStore) -> None:
    with pytest.raises(RunFolderError, match=r"has no report yet \(stages finished so far: none\)"):
        run.report()
    assert run.metrics("policy") == []
    store.record_stage("questions", state="finished", seconds=1.0, counts={})
    store.add_metrics("policy", {"step": 1, "reward": 0.5})
    with (run.folder / "metrics" / "policy.jsonl").open("a") as file:
        file.write('{"step": 2, "rew')  # as it stands while the other process appends to it
    assert run.metrics("policy") == [{"step": 1, "reward": 0.5}]
    with pytest.raises(RunFolderError, match=r"stages finished so far: questions\)"):
        run.report()


# -- rounds and precision -----------------------------------------------------------------------------------------------


def test_rounds_that_have_begun(run: RunReader) -> None:
    for number in (2, 3):
        values = {"round": number, "status": "running", "config": RunConfig().model_dump(mode="json")}
        write_sealed(run.folder / "rounds" / f"{number:02d}" / "run.json", values)
    assert [reader.round for reader in run.rounds] == [1, 2, 3]
    assert [reader.folder.name for reader in run.rounds[1:]] == ["02", "03"]
    assert [reader.round for reader in run.rounds[1].rounds] == [2]


def test_the_precision_of_a_run_is_kept() -> None:
    device = {"model": "m", "asked": "auto", "precision": "bf16"}
    assert backbone_config(RunConfig(model="m"), {"device": device}).precision == "bf16"
    assert backbone_config(RunConfig(model="n"), {"device": device}).precision == "auto"
    assert (
        backbone_config(RunConfig(model="m", backbone=BackboneConfig(precision="fp32")), {"device": device}).precision == "fp32"
    )
    assert backbone_config(RunConfig(model="m"), {}).precision == "auto"
