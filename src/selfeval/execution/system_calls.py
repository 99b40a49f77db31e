"""The system calls that a program in the sandbox may make, compiled to a seccomp filter.

A list of what is allowed rather than of what is not, so that a call which a later kernel adds is refused. Left out are all that
create a process or a thread, execute a file, send a signal, open a socket, change a file or its attributes, or act on another
process; io_uring, which could do most of these, is left out as well.

Standard library only: the process that runs the program imports this module before it is confined.
"""

from __future__ import annotations

import errno
import platform
import struct
from dataclasses import dataclass

__all__ = ["ARCHITECTURES", "filter_program"]


@dataclass(frozen=True)
class _Architecture:
    audit: int
    """Identifier in the data of a filter (`AUDIT_ARCH_*`)."""

    column: int
    """Index of its numbers in `_CALLS`."""


ARCHITECTURES = {"x86_64": _Architecture(0xC000003E, 0), "aarch64": _Architecture(0xC00000B7, 1)}
"""Supported machines, by the name that the kernel gives them."""

# Numbers of x86-64 and of arm64; None where an architecture does not have the call.
_CALLS: dict[str, tuple[int | None, int | None]] = {
    # files that are open, or that Landlock lets the program open for reading
    "read": (0, 63),
    "write": (1, 64),
    "close": (3, 57),
    "readv": (19, 65),
    "writev": (20, 66),
    "pread64": (17, 67),
    "lseek": (8, 62),
    "fstat": (5, 80),
    "newfstatat": (262, 79),
    "statx": (332, 291),
    "stat": (4, None),
    "lstat": (6, None),
    "access": (21, None),
    "faccessat": (269, 48),
    "faccessat2": (439, 439),
    "readlink": (89, None),
    "readlinkat": (267, 78),
    "getdents64": (217, 61),
    "getcwd": (79, 17),
    "chdir": (80, 49),
    "dup": (32, 23),
    "dup2": (33, None),
    "dup3": (292, 24),
    "pipe": (22, None),
    "pipe2": (293, 59),
    # waiting
    "poll": (7, None),
    "ppoll": (271, 73),
    "select": (23, None),
    "pselect6": (270, 72),
    "eventfd2": (290, 19),
    "epoll_create1": (291, 20),
    "epoll_ctl": (233, 21),
    "epoll_wait": (232, None),
    "epoll_pwait": (281, 22),
    "futex": (202, 98),
    "futex_waitv": (449, 449),
    "sched_yield": (24, 124),
    "restart_syscall": (219, 128),
    "nanosleep": (35, 101),
    "clock_nanosleep": (230, 115),
    "alarm": (37, None),
    "setitimer": (38, 103),
    # memory
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "munmap": (11, 215),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "brk": (12, 214),
    # the process itself
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "sigaltstack": (131, 132),
    "getpid": (39, 172),
    "getppid": (110, 173),
    "gettid": (186, 178),
    "getuid": (102, 174),
    "geteuid": (107, 175),
    "getgid": (104, 176),
    "getegid": (108, 177),
    "getpgrp": (111, None),
    "getpgid": (121, 155),
    "getsid": (124, 156),
    "getrusage": (98, 165),
    "getrlimit": (97, 163),
    "times": (100, 153),
    "getitimer": (36, 102),
    "rseq": (334, 293),
    "set_robust_list": (273, 99),
    "set_tid_address": (218, 96),
    "membarrier": (324, 283),
    "arch_prctl": (158, None),
    "exit": (60, 93),
    "exit_group": (231, 94),
    # the machine
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "gettimeofday": (96, 169),
    "time": (201, None),
    "getrandom": (318, 278),
    "uname": (63, 160),
    "sysinfo": (99, 179),
    "sched_getaffinity": (204, 123),
    "getcpu": (309, 168),
    # an event loop's pipe to itself
    "recvfrom": (45, 207),
}


