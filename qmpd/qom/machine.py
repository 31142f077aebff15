"""The machine as an object: ``/machine``, above all devices."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from qmpd.qom.object import Container, Object, Property
from qmpd.qom.types import TYPES


class MachineObject(Container):
    """The machine of an emulator.

    :param machine: its type's full name, as `query-machines` shows it.
    :param values: its properties, which nobody can change any more.
    """

    def __init__(self, machine: str, values: Mapping[str, Any]) -> None:
        super().__init__(f"{machine}-machine")
        self._values = values
        #: The object that is its memory, on paper.
        self.memory: Object | None = None

    def own_properties(self) -> Mapping[str, Property]:
        """What the command line said about it."""
        types = TYPES["machine"].properties
        return {name: Property(name, type_, partial(self._value, name)) for name, type_ in types.items()}

    def _value(self, name: str) -> Any:
        if name == "memory-backend":
            return "" if self.memory is None else self.memory.path
        if name == "memory" and self.memory is not None:
            return {"size": self.memory.property("size").get()}
        return self._values[name]
