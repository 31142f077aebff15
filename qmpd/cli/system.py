"""The program ``qmpd-system-x86_64``: qmpd behind the command line of an emulator.

All arguments are cut into options first, as QEMU does: one that does not exist
comes before everything else that is wrong.  Then each is looked at in its order,
and questions are answered.  What is asked for is made in QEMU's order, not in the
order of the options (:data:`_PHASES`), with one difference: clients are served
when the devices are there, which QEMU achieves by not listening to them before.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

from qmpd.cli import system_options
from qmpd.cli.machine_options import machine_config
from qmpd.cli.options import Answered, Option
from qmpd.cli.process import exit_status, read_settings, run_daemon

PROGRAM: Final = "qmpd-system-x86_64"

#: Options that make something, by the order in which it is made, and the names under which
#: :mod:`qmpd.cli.start` knows what is to be done.
_PHASES: Final[tuple[Mapping[str, str], ...]] = (
    {"add-fd": "add-fd"},
    {"object": "emulator-object"},
    {"chardev": "emulator-chardev", "qmp": "qmp-chardev", "qmp-pretty": "qmp-chardev", "qtest": "qtest"},
    {"blockdev": "blockdev"},
    {"memory-backend": "memory-backend"},
    {"memory": "memory"},
    {"nbd-server": "nbd-server"},
    {"export": "export"},
    {"device-exports": "device-exports"},
    {"device": "device"},
    {"mon": "mon", "qmp": "qmp-monitor", "qmp-pretty": "qmp-pretty"},
)

#: An object that is memory, in either spelling: QEMU makes it after the block nodes.
_MEMORY_BACKEND: Final = re.compile(
    r"""\A(?:(?:qom-type=)?|\{.*"qom-type"\s*:\s*")memory-backend-(?:file|memfd|ram)\b""", re.DOTALL
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program.

    :param arguments: without the program's name; those of the process if None.
    :return: the exit status: 0, or 1 after a line, and perhaps a hint below it, on standard error.
    """
    given = sys.argv[1:] if arguments is None else arguments
    return exit_status(PROGRAM, lambda: _run(given))


def _run(arguments: Sequence[str]) -> int:
    found = list(system_options.scan(arguments))
    for option in found:
        _answer(option)
        system_options.check(option)
    config, memory = machine_config(found, PROGRAM)
    if memory is not None:
        found.append(Option("memory", memory, None))
    return run_daemon(PROGRAM, lambda: read_settings(found), _in_order(found), config)


def _in_order(found: Sequence[Option]) -> list[Option]:
    """Return the options that make something, in the order in which it is made.

    Devices that are written in JSON come after the others.
    """
    kinds = [
        replace(option, name="memory-backend")
        if option.name == "object" and _MEMORY_BACKEND.search(option.value)
        else option
        for option in sorted(found, key=_is_json_device)
    ]
    return [
        replace(option, name=phase[option.name])
        for phase in _PHASES
        for option in kinds
        if option.name in phase
    ]


def _is_json_device(option: Option) -> bool:
    return option.name == "device" and option.value.startswith("{")


def _answer(option: Option) -> None:
    """Answer an option that is a question.

    :raise Answered: it was one.
    """
    words = re.split("[,=]", option.value)
    asks = "help" in words or "?" in words
    if option.name in ("h", "help", "version") or (asks and option.name in _QUESTIONS):
        from qmpd.cli import system_help

        answer = system_help.answer(option, PROGRAM)
        if answer is not None:
            raise Answered(answer)


#: Options of which lists can be had.  Those of objects and character devices are given where they are made.
_QUESTIONS: Final = ("accel", "audiodev", "cpu", "d", "device", "display", "M", "machine", "trace")


if __name__ == "__main__":
    sys.exit(main())
