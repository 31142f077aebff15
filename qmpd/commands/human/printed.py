"""QAPI's values as people read them, line for line as QEMU's text monitor prints them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from qmpd.monitor.encode import encode

_UNITS: Final = ("", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei")
_INDENT: Final = "    "

#: Of BlockDeviceStats, in this order.
_COUNTERS: Final = (
    *("rd_bytes", "wr_bytes", "rd_operations", "wr_operations", "flush_operations"),
    *("wr_total_time_ns", "rd_total_time_ns", "flush_total_time_ns", "rd_merged", "wr_merged"),
    "idle_time_ns",
)

#: Of IOThreadInfo, in this order: the text in front, and the member.
_IO_THREAD: Final = (
    ("thread_id", "thread-id"),
    ("poll-max-ns", "poll-max-ns"),
    ("poll-grow", "poll-grow"),
    ("poll-shrink", "poll-shrink"),
    ("aio-max-batch", "aio-max-batch"),
)

#: Of BlockDeviceInfo: the limits, in this order, without how long a burst may last.
_RATES: Final = ("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr")
_LIMITS: Final = (
    *("bps", "bps_rd", "bps_wr", "bps_max", "bps_rd_max", "bps_wr_max"),
    *("iops", "iops_rd", "iops_wr", "iops_max", "iops_rd_max", "iops_wr_max", "iops_size"),
)

#: What drivers tell of their format, in QEMU's order, which is no alphabet's; what is ours alone comes last.
_FORMAT_MEMBERS: Final = (
    *("compat", "compression-type", "lazy-refcounts", "bitmaps", "refcount-bits"),
    *("encrypt", "data-file", "data-file-raw", "corrupt", "extended-l2"),
    *("ivgen-alg", "detached-header", "hash-alg", "cipher-alg", "uuid", "ivgen-hash-alg", "format"),
    *("cipher-mode", "slots", "payload-offset", "master-key-iters"),
    *("active", "iters", "key-offset", "stripes"),
    *("flags", "name", "granularity"),
)


def size(number: int) -> str:
    """Bytes with three digits: a unit is used from 1000 of the one below it on."""
    exponent = math.frexp(number / (1000 / 1024))[1]
    unit = max(exponent - 1, 0) // 10
    return f"{number / (1 << 10 * unit):.3g} {_UNITS[unit]}B"


def json(value: Any) -> str:
    """A value in JSON, over several lines."""
    return encode(value, pretty=True).decode().replace("\r\n", "\n")


# -- disks and nodes


def disk(info: Mapping[str, Any], *, verbose: bool) -> str:
    """BlockInfo of a disk, which goes by the name of its node, as disks have no names of their own."""
    inserted = info.get("inserted")
    name = info.get("qdev") or "<anonymous>" if inserted is None else inserted["node-name"]
    lines = [f"{name}: {'[not inserted]' if inserted is None else _image_and_traits(inserted)}"]
    if "qdev" in info:
        lines.append(f"    Attached to:      {info['qdev']}")
    if info.get("io-status", "ok") != "ok":
        lines.append(f"    I/O status:       {info['io-status']}")
    if info["removable"]:
        locked, tray = "" if info["locked"] else "not ", "open" if info.get("tray_open") else "closed"
        lines.append(f"    Removable device: {locked}locked, tray {tray}")
    return _text(lines) + ("" if inserted is None else _inserted(inserted, verbose=verbose))


def node(info: Mapping[str, Any], *, verbose: bool) -> str:
    """BlockDeviceInfo."""
    return f"{info['node-name']}: {_image_and_traits(info)}\n" + _inserted(info, verbose=verbose)


def _image_and_traits(inserted: Mapping[str, Any]) -> str:
    traits = [inserted["drv"]]
    traits += ["read-only"] if inserted["ro"] else []
    traits += ["encrypted"] if inserted["encrypted"] else []
    return f"{inserted['file']} ({', '.join(traits)})"


def _inserted(inserted: Mapping[str, Any], *, verbose: bool) -> str:
    cache = inserted["cache"]
    mode = "writeback" if cache["writeback"] else "writethrough"
    mode += ", direct" if cache["direct"] else ""
    mode += ", ignore flushes" if cache["no-flush"] else ""
    lines = [f"    Cache mode:       {mode}"]
    if "backing_file" in inserted:
        depth = inserted["backing_file_depth"]
        lines.append(f"    Backing file:     {inserted['backing_file']} (chain depth: {depth})")
    if inserted["detect_zeroes"] != "off":
        lines.append(f"    Detect zeroes:    {inserted['detect_zeroes']}")
    if any(inserted[rate] for rate in _RATES):
        limits = " ".join(f"{member}={inserted.get(member, 0)}" for member in _LIMITS)
        lines.append(f"    I/O throttling:   {limits} group={inserted['group']}")
    if verbose:
        lines += ["", "Images:"]
        image: Mapping[str, Any] | None = inserted["image"]
        while image is not None:
            lines += _image(image)
            image = image.get("backing-image")
    return _text(lines)


def _image(image: Mapping[str, Any]) -> Iterator[str]:
    yield f"image: {image['filename']}"
    yield f"file format: {image['format']}"
    yield f"virtual size: {size(image['virtual-size'])} ({image['virtual-size']} bytes)"
    yield f"disk size: {size(image['actual-size']) if 'actual-size' in image else 'unavailable'}"
    if image.get("encrypted"):
        yield "encrypted: yes"
    if "cluster-size" in image:
        yield f"cluster_size: {image['cluster-size']}"
    if image.get("dirty-flag"):
        yield "cleanly shut down: no"
    if "backing-filename" in image:
        name, full = image["backing-filename"], image.get("full-backing-filename")
        actual = " (cannot determine actual path)" if full is None else f" (actual path: {full})"
        yield f"backing file: {name}{'' if full == name else actual}"
        if "backing-filename-format" in image:
            yield f"backing file format: {image['backing-filename-format']}"
    if image.get("snapshots"):
        yield "Snapshot list:"
        yield _row("ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT")
        yield from (_snapshot(snapshot) for snapshot in image["snapshots"])
    if image.get("format-specific", {}).get("data"):
        yield "Format specific information:"
        yield from _members(image["format-specific"]["data"], 1)


def _row(*columns: str) -> str:
    return "{:<7} {:<16} {:>8} {:>19} {:>15} {:>10}".format(*columns)


def _snapshot(snapshot: Mapping[str, Any]) -> str:
    """SnapshotInfo; its date is shown in the local time."""
    date = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(snapshot["date-sec"]))
    minutes, seconds = divmod(snapshot["vm-clock-sec"], 60)
    hours, minutes = divmod(minutes, 60)
    clock = f"{hours:04}:{minutes:02}:{seconds:02}.{snapshot['vm-clock-nsec'] // 1_000_000:03}"
    count = str(snapshot.get("icount", "--"))
    return _row(snapshot["id"], snapshot["name"], size(snapshot["vm-state-size"]), date, clock, count)


def _members(value: Mapping[str, Any] | Sequence[Any], level: int) -> Iterator[str]:
    """The members of an object, or the elements of an array, indented."""
    if isinstance(value, Mapping):
        named = [(key.replace("-", " "), each) for key, each in sorted(value.items(), key=_format_order)]
    else:
        named = [(f"[{index}]", each) for index, each in enumerate(value)]
    for name, each in named:
        if isinstance(each, Mapping | list):
            yield f"{_INDENT * level}{name}:"
            yield from _members(each, level + 1)
        else:
            shown = str(each).lower() if isinstance(each, bool) else each
            yield f"{_INDENT * level}{name}: {shown}"


def _format_order(member: tuple[str, Any]) -> int:
    return _FORMAT_MEMBERS.index(member[0]) if member[0] in _FORMAT_MEMBERS else len(_FORMAT_MEMBERS)


def counters(stats: Mapping[str, Any]) -> str:
    """BlockStats of a disk."""
    shown = " ".join(f"{name}={stats['stats'].get(name, 0)}" for name in _COUNTERS)
    return f"{stats['device']}: {shown}\n"


# -- others


def status(info: Mapping[str, Any]) -> str:
    """StatusInfo."""
    text = "VM status: running" if info["running"] else "VM status: paused"
    if not info["running"] and info["status"] != "paused":
        text += f" ({info['status']})"
    return f"{text}\n"


def io_thread(info: Mapping[str, Any]) -> str:
    """IOThreadInfo."""
    return _text([f"{info['id']}:", *(f"  {shown}={info[member]}" for shown, member in _IO_THREAD)])


def _text(lines: Sequence[str]) -> str:
    return "".join(f"{line}\n" for line in lines)
