"""Expressions to types: every rule of the schema language that is not notation.

All definitions are entered by name first, so that a type may be used before it
stands in the text; then each is resolved, and whatever it says is checked:
names, references, clashes between members, discriminators, and that the
alternatives of an alternate can be told apart.  The result is complete: no
later step can meet a name that it does not know.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from qmpd.qapi.parser import NO_CONDITIONS, Expression, Location, SchemaError, Sequence, Table
from qmpd.qapi.types import (
    BUILTINS,
    EMPTY,
    QTYPE,
    AlternateType,
    CommandDefinition,
    EnumMember,
    EnumType,
    EventDefinition,
    ListType,
    Member,
    ObjectType,
    Type,
    list_of,
)

_PREFIX: Final = r"(__[A-Za-z0-9.-]+_)?(x-)?"
#: How the names of each kind of thing are spelled, and how to say so.
_NAMES: Final[Mapping[str, tuple[re.Pattern[str], str]]] = {
    "type": (re.compile(_PREFIX + r"[A-Z][A-Za-z0-9]*"), "CamelCase"),
    "command": (re.compile(_PREFIX + r"[a-z][a-z0-9_-]*"), "lower case"),
    "event": (re.compile(r"(__[A-Z0-9.-]+_)?(X_)?[A-Z][A-Z0-9_]*"), "UPPER_CASE"),
    "member": (re.compile(_PREFIX + r"[A-Za-z][A-Za-z0-9_-]*"), "letters, digits, '-' and '_'"),
    # An enum value may begin with a digit ("0.8").
    "value": (re.compile(_PREFIX + r"[A-Za-z0-9][A-Za-z0-9_.-]*"), "letters, digits, '-' and '_'"),
}

#: The flags of a command, and the one value that it makes sense to write.
_FLAGS: Final[Mapping[str, bool]] = {
    "boxed": True,
    "allow-oob": True,
    "allow-preconfig": True,
    "coroutine": True,
    "gen": False,
    "success-response": False,
}


@dataclass(slots=True)
class Resolved:
    """All of a schema, by name and in the order of definition."""

    types: dict[str, Type] = field(default_factory=dict)
    commands: dict[str, CommandDefinition] = field(default_factory=dict)
    events: dict[str, EventDefinition] = field(default_factory=dict)
    #: Commands and events as they were mixed in the text.
    order: list[str] = field(default_factory=list)


def _spelled(name: object, kind: str, location: Location, what: str) -> str:
    pattern, spelling = _NAMES[kind]
    if not isinstance(name, str) or not pattern.fullmatch(name):
        raise SchemaError(location, f"{what} has an invalid name '{name}': it must be in {spelling}")
    return name


def _only(table: Table, allowed: Iterable[str], required: Iterable[str], what: str) -> None:
    allowed = frozenset(allowed)
    for key in table:
        if key == "if":
            raise SchemaError(table.where(key), NO_CONDITIONS)
        if key not in allowed:
            raise SchemaError(table.where(key), f"{what} has unknown key '{key}'")
    for key in required:
        if key not in table:
            raise SchemaError(table.location, f"{what} misses key '{key}'")


def _features(table: Table, what: str) -> tuple[str, ...]:
    value = table.get("features", [])
    place = table.where("features")
    if not isinstance(value, list):
        raise SchemaError(place, f"'features' of {what} must be a list")
    names: list[str] = []
    for feature in value:
        name = feature
        if isinstance(feature, Table):
            _only(feature, ("name",), ("name",), f"a feature of {what}")
            name = feature["name"]
        name = _spelled(name, "member", place, f"a feature of {what}")
        if name in names:
            raise SchemaError(place, f"duplicate feature '{name}' of {what}")
        names.append(name)
    return tuple(names)


def _all_features(table: Table) -> Iterator[str]:
    """Yield the features of a definition and of its members, which share one documentation."""
    yield from _features(table, "it")
    data = table.get("data")
    members = data.values() if isinstance(data, Table) else data if isinstance(data, Sequence) else ()
    for member in members:
        if isinstance(member, Table):
            yield from _features(member, "it")


class _Resolver:
    """Resolves expressions; see the module's head for the two passes."""

    def __init__(self, expressions: Iterable[Expression]) -> None:
        self._expressions: dict[str, Expression] = {}
        self._resolved = Resolved()
        self._busy: set[str] = set()
        for expression in expressions:
            self._enter(expression)

    def _enter(self, expression: Expression) -> None:
        name = expression.name
        kind = expression.kind if expression.kind in ("command", "event") else "type"
        where = expression.table.where(expression.kind)
        if name in BUILTINS or name == QTYPE.name:
            raise SchemaError(where, f"built-in type '{name}' is already defined")
        _spelled(name, kind, where, expression.kind)
        earlier = self._expressions.get(name)
        if earlier:
            raise SchemaError(where, f"'{name}' is already defined at {earlier.location}")
        self._expressions[name] = expression

    def resolve(self) -> Resolved:
        self._resolved.types.update(BUILTINS)
        self._resolved.types[QTYPE.name] = QTYPE
        self._resolved.types[EMPTY] = ObjectType(EMPTY, ())
        for expression in self._expressions.values():
            if expression.kind == "command":
                self._command(expression)
            elif expression.kind == "event":
                self._event(expression)
            else:
                self._type(expression.name, expression.location, expression.name)
        return self._resolved

    # References

    def _type(self, name: str, location: Location, user: str) -> Type:
        """Return the resolved type of this name; ``user`` is what refers to it."""
        known = self._resolved.types.get(name)
        if known:
            return known
        expression = self._expressions.get(name)
        if expression is None or expression.kind in ("command", "event"):
            raise SchemaError(location, f"{user} uses unknown type '{name}'")
        if name in self._busy:
            raise SchemaError(location, f"object '{name}' contains itself")
        self._busy.add(name)
        resolved: Type = _KINDS[expression.kind](self, expression)
        self._busy.discard(name)
        self._resolved.types[name] = resolved
        return resolved

    def _reference(self, value: object, location: Location, user: str, lists: bool = True) -> str:
        """Check ``'T'`` or ``['T']`` and return the type's name, without resolving it further."""
        element = value
        if isinstance(value, list):
            if not lists:
                raise SchemaError(location, f"{user} cannot be a list")
            if len(value) != 1 or not isinstance(value[0], str):
                raise SchemaError(location, f"{user}: a list type holds exactly one type name")
            element = value[0]
        if not isinstance(element, str):
            raise SchemaError(location, f"{user} should be a type name")
        expression = self._expressions.get(element)
        known = element in self._resolved.types and element != EMPTY
        if not known and (expression is None or expression.kind in ("command", "event")):
            raise SchemaError(location, f"{user} uses unknown type '{element}'")
        if not isinstance(value, list):
            return element
        name = list_of(element)
        self._resolved.types.setdefault(name, ListType(name, element))
        return name

    def _members(self, table: Table, owner: str, documented: Mapping[str, str]) -> tuple[Member, ...]:
        members: list[Member] = []
        for key, value in table.items():
            place = table.where(key)
            what = f"member '{key}' of {owner}"
            name = _spelled(key.removeprefix("*"), "member", place, what)
            features: tuple[str, ...] = ()
            if isinstance(value, Table):
                _only(value, ("type", "features"), ("type",), what)
                features = _features(value, what)
                value = value["type"]
            type_name = self._reference(value, place, what)
            members.append(Member(name, type_name, key.startswith("*"), features, documented.get(name, "")))
        self._distinct(members, table, owner)
        return tuple(members)

    @staticmethod
    def _distinct(members: Iterable[Member], table: Table, owner: str, other: str = "member") -> None:
        # QEMU makes '-' and '_' the same in its C names, so they may not be all that differs.
        seen: dict[str, str] = {}
        for member in members:
            folded = member.name.replace("-", "_")
            if folded in seen:
                place = table.where(member.name if member.name in table else "*" + member.name)
                raise SchemaError(
                    place, f"member '{member.name}' of {owner} collides with {other} '{seen[folded]}'"
                )
            seen[folded] = member.name

    @staticmethod
    def _documented(expression: Expression, names: Iterable[str]) -> Mapping[str, str]:
        """Return the texts of the members; refuse a text for what is not there."""
        if expression.documentation is None:
            return {}
        texts = expression.documentation.members
        unknown = texts.keys() - set(names) - set(_all_features(expression.table))
        if unknown:
            raise SchemaError(
                expression.documentation.location,
                f"documentation of '{expression.name}' describes '{min(unknown)}', which it does not have",
            )
        return texts

    @staticmethod
    def _own_names(data: object) -> list[str]:
        if isinstance(data, Table):
            return [key.removeprefix("*") for key in data]
        return []

    # Definitions

    def _enum(self, expression: Expression) -> EnumType:
        table, what = expression.table, f"enum '{expression.name}'"
        data = table["data"]
        if not isinstance(data, Sequence):
            raise SchemaError(table.where("data"), f"'data' of {what} must be a list")
        if not isinstance(table.get("prefix", ""), str):
            raise SchemaError(table.where("prefix"), f"'prefix' of {what} must be a string")
        values: list[EnumMember] = []
        for index, value in enumerate(data):
            place = data.where(index)
            features: tuple[str, ...] = ()
            if isinstance(value, Table):
                _only(value, ("name", "features"), ("name",), f"a value of {what}")
                features = _features(value, f"a value of {what}")
                value = value["name"]
            name = _spelled(value, "value", place, f"a value of {what}")
            if any(name == earlier.name for earlier in values):
                raise SchemaError(place, f"duplicate value '{name}' of {what}")
            values.append(EnumMember(name, features))
        texts = self._documented(expression, (value.name for value in values))
        described = (EnumMember(value.name, value.features, texts.get(value.name, "")) for value in values)
        return EnumType(expression.name, tuple(described), _features(table, what), _body(expression))

    def _struct(self, expression: Expression) -> ObjectType:
        table, what = expression.table, f"struct '{expression.name}'"
        data = table["data"]
        if not isinstance(data, Table):
            raise SchemaError(table.where("data"), f"'data' of {what} must be an object")
        own = self._members(data, what, self._documented(expression, self._own_names(data)))
        base: tuple[Member, ...] = ()
        if "base" in table:
            base = self._base(table["base"], table.where("base"), what)
            self._distinct((*base, *own), data, what, "base member")
        return ObjectType(
            expression.name, (*base, *own), features=_features(table, what), doc=_body(expression)
        )

    def _base(self, name: object, location: Location, owner: str) -> tuple[Member, ...]:
        user = f"'base' of {owner}"
        base = self._type(self._reference(name, location, user, lists=False), location, user)
        if not isinstance(base, ObjectType) or base.discriminator is not None:
            raise SchemaError(location, f"{user} must be a struct, '{name}' is not")
        return base.members

    def _union(self, expression: Expression) -> ObjectType:
        table, what = expression.table, f"union '{expression.name}'"
        base, data = table["base"], table["data"]
        if not isinstance(data, Table):
            raise SchemaError(table.where("data"), f"'data' of {what} must be an object")
        names = [*self._own_names(base), *data]
        texts = self._documented(expression, names)
        if isinstance(base, Table):
            members = self._members(base, what, texts)
        else:
            members = self._base(base, table.where("base"), what)
        values = self._discriminator(table, members, what)
        branches: dict[str, str] = {}
        for value, branch in data.items():
            branches[value] = self._branch(value, branch, data.where(value), values, members, what)
        if not branches:
            raise SchemaError(table.where("data"), f"{what} has no branches")
        return ObjectType(
            expression.name,
            members,
            table["discriminator"],
            branches,
            _features(table, what),
            _body(expression),
        )

    def _discriminator(self, table: Table, members: Iterable[Member], what: str) -> EnumType:
        name, place = table["discriminator"], table.where("discriminator")
        for member in members:
            if member.name == name:
                break
        else:
            raise SchemaError(place, f"discriminator '{name}' is not a member of 'base' of {what}")
        if member.optional:
            raise SchemaError(place, f"discriminator '{name}' of {what} must not be optional")
        kind = self._type(member.type, place, what) if not member.type.startswith("[") else None
        if not isinstance(kind, EnumType):
            raise SchemaError(place, f"discriminator '{name}' of {what} must be of enum type")
        return kind

    def _branch(
        self,
        value: str,
        branch: object,
        place: Location,
        values: EnumType,
        base: tuple[Member, ...],
        owner: str,
    ) -> str:
        what = f"branch '{value}' of {owner}"
        if all(value != each.name for each in values.values):
            raise SchemaError(place, f"{what} is not a value of enum '{values.name}'")
        if isinstance(branch, Table):
            _only(branch, ("type",), ("type",), what)
            branch = branch["type"]
        name = self._reference(branch, place, what, lists=False)
        resolved = self._type(name, place, what)
        if not isinstance(resolved, ObjectType):
            raise SchemaError(place, f"{what} must be a struct or union, '{name}' is not")
        taken = {member.name.replace("-", "_"): member.name for member in base}
        for member in _all_members(resolved, self._resolved.types):
            clash = taken.get(member.name.replace("-", "_"))
            if clash:
                raise SchemaError(
                    place,
                    f"member '{member.name}' of '{name}' collides with base member '{clash}' of {owner}",
                )
        return name

    def _alternate(self, expression: Expression) -> AlternateType:
        table, what = expression.table, f"alternate '{expression.name}'"
        data = table["data"]
        if not isinstance(data, Table) or not data:
            raise SchemaError(table.where("data"), f"'data' of {what} must be an object with members")
        for name in data:
            if name.startswith("*"):
                raise SchemaError(data.where(name), f"an alternative of {what} cannot be optional")
        members = self._members(data, what, self._documented(expression, data))
        taken: dict[str, str] = {}
        for member in members:
            place = data.where(member.name)
            for json_type in self._told_by(member, place, what):
                if json_type in taken:
                    raise SchemaError(
                        place,
                        f"alternative '{member.name}' of {what} can't be distinguished from "
                        f"'{taken[json_type]}'",
                    )
                taken[json_type] = member.name
        return AlternateType(expression.name, members, _features(table, what), _body(expression))

    def _told_by(self, member: Member, place: Location, what: str) -> tuple[str, ...]:
        """Return the JSON types by which an alternative is recognised."""
        if member.type.startswith("["):
            return ("array",)
        builtin = BUILTINS.get(member.type)
        if builtin:
            if builtin.json_type == "value":
                raise SchemaError(place, f"alternative '{member.name}' of {what} cannot be of type 'any'")
            return ("number",) if builtin.json_type == "int" else (builtin.json_type,)
        expression = self._expressions.get(member.type)
        # Only the kind is needed, so an alternate may stand inside the types that it offers.
        kinds = {"enum": "string", "struct": "object", "union": "object"}
        kind = "enum" if expression is None else expression.kind
        if kind not in kinds:
            raise SchemaError(place, f"alternative '{member.name}' of {what} cannot be an alternate")
        return (kinds[kind],)

    def _arguments(self, expression: Expression) -> str:
        """Resolve ``data`` of a command or event to the name of an object type."""
        table, name = expression.table, expression.name
        what = f"{expression.kind} '{name}'"
        data, place = table.get("data"), table.where("data")
        boxed = self._flag(table, "boxed", what)
        if data is None:
            if boxed:
                raise SchemaError(table.where("boxed"), f"'boxed' of {what} needs 'data'")
            self._documented(expression, ())
            return EMPTY
        if isinstance(data, Table):
            if boxed:
                raise SchemaError(place, f"'data' of {what} must be a type name if it is boxed")
            members = self._members(data, what, self._documented(expression, self._own_names(data)))
            if not members:
                return EMPTY
            # No definition can have a name with a colon, so this one is free.
            implicit = f"{name}:arguments"
            self._resolved.types[implicit] = ObjectType(implicit, members)
            return implicit
        self._documented(expression, ())
        reference = self._reference(data, place, f"'data' of {what}", lists=False)
        resolved = self._type(reference, place, f"'data' of {what}")
        if not isinstance(resolved, ObjectType):
            raise SchemaError(place, f"'data' of {what} must be a struct or union, '{reference}' is not")
        if resolved.discriminator is not None and not boxed:
            raise SchemaError(place, f"'data' of {what} can be the union '{reference}' only if it is boxed")
        return reference

    @staticmethod
    def _flag(table: Table, name: str, what: str) -> bool:
        only = _FLAGS[name]
        if name in table and table[name] is not only:
            raise SchemaError(table.where(name), f"flag '{name}' of {what} may only be {str(only).lower()}")
        return only == (name in table)

    def _command(self, expression: Expression) -> None:
        table, name = expression.table, expression.name
        what = f"command '{name}'"
        flags = {flag: self._flag(table, flag, what) for flag in _FLAGS}
        if flags["allow-oob"] and flags["coroutine"]:
            raise SchemaError(
                table.where("coroutine"), f"flags 'allow-oob' and 'coroutine' of {what} exclude each other"
            )
        returns = EMPTY
        if "returns" in table:
            place = table.where("returns")
            returns = self._reference(table["returns"], place, f"'returns' of {what}")
            if not returns.startswith("["):
                self._type(returns, place, f"'returns' of {what}")
        self._resolved.commands[name] = CommandDefinition(
            name,
            self._arguments(expression),
            returns,
            flags["gen"],
            flags["success-response"],
            flags["allow-oob"],
            flags["allow-preconfig"],
            flags["coroutine"],
            _features(table, what),
            _body(expression),
            expression.location,
        )
        self._resolved.order.append(name)

    def _event(self, expression: Expression) -> None:
        name = expression.name
        self._resolved.events[name] = EventDefinition(
            name,
            self._arguments(expression),
            _features(expression.table, f"event '{name}'"),
            _body(expression),
            expression.location,
        )
        self._resolved.order.append(name)


_KINDS: Final[Mapping[str, Callable[[_Resolver, Expression], Type]]] = {
    "enum": _Resolver._enum,
    "struct": _Resolver._struct,
    "union": _Resolver._union,
    "alternate": _Resolver._alternate,
}


def _body(expression: Expression) -> str:
    return expression.documentation.body if expression.documentation else ""


def _all_members(type_: ObjectType, types: Mapping[str, Type]) -> Iterable[Member]:
    """Yield the members of an object and of all its branches."""
    yield from type_.members
    for branch in dict.fromkeys(type_.branches.values()):
        inner = types[branch]
        if isinstance(inner, ObjectType):
            yield from _all_members(inner, types)


def resolve(expressions: Iterable[Expression]) -> Resolved:
    """Resolve all definitions of a schema.

    :raise SchemaError: at the first definition that breaks a rule of the language.
    """
    return _Resolver(expressions).resolve()
