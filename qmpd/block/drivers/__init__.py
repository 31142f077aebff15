"""The block drivers, one file or folder each.

A driver's module offers its node class and, if it can make images, a function
`create`.  Modules are imported when the first node or image of theirs is
wanted, so that a daemon without encrypted disks starts without the ciphers.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from qmpd.block.graph import Graph
    from qmpd.block.node import Node

#: A driver's function that makes an image from BlockdevCreateOptions.
Create = Callable[["Graph", Mapping[str, Any]], Awaitable[None]]

#: Module and class by QAPI name (enum BlockdevDriver).
_CLASSES: Final[Mapping[str, tuple[str, str]]] = {
    "file": ("file", "FileNode"),
    "gluks": ("luks", "GluksNode"),
    "host_device": ("host_device", "HostDeviceNode"),
    "luks": ("luks", "LuksNode"),
    "null-aio": ("null", "NullAioNode"),
    "null-co": ("null", "NullCoNode"),
    "qcow2": ("qcow2.driver", "Qcow2Node"),
    "raw": ("raw", "RawNode"),
    "throttle": ("throttle", "ThrottleNode"),
}

#: The drivers that can make images, and the modules with their `create`.
_CREATORS: Final[Mapping[str, str]] = {"file": "file", "luks": "luks", "qcow2": "qcow2.creation"}


class _Drivers(Mapping[str, "type[Node]"]):
    """The node classes by QAPI name, imported when they are looked up."""

    def __getitem__(self, name: str) -> type[Node]:
        module, class_name = _CLASSES[name]
        node_class: type[Node] = getattr(import_module(f"{__name__}.{module}"), class_name)
        return node_class

    def __iter__(self) -> Iterator[str]:
        return iter(_CLASSES)

    def __len__(self) -> int:
        return len(_CLASSES)


#: What a graph is made with.
DRIVERS: Final[Mapping[str, type[Node]]] = _Drivers()


def can_create(driver: str) -> bool:
    """Whether images can be made for this driver."""
    return driver in _CREATORS


async def create(graph: Graph, options: Mapping[str, Any]) -> None:
    """Make an image.

    :param options: BlockdevCreateOptions, validated, in QAPI's names.
    :raise Error: what went wrong.
    """
    module = await graph.in_io_thread(import_module, f"{__name__}.{_CREATORS[options['driver']]}")
    creator: Create = module.create
    await creator(graph, options)
