"""Confine this process for good: limits of resources, Landlock for files, seccomp for everything else. Linux only.

Nothing here needs privileges, and it works in a container with the default profile of Docker. Namespaces are not used: many
systems forbid them to ordinary users, and the filter already refuses sockets and signals.

Standard library only, see `selfeval.execution.system_calls`.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import struct
import sys
from collections.abc import Iterator

from selfeval.execution.system_calls import filter_program

__all__ = ["confine"]

_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _FILTER = 1, 22, 38, 2
# The same numbers on every architecture.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION_FLAG, _PATH_BENEATH = 1, 1
_WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 1, 1 << 2, 1 << 3
_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
"""Number of rights on files that a version of Landlock knows; later ones know those of version 5.

Versions 1 and 2 cannot deny that a readable file is emptied: the filter of system calls does."""

_OPEN_FILES = 64
_READABLE_FOLDERS = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", "/nix/store", "/gnu/store")
_READABLE_FILES = ("/etc/ld.so.cache", "/etc/localtime", "/dev/zero", "/dev/urandom", "/dev/random")


def confine(*, cpu_seconds: int, memory_bytes: int) -> None:
    """Confine this process, which cannot be undone.

    Afterwards it can read Python's library, system libraries and the working directory, and write to open descriptors and
    /dev/null. It cannot start a process or a thread, send a signal, or open a socket. Opening a file with O_TRUNC is refused,
    so `open(os.devnull, "w")` fails; `open(os.devnull, "a")` works.

    Args:
        cpu_seconds: CPU time after which the process gets SIGXCPU, and one second later SIGKILL.
        memory_bytes: size limit of the address space.

    Raises:
        OSError: the kernel lacks a mechanism or refuses it.
    """
    _limit(cpu_seconds, memory_bytes)
    library = ctypes.CDLL(None, use_errno=True)
    _call(library.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl(PR_SET_PDEATHSIG)")
    _call(library.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl(PR_SET_NO_NEW_PRIVS)")
    _restrict_files(library)
    _restrict_calls(library)


def _limit(cpu_seconds: int, memory_bytes: int) -> None:
    for kind, soft, hard in (
        (resource.RLIMIT_CPU, cpu_seconds, cpu_seconds + 1),
        (resource.RLIMIT_AS, memory_bytes, memory_bytes),
        (resource.RLIMIT_FSIZE, 0, 0),
        (resource.RLIMIT_NOFILE, _OPEN_FILES, _OPEN_FILES),
        (resource.RLIMIT_NPROC, 0, 0),
        (resource.RLIMIT_CORE, 0, 0),
    ):
        allowed = resource.getrlimit(kind)[1]
        # An administrator's lower limit stays.
        most = hard if allowed == resource.RLIM_INFINITY else min(hard, allowed)
        resource.setrlimit(kind, (min(soft, most), most))


def _call(result: int, name: str) -> int:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")
    return result


# -- Landlock -----------------------------------------------------------------------------------------------------------


def _restrict_files(library: ctypes.CDLL) -> None:
    """Allow reading what Python itself needs and the working directory; nothing else, and no writing."""
    version = _call(library.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _VERSION_FLAG), "Landlock")
    attributes = _ruleset_attributes(version)
    ruleset = _call(library.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0), "Landlock")
    try:
        for path, rights in _readable():
            _allow(library, ruleset, path, rights)
        _call(library.syscall(_RESTRICT_SELF, ruleset, 0), "Landlock")
    finally:
        os.close(ruleset)


def _ruleset_attributes(version: int) -> bytes:
    """Return the `struct landlock_ruleset_attr` that denies all that a version of Landlock can deny."""
    files = (1 << _FILE_RIGHTS.get(version, 16)) - 1
    if version < 4:
        return struct.pack("Q", files)
    # Version 4: binding and connecting TCP sockets. Version 6: abstract Unix sockets and signals out of this domain.
    return struct.pack("QQ", files, 0b11) if version < 6 else struct.pack("QQQ", files, 0b11, 0b11)


def _readable() -> Iterator[tuple[str, int]]:
    own = (os.path.dirname(os.__file__), os.path.join(sys.base_prefix, "lib"), os.getcwd())
    for folder in (*own, *_READABLE_FOLDERS):
        if os.path.isdir(folder):
            yield folder, _READ_FILE | _READ_DIR
    for file in _READABLE_FILES:
        if os.path.exists(file):
            yield file, _READ_FILE
    yield os.devnull, _READ_FILE | _WRITE_FILE


def _allow(library: ctypes.CDLL, ruleset: int, path: str, rights: int) -> None:
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        # "=": the kernel's struct is packed.
        rule = struct.pack("=Qi", rights, descriptor)
        _call(library.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, rule, 0), f"Landlock, {path}")
    finally:
        os.close(descriptor)


# -- seccomp ------------------------------------------------------------------------------------------------------------


class _Filter(ctypes.Structure):
    """`struct sock_fprog`."""

    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]


def _restrict_calls(library: ctypes.CDLL) -> None:
    program = filter_program()
    found = _Filter(len(program) // 8, program)
    _call(library.prctl(_PR_SET_SECCOMP, _FILTER, ctypes.byref(found), 0, 0), "seccomp")
