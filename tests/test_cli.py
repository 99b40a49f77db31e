from __future__ import annotations

import importlib.util
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from processes import TIMEOUT, environment, python, selfeval, selfeval_on_a_full_disk, start, start_piped, start_python
from selfeval import __version__
from selfeval.store import write_sealed
from toy import FEW, copy_lab, toy_arguments

HEAVY = {"torch", "transformers", "peft", "numpy", "tokenizers", "safetensors", "jinja2"}


def _imported(code: str) -> set[str]:
    """Top-level modules that are loaded after `code`."""
    report = f"{code}\nimport sys; print('LOADED', *sorted({{name.split('.')[0] for name in sys.modules}}))"
    found = subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, check=True, env=environment())
    return set(found.stdout.splitlines()[-1].split()[1:])


def _refused(*arguments: str, code: int = 2) -> str:
    """The one sentence with which a command is refused."""
    found = selfeval(*arguments)
    assert found.returncode == code, found.stderr
    assert found.stdout == ""
    assert "Traceback" not in found.stderr
    lines = [line for line in found.stderr.splitlines() if line and not line.startswith("loading ")]
    assert len(lines) == 1, found.stderr
    assert lines[0].startswith("Error: ")
    return lines[0]


@pytest.fixture
def seeds(tmp_path: Path) -> str:
    path = tmp_path / "seeds.txt"
    path.write_text("How many?\nWhy?\n")
    return str(path)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_lab(tmp_path_factory.mktemp("cli") / "lab")


# -- help, version, imports ---------------------------------------------------------------------------------------------


def test_importing_the_package_loads_nothing_else() -> None:
    assert _imported("import selfeval") & HEAVY == set()


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["--version"], []], ids=" ".join)
def test_help_loads_no_heavy_library(arguments: list[str]) -> None:
    code = (
        f"import sys; sys.argv = ['selfeval', *{arguments!r}]\n"
        "from selfeval.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass"
    )
    assert _imported(code) & HEAVY == set()


def test_help_shows_the_commands_and_the_exit_codes() -> None:
    found = selfeval("--help")
    assert found.returncode == 0
    for word in ("run", "show", "score", "report", "lab", "130 interrupted"):
        assert word in found.stdout
    assert found.stderr == ""
    assert selfeval("--version").stdout == f"{__version__}\n"


def test_until_lists_the_stages_of_the_pipeline() -> None:
    from selfeval.stages import STAGE_NAMES
    from selfeval.stages.graph import STAGES

    assert tuple(stage.name for stage in STAGES) == STAGE_NAMES


# -- what the user gave -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "has no questions; write at least one"),
        (
            '{"question": "Why?"}\n{"question" "How?"}\n',
            'line 2: not JSON (Expecting \':\' delimiter); got {"question" "How?"};',
        ),
        ('{"query": "Why?"}\n', 'line 1: missing or empty "question"; got {"query": "Why?"}; write {"question": "..."}'),
    ],
)
def test_seeds_that_cannot_be_read(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "seeds.jsonl"
    path.write_text(content)
    sentence = _refused("run", "--model", "./none", "--seeds", str(path), "--output", str(tmp_path / "run"))
    assert said in sentence
    assert str(path) in sentence
    assert not (tmp_path / "run").exists()


def test_no_seeds_and_seeds_that_are_not_there(tmp_path: Path) -> None:
    assert "no seeds were given; pass --seeds" in _refused("run", "--model", "./none", "--output", str(tmp_path / "run"))
    none = str(tmp_path / "none.jsonl")
    assert f"seeds file {none} does not exist" in _refused("run", "--model", "./none", "--seeds", none)


def test_a_model_that_is_not_there(tmp_path: Path, seeds: str) -> None:
    none = str(tmp_path / "none")
    sentence = _refused("run", "--model", none, "--seeds", seeds, "--output", str(tmp_path / "run"))
    assert f"model folder {none} does not exist; pass a Hugging Face model folder or a hub id" in sentence


def test_no_model(tmp_path: Path, seeds: str) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("")
    sentence = _refused("run", str(recipe), "--seeds", seeds, "--output", str(tmp_path / "run"))
    assert "no model was given; use --model" in sentence


def test_a_folder_without_a_model_in_it(tmp_path: Path, seeds: str) -> None:
    (tmp_path / "empty").mkdir()
    arguments = ("run", "--model", str(tmp_path / "empty"), "--seeds", seeds, "--output", str(tmp_path / "run"))
    assert "has no config.json, so it is not a model folder" in _refused(*arguments)


def test_a_model_that_cannot_write(tmp_path: Path, seeds: str) -> None:
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertForMaskedLM"]}))
    sentence = _refused("run", "--model", str(tmp_path / "bert"), "--seeds", seeds, "--output", str(tmp_path / "run"))
    assert "is a BertForMaskedLM, not a causal language model; use one that generates text" in sentence


def test_a_run_refused_for_its_model_goes_on_with_the_right_one(tmp_path: Path, recipe: Path) -> None:
    output = tmp_path / "run"
    assert "does not exist" in _refused(*toy_arguments(recipe, output, "--model", str(tmp_path / "none")))
    found = selfeval(*toy_arguments(recipe, output, "--until", "questions"))
    assert found.returncode == 0, found.stderr
    assert "replaced" not in found.stderr, "nothing had been made with the wrong model"


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("policy.iteration=3", 'unknown key "policy.iteration"; did you mean "iterations"?'),
        ("evaluater.epochs=3", 'unknown key "evaluater"; did you mean "evaluator"?'),
        ("policy.iterations=many", 'policy.iterations: got "many"; Input should be a valid integer'),
        ("policy.ppo.clip=-1", "policy.ppo.clip: got -1; Input should be greater than 0"),
        ("policy.iterations", "--set policy.iterations: expected key=value, for example --set policy.iterations=20"),
    ],
)
def test_settings_that_cannot_be_used(tmp_path: Path, setting: str, said: str) -> None:
    assert said in _refused("run", "--output", str(tmp_path / "run"), "--set", setting)
    assert not (tmp_path / "run").exists()


