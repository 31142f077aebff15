"""Random conversations: whatever a client says, qmpd and QEMU answer the same.

A seed makes a conversation, always the same one, of commands that are right,
wrong, or right at another time; the tables below say what is chosen from.
``qmpdiff`` plays it as it plays the files in ``cases/``.  README.md says what it
does not compare: generated node names, the member order of ``json:`` file
names, allocated sizes.  Virtual sizes are not compared either: qmpd shows them
as they are, while QEMU shows what a node remembers of the one below it, also when
that has been resized.

The seeds are fixed, so that a run that passed passes again.  To look for something
new, take one from the clock; the message of a failure names it, to play it again:

    QMPD_CONVERSATION_SEED=clock pytest tests/conformance/test_random_conversations.py
    QMPD_CONVERSATION_SEED=1234 pytest tests/conformance/test_random_conversations.py

The first step that differs is the finding: what follows may come from it.  It
belongs into a case of its own, with the few steps before it that it needs.

Left out are the differences on purpose (README.md), what makes QEMU abort, and
what a comment beside the tables says.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Final

import peers
import pytest
from daemons import CHECKOUT
from harness import load_qmpdiff

from qmpd.crypto.ciphers import CipherSpec
from qmpd.crypto.luks1 import formatting
from qmpd.crypto.plan import Write
from qmpd.crypto.steps import run

HERE: Final = Path(__file__).parent

#: Steps of a conversation.
LENGTH: Final = 250

#: Seconds for one step of a daemon.
PATIENCE: Final = 20

#: Conversations at a time.  Most of their time is QEMU's waiting until a failed device is gone.
AT_A_TIME: Final = 8

FIXED_SEEDS: Final = (1, 2)

#: Stands for the seed that can be chosen, in the tests' ids too: those must not change from run to run.
CHOSEN: Final = "chosen"

#: Chooses it: a number, or "clock".
SEED_VARIABLE: Final = "QMPD_CONVERSATION_SEED"

Step = dict[str, Any]
Maker = Callable[[Random], list[Step]]

#: Makers of steps, each with its weight.
Commands = Sequence[tuple[int, Maker]]

#: Options: how often each is there, and what it may be.
Options = Mapping[str, tuple[float, Sequence[Any]]]


# -- choosing


def conversation(seed: int, commands: Commands) -> list[Step]:
    """Return the steps that *seed* makes of a table of commands; nothing else decides about them."""
    source = Random(seed)
    weights = [weight for weight, _ in commands]
    steps: list[Step] = []
    while len(steps) < LENGTH:
        ((_, maker),) = source.choices(commands, weights)
        steps += maker(source)
    return steps


def chosen(source: Random, options: Options) -> dict[str, Any]:
    """Return those options that are there this time, each with one of its values."""
    return {
        name: source.choice(values) for name, (share, values) in options.items() if source.random() < share
    }


def step(command: str, arguments: Mapping[str, Any] | None = None, **how: Any) -> Step:
    """Return the step that sends *command*; *how* are members of a case's step."""
    message: dict[str, Any] = {"execute": command}
    if arguments is not None:
        message["arguments"] = dict(arguments)
    return {"cmd": message, **how}


def always(command: str, arguments: Mapping[str, Any] | None = None, **how: Any) -> Maker:
    """Return the maker of a command in which nothing is random."""
    return lambda source: [step(command, arguments, **how)]


def with_options(command: str, options: Options, **how: Any) -> Maker:
    """Return the maker of a command with *options* as its arguments."""
    return lambda source: [step(command, chosen(source, options), **how)]


# -- nodes

NODE_NAMES: Final = ("a", "b", "c", "d", "0x", "n" * 31)

#: Whatever is wanted, most of these are wrong.
ANY_VALUES: Final = (0, 1, 512, 1000, 4096, 65536, 1 << 20, -1, 1 << 40, "x", True, None, 1.5)

SIZES: Final = (0, 512, 1000, 4096, 65536, 1 << 20, (1 << 20) + 1, -512, 777)

NODE_OPTIONS: Final[Options] = {
    "read-only": (0.2, (True, False)),
    "auto-read-only": (0.1, (True, False)),
    "discard": (0.1, ("unmap", "ignore")),
    "detect-zeroes": (0.1, ("on", "off", "unmap")),
    "cache": (0.1, ({"no-flush": True}, {"direct": False}, {"no-flush": False, "direct": False})),
    "force-share": (0.1, (True, False)),
    "bogus": (0.04, ANY_VALUES),
}

#: A negative size is not among these: with it QEMU aborts.
NULL_OPTIONS: Final[Options] = {
    "size": (0.4, (0, 1, 512, 1025, 1 << 20, 1 << 62)),
    "read-zeroes": (0.2, (True,)),
}

DRIVER_OPTIONS: Final[Mapping[str, Options]] = {
    "file": {"filename": (1, ("a.img", "b.img", "odd.img", "empty.img", "missing", "whole.luks", "."))},
    "raw": {"offset": (0.3, SIZES), "size": (0.3, SIZES)},
    "luks": {"key-secret": (0.85, ("right", "right", "right", "wrong", "nope"))},
    "null-co": NULL_OPTIONS,
    "null-aio": NULL_OPTIONS,
}

