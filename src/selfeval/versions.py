"""Check whether the installed dependencies are among the versions that this release was tested with.

The ranges are read from the package metadata, so they are defined only in pyproject.toml. pip enforces them when it
installs this package, but not with `--no-deps`, nor when a later `pip install` of another package changes a dependency.
"""

from __future__ import annotations

from functools import cache
from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

__all__ = ["untested_versions", "versions_note"]

_PACKAGE = "self-evaluator"


@cache
def untested_versions() -> tuple[str, ...]:
    """Return the dependencies installed outside their tested range, each as `transformers 5.30.0 (tested: >=5.16.1,<5.25)`.

    Optional dependencies count if they are installed. Empty if this package runs from a source tree without metadata.
    """
    try:
        requirements = [Requirement(line) for line in metadata.requires(_PACKAGE) or ()]
    except metadata.PackageNotFoundError:
        return ()
    return tuple(dict.fromkeys(note for requirement in requirements if (note := _outside(requirement))))


def _outside(requirement: Requirement) -> str | None:
    try:
        installed = metadata.version(canonicalize_name(requirement.name))
    except metadata.PackageNotFoundError:
        return None  # an extra that is not installed; a missing requirement fails on import anyway
    if requirement.specifier.contains(installed, prereleases=True):
        return None
    return f"{requirement.name} {installed} (tested: {_readable(requirement)})"


def _readable(requirement: Requirement) -> str:
    """Return the specifier with its lower bound first; `str` of it sorts by character."""
    return ",".join(sorted(str(requirement.specifier).split(","), key=lambda part: part.startswith("<")))


def versions_note() -> str | None:
    """Return one sentence for the user, or None if every version was tested."""
    found = untested_versions()
    if not found:
        return None
    return (
        f"installed versions outside the range tested with this release: {'; '.join(found)}. If something fails, "
        "reinstall with `pip install --force-reinstall self-evaluator`, which installs tested versions"
    )