def test_a_stage_that_does_not_exist(tmp_path: Path) -> None:
    sentence = _refused("run", "--output", str(tmp_path / "run"), "--until", "verdict")
    assert 'there is no stage "verdict"; did you mean "verdicts"?' in sentence
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", ["3", "0", "two"])
def test_a_round_that_does_not_exist(tmp_path: Path, number: str) -> None:
    settings = ("--set", "rounds=2", "--output", str(tmp_path / "run"))
    sentence = _refused("run", *settings, "--until", f"{number}/pairs")
    assert f'--until {number}/pairs: there is no round "{number}", rounds = 2; pass an existing round' in sentence
    assert not (tmp_path / "run").exists()


def test_an_output_that_is_something_else(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    assert "exists and is not a run" in _refused("run", "--output", str(tmp_path / "mine"))
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    assert "is a file; pass a folder" in _refused("run", "--output", str(tmp_path / "mine" / "thesis.txt"))


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    none = str(tmp_path / "none.toml")
    assert f"recipe {none} does not exist; pass the path of a .toml recipe" in _refused("run", none)


@pytest.mark.parametrize("command", ["show", "report", "score"])
def test_a_folder_that_is_not_a_run(tmp_path: Path, command: str) -> None:
    more = ["--question", "Why?", "--reply", "So."] if command == "score" else []
    assert "is not a run (no run.json)" in _refused(command, str(tmp_path), *more)
    write_sealed(tmp_path / "run.json", {"config": {"colour": "red"}})
    assert "was written by another version of selfeval (unsupported settings: colour)" in _refused(
        command, str(tmp_path), *more
    )
    (tmp_path / "run.json").write_text('{"config": ')
    assert "run.json is damaged" in _refused(command, str(tmp_path), *more)


def test_show_of_a_run_that_has_nothing_yet(tmp_path: Path) -> None:
    write_sealed(tmp_path / "run.json", {"config": {}})
    assert "has no pairs yet: the stage pairs has not written any" in _refused("show", str(tmp_path))
    assert 'no records "pear"; did you mean "pairs"?' in _refused("show", str(tmp_path), "pear")


def test_debug_shows_the_traceback_and_keeps_the_exit_code(tmp_path: Path) -> None:
    found = selfeval("run", str(tmp_path / "none.toml"), "--debug")
    assert found.returncode == 2
    assert "Traceback (most recent call last)" in found.stderr
    assert "selfeval.errors.ConfigError" in found.stderr
    assert found.stderr.splitlines()[-1].startswith("Error: recipe ")


# -- interrupted, and a disk that fills ----------------------------------------------------------------------------------


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_that_nothing_is_lost(tmp_path: Path, recipe: Path, sent: signal.Signals) -> None:
    output = tmp_path / "run"
    endless = ("policy.iterations=4000", "policy.kl_target=1000")
    process = start(toy_arguments(recipe, output, sizes=(*FEW, "questions.train=12", "questions.test=4", *endless)))
    try:
        metrics, waited = output / "metrics" / "policy.jsonl", time.monotonic() + 200
        while not (metrics.exists() and metrics.stat().st_size) and process.poll() is None and time.monotonic() < waited:
            time.sleep(0.02)
        process.send_signal(sent)
        _, err = process.communicate(timeout=100)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert err.splitlines()[-1] == "Interrupted. Nothing is lost: rerun the same command to resume."
    run = json.loads((output / "run.json").read_text())
    assert run["stages"]["policy"]["state"] == "interrupted"
    assert run["stages"]["pairs"]["state"] == "finished"


RESUMED = "Nothing is lost: rerun the same command to resume."
AGAIN = "Nothing was changed; the same command starts from the beginning."


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["check"], AGAIN),
        (["plan"], AGAIN),
        (["show", "DIR"], AGAIN),
        (["score", "DIR", "--question", "q", "--reply", "r"], AGAIN),
        (["report", "DIR"], "index.html is intact, either the old or the new version; rerun the same command to rebuild it."),
        (["restore", "DIR", "1"], "Nothing is lost: rerun the same command to restore the rest."),
        (
            ["export", "DIR", "--role", "policy", "--to", "OUT"],
            "No partial folder is left behind; the same command starts from the beginning.",
        ),
        (["run"], RESUMED),
        (["tune", "text.txt", "--model", "m", "--to", "OUT"], RESUMED),
        (["lab", "pretrain"], RESUMED),
        (["lab", "exam"], AGAIN),
    ],
    ids=lambda part: " ".join(part[:2]) if isinstance(part, list) else None,
)
def test_an_interrupted_command_says_what_is_true_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str], said: str
) -> None:
    from selfeval.cli import app, failures
    from selfeval.runs import reader
    from selfeval.stages import running

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    # Each command calls one of these first.
    monkeypatch.setattr(sys.modules["selfeval.cli.app"], "_quiet_libraries", interrupted)
    monkeypatch.setattr(reader, "RunReader", interrupted)
    for name in ("config_to_run", "new_config"):
        monkeypatch.setattr(running, name, interrupted)
    monkeypatch.setattr(failures, "_leave_quietly_from_now_on", lambda: None)  # it is about this process
    found = CliRunner().invoke(app, [str(tmp_path / word) if word in ("DIR", "OUT") else word for word in command])
    assert found.exit_code == 130
    assert found.stderr == f"\nInterrupted. {said}\n"


