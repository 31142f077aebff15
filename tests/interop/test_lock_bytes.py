"""The very bytes that are locked: those of qemu-storage-daemon, at every step, and whoever else locks some.

The same conversation is held with both daemons, and after each command the
kernel is asked what they have locked.  Then another process locks each byte,
and each two of them, in either mode, be that reasonable or not.
"""

from __future__ import annotations

import fcntl
import os
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from itertools import combinations
from pathlib import Path
from typing import Any, Final

import pytest
from daemons import QMPD, STORAGE_DAEMON, CommandError, RunningDaemon
from locked_images import (
    KINDS,
    MAKERS,
    SECRET,
    SIZE,
    WAYS,
    Holder,
    Kind,
    Way,
    held_locks,
    make_masters,
    options_for,
)

pytestmark = pytest.mark.peer("qemu-storage-daemon", *MAKERS)

_FLOCK: Final = struct.Struct("@hhqqi4x")

#: What QEMU takes and does not share: consistent read, write, write unchanged, resize.
BYTES: Final = (*range(100, 104), *range(200, 204))

RAW, QCOW2 = KINDS[0], KINDS[3]
FILE: Final[dict[str, Any]] = {"driver": "file", "filename": "a.img"}

Commands = list[tuple[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def masters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_masters(tmp_path_factory.mktemp("masters"))


@contextmanager
def running(program: tuple[str, ...], directory: Path) -> Iterator[RunningDaemon]:
    directory.mkdir()
    daemon = RunningDaemon(program, SECRET, directory)
    try:
        yield daemon
        daemon.assert_alive()
    finally:
        daemon.kill()


def answer(daemon: RunningDaemon, command: str, arguments: Mapping[str, Any]) -> Any:
    try:
        if command in ("blockdev-create",):
            return daemon.monitor.run_job(command, arguments["job-id"], arguments["options"])
        reply = daemon.execute(command, arguments)
        if command == "block-export-del":
            daemon.monitor.wait_event("BLOCK_EXPORT_DELETED", id=arguments["id"])
        return reply
    except CommandError as error:
        return error.desc


def add(name: str, **options: Any) -> tuple[str, dict[str, Any]]:
    options = {name.replace("_", "-"): value for name, value in options.items()}
    return "blockdev-add", {"node-name": name, **options}


def delete(name: str) -> tuple[str, dict[str, Any]]:
    return "blockdev-del", {"node-name": name}


def export(name: str, node: str, *, writable: bool = False) -> tuple[str, dict[str, Any]]:
    return "block-export-add", {
        "type": "nbd",
        "id": name,
        "name": name,
        "node-name": node,
        "writable": writable,
    }


def export_del(name: str) -> tuple[str, dict[str, Any]]:
    return "block-export-del", {"id": name}


def reopen(**options: Any) -> tuple[str, dict[str, Any]]:
    options = {name.replace("_", "-"): value for name, value in options.items()}
    return "blockdev-reopen", {"options": [options]}


SERVER: Final = ("nbd-server-start", {"addr": {"type": "unix", "data": {"path": "nbd.sock"}}})
Q: Final[dict[str, Any]] = {"driver": "qcow2", "file": {"driver": "file", "filename": "qcow2.img"}}
Q2: Final[dict[str, Any]] = {
    "driver": "qcow2",
    "file": {"driver": "file", "filename": "q2.img"},
    "backing": None,
}

#: Conversations; their files are `a.img`, and those of the kinds of images under their kinds' names.
CONVERSATIONS: Final[Mapping[str, Commands]] = {
    "a node, its exports and its size": [
        SERVER,
        add("a", **FILE),
        add("r", driver="raw", file="a"),
        add("window", driver="raw", file="a", offset=512),
        delete("window"),
        export("e1", "a"),
        export("e2", "r", writable=True),
        ("block_resize", {"node-name": "a", "size": 2 * SIZE}),
        export_del("e2"),
        ("block_resize", {"node-name": "r", "size": 2 * SIZE}),
        export_del("e1"),
        ("block_resize", {"node-name": "a", "size": 2 * SIZE}),
        delete("a"),
        delete("r"),
        delete("a"),
    ],
    "two nodes on one file": [
        SERVER,
        add("a", **FILE),
        add("b", **FILE, read_only=True),
        add("c", **FILE, auto_read_only=True),
        export("ea", "a", writable=True),
        export("eb", "b"),
        export("ec", "c", writable=True),
        ("block_resize", {"node-name": "a", "size": 2 * SIZE}),
        export_del("ea"),
        export_del("ec"),
        ("block_resize", {"node-name": "a", "size": 2 * SIZE}),
        add("q", driver="qcow2", file="a"),
        export_del("eb"),
    ],
    "two qcow2 nodes on one file": [
        add("q1", **Q),
        add("q2", **Q),
        add("q3", **Q, read_only=True),
        add("q4", **Q, read_only=True, force_share=True),
        delete("q1"),
        add("q3", **Q, read_only=True),
        add("q5", **Q, read_only=True),
        add("q6", **Q),
        delete("q3"),
        delete("q5"),
        add("q6", **Q),
        delete("q4"),
        delete("q6"),
    ],
    "reopened": [
        SERVER,
        add("q", **Q, read_only=True),
        reopen(node_name="q", **Q),
        export("e", "q", writable=True),
        reopen(node_name="q", **Q, read_only=True),
        export_del("e"),
        reopen(node_name="q", **Q, read_only=True),
        reopen(node_name="q", **Q, read_only=True, force_share=True),
        reopen(node_name="q", driver="qcow2", file={**Q["file"], "locking": "off"}),
        reopen(node_name="q", **Q, auto_read_only=True),
        add("a", **FILE),
        reopen(node_name="a", **FILE, read_only=True),
        export("e", "a", writable=True),
        reopen(node_name="a", **FILE),
        export("e", "a", writable=True),
        reopen(node_name="a", **FILE, read_only=True),
        delete("q"),
        export_del("e"),
        delete("a"),
    ],
    "overlays": [
        SERVER,
        add("q", **Q),
        export("e", "q", writable=True),
        add("q2", **Q2),
        ("blockdev-snapshot", {"node": "q", "overlay": "q2"}),
        (
            "blockdev-snapshot-sync",
            {"node-name": "q2", "snapshot-file": "q3.img", "snapshot-node-name": "q3"},
        ),
        reopen(node_name="q2", **{**Q2, "backing": "q"}),
        export_del("e"),
        delete("q2"),
        delete("q"),
    ],
    "creation": [
        (
            "blockdev-create",
            {"job-id": "j", "options": {"driver": "file", "filename": "a.img", "size": SIZE}},
        ),
        add("a", **FILE),
        add("q", **Q),
        (
            "blockdev-create",
            {"job-id": "j", "options": {"driver": "file", "filename": "a.img", "size": SIZE}},
        ),
        (
            "blockdev-create",
            {"job-id": "j", "options": {"driver": "file", "filename": "qcow2.img", "size": SIZE}},
        ),
        ("blockdev-create", {"job-id": "j", "options": {"driver": "qcow2", "file": "a", "size": SIZE}}),
        (
            "blockdev-create",
            {"job-id": "j", "options": {"driver": "qcow2", "file": Q["file"], "size": SIZE}},
        ),
        add("q2", driver="qcow2", file="a"),
        ("blockdev-create", {"job-id": "j", "options": {"driver": "qcow2", "file": "a", "size": SIZE}}),
        delete("q2"),
        SERVER,
        export("e", "a"),
        ("blockdev-create", {"job-id": "j", "options": {"driver": "qcow2", "file": "a", "size": SIZE}}),
        (
            "blockdev-create",
            {"job-id": "j", "options": {"driver": "file", "filename": "a.img", "size": SIZE}},
        ),
        export_del("e"),
        delete("a"),
        delete("q"),
    ],
    "not locked": [
        SERVER,
        add("q", driver="qcow2", file={**Q["file"], "locking": "off"}),
        add("q2", **Q),
        add("a", **FILE, locking="off"),
        export("e", "a", writable=True),
        (
            "blockdev-create",
            {"job-id": "j", "options": {"driver": "file", "filename": "a.img", "size": SIZE}},
        ),
    ],
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_locked_bytes_are_those_of_qemu_after_every_command(
    name: str, tmp_path: Path, masters: Path
) -> None:
    seen = []
    for program in (STORAGE_DAEMON, QMPD):
        directory = tmp_path / program[-1]
        steps = []
        with running(program, directory) as daemon:
            for kind in KINDS:
                kind.copy(masters, directory, kind.name)
            QCOW2.copy(masters, directory, "q2")
            RAW.copy(masters, directory, "a")
            for command, arguments in CONVERSATIONS[name]:
                reply = answer(daemon, command, arguments)
                locks = held_locks(daemon.process.pid, directory)
                steps.append((command, arguments, reply, locks))
        seen.append(steps)
    for qemu, ours in zip(*seen, strict=True):
        assert ours == qemu


#: Images whose making takes a while, for a key is derived.
SLOW: Final[Mapping[str, dict[str, Any]]] = {
    "luks": {"driver": "luks", "file": "n", "key-secret": "pw", "iter-time": 2000},
    "a luks header": {"driver": "luks", "header": "n", "key-secret": "pw", "iter-time": 2000},
    "qcow2 with luks": {
        "driver": "qcow2",
        "file": "n",
        "encrypt": {"format": "luks", "key-secret": "pw", "iter-time": 2000},
    },
}


@pytest.mark.parametrize("name", SLOW)
def test_an_image_in_the_making_is_locked_as_qemu_locks_it(name: str, tmp_path: Path) -> None:
    seen = []
    for program in (STORAGE_DAEMON, QMPD):
        directory = tmp_path / program[-1]
        directory.mkdir()
        (directory / "a.img").touch()
        daemon = RunningDaemon(program, SECRET, directory)
        try:
            daemon.execute(*add("n", **FILE))
            options = {**SLOW[name], "size": SIZE}
            # QEMU's main loop waits as well, so nothing more is said to it.
            daemon.execute("blockdev-create", {"job-id": "j", "options": options})
            locks: dict[str, list[str]] = {}
            # What is locked for a moment on the way is not what is held.
            while not locks or held_locks(daemon.process.pid, directory) != locks:
                locks = held_locks(daemon.process.pid, directory)
                time.sleep(0.05)
        finally:
            daemon.kill()
        seen.append(locks)
    assert seen[0] == seen[1]


def lock(descriptor: int, mode: int, byte: int) -> None:
    fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(mode, os.SEEK_SET, byte, 1, 0))


def users(holder: Holder, directory: Path) -> dict[str, Callable[[], Any]]:
    """What can be done with the image `a.img`: each does it, undoes it and says what came of it."""
    daemon = holder.daemon

    def use(kind: Kind, way: Way) -> Callable[[], Any]:
        def attempt() -> Any:
            refused, let_go = holder.take(options_for(kind, way, "a"), way)
            locks = held_locks(daemon.process.pid, directory)
            let_go()
            return refused, locks

        return attempt

    def with_node(command: str, arguments: Mapping[str, Any]) -> Callable[[], Any]:
        def attempt() -> Any:
            daemon.execute(*add("n", **FILE))
            try:
                return answer(daemon, command, arguments)
            finally:
                daemon.execute(*delete("n"))

        return attempt

    def creation(options: Mapping[str, Any]) -> Callable[[], Any]:
        return with_node("blockdev-create", {"job-id": "j", "options": options})

    window = Kind("window", ("img",), lambda file: {"driver": "raw", "file": file("img"), "offset": 512})
    return {
        "write": use(RAW, WAYS["exported writable"]),
        "read": use(RAW, WAYS["exported"]),
        "read, shared": use(RAW, WAYS["force-share, exported"]),
        "window": use(window, Way()),
        "qcow2": use(QCOW2, WAYS["exported writable"]),
        "qcow2 read-only": use(QCOW2, WAYS["read-only, exported"]),
        "qcow2 shared": use(QCOW2, WAYS["force-share"]),
        "resize": with_node("block_resize", {"node-name": "n", "size": SIZE}),
        "create a file": creation({"driver": "file", "filename": "a.img", "size": SIZE}),
        "create qcow2": creation({"driver": "qcow2", "file": "n", "size": SIZE}),
    }


def test_whatever_bytes_another_process_has_locked_the_answer_is_that_of_qemu(
    tmp_path: Path, masters: Path
) -> None:
    locked = [
        *((fcntl.F_RDLCK, bytes_) for count in (1, 2) for bytes_ in combinations(BYTES, count)),
        *((fcntl.F_WRLCK, (byte,)) for byte in BYTES),
        (fcntl.F_WRLCK, (201, 203)),
    ]
    seen = []
    for program in (STORAGE_DAEMON, QMPD):
        directory = tmp_path / program[-1]
        outcomes = {}
        with running(program, directory) as daemon:
            attempts = users(Holder(daemon), directory)
            for mode, bytes_ in locked:
                for name, attempt in attempts.items():
                    QCOW2.copy(masters, directory, "a")
                    before = (directory / "a.img").read_bytes()
                    with closing(open(directory / "a.img", "r+b")) as other:
                        for byte in bytes_:
                            lock(other.fileno(), mode, byte)
                        outcome = attempt()
                        left = held_locks(daemon.process.pid, directory)
                    assert not left, f"{name} has left something locked beside {bytes_}"
                    if program is QMPD and isinstance(outcome, str):
                        assert (directory / "a.img").read_bytes() == before, f"{name} was refused, and done"
                    outcomes[mode, bytes_, name] = outcome
        seen.append(outcomes)
    qemu, ours = seen
    assert any("resize" in str(outcome) for outcome in qemu.values())
    different = {key: (qemu[key], ours[key]) for key in qemu if qemu[key] != ours[key]}
    assert not different
