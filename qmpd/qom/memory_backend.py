"""Objects that would hold a guest's memory.  There is no guest, and no memory behind them.

An emulator's command line may describe them, and say which one is the machine's
memory; nobody ever asks for a byte of it.  Clients can't make them: the schema's
ObjectOptions has none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from qmpd.errors import Error
from qmpd.qom.object import Property
from qmpd.qom.types import TYPES
from qmpd.qom.user_creatable import UserCreatable


class MemoryBackend(UserCreatable):
    """What the types have in common.

    :raise Error: for a size of nothing.
    """

    #: What properties are unless told otherwise.
    usual: ClassVar[Mapping[str, Any]] = {
        "share": False,
        "dump": True,
        "merge": True,
        "prealloc": False,
        "prealloc-threads": 1,
        "prealloc-context": "",
        "reserve": True,
        "policy": "default",
        "host-nodes": [],
        "x-use-canonical-path-for-ramblock-id": False,
    }

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

    def own_properties(self) -> Mapping[str, Property]:
        """The properties of its type: QOM has other types for them than the schema."""
        types = TYPES[self.qom_type].all_properties()
        return {name: self._property(name, type_) for name, type_ in types.items()}

    def get(self, name: str) -> Any:
        """What was given, or what is usual."""
        return self._options.get(name, self.usual.get(name))

    def info(self) -> dict[str, Any]:
        """What `query-memdev` says of it (Memdev, without the id)."""
        shown = ("size", "merge", "dump", "prealloc", "share", "reserve", "host-nodes", "policy")
        return {name: self.get(name) for name in shown}

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
    usual: ClassVar = {
        **MemoryBackend.usual,
        **dict.fromkeys(("align", "offset"), 0),
        **dict.fromkeys(("discard-data", "pmem", "readonly"), False),
        "rom": "off",
    }


class MemfdBackend(MemoryBackend):
    """The object type "memory-backend-memfd"."""

    qom_type = "memory-backend-memfd"
    struct = "MemoryBackendMemfdProperties"
    usual: ClassVar = {**MemoryBackend.usual, "share": True, "hugetlb": False, "hugetlbsize": 0, "seal": True}
