"""A run folder or a URL, as a user names it, and the folder on this machine where the run is read and written.

A run is worked on in a local folder, because weights are memory-mapped, indexes are SQLite files and locks are the system's.
The working copy of a URL is in the cache, in a folder named by the hash of the URL, so its path follows from the URL alone.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from selfeval.errors import InputError
from selfeval.store.files import write_file

__all__ = ["CACHE_VARIABLE", "Home", "home_of", "is_url", "local_run", "run_path"]

CACHE_VARIABLE = "SELFEVAL_CACHE"
"""Environment variable with the folder of working copies. Default: `selfeval` in the user's cache folder."""

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
_ROUND = re.compile(r"/rounds/\d\d+$")
_URL_FILE = "url"
_COPY = "copy"


@dataclass(frozen=True)
class Home:
    """The URL of a run, and its places on this machine.

    Attributes:
        url: the URL, without a slash at its end.
        cache: folder with the working copy and everything that is known about it.
    """

    url: str
    cache: Path

    @property
    def copy(self) -> Path:
        """The working copy, a run folder. It has the name of the run."""
        # In a folder of its own: a run may be named `staging` or `state.json`.
        return self.cache / _COPY / (self.url.rsplit("/", 1)[-1] or "run")

    @property
    def state(self) -> Path:
        """File with the state of the copy."""
        return self.cache / "state.json"

    @property
    def staging(self) -> Path:
        """Folder of files that are being fetched or uploaded."""
        return self.cache / "staging"

    def remember(self) -> None:
        """Create the cache folder, and note the URL in it, so that `home_of` finds it from a path."""
        # Results and texts of the user's domain: for nobody else on this machine.
        self.cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self.cache / _URL_FILE
        if _note(path) != self.url:
            write_file(path, self.url)


def is_url(place: str | Path) -> bool:
    """Return whether a place is a URL.

    Example:
        >>> [is_url(place) for place in ("s3://bucket/runs/shop", "runs/shop", "C:/runs/shop", Path("runs"))]
        [True, False, False, False]
    """
    return isinstance(place, str) and _URL.match(place) is not None


def run_path(place: str | Path) -> Path:
    """Return the local path of a run folder: that of the working copy for a URL; nothing is fetched.

    Raises:
        InputError: the URL has a password, a query or no path.
    """
    if not isinstance(place, str) or not is_url(place):
        return Path(place)
    url = place.rstrip("/")
    _check(url)
    inner = _ROUND.search(url)
    home = _home(url[: inner.start()] if inner else url)
    _known[home.copy] = home
    return home.copy / inner[0][1:] if inner else home.copy


def local_run(place: str | Path) -> Path:
    """Return the local folder of a run for reading, as the functions of the API take it: what a URL has is fetched.

    Raises:
        InputError: there is no run at the URL, it cannot be reached, or an object is damaged.
    """
    if not is_url(place):
        return Path(place)
    from selfeval.store.remote.mirror import fetched  # imports fsspec

    return fetched(place)


_known: dict[Path, Home] = {}
"""Homes that this process has met, before anything is written to the cache."""


def _check(url: str) -> None:
    try:
        parts = urlsplit(url)
        has_password = parts.password is not None
    except ValueError as error:
        raise InputError(f"the URL cannot be read ({error}); expected for example s3://bucket/runs/shop") from None
    if has_password:
        # Not repeated here: messages end up in logs.
        raise InputError(
            "the URL has a password, which would be recorded with the run; give credentials in the way of the service, for "
            "example in environment variables or its configuration file"
        )
    if parts.query or parts.fragment or "::" in url:
        raise InputError(f"a run cannot be stored at {url.partition('?')[0]}...: a query, a fragment and :: are not supported")
    if not parts.path.strip("/") and not (parts.scheme == "memory" and parts.netloc):
        raise InputError(f"{url} has no path; expected for example {parts.scheme}://bucket/runs/shop")
    if any(part in (".", "..") for part in url.split("/")):
        raise InputError(
            f"{url} has the part . or ..; expected a URL without them, for example {parts.scheme}://bucket/runs/shop"
        )


def _note(path: Path) -> str:
    """Return the URL in a note; empty if there is none."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""


def _home(url: str) -> Home:
    return Home(url, _cache() / hashlib.sha256(url.encode()).hexdigest()[:16])


def _cache() -> Path:
    if given := os.environ.get(CACHE_VARIABLE):
        return Path(os.path.abspath(given))
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The specification says to ignore a relative path, which would be another folder after a change of directory.
    base = base if base.is_absolute() else Path.home() / ".cache"
    return Path(os.path.abspath(base)) / "selfeval" / "runs"


def home_of(path: Path) -> Home | None:
    """Return the home of a working copy, or of a folder in one; None for other folders.

    The path may come from a message of an earlier command.
    """
    whole = Path(os.path.abspath(path))
    for folder in (whole, *whole.parents):
        if folder in _known:
            return _known[folder]
        place = folder.parent
        if place.name == _COPY and place.parent.parent == _cache() and (url := _note(place.parent / _URL_FILE)):
            return _home(url)
    return None
