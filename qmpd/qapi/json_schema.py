"""QAPI types as JSON Schema 2020-12.

Each type, command and event becomes a definition under ``$defs``.  What
:mod:`qmpd.qapi.validation` enforces are these very definitions, so what
``qmpd schema`` prints is what the daemon does.

Two words of our own say what the standard vocabulary can only paraphrase:

``discriminatedUnion``
    ``{"discriminator": NAME, "base": SCHEMA, "branches": {VALUE: SCHEMA}}``:
    the object is valid if it is valid against the branch of its member NAME;
    an object whose NAME is missing or names no branch is held against the base,
    which refuses it.  One look-up, and one error that means something.

``alternate``
    ``{JSON-TYPE: SCHEMA}``: the value is valid if it is valid against the schema
    of its own JSON type, and its type is among them.

Beside each stands its standard paraphrase (``allOf`` of conditions, ``oneOf``),
for validators that do not know our words and, as the specification has it,
ignore them.  A validator that does know them must skip the paraphrase.

Where the two can differ: JSON Schema calls 1.0 an integer, QMP does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from qmpd.qapi.types import (
    AlternateType,
    BuiltinType,
    CommandDefinition,
    EnumType,
    EventDefinition,
    ListType,
    Member,
    ObjectType,
    Type,
)

UNION: Final = "discriminatedUnion"
ALTERNATE: Final = "alternate"
DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"

_COMMENT: Final = (
    "Generated from the QAPI schema. Two words are an addition to JSON Schema: 'discriminatedUnion' "
    "chooses the schema of an object by the value of one member, 'alternate' chooses the schema of a value "
    "by its JSON type. Each is followed by the same rule in standard words (allOf, oneOf), so a validator "
    "that ignores them comes to the same result, except that JSON Schema takes 1.0 for an integer."
)

#: JSON Schema's name for each JSON type that introspection knows.
_JSON_TYPES: Final[Mapping[str, str]] = {
    "string": "string",
    "number": "number",
    "int": "integer",
    "boolean": "boolean",
    "null": "null",
}

JSONSchema = dict[str, Any]


def reference(name: str) -> JSONSchema:
    """Return a schema that refers to a definition."""
    return {"$ref": f"#/$defs/{name}"}


class Definitions:
    """The definitions of a schema's types, each made when it is first wanted.

    :param types: all types by name.
    """

    def __init__(self, types: Mapping[str, Type]) -> None:
        self._types = types
        self._made: dict[str, JSONSchema] = {}

    def __getitem__(self, name: str) -> JSONSchema:
        """Return the definition of a type or of a union's branch (``TYPE:VALUE``)."""
        made = self._made.get(name)
        if made is None:
            made = self._made[name] = _MAKERS[type(self._types[name])](self, self._types[name])
        return made

    def type(self, name: str) -> Type:
        """Return the type that a definition was made of.

        :raise KeyError: no such type.
        """
        return self._types[name]

    def schema_of(self, name: str) -> JSONSchema:
        """Return a schema for a use of a type: a list in place, anything else by reference."""
        type_ = self._types[name]
        if isinstance(type_, ListType):
            return {"type": "array", "items": self.schema_of(type_.element)}
        return reference(name)

    def _builtin(self, type_: BuiltinType) -> JSONSchema:
        if type_.json_type == "value":
            return {"title": type_.name}
        definition: JSONSchema = {"title": type_.name, "type": _JSON_TYPES[type_.json_type]}
        if type_.minimum is not None:
            definition |= {"minimum": type_.minimum, "maximum": type_.maximum}
        return definition

    def _enum(self, type_: EnumType) -> JSONSchema:
        definition = _described(type_)
        definition |= {"type": "string", "enum": [value.name for value in type_.values]}
        return definition

    def _list(self, type_: ListType) -> JSONSchema:
        return self.schema_of(type_.name)

    def _alternate(self, type_: AlternateType) -> JSONSchema:
        choices = {self._told_by(member.type): self.schema_of(member.type) for member in type_.members}
        return _described(type_) | {ALTERNATE: choices, "oneOf": list(choices.values())}

    def _told_by(self, name: str) -> str:
        type_ = self._types[name]
        if isinstance(type_, BuiltinType):
            told_by = _JSON_TYPES[type_.json_type]
            return "number" if told_by == "integer" else told_by
        return _TOLD_BY[type(type_)]

    def _object(self, type_: ObjectType) -> JSONSchema:
        return _described(type_) | self._body(type_.name, (), type_)

    def _body(self, path: str, outer: tuple[Member, ...], type_: ObjectType) -> JSONSchema:
        """Make the schema of an object whose members are ``outer`` and those of ``type_``.

        :param path: the name under which branches are entered, extended by their values.
        """
        members = (*outer, *type_.members)
        if type_.discriminator is None:
            return self._members(members) | {"additionalProperties": False}
        branches: dict[str, JSONSchema] = {}
        for value in self._values(type_):
            name = f"{path}:{value}"
            branch = type_.branches.get(value)
            added = ObjectType("", ()) if branch is None else self._types[branch]
            assert isinstance(added, ObjectType), "the resolver lets nothing else be a branch"
            self._made[name] = self._body(name, members, added)
            branches[value] = reference(name)
        base = f"{path}:"
        self._made[base] = self._members(members)
        conditions = [
            {
                "if": {
                    "properties": {type_.discriminator: {"const": value}},
                    "required": [type_.discriminator],
                },
                "then": branch,
            }
            for value, branch in branches.items()
        ]
        return {
            UNION: {
                "discriminator": type_.discriminator,
                "base": reference(base),
                "branches": branches,
            },
            "allOf": [reference(base), *conditions],
        }

    def _values(self, type_: ObjectType) -> Iterator[str]:
        for member in type_.members:
            if member.name == type_.discriminator:
                values = self._types[member.type]
                assert isinstance(values, EnumType), "the resolver lets nothing else be a discriminator"
                yield from (value.name for value in values.values)

    def _members(self, members: tuple[Member, ...]) -> JSONSchema:
        properties: dict[str, JSONSchema] = {}
        for member in members:
            use = self.schema_of(member.type)
            if member.doc:
                use["description"] = member.doc
            if "deprecated" in member.features:
                use["deprecated"] = True
            properties[member.name] = use
        required = [member.name for member in members if not member.optional]
        schema: JSONSchema = {"type": "object", "properties": properties}
        if required:
            schema["required"] = required
        return schema

    def document(
        self, commands: Mapping[str, CommandDefinition], events: Mapping[str, EventDefinition]
    ) -> JSONSchema:
        """Return one document for all types, commands and events.

        The document itself describes a QMP command as it is sent.  A command's
        definition describes its arguments, an event's its data.
        """
        definitions: JSONSchema = {}
        for command in commands.values():
            definitions[command.name] = self._use(command)
        for event in events.values():
            definitions[event.name] = self._use(event)
        for name, type_ in self._types.items():
            if not isinstance(type_, ListType):
                # Making a union enters its branches too.
                self[name]
        definitions |= sorted(self._made.items())
        return {
            "$schema": DIALECT,
            "$comment": _COMMENT,
            "title": "QMP command",
            "type": "object",
            "properties": {
                "execute": {"enum": list(commands)},
                "exec-oob": {"enum": [each.name for each in commands.values() if each.allow_oob]},
                "arguments": {"type": "object"},
                "id": {},
            },
            "oneOf": [{"required": ["execute"]}, {"required": ["exec-oob"]}],
            "allOf": [
                self._command(verb, command)
                for command in commands.values()
                for verb in (("execute", "exec-oob") if command.allow_oob else ("execute",))
            ],
            "additionalProperties": False,
            "$defs": definitions,
        }

    def arguments(self, command: CommandDefinition | EventDefinition) -> JSONSchema:
        """Return the schema of a command's arguments or of an event's data."""
        if isinstance(command, CommandDefinition) and not command.generate:
            return {"type": "object"}
        return reference(command.arguments)

    def _use(self, command: CommandDefinition | EventDefinition) -> JSONSchema:
        return _described(command) | self.arguments(command)

    def _command(self, verb: str, command: CommandDefinition) -> JSONSchema:
        arguments = self._types[command.arguments]
        assert isinstance(arguments, ObjectType)
        then: JSONSchema = {"properties": {"arguments": reference(command.name)}}
        if any(not member.optional for member in arguments.members):
            then["required"] = ["arguments"]
        return {"if": {"properties": {verb: {"const": command.name}}, "required": [verb]}, "then": then}


def _described(
    what: EnumType | ObjectType | AlternateType | CommandDefinition | EventDefinition,
) -> JSONSchema:
    """Return the annotations that every definition has."""
    annotations: JSONSchema = {"title": what.name}
    if what.doc:
        annotations["description"] = what.doc
    if "deprecated" in what.features:
        annotations["deprecated"] = True
    return annotations


_MAKERS: Final[Mapping[type, Callable[[Definitions, Any], JSONSchema]]] = {
    BuiltinType: Definitions._builtin,
    EnumType: Definitions._enum,
    ListType: Definitions._list,
    ObjectType: Definitions._object,
    AlternateType: Definitions._alternate,
}

#: The JSON type by which an alternative of a defined type is recognised.
_TOLD_BY: Final[Mapping[type, str]] = {EnumType: "string", ListType: "array", ObjectType: "object"}
