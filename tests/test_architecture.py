"""Architecture: imports follow the layers, public names are listed, and training cannot reach the oracle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import selfeval
from processes import python, python_anew
from toy import FEW, copy_lab, toy_arguments

SRC = Path(selfeval.__file__).parent
MODULES = sorted(SRC.rglob("*.py"))

LEVELS = (
    ("cli", "__main__"),
    ("bench",),
    ("documents", "planner", "suitability", "view"),
    ("judge_benchmark", "policy_comparison"),
    ("stages",),
    ("evaluation", "training", "report", "runs", "serve"),
    ("execution", "judging", "labelling", "quality", "rollout", "scale"),
    ("backbone",),
    ("algorithms", "links", "servers", "store"),
    ("config", "records", "errors", "grounding", "prompt", "texts", "versions"),
)
"""Layers from top to bottom; a package may import those below it, and those of its own layer without a cycle."""

LEVEL = {room: number for number, rooms in enumerate(LEVELS) for room in rooms}
LAB_READERS = {("cli", "lab"), ("lab", "lab")}
"""Who may import the lab: the command line's own lab commands (and the entry point, which is no import)."""


def _name(path: Path) -> str:
    parts = path.relative_to(SRC.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _room(module: str) -> str:
    """`selfeval.backbone.roles.names` -> `backbone`; the package itself -> ``."""
    return [*module.split("."), ""][1]


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _imports(path: Path) -> Iterator[tuple[str, str | None]]:
    """(module, name or None) of everything that a file imports from the package, lazily too, except for type checkers."""
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names if alias.name.split(".")[0] == "selfeval")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if (node.module or "").split(".")[0] == "selfeval":
                yield from ((node.module or "", alias.name) for alias in node.names)


BY_NAME = {_name(path): path for path in MODULES}


def _imported_modules(path: Path) -> Iterator[str]:
    for module, name in _imports(path):
        yield f"{module}.{name}" if f"{module}.{name}" in BY_NAME else module


# Tests of all modules are one test each with a list of faults: a thousand tests of a millisecond would take seconds to collect.


def test_imports_point_one_way() -> None:
    assert [fault for path in MODULES for fault in _upward_imports(path)] == []


def _upward_imports(path: Path) -> Iterator[str]:
    room = _room(_name(path))
    if room == "":  # the Python API: names of any room, loaded when they are first used
        return
    assert room in LEVEL or room == "lab", f"{room} has no place in the house; see LEVELS"
    for module in _imported_modules(path):
        other = _room(module)
        if other == "lab" and (room, other) not in LAB_READERS:
            yield f"{_name(path)} imports {module}: only the lab's own commands may"
        elif "lab" not in (room, other) and other and LEVEL[room] > LEVEL[other]:
            yield f"{_name(path)} imports {module}, which stands above it"


def test_rooms_do_not_import_each_other_in_a_circle() -> None:
    edges = {(_room(_name(path)), _room(module)) for path in MODULES for module in _imported_modules(path)}
    reached = {(a, b) for a, b in edges if a != b and a and b}
    while more := {(a, d) for a, b in reached for c, d in reached if b == c} - reached:
        reached |= more
    assert [pair for pair in reached if pair[0] == pair[1]] == []


def test_the_lab_is_imported_lazily_by_the_command_line() -> None:
    for path in sorted((SRC / "cli").glob("*.py")):
        top = [node for node in _tree(path).body if isinstance(node, ast.ImportFrom) and _room(node.module or "") == "lab"]
        assert top == []


