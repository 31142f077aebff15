"""Commands of `schema/emulator.json`: what an emulator tells about itself and its machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from qmpd.commands.parts import Handler, Parts
from qmpd.machine import command_line, cpu_models, types


def query_target(parts: Parts, arguments: dict[str, Any]) -> dict[str, Any]:
    """The architecture."""
    return {"arch": "x86_64"}


def query_machines(parts: Parts, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """The types of machines."""
    return types.infos(compat_props=arguments.get("compat-props", False))


def query_current_machine(parts: Parts, arguments: dict[str, Any]) -> dict[str, Any]:
    """What this machine can do."""
    return {"wakeup-suspend-support": False}


def query_iothreads(parts: Parts, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """The objects of the type ``iothread``."""
    return parts.objects.iothreads()


def query_memdev(parts: Parts, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """The objects that would hold memory."""
    return parts.objects.memory_backends()


def query_name(parts: Parts, arguments: dict[str, Any]) -> dict[str, Any]:
    """The machine's name."""
    name = parts.machine.config.name
    return {} if name is None else {"name": name}


def query_uuid(parts: Parts, arguments: dict[str, Any]) -> dict[str, Any]:
    """The machine's UUID."""
    return {"UUID": str(parts.machine.uuid)}


def query_memory_size_summary(parts: Parts, arguments: dict[str, Any]) -> dict[str, Any]:
    """How much memory the machine has on paper."""
    return {"base-memory": parts.machine.memory, "plugged-memory": 0}


def device_list_properties(parts: Parts, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """The properties of a type of devices."""
    return parts.objects.list_device_properties(arguments["typename"])


def query_pci(parts: Parts, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """The devices on the root bus."""
    return parts.devices.pci_info()


def query_command_line_options(parts: Parts, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """The options of the command line."""
    return list(command_line.options(arguments.get("option")))


def query_cpu_definitions(parts: Parts, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """The models of processors that may be asked for."""
    return cpu_models.definitions()


def query_cpu_model_expansion(parts: Parts, arguments: dict[str, Any]) -> dict[str, Any]:
    """What a model of processors has."""
    return cpu_models.expansion(arguments["type"], arguments["model"])


HANDLERS: Final[Mapping[str, Handler]] = {
    "device-list-properties": device_list_properties,
    "query-command-line-options": query_command_line_options,
    "query-pci": query_pci,
    "query-target": query_target,
    "query-machines": query_machines,
    "query-cpu-definitions": query_cpu_definitions,
    "query-cpu-model-expansion": query_cpu_model_expansion,
    "query-current-machine": query_current_machine,
    "query-iothreads": query_iothreads,
    "query-memdev": query_memdev,
    "query-name": query_name,
    "query-uuid": query_uuid,
    "query-memory-size-summary": query_memory_size_summary,
}
