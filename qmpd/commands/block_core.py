"""Commands of `schema/block-core.json`: nodes, their users, and images."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from time import perf_counter_ns
from typing import Any, Final

from qmpd.block import inspection, snapshots
from qmpd.block.accounting import Accounting
from qmpd.block.amending import amend, check_amendable
from qmpd.block.backend import Backend
from qmpd.block.change import Change
from qmpd.block.drivers import can_create, create
from qmpd.block.graph import check_unused_as_backing
from qmpd.block.node import InternalSnapshot, Node
from qmpd.block.permissions import Permission
from qmpd.block.reopening import reopen
from qmpd.commands.parts import Handler, Parts
from qmpd.commands.throttling import limits_info
from qmpd.errors import DeviceNotActive, Error
from qmpd.qom.guest_disk import GuestDisk
from qmpd.qom.latency import TimedAccounting

# -- adding and deleting


async def blockdev_add(parts: Parts, arguments: dict[str, Any]) -> dict[str, Any]:
    """Open a node."""
    await parts.graph.add(arguments)
    return {}


async def blockdev_del(parts: Parts, arguments: dict[str, Any]) -> dict[str, Any]:
    """Close a node."""
    await parts.graph.delete(arguments["node-name"])
    return {}


def blockdev_create(parts: Parts, arguments: dict[str, Any]) -> dict[str, Any]:
    """Start a job that makes an image."""
    options = arguments["options"]
    if not can_create(options["driver"]):
        raise Error("Driver does not support blockdev-create")
    if options.get("size", 0) < 0:
        # QMP takes a negative number for an unsigned one, and so it is a very large one.
        options = {**options, "size": options["size"] % (1 << 64)}
    if "size" not in options and "header" not in options:
        # A detached header can be made alone; whatever has a payload has a size.
        raise Error("Parameter 'options.size' is missing")
    parts.jobs.start(arguments["job-id"], "create", lambda job: create(parts.graph, options))
    return {}


def blockdev_amend(parts: Parts, arguments: dict[str, Any]) -> dict[str, Any]:
    """Start a job that changes what an image's header says."""
    node = parts.graph.lookup(None, arguments["node-name"])
    options, force = arguments["options"], arguments.get("force", False)
    check_amendable(node, options)
    job = parts.jobs.start(
        arguments["job-id"],
        "amend",
        lambda job: amend(node, options, force=force, progress=job.report_progress, commit=job.commit),
        check=node.check_amend,
    )
    job.farewell = node.keep()
    return {}


async def block_resize(parts: Parts, arguments: dict[str, Any]) -> dict[str, Any]:
    """Change a disk's size."""
    node = parts.graph.lookup(arguments.get("device"), arguments.get("node-name"))
    if arguments["size"] < 0:
        raise Error("Parameter 'size' expects a >0 size")
    check_unused_as_backing(node)
    with Backend(parts.graph, perm=Permission.RESIZE).use(node) as backend:
        # What is below changes its size as well, and may have other users.
        async with parts.graph.drained(*parts.graph.subtree(node)):
            await backend.truncate(arguments["size"])
    return {}


def block_set_write_threshold(parts: Parts, arguments: dict[str, Any]) -> dict[str, Any]:
    """Have a write beyond an offset told of, once."""
    name = arguments["node-name"]
    node = parts.graph.find(name)
    if node is None:
        raise Error(f"Device '{name}' not found")
    node.write_threshold = arguments["write-threshold"] % (1 << 64)
    return {}


# -- changing what is there


async def blockdev_reopen(parts: Parts, arguments: dict[str, Any]) -> dict[str, Any]:
    """Give nodes other options."""
    await reopen(parts.graph, arguments["options"])
    return {}


async def blockdev_snapshot(parts: Parts, arguments: dict[str, Any]) -> dict[str, Any]:
    """Put an overlay in front of a node."""
    async with parts.graph.change() as change:
        await snapshots.put_overlay(parts.graph, arguments["node"], arguments["overlay"], change)
    return {}


