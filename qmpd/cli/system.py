"""The program ``qmpd-system-x86_64``: qmpd behind the command line of an emulator.

What is asked for is made in QEMU's order, not in the order of the options: first
objects, then character devices, block nodes, monitors, and devices last.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Final

from qmpd import __version__
from qmpd.cli import system_options
from qmpd.cli.options import Answered, Option
from qmpd.cli.process import Settings, exit_status, run_daemon

PROGRAM: Final = "qmpd-system-x86_64"

HELP: Final = f"Usage: {PROGRAM} [OPTION]..."

#: The options that make something, in the order in which it is made.
_PHASES: Final = ("object", "chardev", "qmp", "blockdev", "nbd-server", "mon", "device-exports", "device")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program.

    :param arguments: without the program's name; those of the process if None.
    :return: the exit status: 0, or 1 after a line on standard error.
    """
    given = sys.argv[1:] if arguments is None else arguments
    return exit_status(PROGRAM, lambda: _run(given))


def _run(arguments: Sequence[str]) -> int:
    from qmpd.machine.config import MachineConfig

    found = []
    for option in system_options.scan(arguments):
        if option.name in ("h", "help"):
            raise Answered(HELP)
        if option.name == "version":
            raise Answered(f"QEMU emulator version 10.0.2 ({PROGRAM} {__version__})")
        found.append(option)
    values = {option.name: option.value for option in found}
    machine = MachineConfig(
        type=values.get("M", values.get("machine", "pc")).split(",")[0].removeprefix("type="),
        started="S" not in values,
        no_shutdown="no-shutdown" in values,
        no_reboot="no-reboot" in values,
    )
    settings = Settings(
        pid_file=values.get("pidfile"),
        daemonize="daemonize" in values,
        log_level=values.get("log", "warning"),
        loop=values.get("loop", "auto"),
    )
    return run_daemon(PROGRAM, lambda: settings, _in_order(found), machine)


def _in_order(found: Sequence[Option]) -> list[Option]:
    return [option for phase in _PHASES for option in found if option.name == phase]


if __name__ == "__main__":
    sys.exit(main())