def test_a_failing_write_is_one_sentence_and_the_same_command_finishes_later(tmp_path: Path, recipe: Path) -> None:
    arguments = toy_arguments(recipe, tmp_path / "run", sizes=(*FEW, "policy.iterations=1", "evaluator.epochs=1"))
    # No file may grow beyond 8 KB, as on a disk that fills up during the run; ENOSPC itself is in tests/test_store.py.
    found = selfeval_on_a_full_disk(8_000, *arguments)
    assert found.returncode == 2, found.stderr
    assert "Traceback" not in found.stderr
    assert re.search(
        r"^Error: cannot write .*Nothing is lost: raise the limit \(ulimit -f\) and rerun the same command$",
        found.stderr,
        re.M,
    )
    assert list((tmp_path / "run").rglob("*.part")) == []
    again = selfeval(*arguments)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "run" / "report.json").is_file()


# -- a terminal ---------------------------------------------------------------------------------------------------------


ON_A_TERMINAL = """
import os, runpy, sys

os.dup2(os.open(sys.argv[1], os.O_RDWR | os.O_NOCTTY), 2)
os.environ["TERM"] = "xterm"
sys.argv = ["selfeval", *sys.argv[2:]]
runpy.run_module("selfeval", run_name="__main__", alter_sys=True)
"""


def test_a_live_terminal_gets_bars_and_a_pipe_gets_clean_output(tmp_path: Path, recipe: Path) -> None:
    pty = pytest.importorskip("pty")
    parent, child = pty.openpty()
    sizes = (*FEW, "questions.train=12", "questions.test=4")
    arguments = toy_arguments(recipe, tmp_path / "run", "--until", "replies", sizes=sizes)
    process = start_python(ON_A_TERMINAL, os.ttyname(child), *arguments)
    shown = b""
    while process.poll() is None or select.select([parent], [], [], 0)[0]:
        if select.select([parent], [], [], 0.1)[0]:
            try:
                shown += os.read(parent, 65536)
            except OSError:  # the other end is closed
                break
    out, _ = process.communicate()
    os.close(child)
    os.close(parent)
    assert process.returncode == 0
    assert out == ""
    assert b"/32" not in shown, "replies are counted in questions"
    assert b"16/16" in shown


