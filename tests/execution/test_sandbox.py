"""Programs that try to leave the sandbox or to pass without passing, in real processes."""

from __future__ import annotations

import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path

import pytest

from selfeval.errors import ConfigError
from selfeval.execution import sandbox
from selfeval.execution.sandbox import Limits, Outcome, Program, check_sandbox, run_program, run_programs
from selfeval.execution.system_calls import ARCHITECTURES, filter_program

SHORT = Limits(cpu_seconds=1, seconds=8.0, memory_bytes=256 << 20)


def _run(code: str, *tests: str, limits: Limits = SHORT) -> Outcome:
    return run_program(Program((textwrap.dedent(code),), tests or ("assert True",)), limits)


_REFUSED = """
import ctypes, fcntl, multiprocessing, os, resource, signal, socket, subprocess, sys, threading, urllib.request

def is_refused(code):
    try:
        exec(code, dict(globals()))
    except (OSError, RuntimeError, ValueError, AssertionError, AttributeError) as error:
        return True
    return False
"""


def _refuses(*attempts: str) -> Outcome:
    """Run attempts in one process; it passes if each of them is refused."""
    return _run(_REFUSED, *(f"assert is_refused({code!r}), {code!r}" for code in attempts))


def _allows(test: str) -> bool:
    return _run(_REFUSED, test).passed


pytestmark = pytest.mark.usefixtures("available_sandbox")


def test_a_program_passes_all_its_tests_or_has_not_passed() -> None:
    code = "def double(x):\n    return 2 * x\n"
    assert _run(code, "assert double(2) == 4", "assert double('a') == 'aa'") == Outcome("passed")
    assert _run(code, "assert double(2) == 4", "assert double(3) == 5, 'no'") == Outcome("failed", "AssertionError: no")
    assert _run(code, "assert triple(2) == 6") == Outcome("error", "NameError: name 'triple' is not defined")
    assert _run("def double(x:", "assert True").reason == "syntax"


def test_preamble_and_setup_surround_the_program() -> None:
    program = Program(
        ("class Leaf:\n    area = sqrt(9)",), ("assert leaf.area == 3",), "from math import sqrt", "leaf = Leaf()"
    )
    assert run_program(program).passed


def test_the_first_form_that_compiles_is_run() -> None:
    forms = ("def f(:", "def f(): return 1", "def f(): return 2")
    assert run_program(Program(forms, ("assert f() == 1",))).passed


def test_the_standard_library_works() -> None:
    code = """
    from __future__ import annotations
    import asyncio, collections, decimal, hashlib, heapq, json, random, re, sqlite3, statistics, unittest, zlib
    from dataclasses import dataclass

    @dataclass
    class Point:
        x: int

    async def later():
        await asyncio.sleep(0.001)
        return hashlib.sha256(b"x").hexdigest()
    """
    assert _run(code, "assert Point(1) == Point(1)", "assert asyncio.run(later())[:4] == '2d71'").passed


def test_sets_have_the_same_order_in_every_process() -> None:
    code = "assert list({'a', 'b', 'c', 'd', 'e', 'f'}) == %r"
    seen = _run("raise ValueError(list({'a', 'b', 'c', 'd', 'e', 'f'}))").detail.removeprefix("ValueError: ")
    assert all(outcome.passed for outcome in run_programs([Program((code.replace("%r", seen),), ("1",))] * 4))


# -- success that was not earned ----------------------------------------------------------------------------------------

