"""Descriptors that clients pass, beside QEMU's emulator, with real clients and disks that have no name."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import pytest
from daemons import QMPD, QMPD_SYSTEM, SYSTEM, CommandError, RunningDaemon
from qemu.qmp import QMPClient

PASSPHRASE: Final = b"abc123"
SIZE: Final = 1 << 20
MACHINE: Final = ("-nodefaults", "-display", "none", "-machine", "none", "-S")

Start = Callable[..., RunningDaemon]
#: A command, its arguments, and the names of the files that are passed with it.
Step = tuple[str, dict[str, Any] | None, Sequence[str]]


@pytest.fixture
def files(tmp_path: Path) -> Iterator[dict[str, int]]:
    """Open files by what they are, most of them copies of an image."""
    with ExitStack() as stack:
        opened = {}
        for name, flags in {
            "rw": os.O_RDWR,
            "ro": os.O_RDONLY,
            "wo": os.O_WRONLY,
            "direct": os.O_RDWR | os.O_DIRECT,
            "path": os.O_PATH,
        }.items():
            image = tmp_path / f"{name}.img"
            image.write_bytes(bytes(SIZE))
            opened[name] = os.open(image, flags)
        opened["directory"] = os.open(tmp_path, os.O_RDONLY)
        opened["pipe"], writing = os.pipe()
        opened["socket"] = socket.socket(socket.AF_UNIX).detach()
        for descriptor in (*opened.values(), writing):
            stack.callback(os.close, descriptor)
        yield opened


def node(name: str, **more: Any) -> dict[str, Any]:
    return {"driver": "file", "node-name": "n", "filename": name, **more}


def opened(number: int, **more: Any) -> tuple[Step, Step]:
    """Try to open a set's file, and close it again."""
    return (
        ("blockdev-add", node(f"/dev/fdset/{number}", **more), ()),
        ("blockdev-del", {"node-name": "n"}, ()),
    )


NAMES: Final[tuple[Step, ...]] = (
    ("getfd", {"fdname": "x"}, ()),
    ("getfd", {"fdname": "1x"}, ()),
    ("getfd", {"fdname": "1x"}, ["rw"]),
    ("getfd", {"fdname": "after"}, ()),
    ("getfd", {"fdname": ""}, ["rw"]),
    ("closefd", {"fdname": ""}, ()),
    ("getfd", {"fdname": "x"}, ["rw"]),
    ("getfd", {"fdname": "x"}, ["ro"]),
    ("closefd", {"fdname": "nope"}, ()),
    ("closefd", {"fdname": "x"}, ()),
    ("closefd", {"fdname": "x"}, ()),
    ("getfd", {"fdname": "several"}, ["rw", "ro", "wo"]),
    ("getfd", {"fdname": "more"}, ()),
    ("query-status", None, ["rw", "ro"]),
    ("getfd", {"fdname": "late"}, ()),
    ("bogus", None, ["rw"]),
    ("getfd", {}, ()),
    ("getfd", {"fdname": 1}, ()),
    ("getfd", {"fdname": "later"}, ()),
    ("nbd-server-start", {"addr": {"type": "fd", "data": {"str": "nope"}}}, ()),
    ("nbd-server-start", {"addr": {"type": "fd", "data": {"str": "0"}}}, ()),
    ("nbd-server-start", {"addr": {"type": "fd", "data": {"str": "late"}}}, ()),
    ("closefd", {"fdname": "late"}, ()),
    ("getfd", {"fdname": "s"}, ["socket"]),
    ("nbd-server-start", {"addr": {"type": "fd", "data": {"str": "s"}}}, ()),
    ("closefd", {"fdname": "s"}, ()),
)

SETS: Final[tuple[Step, ...]] = (
    ("query-fdsets", None, ()),
    ("add-fd", None, ()),
    ("add-fd", {"fdset-id": -1}, ()),
    ("add-fd", {"fdset-id": -1}, ["rw"]),
    ("add-fd", {"fdset-id": 1 << 63}, ["rw"]),
    ("add-fd", {"opaque": "text"}, ()),
    ("add-fd", {"fdset-id": 5}, ["ro"]),
    ("add-fd", {"fdset-id": 1, "opaque": ""}, ["wo"]),
    ("add-fd", {"fdset-id": (1 << 63) - 1}, ["rw"]),
    ("add-fd", {}, ["rw"]),
    ("add-fd", {}, ["rw"]),
    ("query-fdsets", None, ()),
    ("remove-fd", {}, ()),
    ("remove-fd", {"fdset-id": 77}, ()),
    ("remove-fd", {"fdset-id": 77, "fd": 3}, ()),
    ("remove-fd", {"fdset-id": 5, "fd": 99999}, ()),
    ("remove-fd", {"fdset-id": -5, "fd": -9}, ()),
    ("remove-fd", {"fdset-id": 1}, ()),
    ("remove-fd", {"fdset-id": 1}, ()),
    ("add-fd", {}, ["rw"]),
    ("query-fdsets", None, ()),
)