#: The drivers of a node, more often those with something below them, and of what is at the bottom.
DRIVERS: Final = ("file", "file", "raw", "raw", "raw", "null-co", "null-aio", "luks")
BOTTOM_DRIVERS: Final = ("file", "null-co")
MAX_DEPTH: Final = 3

LUKS_FILES: Final = tuple({"driver": "file", "filename": name} for name in ("whole.luks", "cut.luks"))


def node(source: Random, depth: int = 0) -> dict[str, Any]:
    """Return the options of a node, which may have others inside."""
    driver = source.choice(DRIVERS if depth < MAX_DEPTH else BOTTOM_DRIVERS)
    options = {"driver": driver}
    if depth == 0 or source.random() < 0.4:
        options["node-name"] = source.choice(NODE_NAMES)
    options |= chosen(source, NODE_OPTIONS) | chosen(source, DRIVER_OPTIONS[driver])
    if driver in ("raw", "luks"):
        options["file"] = source.choice(NODE_NAMES) if source.random() < 0.6 else node(source, depth + 1)
    if driver == "luks":
        options["file"] = source.choice((*LUKS_FILES, options["file"]))
        if source.random() < 0.3:
            header = source.choice((LUKS_FILES[0], source.choice(NODE_NAMES)))
            # No name that may be that of a node inside "file": QEMU finds it there, qmpd does not.
            named = isinstance(options["file"], str) or options["file"] in LUKS_FILES
            options["header"] = header if named else LUKS_FILES[0]
    if source.random() < 0.05:
        options.pop(source.choice(list(options)))
    if source.random() < 0.05:
        spoilt = source.choice(list(options) or ["x"])
        value = source.choice(ANY_VALUES)
        if not (spoilt == "size" and driver in ("null-co", "null-aio")):
            options[spoilt] = value
    if options.get("force-share") is True:
        # Always refused: above a node that was opened so, a window's permissions in QEMU are others than
        # in qmpd.
        options["read-only"] = False
    return options


STORAGE_COMMANDS: Final[Commands] = (
    (45, lambda source: [step("blockdev-add", node(source))]),
    (20, with_options("blockdev-del", {"node-name": (1, NODE_NAMES)})),
    (
        10,
        with_options(
            "block_resize",
            {"node-name": (1, NODE_NAMES), "size": (1, (0, 512, 1000, 65536, 1 << 20, 2 << 20))},
        ),
    ),
    (10, always("query-named-block-nodes", {"flat": True})),
    (5, always("x-debug-query-block-graph", unordered=True)),
    (5, always("query-blockstats", {"query-nodes": True})),
    (
        2,
        with_options(
            "qom-list",
            {"path": (1, ("/", "/objects", "objects", "/chardevs", "/objects/right", "right"))},
            unordered=True,
        ),
    ),
    (
        3,
        with_options(
            "object-add",
            {"qom-type": (1, ("secret",)), "id": (1, ("wrong", "x", "right")), "data": (1, ("zz",))},
        ),
    ),
)


# -- devices

#: Nodes that come and go, and nodes that are there from the start and stay.
DISK_NODES: Final = ("a", "b", "c", "d")
LASTING_NODES: Final = ("n0", "n1")
READ_ONLY_NODE: Final = "n2"

BLOCK_IDS: Final = ("d0", "d1", "d2", "d.3")
CONTROLLER_IDS: Final = ("s0", "s1")
DISK_IDS: Final = ("h0", "h1", "h2")
DEVICE_IDS: Final = (*BLOCK_IDS, *CONTROLLER_IDS, *DISK_IDS)

SWITCH: Final = (True, False)
ON_OFF_AUTO: Final = ("on", "off", "auto")
ON_ERROR: Final = ("report", "ignore", "enospc", "stop", "auto")
BLOCK_SIZES: Final = (0, 512, 512, 4096, 1 << 20)
REQUEST_SIZES: Final = (0, 512, 4096, 65536, 777, 1 << 26)
NUMBERS: Final = (0, 1, 2, 255, 256, 65535, 65536)
#: All within the limits, which are in a case of their own.
DISCARD_SECTORS: Final = (1, 2, 65536, (1 << 22) - 1)

#: What disks have in common.  None of these values is refused as such, but some are when the device is
#: made.
DISK_PROPERTIES: Final[Options] = {
    # Longer ones, which scsi-hd refuses if they become its device_id, are in a case of their own.
    "serial": (0.15, ("abc", "", "s" * 20)),
    "share-rw": (0.4, (True, True, False)),
    "write-cache": (0.05, ON_OFF_AUTO),
    "rerror": (0.05, ON_ERROR),
    "werror": (0.05, ON_ERROR),
    "logical_block_size": (0.1, BLOCK_SIZES),
    "physical_block_size": (0.1, BLOCK_SIZES),
    "min_io_size": (0.05, REQUEST_SIZES),
    "opt_io_size": (0.05, REQUEST_SIZES),
    "discard_granularity": (0.05, REQUEST_SIZES),
    "account-invalid": (0.03, ON_OFF_AUTO),
    "account-failed": (0.03, ON_OFF_AUTO),
    "backend_defaults": (0.03, ON_OFF_AUTO),
    "cyls": (0.05, NUMBERS),
    "heads": (0.05, NUMBERS),
    "secs": (0.05, NUMBERS),
    "lcyls": (0.02, NUMBERS),
}