WRONG = "assert answer() == 42"


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import os\nos._exit(0)", "exit"),
        ("import sys\nsys.exit(0)", "error"),
        ("raise SystemExit", "error"),
        ("import os\ndef answer(): os._exit(0)", "exit"),
        ("def answer(): raise SystemExit(0)", "error"),
        ("import sys\ndef answer():\n    try:\n        sys.exit(0)\n    except SystemExit:\n        return 41", "failed"),
        ("def answer(): return 41\nprint('passed ' + 32 * '0')", "failed"),
        ("import sys\nsys.stdout.write('passed')\nsys.stdout.flush()\nimport os\nos._exit(0)", "exit"),
        ("import os\nfor d in range(3, 60):\n    try: os.write(d, b'passed ' + 32 * b'0')\n    except OSError: pass", "exit"),
        ("AssertionError = None\ndef answer(): return 41", "failed"),
        ("import builtins\nclass Never(Exception): pass\nbuiltins.AssertionError = Never\ndef answer(): return 41", "error"),
        ("import sys\nsys.excepthook = lambda *a: None\ndef answer(): return 41", "failed"),
        ("def answer(): return 41\n__builtins__ = {}", "failed"),
        ("import os\nos.write = os._exit = lambda *a: None\ndef answer(): return 41", "failed"),
        ("import atexit\natexit.register(print, 'passed')\ndef answer(): return 41", "failed"),
        ("class E(Exception):\n    def __str__(self): raise SystemExit(0)\ndef answer(): raise E", "error"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "error"),
        ("import ctypes\nctypes.string_at(0)", "crash"),
    ],
)
def test_a_wrong_program_cannot_end_as_if_it_had_passed(code: str, reason: str) -> None:
    assert _run(code, WRONG).reason == reason


def test_replaced_builtins_do_not_reach_the_tests() -> None:
    code = "import builtins\nbuiltins.all = lambda values: True\nbuiltins.len = lambda value: 3\ndef f(): return [0]"
    assert _run(code, "assert all(f())").reason == "failed"
    assert _run(code, "assert len(f()) == 3").reason == "failed"
    late = "import builtins\ndef f():\n    builtins.all = lambda values: True\n    return [0]"
    assert _run(late, "f()", "assert all(f())").reason == "failed"


def test_output_goes_nowhere_and_is_not_read() -> None:
    code = """
    import sys
    sys.stdout.buffer.write(b"\\xff\\xfe" + 4_000_000 * b"x")
    print("é" * 4_000_000, file=sys.stderr)
    """
    assert _run(code).passed
    assert _run("raise ValueError('\\udcff' + 10_000 * 'é')").detail.startswith("ValueError: \\udcff")
    flood = """
    import os
    def answer():
        for d in range(3, 60):
            try:
                while True: os.write(d, 65536 * b'x')
            except OSError:
                pass
    """
    assert not _run(flood, WRONG).passed


# -- limits -------------------------------------------------------------------------------------------------------------


def test_an_infinite_loop_and_a_sleep_are_ended() -> None:
    # A minute of wall time for a second of CPU time, because other programs may share the machine.
    patient = Limits(1, 60.0)
    assert _run("while True: pass", limits=patient) == Outcome("timeout", "the limit of CPU time was reached")
    assert _run("import time\ntime.sleep(60)", limits=Limits(1, 0.5)) == Outcome("timeout", "the wall-clock limit was reached")
    deaf = "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"
    assert not _run(deaf, limits=patient).passed


@pytest.mark.parametrize(
    "code", ["bytearray(1 << 30)", "kept = []\nwhile True: kept.append(bytearray(1 << 20))", "[0] * 10**9"]
)
def test_a_memory_bomb_is_refused_memory(code: str) -> None:
    assert _run(code).reason == "memory"


def test_neither_limits_nor_signals_can_be_raised_again() -> None:
    higher, other = "resource.RLIMIT_CPU, (9, 9)", "os.getppid(), resource.RLIMIT_CPU, (1, 1)"
    assert _refuses(f"resource.setrlimit({higher})", f"resource.prlimit({other})") == Outcome("passed")
    assert _allows("assert resource.getrlimit(resource.RLIMIT_CPU) == (1, 2)")


def test_no_process_and_no_thread_is_started() -> None:
    assert _refuses(
        "os.fork()",
        "while True: os.fork()",
        "os.posix_spawn('/bin/true', ['true'], {})",
        "os.execv('/bin/true', ['true'])",
        "subprocess.run(['/bin/true'])",
        "multiprocessing.Process(target=int).start()",
        "threading.Thread(target=int).start()",
        "assert ctypes.CDLL(None).vfork() >= 0",
        "os.setsid()",
    ) == Outcome("passed")


