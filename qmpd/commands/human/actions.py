"""The commands that do something."""

from __future__ import annotations

import re
import sys
from collections.abc import Awaitable, Callable
from typing import Any, Final

from qmpd.block.backend import Backend
from qmpd.block.permissions import Permission
from qmpd.block.qemu_io import QemuIO
from qmpd.commands.human import printed
from qmpd.commands.human.command import Command
from qmpd.commands.human.line import Complaint, Flag, Number, Rest, Settings, Size, Word
from qmpd.commands.human.qmp import Qmp
from qmpd.errors import Error
from qmpd.qapi import HelpRequested, settings
from qmpd.qapi.keyval import convert
from qmpd.qapi.types import BUILTINS, ObjectType
from qmpd.qjson import parse_json
from qmpd.qom.option_help import device_help, models_help, object_help
from qmpd.sockets import written_address


def _quietly(qmp_command: str, *members: str) -> Callable[..., Awaitable[str]]:
    """What a command does that only executes a QMP command and has nothing to say.

    :param members: the QMP command's arguments, one for each value.
    """

    async def run(qmp: Qmp, *found: Any) -> str:
        await qmp.call(qmp_command, dict(zip(members, found, strict=True)))
        return ""

    return run


# -- devices and objects


#: How a refusal begins that repeats what stands where the type is wanted.
_WRONG_TYPE: Final = "Parameter 'qom-type' does not"


async def _device_add(qmp: Qmp, text: str) -> str:
    try:
        options = settings.parse_settings(text, None, "driver")
    except settings.HelpRequested:
        return _device_help(qmp, text.removeprefix("driver=").partition(",")[0])
    except Error as error:
        raise Complaint(f"{error.desc}\n") from None
    qmp.parts.hotplug.add(options, written=True)
    return ""


def _device_help(qmp: Qmp, driver: str) -> str:
    if driver in ("help", "?"):
        return f"{models_help()}\n"
    try:
        return f"{device_help(qmp.parts.schema, driver)}\n"
    except Error as error:
        return f"{error.desc}\n"


async def _object_add(qmp: Qmp, text: str) -> str:
    try:
        options = qmp.parts.schema.from_option("ObjectOptions", text, "qom-type")
    except HelpRequested as request:
        return f"{object_help(qmp.parts.schema, request.options.get('qom-type'))}\n"
    except Error as error:
        raise _without_secret(qmp, text, error) from None
    await qmp.call("object-add", options)
    return ""


def _without_secret(qmp: Qmp, text: str, error: Error) -> Error:
    """A refusal to read an object's options, without what may be a piece of a secret's value.

    A comma that was not doubled, or a quotation mark, lets a piece look like a parameter.
    """
    options = qmp.parts.schema.types["ObjectOptions"]
    assert isinstance(options, ObjectType), "object-add takes an object"
    known = {"qom-type", "id"}
    for branch in map(qmp.parts.schema.types.__getitem__, options.branches.values()):
        known |= {member.name for member in branch.members} if isinstance(branch, ObjectType) else set()
    named = re.match(r"Parameter '([^']*)'", error.desc)
    harmless = named is not None and named[1] in known and not error.desc.startswith(_WRONG_TYPE)
    if harmless or not re.search("secret|data", text):
        return error
    return Error("The options of the secret can't be read; a comma within a value is written twice")


async def _qom_list(qmp: Qmp, path: str | None) -> str:
    if path is None:
        return "/\n"
    found = await qmp.call("qom-list", {"path": path})
    return "".join(f"{each['name']} ({each['type']})\n" for each in found)


async def _qom_get(qmp: Qmp, path: str, name: str) -> str:
    return printed.json(await qmp.call("qom-get", {"path": path, "property": name}))


async def _qom_set(qmp: Qmp, as_json: bool, path: str, name: str, text: str) -> str:
    value = parse_json(text) if as_json else _property_value(qmp, path, name, text)
    await qmp.call("qom-set", {"path": path, "property": name, "value": value})
    return ""


def _property_value(qmp: Qmp, path: str, name: str, text: str) -> object:
    """What a text means as a value of a property: a number, a boolean, or just that text."""
    try:
        found = qmp.parts.objects.resolve(path).property(name)
    except Error:
        # Setting it will say so, in its own words.
        return text
    builtin = BUILTINS.get(found.type.removesuffix("_t"))
    if builtin is None or builtin.json_type == "string" or found.set is None:
        return text
    value = convert(BUILTINS, builtin.name, text)
    if isinstance(value, str):
        expected = {"bool": "'on' or 'off'", "int": "int64"}.get(builtin.name, builtin.name)
        raise Error(f"Parameter '{name}' expects {expected}")
    return value


# -- nodes


async def _drive_del(qmp: Qmp, name: str) -> str:
    """Close a node."""
    if qmp.parts.graph.find(name) is None:
        return f"Device '{name}' not found\n"
    try:
        await qmp.call("blockdev-del", {"node-name": name})
    except Error as error:
        return f"{error.desc}\n"
    return ""


async def _snapshot_blkdev(qmp: Qmp, reuse: bool, device: str, file: str | None, form: str | None) -> str:
    if file is None:
        raise Error("Parameter 'snapshot-file' is missing")
    mode = "existing" if reuse else "absolute-paths"
    arguments = {"device": device, "snapshot-file": file, "format": form, "mode": mode}
    await qmp.call("blockdev-snapshot-sync", arguments)
    return ""


