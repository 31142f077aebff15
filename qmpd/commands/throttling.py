"""Commands of `schema/throttling.json`: limits on what a guest's disk may do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from qmpd.block.throttle_groups import ThrottleGroup
from qmpd.block.throttling import LENGTH, UNLIMITED
from qmpd.commands.parts import Handler, Parts
from qmpd.errors import DeviceNotFound, Error

#: What the members of commands and answers are in ThrottleLimits.
_RATES: Final[Mapping[str, str]] = {
    f"{kind}{member}": f"{kind}-{direction}"
    for kind in ("bps", "iops")
    for member, direction in (("", "total"), ("_rd", "read"), ("_wr", "write"))
}
_LIMITS: Final[Mapping[str, str]] = {
    **_RATES,
    **{f"{member}_max": f"{name}-max" for member, name in _RATES.items()},
    **{f"{member}_max_length": f"{name}{LENGTH}" for member, name in _RATES.items()},
    "iops_size": "iops-size",
}


def block_set_io_throttle(parts: Parts, arguments: dict[str, Any]) -> dict[str, Any]:
    """Limit what is read from and written to a device's disk."""
    if ("id" in arguments) == ("device" in arguments):
        raise Error("Need exactly one of 'device' and 'id'")
    if "device" in arguments:
        raise DeviceNotFound(f"Device '{arguments['device']}' not found")
    device_id: str = arguments["id"]
    backend = parts.devices.backend(device_id)
    if backend.node.ejected:
        raise Error("Device has no medium")
    limits = {name: arguments.get(member, UNLIMITED[name]) for member, name in _LIMITS.items()}
    group = backend.throttle_group
    name = arguments.get("group", device_id if group is None else group.name)
    backend.set_limits(parts.objects.throttle_groups, limits, name)
    return {}


def limits_info(group: ThrottleGroup | None) -> dict[str, Any]:
    """The members of BlockDeviceInfo that are about limits, for a disk in `group`."""
    if group is None:
        return dict.fromkeys(_RATES, 0)
    limits = group.limits
    info: dict[str, Any] = {member: limits[name] for member, name in _RATES.items()}
    for member, name in _RATES.items():
        if burst := limits[f"{name}-max"]:
            info[f"{member}_max"] = burst
            info[f"{member}_max_length"] = limits[f"{name}{LENGTH}"]
    if limits["iops-size"]:
        info["iops_size"] = limits["iops-size"]
    return {**info, "group": group.name}


HANDLERS: Final[Mapping[str, Handler]] = {
    "block_set_io_throttle": block_set_io_throttle,
}
