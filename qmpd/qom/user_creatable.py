"""Objects that a client makes with `object-add`.

Their properties are the members of a struct in the schema, which is also what
checks a new value.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from qmpd.qapi.types import ObjectType
from qmpd.qom.object import OBJECT_TYPE_NAMES, Object, Property, schema_properties

if TYPE_CHECKING:
    from qmpd.qapi import Schema
    from qmpd.qom.tree import ObjectTree


class UserCreatable(Object):
    """An object below ``/objects``.

    The constructor takes what was given and refuses wrong values; `complete`
    does what needs the rest of the tree, when the object has its place there.

    :param options: ObjectOptions, validated.
    :raise Error: if a value is wrong.
    """

    qom_type: ClassVar[str]
    struct: ClassVar[str]

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__(self.qom_type)
        self._schema: Schema | None = None

    def bind(self, schema: Schema) -> None:
        """Tell the object which schema its properties are in."""
        self._schema = schema

    async def complete(self, options: Mapping[str, Any], tree: ObjectTree) -> None:
        """Make the object usable.

        :raise Error: if that can't be done; it is then taken out of the tree.
        """

    @property
    def in_use(self) -> bool:
        """Whether something would break if the object went now."""
        return False

    def removed(self) -> None:
        """The object is out of the tree: let go of everything."""

    @abstractmethod
    def get(self, name: str) -> Any:
        """The value of one of the struct's members."""

    @abstractmethod
    def set(self, name: str, value: Any) -> None:
        """Give one of the struct's members a new value of the right type.

        :raise Error: if it may not have it.
        """

    def check_settable(self, name: str) -> None:
        """See that a member may be set at all, whatever its new value.

        :raise Error: if it may not.
        """

    def own_properties(self) -> Mapping[str, Property]:
        """The struct's members."""
        assert self._schema is not None, "the tree binds every object that it takes in"
        types = schema_properties(self._schema, self.struct, OBJECT_TYPE_NAMES)
        return {name: self._property(name, type_) for name, type_ in types.items()}

    def _property(self, name: str, type_: str) -> Property:
        return Property(name, type_, lambda: self.get(name), lambda value: self._checked_set(name, value))

    def _checked_set(self, name: str, value: Any) -> None:
        assert self._schema is not None
        self.check_settable(name)
        # With the members that the struct can't be without, one alone is a valid value of it.
        type_ = self._schema.types[self.struct]
        assert isinstance(type_, ObjectType)
        needed = {member.name: self.get(member.name) for member in type_.members if not member.optional}
        self._schema.validate(self.struct, needed | {name: value})
        self.set(name, value)
