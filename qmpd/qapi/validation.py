"""Validation by ``jsonschema``, and its errors in QMP's words.

The validator class is Draft 2020-12's, extended with the two words that
:mod:`qmpd.qapi.json_schema` explains, and with its own versions of the few
standard words that our definitions use.  They mean the same; they differ in
two ways:

*Order.*  QEMU visits an object's members in the declared order, reports the
first that is missing or ill-typed, goes into nested ones in place, and looks
for unexpected members last.  Here ``properties`` walks in that order and also
says what is ``required``, so the first error that comes out is QEMU's, and no
second one need be looked for.

*Speed.*  Definitions are looked up by name, and a sub-schema is entered
without making another validator: about a tenth of the time.

A table turns the error into QEMU's wording.  QEMU names a value by its full
path in some errors and by its own name in others, where the elements of a list
have none and are called 'null'; all of this was learnt by watching
``qemu-storage-daemon`` 10.0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError
from jsonschema.protocols import Validator
from jsonschema.validators import extend

from qmpd.errors import Error
from qmpd.qapi.json_schema import ALTERNATE, UNION, Definitions, JSONSchema
from qmpd.qapi.types import BUILTINS, BuiltinType

#: A keyword's function as jsonschema calls it: validator, the keyword's value, instance, schema.
Keyword = Callable[[Any, Any, Any, JSONSchema], Iterator[ValidationError]]

_PREFIX: Final = len("#/$defs/")

_JSON_TYPES: Final[Mapping[type, str]] = {
    dict: "object",
    list: "array",
    str: "string",
    bool: "boolean",
    int: "number",
    float: "number",
    type(None): "null",
}

#: The Python types of a JSON type.  ``type(value)`` is compared, so that True is no integer.
_PYTHON_TYPES: Final[Mapping[str, tuple[type, ...]]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "boolean": (bool,),
    "integer": (int,),
    "number": (int, float),
    "null": (type(None),),
}


def _refusal(keyword: str, value: Any, instance: Any, schema: JSONSchema, what: str) -> ValidationError:
    """Make an error that is complete: nothing is left for jsonschema to add but the path."""
    return ValidationError(what, validator=keyword, validator_value=value, instance=instance, schema=schema)


def _type(validator: Any, name: str, instance: Any, schema: JSONSchema) -> Iterator[ValidationError]:
    if type(instance) not in _PYTHON_TYPES[name]:
        yield _refusal("type", name, instance, schema, f"{instance!r} is not of type {name!r}")


def _enum(validator: Any, values: list[str], instance: Any, schema: JSONSchema) -> Iterator[ValidationError]:
    if instance not in values:
        yield _refusal("enum", values, instance, schema, f"{instance!r} is not one of {values!r}")


def _minimum(validator: Any, limit: int, instance: Any, schema: JSONSchema) -> Iterator[ValidationError]:
    if type(instance) in _PYTHON_TYPES["number"] and instance < limit:
        yield _refusal("minimum", limit, instance, schema, f"{instance!r} is less than {limit}")


def _maximum(validator: Any, limit: int, instance: Any, schema: JSONSchema) -> Iterator[ValidationError]:
    if type(instance) in _PYTHON_TYPES["number"] and instance > limit:
        yield _refusal("maximum", limit, instance, schema, f"{instance!r} is greater than {limit}")


def _required(
    validator: Any, names: list[str], instance: Any, schema: JSONSchema
) -> Iterator[ValidationError]:
    """Leave it to ``properties``, which knows when it is a missing member's turn."""
    return iter(())


def _additional_properties(
    validator: Any, allowed: bool, instance: Any, schema: JSONSchema
) -> Iterator[ValidationError]:
    if type(instance) is dict and not allowed:
        properties = schema["properties"]
        for name in instance:
            if name not in properties:
                yield _refusal("additionalProperties", name, instance, schema, f"{name!r} is unexpected")