#: Without those that qmpd keeps but does not check as QEMU does: iommu_platform (not together with the
#: oldest virtio), romfile, failover_pair_id; acpi-index, romsize and ioeventfd are in a case of their own.
#: Only virtio-blk-pci has an iothread here: in QEMU disks on a virtio-scsi-pci that has one keep
#: virtio-blk-pci away from their nodes.
PCI_PROPERTIES: Final[Options] = {
    # Not slots 0 and 1, which in QEMU belong to the chip set; not slot 31, because with a device there
    # QEMU refuses all that leave their slot open; no functions but 0, because QEMU unplugs a slot as a
    # whole.
    "addr": (0.15, ("5", "5.0", "06.0", "0x7", 40, -1)),
    "multifunction": (0.1, SWITCH),
    "rombar": (0.03, (0, 1, -1)),
    "disable-legacy": (0.05, ON_OFF_AUTO),
    "disable-modern": (0.05, SWITCH),
    "ats": (0.03, SWITCH),
    "aer": (0.03, SWITCH),
    "page-per-vq": (0.03, SWITCH),
    "vectors": (0.05, (0, 1, 2, 3, 16)),
    "event_idx": (0.03, SWITCH),
    "packed": (0.03, SWITCH),
}

#: If one of these makes no sense and a virtio disk's node is in conflict with another user as well, QEMU
#: tells of the conflict, qmpd of the property.  Hence they come with a node that nobody writes to.
LATE_PROPERTIES: Final = frozenset(
    {"logical_block_size", "min_io_size", "opt_io_size", "discard_granularity", "cyls", "heads", "secs"}
)

#: By model.
DEVICE_PROPERTIES: Final[Mapping[str, Options]] = {
    "virtio-blk-pci": {
        **DISK_PROPERTIES,
        **PCI_PROPERTIES,
        "iothread": (0.05, ("t", "/objects/t")),
        "num-queues": (0.15, (0, 1, 2, 4, 64, 1024)),
        "queue-size": (0.1, (0, 1, 2, 3, 4, 128, 256, 1000, 1024, 2048)),
        "config-wce": (0.03, SWITCH),
        "discard": (0.03, SWITCH),
        "write-zeroes": (0.03, SWITCH),
        "max-discard-sectors": (0.03, DISCARD_SECTORS),
        "max-write-zeroes-sectors": (0.03, DISCARD_SECTORS),
        "request-merging": (0.03, SWITCH),
        "seg-max-adjust": (0.03, SWITCH),
    },
    "virtio-scsi-pci": {
        **PCI_PROPERTIES,
        "num_queues": (0.1, (0, 1, 2, 4, 64)),
        "virtqueue_size": (0.1, (3, 4, 128, 256, 1024)),
        "max_sectors": (0.05, NUMBERS),
        "cmd_per_lun": (0.05, NUMBERS),
        "hotplug": (0.05, SWITCH),
        "param_change": (0.05, SWITCH),
    },
    "scsi-hd": {
        **DISK_PROPERTIES,
        "channel": (0.05, (0, 1, 2)),
        "scsi-id": (0.3, (0, 0, 1, 1, 2, *NUMBERS)),
        "lun": (0.3, (0, 0, 1, 1, 2, 16383, 16384, *NUMBERS)),
        "vendor": (0.03, ("ACME", "")),
        "product": (0.03, ("disk", "")),
        "ver": (0.03, ("1", "12345678", "")),
        "device_id": (0.05, ("x", "")),
        "wwn": (0.05, NUMBERS),
        "port_index": (0.03, (0, 1, 65535)),
        "removable": (0.05, SWITCH),
        "rotation_rate": (0.05, (0, 1, 7200)),
        "scsi_version": (0.05, NUMBERS),
        "max_unmap_size": (0.03, NUMBERS),
        "max_io_size": (0.03, NUMBERS),
    },
}

#: Which ids and which buses a model mostly has.
DEVICE_PLACES: Final[Mapping[str, Options]] = {
    "virtio-blk-pci": {
        "id": (0.97, (*BLOCK_IDS, *BLOCK_IDS, *DEVICE_IDS, "type", 1)),
        "bus": (0.1, ("pci.0", "pci.0", "pci.0", "s0.0", "nope", "main-system-bus", "/", "", 1)),
    },
    "virtio-scsi-pci": {
        "id": (0.97, (*CONTROLLER_IDS, *CONTROLLER_IDS, *CONTROLLER_IDS, *DEVICE_IDS, 1)),
        "bus": (0.1, ("pci.0", "s0.0", "nope")),
    },
    "scsi-hd": {
        # Always with an id: who asks for the place of a disk without one hears of '(null)' from QEMU
        # only.
        "id": (1, (*DISK_IDS, *DISK_IDS, *DISK_IDS, *DEVICE_IDS)),
        "bus": (0.3, ("s0.0", "s1.0", "s0.0", "s1.0", "nope.0", "s0", "pci.0", "d0", 1)),
    },
}