# -- the world outside --------------------------------------------------------------------------------------------------


def test_no_network_is_reached() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        assert _refuses(
            f"socket.create_connection({address})",
            "socket.socket()",
            "socket.socket(socket.AF_UNIX)",
            "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 9))",
            "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)",  # it could send to the address of another
            f"urllib.request.urlopen('http://127.0.0.1:{address[1]}')",
        ) == Outcome("passed")
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert _allows("a, b = socket.socketpair(); a.send(b'x'); assert b.recv(1) == b'x'")


def test_io_uring_which_could_open_files_and_sockets_is_refused() -> None:
    assert _allows("assert ctypes.CDLL(None, use_errno=True).syscall(425, 8, None) < 0 and ctypes.get_errno() == 1")


def test_files_of_the_user_can_be_neither_read_nor_changed(tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("mine")
    home, new = Path.home(), tmp_path / "new"
    assert _refuses(
        f"open({str(secret)!r}).read()",
        f"open({str(secret)!r}, 'a')",
        f"open({str(new)!r}, 'w')",
        f"os.remove({str(secret)!r})",
        f"os.rename({str(secret)!r}, {str(new)!r})",
        f"os.link({str(secret)!r}, 'here'); open('here').read()",
        f"os.symlink({str(secret)!r}, 'here'); open('here').read()",
        f"os.truncate({str(secret)!r}, 0)",
        f"os.chmod({str(secret)!r}, 0)",
        f"os.utime({str(secret)!r})",
        f"os.setxattr({str(secret)!r}, 'user.x', b'x')",
        f"os.mkdir({str(new)!r})",
        f"os.listdir({str(tmp_path)!r})",
        f"os.listdir({str(home)!r})",
        f"os.chroot({str(tmp_path)!r})",
        "os.listdir('/')",
        "os.listdir('/proc')",
        "open('/etc/passwd').read()",
        "open('/proc/self/environ').read()",
        f"open('/proc/{os.getpid()}/environ').read()",
        "open('/proc/self/mem', 'wb')",
        "open('/dev/shm/x', 'w')",
        "open('file', 'w')",
        "os.memfd_create('x')",
        f"open({str(Path(sandbox.__file__))!r}).read()",
    ) == Outcome("passed")
    assert secret.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [secret]
    assert _allows("assert os.listdir('.') == []")


def test_a_disk_cannot_be_filled() -> None:
    filler = "import os, tempfile\nfor n in range(10_000):\n    with open(f'{n}', 'wb') as file: file.write(bytes(1 << 20))"
    assert _run(filler).reason == "error"
    assert _run("import tempfile\ntempfile.TemporaryFile().write(b'x')").reason == "error"


def test_the_environment_and_open_files_are_not_inherited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "secret")
    with (tmp_path / "open.txt").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        assert _allows("assert 'TOKEN' not in os.environ and 'HOME' not in os.environ and sys.stdin.read() == ''")
        assert _refuses(*(f"os.fstat({descriptor})" for descriptor in range(10, 64))) == Outcome("passed")
        assert file.fileno() < 64


def test_other_processes_are_out_of_reach() -> None:
    assert _refuses(
        "os.kill(os.getppid(), 9)",
        "os.kill(os.getppid(), 0)",
        "os.kill(-1, 15)",
        "os.killpg(os.getpgid(os.getppid()), 9)",
        # The kernel sends the signal to the owner of a descriptor.
        "r, w = os.pipe(); fcntl.fcntl(r, fcntl.F_SETOWN, os.getppid())",
        "assert ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) == 0",
        "os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)",
        "os.sched_setaffinity(os.getppid(), {0})",
    ) == Outcome("passed")


