"""The emulator's command line, in qemu-system's spelling: one dash or two, the value in the next argument.

:data:`OPTIONS` says of each option whether it takes a value.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from qmpd.cli.options import Option, OptionError

_WITH_VALUE: Final = """
    accel action add-fd audio audiodev blockdev boot chardev cpu device display global m machine M mon msg
    name object overcommit pidfile qmp rtc run-with sandbox smp uuid watchdog-action
    cipher-processes device-exports log loop nbd-server pbkdf-memory-max
"""
_WITHOUT_VALUE: Final = "daemonize h help no-reboot no-shutdown no-user-config nodefaults nographic S version"

#: All options there are, and whether they take a value.
OPTIONS: Final[Mapping[str, bool]] = {
    **dict.fromkeys(_WITH_VALUE.split(), True),
    **dict.fromkeys(_WITHOUT_VALUE.split(), False),
}


def scan(arguments: Sequence[str]) -> Iterator[Option]:
    """Cut the arguments (without the program's name) into options, lazily and in order.

    :raise OptionError: in QEMU's words, when the wrong argument is reached.
    """
    waiting = iter(arguments)
    for argument in waiting:
        if not argument.startswith("-"):
            yield Option("", argument, argument)
            continue
        name = argument.removeprefix("-").removeprefix("-")
        if name not in OPTIONS:
            raise OptionError(f"{argument}: invalid option")
        if not OPTIONS[name]:
            yield Option(name, "", argument)
            continue
        value = next(waiting, None)
        if value is None:
            raise OptionError(f"{argument}: requires an argument")
        yield Option(name, value, f"{argument} {value}")