# -- our own faults, and the end of a command ----------------------------------------------------------------------------

BROKEN = """
import sys
from selfeval.stages import seeds
{patch}
from selfeval.cli import main
sys.argv[0] = "selfeval"
main()
"""


def _broken(patch: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command with a fault in it."""
    return python(BROKEN.format(patch=patch), *arguments)


@pytest.mark.parametrize("raised", ["ValueError('odd')", "IndexError('odd')", "RuntimeError('odd')", "KeyError('odd')"])
def test_a_fault_of_ours_is_a_sentence_with_a_log_to_report(tmp_path: Path, raised: str) -> None:
    patch = f"def read_seeds(path): raise {raised}\nseeds.read_seeds = read_seeds"
    found = _broken(patch, "run", "--output", str(tmp_path / "run"))
    assert found.returncode == 1
    assert "Traceback" not in found.stderr
    (sentence,) = found.stderr.splitlines()
    said = re.fullmatch(r"Error: \w+: '?odd'?\. This is a bug in selfeval, .*; the traceback is in (.*)\. Please .*", sentence)
    assert said, sentence
    log = Path(said[1])
    text = log.read_text()
    log.unlink()
    assert f"selfeval {__version__}, Python 3." in text
    assert f"run --output {tmp_path / 'run'}" in text
    assert "Traceback (most recent call last)" in text
    assert raised.split("(")[0] in text.splitlines()[-1]
    debugged = _broken(patch, "run", "--output", str(tmp_path / "run"), "--debug")
    assert debugged.returncode == 1
    assert "Traceback (most recent call last)" in debugged.stderr
    assert debugged.stderr.splitlines()[-1].startswith("Error: ")


def test_the_log_of_a_fault_is_in_the_run_folder_once_that_is_there(tmp_path: Path, recipe: Path) -> None:
    output = tmp_path / "run"
    patch = (
        "from selfeval.stages import questions\ndef fail(*_): raise ValueError('odd')\nquestions._Acceptance.consider = fail"
    )
    found = _broken(patch, *toy_arguments(recipe, output))
    assert found.returncode == 1, found.stderr
    assert f"the traceback is in {output / 'error.log'}. Please report it" in found.stderr
    assert "ValueError: odd" in (output / "error.log").read_text()
    again = selfeval(*toy_arguments(recipe, output, "--until", "questions"))
    assert again.returncode == 0, again.stderr


def test_the_address_for_reports_is_that_of_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    from email.message import Message

    from selfeval.cli import failures

    package = Message()
    package["Project-URL"] = "Homepage, https://example.org/home"
    monkeypatch.setattr(failures, "metadata", lambda name: package)
    assert failures._address() == "https://example.org/home"
    package["Project-URL"] = "Issues, https://example.org/issues"
    assert failures._address() == "https://example.org/issues"


def test_an_argument_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "selfeval", "run", "--seeds", os.fsencode(tmp_path) + b"/\xff.txt"]
    found = subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
    assert found.returncode == 2
    assert found.stderr == f"Error: argument 3 is not valid UTF-8: {tmp_path}/\\xff.txt; rename the file or correct the text\n"


def test_a_message_sends_no_escapes_to_the_terminal(tmp_path: Path) -> None:
    sentence = _refused("run", str(tmp_path / "\x1b[31mred\x07.toml"))
    assert r"\x1b[31mred\x07.toml does not exist" in sentence


INTERRUPTED_TWICE = """
def read_seeds(path):
    import os, signal, threading, time
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)
seeds.read_seeds = read_seeds
import atexit, os, signal
atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))
"""


def test_a_second_interrupt_ends_without_a_traceback(tmp_path: Path) -> None:
    process = start_piped("-c", BROKEN.format(patch=INTERRUPTED_TWICE), "run", "--output", str(tmp_path / "run"))
    _, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 130
    assert err == "\nInterrupted. Nothing is lost: rerun the same command to resume.\n"


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
@pytest.mark.parametrize("under_nohup", [False, True])
def test_a_closed_terminal_interrupts_a_command_except_under_nohup(monkeypatch: pytest.MonkeyPatch, under_nohup: bool) -> None:
    from selfeval.cli import main

    before = {number: signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGTERM)}
    monkeypatch.setattr(sys, "argv", ["selfeval", "--version"])
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN if under_nohup else signal.SIG_DFL)
        with pytest.raises(SystemExit):
            main()
        assert (signal.getsignal(signal.SIGHUP) == signal.SIG_IGN) == under_nohup
        assert signal.getsignal(signal.SIGHUP) != signal.SIG_DFL  # which would end the process without any clean-up
        with pytest.raises(KeyboardInterrupt) if not under_nohup else nullcontext():
            signal.raise_signal(signal.SIGHUP)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_output_that_nobody_reads_any_more_is_no_error(tmp_path: Path) -> None:
    rows = "".join(json.dumps({"chosen": "x" * 2000}) + "\n" for _ in range(400))
    (tmp_path / "pairs" / "train").mkdir(parents=True)
    (tmp_path / "pairs" / "train" / "shard-00000.jsonl").write_text(rows)
    write_sealed(tmp_path / "run.json", {"config": {}})
    process = start_piped("-m", "selfeval", "show", str(tmp_path), "pairs", "-n", "400")
    assert process.stdout is not None
    process.stdout.read(10)
    process.stdout.close()
    assert process.wait(60) == 141
    assert process.stderr is not None
    with process.stderr as errors:
        assert errors.read() == ""


# -- nothing is created for input that cannot be used -----------------------------------------------------------------------


def _template(recipe: Path, name: str, text: str) -> tuple[str, ...]:
    folder = recipe.parent / "broken"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(recipe.parent / "word_problems" / "templates", folder)
    (folder / name).write_text(text)
    return ("--set", f"templates={folder}")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--set", "domain=word-problem"), 'domain "word-problem" is not installed; did you mean "word-problems"?'),
        (
            ("--set", 'backbone.lora.targets=["q_prj"]'),
            'backbone.lora.targets: no module of this model is called "q_prj"; did you mean "q_proj"?',
        ),
        (("--set", "backbone.lora.targets=[]"), "backbone.lora.targets: got []; list at least one module"),
        (("--set", 'backbone.lora.targets=["lm_head"]'), "backbone.lora.targets names the output layer, which stays frozen"),
        (("--set", 'backbone.lora.targets=["embed_tokens"]'), "backbone.lora.targets puts an adapter on the embedding"),
        (("--set", "backbone.lora.rank=1000000"), "backbone.lora.rank = 1000000 is larger than the widest layer of"),
        (
            ("--set", "backbone.lora.alpha=1e300"),
            "--set backbone.lora.alpha=1e300: backbone.lora.alpha: got 1e+300; must be between",
        ),
        (("--set", "questions.file=none.jsonl"), "questions.file none.jsonl does not exist"),
        (("--set", "gold=/dev/zero"), "are both set; remove one"),
        (("--seeds", "/dev/zero"), "seeds file /dev/zero is a named pipe or a device, not a file"),
        (("--set", "trackers=['mlflow']"), "tracker mlflow is not installed"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_input_that_is_refused_leaves_no_folder(tmp_path: Path, recipe: Path, arguments: tuple[str, ...], said: str) -> None:
    if "mlflow" in said and importlib.util.find_spec("mlflow"):
        pytest.skip("mlflow is installed here")
    assert said in _refused(*toy_arguments(recipe, tmp_path / "run", *arguments))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["referee.jinja", "templates.toml"])
def test_a_broken_template_is_refused_before_any_work(tmp_path: Path, recipe: Path, name: str) -> None:
    """The referee's is read by evaluation only, when all training is done."""
    sentence = _refused(*toy_arguments(recipe, tmp_path / "run", *_template(recipe, name, "{{ question")))
    assert str(recipe.parent / "broken") in sentence
    assert list(tmp_path.iterdir()) == []