def _standard_words(word: str, keyword: str) -> Keyword:
    """Return a keyword that is skipped where it paraphrases ``word``, and otherwise the standard's."""
    standard = Draft202012Validator.VALIDATORS[keyword]

    def paraphrase(
        validator: Any, value: Any, instance: Any, schema: JSONSchema
    ) -> Iterator[ValidationError]:
        return iter(()) if word in schema else standard(validator, value, instance, schema)

    return paraphrase


class _Words:
    """The keywords that enter other schemas; they need the definitions to do so."""

    def __init__(self, definitions: Definitions) -> None:
        self._definitions = definitions
        self.keywords: Mapping[str, Keyword] = {
            "$ref": self._ref,
            "type": _type,
            "enum": _enum,
            "minimum": _minimum,
            "maximum": _maximum,
            "properties": self._properties,
            "required": _required,
            "additionalProperties": _additional_properties,
            "items": self._items,
            UNION: self._union,
            ALTERNATE: self._alternate,
            "allOf": _standard_words(UNION, "allOf"),
            "oneOf": _standard_words(ALTERNATE, "oneOf"),
        }

    def _enter(self, validator: Any, instance: Any, schema: JSONSchema) -> Iterator[ValidationError]:
        keywords = self.keywords
        for keyword, value in schema.items():
            function = keywords.get(keyword)
            if function is not None:
                yield from function(validator, value, instance, schema)

    def _enter_member(
        self, validator: Any, instance: Any, schema: JSONSchema, step: str | int
    ) -> Iterator[ValidationError]:
        for error in self._enter(validator, instance, schema):
            error.path.appendleft(step)
            yield error

    def _ref(
        self, validator: Any, target: str, instance: Any, schema: JSONSchema
    ) -> Iterator[ValidationError]:
        return self._enter(validator, instance, self._definitions[target[_PREFIX:]])

    def _properties(
        self, validator: Any, properties: Mapping[str, JSONSchema], instance: Any, schema: JSONSchema
    ) -> Iterator[ValidationError]:
        if type(instance) is not dict:
            return
        required = schema.get("required", ())
        for name, property_schema in properties.items():
            if name in instance:
                yield from self._enter_member(validator, instance[name], property_schema, name)
            elif name in required:
                yield _refusal("required", name, instance, schema, f"{name!r} is missing")

    def _items(
        self, validator: Any, items: JSONSchema, instance: Any, schema: JSONSchema
    ) -> Iterator[ValidationError]:
        if type(instance) is list:
            for index, element in enumerate(instance):
                yield from self._enter_member(validator, element, items, index)

    def _union(
        self, validator: Any, union: JSONSchema, instance: Any, schema: JSONSchema
    ) -> Iterator[ValidationError]:
        value = instance.get(union["discriminator"]) if type(instance) is dict else None
        branch = union["branches"].get(value) if type(value) is str else None
        return self._enter(validator, instance, union["base"] if branch is None else branch)

    def _alternate(
        self, validator: Any, choices: Mapping[str, JSONSchema], instance: Any, schema: JSONSchema
    ) -> Iterator[ValidationError]:
        choice = choices.get(_JSON_TYPES.get(type(instance), ""))
        if choice is None:
            what = f"{instance!r} is of none of the types {list(choices)}"
            return iter((_refusal(ALTERNATE, choices, instance, schema, what),))
        return self._enter(validator, instance, choice)


@dataclass(frozen=True, slots=True)
class _Style:
    """How errors are worded: for values from JSON, or for strings from an option.

    :param element: the path to a list's element, after the path to the list.
    :param wrong_type: by the name of a built-in or JSON type, the text for a value of another type.
    :param nested: for options: the text where a string is expected and there are members; else ''.
    """

    element: str
    wrong_type: Mapping[str, str]
    nested: str = ""


def _expects(texts: Mapping[str, str]) -> Mapping[str, str]:
    invalid = "Invalid parameter type for '{path}', expected: "
    names = ("string", "boolean", "object", "array", "null", "number")
    return {name: invalid + name for name in names} | dict(texts)


