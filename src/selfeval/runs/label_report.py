"""Labels of people in the report of a run, which follow labels.jsonl without a model."""

from __future__ import annotations

from pathlib import Path

from selfeval.labelling.label_file import LabelFile
from selfeval.report.labels import has_other_gold, human_labels, with_labels
from selfeval.report.reading import read_report
from selfeval.report.schema import HumanLabels, Report
from selfeval.runs.labelling import LabelTask
from selfeval.store import RunStore

__all__ = ["labels_of_run", "save_threshold", "update_labels"]


def labels_of_run(folder: Path, *, has_gold: bool) -> HumanLabels | None:
    """Return the figures from the labels of a run; None if nobody has labelled it.

    Args:
        folder: folder of the run, or of one of its rounds, with a finished evaluation stage.
        has_gold: the run has other gold.

    Raises:
        RunFolderError: the file of labels or a record is damaged.
    """
    if not LabelFile(folder).read():
        return None
    task = LabelTask(folder)
    agreement = task.agreement()
    is_gold = not has_gold and agreement.decided > 0
    return human_labels(agreement, task.threshold(), for_training=task.count_for_training(), gold=is_gold)


def save_threshold(folder: Path) -> None:
    """Write the threshold that the labels give for the evaluator of a run as it is now; nothing without labels.

    Raises:
        StorageError: the file cannot be written.
    """
    if LabelFile(folder).read():
        LabelTask(folder).save_threshold()


def update_labels(folder: Path) -> bool:
    """Bring the labels in report.json and the evaluator's threshold up to date with labels.jsonl; return whether they changed.

    Raises:
        InputError: the report is missing or damaged.
        RunFolderError: another process is using the run.
        StorageError: a file cannot be written.
    """
    report = read_report(folder / "report.json")
    updated = with_labels(report, labels_of_run(folder, has_gold=has_other_gold(report)))
    save_threshold(folder)
    # Compared as it is written: figures that were read are rounded.
    if updated.as_json() == report.as_json():
        return False
    _write(folder, updated)
    return True


def _write(folder: Path, report: Report) -> None:
    store = RunStore(folder)
    try:
        manifest = store.manifest("report")
        # Without its manifest, a report that was replaced just before a kill is written again instead of refused.
        store.reopen("report")
        store.write_json(folder / "report.json", report.as_json())
        outputs, also = ([folder / name for name in manifest[part]] for part in ("files", "also"))
        store.finish("report", manifest["key"], manifest["counts"], outputs, manifest["inputs"], also)
    finally:
        store.close()