async def _qemu_io(qmp: Qmp, is_device: bool, name: str, line: str) -> str:
    if is_device:
        return await _on(qmp, qmp.parts.devices.backend(name), line)
    if qmp.parts.graph.find(name) is None and (disk := qmp.parts.devices.disk(name)) is not None:
        # Not in QEMU: the plain id of a device means its disk.
        return await _on(qmp, disk, line)
    with Backend(qmp.parts.graph, perm=Permission.nothing()).use(
        qmp.parts.graph.lookup(None, name)
    ) as backend:
        return await _on(qmp, backend, line)


async def _on(qmp: Qmp, backend: Backend, line: str) -> str:
    try:
        await QemuIO(backend, qmp.parts.stdout, sys.stderr).execute(line)
    except Error as error:
        return "".join(f"{line}\n" for line in error.lines)
    return ""


# -- the NBD server


async def _nbd_server_start(qmp: Qmp, all_disks: bool, writable: bool, address: str) -> str:
    if writable and not all_disks:
        raise Error("-w only valid together with -a")
    found = written_address(address)
    await qmp.call("nbd-server-start", {"addr": {"type": found.pop("type"), "data": found}})
    try:
        for info in await qmp.call("query-block") if all_disks else ():
            await qmp.call("nbd-server-add", {"device": info["device"], "writable": writable})
    except BaseException:
        await qmp.call("nbd-server-stop")
        raise
    return ""


async def _nbd_server_remove(qmp: Qmp, force: bool, name: str) -> str:
    await qmp.call("nbd-server-remove", {"name": name, "mode": "hard" if force else "safe"})
    return ""


_DEVICE: Final = Word("block device name")

ACTIONS: Final = (
    Command("stop|s", "", "stop the machine", _quietly("stop"), needs="stop"),
    Command("cont|c", "", "let the machine go on", _quietly("cont"), needs="cont"),
    Command("system_reset", "", "start the machine over", _quietly("system_reset")),
    Command(
        "system_powerdown",
        "",
        "press the power button",
        _quietly("system_powerdown"),
        needs="system_powerdown",
    ),
    Command("quit|q", "", "end the daemon", _quietly("quit")),
    Command("device_add", "model,id=ID,property=VALUE...", "plug a device in", _device_add, (Settings(),)),
    Command("device_del", "id", "unplug a device", _quietly("device_del", "id"), (Word(),)),
    Command("object_add", "type,id=ID,property=VALUE...", "make an object", _object_add, (Rest(),)),
    Command("object_del", "id", "remove an object", _quietly("object-del", "id"), (Word(),)),
    Command("qom-list", "[path]", "the properties of an object", _qom_list, (Word(optional=True),)),
    Command("qom-get", "path property", "the value of a property", _qom_get, (Word(), Word())),
    Command(
        "qom-set",
        "[-j] path property value",
        "give a property a value, with -j in JSON",
        _qom_set,
        (Flag("j"), Word(), Word(), Rest()),
    ),
    Command(
        "block_resize",
        "device size",
        "change a disk's size; a number alone is in MiB",
        _quietly("block_resize", "device", "size"),
        (_DEVICE, Size()),
    ),
    Command(
        "block_set_io_throttle",
        "device bps bps_rd bps_wr iops iops_rd iops_wr",
        "limit what a disk reads and writes in a second; 0 for no limit",
        _quietly("block_set_io_throttle", "id", "bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"),
        (_DEVICE, *[Number()] * 6),
        needs="block_set_io_throttle",
    ),
    Command("drive_del", "node", "close a node", _drive_del, (_DEVICE,)),
    Command(
        "snapshot_blkdev",
        "[-n] device file [format]",
        "put a new overlay in front of a disk, with -n one that is there",
        _snapshot_blkdev,
        (Flag("n"), _DEVICE, Word(optional=True), Word(optional=True)),
    ),
    Command(
        "snapshot_blkdev_internal",
        "node name",
        "make a snapshot inside an image",
        _quietly("blockdev-snapshot-internal-sync", "device", "name"),
        (_DEVICE, Word()),
    ),
    Command(
        "snapshot_delete_blkdev_internal",
        "node name [id]",
        "forget a snapshot inside an image",
        _quietly("blockdev-snapshot-delete-internal-sync", "device", "name", "id"),
        (_DEVICE, Word(), Word(optional=True)),
    ),
    Command(
        "qemu-io",
        '[-d] node "command"',
        "move data of a node; with -d, of a device by its path",
        _qemu_io,
        (Flag("d"), _DEVICE, Word()),
    ),
    Command(
        "nbd_server_start",
        "[-a] [-w] host:port",
        "start the NBD server, also at unix:PATH; with -a export all disks, with -w writable",
        _nbd_server_start,
        (Flag("a"), Flag("w"), Word()),
    ),
    Command(
        "nbd_server_add",
        "[-w] node [name]",
        "export a node, with -w writable",
        _quietly("nbd-server-add", "writable", "device", "name"),
        (Flag("w"), _DEVICE, Word(optional=True)),
    ),
    Command(
        "nbd_server_remove",
        "[-f] name",
        "end an export, with -f though there are clients",
        _nbd_server_remove,
        (Flag("f"), Word()),
    ),
    Command("nbd_server_stop", "", "stop the NBD server", _quietly("nbd-server-stop")),
    Command(
        "getfd",
        "name",
        "name the descriptor that came with this command",
        _quietly("getfd", "fdname"),
        (Word(),),
        needs="getfd",
    ),
    Command(
        "closefd",
        "name",
        "close a named descriptor",
        _quietly("closefd", "fdname"),
        (Word(),),
        needs="closefd",
    ),
)
