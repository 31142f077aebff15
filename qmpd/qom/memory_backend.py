"""Objects that would hold a guest's memory.  There is no guest, and no memory behind them.

An emulator's command line may describe them, and say which one is the machine's
memory; nobody ever asks for a byte of it.  Clients can't make them: the schema's
ObjectOptions has none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qmpd.errors import Error
from qmpd.qom.user_creatable import UserCreatable


class MemoryBackend(UserCreatable):
    """What the types have in common.

    :raise Error: for a size of nothing.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__(options)
        if not options["size"]:
            raise Error(f"property 'size' of {self.qom_type} doesn't take value '0'")
        self._options = options
        #: It is the machine's memory.
        self.is_memory = False

    @property
    def in_use(self) -> bool:
        """A machine keeps its memory."""
        return self.is_memory

    def get(self, name: str) -> Any:
        """What was given."""
        return self._options.get(name)

    def check_settable(self, name: str) -> None:
        """Nothing can be changed."""
        raise Error(f"cannot change property {name} of {self.qom_type}")

    def set(self, name: str, value: Any) -> None:
        """Never reached: see `check_settable`."""
        raise AssertionError(name)


class RamBackend(MemoryBackend):
    """The object type "memory-backend-ram"."""

    qom_type = "memory-backend-ram"
    struct = "MemoryBackendProperties"


class FileBackend(MemoryBackend):
    """The object type "memory-backend-file".  The file is not looked at."""

    qom_type = "memory-backend-file"
    struct = "MemoryBackendFileProperties"


class MemfdBackend(MemoryBackend):
    """The object type "memory-backend-memfd"."""

    qom_type = "memory-backend-memfd"
    struct = "MemoryBackendMemfdProperties"