async def snapshot_sync(parts: Parts, arguments: dict[str, Any], change: Change) -> None:
    """Make an overlay and put it in front of a disk, as a step of a change."""
    await snapshots.put_new_overlay(
        parts.graph,
        parts.graph.lookup(arguments.get("device"), arguments.get("node-name")),
        arguments["snapshot-file"],
        arguments.get("snapshot-node-name"),
        change,
        image_format=arguments.get("format", "qcow2"),
        existing=arguments.get("mode") == "existing",
        needs_name="node-name" in arguments,
    )


async def blockdev_snapshot_sync(parts: Parts, arguments: dict[str, Any]) -> dict[str, Any]:
    """Make an overlay and put it in front of a disk."""
    async with parts.graph.change() as change:
        await snapshot_sync(parts, arguments, change)
    return {}


async def change_backing_file(parts: Parts, arguments: dict[str, Any]) -> dict[str, Any]:
    """Write a name into an image's header."""
    await snapshots.change_backing_file(
        parts.graph, arguments["device"], arguments["image-node-name"], arguments["backing-file"]
    )
    return {}


async def blockdev_snapshot_internal_sync(parts: Parts, arguments: dict[str, Any]) -> dict[str, Any]:
    """Make a snapshot inside an image."""
    async with parts.graph.change() as change:
        await snapshots.create_internal(parts.graph, arguments["device"], arguments["name"], change)
    return {}


async def blockdev_snapshot_delete_internal_sync(parts: Parts, arguments: dict[str, Any]) -> dict[str, Any]:
    """Forget a snapshot inside an image."""
    snapshot_id, name = arguments.get("id"), arguments.get("name")
    return snapshot_info(await snapshots.delete_internal(parts.graph, arguments["device"], snapshot_id, name))


# -- queries


