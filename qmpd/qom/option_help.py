"""What ``help`` among the options of an object or a device is answered with."""

from __future__ import annotations

from qmpd.errors import DeviceNotFound
from qmpd.qapi import Schema
from qmpd.qapi.types import EnumType, ObjectType
from qmpd.qom.models import ALIASES, DEFAULTS, MODELS, OF_ALL_DEVICES, device_property_types
from qmpd.qom.object import OBJECT_TYPE_NAMES, schema_properties


def object_help(schema: Schema, type_name: object) -> str:
    """The list of object types, or of one type's properties if there is such a type."""
    options_type = schema.types["ObjectOptions"]
    assert isinstance(options_type, ObjectType), "object-add takes an object"
    if isinstance(type_name, str) and type_name in options_type.branches:
        properties = schema_properties(schema, options_type.branches[type_name], OBJECT_TYPE_NAMES)
        lines = sorted(f"  {name}=<{type_}>" for name, type_ in properties.items())
        return "\n".join([f"{type_name} options:", *lines])
    kinds = schema.types["ObjectType"]
    assert isinstance(kinds, EnumType), "ObjectType is an enum"
    return "\n".join(["List of user creatable objects:", *(f"  {value.name}" for value in kinds.values)])


def models_help() -> str:
    """The list of device models, each with the bus that it goes on and its other name."""
    others = {name: alias for alias, name in ALIASES.items()}
    return "\n".join(
        f'name "{model.name}", bus {model.bus}'
        + (f', alias "{others[model.name]}"' if model.name in others else "")
        for model in MODELS.values()
    )


def device_help(schema: Schema, driver: str) -> str:
    """The list of the properties that a device model has and not every device, with what they are by default.

    :raise DeviceNotFound: if there is no such model.
    """
    name = ALIASES.get(driver, driver)
    if name not in MODELS:
        raise DeviceNotFound(f"Device '{driver}' not found")
    types = device_property_types(schema, name)
    shown = sorted(f"  {key}=<{type_}>{_default(key)}" for key, type_ in types.items() if _is_own(key))
    return "\n".join([f"{name} options:", *shown])


def _is_own(name: str) -> bool:
    return name not in OF_ALL_DEVICES and not name.startswith("legacy-")


def _default(name: str) -> str:
    if name not in DEFAULTS:
        return ""
    default = DEFAULTS[name]
    return f" (default: {('on' if default else 'off') if isinstance(default, bool) else default})"
