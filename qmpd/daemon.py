"""A daemon: the one place that constructs the parts and connects them.

Everything hangs from a :class:`Daemon`, so a process can hold several.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping
from typing import Any, Final, TextIO

from qmpd import __version__
from qmpd.block.cipher_pool import CipherPool
from qmpd.block.drivers import DRIVERS
from qmpd.block.graph import Graph
from qmpd.block.node import Node
from qmpd.commands import block_export, table
from qmpd.commands.parts import WITH_DESCRIPTORS, Parts
from qmpd.crypto.memory import KeyMemory
from qmpd.descriptors import Allowance, FdSets, NamedDescriptors
from qmpd.export.exports import Exports
from qmpd.hotplug import Hotplug
from qmpd.jobs import Jobs
from qmpd.machine import types
from qmpd.machine.config import MachineConfig
from qmpd.machine.machine import Machine
from qmpd.machine.properties import properties
from qmpd.monitor.chardev import Announce, ChardevConfig, Chardevs, SocketChardev
from qmpd.monitor.dispatch import Dispatcher
from qmpd.monitor.qtest import QtestConnection
from qmpd.monitor.server import Monitor
from qmpd.monitor.throttle import EventThrottle
from qmpd.qapi import STORAGE_SCHEMA, SYSTEM_SCHEMA, load, schema_directory
from qmpd.qom.boards import BOARDS, Board
from qmpd.qom.devices import Devices
from qmpd.qom.machine import MachineObject
from qmpd.qom.object import Chardev as ChardevObject
from qmpd.qom.tree import ObjectTree

#: The version of QEMU whose behaviour this is, and ours (VersionInfo).
VERSION: Final[Mapping[str, Any]] = {
    "qemu": {"micro": 2, "minor": 0, "major": 10},
    "package": f"qmpd-{__version__}",
}

#: How deep Python's calls may be nested: a request passes up to `LONGEST_CHAIN` images, and
#: each takes a handful of calls.
_DEEPEST_CALLS: Final = 10_000


class Daemon:
    """All of one daemon.  To be made inside a running event loop.

    :param stdout: where qemu-io's output goes; by default the process's.
    :param announce: is told what a person who starts the daemon should know; by
        default it goes to the process's standard error output.
    :param cipher_processes: how many processes cipher long requests beside this one.
    :param pbkdf_memory: what key derivations may take together, in KiB; None for what is usual.
    :param machine: makes it an emulator, with this machine; None for a storage daemon.
    """

    def __init__(
        self,
        *,
        stdout: TextIO | None = None,
        announce: Announce | None = None,
        cipher_processes: int = 0,
        pbkdf_memory: int | None = None,
        machine: MachineConfig | None = None,
    ) -> None:
        sys.setrecursionlimit(max(sys.getrecursionlimit(), _DEEPEST_CALLS))
        self.schema = load(schema_directory(), STORAGE_SCHEMA if machine is None else SYSTEM_SCHEMA)
        self._events = EventThrottle(self._tell)
        key_memory = KeyMemory()
        #: Whether the system lets keys be locked in memory, so that they are never written to swap.
        self.locks_keys = key_memory.take(1).locked
        board: Board | None = None
        if machine is None:
            self._objects = ObjectTree(self.schema, key_memory)
        else:
            machine_type = types.find(machine.type)
            shown = MachineObject(machine_type.name, properties(machine))
            self._objects = ObjectTree(self.schema, key_memory, shown, types.TYPES)
            board = BOARDS[machine_type.family]
        self._descriptors = Allowance()
        self._fdsets = FdSets(self._descriptors)
        self._graph = Graph(
            DRIVERS,
            secrets=self._objects.secret_bytes,
            key_memory=key_memory,
            cipher_pool=CipherPool(cipher_processes) if cipher_processes else None,
            pbkdf_memory=pbkdf_memory,
            validate=self._validated_blockdev_options,
            corrupted=self._image_corrupted,
            exceeded=self._threshold_exceeded,
            fdsets=self._fdsets,
            old_encryption=machine is None,
            throttle_groups=self._objects.throttle_groups,
        )
        self._jobs = Jobs(self._emit)
        self._devices = Devices(self._graph, self._objects, self._emit, board)
        #: The machine of an emulator; a storage daemon has none.
        self._machine = None if machine is None else Machine(machine, self._devices, self._emit, self.quit)
        self._exports = Exports(self._graph, self._emit)
        self._hotplug = Hotplug(self._graph, self._devices, self._exports)
        self._chardevs = Chardevs(announce or _say)
        self._parts = Parts(
            schema=self.schema,
            graph=self._graph,
            objects=self._objects,
            devices=self._devices,
            exports=self._exports,
            hotplug=self._hotplug,
            jobs=self._jobs,
            emit=self._emit,
            version=VERSION,
            chardevs=self._chardevs.query,
            quit=self._quit_in_order,
            stdout=stdout or sys.stdout,
            fdsets=self._fdsets,
            system=self._machine,
        )
        self._dispatcher = Dispatcher(
            self.schema, table.handlers(self._parts), table.GIVEN_UP, WITH_DESCRIPTORS
        )
        self._monitors: list[Monitor] = []
        self._ending = asyncio.Event()

    # -- what a command line asks for

    def add_fd(self, descriptor: int, fdset: int, opaque: str | None = None) -> None:
        """Put a copy of an inherited descriptor into a set; the descriptor itself is closed by `run`.

        :param opaque: whatever is to be remembered of it.
        :raise Error: if it is not one.
        """
        self._fdsets.adopt(descriptor, fdset, opaque)

    async def add_object(self, options: dict[str, Any]) -> None:
        """Make an object.

        :param options: ObjectOptions, validated.
        :raise Error: if it can't be made.
        """
        await self._objects.add(options)

    def use_memory(self, backend_id: str) -> None:
        """Make an object the machine's memory.

        :raise Error: if it is not there or no memory, or not as much as the machine is to have.
        """
        size = self._objects.use_memory(backend_id)
        if self._machine is not None:
            self._machine.use_memory(size)

    async def add_blockdev(self, options: dict[str, Any]) -> None:
        """Open a node.

        :param options: BlockdevOptions, validated.
        :raise Error: if it can't be opened.
        """
        await self._graph.add(options)

    async def add_device(self, options: dict[str, Any], *, written: bool) -> None:
        """Plug a device.

        :param options: as for `device_add`.
        :param written: they were written as ``key=value``; errors are worded accordingly.
        :raise Error: if it can't be plugged.
        """
        self._hotplug.add(options, hotplugged=False, written=written)

    def export_devices(self, wanted: bool) -> None:
        """Serve the disks that are plugged in from now on to NBD clients, or not."""
        self._hotplug.doors = wanted

    async def start_nbd_server(self, options: dict[str, Any]) -> None:
        """Start the NBD server.

        :param options: NbdServerOptions, validated.
        :raise Error: if there is one already, or it can't listen.
        """
        await block_export.start_nbd_server(self._parts, options)

    async def add_export(self, options: dict[str, Any]) -> None:
        """Make an export.

        :param options: BlockExportOptions, validated.
        :raise Error: if it can't be made.
        """
        block_export.block_export_add(self._parts, options)

    async def add_chardev(self, config: ChardevConfig) -> None:
        """Open a character device; with `wait` returns when a client is there.

        :raise Error: if its id is taken or it can't be opened.
        """
        chardev = await self._chardevs.add(config)
        if isinstance(chardev, SocketChardev):
            shown = ChardevObject(config.kind, lambda: chardev.connected, chardev.socket_address)
        else:
            shown = ChardevObject(config.kind)
        self._objects.show_chardev(config.id, shown)

    async def add_monitor(self, chardev_id: str, pretty: bool) -> None:
        """Serve QMP on a character device.

        :raise Error: if there is none with this id, or it is taken.
        """
        chardev = self._chardevs.find(chardev_id)
        monitor = Monitor(self._dispatcher, VERSION, pretty, NamedDescriptors(self._descriptors))
        await chardev.attach(monitor.connection)
        self._monitors.append(monitor)

    async def add_qtest(self, chardev_id: str) -> None:
        """Answer the qtest protocol on a character device.

        :raise Error: if there is none with this id, or it is taken.
        """
        await self._chardevs.find(chardev_id).attach(QtestConnection)

    # -- its life

    async def run(self) -> None:
        """Return when the daemon has been told to end."""
        self._fdsets.close_adopted()
        await self._ending.wait()

    def quit(self) -> None:
        """Execute no further command, and end."""
        for monitor in self._monitors:
            monitor.stop()
        self._ending.set()

    def signalled(self) -> None:
        """End as a signal wants it."""
        if self._machine is not None:
            self._machine.tell_shutdown("host-signal")
        self.quit()

    async def _quit_in_order(self) -> None:
        """The command `quit`: whoever sent it hears of the end of jobs and exports before the reply."""
        for monitor in self._monitors:
            monitor.stop()
        if self._machine is not None:
            self._machine.tell_shutdown("host-qmp-quit")
        self._graph.give_up_keys()
        await self._jobs.close()
        await self._exports.close()
        self.quit()

    async def close(self) -> None:
        """Take everything down, top first: clients get their last replies and events."""
        if self._machine is not None:
            self._machine.close()
        self._graph.give_up_keys()
        await self._jobs.close()
        await self._exports.close()
        self._devices.close()
        self._events.close()
        # Nobody comes in any more; then those who are there are taken leave of.
        await self._chardevs.close()
        for monitor in self._monitors:
            await monitor.close()
        await self._graph.close()
        self._fdsets.close_all()
        self._objects.close()

    def _validated_blockdev_options(self, options: dict[str, Any]) -> dict[str, Any]:
        validated: dict[str, Any] = self.schema.coerce("BlockdevOptions", options)
        self.schema.validate("BlockdevOptions", validated)
        return validated

    def _image_corrupted(self, node: Node, message: str, offset: int, size: int, fatal: bool) -> None:
        _say(f"{node.name}: {'marking image as corrupt' if fatal else 'image is corrupt'}: {message}")
        data: dict[str, Any] = {"device": "", "node-name": node.name, "msg": message}
        if offset >= 0:
            data["offset"] = offset
        if size >= 0:
            data["size"] = size
        self._emit("BLOCK_IMAGE_CORRUPTED", {**data, "fatal": fatal})

    def _threshold_exceeded(self, node: Node, threshold: int, end: int) -> None:
        data = {"node-name": node.name, "amount-exceeded": end - threshold, "write-threshold": threshold}
        self._emit("BLOCK_WRITE_THRESHOLD", data)

    def _emit(self, name: str, data: dict[str, Any]) -> None:
        self._events.emit(name, data)

    def _tell(self, name: str, data: dict[str, Any], nanoseconds: int) -> None:
        for monitor in self._monitors:
            monitor.emit(name, data, nanoseconds)


def _say(text: str) -> None:
    print(f"qmpd: {text}", file=sys.stderr, flush=True)
