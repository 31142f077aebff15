"""Commands of `schema/qom.json`: the object tree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from qmpd.commands.parts import Handler, Parts


async def object_add(parts: Parts, arguments: dict[str, Any]) -> dict[str, Any]:
    """Make an object."""
    await parts.objects.add(arguments)
    return {}


def object_del(parts: Parts, arguments: dict[str, Any]) -> dict[str, Any]:
    """Remove an object."""
    parts.objects.delete(arguments["id"])
    return {}


def qom_list(parts: Parts, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """The properties of an object."""
    return parts.objects.properties(arguments["path"])


def qom_get(parts: Parts, arguments: dict[str, Any]) -> Any:
    """The value of a property."""
    return parts.objects.get(arguments["path"], arguments["property"])


async def qom_set(parts: Parts, arguments: dict[str, Any]) -> dict[str, Any]:
    """Give a property a new value."""
    rest = parts.objects.set(arguments["path"], arguments["property"], arguments["value"])
    if rest is not None:
        await rest
    return {}


def qom_list_types(parts: Parts, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """Types of objects."""
    return parts.objects.list_types(arguments.get("implements"), abstract=arguments.get("abstract", False))


def qom_list_properties(parts: Parts, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """The properties of a type of objects."""
    return parts.objects.list_properties(arguments["typename"])


HANDLERS: Final[Mapping[str, Handler]] = {
    "object-add": object_add,
    "object-del": object_del,
    "qom-list": qom_list,
    "qom-get": qom_get,
    "qom-set": qom_set,
    "qom-list-types": qom_list_types,
    "qom-list-properties": qom_list_properties,
}