DISKS: Final[tuple[Step, ...]] = (
    *opened(1),
    *(
        ("blockdev-add", node(f"/dev/fdset{rest}"), ())
        for rest in ("/x", "/", "/1x", "/-1", "", "/4294967296")
    ),
    ("add-fd", {"fdset-id": 1}, ["ro"]),
    *opened(1),
    *opened(1, **{"read-only": True}),
    *opened(1, **{"auto-read-only": True}),
    ("blockdev-add", node("/dev/fdset/01", **{"read-only": True}), ()),
    ("query-fdsets", None, ()),
    ("blockdev-reopen", {"options": [node("/dev/fdset/01")]}, ()),
    ("remove-fd", {"fdset-id": 1}, ()),
    ("remove-fd", {"fdset-id": 1}, ()),
    ("query-fdsets", None, ()),
    ("blockdev-del", {"node-name": "n"}, ()),
    ("query-fdsets", None, ()),
    ("add-fd", {"fdset-id": 2}, ["rw"]),
    *opened(2),
    *opened(2, **{"read-only": True}),
    *opened(2, cache={"direct": True}),
    ("add-fd", {"fdset-id": 3}, ["direct"]),
    *opened(3),
    *opened(3, cache={"direct": True}),
    ("add-fd", {"fdset-id": 4}, ["wo"]),
    *opened(4),
    *opened(4, **{"read-only": True}),
    ("add-fd", {"fdset-id": 5}, ["directory"]),
    *opened(5, **{"read-only": True}),
    ("add-fd", {"fdset-id": 6}, ["pipe"]),
    *opened(6, **{"read-only": True}),
    ("add-fd", {"fdset-id": 7}, ["socket"]),
    *opened(7),
    ("object-add", {"qom-type": "secret", "id": "s", "file": "/dev/fdset/2"}, ()),
)


class Side:
    """One of the two programs, as a conversation sees it."""

    def __init__(self, daemon: RunningDaemon, files: dict[str, int]) -> None:
        self.daemon = daemon
        self.files = files
        self.numbers: dict[int, int] = {}

    def answer(self, step: Step) -> Any:
        command, arguments, names = step
        try:
            value = self.daemon.execute(command, arguments, passing=[self.files[name] for name in names])
        except CommandError as error:
            return error.error_class, error.desc
        return self.numbered(value)

    def numbered(self, value: Any) -> Any:
        """The same with descriptors numbered as they were met."""
        if isinstance(value, list):
            return [self.numbered(each) for each in value]
        if isinstance(value, dict):
            return {
                name: self.numbers.setdefault(each, len(self.numbers))
                if name == "fd"
                else self.numbered(each)
                for name, each in value.items()
            }
        return value


@pytest.mark.peer("qemu-system-x86_64")
@pytest.mark.parametrize("steps", [NAMES, SETS, DISKS], ids=["names", "sets", "disks"])
def test_a_conversation_with_descriptors_is_the_one_that_qemu_holds(
    start_daemon: Start, files: dict[str, int], steps: tuple[Step, ...]
) -> None:
    ours = Side(start_daemon(*MACHINE, name="ours", program=QMPD_SYSTEM), files)
    theirs = Side(start_daemon(*MACHINE, name="theirs", program=SYSTEM), files)
    for step in steps:
        assert (step, ours.answer(step)) == (step, theirs.answer(step))
    ours.daemon.assert_alive()


@pytest.mark.peer("qemu-system-x86_64")
@pytest.mark.parametrize("program", [QMPD_SYSTEM, SYSTEM], ids=["qmpd", "qemu"])
def test_names_and_sets_outlive_their_client_and_what_was_not_claimed_does_not(
    start_daemon: Start, files: dict[str, int], program: tuple[str, ...], tmp_path: Path
) -> None:
    daemon = start_daemon(*MACHINE, program=program)
    before = daemon.open_files()
    daemon.execute("getfd", {"fdname": "x"}, passing=[files["rw"]])
    daemon.execute("add-fd", {"fdset-id": 3}, passing=[files["ro"]])
    daemon.execute("query-status", passing=[files["wo"]])
    daemon.monitor.close()
    daemon.monitor = daemon.connect()
    with pytest.raises(CommandError, match="No file descriptor supplied"):
        daemon.execute("getfd", {"fdname": "y"})
    assert [entry["fdset-id"] for entry in daemon.execute("query-fdsets")] == [3]
    daemon.execute("closefd", {"fdname": "x"})
    daemon.execute("remove-fd", {"fdset-id": 3})
    images = [name for name in daemon.open_files() if name.endswith(".img")]
    assert images == []
    assert len(daemon.open_files()) == len(before)


