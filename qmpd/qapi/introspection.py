"""``query-qmp-schema``: a schema as data.

Commands and events come first, in the order of the schema, then every type
that they reach, in the order in which it is first met.  The names of types
are no part of the interface, so defined types are numbered instead: a client
that wants to know whether ``blockdev-add`` takes ``header`` must start at the
command.  All integer types are 'int'.  See QEMU's documentation, "How to use
the QAPI code generator", section "Client JSON Protocol introspection".
"""

from __future__ import annotations

from typing import Any

from qmpd.qapi.resolve import Resolved
from qmpd.qapi.types import (
    EMPTY,
    AlternateType,
    BuiltinType,
    EnumType,
    ListType,
    Member,
    ObjectType,
    list_of,
)

SchemaInfo = dict[str, Any]


class _Introspection:
    def __init__(self, resolved: Resolved) -> None:
        self._resolved = resolved
        # A list of a narrow integer type becomes '[int]', which the schema need not have.
        self._types = dict(resolved.types)
        self._numbers: dict[str, str] = {}
        #: The types met so far, in order; the later ones still have to be described.
        self._met: dict[str, None] = {}

    def schema_info(self) -> list[SchemaInfo]:
        described = [self._entry(name) for name in self._resolved.order]
        waiting = 0
        while waiting < len(self._met):
            for name in list(self._met)[waiting:]:
                described.append(self._type(name))
                waiting += 1
        return described

    def _entry(self, name: str) -> SchemaInfo:
        command = self._resolved.commands.get(name)
        if command is None:
            event = self._resolved.events[name]
            info = {"name": name, "meta-type": "event", "arg-type": self._use(event.arguments)}
            return info | _features(event.features)
        info = {
            "name": name,
            "meta-type": "command",
            "arg-type": self._use(command.arguments),
            "ret-type": self._use(command.returns),
        }
        allow_oob = {"allow-oob": True} if command.allow_oob else {}
        return info | allow_oob | _features(command.features)

    def _use(self, name: str) -> str:
        """Return the name that a type goes by, and see to it that it is described."""
        name = self._plain(name)
        self._met.setdefault(name)
        type_ = self._types[name]
        match type_:
            case BuiltinType():
                return name
            case ListType():
                return list_of(self._use(type_.element))
            case _:
                return self._number(name)

    def _plain(self, name: str) -> str:
        """Replace each integer type by 'int'."""
        type_ = self._types[name]
        if isinstance(type_, BuiltinType) and type_.json_type == "int":
            return "int"
        if isinstance(type_, ListType):
            element = self._plain(type_.element)
            if element != type_.element:
                name = list_of(element)
                self._types.setdefault(name, ListType(name, element))
        return name

    def _number(self, name: str) -> str:
        return self._numbers.setdefault(name, str(len(self._numbers)))

    def _type(self, name: str) -> SchemaInfo:
        type_ = self._types[name]
        match type_:
            case BuiltinType():
                return {"name": name, "meta-type": "builtin", "json-type": type_.json_type}
            case EnumType():
                return {
                    "name": self._number(name),
                    "meta-type": "enum",
                    "members": [{"name": value.name} | _features(value.features) for value in type_.values],
                    "values": [value.name for value in type_.values],
                } | _features(type_.features)
            case ListType():
                element = self._use(type_.element)
                return {"name": list_of(element), "meta-type": "array", "element-type": element}
            case ObjectType():
                return self._object(type_)
            case AlternateType():
                return {
                    "name": self._number(name),
                    "meta-type": "alternate",
                    "members": [{"type": self._use(member.type)} for member in type_.members],
                } | _features(type_.features)

    def _object(self, type_: ObjectType) -> SchemaInfo:
        info: SchemaInfo = {
            "name": self._number(type_.name),
            "meta-type": "object",
            "members": [self._member(member) for member in type_.members],
        }
        if type_.discriminator is not None:
            info["tag"] = type_.discriminator
            info["variants"] = [
                {"case": value, "type": self._use(branch)} for value, branch in self._branches(type_).items()
            ]
        return info | _features(type_.features)

    def _member(self, member: Member) -> SchemaInfo:
        info: SchemaInfo = {"name": member.name}
        if member.optional:
            info["default"] = None
        return info | {"type": self._use(member.type)} | _features(member.features)

    def _branches(self, type_: ObjectType) -> dict[str, str]:
        """Return a union's branches: as written, then the values that add no members."""
        branches = dict(type_.branches)
        for member in type_.members:
            values = self._types[member.type]
            if member.name == type_.discriminator and isinstance(values, EnumType):
                for value in values.values:
                    branches.setdefault(value.name, EMPTY)
        return branches


def _features(features: tuple[str, ...]) -> SchemaInfo:
    return {"features": list(features)} if features else {}


def schema_info(resolved: Resolved) -> list[SchemaInfo]:
    """Return a list of SchemaInfo, the value of ``query-qmp-schema``."""
    return _Introspection(resolved).schema_info()
