"""A device that is plugged in, as an object of the tree."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from qmpd.block.backend import Backend
from qmpd.errors import Error
from qmpd.qapi import Schema
from qmpd.qom.buses import Bus
from qmpd.qom.models import DEFAULTS, REALIZED, Model, device_property_types
from qmpd.qom.object import Object, Property

#: What nobody may set, whatever else is refused about a device.
_FIXED: Final = frozenset(
    {"parent_bus", "hotplugged", "hotpluggable", "legacy-addr", "busnr", "virtio-backend"}
)


class DeviceHalf(Object):
    """A device, or the half of a virtio device that is behind its PCI half.

    :param whole: the device that it is (a part of).
    """

    def __init__(self, type_name: str, whole: Device | None = None) -> None:
        super().__init__(type_name)
        self.whole = whole
        #: What moves its data; None if this half has no drive.
        self.backend: Backend | None = None

    @property
    def device(self) -> Device:
        """The whole device."""
        assert self.whole is not None
        return self.whole

    def own_properties(self) -> Mapping[str, Property]:
        """The properties of its type."""
        types = device_property_types(self.device.schema, self.type_name)
        return {name: self._property(name, type_) for name, type_ in types.items()}

    def _property(self, name: str, type_: str) -> Property:
        device = self.device
        if name == "hotpluggable":
            return Property(
                name, type_, lambda: self is device and device.bus.hotplug and device.model.pluggable
            )
        if name == "parent_bus":
            return Property(name, type_, lambda: device.bus.path if self is device else "")
        setter = None if name in _FIXED else lambda value: device.change(name, value)
        return Property(name, type_, lambda: device.value(name), setter)


class Device(DeviceHalf):
    """A device on a bus.

    :param model: what it is.
    :param schema: has the struct with its properties.
    :param device_id: its id, or None.
    :param bus: where it is plugged in.
    :param hotplugged: it came after the start.
    """

    def __init__(
        self, model: Model, schema: Schema, device_id: str | None, bus: Bus, *, hotplugged: bool
    ) -> None:
        super().__init__(model.name)
        self.whole = self
        self.model = model
        self.schema = schema
        self.device_id = device_id
        self.bus = bus
        self.hotplugged = hotplugged
        #: The properties' values, in QAPI's form.
        self.values: dict[str, Any] = {**REALIZED, **DEFAULTS}
        #: The names of those that the client gave.
        self.given: frozenset[str] = frozenset()
        #: The bus that it provides.
        self.own_bus: Bus | None = None
        #: Changes the properties that may be changed while it is plugged in; by name.
        self.setters: Mapping[str, Callable[[Any], Awaitable[None] | None]] = {}

    @property
    def inner(self) -> DeviceHalf:
        """The half that does the work: the device itself, unless it is a virtio device."""
        half = self.children.get("virtio-backend")
        return half if isinstance(half, DeviceHalf) else self

    def leaving(self) -> list[Device]:
        """All that goes when this device is unplugged, in that order."""
        return [each for other in self.bus.unplugged_with(self) for each in other.with_children()]

    def with_children(self) -> list[Device]:
        """All that is plugged into this device, the last one first, and then itself."""
        below = self.own_bus.devices if self.own_bus is not None else []
        return [each for child in reversed(below) for each in child.with_children()] + [self]

    def value(self, name: str) -> Any:
        """The value of a property."""
        match name:
            case "realized":
                return True
            case "hotplugged":
                return self.hotplugged
            case "virtio-backend":
                return self.children[name].path
            case "busnr":
                # No firmware has given its bus a number.
                return 0
            case "legacy-addr":
                return "{:02x}.{:x}".format(*divmod(self.values["addr"], 8))
        return self.values[name]

    def change(self, name: str, value: Any) -> Awaitable[None] | None:
        """Set a property of a plugged-in device.

        :returns: what has to be awaited before it is done, if anything.
        :raise Error: if it can't be set any more, or not to this.
        """
        if name in self.setters:
            self.schema.validate(self.model.struct, {name: value})
            return self.setters[name](value)
        if name == "realized":
            raise Error(f"Property '{self.type_name}.realized' can't be set; use device_del")
        owner = self.model.owner(name)
        named = owner == self.type_name and self.device_id is not None
        which = f"device '{self.device_id}'" if named else "anonymous device"
        raise Error(f"Attempt to set property '{name}' on {which} (type '{owner}') after it was realized")
