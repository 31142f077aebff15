"""Run a program whose files fail: ``failing_storage.py [options] -- program...``

The kernel does it: a filter of seccomp(2) answers system calls with an error
before they are begun, so any program can be given the same faults, without
root and without a broken disk.

``--error ENOSPC --of write,allocate --from 1073741824``
    reads and writes at this offset of any file, or behind it, fail so.
``--largest 1048576``
    a file can't grow beyond: a write is cut short there, the next one fails
    with EFBIG (setrlimit(2), RLIMIT_FSIZE).
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import os
import platform
import resource
import signal
import struct
import sys
from typing import Final

#: Number of a system call, and which of its arguments is the offset; <asm/unistd.h>.
CALLS: Final[dict[str, dict[str, tuple[tuple[int, int | None], ...]]]] = {
    "x86_64": {
        "read": ((17, 3), (295, 3), (327, 3)),  # pread64, preadv, preadv2
        "write": ((18, 3), (296, 3), (328, 3)),  # pwrite64, pwritev, pwritev2
        "allocate": ((285, 2),),  # fallocate
        "flush": ((74, None), (75, None)),  # fsync, fdatasync
    },
    "aarch64": {
        "read": ((67, 3), (69, 3), (286, 3)),
        "write": ((68, 3), (70, 3), (287, 3)),
        "allocate": ((47, 2),),
        "flush": ((82, None), (83, None)),
    },
}

# <linux/prctl.h>, <linux/seccomp.h>, <linux/bpf_common.h>
PR_SET_SECCOMP: Final = 22
PR_SET_NO_NEW_PRIVS: Final = 38
SECCOMP_MODE_FILTER: Final = 2
ALLOW: Final = 0x7FFF0000
FAIL: Final = 0x00050000
LOAD: Final = 0x20
IF_EQUAL: Final = 0x15
IF_GREATER_OR_EQUAL: Final = 0x35
RETURN: Final = 0x06
#: Where `struct seccomp_data` has the number of the call, and its arguments of eight bytes.
NUMBER: Final = 0
ARGUMENTS: Final = 16


def instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def rule(number: int, argument: int | None, begins: int, error: int) -> bytes:
    """This call fails, if its offset is `begins` or more (and less than 4 GiB)."""
    fail = instruction(RETURN, FAIL | error)
    if argument is None:
        return instruction(LOAD, NUMBER) + instruction(IF_EQUAL, number, 0, 1) + fail
    low = ARGUMENTS + 8 * argument
    return (
        instruction(LOAD, NUMBER)
        + instruction(IF_EQUAL, number, 0, 5)
        + instruction(LOAD, low + 4)
        + instruction(IF_EQUAL, 0, 0, 3)
        + instruction(LOAD, low)
        + instruction(IF_GREATER_OR_EQUAL, begins, 0, 1)
        + fail
    )


def let_calls_fail(kinds: list[str], begins: int, error: int) -> None:
    """Install the filter for this process and all that it becomes.

    :raise OSError: the system does not allow it.
    """
    calls = CALLS[platform.machine()]
    program = b"".join(rule(*call, begins, error) for kind in kinds for call in calls[kind])
    program += instruction(RETURN, ALLOW)
    kept = ctypes.create_string_buffer(program, len(program))
    described = struct.pack("@HP", len(program) // 8, ctypes.addressof(kept))
    libc = ctypes.CDLL(None, use_errno=True)
    zero = ctypes.c_ulong(0)
    if libc.prctl(PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), zero, zero, zero) or libc.prctl(
        PR_SET_SECCOMP, ctypes.c_ulong(SECCOMP_MODE_FILTER), described, zero, zero
    ):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--error", choices=dir(errno), metavar="ERROR")
    parser.add_argument("--of", default="read,write")
    parser.add_argument("--from", type=int, default=0, dest="begins")
    parser.add_argument("--largest", type=int)
    parser.add_argument("program", nargs="+")
    options = parser.parse_args()
    if options.largest is not None:
        # An ignored signal stays so in the program, which is told by the error then.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (options.largest, options.largest))
    if options.error is not None:
        let_calls_fail(options.of.split(","), options.begins, getattr(errno, options.error))
    os.execvp(options.program[0], options.program)


if __name__ == "__main__":
    sys.exit(main())
