"""Run the command in forked copies of one process that has already imported the libraries.

Importing torch, transformers and PEFT takes about five seconds of CPU time, and the tests run the command more than a hundred
times. The server imports them once and forks for each command. The child changes to the requested folder and output files, and
then runs `selfeval.__main__` as `python -m selfeval` does, until the interpreter exits.

The server reads one JSON object per line from stdin: `arguments`, `folder`, `out` and `err` (files for the output). It answers
with one JSON object per line: `{"pid": ...}` when the command has started, `{"returncode": ...}` when it has ended.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import sys
import threading
import traceback
from typing import Any, NoReturn

PRELOADED = ("peft", "selfeval.cli.app", "selfeval.cli.scoring", "selfeval.stages.pipeline", "selfeval.stages.running")


def serve() -> dict[str, Any] | None:
    """Serve commands until stdin is closed; return the request in a forked child, None in the server."""
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        pid = os.fork()
        if not pid:
            return request
        print(json.dumps({"pid": pid}), flush=True)
        _, status = os.waitpid(pid, 0)
        print(json.dumps({"returncode": os.waitstatus_to_exitcode(status)}), flush=True)
    return None


def become(request: dict[str, Any]) -> None:
    """Take over the arguments, the folder and the output files of a request."""
    os.chdir(request["folder"])
    sys.argv = ["selfeval", *request["arguments"]]
    files = {0: (os.devnull, os.O_RDONLY), 1: (request["out"], os.O_WRONLY), 2: (request["err"], os.O_WRONLY)}
    for number, (path, mode) in files.items():
        opened = os.open(path, mode)
        os.dup2(opened, number)
        os.close(opened)


def run() -> int:
    """Run the command; return its exit code, having printed the traceback if it raised."""
    try:
        runpy.run_module("selfeval", run_name="__main__", alter_sys=True)
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def leave(code: int) -> NoReturn:
    """Exit as an interpreter does, without the seconds that it takes to tear down every module of the libraries."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    for name in PRELOADED:
        importlib.import_module(name)
    # A fork copies only the thread that calls it; with others, a lock could stay taken for ever.
    assert len(os.listdir("/proc/self/task")) == 1, "the libraries started threads"
    gc.collect()
    gc.freeze()  # a collection in a child would touch, and so copy, every page of the server
    asked = serve()
    if asked is not None:
        become(asked)
        leave(run())
