"""LUKS under, over and inside qcow2: what qmpd makes QEMU reads and writes, and the other way round.

Both daemons are given the same commands, so only the bytes can differ.  qemu-img and qemu-io judge.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
from daemons import RunningDaemon

StartDaemon = Callable[..., RunningDaemon]

pytestmark = pytest.mark.peer("qemu-img", "qemu-io", "qemu-storage-daemon")

SIZE: Final = 4 << 20
SECRETS: Final = (
    *("--object", "secret,id=sec0,data=abc123"),
    *("--object", "secret,id=sec1,data=another"),
)
LUKS_OPTIONS: Final = {"key-secret": "sec0", "iter-time": 1}
INSIDE: Final = {"format": "luks", "key-secret": "sec0"}


def file(name: str) -> dict[str, Any]:
    return {"driver": "file", "filename": name}


def luks(below: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"driver": "luks", "key-secret": "sec0", "file": below, **more}


def qcow2(below: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"driver": "qcow2", "file": below, **more}


#: For each stacking: the images in the order in which they are made (BlockdevCreateOptions, of which "file"
#: or "header" says how to open what it is made on), and how to open the disk.
STACKINGS: Final[dict[str, tuple[list[dict[str, Any]], dict[str, Any]]]] = {
    "luks with a detached header over qcow2": (
        [
            {"driver": "luks", "header": file("header.img"), "size": 0, **LUKS_OPTIONS},
            {"driver": "qcow2", "file": file("disk.img"), "size": SIZE},
        ],
        luks(qcow2(file("disk.img")), header=file("header.img")),
    ),
    "luks over qcow2": (
        [
            {"driver": "qcow2", "file": file("disk.img"), "size": SIZE},
            {"driver": "luks", "file": qcow2(file("disk.img")), "size": SIZE, **LUKS_OPTIONS},
        ],
        luks(qcow2(file("disk.img"))),
    ),
    "qcow2 over luks": (
        [
            {"driver": "luks", "file": file("disk.img"), "size": 8 << 20, **LUKS_OPTIONS},
            {"driver": "qcow2", "file": luks(file("disk.img")), "size": SIZE},
        ],
        qcow2(luks(file("disk.img"))),
    ),
    "luks inside qcow2": (
        [
            {
                "driver": "qcow2",
                "file": file("disk.img"),
                "size": SIZE,
                "encrypt": {"format": "luks", **LUKS_OPTIONS},
            },
        ],
        qcow2(file("disk.img"), encrypt=INSIDE),
    ),
}


def run(directory: Path, *command: str) -> str:
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def make(daemon: RunningDaemon, images: list[dict[str, Any]]) -> None:
    """Make images one after the other, and end the daemon."""
    for number, options in enumerate(images):
        role = "header" if "header" in options else "file"
        below = options[role]
        name = f"below{number}"
        daemon.execute("blockdev-add", {**below, "node-name": name})
        error = daemon.monitor.run_job("blockdev-create", f"create{number}", {**options, role: name})
        assert error is None, error
        daemon.execute("blockdev-del", {"node-name": name})
    assert daemon.quit() == 0


def qmpd_does(start_daemon: StartDaemon, disk: dict[str, Any], *commands: str) -> None:
    daemon = start_daemon(*SECRETS, name="qmpd")
    daemon.execute("blockdev-add", {**disk, "node-name": "disk"})
    for command in commands:
        answer = daemon.qemu_io("disk", command)
        assert "failed" not in answer, f"{command}: {answer}"
        assert answer.startswith(("read", "wrote")), answer
    assert daemon.quit() == 0


def qemu_does(directory: Path, disk: dict[str, Any], *commands: str) -> None:
    given = [part for command in commands for part in ("-c", command)]
    said = run(directory, "qemu-io", *SECRETS, *given, "json:" + json.dumps(disk))
    assert "failed" not in said, said


def judge(directory: Path, disk: dict[str, Any], model: bytes | bytearray) -> None:
    """qemu-img finds the tables in order, and what `model` holds."""
    image = disk
    while image["driver"] != "qcow2":
        image = image["file"]
    run(directory, "qemu-img", "check", *SECRETS, "json:" + json.dumps(image))
    (directory / "model.raw").write_bytes(model)
    shown = "json:" + json.dumps({"driver": "raw", "file": file("model.raw")})
    run(directory, "qemu-img", "compare", *SECRETS, shown, "json:" + json.dumps(disk))


@pytest.mark.parametrize("maker", ["qmpd", "QEMU"])
@pytest.mark.parametrize("stacking", STACKINGS)
def test_either_makes_it_and_both_write_it(
    tmp_path: Path,
    stacking: str,
    maker: str,
    start_daemon: StartDaemon,
    start_storage_daemon: StartDaemon,
) -> None:
    images, disk = STACKINGS[stacking]
    for name in ("header.img", "disk.img"):
        (tmp_path / name).touch()
    make((start_daemon if maker == "qmpd" else start_storage_daemon)(*SECRETS, name="maker"), images)
    if stacking == "luks over qcow2":
        # The payload is as long as was asked for, and the qcow2 image longer by the header.
        shown = run(tmp_path, "qemu-img", "info", "--output=json", *SECRETS, "json:" + json.dumps(disk))
        assert json.loads(shown)["virtual-size"] == SIZE
    # What nobody has written is zeroes inside qcow2, and noise in luks: it is written once.
    model = bytearray(SIZE)
    qmpd_does(start_daemon, disk, f"write -P 0 0 {SIZE}", "write -P 1 0 70k", "write -P 2 1000k 512")
    qemu_does(
        tmp_path, disk, "read -P 1 0 70k", "read -P 2 1000k 512", "write -P 3 4k 3k", "write -P 4 3M 300k"
    )
    qmpd_does(
        start_daemon, disk, "read -P 1 0 4k", "read -P 3 4k 3k", "read -P 4 3M 300k", "write -P 5 3100k 100k"
    )
    for start, length, byte in (
        (0, 70 << 10, 1),
        (1000 << 10, 512, 2),
        (4 << 10, 3 << 10, 3),
        (3 << 20, 300 << 10, 4),
        (3100 << 10, 100 << 10, 5),
    ):
        model[start : start + length] = bytes([byte]) * length
    judge(tmp_path, disk, model)
    if stacking == "qcow2 over luks":
        assert b"QFI\xfb" not in (tmp_path / "disk.img").read_bytes(), "the tables are encrypted too"


@pytest.mark.parametrize("maker", ["qmpd", "QEMU"])
def test_each_image_of_a_chain_has_its_own_encryption(
    tmp_path: Path, maker: str, start_daemon: StartDaemon, start_storage_daemon: StartDaemon
) -> None:
    cbc = {"cipher-alg": "aes-128", "cipher-mode": "cbc", "ivgen-alg": "essiv", "hash-alg": "sha512"}
    encryptions: list[dict[str, Any]] = [
        {"format": "luks", **LUKS_OPTIONS},
        {"format": "qcow", "key-secret": "sec1"},
        {"format": "luks", "key-secret": "sec1", "iter-time": 1, **cbc},
    ]
    images: list[dict[str, Any]] = []
    disk: dict[str, Any] | None = None
    layers: list[dict[str, Any]] = []
    for number, encryption in enumerate([*encryptions, None]):
        name = f"{number}.img"
        (tmp_path / name).touch()
        options: dict[str, Any] = {"driver": "qcow2", "file": file(name), "size": SIZE}
        if encryption is not None:
            options["encrypt"] = encryption
        if number:
            options |= {"backing-file": f"{number - 1}.img", "backing-fmt": "qcow2"}
        if number == 2:
            options["cluster-size"] = 4096
        images.append(options)
        more: dict[str, Any] = {} if disk is None else {"backing": disk}
        if encryption is not None:
            kind = {"luks": "luks", "qcow": "aes"}[encryption["format"]]
            more["encrypt"] = {"format": kind, "key-secret": encryption["key-secret"]}
        disk = qcow2(file(name), **more)
        layers.append(disk)
    make((start_daemon if maker == "qmpd" else start_storage_daemon)(*SECRETS, name="maker"), images)
    model = bytearray(SIZE)
    for number, layer in enumerate(layers):
        start, length = number * 40 << 10, 100 << 10
        write = f"write -P {number + 1} {start} {length}"
        if number % 2:
            qemu_does(tmp_path, layer, write)
        else:
            qmpd_does(start_daemon, layer, write)
        model[start : start + length] = bytes([number + 1]) * length
    # A little in a cluster of the top image, with what is behind it around.
    qmpd_does(start_daemon, layers[3], "write -P 9 300k 512", "write -P 8 10k 512", "read -P 1 0 10k")
    for start, byte in ((300 << 10, 9), (10 << 10, 8)):
        model[start : start + 512] = bytes([byte]) * 512
    judge(tmp_path, layers[3], model)
