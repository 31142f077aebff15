"""A qmpd process that serves disks to NBD clients: plain ones, and encrypted ones with a detached header."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from daemons import RunningDaemon

SECRET: Final = ("--object", "secret,id=pw,data=abc123")
KINDS: Final = ("raw", "luks")


def start(
    start_daemon: Callable[..., RunningDaemon], *arguments: str, server: str = "", **options: Any
) -> RunningDaemon:
    """A qmpd with an NBD server on ``nbd.sock`` in its directory, and the passphrase "pw".

    :param server: more options of ``--nbd-server``, with a comma before each.
    """
    return start_daemon(
        *SECRET, "--nbd-server", f"addr.type=unix,addr.path=nbd.sock{server}", *arguments, **options
    )


def uri(daemon: RunningDaemon, name: str) -> str:
    return f"nbd+unix:///{name}?socket={daemon.directory / 'nbd.sock'}"


def payload(daemon: RunningDaemon, name: str) -> Path:
    """The file in which a disk's data lies, as it is stored."""
    return daemon.directory / f"{name}.img"


def add_node(daemon: RunningDaemon, kind: str, name: str, size: int) -> None:
    """Make an image of so many bytes, and a node `name` that shows it.

    :param kind: one of :data:`KINDS`; "luks" has its header in the file `name`-header.img.
    """
    image = payload(daemon, name)
    image.touch()
    os.truncate(image, size)
    file = {"driver": "file", "filename": str(image)}
    if kind == "raw":
        daemon.execute("blockdev-add", {"driver": "raw", "node-name": name, "file": file})
        return
    header = daemon.directory / f"{name}-header.img"
    if not header.exists():
        header.touch()
        daemon.execute(
            "blockdev-add", {"driver": "file", "node-name": f"{name}-new", "filename": str(header)}
        )
        options = {"driver": "luks", "header": f"{name}-new", "size": 0, "key-secret": "pw", "iter-time": 1}
        assert daemon.monitor.run_job("blockdev-create", f"{name}-creation", options) is None
        daemon.execute("blockdev-del", {"node-name": f"{name}-new"})
    daemon.execute("blockdev-add", luks_options(daemon, name))


def luks_options(daemon: RunningDaemon, name: str) -> dict[str, Any]:
    """What `blockdev-add` wants for the encrypted disk `name`."""
    return {
        "driver": "luks",
        "node-name": name,
        "key-secret": "pw",
        "file": {"driver": "file", "filename": str(payload(daemon, name))},
        "header": {"driver": "file", "filename": str(daemon.directory / f"{name}-header.img")},
    }


def export(daemon: RunningDaemon, name: str, **options: Any) -> str:
    """Export the node `name`, writable, under its own name; return the URI."""
    arguments = {"type": "nbd", "id": f"export-{name}", "node-name": name, "name": name, "writable": True}
    daemon.execute("block-export-add", {**arguments, **options})
    return uri(daemon, name)


def serve(daemon: RunningDaemon, kind: str, name: str, size: int, **options: Any) -> str:
    """Make a disk and export it; return its URI."""
    add_node(daemon, kind, name, size)
    return export(daemon, name, **options)