def _fail_in(root: Path, error: Exception, leave: str | None = None) -> None:
    """A command whose input turns out to be unusable once it holds the run folder, perhaps after some work."""
    from selfeval.stages.preflight import run_folder

    with pytest.raises(type(error)), run_folder(root) as store:  # noqa: PT012
        store.update_run(status="running")
        if leave:
            (root / leave).parent.mkdir(parents=True)
            (root / leave).write_text("{}\n")
        raise error


def test_a_folder_that_was_made_for_a_refused_run_is_removed(tmp_path: Path) -> None:
    from selfeval.errors import ModelError

    _fail_in(tmp_path / "new", ModelError("refused"))
    assert not (tmp_path / "new").exists()
    (tmp_path / "empty").mkdir()
    _fail_in(tmp_path / "empty", ModelError("refused"))
    assert list((tmp_path / "empty").iterdir()) == []


@pytest.mark.parametrize(
    "work", ["questions/shard-00000.jsonl", "roles/policy/role.json", "checkpoints/policy/step-1/state.json"]
)
def test_a_folder_with_work_in_it_is_kept(tmp_path: Path, work: str) -> None:
    from selfeval.errors import ModelError

    _fail_in(tmp_path / "run", ModelError("refused"), leave=work)
    assert (tmp_path / "run" / work).is_file()