WRONG_SWITCH: Final = (None, 1, 1.5, [], {})
WRONG_STRING: Final = (None, 1, True, [], {})
WRONG_CHOICE: Final = ("maybe", "", None, True, 1)
WRONG_NUMBER: Final = (None, True, 1.5, [], {}, 1 << 40, -1)

#: Values that are refused as such.  No strings for numbers and switches, because qmpd takes those that
#: make sense; neither ``num-queues`` 1025 nor ``realized``, which make QEMU abort.
MISTAKES: Final[Mapping[str, Sequence[Any]]] = {
    "drive": ("nope", *WRONG_STRING),
    "serial": WRONG_STRING,
    "share-rw": WRONG_SWITCH,
    "write-cache": WRONG_CHOICE,
    "rerror": WRONG_CHOICE,
    "werror": WRONG_CHOICE,
    "bootindex": (-2, 1 << 31, None, 1.5, True),
    "logical_block_size": (1000, 4 << 20, 256, *WRONG_NUMBER),
    "physical_block_size": (1000, 4 << 20, 256, *WRONG_NUMBER),
    "min_io_size": WRONG_NUMBER,
    "opt_io_size": WRONG_NUMBER,
    "discard_granularity": WRONG_NUMBER,
    "account-invalid": WRONG_CHOICE,
    "cyls": WRONG_NUMBER,
    "heads": WRONG_NUMBER,
    "lsecs": WRONG_NUMBER,
    # Not 1.5, of which qmpd says that it is neither a number nor a string.
    "addr": ("20", "5.8", "", "x", 256, -2, True, None, []),
    "multifunction": WRONG_SWITCH,
    "acpi-index": WRONG_NUMBER,
    "rombar": WRONG_NUMBER,
    "disable-legacy": WRONG_CHOICE,
    "disable-modern": WRONG_SWITCH,
    "vectors": WRONG_NUMBER,
    "iothread": ("nope", "/objects", *WRONG_STRING),
    "num-queues": (65536, *WRONG_NUMBER),
    "queue-size": (65536, *WRONG_NUMBER),
    "num_queues": WRONG_NUMBER,
    "virtqueue_size": WRONG_NUMBER,
    "channel": WRONG_NUMBER,
    "scsi-id": WRONG_NUMBER,
    "lun": WRONG_NUMBER,
    "vendor": WRONG_STRING,
    "wwn": WRONG_NUMBER,
    "port_index": (65536, *WRONG_NUMBER),
    "removable": WRONG_SWITCH,
    "rotation_rate": (65536, *WRONG_NUMBER),
    "scsi_version": (1 << 31, *WRONG_NUMBER),
    "max_io_size": WRONG_NUMBER,
    "bogus": (1, "x", None),
    "type": ("x", 1),
    "legacy-addr": ("x", 1),
    "virtio-backend": ("x", 1),
    "hotplugged": (True, 1),
    "parent_bus": ("x", 1),
}

#: Names that are no models, or no models that could be plugged in.
WRONG_DRIVERS: Final = ("nope", "virtio-blk-device", "device", "virtio-blk", "scsi-disk", "", 1, None)


def disk_node(source: Random) -> dict[str, Any]:
    """Return the options of a node for a disk."""
    driver = source.choice(("null-co", "null-co", "file", "raw"))
    options: dict[str, Any] = {"driver": driver, "node-name": source.choice(DISK_NODES)}
    options |= chosen(source, {"read-only": (0.2, (True, False))})
    if driver == "null-co":
        # Not 1 << 62, for which the geometry that QEMU makes up overflows.
        options |= chosen(source, {"size": (0.8, (0, 512, 1025, 65536, 1 << 20, 10 << 30))})
    elif driver == "file":
        options["filename"] = source.choice(("a.img", "b.img", "odd.img", "empty.img"))
    else:
        options["file"] = source.choice((*DISK_NODES, {"driver": "file", "filename": "a.img"}))
    return options


