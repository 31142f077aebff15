"""From options to what they ask for: objects, nodes, devices, exports, character devices, monitors.

:class:`Start` gives a daemon, one option after the other, what the command
line describes.  The schema reads the typed options; what QEMU has a dialect of
its own for is read by :mod:`qmpd.cli.chardev_options`.
"""

from __future__ import annotations

import os
import re
import sys
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final, NoReturn

from qmpd.cli import chardev_options, option_values
from qmpd.cli.options import Answered, Nameless, Option, naming
from qmpd.errors import Error
from qmpd.monitor.chardev import ChardevConfig
from qmpd.qapi import HelpRequested, Schema
from qmpd.qapi import settings as dialect
from qmpd.qapi.settings import Kind, is_identifier, parse_settings
from qmpd.qjson import parse_json
from qmpd.qom.option_help import object_help

if TYPE_CHECKING:
    from qmpd.cli.systemd import PassedSocket
    from qmpd.daemon import Daemon


@dataclass
class Start:
    """Makes what the options ask for, in their order.

    :param daemon: what it is made in.
    :param daemonize: the process is on its way into the background.
    """

    daemon: Daemon
    daemonize: bool = False
    _shortcuts: int = field(default=0, init=False)
    _descriptors: set[int] = field(default_factory=set, init=False)
    _identifiers: set[str] = field(default_factory=set, init=False)
    #: What emulator's options of the form ``key=value,...`` have made: kinds of things, and their ids.
    _noted: set[tuple[str, str]] = field(default_factory=set, init=False)
    #: The character devices of ``-qmp`` options that have no monitor yet.
    _prepared: deque[str] = field(default_factory=deque, init=False)

    async def run(self, found: Sequence[Option], sockets: Sequence[PassedSocket] = ()) -> None:
        """Apply every option, then serve the sockets that systemd passed and no option has taken.

        :raise Error: with the option in front.
        :raise Answered: an option asked for help.
        """
        for option in found:
            with naming(option):
                action = _ACTIONS.get(option.name)
                if action is not None:
                    await action(self, option)
        for index, passed in enumerate(sockets):
            if passed.descriptor not in self._descriptors:
                await self._add_passed_socket(index, passed)

    @property
    def _schema(self) -> Schema:
        return self.daemon.schema

    async def _add_passed_socket(self, index: int, passed: PassedSocket) -> None:
        identifier = passed.name
        if not is_identifier(identifier) or identifier in self._identifiers:
            identifier = f"systemd{index}"
        config = ChardevConfig(id=identifier, kind="socket", fd=passed.descriptor, server=True, wait=False)
        await self._add_chardev(config)
        await self.daemon.add_monitor(identifier, False)

    async def _object(self, option: Option) -> None:
        await self.daemon.add_object(self._object_options("ObjectOptions", option.value))

    def _object_options(self, type_name: str, text: str) -> dict[str, Any]:
        try:
            arguments: dict[str, Any] = self._schema.from_option(type_name, text, "qom-type")
        except HelpRequested as request:
            raise Answered(object_help(self._schema, request.options.get("qom-type"))) from None
        return arguments

    async def _emulator_object(self, option: Option, type_name: str = "ObjectOptions") -> None:
        """An emulator's ``-object``, which QEMU reads by another parser, and forgets before it is made."""
        try:
            arguments = self._object_options(type_name, option.value)
        except Error as error:
            if option.value.startswith("{"):
                raise
            raise Error(_as_parsed_by_emulators(error.desc)) from None
        if not option.value.startswith("{"):
            self._note("object", arguments["id"])
        try:
            await self.daemon.add_object(arguments)
        except Error as error:
            raise Nameless(error.desc, error.hint) from None

    async def _blockdev(self, option: Option) -> None:
        arguments = self._schema.from_option("BlockdevOptions", option.value, "driver")
        await self.daemon.add_blockdev(arguments)

    async def _device(self, option: Option) -> None:
        arguments: dict[str, Any]
        written = not option.value.startswith("{")
        if written:
            try:
                arguments = parse_settings(option.value, None, "driver")
            except dialect.HelpRequested:
                raise Error("Help is not available for this option") from None
            self._note("device", arguments.get("id"))
        else:
            arguments = parse_json(option.value)
        if "driver" not in arguments:
            raise Error("Parameter 'driver' is missing")
        await self.daemon.add_device(arguments, written=written)

    def _note(self, kind: str, identifier: str | None) -> None:
        """See that no other option of the form ``key=value,...`` has made such a thing with this id."""
        if identifier is None:
            return
        if (kind, identifier) in self._noted:
            raise Error(f"Duplicate ID '{identifier}' for {kind}")
        self._noted.add((kind, identifier))

    async def _chardev(self, option: Option) -> None:
        try:
            config = chardev_options.chardev_config(option.value)
        except dialect.HelpRequested:
            kinds = "".join(f"\n  {kind}" for kind in chardev_options.CHARDEV_KINDS)
            raise Answered(f"Available chardev backend types:{kinds}") from None
        await self._add_chardev(config)

    async def _qmp(self, option: Option) -> None:
        config = chardev_options.monitor_shortcut(option.value, self._shortcuts)
        self._shortcuts += 1
        await self._add_chardev(config)
        await self.daemon.add_monitor(config.id, False)

    async def _qmp_chardev(self, option: Option) -> None:
        """The first half of an emulator's ``-qmp``: its socket listens before a disk is opened."""
        if option.value.startswith("chardev:"):
            self._prepared.append(option.value.removeprefix("chardev:"))
        else:
            config = chardev_options.monitor_shortcut(option.value, self._shortcuts)
            await self._add_chardev(config)
            self._prepared.append(config.id)
        self._shortcuts += 1

    async def _qmp_monitor(self, option: Option) -> None:
        """The second half: clients are served when all is there that they may ask about."""
        await self.daemon.add_monitor(self._prepared.popleft(), option.name == "qmp-pretty")

    async def _mon(self, option: Option) -> None:
        """An emulator's ``-mon``, which would be for people unless it says otherwise."""
        settings = option_values.settings("mon", option.value, "chardev")
        if "chardev" not in settings:
            raise Error("Parameter 'chardev' is missing")
        option_values.choice(settings, "mode", "readline control", option_values.NOT_ACCEPTED)
        if settings["chardev"] not in self._identifiers:
            raise Error(f'chardev "{settings["chardev"]}" not found')
        if settings.get("mode") != "control":
            raise Error("Only QMP is supported: add mode=control")
        await self.daemon.add_monitor(settings["chardev"], settings.get("pretty", False))

    async def _qtest(self, option: Option) -> None:
        config = replace(chardev_options.monitor_shortcut(option.value, 0), id="qtest")
        await self._add_chardev(config)
        await self.daemon.add_qtest(config.id)

    async def _add_fd(self, option: Option) -> None:
        descriptor, fdset, opaque = option_values.passed_descriptor(option.value)
        self.daemon.add_fd(descriptor, fdset, opaque)

    async def _memory_backend(self, option: Option) -> None:
        await self._emulator_object(option, "MemoryBackendOptions")

    async def _memory(self, option: Option) -> None:
        self.daemon.use_memory(option.value)

    async def _emulator_chardev(self, option: Option) -> None:
        """An emulator's ``-chardev``, whose ids are looked at before there are character devices."""
        found = re.search(r"(?:\A|,)id=([^,]*)", option.value)
        self._note("chardev", found and found[1])
        await self._chardev(option)

    async def _add_chardev(self, config: ChardevConfig) -> None:
        if self.daemonize:
            if config.kind == "stdio":
                raise Error("cannot use stdio with -daemonize")
            if config.path is not None and not config.path.startswith("\0"):
                # The working directory is about to change, and the socket has to be removed later.
                config = replace(config, path=os.path.abspath(config.path))
        if config.fd is not None:
            self._descriptors.add(config.fd)
        self._identifiers.add(config.id)
        await self.daemon.add_chardev(config)

    async def _monitor(self, option: Option) -> None:
        arguments = self._schema.from_option("MonitorOptions", option.value, "chardev")
        await self.daemon.add_monitor(arguments["chardev"], arguments.get("pretty", False))
        if arguments.get("mode") == "readline":
            raise Error("Only QMP is supported")

    async def _trace(self, option: Option) -> None:
        known = dict.fromkeys(("enable", "events", "file"), Kind.TEXT)
        try:
            settings = parse_settings(option.value, known, "enable")
        except dialect.HelpRequested:
            raise Answered("There are no trace events.") from None
        if event := settings.get("enable"):
            # A warning and no error: it is what qemu-storage-daemon says of an event that it does not have.
            warning = f"warning: trace event '{event}' does not exist"
            print(f"qmpd: {option.text}: {warning}", file=sys.stderr, flush=True)

    async def _nbd_server(self, option: Option) -> None:
        arguments = self._schema.from_option("NbdServerOptions", option.value)
        address = arguments["addr"]
        if self.daemonize and address["type"] == "unix" and not address.get("abstract"):
            # The working directory is about to change, and the socket has to be removed later.
            arguments["addr"] = {**address, "path": os.path.abspath(address["path"])}
        await self.daemon.start_nbd_server(arguments)

    async def _export(self, option: Option) -> None:
        arguments = self._schema.from_option("BlockExportOptions", option.value, "type")
        await self.daemon.add_export(arguments)

    async def _device_exports(self, option: Option) -> None:
        if option.value not in ("on", "off"):
            raise Error(f"'{option.value}' is none of on, off")
        self.daemon.export_devices(option.value == "on")

    async def _unexpected(self, option: Option) -> NoReturn:
        raise Error("Unexpected argument")