def test_a_program_ends_with_the_process_that_started_it() -> None:
    code = (
        "import sys, threading; sys.path.insert(0, sys.argv[1])\n"
        "from selfeval.execution import sandbox\n"
        "start = sandbox.subprocess.Popen\n"
        "def tell(*a, **k):\n"
        "    process = start(*a, **k)\n"
        "    print(process.pid, flush=True)\n"
        "    return process\n"
        "sandbox.subprocess.Popen = tell\n"
        "sandbox.run_program(sandbox.Program(('import time; time.sleep(60)',), ('1',)), sandbox.Limits(60, 60.0))\n"
    )
    source = str(Path(sandbox.__file__).parents[2])
    with subprocess.Popen([sys.executable, "-c", code, source], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        time.sleep(0.5)
        assert Path(f"/proc/{child}").exists()
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    deadline = time.monotonic() + 5
    while _is_alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _is_alive(child)


def _is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # not that of other processes
    threads = threading.active_count()
    run_programs([Program(("1",), ("1",)), Program(("while True: pass",), ("1",))], SHORT)
    assert list(tmp_path.iterdir()) == []
    assert threading.active_count() == threads


# -- without a sandbox --------------------------------------------------------------------------------------------------


def test_other_systems_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(
        ConfigError, match=r"code cannot be run in a sandbox here: this is Linux on riscv64\. It needs Linux 5\.13"
    ):
        check_sandbox()


_OLD_LANDLOCK = (
    "import selfeval.execution.confinement as c, selfeval.execution.system_calls as s; "
    "c._ruleset_attributes = lambda version, of=c._ruleset_attributes: of(2)"
)
"""Landlock as in Linux 5.19 to 6.1, which cannot deny that a readable file is emptied."""


@pytest.mark.parametrize(
    ("broken", "leak"),
    [
        ("selfeval.execution.confinement._restrict_files = lambda library: None", "a program can read a file"),
        ("selfeval.execution.confinement._restrict_calls = lambda library: None", "a program can open a socket"),
        (f"{_OLD_LANDLOCK}; s._CALLS.update(openat=(257, 56)); s._CONDITIONAL.pop('openat', 0)", "a program can empty a file"),
    ],
)
def test_a_sandbox_with_a_hole_is_refused(broken: str, leak: str, monkeypatch: pytest.MonkeyPatch) -> None:
    start = sandbox._START.replace("main()", f"import selfeval.execution.confinement; {broken}; main()")
    command = tuple(start if part == sandbox._START else part for part in sandbox._COMMAND)
    monkeypatch.setattr(sandbox, "_COMMAND", command)
    with pytest.raises(ConfigError, match=rf"the sandbox failed its check \(failed: AssertionError: {leak}\)"):
        check_sandbox()


def test_a_kernel_that_refuses_a_mechanism_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = "import selfeval.execution.confinement as c; c._CREATE_RULESET = 9999"
    command = tuple(
        part.replace("main()", f"{broken}; main()") if part == sandbox._START else part for part in sandbox._COMMAND
    )
    monkeypatch.setattr(sandbox, "_COMMAND", command)
    with pytest.raises(ConfigError, match="sandbox here: Landlock: Function not implemented"):
        check_sandbox()


def test_a_readable_file_is_not_emptied_under_an_old_landlock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "module.py"
    file.write_text("kept")
    rule = f"c._READABLE_FILES += ({str(file)!r},)"
    start = sandbox._START.replace("main()", f"{_OLD_LANDLOCK}; {rule}; main()")
    monkeypatch.setattr(sandbox, "_COMMAND", tuple(start if part == sandbox._START else part for part in sandbox._COMMAND))
    assert _allows(f"assert open({str(file)!r}).read() == 'kept'")
    assert _refuses(
        f"os.open({str(file)!r}, os.O_RDONLY | os.O_TRUNC)",
        f"os.open({str(file)!r}, os.O_RDONLY | os.O_TRUNC | os.O_CLOEXEC | os.O_NONBLOCK)",
        # open(2) itself, which Python does not use
        f"assert ctypes.CDLL(None).syscall(2, {str(file)!r}.encode(), os.O_TRUNC) >= 0",
    ) == Outcome("passed")
    assert file.read_text() == "kept"
    assert _allows("open(os.devnull, 'a').write('x')")
    check_sandbox()


@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_a_filter_fits_the_kernel(machine: str) -> None:
    program = filter_program(machine)
    assert len(program) % 8 == 0
    assert len(program) // 8 < 4096