def add_device(model: str) -> Maker:
    """Return the maker of ``device_add`` of a model.

    QEMU looks at the properties in the order of a hash table, and tells of the
    first one that is wrong.  Therefore only one is: where there is a mistake,
    there is neither a node that may be missing nor a boot index that may be
    taken, and with a boot index the node is one that is there.
    """

    def maker(source: Random) -> list[Step]:
        arguments = {"driver": model} | chosen(source, DEVICE_PLACES[model])
        arguments |= chosen(source, DEVICE_PROPERTIES[model])
        kind = source.random()
        if kind < 0.12:
            name = source.choice(list(MISTAKES))
            arguments[name] = source.choice(MISTAKES[name])
        elif kind < 0.15:
            # Without a bus: about half a virtio device on a wrong one QEMU tells of the bus, qmpd of the
            # half.
            arguments = {"driver": source.choice(WRONG_DRIVERS), "id": source.choice(DEVICE_IDS)}
        elif model == "virtio-scsi-pci":
            pass
        elif kind < 0.25:
            arguments["bootindex"] = source.choice((0, 1, 2, -1))
            arguments["drive"] = source.choice(LASTING_NODES)
        elif kind < 0.97:
            arguments["drive"] = source.choice((*DISK_NODES, *LASTING_NODES))
        if model == "virtio-blk-pci" and "drive" in arguments and arguments.keys() & LATE_PROPERTIES:
            arguments["drive"] = READ_ONLY_NODE
        if arguments.get("disable-legacy") == "on" and arguments.get("disable-modern") is True:
            # Refused; but with a drive QEMU never lets go of the node again.
            arguments.pop("drive", None)
        return [step("device_add", arguments)]

    return maker


#: A stopped guest lets go of a virtio device at the next reset, where qmpd has no guest to ask.  Then it
#: takes QEMU a moment until the device is gone, its node free and the event sent; a device_add that
#: fails waits for it.
UNPLUGGED: Final = (
    step("system_reset", wait_event="RESET"),
    step("device_add", {"driver": "nope"}),
)


def delete_device(source: Random) -> list[Step]:
    """Unplug a device, and see to it that it is gone."""
    name = source.choice(
        (
            *DEVICE_IDS,
            *DEVICE_IDS,
            "nope",
            "/machine/peripheral/d0",
            "/machine/peripheral-anon/device[0]",
            "/nowhere",
            "/machine",
            1,
        )
    )
    return [step("device_del", {"id": name}), *UNPLUGGED]


def path(source: Random) -> str:
    """Return a path in the object tree, or something like one."""
    place = source.choice(("/machine/peripheral/{}", "/machine/peripheral/{}/virtio-backend", "{}"))
    return place.format(source.choice(DEVICE_IDS))


#: Not parent_bus: the root bus is nobody's in qmpd, and what a virtio device's half is on has no path
#: there.
PROPERTY_NAMES: Final = (
    *("type", "realized", "hotplugged", "hotpluggable", "nope", ""),
    *DISK_PROPERTIES,
    *("drive", "bootindex", "lheads"),
    *PCI_PROPERTIES,
    *("legacy-addr", "virtio-backend", "class", "romfile", "romsize"),
    *(name for properties in DEVICE_PROPERTIES.values() for name in properties),
)

LISTED_PATHS: Final = (
    "/machine/peripheral",
    "/machine/peripheral-anon",
    "/machine/peripheral/nope",
    "peripheral",
    "nope",
)

DEVICE_COMMANDS: Final[Commands] = (
    (15, lambda source: [step("blockdev-add", disk_node(source))]),
    (7, with_options("blockdev-del", {"node-name": (1, DISK_NODES)})),
    (20, add_device("virtio-blk-pci")),
    (6, add_device("virtio-scsi-pci")),
    (14, add_device("scsi-hd")),
    (6, delete_device),
    (6, always("query-block")),
    (3, always("query-named-block-nodes", {"flat": True})),
    (3, always("x-debug-query-block-graph", unordered=True)),
    (3, always("query-blockstats", {"query-nodes": True})),
    (3, with_options("block_resize", {"node-name": (1, DISK_NODES), "size": (1, (512, 65536, 1 << 20))})),
    (4, with_options("qom-list", {"path": (1, LISTED_PATHS)}, unordered=True)),
    (12, lambda source: [step("qom-get", {"path": path(source), "property": source.choice(PROPERTY_NAMES)})]),
)


# -- places on a board

#: Few enough that most are taken before long.  Not slot 31: while that is in use QEMU finds no place
#: for whoever asks for none.
SLOTS: Final = ("0", "1", "2", "3", "4", "0x2")
FUNCTIONS: Final = ("", "", "", ".0", ".1", ".2", ".7")

PORTS: Final = ("p0", "p1", "p2")


def at_a_place(buses: Sequence[str], slots: Sequence[str]) -> Maker:
    """Return the maker of ``device_add`` of a disk at a place of one of these buses."""

    def maker(source: Random) -> list[Step]:
        arguments: dict[str, Any] = {"driver": "virtio-blk-pci", "share-rw": True}
        arguments["drive"] = source.choice(LASTING_NODES)
        arguments |= chosen(source, {"id": (0.95, DEVICE_IDS), "multifunction": (0.5, SWITCH)})
        arguments |= chosen(source, {"bus": (0.95, buses)})
        if source.random() < 0.8:
            arguments["addr"] = source.choice(slots) + source.choice(FUNCTIONS)
        return [step("device_add", arguments)]

    return maker


