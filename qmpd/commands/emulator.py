"""Commands of `schema/emulator.json`: what an emulator tells about itself and its machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from qmpd.commands.parts import Handler, Parts
from qmpd.errors import Error
from qmpd.machine import absent, command_line, types


def query_target(parts: Parts, arguments: dict[str, Any]) -> dict[str, Any]:
    """The architecture."""
    return {"arch": "x86_64"}


def query_kvm(parts: Parts, arguments: dict[str, Any]) -> dict[str, Any]:
    """Whether the kernel runs the guest."""
    return {"enabled": False, "present": False}


def query_machines(parts: Parts, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """The types of machines."""
    return [machine_type.info() for machine_type in types.TYPES.values()]


def query_current_machine(parts: Parts, arguments: dict[str, Any]) -> dict[str, Any]:
    """What this machine can do."""
    return {"wakeup-suspend-support": False}


def query_iothreads(parts: Parts, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """The objects of the type ``iothread``."""
    return parts.objects.iothreads()


def query_name(parts: Parts, arguments: dict[str, Any]) -> dict[str, Any]:
    """The machine's name."""
    name = parts.machine.config.name
    return {} if name is None else {"name": name}


def query_uuid(parts: Parts, arguments: dict[str, Any]) -> dict[str, Any]:
    """The machine's UUID."""
    return {"UUID": str(parts.machine.uuid)}


def query_memory_size_summary(parts: Parts, arguments: dict[str, Any]) -> dict[str, Any]:
    """How much memory the machine has on paper."""
    return {"base-memory": parts.machine.config.memory, "plugged-memory": 0}


def device_list_properties(parts: Parts, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """The properties of a type of devices."""
    return parts.objects.list_properties(arguments["typename"])


def query_command_line_options(parts: Parts, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """The options of the command line."""
    return list(command_line.options(arguments.get("option")))


def _empty(parts: Parts, arguments: dict[str, Any]) -> list[Any]:
    return []


def _refusal(error_class: type[Error], text: str) -> Handler:
    def refuse(parts: Parts, arguments: dict[str, Any]) -> None:
        raise error_class(text)

    return refuse


HANDLERS: Final[Mapping[str, Handler]] = {
    "device-list-properties": device_list_properties,
    "query-command-line-options": query_command_line_options,
    "query-target": query_target,
    "query-kvm": query_kvm,
    "query-machines": query_machines,
    "query-current-machine": query_current_machine,
    "query-iothreads": query_iothreads,
    "query-name": query_name,
    "query-uuid": query_uuid,
    "query-memory-size-summary": query_memory_size_summary,
    **dict.fromkeys(absent.LISTS, _empty),
    **{name: _refusal(*refusal) for name, refusal in absent.REFUSALS.items()},
}