def test_a_name_is_known_to_every_client_of_the_monitor(daemon: RunningDaemon, files: dict[str, int]) -> None:
    with daemon.connect() as other:
        daemon.execute("getfd", {"fdname": "x"}, passing=[files["rw"]])
        other.execute("closefd", {"fdname": "x"})


def test_what_was_passed_is_gone_from_the_daemon_after_use(
    daemon: RunningDaemon, files: dict[str, int]
) -> None:
    before = len(daemon.open_files())
    for _ in range(20):
        for name in ("ro", "path", "directory", "pipe", "socket", "rw"):
            daemon.execute("add-fd", {"fdset-id": 1}, passing=[files[name]] * 3)
        daemon.execute("blockdev-add", node("/dev/fdset/1"))
        with pytest.raises(CommandError):
            daemon.execute(
                "blockdev-add", {**node("/dev/fdset/1"), "node-name": "m", "cache": {"direct": True}}
            )
        daemon.execute("remove-fd", {"fdset-id": 1})
        daemon.execute("blockdev-del", {"node-name": "n"})
        daemon.execute("getfd", {"fdname": "f"}, passing=[files["rw"]])
        with pytest.raises(CommandError, match="File descriptor 'f' is not a socket"):
            daemon.execute("nbd-server-start", {"addr": {"type": "fd", "data": {"str": "f"}}})
        daemon.execute("getfd", {"fdname": "s"}, passing=[files["socket"]])
        daemon.execute("closefd", {"fdname": "s"})
    assert daemon.execute("query-fdsets") == []
    assert len(daemon.open_files()) == before
    daemon.assert_alive()


def test_an_event_does_not_part_a_command_from_its_descriptor(
    daemon: RunningDaemon, files: dict[str, int]
) -> None:
    """A client that sends everything at once gets the right descriptor for each of its commands."""
    names = ("rw", "ro", "wo", "directory")
    for name in names:
        command = {"execute": "add-fd", "arguments": {"fdset-id": 1, "opaque": name}}
        socket.send_fds(daemon.monitor.socket, [json.dumps(command).encode()], [files[name]])
    numbers = [daemon.monitor.reply()["return"]["fd"] for _ in names]
    for name, number in zip(names, numbers, strict=True):
        theirs = os.stat(f"/proc/{daemon.process.pid}/fd/{number}")
        assert os.path.samestat(theirs, os.fstat(files[name]))


async def test_qemu_s_own_client_passes_descriptors(daemon: RunningDaemon, files: dict[str, int]) -> None:
    client = QMPClient("fds")
    await client.connect(os.fspath(daemon.socket))
    try:
        client.send_fd_scm(files["rw"])
        assert (await client.execute("add-fd", {"fdset-id": 7}))["fdset-id"] == 7
        client.send_fd_scm(files["ro"])
        assert await client.execute("getfd", {"fdname": "x"}) == {}
        assert await client.execute("blockdev-add", node("/dev/fdset/7")) == {}
    finally:
        await client.disconnect()


# -- disks without a name


def luks_disk(directory: Path) -> tuple[Path, Path]:
    """A LUKS2 disk's payload and its detached header."""
    payload, header, key = directory / "payload", directory / "header", directory / "key"
    payload.write_bytes(bytes(SIZE))
    key.write_bytes(PASSPHRASE)
    subprocess.run(
        [
            *("cryptsetup", "luksFormat", "--batch-mode", "--type", "luks2", "--pbkdf", "pbkdf2"),
            *("--pbkdf-force-iterations", "1000", "--header", header, "--key-file", key, payload),
        ],
        check=True,
    )
    return payload, header


