"""A daemon's life as a process: event loop, signals, pid file, and word to whoever waits for it.

SIGTERM, SIGINT and SIGHUP end a running daemon as ``quit`` does, with status
0; one that is still starting (it may be waiting for a client, ``wait=on``)
gives up at once.  Either way sockets and the pid file are removed.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any, Final

from qmpd.cli.daemonize import Daemonization, PidFile
from qmpd.cli.memory import keep_freed_memory
from qmpd.cli.options import Option
from qmpd.cli.process import Settings
from qmpd.cli.start import Start
from qmpd.cli.systemd import Notifier, PassedSocket
from qmpd.daemon import Daemon
from qmpd.errors import Error, trace
from qmpd.machine.config import MachineConfig

_logger = logging.getLogger(__name__)

#: More processes for ciphering are not worth their memory, unless somebody asks for them.
_MOST_CIPHER_PROCESSES: Final = 4


def serve(
    found: Sequence[Option],
    settings: Settings,
    *,
    sockets: Sequence[PassedSocket],
    notifier: Notifier,
    background: Daemonization | None,
    complain: Callable[[Error], None],
    machine: MachineConfig | None = None,
) -> int:
    """Start a daemon, say that it is ready, and return when it has ended.

    :param found: what to start with, in order.
    :param settings: what is wanted of the process.
    :param sockets: passed by systemd, to be served too.
    :param notifier: told when the daemon is ready and when it stops.
    :param background: completed when the daemon is ready; None in the foreground.
    :param complain: says why the daemon could not be started.
    :param machine: the machine of an emulator; None for a storage daemon.
    :return: the exit status: 0, or 1 after a complaint.
    :raise Error: there is no such event loop.
    :raise Answered: an option was a question.
    """
    logging.basicConfig(
        level=settings.log_level.upper(), format="qmpd: %(levelname)s: %(message)s", stream=sys.stderr
    )
    # Python ignores it too, unless whoever started us had other ideas.
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    keep_freed_memory()
    with asyncio.Runner(loop_factory=_loop_factory(settings.loop)) as runner:
        cipher_processes = settings.cipher_processes
        if cipher_processes is None:
            cipher_processes = min(_MOST_CIPHER_PROCESSES, len(os.sched_getaffinity(0)) - 1)
        make_daemon = partial(
            Daemon, cipher_processes=cipher_processes, pbkdf_memory=settings.pbkdf_memory, machine=machine
        )
        return runner.run(
            _live(found, make_daemon, settings.pid_file, sockets, notifier, background, complain)
        )


def _loop_factory(loop: str) -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return what makes the event loop; None is asyncio's own.

    :raise Error: uvloop is asked for and not installed.
    """
    if loop == "asyncio":
        return None
    try:
        import uvloop
    except ImportError:
        if loop == "uvloop":
            raise Error("--loop uvloop: uvloop is not installed") from None
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


async def _live(
    found: Sequence[Option],
    make_daemon: Callable[[], Daemon],
    pid_path: str | None,
    sockets: Sequence[PassedSocket],
    notifier: Notifier,
    background: Daemonization | None,
    complain: Callable[[Error], None],
) -> int:
    asyncio.get_running_loop().set_exception_handler(_log_fault)
    daemon = make_daemon()
    if not daemon.locks_keys:
        _logger.info("keys are not locked in memory: the system does not allow it (RLIMIT_MEMLOCK)")
    ending = _Ending(daemon)
    pid_file: PidFile | None = None
    try:
        await ending.interruptible(Start(daemon, background is not None).run(found, sockets))
        # The garbage collector need never look at what is there by now.
        gc.freeze()
        gc.enable()
        if ending.wanted:
            return 0
        if pid_path is not None:
            pid_file = PidFile(pid_path)
        if background is not None:
            background.complete()
        notifier.send("READY=1", "STATUS=Serving QMP", f"MAINPID={os.getpid()}")
        watchdog = asyncio.create_task(_feed_watchdog(notifier))
        try:
            await daemon.run()
        finally:
            watchdog.cancel()
            notifier.send("STOPPING=1", "STATUS=Closing")
    except Error as error:
        # Before the monitor closes: libvirt looks for the reason as soon as that happens.
        complain(error)
        return 1
    finally:
        await daemon.close()
        if pid_file is not None:
            pid_file.remove()
    return 0


def _log_fault(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log an exception that nobody caught, without its text or what else asyncio would show of it."""
    error = context.get("exception")
    what = context["message"].partition("(")[0]  # of a callback, without its arguments
    _logger.error("%s\n%s", what, trace(error) if error is not None else "")


class _Ending:
    """What the signals do, from here to the loop's end: a second one must not cut the closing short."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._starting: asyncio.Task[None] | None = None
        #: Whether a signal came.
        self.wanted = False
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, self._end)

    def _end(self) -> None:
        self.wanted = True
        if self._starting is not None:
            self._starting.cancel()
        else:
            self._daemon.signalled()

    async def interruptible(self, start: Coroutine[object, object, None]) -> None:
        """Wait for the start's end, or for a signal."""
        self._starting = asyncio.create_task(start)
        try:
            await self._starting
        except asyncio.CancelledError:
            if not self.wanted:
                raise
        finally:
            self._starting = None


async def _feed_watchdog(notifier: Notifier) -> None:
    """Tell systemd, as often as it wants to hear it, that the event loop turns."""
    while notifier.watchdog_interval is not None:
        notifier.send("WATCHDOG=1")
        await asyncio.sleep(notifier.watchdog_interval)
