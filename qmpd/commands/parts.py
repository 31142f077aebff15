"""What a command's handler is given: the parts of the daemon below it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TextIO

from qmpd.block.graph import Graph
from qmpd.descriptors import FdSets
from qmpd.export.exports import Exports
from qmpd.hotplug import Hotplug
from qmpd.jobs import Jobs
from qmpd.machine.machine import Machine
from qmpd.qapi import Schema
from qmpd.qom.devices import Devices
from qmpd.qom.tree import ObjectTree

#: Sends an event to every negotiated client.
Emit = Callable[[str, dict[str, Any]], None]


@dataclass(frozen=True)
class Parts:
    """The rooms that handlers call into.

    :param version: the reply of query-version (VersionInfo), which is also in the greeting.
    :param chardevs: lists the character devices (ChardevInfo).
    :param quit: makes the daemon end once the reply is on its way.
    :param stdout: where qemu-io's output goes.
    :param fdsets: the sets of descriptors that clients have passed.
    :param system: the machine of an emulator; None in a storage daemon.
    """

    schema: Schema
    graph: Graph
    objects: ObjectTree
    devices: Devices
    exports: Exports
    hotplug: Hotplug
    jobs: Jobs
    emit: Emit
    version: Mapping[str, Any]
    chardevs: Callable[[], list[dict[str, Any]]]
    quit: Callable[[], Awaitable[None]]
    stdout: TextIO
    fdsets: FdSets
    system: Machine | None = None

    @property
    def is_system(self) -> bool:
        """Whether there is a machine."""
        return self.system is not None

    @property
    def machine(self) -> Machine:
        """The machine, for commands that only a daemon with one has."""
        assert self.system is not None, "a storage daemon has none of the commands that ask for a machine"
        return self.system


#: Takes the parts and the validated arguments; returns a plain value in QAPI's names, or an awaitable of one.
#: Those of `WITH_DESCRIPTORS` take the client's ClientDescriptors as well.
Handler = Callable[..., Any]

#: The commands that are told of the descriptors that their client has passed.
WITH_DESCRIPTORS: Final = frozenset(
    {"add-fd", "closefd", "getfd", "human-monitor-command", "nbd-server-start"}
)