#: Signed integers are "integers", unsigned ones (and sizes) all say uint64, whatever their width.
_INTEGERS: Final = {
    name: "Invalid parameter type for '{path}', expected: integer"
    if builtin.minimum is not None and name.startswith("int")
    else "Parameter '{path}' expects uint64"
    for name, builtin in BUILTINS.items()
    if builtin.json_type == "int"
}

_JSON: Final = _Style("[{}]", _expects(_INTEGERS))
_OPTION: Final = _Style(
    ".{}",
    _expects(
        dict.fromkeys(_INTEGERS, "Parameter '{path}' expects integer")
        | {
            "size": "Parameter '{path}' expects size",
            "boolean": "Parameter '{path}' expects 'on' or 'off'",
        }
    ),
    nested="Parameters '{path}.*' are unexpected",
)

#: 64-bit integers out of range are not integers to QEMU; narrower ones are of a wrong C type.
_NARROW: Final[Mapping[str, str]] = {
    name: f"{name}_t" for name in BUILTINS if name.endswith(("8", "16", "32"))
}

_WORDINGS: Final[Mapping[str, str]] = {
    "required": "Parameter '{path}' is missing",
    "additionalProperties": "Parameter '{path}' is unexpected",
    "enum": "Parameter '{name}' does not accept value '{value}'",
    ALTERNATE: "Invalid parameter type for '{name}', expected: {title}",
}


def _path(steps: list[str | int], style: _Style) -> str:
    """Write a path as QEMU does: ``file.children[0].size``."""
    text = str(steps[0]) if isinstance(steps[0], str) else style.element.format(steps[0])
    for step in steps[1:]:
        text += style.element.format(step) if isinstance(step, int) else f".{step}"
    return text


def _wording(error: Any, style: _Style) -> Error:
    """Say what a ValidationError says, as QEMU would."""
    keyword: str = error.validator
    title: str = error.schema.get("title", "")
    steps: list[str | int] = list(error.absolute_path)
    if keyword in ("required", "additionalProperties"):
        steps.append(error.validator_value)
    name = steps[-1] if steps and isinstance(steps[-1], str) else "null"
    template = _WORDINGS.get(keyword) or _wrong_value(keyword, error.schema, error.instance, style)
    return Error(
        template.format(
            path=_path(steps, style) if steps else "null", name=name, value=error.instance, title=title
        )
    )


def _wrong_value(keyword: str, schema: JSONSchema, value: object, style: _Style) -> str:
    """Return the text for a value that is of a wrong type or out of its type's range."""
    title: str = schema.get("title", "")
    expected: str = schema["type"]
    if keyword == "type":
        if style.nested and type(value) in (dict, list) and expected not in ("object", "array"):
            return style.nested
    elif title in _NARROW and _fits(value, BUILTINS["int64" if title.startswith("int") else "uint64"]):
        # QEMU reads it as a 64-bit number and finds the narrow type too small, without its path.
        return "Parameter '{name}' expects " + _NARROW[title]
    return style.wrong_type[title if title in _INTEGERS else expected]


def _fits(value: Any, type_: BuiltinType) -> bool:
    minimum, maximum = type_.minimum, type_.maximum
    return minimum is not None and maximum is not None and minimum <= value <= maximum


class Validation:
    """Validates values against definitions, each compiled when it is first used."""

    def __init__(self, definitions: Definitions) -> None:
        self._definitions = definitions
        # jsonschema has no types for this function.
        extended: Any = extend
        self._class: Any = extended(Draft202012Validator, validators=_Words(definitions).keywords)

    def validator(self, schema: JSONSchema) -> Validator:
        """Return a validator for a schema whose references are to our definitions."""
        validator: Validator = self._class(schema)
        return validator

    def check(self, validator: Validator, value: Any, *, from_strings: bool = False) -> None:
        """Validate a value.

        :param from_strings: it was ``key=value,...`` on a command line; errors are worded otherwise.
        :raise Error: what QEMU would report first, in its words.
        """
        try:
            for error in validator.iter_errors(value):
                raise _wording(error, _OPTION if from_strings else _JSON)
        except RecursionError:
            # Each level of nesting takes several frames; no real graph comes near the limit.
            raise Error("JSON nesting depth limit exceeded") from None