def board_commands(buses: Sequence[str], slots: Sequence[str], models: Sequence[str]) -> Commands:
    """Return the commands about places on these buses, for disks and for these models."""
    others: Options = {
        "driver": (1, models),
        "id": (1, ("r0", "r1", "r2")),
        "bus": (1, buses),
        "addr": (0.5, slots),
    }
    names = (*DEVICE_IDS, "r0", "p0")
    properties = ("addr", "legacy-addr", "multifunction", "parent_bus")

    def unplug(source: Random) -> list[Step]:
        return [step("device_del", {"id": source.choice((*names, *DEVICE_IDS, "nope"))}), *UNPLUGGED]

    return (
        (30, at_a_place(buses, slots)),
        (4, with_options("device_add", others)),
        (14, unplug),
        (20, with_options("qom-get", {"path": (1, names), "property": (1, properties)})),
        (4, always("qom-list", {"path": "/machine/peripheral"}, unordered=True)),
        (4, always("query-block")),
    )


# -- a machine

#: Never power-off: a reset may mean that, and the process would end.
ACTIONS: Final[Options] = {
    "reboot": (0.5, ("reset", "reset", "reset", "shutdown", "poweroff", 1)),
    "shutdown": (0.2, ("pause", "pause", "reset", None)),
    "panic": (0.1, ("pause", "shutdown", "exit-failure", "none", "poweroff")),
    "watchdog": (0.1, ("reset", "shutdown", "poweroff", "pause", "debug", "none", "inject-nmi", "")),
    "bogus": (0.03, ANY_VALUES),
}

CAPABILITIES: Final = (
    {"capability": "events", "state": True},
    {"capability": "events", "state": False},
    {"capability": "nope", "state": True},
    {"capability": "events"},
    {"state": True},
    7,
)

IOTHREAD_IDS: Final = ("t0", "t1", "t2")
IOTHREAD_NUMBERS: Final = (0, 1, 32768, -1, 1 << 63, "1", None)


def with_id(command: str) -> Maker:
    """Return the maker of a command without arguments, that has any id."""

    def maker(source: Random) -> list[Step]:
        sent: dict[str, Any] = {"execute": command}
        if source.random() < 0.3:
            sent["id"] = source.choice((1, "x", None, [1, 2], {"a": 1}, 1.5, True))
        if source.random() < 0.05:
            sent["arguments"] = source.choice(({"x": 1}, {}, [], 1, None))
        return [{"cmd": sent}]

    return maker


MACHINE_COMMANDS: Final[Commands] = (
    *((12, with_id(verb)) for verb in ("stop", "cont", "system_reset")),
    (4, with_id("system_powerdown")),
    (2, with_id("system_wakeup")),
    (20, with_id("query-status")),
    (12, with_options("set-action", ACTIONS)),
    (1, with_options("watchdog-set-action", {"action": (0.9, ("none", "pause", "nope", 1))})),
    (
        3,
        lambda source: [
            step(
                "migrate-set-capabilities",
                {"capabilities": source.choices(CAPABILITIES, k=source.randint(0, 3))},
            )
        ],
    ),
    *(
        (1, with_id(name))
        for name in (
            *("query-name", "query-uuid", "query-target", "query-cpus-fast", "query-hotpluggable-cpus"),
            *("query-memory-devices", "query-memdev", "query-balloon", "query-tpm", "query-migrate"),
            *("query-replay", "query-display-options", "query-current-machine", "migrate-pause"),
            *("query-vm-generation-id", "query-block", "query-jobs", "query-nothing"),
        )
    ),
    (
        4,
        with_options(
            "object-add",
            {
                "qom-type": (1, ("iothread",)),
                "id": (1, IOTHREAD_IDS),
                "poll-max-ns": (0.3, IOTHREAD_NUMBERS),
                "poll-grow": (0.2, IOTHREAD_NUMBERS),
                "aio-max-batch": (0.2, IOTHREAD_NUMBERS),
            },
        ),
    ),
    (3, with_options("object-del", {"id": (0.95, (*IOTHREAD_IDS, "nope"))})),
    (4, always("query-iothreads", unordered=True, ignore=["return[*].thread-id"])),
)

# -- playing


qmpdiff = load_qmpdiff()


@dataclass(frozen=True)
class Kind:
    """A kind of conversation.

    :param persona: which command line QEMU gets.
    :param reference: the QEMU that it is held with.
    :param style: which command line qmpd gets.
    :param machine: the machine's type, where there is one.
    :param with_events: events are compared too, and after which command they come.
    :param eventful: those commands of which it has some that QEMU accepts and some that it refuses.
    :param first: the steps before the random ones.
    """

    persona: str
    reference: str
    commands: Commands
    arguments: Sequence[str]
    eventful: Sequence[str]
    first: Sequence[Step] = ()
    style: str = "storage"
    machine: str = "pc"
    with_events: bool = False


#: What disks can be put on from the start.
_DEVICE_ARGUMENTS: Final = (
    *("--object", "iothread,id=t"),
    *("--blockdev", f"null-co,node-name={LASTING_NODES[0]},size=1048576"),
    *("--blockdev", f"null-co,node-name={LASTING_NODES[1]}"),
    *("--blockdev", f"null-co,node-name={READ_ONLY_NODE},read-only=on"),
)