@pytest.mark.peer("cryptsetup")
@pytest.mark.parametrize("program", [QMPD, QMPD_SYSTEM], ids=["storage", "system"])
def test_a_disk_whose_files_have_no_name_is_unlocked_written_and_rekeyed(
    start_daemon: Start, tmp_path: Path, program: tuple[str, ...]
) -> None:
    payload, header = luks_disk(tmp_path)
    arguments = MACHINE if program == QMPD_SYSTEM else ()
    daemon = start_daemon(*arguments, program=program)
    with payload.open("r+b") as data, header.open("r+b") as head:
        payload.unlink()
        header.unlink()
        daemon.execute("add-fd", {"fdset-id": 1, "opaque": "payload"}, passing=[data.fileno()])
        daemon.execute("add-fd", {"fdset-id": 2, "opaque": "header"}, passing=[head.fileno()])
        for secret, text in (("old", PASSPHRASE), ("new", b"def456")):
            daemon.execute("object-add", {"qom-type": "secret", "id": secret, "data": text.decode()})
        daemon.execute(
            "blockdev-add",
            {
                "driver": "luks",
                "node-name": "disk",
                "key-secret": "old",
                "file": {"driver": "file", "filename": "/dev/fdset/1"},
                "header": {"driver": "file", "filename": "/dev/fdset/2"},
            },
        )
        assert "wrote" in daemon.qemu_io("disk", "write -P 0x5a 0 64k")
        amending = {"driver": "luks", "state": "active", "new-secret": "new", "iter-time": 10}
        daemon.execute("blockdev-amend", {"job-id": "j", "node-name": "disk", "options": amending})
        daemon.monitor.wait_event("JOB_STATUS_CHANGE", id="j", status="concluded")
        (job,) = daemon.execute("query-jobs")
        assert "error" not in job
        daemon.execute("job-dismiss", {"id": "j"})
        daemon.execute("blockdev-del", {"node-name": "disk"})
        daemon.execute("remove-fd", {"fdset-id": 1})
        daemon.execute("remove-fd", {"fdset-id": 2})
        assert not [
            name for name in daemon.open_files() if name.endswith(" (deleted)") and "memfd" not in name
        ]
        copied = tmp_path / "copied"
        copied.write_bytes(os.pread(head.fileno(), 32 << 20, 0))
        ciphertext = os.pread(data.fileno(), SIZE, 0)
    for text in (PASSPHRASE, b"def456"):
        (tmp_path / "key").write_bytes(text)
        subprocess.run(
            ["cryptsetup", "open", "--test-passphrase", "--key-file", tmp_path / "key", copied], check=True
        )
    assert ciphertext[: 64 << 10] != bytes(64 << 10)
    assert ciphertext[64 << 10 :] == bytes(SIZE - (64 << 10))
    daemon.assert_alive()


@pytest.mark.peer("qemu-img", "qemu-io")
def test_a_qcow2_image_is_made_in_passed_files_and_qemu_finds_it_whole(
    daemon: RunningDaemon, tmp_path: Path
) -> None:
    image = tmp_path / "image"
    with image.open("w+b") as file:
        image.unlink()
        daemon.execute("add-fd", {"fdset-id": 4}, passing=[file.fileno()])
        assert (
            daemon.monitor.run_job(
                "blockdev-create", "c", {"driver": "file", "filename": "/dev/fdset/4", "size": 0}
            )
            is None
        )
        daemon.execute("blockdev-add", node("/dev/fdset/4"))
        created = {"driver": "qcow2", "file": "n", "size": SIZE}
        assert daemon.monitor.run_job("blockdev-create", "c", created) is None
        daemon.execute("blockdev-add", {"driver": "qcow2", "node-name": "q", "file": "n"})
        assert "wrote" in daemon.qemu_io("q", "write -P 0x5a 64k 64k")
        daemon.execute("blockdev-del", {"node-name": "q"})
        image.write_bytes(os.pread(file.fileno(), 16 << 20, 0))
    subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", image], check=True)
    read = ["qemu-io", "-f", "qcow2", "-c", "read -P 0x5a 64k 64k", "-c", "read -P 0 128k 64k", image]
    said = subprocess.run(read, check=True, capture_output=True, text=True).stdout
    assert "failed" not in said


def sockets(daemon: RunningDaemon) -> list[str]:
    return [name for name in daemon.open_files() if name.startswith("socket:")]


@pytest.mark.peer("nbdinfo")
@pytest.mark.parametrize("program", [QMPD, QMPD_SYSTEM], ids=["storage", "system"])
def test_nbd_clients_are_served_on_a_socket_that_was_passed(
    start_daemon: Start, tmp_path: Path, program: tuple[str, ...]
) -> None:
    daemon = start_daemon(*(MACHINE if program == QMPD_SYSTEM else ()), program=program)
    before = sockets(daemon)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(tmp_path / "nbd.sock"))
        daemon.execute("getfd", {"fdname": "listener"}, passing=[listener.fileno()])
    daemon.execute("nbd-server-start", {"addr": {"type": "fd", "data": {"str": "listener"}}})
    with pytest.raises(CommandError, match="File descriptor named 'listener' not found"):
        daemon.execute("closefd", {"fdname": "listener"})
    daemon.execute("blockdev-add", {"driver": "null-co", "node-name": "null", "size": SIZE})
    daemon.execute("block-export-add", {"type": "nbd", "id": "e", "node-name": "null"})
    said = subprocess.run(
        ["nbdinfo", "--size", f"nbd+unix:///null?socket={tmp_path / 'nbd.sock'}"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert int(said) == SIZE
    daemon.execute("nbd-server-stop")
    assert sockets(daemon) == before