def _defined(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {n.id for target in node.targets for n in ast.walk(target) if isinstance(n, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return names


def _all(path: Path) -> list[str] | None:
    for node in _tree(path).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target if isinstance(node, ast.AnnAssign) else None
        if isinstance(target, ast.Name) and target.id == "__all__" and isinstance(node, (ast.Assign, ast.AnnAssign)):
            found: list[str] = ast.literal_eval(node.value) if node.value else []
            return found
    return None


def _constants_first(name: str) -> tuple[int, str]:
    """Sort as the linter sorts __all__: CONSTANTS, Classes, functions."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2), name


def _is_bare_package(path: Path) -> bool:
    """Return whether an `__init__.py` holds only a docstring."""
    return path.name == "__init__.py" and len(_tree(path).body) == 1


def test_public_names_are_sorted_and_defined_here() -> None:
    for path in MODULES:
        if not _is_bare_package(path):
            names = _all(path)
            assert names is not None, f"{_name(path)}: a module says what is public in __all__"
            assert names == sorted(set(names), key=_constants_first), _name(path)
            imported = {name for _, name in _imports(path)} if path.name == "__init__.py" else set()
            assert set(names) <= _defined(_tree(path)) | imported, _name(path)


def test_only_public_names_are_imported_from_elsewhere() -> None:
    for path in MODULES:
        for module, name in _imports(path):
            if name is not None and f"{module}.{name}" not in BY_NAME:
                assert name in (_all(BY_NAME[module]) or []), f"{_name(path)}: {module}.{name} is not in __all__"


def test_every_module_says_what_it_is() -> None:
    assert [_name(path) for path in MODULES if not ast.get_docstring(_tree(path))] == []


TRAINING = (
    *(f"selfeval.stages.{stage}" for stage in ("questions", "replies", "verdicts", "pairs", "evaluator", "policy")),
    *(_name(path) for path in MODULES if _room(_name(path)) in ("training", "judging", "rollout", "backbone", "algorithms")),
)


def test_neither_chatglm_nor_the_lab_is_imported_where_it_is_not_used() -> None:
    """A release of transformers that moves something which only ChatGLM uses must not cost the other families."""
    # In one new process, because the imports take most of the time.
    code = (
        "import sys, selfeval.cli, selfeval.stages.pipeline\n"
        "from selfeval.backbone.families.table import register_family\n"
        "def chatglm(): return sorted(m for m in sys.modules if m.startswith('selfeval') and 'chatglm' in m)\n"
        "register_family('llama')\n"
        "assert chatglm() == [], chatglm()\n"
        "register_family('chatglm')\n"
        "from transformers import CONFIG_MAPPING\n"
        "assert 'selfeval.backbone.families.chatglm' in chatglm() and 'chatglm' in CONFIG_MAPPING\n"
        f"import {', '.join(TRAINING)}\n"
        "print([name for name in sys.modules if (name + '.').startswith('selfeval.lab.')])\n"
    )
    found = python_anew(code)
    assert found.returncode == 0, found.stderr
    assert found.stdout == "[]\n"


def test_only_one_module_touches_the_caches_of_transformers() -> None:
    touching = set()
    for path in MODULES:
        for node in ast.walk(_tree(path)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers"):
                names = {alias.name for alias in node.names}
                if node.module == "transformers.cache_utils" or any(name.endswith("Cache") for name in names):
                    touching.add(_name(path))
    assert touching == {"selfeval.backbone.families.cache"}


def test_only_one_package_imports_ray() -> None:
    importing = set()
    for path in MODULES:
        for node in ast.walk(_tree(path)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            importing |= {_room(_name(path)) for name in names if name.partition(".")[0] == "ray"}
    assert importing == {"scale"}


GOLD_READERS = {
    f"selfeval.stages.{name}" for name in ("attacks", "evaluation", "graph", "input_files", "pipeline", "preflight")
} | {f"selfeval.{name}" for name in ("policy_comparison.comparing", "policy_comparison.judging", "suitability.checking")}
"""Modules that may import gold: evaluation, the check and the comparison of finished runs call it, and the others report early
if it is unavailable."""


def test_only_evaluation_asks_gold() -> None:
    readers = {_name(path) for path in MODULES if "selfeval.stages.gold" in _imported_modules(path)}
    assert readers == GOLD_READERS


@pytest.mark.parametrize(
    ("reader", "names"),
    [
        ("pipeline", {"check_domain"}),
        ("graph", {"gold_key"}),
        ("input_files", {"gold_key"}),
        ("preflight", {"check_gold"}),
    ],
)
def test_the_others_check_gold_and_cannot_ask_it(reader: str, names: set[str]) -> None:
    imported = {name for module, name in _imports(SRC / "stages" / f"{reader}.py") if module == "selfeval.stages.gold"}
    assert imported == names


def test_only_the_pairs_stage_of_training_reads_labels_of_people() -> None:
    """And it takes only those that were given for training."""
    reading = {
        _name(path): imported
        for path in MODULES
        if _name(path) in TRAINING
        if (imported := {(module, name) for module, name in _imports(path) if module.startswith("selfeval.labelling")})
    }
    assert set(reading) == {"selfeval.stages.pairs"}
    assert {name for module, name in reading["selfeval.stages.pairs"] if module == "selfeval.labelling.training"} == {
        "CONFIDENCE",
        "preferences",
        "training_labels",
    }


def test_only_gold_runs_the_code_of_replies() -> None:
    runners = {"run_program", "run_programs"}
    running = {_name(path) for path in MODULES if runners & {name for _, name in _imports(path)}}
    assert running == {"selfeval.execution.tasks", "selfeval.stages.gold"}
    # It compiles the tests of a file.
    compiling = {_name(path) for path in MODULES if "syntax_error" in {name for _, name in _imports(path)}}
    assert compiling == {"selfeval.stages.gold"}


def _reaches_for_plugins(path: Path) -> set[str]:
    """Return the file's uses of anything that could find or import code by a name known only at run time."""
    found: set[str] = set()
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            found |= {
                alias.name for alias in node.names if alias.name.split(".")[0] in ("importlib", "pkg_resources", "pkgutil")
            }
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in (
            "importlib",
            "pkg_resources",
            "pkgutil",
        ):
            found.add(node.module or "")
        elif isinstance(node, (ast.Name, ast.Attribute)):
            name = node.id if isinstance(node, ast.Name) else node.attr
            found |= {name} & {"entry_points", "import_module", "__import__"}
    return found


BLIND = [path for path in MODULES if _name(path) in TRAINING or _room(_name(path)) == "quality"]


LOADERS = {"selfeval.training.learners", "selfeval.judging.judges"}
"""They import the learner or judge that the registry names, and can reach no module outside their package."""


def test_nothing_that_trains_looks_for_installed_domains() -> None:
    reaching = {_name(path): found for path in BLIND if (found := _reaches_for_plugins(path))}
    assert reaching == {name: {"importlib", "import_module"} for name in LOADERS}


@pytest.mark.parametrize("implementation", ["selfeval.lab.oracle:WordProblems", "..policy:train_policy", "os.path:join", ""])
def test_the_loader_of_learners_reaches_no_other_package(implementation: str) -> None:
    from types import SimpleNamespace

    from selfeval.training.learners import make_learner

    context = SimpleNamespace(config=SimpleNamespace(spec=SimpleNamespace(implementation=implementation)))
    with pytest.raises(ValueError, match=r"a learner must be a module of selfeval\.training\.learners"):
        make_learner(context)  # type: ignore[arg-type]


@pytest.mark.parametrize("implementation", ["selfeval.lab.oracle:WordProblems", "..templates:Templates", "os.path:join", ""])
def test_the_loader_of_judges_reaches_no_other_package(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from selfeval.config import JUDGES, JudgeSpec, VerdictsConfig
    from selfeval.judging.judges import make_judge

    monkeypatch.setitem(JUDGES, "pairwise", JudgeSpec("pairwise", implementation, "Reaches out."))
    with pytest.raises(ValueError, match=r"a judge must be a module of selfeval\.judging\.judges"):
        make_judge(None, None, VerdictsConfig(), batch_size=1)  # type: ignore[arg-type]


def test_the_search_for_plugins_finds_the_one_that_there_is() -> None:
    assert "entry_points" in _reaches_for_plugins(SRC / "stages" / "gold.py")
    assert {_name(path) for path in BLIND} > {
        "selfeval.stages.policy",
        "selfeval.judging.judges.pairwise",
        "selfeval.quality.dedupe",
    }


WITH_A_DEAD_ORACLE = """
import sys
from selfeval.lab.oracle import WordProblems

def never(self, question, reply=None):
    raise RuntimeError("the oracle was asked")

WordProblems.is_right = never
WordProblems.answer = never
from selfeval.cli import main
sys.argv[0] = "selfeval"
main()
"""


@pytest.mark.slow
def test_training_finishes_without_the_oracle_and_evaluation_does_not(tmp_path: Path) -> None:
    """Proof at run time: an unavailable oracle stops evaluation, and nothing before it."""
    recipe, output = copy_lab(tmp_path / "lab"), tmp_path / "run"
    sizes = (*FEW, "policy.iterations=1", "evaluator.epochs=1")
    trained = python(WITH_A_DEAD_ORACLE, *toy_arguments(recipe, output, "--until", "policy", sizes=sizes))
    assert trained.returncode == 0, trained.stderr
    assert (output / "policy" / "manifest.json").is_file()
    evaluated = python(WITH_A_DEAD_ORACLE, *toy_arguments(recipe, output, sizes=sizes))
    assert evaluated.returncode != 0
    assert "the oracle was asked" in evaluated.stderr
    assert not (output / "evaluation" / "manifest.json").exists()