def query_named_block_nodes(parts: Parts, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """All nodes, newest first."""
    flat = arguments.get("flat", False)
    return [block_device_info(node, flat=flat) for node in parts.graph.nodes()]


def query_block(parts: Parts, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """All disks of devices."""
    return [block_info(backend, parts.hotplug.nbd_uri(backend)) for backend in parts.graph.disks()]


def query_blockstats(parts: Parts, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """The counters of all disks, or of all nodes."""
    if arguments.get("query-nodes"):
        return [node_stats(node) for node in reversed(parts.graph.nodes())]
    return [disk_stats(backend) for backend in parts.graph.disks()]


def block_latency_histogram_set(parts: Parts, arguments: dict[str, Any]) -> dict[str, Any]:
    """Count a disk's requests by the time that they take."""
    backend = parts.devices.backend(arguments["id"])
    assert isinstance(backend, GuestDisk), "only devices have disks"
    members = {"read": "rd", "write": "wr", "zap": "zone_append", "flush": "flush"}
    own = {
        kind: arguments[f"boundaries-{member}"]
        for member, kind in members.items()
        if f"boundaries-{member}" in arguments
    }
    backend.accounting.set_histograms(arguments["id"], arguments.get("boundaries"), own)
    return {}


def x_debug_query_block_graph(parts: Parts, arguments: dict[str, Any]) -> dict[str, Any]:
    """Vertices and edges, with permissions."""
    picture = inspection.picture(parts.graph)
    return {
        "nodes": [
            {
                "id": picture.numbers[vertex],
                "type": "block-driver" if isinstance(vertex, Node) else "block-backend",
                "name": vertex.name if isinstance(vertex, Node) else vertex.name or vertex.qdev or "",
            }
            for vertex in picture.vertices
        ],
        "edges": [
            {
                "parent": picture.numbers[edge.parent],  # type: ignore[index]
                "child": picture.numbers[edge.child],
                "name": edge.name,
                "perm": permission_list(edge.perm),
                "shared-perm": permission_list(edge.shared),
            }
            for edge in picture.edges
        ],
    }


# -- QAPI's structures

#: BlockPermission, in the order in which QEMU lists them.
_PERMISSIONS: Final = (
    (Permission.RESIZE, "resize"),
    (Permission.WRITE_UNCHANGED, "write-unchanged"),
    (Permission.WRITE, "write"),
    (Permission.CONSISTENT_READ, "consistent-read"),
)


def permission_list(permissions: Permission) -> list[str]:
    """A list of BlockPermission."""
    return [name for permission, name in _PERMISSIONS if permission & permissions]


def snapshot_info(snapshot: InternalSnapshot) -> dict[str, Any]:
    """SnapshotInfo."""
    second = 1_000_000_000
    return {
        "vm-clock-nsec": snapshot.vm_clock % second,
        "name": snapshot.name,
        "date-sec": snapshot.date // second,
        "date-nsec": snapshot.date % second,
        "vm-clock-sec": snapshot.vm_clock // second,
        "id": snapshot.id,
        "vm-state-size": snapshot.vm_state_size,
        **({} if snapshot.icount is None else {"icount": snapshot.icount}),
    }


def image_info(node: Node, *, flat: bool = False) -> dict[str, Any]:
    """ImageInfo, and unless it shall be `flat` that of the images behind.

    :raise Error: after fatal damage there is nothing to tell, as in QEMU.
    """
    if node.ejected:
        raise Error(f"Block device {node.name} is ejected")
    info: dict[str, Any] = {
        "virtual-size": node.size,
        "filename": node.filename,
        "format": node.driver,
        "actual-size": node.allocated_size,
    }
    if node.cluster_size is not None:
        info["cluster-size"] = node.cluster_size
    if node.encrypted:
        info["encrypted"] = True
    specific = node.format_specific()
    if specific is not None:
        info["format-specific"] = specific
    if node.has_info:
        info["dirty-flag"] = node.dirty
    if node.internal_snapshots:
        info["snapshots"] = [snapshot_info(snapshot) for snapshot in node.internal_snapshots]
    if node.backing_filename is not None:
        info["backing-filename"] = node.backing_filename
        with suppress(Error):
            info["full-backing-filename"] = node.full_backing_filename
        if node.backing_format is not None:
            info["backing-filename-format"] = node.backing_format
    if node.backing is not None and not flat:
        info["backing-image"] = image_info(node.backing)
    return info


def block_device_info(node: Node, *, flat: bool = False) -> dict[str, Any]:
    """BlockDeviceInfo, `flat` without the images behind; limits are on disks, so a node has none."""
    image = image_info(node, flat=flat)
    options = node.node_options
    return {
        "detect_zeroes": options.detect_zeroes,
        "active": True,
        "image": image,
        "ro": node.read_only,
        "node-name": node.name,
        "backing_file_depth": 0 if flat else node.backing_depth,
        **({"backing_file": node.backing.filename} if node.backing is not None else {}),
        "drv": node.driver,
        # Shown as the signed number that it is for QEMU.
        "write_threshold": (node.write_threshold + (1 << 63)) % (1 << 64) - (1 << 63),
        "encrypted": node.encrypted,
        "cache": {"no-flush": options.no_flush, "direct": options.direct, "writeback": True},
        "file": image["filename"],
        **limits_info(None),
    }


def block_info(backend: Backend, nbd_uri: str | None = None) -> dict[str, Any]:
    """BlockInfo of a device's disk.

    :param nbd_uri: where NBD clients find it, if they do.

    There is an I/O status where in QEMU an error may stop the machine.  A device with an
    empty id has a name that can't be told from none.
    """
    assert isinstance(backend, GuestDisk), "only devices have disks"
    inserted = None if backend.node.ejected else block_device_info(backend.node)
    if inserted is not None:
        inserted["cache"]["writeback"] = backend.write_cache
        inserted |= limits_info(backend.throttle_group)
    return {
        **({"io-status": backend.io_status} if backend.stops_on_error else {}),
        "device": backend.name,
        "locked": False,
        "removable": backend.removable,
        **({} if inserted is None else {"inserted": inserted}),
        **({"qdev": backend.qdev} if backend.qdev else {}),
        **({"tray_open": False} if backend.removable else {}),
        "type": "unknown",
        **({"nbd-uri": nbd_uri} if nbd_uri is not None else {}),
    }


def device_stats(accounting: Accounting, write_highest_offset: int) -> dict[str, Any]:
    """BlockDeviceStats."""
    stats: dict[str, Any] = {
        "wr_highest_offset": write_highest_offset,
        "account_invalid": accounting.count_invalid,
        "account_failed": accounting.count_failed,
        "timed_stats": [],
    }
    if accounting.last:
        stats["idle_time_ns"] = perf_counter_ns() - accounting.last
    for kind, counter in accounting.counters.items():
        stats[f"{kind}_operations"] = counter.operations
        stats[f"{kind}_total_time_ns"] = counter.time
        stats[f"failed_{kind}_operations"] = counter.failed
        stats[f"invalid_{kind}_operations"] = counter.invalid
        if kind != "flush":
            stats[f"{kind}_bytes"] = counter.bytes
            stats[f"{kind}_merged"] = counter.merged
    if isinstance(accounting, TimedAccounting):
        for kind, histogram in accounting.histograms.items():
            stats[f"{kind}_latency_histogram"] = {
                "boundaries": histogram.boundaries,
                "bins": histogram.bins,
            }
    return stats


def node_stats(node: Node, *, with_backing: bool = False) -> dict[str, Any]:
    """BlockStats of a node and of what it gets its data from, perhaps with the images behind."""
    stats: dict[str, Any] = {"node-name": node.name}
    specific = node.driver_statistics()
    if specific is not None:
        stats["driver-specific"] = specific
    stats["stats"] = device_stats(
        Accounting(count_invalid=False, count_failed=False), node.write_highest_offset
    )
    if "file" in node.children:
        stats["parent"] = node_stats(node.file, with_backing=with_backing)
    if node.backing is not None and with_backing:
        stats["backing"] = node_stats(node.backing, with_backing=True)
    return stats


def disk_stats(backend: Backend) -> dict[str, Any]:
    """BlockStats of a device's disk."""
    stats = node_stats(backend.node, with_backing=True)
    stats["stats"] = device_stats(backend.accounting, backend.node.write_highest_offset)
    return {"device": backend.name, **({"qdev": backend.qdev} if backend.qdev else {}), **stats}


# -- block jobs: there is none yet, so none can be found


def query_block_jobs(parts: Parts, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """The jobs that belong to a device or a node."""
    return []


def block_job_verb(member: str, parts: Parts, arguments: dict[str, Any]) -> dict[str, Any]:
    """Any of the block-job-* verbs on a job that is not there."""
    raise DeviceNotActive(f"Block job '{arguments[member]}' not found")


HANDLERS: Final[Mapping[str, Handler]] = {
    "blockdev-add": blockdev_add,
    "blockdev-del": blockdev_del,
    "blockdev-create": blockdev_create,
    "blockdev-amend": blockdev_amend,
    "x-blockdev-amend": blockdev_amend,
    "block_resize": block_resize,
    "block-set-write-threshold": block_set_write_threshold,
    "blockdev-reopen": blockdev_reopen,
    "blockdev-snapshot": blockdev_snapshot,
    "blockdev-snapshot-sync": blockdev_snapshot_sync,
    "change-backing-file": change_backing_file,
    "blockdev-snapshot-internal-sync": blockdev_snapshot_internal_sync,
    "blockdev-snapshot-delete-internal-sync": blockdev_snapshot_delete_internal_sync,
    "query-named-block-nodes": query_named_block_nodes,
    "query-block": query_block,
    "query-blockstats": query_blockstats,
    "block-latency-histogram-set": block_latency_histogram_set,
    "x-debug-query-block-graph": x_debug_query_block_graph,
    "query-block-jobs": query_block_jobs,
    "block-job-cancel": partial(block_job_verb, "device"),
    "block-job-complete": partial(block_job_verb, "device"),
    "block-job-dismiss": partial(block_job_verb, "id"),
    "block-job-finalize": partial(block_job_verb, "id"),
    "block-job-pause": partial(block_job_verb, "device"),
    "block-job-resume": partial(block_job_verb, "device"),
    "block-job-set-speed": partial(block_job_verb, "device"),
}
