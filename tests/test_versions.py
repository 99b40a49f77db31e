from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from processes import python
from slow import slow

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DEPENDENCIES = [Requirement(line) for line in PROJECT["dependencies"]]


FIND_IT_FIRST = "import sys; sys.path.insert(0, sys.argv.pop(1)); "


def metadata(folder: Path, *requirements: str) -> None:
    """Write these requirements as those of the package; a process whose path begins with the folder finds them."""
    info = folder / "self_evaluator-9.9.dist-info"
    info.mkdir()
    lines = ["Metadata-Version: 2.4", "Name: self-evaluator", "Version: 9.9", *(f"Requires-Dist: {r}" for r in requirements)]
    (info / "METADATA").write_text("\n".join(lines) + "\n", encoding="utf-8")


def untested(folder: Path, *requirements: str) -> list[str]:
    metadata(folder, *requirements)
    code = FIND_IT_FIRST + "from selfeval.versions import untested_versions; print(*untested_versions(), sep='\\n')"
    done = python(code, str(folder))
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if line]


def test_versions_outside_of_the_metadata_are_named_with_their_range(tmp_path: Path) -> None:
    from numpy import __version__ as numpy

    found = untested(tmp_path, "rich>=1", "numpy>=1.0,<1.1", 'absent>=5; extra == "x"', 'torch>=99; extra == "y"', "Jinja2<99")
    assert len(found) == 2
    assert found[0] == f"numpy {numpy} (tested: >=1.0,<1.1)"
    assert found[1].startswith("torch ")
    assert found[1].endswith(" (tested: >=99)")


def test_a_local_build_counts_as_its_version(tmp_path: Path) -> None:
    """2.13.0+cpu is 2.13.0."""
    from torch import __version__ as torch

    assert untested(tmp_path, f"torch=={torch.partition('+')[0]}") == []


@pytest.mark.parametrize("bound", ["<1", slow(">=0")])
def test_the_command_says_so_at_its_start(tmp_path: Path, bound: str) -> None:
    metadata(tmp_path, f"transformers{bound}")
    code = FIND_IT_FIRST + "from selfeval.cli import main; main()"
    done = python(code, str(tmp_path), "plan", "--model", str(tmp_path / "none"))
    assert done.returncode == 2
    assert ("Note: installed versions outside the range" in done.stderr) == (bound == "<1")
    assert ("(tested: <1)" in done.stderr) == (bound == "<1")


# -- the three sets of versions -------------------------------------------------------------------------------------------


def pins(name: str) -> dict[str, Version]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    rows = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {row.name: Version(str(row.specifier).removeprefix("==")) for row in rows}


def test_every_dependency_has_a_floor_and_a_ceiling() -> None:
    for requirement in DEPENDENCIES:
        assert {part.operator for part in requirement.specifier} == {">=", "<"}, str(requirement)


def test_the_lowest_set_is_the_floor_of_every_dependency() -> None:
    floors = {r.name: Version(next(p.version for p in r.specifier if p.operator == ">=")) for r in DEPENDENCIES}
    lowest = pins("constraints-lowest.txt")
    assert {name: lowest.get(name) for name in floors} == floors


def test_the_pinned_set_names_every_dependency_within_its_range() -> None:
    pinned = pins("constraints.txt")
    for requirement in DEPENDENCIES:
        assert requirement.specifier.contains(pinned[requirement.name]), str(requirement)


def test_uv_installs_the_pinned_versions() -> None:
    """uv reads no constraints.txt: the pins that decide figures are repeated in [tool.uv]."""
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    rows = [Requirement(line) for line in tool["uv"]["constraint-dependencies"]]
    pinned = pins("constraints.txt")
    assert {row.name: str(row.specifier) for row in rows} == {row.name: f"=={pinned[row.name]}" for row in rows}
    assert {"torch", "transformers", "peft"} <= {row.name for row in rows}
