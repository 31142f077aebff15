"""What the emulator's options answer when they are questions: ``-help``, ``-version``, ``-machine help`` ...

The lists hold what there is here, which is less than in QEMU.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Mapping
from itertools import groupby
from typing import Final

from qmpd import __version__
from qmpd.cli.options import Option, naming
from qmpd.cli.system_options import OPTIONS, Fate, SystemOption
from qmpd.errors import Error
from qmpd.machine import cpu_models, types
from qmpd.machine.command_line import MACHINE_PROPERTIES

_WIDTH: Final = 79

_ABOUT: Final = """\
Usage: {program} [OPTION]...

A storage daemon behind the command line of QEMU's emulator for x86_64, for
libvirt and other management code.  It is a machine without a processor: disks
are plugged in and out, encrypted ones are unlocked and written to by clients,
and nothing ever computes.  There is no guest, no KVM, no memory, no display,
no sound, no network, and nothing boots.

Options have one dash or two, and their value is the next argument.  In a
VALUE of key=value,... commas are doubled inside values; -object, -blockdev
and -device also take a JSON object.
"""

_EXAMPLES: Final = """\
Example:
  {program} -M q35 -nodefaults -display none -S \\
      -device pcie-root-port,id=port1 \\
      -qmp unix:/run/machine.sock,server=on,wait=off
"""


def answer(option: Option, program: str) -> str | None:
    """The answer to an option that is a question; None if there is no list of what it asks for.

    :param program: the program's name.
    :raise Error: it asks about something that is not there.
    """
    if option.name in ("h", "help"):
        return usage(program)
    if option.name == "version":
        return version(program)
    if option.name in _TEXTS:
        return _TEXTS[option.name]
    with naming(option):
        return _ANSWERS[option.name](option)


def version(program: str) -> str:
    """The version: that of QEMU, whose behaviour this is and which tools look for, and ours."""
    return (
        f"QEMU emulator version 10.0.2 (qmpd {__version__})\n{program} is no QEMU: it has its command line."
    )


def usage(program: str) -> str:
    """What ``-help`` shows, made of the table of options."""
    return "\n".join(
        [
            _ABOUT.format(program=program),
            "What does something:",
            *_acting(),
            "",
            "What is accepted, because it can't matter here:",
            *_acceptances(),
            "",
            "What is refused:",
            *_refusals(),
            "",
            _EXAMPLES.format(program=program).rstrip("\n"),
        ]
    )


def _acting() -> Iterator[str]:
    for option in OPTIONS.values():
        if option.fate is Fate.ACTS:
            name = f"-{option.name} {option.value or ''}".rstrip()
            yield from textwrap.wrap(
                name, _WIDTH, initial_indent="  ", subsequent_indent=" " * 6, break_on_hyphens=False
            )
            yield from textwrap.wrap(
                option.about,
                _WIDTH,
                initial_indent=" " * 20,
                subsequent_indent=" " * 20,
                break_on_hyphens=False,
            )


def _acceptances() -> list[str]:
    """Show an option with its value where that is the only one which can't matter: where it is a word."""
    accepted = [option for option in OPTIONS.values() if option.fate is Fate.ACCEPTED]
    words = [
        f"-{option.name}" + (f"\0{option.value}" if option.value and not option.value.isupper() else "")
        for option in accepted
    ]
    # An option and its value stay together: what looks like one word is not broken.
    wrapped = textwrap.wrap(
        " ".join(words), _WIDTH, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False
    )
    return [line.replace("\0", " ") for line in wrapped]


def _names(options: Iterator[SystemOption], ending: str = "") -> list[str]:
    names = " ".join(f"-{option.name}" if option.name else "IMAGE" for option in options)
    return textwrap.wrap(
        names + ending, _WIDTH, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False
    )


def _refusals() -> Iterator[str]:
    refused = [option for option in OPTIONS.values() if option.fate is Fate.REFUSED]
    for (about, harmless), options in groupby(refused, lambda option: (option.about, option.harmless)):
        but = f" (but {' and '.join(harmless)} are taken)" if len(harmless) > 1 else ""
        but = but or "".join(f" (but {value} is taken)" for value in harmless)
        yield from _names(options, f": {about}{but}")


# Lists


def _machines(option: Option) -> str:
    about = {"pc": "a PCI bus", "q35": "a PCI Express bus", "none": "nothing at all"}
    words = option.value.split(",")
    wanted = words[0].removeprefix("type=")
    try:
        machine_type = types.find(wanted)
    except Error:
        lines = ["Supported machines are:"]
        for each in types.TYPES.values():
            text = about[each.family]
            if each.alias:
                lines.append(f"{each.alias:<20} {text} (alias of {each.name})")
            lines.append(f"{each.name:<20} {text}{' (default)' if each.default else ''}")
        return "\n".join(lines)
    properties = [
        f"  {name}=<{property_.type}>"
        for name, property_ in sorted(MACHINE_PROPERTIES.items())
        if property_.refused is None and machine_type.family in property_.families
    ]
    return "\n".join([f"{machine_type.name}-machine options:", *properties])


def _cpus(option: Option) -> str:
    names = "\n".join(f"  {name}" for name in sorted(cpu_models.NAMES, key=str.lower))
    return f"Available CPUs (names only: there is no processor):\n{names}"


def _devices(option: Option) -> str | None:
    from qmpd.qapi import SYSTEM_SCHEMA, load, schema_directory
    from qmpd.qom.option_help import device_help, models_help

    if option.value.startswith("{"):
        return None
    model, *properties = option.value.split(",")
    model = model.removeprefix("driver=")
    if model in ("help", "?"):
        return models_help()
    if not {"help", "?"} & set(properties):
        return None
    return device_help(load(schema_directory(), SYSTEM_SCHEMA), model)


#: Answers that do not depend on the question.
_TEXTS: Final[Mapping[str, str]] = {
    "accel": "Accelerators supported in QEMU binary:\ntcg",
    "audiodev": "Available audio drivers:\nnone",
    "d": "There are no log items; -log takes a level.",
    "display": "Available display backend types:\nnone",
    "trace": "There are no trace events.",
}

_ANSWERS: Final[Mapping[str, Callable[[Option], str | None]]] = {
    "M": _machines,
    "cpu": _cpus,
    "device": _devices,
    "machine": _machines,
}
