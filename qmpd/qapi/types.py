"""The resolved types of a schema.

Types refer to each other by name (a list of ``T`` is called ``[T]``), because
they may be recursive; :class:`qmpd.qapi.schema.Schema` maps the names to the
types.  As on the wire, a struct and a union are both objects: a union is an
object with a discriminator and a branch for each of its values.  A base's
members stand in front of the object's own, in the order in which QEMU visits
them.

Named tuples, because every start makes these classes and hundreds of each, and
frozen dataclasses take several times as long over both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Final, NamedTuple

from qmpd.qapi.parser import Location

#: The name of the object type without members, which no schema can define.
EMPTY: Final = ":empty"


def list_of(element: str) -> str:
    """Return the name of the list type with these elements."""
    return f"[{element}]"


class Member(NamedTuple):
    """A member of an object, or an alternative of an alternate."""

    name: str
    type: str
    optional: bool = False
    features: tuple[str, ...] = ()
    doc: str = ""


class EnumMember(NamedTuple):
    """A value of an enum."""

    name: str
    features: tuple[str, ...] = ()
    doc: str = ""


class BuiltinType(NamedTuple):
    """A type of the language itself.

    :param json_type: its JSON type as ``query-qmp-schema`` calls it.
    :param minimum: for an integer type, the smallest value that it holds; None for others.
    :param maximum: the largest.
    """

    name: str
    json_type: str
    minimum: int | None = None
    maximum: int | None = None


class EnumType(NamedTuple):
    """A string out of a fixed set."""

    name: str
    values: tuple[EnumMember, ...]
    features: tuple[str, ...] = ()
    doc: str = ""


class ListType(NamedTuple):
    """A list whose elements have one type."""

    name: str
    element: str


class ObjectType(NamedTuple):
    """A struct or a union.

    :param members: base members first.
    :param discriminator: for a union, the member whose value chooses the branch.
    :param branches: for a union, the object type that adds its members for a
        value of the discriminator; a value without an entry adds none.
    """

    name: str
    members: tuple[Member, ...]
    discriminator: str | None = None
    branches: Mapping[str, str] = MappingProxyType({})
    features: tuple[str, ...] = ()
    doc: str = ""


class AlternateType(NamedTuple):
    """A value of one of several types, told apart by their JSON types."""

    name: str
    members: tuple[Member, ...]
    features: tuple[str, ...] = ()
    doc: str = ""


Type = BuiltinType | EnumType | ListType | ObjectType | AlternateType


def _integers() -> Iterator[BuiltinType]:
    for bits in (8, 16, 32, 64):
        yield BuiltinType(f"int{bits}", "int", -(1 << bits - 1), (1 << bits - 1) - 1)
        # QEMU takes a negative number for a 64-bit unsigned one, modulo 2**64.
        lowest = -(1 << 63) if bits == 64 else 0
        yield BuiltinType(f"uint{bits}", "int", lowest, (1 << bits) - 1)


#: The language's own types, except QType, which is an enum.
BUILTINS: Final[Mapping[str, BuiltinType]] = {
    builtin.name: builtin
    for builtin in (
        BuiltinType("str", "string"),
        BuiltinType("number", "number"),
        BuiltinType("bool", "boolean"),
        BuiltinType("null", "null"),
        BuiltinType("any", "value"),
        BuiltinType("int", "int", -(1 << 63), (1 << 63) - 1),
        BuiltinType("size", "int", -(1 << 63), (1 << 64) - 1),
        *_integers(),
    )
}

QTYPE: Final = EnumType(
    "QType",
    tuple(EnumMember(name) for name in ("none", "qnull", "qnum", "qstring", "qdict", "qlist", "qbool")),
    doc="The JSON type of a value.",
)


class CommandDefinition(NamedTuple):
    """What the schema says of a command; ``arguments`` is an object type's name.

    :param returns: the name of the type of a successful reply's value.
    :param generate: False if the arguments are checked by the command itself.
    """

    name: str
    arguments: str
    returns: str
    generate: bool
    success_response: bool
    allow_oob: bool
    allow_preconfig: bool
    coroutine: bool
    features: tuple[str, ...]
    doc: str
    location: Location


class EventDefinition(NamedTuple):
    """What the schema says of an event; ``arguments`` is the object type of its data."""

    name: str
    arguments: str
    features: tuple[str, ...]
    doc: str
    location: Location
