"""Throttle groups: limits that several disks share.

No driver of qmpd throttles yet; the limits are checked and kept.  A limit is
set either as a member of ``limits``, at any time, or by a property of its own
with the prefix ``x-``, while the object is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from qmpd.errors import Error
from qmpd.qom.user_creatable import UserCreatable

if TYPE_CHECKING:
    from qmpd.qom.tree import ObjectTree

_VALUE_MAX: Final = 10**15
_LENGTH_MAX: Final = (1 << 32) - 1
_PREFIX: Final = "x-"
_LENGTH: Final = "-max-length"

_KINDS: Final = ("iops", "bps")
_DIRECTIONS: Final = ("total", "read", "write")

_DEFAULTS: Final[Mapping[str, int]] = {
    f"{kind}-{direction}{suffix}": value
    for kind in _KINDS
    for direction in _DIRECTIONS
    for suffix, value in (("", 0), ("-max", 0), ("-max-length", 1))
} | {"iops-size": 0}


class ThrottleGroup(UserCreatable):
    """The object type "throttle-group"."""

    qom_type = "throttle-group"
    struct = "ThrottleGroupProperties"

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__(options)
        self._limits = dict(_DEFAULTS)
        for name in options:
            if name.startswith(_PREFIX):
                if options[name] < 0:
                    raise Error("Property values cannot be negative")
                if name.endswith(_LENGTH) and options[name] > _LENGTH_MAX:
                    # Without the space: so QEMU writes it, here and not below.
                    raise Error(f"{name} value must be in therange [0, {_LENGTH_MAX}]")
                self._limits[name.removeprefix(_PREFIX)] = options[name]
        if "limits" in options:
            self._limits = merged(self._limits, options["limits"])

    async def complete(self, options: Mapping[str, Any], tree: ObjectTree) -> None:
        """Check the limits together.

        :raise Error: if they contradict each other.
        """
        check(self._limits)

    def get(self, name: str) -> Any:
        """All limits, or one."""
        return dict(self._limits) if name == "limits" else self._limits[name.removeprefix(_PREFIX)]

    def check_settable(self, name: str) -> None:
        """Refuse the members with the prefix: they are for making the group."""
        if name != "limits":
            raise Error("Property cannot be set after initialization")

    def set(self, name: str, value: Any) -> None:
        """Change the limits that `value` names.

        :raise Error: if they contradict each other.
        """
        self._limits = merged(self._limits, value)


def merged(limits: Mapping[str, int], changes: Mapping[str, int]) -> dict[str, int]:
    """The limits with some changed.

    :raise Error: if they contradict each other then.
    """
    for name, value in changes.items():
        if name.endswith(_LENGTH) and value > _LENGTH_MAX:
            raise Error(f"{name} value must be in the range [0, {_LENGTH_MAX}]")
    result = {**limits, **changes}
    check(result)
    return result


def check(limits: Mapping[str, int]) -> None:
    """See that the limits make sense together.

    :raise Error: if they don't.
    """
    for suffix in ("", "-max"):
        for kind in _KINDS:
            if limits[f"{kind}-total{suffix}"] and (
                limits[f"{kind}-read{suffix}"] or limits[f"{kind}-write{suffix}"]
            ):
                raise Error("bps/iops/max total values and read/write values cannot be used at the same time")
    if limits["iops-size"] and not any(limits[f"iops-{direction}"] for direction in _DIRECTIONS):
        raise Error("iops size requires an iops value to be set")
    for kind in _KINDS:
        for direction in _DIRECTIONS:
            name = f"{kind}-{direction}"
            _check_one(limits[name], limits[f"{name}-max"], limits[f"{name}-max-length"])


def _check_one(average: int, burst: int, length: int) -> None:
    if not (0 <= average <= _VALUE_MAX and 0 <= burst <= _VALUE_MAX):
        raise Error(f"bps/iops/max values must be within [0, {_VALUE_MAX}]")
    if length == 0:
        raise Error("the burst length cannot be 0")
    if length > 1 and not burst:
        raise Error("burst length set without burst rate")
    if burst and not 0 <= length <= _VALUE_MAX // burst:
        raise Error("burst length too high for this burst rate")
    if burst and not average:
        raise Error("bps_max/iops_max require corresponding bps/iops values")
    if burst and burst < average:
        raise Error("bps_max/iops_max cannot be lower than bps/iops")