#: How what makes objects of an emulator's options words what is wrong with a value.
_EMULATOR_WORDINGS: Final = (
    (re.compile(r"Parameter ('.*') is unexpected"), r"Invalid parameter \1"),
    (re.compile(r"(Parameter '.*' expects) integer"), r"\1 an int64 value"),
    (re.compile(r"(Parameter '.*' expects) (size|uint64)"), r"\1 a \2 value"),
)


def _as_parsed_by_emulators(desc: str) -> str:
    for pattern, wording in _EMULATOR_WORDINGS:
        if found := pattern.fullmatch(desc):
            return found.expand(wording)
    return desc


_ACTIONS: Final[Mapping[str, Callable[[Start, Option], Awaitable[None]]]] = {
    "": Start._unexpected,
    "add-fd": Start._add_fd,
    "blockdev": Start._blockdev,
    "chardev": Start._chardev,
    "device": Start._device,
    "device-exports": Start._device_exports,
    "emulator-chardev": Start._emulator_chardev,
    "emulator-object": Start._emulator_object,
    "export": Start._export,
    "memory": Start._memory,
    "memory-backend": Start._memory_backend,
    "mon": Start._mon,
    "monitor": Start._monitor,
    "nbd-server": Start._nbd_server,
    "object": Start._object,
    "qmp": Start._qmp,
    "qmp-chardev": Start._qmp_chardev,
    "qmp-monitor": Start._qmp_monitor,
    "qmp-pretty": Start._qmp_monitor,
    "qtest": Start._qtest,
    "trace": Start._trace,
}
