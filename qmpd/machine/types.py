"""The types of machines, as `query-machines` shows them.

A type's version says in QEMU what a guest would find; here nothing depends on it.
There are all those that QEMU 10.0 does not call deprecated, so that a domain
written for QEMU can be started unchanged.

Two members that QEMU shows are left out, because there is nothing behind them:
``default-cpu-type``, and ``default-ram-id``, which makes libvirt describe the
memory as an object.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from qmpd.errors import Error


@dataclass(frozen=True, slots=True)
class MachineType:
    """A type of machines.

    :param name: its full name.
    :param family: what it is apart from its version: ``pc`` (i440FX), ``q35`` or ``none``.
    :param cpu_max: the most processors that may be asked for.
    :param alias: another name.
    :param memory: how many bytes it has if it is not told.
    :param default: it is taken if none is asked for.
    """

    name: str
    family: str
    cpu_max: int
    alias: str | None = None
    memory: int = 128 << 20
    default: bool = False

    @property
    def has_power_button(self) -> bool:
        """Whether anything is there that `system_powerdown` could reach."""
        return self.family != "none"

    def memory_of(self, told: int | None) -> int:
        """How many bytes a machine of this type has.

        :param told: how many it is to have, if that was said.
        """
        return self.memory if told is None else told

    def info(self) -> dict[str, Any]:
        """What `query-machines` says of it (MachineInfo)."""
        return {
            "hotpluggable-cpus": False,
            "name": self.name,
            "numa-mem-supported": False,
            "acpi": self.family != "none",
            **({"is-default": True} if self.default else {}),
            "cpu-max": self.cpu_max,
            "deprecated": False,
            **({} if self.alias is None else {"alias": self.alias}),
        }


#: The newest version; the family's short name stands for it.
_NEWEST: Final = "10.0"
_OLDER: Final = ("9.2", "9.1", "9.0", "8.2", "8.1", "8.0", "7.2", "7.1")

#: The processors that a q35 of an older version may have; a newer one may have 4096.
_OLDER_Q35_CPUS: Final[Mapping[str, int]] = {"8.2": 1024, "8.1": 1024, "8.0": 288, "7.2": 288, "7.1": 288}

_TYPES: Final = (
    MachineType(f"pc-i440fx-{_NEWEST}", "pc", 255, alias="pc", default=True),
    MachineType(f"pc-q35-{_NEWEST}", "q35", 4096, alias="q35"),
    *(MachineType(f"pc-i440fx-{version}", "pc", 255) for version in _OLDER),
    *(MachineType(f"pc-q35-{version}", "q35", _OLDER_Q35_CPUS.get(version, 4096)) for version in _OLDER),
    MachineType("none", "none", 1, memory=0),
)

#: The types by full name.
TYPES: Final[Mapping[str, MachineType]] = {type_.name: type_ for type_ in _TYPES}

_BY_ALIAS: Final[Mapping[str, MachineType]] = {type_.alias: type_ for type_ in _TYPES if type_.alias}

#: What is taken if none is asked for.
DEFAULT: Final = next(type_ for type_ in _TYPES if type_.default)


def infos(*, compat_props: bool) -> list[dict[str, Any]]:
    """What `query-machines` answers (MachineInfo).

    :param compat_props: also say what a version changes in devices, which is nothing.
    """
    return [type_.info() | ({"compat-props": []} if compat_props else {}) for type_ in TYPES.values()]


def find(name: str) -> MachineType:
    """Return the type with this name or alias.

    :raise Error: if there is none.
    """
    found = TYPES.get(name) or _BY_ALIAS.get(name)
    if found is None:
        raise Error(
            f'unsupported machine type: "{name}"',
            hint="Use -machine help to list supported machines",
        )
    return found