_EVENTFUL_FOR_DEVICES: Final = ("blockdev-add", "blockdev-del", "device_add", "device_del", "qom-get")

KINDS: Final[Mapping[str, Kind]] = {
    "nodes": Kind(
        "storage",
        "qemu-storage-daemon",
        STORAGE_COMMANDS,
        ("--object", "secret,id=right,data=pw"),
        eventful=("blockdev-add", "blockdev-del", "block_resize"),
    ),
    "devices": Kind(
        "system",
        "qemu-system-x86_64",
        DEVICE_COMMANDS,
        _DEVICE_ARGUMENTS,
        eventful=_EVENTFUL_FOR_DEVICES,
        # qmpd has no /machine before its first device.
        first=[step("device_add", {"driver": "virtio-scsi-pci", "id": "s0"})],
    ),
    "emulator": Kind(
        "system",
        "qemu-system-x86_64",
        DEVICE_COMMANDS,
        _DEVICE_ARGUMENTS,
        eventful=_EVENTFUL_FOR_DEVICES,
        style="system",
    ),
    "places": Kind(
        "system",
        "qemu-system-x86_64",
        board_commands(("pci.0",), SLOTS, ("virtio-scsi-pci",)),
        _DEVICE_ARGUMENTS,
        eventful=("device_add", "device_del", "qom-get"),
        style="system",
    ),
    # Nothing goes into a port that was hot-plugged: QEMU's reset would not let go of it.
    "ports": Kind(
        "system",
        "qemu-system-x86_64",
        board_commands(
            (*PORTS, *PORTS, "pcie.0"),
            ("0", "0", "0", "0x0", "1"),
            ("virtio-scsi-pci", "pcie-root-port"),
        ),
        (
            *_DEVICE_ARGUMENTS,
            *("-device", "pcie-root-port,id=p0,chassis=1,addr=2,multifunction=on"),
            *("-device", '{"driver":"pcie-root-port","id":"p1","chassis":2,"addr":"2.1"}'),
            *("-device", '{"driver":"pcie-root-port","id":"p2","chassis":3}'),
        ),
        eventful=("device_add", "device_del", "qom-get"),
        style="system",
        machine="q35",
    ),
    # Of no type: firmware would reset it whenever it likes, and nobody notices the power button.
    "machine": Kind(
        "system",
        "qemu-system-x86_64",
        MACHINE_COMMANDS,
        ("-no-shutdown", "-no-reboot"),
        eventful=("cont", "set-action", "object-add", "object-del", "migrate-set-capabilities"),
        style="system",
        machine="none",
        with_events=True,
    ),
}

#: Our programs, by the command line that they have.
CANDIDATES: Final = {"storage": f"{sys.executable} -m qmpd", "system": f"{sys.executable} -m qmpd.cli.system"}

#: What each daemon finds in its directory; the LUKS volume comes from a file.
SET_UP: Final = (
    "truncate -s 1M a.img",
    "truncate -s 64K b.img",
    "truncate -s 1000 odd.img",
    "truncate -s 0 empty.img",
)

#: Ends in the middle of the first key slot's material.
CUT_BYTES: Final = 102400


def luks_volume() -> bytes:
    """Return a LUKS volume of 1 MiB with the password "pw", which is quick to unlock."""
    spec = CipherSpec("aes-256", "xts", "plain64")
    header, _, plan = run(formatting(spec, "sha256", b"pw", 1000, 1000, random=Random(1).randbytes))
    volume = bytearray(header.header_length() + (1 << 20))
    for write in plan:
        if isinstance(write, Write):
            volume[write.offset : write.offset + len(write.data)] = write.data
    return bytes(volume)


def case_of(kind: Kind, seed: int, volume: Path) -> Any:
    """Return the conversation as a case of qmpdiff's."""
    return qmpdiff.Case(
        name=f"seed {seed}",
        persona=kind.persona,
        machine=kind.machine,
        argv=list(kind.arguments),
        setup=[*SET_UP, f"cp '{volume}' whole.luks", f"head -c {CUT_BYTES} whole.luks > cut.luks"],
        steps=[*kind.first, *conversation(seed, kind.commands)],
        ignore=["**.virtual-size"],
    )


@dataclass(frozen=True)
class Played:
    """A conversation that was held with both; for each step what QEMU and qmpd said."""

    case: Any
    reference: Sequence[Sequence[Any]]
    candidate: Sequence[Sequence[Any]]


def play(kind: Kind, seed: int, volume: Path) -> Played:
    """Hold a conversation with QEMU and with qmpd."""
    case = case_of(kind, seed, volume)
    sides = {
        "qmpd": (CANDIDATES[kind.style], kind.style),
        "QEMU": (kind.reference, kind.persona),
    }
    results = qmpdiff.run_case(case, sides, PATIENCE, keep=False)
    return Played(case, results["QEMU"], results["qmpd"])


def replies(messages: Sequence[Any]) -> list[Any]:
    """Return what is no event."""
    return [message for message in messages if not qmpdiff.is_event(message)]