def test_a_fault_of_ours_keeps_the_folder_for_the_report(tmp_path: Path) -> None:
    _fail_in(tmp_path / "run", KeyError("odd"))
    assert (tmp_path / "run" / "run.json").is_file()


# -- what is printed, and completion ------------------------------------------------------------------------------------


def _closing(folder: Path, monkeypatch: pytest.MonkeyPatch, columns: int | None) -> str:
    """The closing table on a terminal of so many columns, or in a pipe."""
    import io

    import rich.console
    from sample_report import sample_report

    from selfeval.cli.closing import print_closing

    (folder / "report.json").write_text(json.dumps(sample_report()))
    (folder / "index.html").write_text("")
    out = io.StringIO()
    real = rich.console.Console
    monkeypatch.setattr(
        rich.console, "Console", lambda: real(file=out, force_terminal=columns is not None, width=columns or 80)
    )
    monkeypatch.setattr(sys, "stdout", out)
    print_closing(folder, worked=True)
    return re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue())


def test_the_closing_table_in_a_pipe_has_a_tab_between_name_and_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sample_report import parsed, sample_report

    from selfeval.report.summary import summary_rows, verdict_sentences

    report = parsed(sample_report())
    lines = _closing(tmp_path, monkeypatch, None).splitlines()
    rows = summary_rows(report)
    assert lines[: len(rows)] == [f"{name.strip()}\t{value}" for name, value in rows]
    assert lines[len(rows) : len(rows) + 2] == list(verdict_sentences(report)), "sentences are not wrapped"


@pytest.mark.parametrize("columns", [20, 40, 80, 200])
def test_the_closing_table_fits_any_terminal_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    from sample_report import parsed, sample_report

    from selfeval.report.summary import summary_rows

    shown = _closing(tmp_path, monkeypatch, columns)
    table = shown[: shown.index("Report:")]
    assert max(len(line.rstrip()) for line in table.splitlines()) <= columns
    assert "…" not in table
    for name, value in summary_rows(parsed(sample_report())):
        for word in f"{name} {value}".split():
            assert word in table or columns < 60, word
    said = "".join(table.split())
    if columns < 60:
        assert all("".join(f"{name}{value}".split()) in said for name, value in summary_rows(parsed(sample_report())))


def test_score_wants_a_question_or_a_file(tmp_path: Path) -> None:
    write_sealed(tmp_path / "run.json", {"config": {}})
    said = "pass either --question and at least one --reply, or --file"
    assert said in _refused("score", str(tmp_path))
    assert said in _refused("score", str(tmp_path), "--question", "Why?")
    assert said in _refused("score", str(tmp_path), "--question", "Why?", "--reply", "So.", "--file", "x.jsonl")
    path = tmp_path / "in.jsonl"
    path.write_text('{"question": "Why?", "replies": ["So."]}\n{"question": "Why?"}\n')
    assert f"{path}, line 2: expected a question and at least one reply" in _refused(
        "score", str(tmp_path), "--file", str(path)
    )


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_names_the_commands_without_a_heavy_library(shell: str) -> None:
    variables = {
        "bash": ("COMP_WORDS", "COMP_CWORD"),
        "zsh": ("_TYPER_COMPLETE_ARGS",) * 2,
        "fish": ("_TYPER_COMPLETE_ARGS",) * 2,
    }
    words, position = variables[shell]
    code = (
        "import os, sys; sys.argv = ['selfeval']\n"
        f"os.environ.update({{'_SELFEVAL_COMPLETE': 'complete_{shell}', '{position}': '1', '{words}': 'selfeval sc',\n"
        "    '_TYPER_COMPLETE_FISH_ACTION': 'get-args'})\n"
        "from selfeval.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\nprint()"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment())
    assert "score" in found.stdout
    assert "tune" not in found.stdout
    assert _imported(code) & HEAVY == set()
