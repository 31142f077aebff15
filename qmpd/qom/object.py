"""What everything in the object tree has in common.

An object has a type, a place (a parent and a name there), children, and
properties.  A property is a name, a type in QOM's words, a way to read it and,
if a client may change it, a way to set it; whoever makes an object says what
its properties are, so that the tree needs to know no object by its kind.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from qmpd.errors import Error
from qmpd.qapi import Schema
from qmpd.qapi.types import AlternateType, ListType, Member, ObjectType


@dataclass(frozen=True, slots=True)
class Property:
    """A property of an object.

    :param type: its type as `qom-list` shows it: a QAPI type, ``child<...>`` or ``link<...>``.
    :param get: returns its value in QAPI's form.
    :param set: takes a new one; raises Error; returns what is left to await, if anything.
        None if nobody may set it.
    """

    name: str
    type: str
    get: Callable[[], Any]
    set: Callable[[Any], Awaitable[None] | None] | None = None


class Object:
    """A node of the object tree.

    :param type_name: its type in QOM.
    """

    def __init__(self, type_name: str) -> None:
        self.type_name = type_name
        self.parent: Object | None = None
        self.name = ""
        #: By name, oldest first.
        self.children: dict[str, Object] = {}

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.path}>"

    @property
    def path(self) -> str:
        """The canonical path, from the root."""
        if self.parent is None:
            return "/"
        above = self.parent.path
        return f"{above}{self.name}" if above == "/" else f"{above}/{self.name}"

    def own_properties(self) -> Mapping[str, Property]:
        """The properties besides "type" and the children."""
        return {}

    def property_names(self) -> Mapping[str, str]:
        """The type of every property by its name, "type" first, children last."""
        names = {"type": "string"}
        names.update((each.name, each.type) for each in self.own_properties().values())
        names.update((name, f"child<{child.type_name}>") for name, child in self.children.items())
        return names

    def property(self, name: str) -> Property:
        """The property with this name.

        :raise Error: if there is none.
        """
        if name == "type":
            return Property("type", "string", lambda: self.type_name)
        found = self.own_properties().get(name)
        if found is not None:
            return found
        child = self.children.get(name)
        if child is not None:
            return Property(name, f"child<{child.type_name}>", lambda: child.path)
        raise Error(f"Property '{self.type_name}.{name}' not found")

    def add(self, name: str, child: Object) -> None:
        """Put `child` below this object.

        :raise Error: if the name is taken.
        """
        if name == "type" or name in self.children:
            raise Error(f"attempt to add duplicate property '{name}' to object (type '{self.type_name}')")
        self.children[name] = child
        child.parent, child.name = self, name

    def remove(self, child: Object) -> None:
        """Take `child` out of the tree; it keeps its name for messages."""
        del self.children[child.name]


class Container(Object):
    """An object that holds others."""

    def __init__(self, type_name: str = "container") -> None:
        super().__init__(type_name)

    def container(self, name: str) -> Container:
        """The container `name` below this one, made if it is not there yet."""
        child = self.children.get(name)
        if child is None:
            child = Container()
            self.add(name, child)
        assert isinstance(child, Container), "only containers are made under these names"
        return child


class Chardev(Object):
    """A character device, as a client sees it below ``/chardevs``.

    :param kind: "socket" or "stdio".
    :param connected: tells whether there is somebody at the other end.
    :param address: tells the SocketAddress; None for what has none.
    """

    def __init__(
        self,
        kind: str,
        connected: Callable[[], bool] | None = None,
        address: Callable[[], dict[str, Any]] | None = None,
    ) -> None:
        super().__init__(f"chardev-{kind}")
        self._properties: dict[str, Property] = {}
        if connected is not None:
            self._properties["connected"] = Property("connected", "bool", connected)
        if address is not None:
            self._properties["addr"] = Property("addr", "SocketAddress", address)

    def own_properties(self) -> Mapping[str, Property]:
        """Its connection."""
        return self._properties


#: Types of the schema that QOM calls otherwise, in an object and in a device.
OBJECT_TYPE_NAMES: Final[Mapping[str, str]] = {"str": "string", "int32": "int32_t"}
DEVICE_TYPE_NAMES: Final[Mapping[str, str]] = {}


def schema_properties(schema: Schema, struct: str, names: Mapping[str, str]) -> dict[str, str]:
    """The QOM types of a struct's members by name.

    :param names: what QOM calls the schema's types, where it is another name.
    """
    type_ = schema.types[struct]
    assert isinstance(type_, ObjectType), f"{struct} is no struct"
    result = {}
    for member in sorted(type_.members, key=_qom_order):
        member_type, name = schema.types[member.type], member.type
        if isinstance(member_type, AlternateType):
            # It stands for one property that is written in several ways, the first being the usual.
            name = member_type.members[0].type
        elif isinstance(member_type, ListType):
            # QOM names the type of the elements.
            name = member_type.element
        result[member.name] = names.get(name, name)
    return result


#: Members that QOM lists before all others of their struct, in another order than the schema's.
_FIRST: Final = ("endpoint", "dir", "verify-peer", "priority")


def _qom_order(member: Member) -> int:
    return _FIRST.index(member.name) if member.name in _FIRST else len(_FIRST)
