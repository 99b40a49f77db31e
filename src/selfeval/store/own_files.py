"""Files that this user wrote: a code that nobody else can compute (HMAC, RFC 2104, https://www.rfc-editor.org/rfc/rfc2104).

A forged file can exploit a library that parses it. A hash in the folder shows damage only, because it can be forged too. The
code needs a key that is outside of the folder, in the user's state directory.
"""

from __future__ import annotations

import hmac
import os
import secrets
from pathlib import Path
from tempfile import NamedTemporaryFile

from selfeval.store.files import as_storage_error

__all__ = ["code_of", "is_own"]

_BYTES = 32


def code_of(digest: str) -> str:
    """Return the code of a file, as hex.

    Args:
        digest: hash of its content.

    Raises:
        StorageError: there is no key yet, and it cannot be written.
    """
    path = _key_path()
    try:
        key = _read(path) or _created(path)
    except OSError as error:
        raise as_storage_error(path, error) from error
    return hmac.new(key, digest.encode(), "sha256").hexdigest()


def is_own(digest: str, code: object) -> bool:
    """Return whether this user wrote a file.

    Args:
        digest: hash of its content.
        code: its code, from a file that anybody may have written.
    """
    try:
        key = _read(_key_path())
    except OSError:
        return False
    if key is None or not isinstance(code, str):
        return False
    return hmac.compare_digest(hmac.new(key, digest.encode(), "sha256").hexdigest().encode(), code.encode("utf-8", "replace"))


def _key_path() -> Path:
    """Return the path of the key (XDG base directories: https://specifications.freedesktop.org/basedir-spec)."""
    given = Path(os.environ.get("XDG_STATE_HOME", ""))
    # The specification ignores a relative path.
    base = given if given.is_absolute() else Path(os.path.expanduser("~")) / ".local" / "state"
    return base / "selfeval" / "own_files.key"


def _read(path: Path) -> bytes | None:
    try:
        found = path.read_bytes()
    except FileNotFoundError:
        return None
    return found if len(found) == _BYTES else None


def _created(path: Path) -> bytes:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # A temporary file is readable by its owner only.
    with NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(secrets.token_bytes(_BYTES))
        file.flush()
        os.fsync(file.fileno())
    try:
        if path.exists() and _read(path) is None:
            os.replace(file.name, path)  # damaged
        else:
            os.link(file.name, path)  # fails if another process was faster, whose key is then used
    except FileExistsError:
        pass
    finally:
        Path(file.name).unlink(missing_ok=True)
    found = _read(path)
    if found is None:
        raise OSError(f"{path} cannot be read after it was written")
    return found
