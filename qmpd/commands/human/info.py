"""The commands that begin with ``info``: they ask and change nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from qmpd.commands.human import device_tree, printed
from qmpd.commands.human.command import Command
from qmpd.commands.human.line import Flag, Word
from qmpd.commands.human.qmp import Qmp
from qmpd.errors import DeviceNotFound
from qmpd.qom.object import Object
from qmpd.qom.option_help import models_help
from qmpd.qom.tree import AmbiguousPath


async def _block(qmp: Qmp, nodes: bool, verbose: bool, name: str | None) -> str:
    """Disks, or with `nodes` or a name that no disk has, nodes."""
    disks = [] if nodes else await qmp.call("query-block")
    shown = [
        ("\n" if index else "") + printed.disk(info, verbose=verbose)
        for index, info in enumerate(disks)
        if name is None or name == info["device"]
    ]
    if shown or not (nodes or name):
        return "".join(shown)
    # A blank line is in front of every node but the newest, shown or not.
    return "".join(
        ("\n" if index else "") + printed.node(info, verbose=verbose)
        for index, info in enumerate(await qmp.call("query-named-block-nodes"))
        if name is None or name == info["node-name"]
    )


async def _block_jobs(qmp: Qmp) -> str:
    """Jobs that belong to a node: there are none yet."""
    return "No active jobs\n"


async def _block_stats(qmp: Qmp) -> str:
    return "".join(map(printed.counters, await qmp.call("query-blockstats")))


async def _chardev(qmp: Qmp) -> str:
    found = await qmp.call("query-chardev")
    return "".join(f"{info['label']}: filename={info['filename']}\n" for info in found)


async def _cpus(qmp: Qmp) -> str:
    found = await qmp.call("query-cpus-fast")
    return "".join(
        f"{' ' if index else '*'} CPU #{info['cpu-index']}: thread_id={info['thread-id']}\n"
        for index, info in enumerate(found)
    )


async def _io_threads(qmp: Qmp) -> str:
    return "".join(map(printed.io_thread, await qmp.call("query-iothreads")))


async def _kvm(qmp: Qmp) -> str:
    info = await qmp.call("query-kvm")
    state = "enabled" if info["enabled"] else "disabled" if info["present"] else "not compiled"
    return f"kvm support: {state}\n"


async def _name(qmp: Qmp) -> str:
    info = await qmp.call("query-name")
    return f"{info['name']}\n" if "name" in info else ""


async def _models(qmp: Qmp) -> str:
    return f"{models_help()}\n"


async def _qom_tree(qmp: Qmp, path: str | None) -> str:
    """An object and all below it."""
    path = "/machine" if path is None else path
    try:
        found = qmp.parts.objects.resolve(path)
    except (AmbiguousPath, DeviceNotFound):
        return f"Path '{path}' could not be resolved.\n"
    return "".join(f"{line}\n" for line in _objects(found, ""))


def _objects(found: Object, indent: str) -> Iterator[str]:
    yield f"{indent}/{found.name} ({found.type_name})"
    for _, child in sorted(found.children.items()):
        yield from _objects(child, f"{indent}  ")


async def _device_tree(qmp: Qmp, brief: bool) -> str:
    return "".join(f"{line}\n" for line in device_tree.lines(qmp.parts.devices.top_bus, brief=brief))


async def _status(qmp: Qmp) -> str:
    return printed.status(await qmp.call("query-status"))


async def _uuid(qmp: Qmp) -> str:
    return f"{(await qmp.call('query-uuid'))['UUID']}\n"


async def _version(qmp: Qmp) -> str:
    version = await qmp.call("query-version")
    number = version["qemu"]
    return f"{number['major']}.{number['minor']}.{number['micro']}{version['package']}\n"


INFO: Final = (
    Command(
        "block",
        "[-n] [-v] [name]",
        "disks; with -n all nodes, with a name that node; with -v their images too",
        _block,
        (Flag("n"), Flag("v"), Word("block device name", optional=True)),
    ),
    Command("block-jobs", "", "jobs that belong to a node", _block_jobs),
    Command("blockstats", "", "the counters of disks", _block_stats),
    Command("chardev", "", "character devices", _chardev),
    Command("cpus", "", "processors", _cpus, needs="query-cpus-fast"),
    Command("iothreads", "", "I/O threads", _io_threads, needs="query-iothreads"),
    Command("kvm", "", "whether there is KVM", _kvm, needs="query-kvm"),
    Command("name", "", "the machine's name", _name, needs="query-name"),
    Command("qdm", "", "models of devices", _models),
    Command("qom-tree", "[path]", "objects with those below them", _qom_tree, (Word(optional=True),)),
    Command("qtree", "[-b]", "devices on their buses; with -b just their names", _device_tree, (Flag("b"),)),
    Command("status", "", "whether the machine runs", _status, needs="query-status"),
    Command("uuid", "", "the machine's UUID", _uuid, needs="query-uuid"),
    Command("version", "", "the version", _version),
)
