"""The run folder: results on disk, their integrity and freshness, and the lock that excludes other processes."""

from selfeval.store.archive import OF_THE_RUN, Archive
from selfeval.store.fence import admit_writer, dismiss_writer
from selfeval.store.files import (
    as_storage_error,
    content_hash,
    file_hash,
    fingerprint,
    open_file,
    open_to_umask,
    read_json,
    read_object,
    write_file,
    write_json,
    writing,
)
from selfeval.store.joined import JoinedStore
from selfeval.store.ledger import (
    Changed,
    Damaged,
    Expected,
    Fresh,
    Ledger,
    Missing,
    Output,
    State,
    check_files,
    has_manifest,
)
from selfeval.store.metrics import read_metrics
from selfeval.store.own_files import code_of, is_own
from selfeval.store.progress import PROGRESS, Progress, read_progress, remove_progress, write_progress
from selfeval.store.records import read_rows
from selfeval.store.run_file import RUN_SCHEMA, read_run
from selfeval.store.run_lock import is_locked
from selfeval.store.run_store import RunStore
from selfeval.store.sealed import read_sealed, write_sealed

__all__ = [
    "OF_THE_RUN",
    "PROGRESS",
    "RUN_SCHEMA",
    "Archive",
    "Changed",
    "Damaged",
    "Expected",
    "Fresh",
    "JoinedStore",
    "Ledger",
    "Missing",
    "Output",
    "Progress",
    "RunStore",
    "State",
    "admit_writer",
    "as_storage_error",
    "check_files",
    "code_of",
    "content_hash",
    "dismiss_writer",
    "file_hash",
    "fingerprint",
    "has_manifest",
    "is_locked",
    "is_own",
    "open_file",
    "open_to_umask",
    "read_json",
    "read_metrics",
    "read_object",
    "read_progress",
    "read_rows",
    "read_run",
    "read_sealed",
    "remove_progress",
    "write_file",
    "write_json",
    "write_progress",
    "write_sealed",
    "writing",
]
