"""From an emulator's options to the machine that they describe.

``-machine`` and ``-M`` may come several times; what the later one says counts,
property by property.  Few properties mean anything without a processor: they
are checked, as a typing error in them would be refused by QEMU, and forgotten.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any, Final

from qmpd.cli import option_values
from qmpd.cli.options import Nameless, Option, naming
from qmpd.errors import Error
from qmpd.machine import types
from qmpd.machine.command_line import MACHINE_CHOICES, MACHINE_PROPERTIES, PARAMETERS
from qmpd.machine.config import MachineConfig
from qmpd.machine.types import MachineType
from qmpd.qapi import keyval

#: Memory comes in units of this many bytes.
_GRANULE: Final = 8192
_MOST_SLOTS: Final = 256

#: The accelerator that would need something of the host, and those that there are here: a machine that
#: computes nothing is as fast with either.
_KVM: Final = "kvm"
_ACCELERATORS: Final = ("tcg", "qtest")
_NO_KVM: Final = "failed to initialize kvm: qmpd has no processor that KVM could run; tcg is taken"

_ACCELERATOR_PROPERTIES: Final[Mapping[str, tuple[str, ...]]] = {
    "tcg": ("one-insn-per-tb", "split-wx", "tb-size", "thread"),
    "qtest": (),
}

#: What QEMU's ``-machine`` hands on to the accelerator, and what is given by options of their own as well.
_ELSEWHERE: Final = ("accel", "igd-passthru", "kernel-irqchip", "kvm-shadow-mem")
_GROUPS: Final[Mapping[str, str]] = {"boot": "boot-opts", "memory": "memory", "smp": "smp-opts"}


def machine_config(found: Sequence[Option], program: str) -> tuple[MachineConfig, str | None]:
    """Return the machine that the options describe, and the id of the object that is to be its memory.

    :param program: the program's name, for warnings.
    :raise Error: in QEMU's words, if it can't be.
    """
    properties = _machine_properties(found)
    machine_type = types.find(properties.pop("type", types.DEFAULT.name))
    _choose_accelerator(found, properties.pop("accel", None), program)
    smp = properties.pop("smp", {})
    for name in _GROUPS:
        properties.pop(name, None)
    for name, value in properties.items():
        _check_property(machine_type, name, value)
    values: dict[str, Any] = {}
    for option in found:
        with naming(option):
            match option.name:
                case "name":
                    values["name"] = option_values.settings("name", option.value, "guest").get("guest")
                case "uuid":
                    values["uuid"] = option.value.lower()
                case "m":
                    values["memory"] = _memory(option.value, machine_type)
                case "smp":
                    smp |= keyval.parse(option.value, "cpus")
                case "S":
                    values["started"] = False
                case "no-shutdown":
                    values["no_shutdown"] = True
                case "no-reboot":
                    values["no_reboot"] = True
                case "action":
                    values |= _action(option.value)
    config = MachineConfig(type=machine_type.name, cpus=_processors(smp, machine_type), **values)
    return config, properties.get("memory-backend")


def _machine_properties(found: Sequence[Option]) -> dict[str, Any]:
    """What all of ``-machine`` and ``-M`` say together."""
    together: dict[str, Any] = {}
    for option in found:
        if option.name in ("machine", "M"):
            with naming(option):
                for name, value in machine_values(option.value).items():
                    if isinstance(value, dict) and isinstance(together.get(name), dict):
                        together[name] |= value
                    else:
                        together[name] = value
    return together


def machine_values(text: str) -> dict[str, Any]:
    """Read ``-machine``.

    :raise Error: in QEMU's words; HelpRequested, one of them, if the text asks for help.
    """
    if not text:
        return {}
    return {
        name.replace("_", "-") if name not in MACHINE_PROPERTIES else name: value
        for name, value in keyval.parse(text, "type").items()
    }


def _check_property(machine_type: MachineType, name: str, value: Any) -> None:
    property_ = MACHINE_PROPERTIES.get(name)
    if name in _ELSEWHERE:
        return
    if property_ is None or machine_type.family not in property_.families:
        raise Error(f"Property '{machine_type.name}-machine.{name}' not found")
    if property_.refused is not None:
        raise Error(f"Property '{machine_type.name}-machine.{name}' is not taken: {property_.refused}")
    if not isinstance(value, str):
        raise Error(f"Invalid parameter type for '{name}', expected: {property_.type}")
    if property_.type == "bool" and value not in keyval.SWITCH:
        raise Error(f"Parameter '{name}' expects 'on' or 'off'")
    if property_.type == "OnOffAuto" and value not in ("on", "off", "auto"):
        raise Error(f"Parameter '{name}' does not accept value '{value}'")
    if value not in MACHINE_CHOICES.get(name, (value,)):
        raise Error(f"Parameter '{name}' does not accept value '{value}'")
    if property_.type == "int":
        option_values.number(name, value)
    if property_.type == "size" and keyval.read_size(value) is None:
        raise Error(f"Parameter '{name}' expects size")


# Accelerators


def _choose_accelerator(found: Sequence[Option], listed: str | None, program: str) -> None:
    """See that there is one of the accelerators that may be taken; warn of those that there are not.

    :param listed: the names of ``-machine accel=``, separated by colons.
    :raise Error: there is none of them.
    """
    options = [option for option in found if option.name == "accel"]
    if listed is None:
        tried = [
            (option.value.split(",")[0].removeprefix("accel="), f"{option.text}: ") for option in options
        ]
    elif options:
        raise Error('The -accel and "-machine accel=" options are incompatible')
    else:
        tried = [(name, "") for name in listed.split(":") if name]
        if not tried:
            raise Error("no accelerator found")
    failures: list[str] = []
    for name, prefix in tried:
        if name in _ACCELERATORS:
            warnings = [*failures, f"falling back to {name}"] if failures else []
            print("".join(f"{program}: {line}\n" for line in warnings), end="", file=sys.stderr, flush=True)
            return
        failures.append(prefix + (_NO_KVM if name == _KVM else f"invalid accelerator {name}"))
    if failures:
        raise Error(failures[0])


def check_accel(text: str) -> None:
    """``-accel``: whether there is an accelerator of this name is seen when there is none of those given."""
    accelerator, *properties = text.split(",")
    name = accelerator.removeprefix("accel=")
    if name not in (_KVM, *_ACCELERATORS):
        raise Error(f"invalid accelerator {name}")
    for each in filter(None, properties):
        key, _, value = each.partition("=")
        if name == _KVM:
            continue
        if key not in _ACCELERATOR_PROPERTIES[name]:
            raise Error(f"Property '{name}-accel.{key}' not found")
        if key == "thread" and value not in ("single", "multi"):
            raise Error(f"Invalid 'thread' setting {value}")


# Memory and processors


def _memory(text: str, machine_type: MachineType = types.DEFAULT) -> int:
    """Read ``-m``: bytes.

    :param machine_type: says what no bytes mean.
    :raise Error: in QEMU's words.
    """
    given = option_values.settings("memory", with_unit(text), "size")
    size: int = given.get("size", 0) or machine_type.memory
    most: int = given.get("maxmem", 0)
    slots: int = given.get("slots", 0)
    if slots and not most:
        raise Nameless("slots specified but no max-size")
    if slots > _MOST_SLOTS:
        raise Nameless(f"unsupported amount of memory slots: {slots}")
    if most and most < size:
        raise Nameless(
            f"invalid value of maxmem: maximum memory size ({most:#x}) must be at least"
            f" the initial memory size ({size:#x})"
        )
    if slots and most == size:
        raise Nameless(
            "invalid value of maxmem: memory slots were specified but maximum memory size"
            f" ({most:#x}) is equal to the initial memory size ({size:#x})"
        )
    return -(-size // _GRANULE) * _GRANULE


def with_unit(text: str) -> str:
    """Give ``-m``'s size its unit, if it is a number alone: MiB."""
    return ",".join(
        part + "M"
        if part.removeprefix("size=").isdecimal() and (part.startswith("size=") or not position)
        else part
        for position, part in enumerate(text.split(","))
    )


