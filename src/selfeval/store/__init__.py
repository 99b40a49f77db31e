"""The run folder: what is fresh, missing, changed or damaged, and the lock that keeps a second process out."""

from selfeval.store.files import content_hash, file_hash, fingerprint, read_json, write_json, writing
from selfeval.store.run_store import RunStore

__all__ = ["RunStore", "content_hash", "file_hash", "fingerprint", "read_json", "write_json", "writing"]
