"""A schema as the rest of qmpd uses it.

:func:`load` parses and resolves the files; :class:`Schema` then answers every
question about the wire: is this a valid argument, what does this option on the
command line mean, what does ``query-qmp-schema`` say.  Definitions are turned
into validators when they are first needed, and ``jsonschema`` is imported with
the first of them, so loading stays cheap.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from qmpd.qapi import introspection, keyval
from qmpd.qapi.json_schema import Definitions
from qmpd.qapi.location import STORAGE_SCHEMA
from qmpd.qapi.parser import parse_file, parse_text
from qmpd.qapi.resolve import Resolved, resolve
from qmpd.qapi.types import (
    AlternateType,
    BuiltinType,
    CommandDefinition,
    EnumType,
    EventDefinition,
    ListType,
    ObjectType,
    Type,
)
from qmpd.qjson import parse_json

if TYPE_CHECKING:
    from qmpd.qapi.validation import Validation


class Command:
    """A command of the schema.

    :param definition: what the schema says of it; its fields are attributes here too.
    """

    def __init__(self, definition: CommandDefinition, schema: Schema) -> None:
        self.definition = definition
        self.name = definition.name
        self.allow_oob = definition.allow_oob
        self.allow_preconfig = definition.allow_preconfig
        self.success_response = definition.success_response
        self.features = definition.features
        self.doc = definition.doc
        self._schema = schema
        arguments = schema.types[definition.arguments]
        assert isinstance(arguments, ObjectType), "the resolver lets nothing else be arguments"
        #: Whether the command may be sent without arguments.
        self.needs_no_arguments = not definition.generate or all(
            member.optional for member in arguments.members
        )

    def __repr__(self) -> str:
        return f"<Command {self.name}>"

    @cached_property
    def _validator(self) -> Any:
        return self._schema.validation.validator(self._schema.definitions.arguments(self.definition))

    def validate(self, arguments: dict[str, Any]) -> None:
        """Check the command's arguments (``{}`` if there are none).

        A command with ``'gen': false`` checks its arguments itself; they only have to be an object.

        :raise Error: in QMP's words, about the first thing that is wrong.
        """
        if arguments or not self.needs_no_arguments:
            self._schema.validation.check(self._validator, arguments)

    @cached_property
    def returns_number(self) -> bool:
        """Whether a reply may hold a floating-point number."""
        returns = self.definition.returns
        return self._schema.reaches(returns, "number") or self._schema.reaches(returns, "any")


class Event:
    """An event of the schema."""

    def __init__(self, definition: EventDefinition, schema: Schema) -> None:
        self.definition = definition
        self.name = definition.name
        self.features = definition.features
        self.doc = definition.doc
        self._schema = schema

    def __repr__(self) -> str:
        return f"<Event {self.name}>"

    @cached_property
    def _validator(self) -> Any:
        return self._schema.validation.validator(self._schema.definitions.arguments(self.definition))

    def validate(self, data: dict[str, Any]) -> None:
        """Check the event's data (``{}`` if there are none).

        :raise Error: about the first thing that is wrong.
        """
        self._schema.validation.check(self._validator, data)


class Schema:
    """All types, commands and events of a schema.

    :param resolved: what :func:`qmpd.qapi.resolve.resolve` returned.
    """

    def __init__(self, resolved: Resolved) -> None:
        self._resolved = resolved
        self.types: Mapping[str, Type] = MappingProxyType(resolved.types)
        self.definitions = Definitions(resolved.types)
        self._validators: dict[str, Any] = {}
        self.commands: Mapping[str, Command] = MappingProxyType(
            {name: Command(definition, self) for name, definition in resolved.commands.items()}
        )
        self.events: Mapping[str, Event] = MappingProxyType(
            {name: Event(definition, self) for name, definition in resolved.events.items()}
        )

    def __repr__(self) -> str:
        return f"<Schema of {len(self.commands)} commands, {len(self.events)} events>"

    @cached_property
    def validation(self) -> Validation:
        """What checks values against the definitions."""
        # Importing it takes as long as all of our own modules together, because of jsonschema.
        from qmpd.qapi.validation import Validation

        return Validation(self.definitions)

    def validate(self, type_name: str, value: object) -> None:
        """Check a value against a type.

        :raise KeyError: the schema has no such type.
        :raise Error: in QMP's words, about the first thing that is wrong.
        """
        self._check(type_name, value)

    def validate_option(self, type_name: str, value: object) -> None:
        """Check a value that stood in an option as ``key=value,...``.

        :raise Error: in the words for options, about the first thing that is wrong.
        """
        self._check(type_name, value, from_strings=True)

    def _check(self, type_name: str, value: object, *, from_strings: bool = False) -> None:
        validator = self._validators.get(type_name)
        if validator is None:
            self.types[type_name]
            schema = self.definitions.schema_of(type_name)
            validator = self._validators[type_name] = self.validation.validator(schema)
        self.validation.check(validator, value, from_strings=from_strings)

    def from_option(self, type_name: str, text: str, implied_key: str | None = None) -> dict[str, Any]:
        """Read a command line option: JSON if it starts with ``{``, else ``key=value,...``.

        :param type_name: the object type that it must be of.
        :param implied_key: the key of a first value that stands alone (``--object secret,id=...``).
        :raise Error: in QEMU's words, about the first thing that is wrong.
        :raise qmpd.qapi.keyval.HelpRequested: the text asks for help.
        """
        value: Any
        if text.startswith("{"):
            value = parse_json(text)
            self._check(type_name, value)
        else:
            value = keyval.convert(self.types, type_name, keyval.parse(text, implied_key))
            self._check(type_name, value, from_strings=True)
        assert isinstance(value, dict), "an option's type is an object type"
        return value

    def coerce(self, type_name: str, value: object) -> Any:
        """Turn strings into numbers and booleans where the type wants them.

        For clients that write ``"num-queues": "2"`` and ``"share-rw": "on"``.
        What cannot be turned stays as it is, for :meth:`validate` to refuse.
        The value given is not changed.
        """
        return keyval.convert(self.types, type_name, value)

    def introspection(self) -> list[dict[str, Any]]:
        """Return the value of ``query-qmp-schema``."""
        return introspection.schema_info(self._resolved)

    def json_schema(self) -> dict[str, Any]:
        """Return the whole schema as a JSON Schema 2020-12 document; see :mod:`qmpd.qapi.json_schema`.

        Its definitions are the very ones that are enforced: do not change them.
        """
        return self.definitions.document(self._resolved.commands, self._resolved.events)

    def reaches(self, type_name: str, wanted: str) -> bool:
        """Return whether a value of one type may hold a value of another."""
        waiting, seen = [type_name], set[str]()
        while waiting:
            name = waiting.pop()
            if name == wanted:
                return True
            if name not in seen:
                seen.add(name)
                waiting.extend(_parts(self.types[name]))
        return False


def _parts(type_: Type) -> list[str]:
    match type_:
        case ListType():
            return [type_.element]
        case ObjectType():
            return [*(member.type for member in type_.members), *type_.branches.values()]
        case AlternateType():
            return [member.type for member in type_.members]
        case BuiltinType() | EnumType():
            return []


def load(directory: str | Path, file: str = STORAGE_SCHEMA) -> Schema:
    """Load a schema file and what it includes from a directory.

    :raise SchemaError: with file, line and column.
    """
    expressions, _ = parse_file(Path(directory) / file)
    return Schema(resolve(expressions))


def loads(text: str, name: str = "<text>") -> Schema:
    """Load a schema from a string; ``name`` stands in its errors.

    :raise SchemaError: as :func:`load`.
    """
    expressions, _ = parse_text(text, name)
    return Schema(resolve(expressions))