def check_memory(text: str) -> None:
    """``-m``."""
    _memory(text)


#: How processors are put together, from the outside in; what machines of this architecture don't have may
#: only be 1.
_LEVELS: Final = ("drawers", "books", "sockets", "dies", "clusters", "modules", "cores", "threads")
_FOREIGN_LEVELS: Final = ("drawers", "books", "clusters")


def _processors(given: Mapping[str, Any], machine_type: MachineType) -> int:
    """Read ``-smp``: the number of processors, which must fit their topology.

    :raise Error: in QEMU's words.
    """
    counts: dict[str, int] = {}
    for name in PARAMETERS["smp-opts"]:
        if name in given:
            counts[name] = option_values.number(f"smp.{name}", given[name])
    for name in given:
        if name not in PARAMETERS["smp-opts"]:
            raise Error(f"Parameter 'smp.{name}' is unexpected")
    if 0 in counts.values():
        raise Error("Invalid CPU topology: CPU topology parameters must be greater than zero")
    for name in _FOREIGN_LEVELS:
        if counts.get(name, 1) != 1:
            raise Error(f"{name} > 1 not supported by this machine's CPU topology")
    for count in counts.values():
        if count < 0:
            raise _too_many(count, machine_type)
    levels = {name: counts.get(name, 1) for name in _LEVELS}
    most = counts.get("maxcpus", counts.get("cpus"))
    if most is None:
        most = prod(levels.values())
    else:
        # Whatever is missing makes up for the rest; the cores first.
        for name in ("cores", "sockets", "threads"):
            if name not in counts:
                levels[name] = most // prod(n for level, n in levels.items() if level != name)
                break
    cpus = counts.get("cpus", most)
    hierarchy = _hierarchy(levels)
    if prod(levels.values()) != most:
        raise Error(
            "Invalid CPU topology: product of the hierarchy must match maxcpus:"
            f" {hierarchy} != maxcpus ({most})"
        )
    if most < cpus:
        raise Error(
            "Invalid CPU topology: maxcpus must be equal to or greater than smp:"
            f" {hierarchy} == maxcpus ({most}) < smp_cpus ({cpus})"
        )
    if most > machine_type.cpu_max:
        raise _too_many(most, machine_type)
    return cpus


def _hierarchy(levels: Mapping[str, int]) -> str:
    return " * ".join(f"{name} ({count})" for name, count in _own_levels(levels))


def _own_levels(levels: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    return ((name, count) for name, count in levels.items() if name not in _FOREIGN_LEVELS)


def _too_many(count: int, machine_type: MachineType) -> Error:
    return Error(
        f"Invalid SMP CPUs {count}. The max CPUs supported by machine '{machine_type.name}'"
        f" is {machine_type.cpu_max}"
    )


#: What ``-action`` says that has an option of its own.
_AS_OPTIONS: Final[Mapping[tuple[str, str], tuple[str, bool]]] = {
    ("reboot", "shutdown"): ("no_reboot", True),
    ("reboot", "reset"): ("no_reboot", False),
    ("shutdown", "pause"): ("no_shutdown", True),
    ("shutdown", "poweroff"): ("no_shutdown", False),
}


def _action(text: str) -> dict[str, bool]:
    given = option_values.action(text)
    return dict(_AS_OPTIONS[pair] for pair in given.items() if pair in _AS_OPTIONS)


def check_machine(text: str) -> None:
    """``-machine``: its form; whether there is such a type and property is seen when all of it is known."""
    machine_values(text)
