"""Whether the installed versions of our dependencies are among those that this release was tested with.

The ranges are those of the package's own metadata, so that they are written once, in pyproject.toml. pip enforces them when it
installs this package, but not when a later `pip install` of something else moves a dependency, nor with `--no-deps`.
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
    """Dependencies that are installed outside of their tested range, each as `transformers 5.30.0 (tested: >=5.16.1,<5.25)`.

    Optional dependencies count where they are installed. Empty where this package runs from a source tree without metadata.
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
        return None  # an extra that nobody asked for, or an import error of its own
    if requirement.specifier.contains(installed, prereleases=True):
        return None
    return f"{requirement.name} {installed} (tested: {_readable(requirement)})"


def _readable(requirement: Requirement) -> str:
    """The specifier from its floor to its ceiling; `str` of it sorts by character."""
    return ",".join(sorted(str(requirement.specifier).split(","), key=lambda part: part.startswith("<")))


def versions_note() -> str | None:
    """One sentence for the user, or None where every version was tested."""
    found = untested_versions()
    if not found:
        return None
    return (
        f"installed outside of the versions that this release was tested with: {'; '.join(found)}. If something fails, "
        "reinstall with `pip install --force-reinstall self-evaluator`, which picks tested versions"
    )
