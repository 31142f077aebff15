"""What an emulator's options may hold, as `query-command-line-options` shows it.

The command line is read by these tables too, so nothing is claimed that is not
taken.  QEMU lists the parameters of most options, and none of an option whose
parameters depend on its first one (``-device``, ``-object``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from qmpd.errors import Error


@dataclass(frozen=True, slots=True)
class MachineProperty:
    """A property of machines.

    :param type: ``bool``, ``OnOffAuto``, ``int``, ``size`` or ``string``.
    :param families: the families of machine types that have it.
    :param refused: why it can't be given, if it can't.
    """

    type: str
    families: tuple[str, ...]
    refused: str | None = None


_ALL: Final = ("pc", "q35", "none")
_PC: Final = ("pc", "q35")

_NO_GUEST: Final = "there is no guest that could boot"
_NO_MEMORY: Final = "there is no guest's memory"


def _properties(
    names: str, type_: str, families: tuple[str, ...] = _ALL, refused: str | None = None
) -> dict[str, MachineProperty]:
    return {name: MachineProperty(type_, families, refused) for name in names.split()}


#: The properties of machines.  Few of them could mean anything here; the rest can't matter, or are refused.
MACHINE_PROPERTIES: Final[Mapping[str, MachineProperty]] = {
    **_properties("aux-ram-share dump-guest-core graphics mem-merge suppress-vmdesc usb", "bool"),
    **_properties("default-bus-bypass-iommu fd-bootchk hmat hpet i8042 nvdimm sata smbus", "bool", _PC),
    **_properties("acpi pic pit smm vmport", "OnOffAuto", _PC),
    **_properties("max-fw-size max-ram-below-4g", "size", _PC),
    **_properties("dt-compatible firmware memory-backend", "string"),
    **_properties("phandle-start", "int"),
    **_properties(
        "bus-lock-ratelimit nvdimm-persistence pcspk-audiodev smbios-entry-point-type"
        " x-oem-id x-oem-table-id",
        "string",
        _PC,
    ),
    **_properties("x-south-bridge", "string", ("pc",)),
    **_properties("append dtb dumpdtb initrd kernel shim", "string", refused=_NO_GUEST),
    **_properties("confidential-guest-support memory-encryption smp-cache", "string", refused=_NO_MEMORY),
    **_properties("cxl cxl-fmw sgx-epc", "string", _PC, refused=_NO_MEMORY),
    **_properties("pflash0 pflash1", "string", _PC, refused="there is no firmware"),
}

#: The values that a property has, where it has only some.
MACHINE_CHOICES: Final[Mapping[str, tuple[str, ...]]] = {"smbios-entry-point-type": ("32", "64", "auto")}

#: How query-command-line-options shows the types of properties.  One that is on, off or auto is a boolean.
_SHOWN: Final[Mapping[str, str]] = {
    "bool": "boolean",
    "OnOffAuto": "boolean",
    "int": "number",
    "size": "size",
    "string": "string",
}


def _typed(**names: str) -> dict[str, str]:
    return {name: type_ for type_, listed in names.items() for name in listed.split()}


#: The parameters of options, and their types (CommandLineParameterType), under the names that QEMU lists
#: options by.  Of ``chardev`` there are those that do something here.
PARAMETERS: Final[Mapping[str, Mapping[str, str]]] = {
    "accel": {},
    "action": _typed(string="watchdog panic reboot shutdown"),
    "add-fd": _typed(string="opaque", number="set fd"),
    "boot-opts": _typed(
        boolean="strict menu", number="reboot-timeout splash-time", string="splash once order"
    ),
    "chardev": _typed(
        boolean="abstract nodelay server tight wait",
        string="backend fd host path port",
        size="size",
    ),
    "device": {},
    "global": _typed(string="value property driver"),
    "machine": {
        "type": "string",
        **{
            name: _SHOWN[property_.type]
            for name, property_ in MACHINE_PROPERTIES.items()
            if property_.refused is None
        },
    },
    "memory": _typed(size="maxmem size", number="slots"),
    "mon": _typed(boolean="pretty", string="chardev mode"),
    "msg": _typed(boolean="guest-name timestamp"),
    "name": _typed(boolean="debug-threads", string="process guest"),
    "numa": {},
    "object": {},
    "overcommit": _typed(boolean="cpu-pm", string="mem-lock"),
    "rtc": _typed(string="driftfix clock base"),
    "run-with": _typed(boolean="async-teardown"),
    "smp-opts": _typed(
        number="maxcpus threads cores modules clusters dies sockets books drawers cpus",
    ),
    "trace": _typed(string="file events enable"),
}


def options(wanted: str | None) -> Iterator[dict[str, Any]]:
    """The options (CommandLineOptionInfo), as `query-command-line-options` lists them.

    :param wanted: only this one.
    :raise Error: if there is none of this name.
    """
    if wanted is not None and wanted not in PARAMETERS:
        raise Error(f"invalid option name: {wanted}")
    for option, parameters in PARAMETERS.items():
        if wanted in (None, option):
            yield {
                "parameters": [{"name": name, "type": type_} for name, type_ in parameters.items()],
                "option": option,
            }
