"""From settings to a running daemon, and from what went wrong to an exit status.

Both programs, ``qmpd`` and ``qmpd-system-x86_64``, begin and end here.  Importing
this is cheap on purpose: the daemon and its dependencies are only imported once a
daemon is to be started.
"""

from __future__ import annotations

import gc
import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

from qmpd.cli.options import Answered, Option, naming
from qmpd.errors import Error

if TYPE_CHECKING:
    from qmpd.machine.config import MachineConfig

_LOG_LEVELS: Final = ("error", "warning", "info", "debug")
_MOST_PROCESSES: Final = 64
_LOOPS: Final = ("auto", "uvloop", "asyncio")
#: The least that argon2 takes in a header of cryptsetup's, in KiB.
_LEAST_PBKDF_MEMORY: Final = 32
_STANDARD_ERROR: Final = 2


@dataclass
class Settings:
    """What the options say about the process itself.

    :param pid_file: where to write the process id once everything is ready; None for nowhere.
    :param log_level: the least that is logged: error, warning, info or debug.
    :param loop: the event loop: auto, uvloop or asyncio.
    :param cipher_processes: how many processes cipher long requests beside this one; None for as
        many as suit the computer.
    :param pbkdf_memory: what key derivations may take together, in KiB; None for what is usual.
    :param daemonize: whether to go to the background once everything is ready.
    """

    pid_file: str | None = None
    log_level: str = "warning"
    loop: str = "auto"
    cipher_processes: int | None = None
    pbkdf_memory: int | None = None
    daemonize: bool = False


def read_settings(found: Sequence[Option]) -> Settings:
    """Return what the options say about the process.

    :raise Error: a value is wrong.
    """
    settings = Settings()
    for option in found:
        with naming(option):
            match option.name:
                case "pidfile":
                    settings.pid_file = option.value
                case "daemonize":
                    settings.daemonize = True
                case "log":
                    settings.log_level = _one_of(_LOG_LEVELS, option.value)
                case "loop":
                    settings.loop = _one_of(_LOOPS, option.value)
                case "cipher-processes":
                    settings.cipher_processes = _number_or_auto(option.value)
                case "pbkdf-memory-max":
                    settings.pbkdf_memory = _kibibytes(option.value)
    return settings


def _number_or_auto(value: str) -> int | None:
    if value == "auto":
        return None
    if not (value.isdecimal() and value.isascii() and int(value) <= _MOST_PROCESSES):
        raise Error(f"'{value}' is neither auto nor a number up to {_MOST_PROCESSES}")
    return int(value)


def _kibibytes(value: str) -> int:
    """Return a size as whole KiB, as many as it has."""
    from qmpd.qapi.keyval import read_size  # a daemon is to be started: see the head of this file

    size = read_size(value)
    if size is None:
        raise Error(f"'{value}' is no size such as 512M")
    if size >> 10 < _LEAST_PBKDF_MEMORY:
        raise Error(f"'{value}' is less than {_LEAST_PBKDF_MEMORY}K, with which no key can be derived")
    return size >> 10


def _one_of(choice: Sequence[str], value: str) -> str:
    if value not in choice:
        raise Error(f"'{value}' is none of {', '.join(choice)}")
    return value


def exit_status(program: str, run: Callable[[], int]) -> int:
    """Run a program's body.

    :param program: its name, for what is said of errors.
    :return: what `run` returns; 0 if a question was answered; 1 after a line, and perhaps a hint
        below it, on standard error.
    """
    try:
        try:
            return run()
        except Answered as answer:
            print(answer, flush=True)
            return 0
    except Error as error:
        _complain(program, error)
        return 1
    except BrokenPipeError:
        # Whoever read our output has gone; Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _complain(program: str, error: Error) -> None:
    """Say what went wrong: in one line, even if a JSON text was written on several; a hint may follow."""
    lines = [f"{program}: {' '.join(str(error).splitlines())}", *error.hint.splitlines()]
    print("\n".join(lines), file=sys.stderr, flush=True)
    until_read(_STANDARD_ERROR)


def until_read(descriptor: int, longest: float = 1.0) -> None:
    """Wait until somebody has read what is in a pipe.

    libvirt looks for the reason of a failed start in the log, as soon as the monitor closes; but the log is
    written by another process of libvirt's, which may not have read our standard error by then.

    :param descriptor: one end of the pipe; for anything else there is nothing to wait for.
    :param longest: seconds to wait: perhaps nobody reads before we have ended.
    """
    import fcntl  # hardly any start fails: see the head of this file
    import termios

    deadline = time.monotonic() + longest
    try:
        while stat.S_ISFIFO(os.fstat(descriptor).st_mode) and time.monotonic() < deadline:
            unread = fcntl.ioctl(descriptor, termios.FIONREAD, bytes(4))
            if not int.from_bytes(unread, sys.byteorder):
                return
            time.sleep(0.002)
    except OSError:  # it is closed, or can't tell
        pass


def run_daemon(
    program: str,
    read_settings: Callable[[], Settings],
    found: Sequence[Option],
    machine: MachineConfig | None = None,
) -> int:
    """Run a daemon until it ends.

    :param program: its name, for what is said of errors.
    :param read_settings: what the options say about the process; may raise errors about them.
    :param found: what to start with, in order.
    :param machine: the machine of an emulator; None for a storage daemon.
    :return: the exit status: 0, or 1 if it could not be started, of which the reason has been said.
    :raise Error: the settings are wrong.
    :raise Answered: an option was a question.
    """
    # What the start makes stays: looking for garbage in it is in vain.  `serve` switches it on again.
    gc.disable()
    # Imported here for the sake of --version: see the head of this file.
    from qmpd.cli.daemonize import Daemonization, allow_locked_memory, forbid_core_dumps
    from qmpd.cli.systemd import Notifier, passed_sockets

    # Here, because the arguments may hold a passphrase: in the process that waits for a daemon in the
    # background as well as in the daemon.
    forbid_core_dumps()
    allow_locked_memory()
    settings = read_settings()
    # The process that systemd started has to ask for its sockets, and a fork has to come before the import of
    # libraries that start threads.
    sockets = passed_sockets(os.environ)
    background = Daemonization.begin() if settings.daemonize else None

    from qmpd.cli.serve import serve

    status = serve(
        found,
        settings,
        sockets=sockets,
        notifier=Notifier(os.environ),
        background=background,
        complain=partial(_complain, program),
        machine=machine,
    )
    _leave_threads_behind(status)
    return status


def _leave_threads_behind(status: int) -> None:
    """End the process although a thread is still deriving a key, which can't be interrupted.

    Everything has been closed by now, and Python would wait for the thread.
    """
    deadline = time.monotonic() + 0.5
    for thread in threading.enumerate():
        if thread is not threading.main_thread() and not thread.daemon:
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