#: How the refusal of a window ends that does not fit into what it is on.
DOES_NOT_FIT: Final = "size of the containing file ("


def comparable(played: Played) -> int:
    """Return how many steps can be compared.

    After block_resize of a node those above it have another size in qmpd than
    QEMU remembers (see the top of this file).  Where a window fits into the one
    only, the conversation goes on with different nodes.
    """
    resized = False
    for index, each in enumerate(played.case.steps):
        outcomes = [replies(said[index])[0] for said in (played.reference, played.candidate)]
        errors = [str(outcome.get("error", {}).get("desc")) for outcome in outcomes]
        if resized and errors[0] != errors[1] and any(DOES_NOT_FIT in error for error in errors):
            return index
        resized |= each["cmd"]["execute"] == "block_resize" and errors[0] == "None"
    return len(played.case.steps)


def deletions(played: Sequence[Sequence[Any]]) -> list[Any]:
    """Return the data of the DEVICE_DELETED events, in their order.

    Between which replies they come is a matter of QEMU's clean-up, as is whether
    a SCSI disk's comes before RESET.
    """
    events = (message for messages in played for message in messages if qmpdiff.is_event(message))
    return [event["data"] for event in events if event["event"] == "DEVICE_DELETED"]


def seed_of(seed: int | str) -> int:
    """Return the number of a seed, which for ``CHOSEN`` is what the environment says."""
    if isinstance(seed, int):
        return seed
    chosen = os.environ.get(SEED_VARIABLE, "3")
    return time.time_ns() % 1_000_000_000 if chosen == "clock" else int(chosen)


Conversations = Mapping[tuple[str, int | str], tuple[int, Future[Played]]]


@pytest.fixture(scope="module")
def conversations(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Conversations]:
    """The conversations of this run with their seeds, being held."""
    volume = tmp_path_factory.mktemp("volume") / "whole.luks"
    volume.write_bytes(luks_volume())
    wanted = [
        (item.callspec.params["kind"], item.callspec.params["seed"])
        for item in request.session.items
        if isinstance(item, pytest.Function)
        and "conversations" in item.fixturenames
        and not any(peers.missing(name) for mark in item.iter_markers("peer") for name in mark.args)
    ]
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(AT_A_TIME) as pool:
        patch.setenv("PYTHONPATH", str(CHECKOUT))
        numbers = {seed: seed_of(seed) for seed in (*FIXED_SEEDS, CHOSEN)}
        yield {
            (kind, seed): (numbers[seed], pool.submit(play, KINDS[kind], numbers[seed], volume))
            for kind, seed in dict.fromkeys(wanted)
        }
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("seed", [*FIXED_SEEDS, CHOSEN])
@pytest.mark.parametrize(
    "kind", [pytest.param(name, marks=pytest.mark.peer(kind.reference)) for name, kind in KINDS.items()]
)
def test_random_conversation_is_the_same(kind: str, seed: int | str, conversations: Conversations) -> None:
    number, future = conversations[kind, seed]
    played = future.result()
    again = f"{kind}, seed {number} (to play it again: {SEED_VARIABLE}={number})"
    for name, said in (("QEMU", played.reference), ("qmpd", played.candidate)):
        for index, messages in enumerate(said):
            ended = [end for end in messages if qmpdiff.is_end(end)]
            assert not ended, f"{again}: {name} {ended[0]} at {qmpdiff.describe(played.case.steps[index])}"
    end = comparable(played)
    reference, candidate = played.reference[:end], played.candidate[:end]
    if not KINDS[kind].with_events:
        reference, candidate = [*map(replies, reference)], [*map(replies, candidate)]
    differing = qmpdiff.differing_steps(played.case, reference, candidate)
    report = io.StringIO()
    with contextlib.redirect_stdout(report):
        for found in differing[:3]:
            qmpdiff.print_diff(*found)
    assert not differing, f"{again}: {len(differing)} steps differ, -QEMU +qmpd\n{report.getvalue()}"
    assert deletions(played.candidate[:end]) == deletions(played.reference[:end]), again


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_makes_one_conversation(kind: str) -> None:
    first, second, other = (conversation(seed, KINDS[kind].commands) for seed in (1, 1, 2))
    assert first == second
    assert first != other


@pytest.mark.parametrize("seed", FIXED_SEEDS)
@pytest.mark.parametrize(
    "kind", [pytest.param(name, marks=pytest.mark.peer(kind.reference)) for name, kind in KINDS.items()]
)
def test_commands_of_a_conversation_are_accepted_and_refused(
    kind: str, seed: int, conversations: Conversations
) -> None:
    _, future = conversations[kind, seed]
    played = future.result()
    outcomes: dict[str, set[str]] = {}
    for each, messages in zip(played.case.steps, played.reference, strict=True):
        (reply,) = replies(messages)
        outcomes.setdefault(each["cmd"]["execute"], set()).update(reply.keys() - {"id"})
    for command in KINDS[kind].eventful:
        assert outcomes[command] == {"return", "error"}, f"{command} in seed {seed}"