@dataclass(frozen=True)
class _Condition:
    """An argument of a call: which one, the bits that count, and the values that they may have."""

    argument: int
    bits: int
    values: tuple[int, ...]
    is_pointer: bool = False


_CONDITIONAL: dict[str, tuple[tuple[int | None, int | None], tuple[_Condition, ...]]] = {
    # Without O_TRUNC, which empties a file that is opened for reading only. Landlock can deny it since Linux 6.2.
    "open": ((2, None), (_Condition(1, 0o1000, (0,)),)),
    "openat": ((257, 56), (_Condition(2, 0o1000, (0,)),)),
    # Duplicates, and the flags of a descriptor. Not F_SETOWN and F_SETSIG, which make the kernel send a signal to any process.
    "fcntl": ((72, 25), (_Condition(1, 0xFFFFFFFF, (0, 1, 2, 3, 4, 1030)),)),
    # TCGETS (isatty), FIONBIO (a non-blocking descriptor), FIONCLEX and FIOCLEX (inheritance)
    "ioctl": ((16, 29), (_Condition(1, 0xFFFFFFFF, (0x5401, 0x5421, 0x5450, 0x5451)),)),
    # Read limits of this process, never set them: root could raise them again.
    "prlimit64": ((302, 261), (_Condition(0, 0xFFFFFFFF, (0,)), _Condition(2, 0xFFFFFFFF, (0,), is_pointer=True))),
    # Two connected stream sockets of this process (AF_UNIX, SOCK_STREAM); those of datagrams could send to an address.
    "socketpair": ((53, 199), (_Condition(0, 0xFFFFFFFF, (1,)), _Condition(1, 0xF, (1,)))),
    "sendto": ((44, 206), (_Condition(4, 0xFFFFFFFF, (0,), is_pointer=True),)),
}

# Opcodes of classic BPF, and the actions of a filter.
_LOAD, _EQUAL, _AT_LEAST, _AND, _RETURN = 0x20, 0x15, 0x35, 0x54, 0x06
_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER, _MACHINE, _ARGUMENTS = 0, 4, 16
"""Offsets in the data that a filter sees."""
_X32 = 0x40000000
"""First number of the x32 calls, which have the same audit identifier as x86-64."""


def filter_program(machine: str | None = None) -> bytes:
    """Return the filter as an array of `struct sock_filter`.

    Args:
        machine: Optional. A key of `ARCHITECTURES`. Default: this machine.
    """
    found = ARCHITECTURES[machine or platform.machine()]
    lines = [
        (_LOAD, 0, 0, _MACHINE),
        (_EQUAL, 1, 0, found.audit),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, 0, 1, _X32),
        _refuse(),
    ]
    for numbers in _CALLS.values():
        if (number := numbers[found.column]) is not None:
            lines += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ALLOW)]
    for numbers, conditions in _CONDITIONAL.values():
        if (number := numbers[found.column]) is not None:
            checks = [line for condition in conditions for line in _check(condition)]
            lines += [(_EQUAL, 0, len(checks) + 1, number), *checks, (_RETURN, 0, 0, _ALLOW)]
    return b"".join(struct.pack("HBBI", *line) for line in [*lines, _refuse()])


def _refuse() -> tuple[int, int, int, int]:
    return (_RETURN, 0, 0, _ERROR | errno.EPERM)


def _check(condition: _Condition) -> list[tuple[int, int, int, int]]:
    """Return instructions that refuse the call unless the argument has one of the values."""
    low = _ARGUMENTS + 8 * condition.argument  # both architectures are little-endian
    count = len(condition.values)
    lines = [(_LOAD, 0, 0, low), (_AND, 0, 0, condition.bits)]
    lines += [(_EQUAL, count - index, 0, value) for index, value in enumerate(condition.values)]
    lines.append(_refuse())
    if condition.is_pointer:
        lines += [(_LOAD, 0, 0, low + 4), (_EQUAL, 1, 0, 0), _refuse()]
    return lines
