"""A machine of QEMU's has a disk on an export: what it reads and writes, and a Linux that lives on it."""

from __future__ import annotations

import hashlib
import re
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import peers
import pytest
import served_disks
from daemons import PATIENCE, SYSTEM, RunningDaemon

DISK = 8 << 20
GUEST_DISK = 64 << 20
#: Seconds for a guest whose processor is emulated; it takes ten.
GUEST_PATIENCE = 100
MACHINE = ("-machine", "q35", "-accel", "tcg", "-nodefaults", "-display", "none")


def qemu_io(uri: str, *commands: str) -> str:
    every = [part for command in commands for part in ("-c", command)]
    done = subprocess.run(
        ["qemu-io", "-f", "raw", *every, uri], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(params=served_disks.KINDS)
def disk(request: pytest.FixtureRequest, start_daemon: Callable[..., RunningDaemon]) -> RunningDaemon:
    """A qmpd with the export "disk"."""
    daemon = served_disks.start(start_daemon)
    served_disks.serve(daemon, request.param, "disk", DISK)
    return daemon


@pytest.mark.peer("qemu-system-x86_64", "qemu-io")
def test_a_virtio_disk_of_a_machine_is_an_export(
    disk: RunningDaemon, start_daemon: Callable[..., RunningDaemon]
) -> None:
    # Written by qmpd itself, and by somebody else's client of it.
    assert "wrote 65536/65536" in disk.qemu_io("disk", "write -P 7 0 64k")
    qemu_io(served_disks.uri(disk, "disk"), "write -P 8 1M 512", "write -z 2M 1M")

    server = f"server.type=unix,server.path={disk.directory / 'nbd.sock'}"
    machine = start_daemon(
        *MACHINE,
        *("-S", "-blockdev", f"driver=nbd,node-name=remote,export=disk,{server}"),
        *("-device", "virtio-blk-pci,id=vda,drive=remote"),
        name="machine",
        program=SYSTEM,
    )
    (info,) = machine.execute("query-block")
    assert info["inserted"]["image"]["virtual-size"] == DISK

    def guest(command: str) -> str:
        return machine.qemu_io("-d /machine/peripheral/vda/virtio-backend", command)

    for command in ("read -P 7 0 64k", "read -P 8 1M 512", "read -P 0 2M 1M"):
        said = guest(command)
        assert "read " in said, said
        assert "Pattern verification failed" not in said, said
    # A check that can fail.
    assert "Pattern verification failed" in guest("read -P 9 0 512")
    for command in (
        "write -P 9 3M 1M",
        "write -f -P 10 512 512",
        "write -z 32k 4k",
        "discard 1M 64k",
        "flush",
    ):
        assert "failed" not in guest(command)

    for command in ("read -P 9 3M 1M", "read -P 10 512 512", "read -P 0 32k 4k", "read -P 7 36k 4k"):
        said = disk.qemu_io("disk", command)
        assert "read " in said, said
        assert "Pattern verification failed" not in said, said
    qemu_io(served_disks.uri(disk, "disk"), "read -P 9 3M 1M", "read -P 7 1k 31k")
    stored = served_disks.payload(disk, "disk").read_bytes()[3 << 20 : 4 << 20]
    nodes = {node["node-name"]: node for node in disk.execute("query-named-block-nodes")}
    assert (stored == b"\x09" * (1 << 20)) is not nodes["disk"]["encrypted"]
    assert machine.quit() == 0
    disk.assert_alive()


#: What a virtio disk needs of Debian's kernel, each after those that it uses; ext4 is built in.
MODULES = (
    "virtio_ring",
    "virtio",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "virtio_blk",
)

#: The guest's first process.  Every line of its that matters begins with "guest: ".
INIT = rf"""#!/bin/busybox sh
/bin/busybox mkdir -p /bin /dev /proc /mnt
/bin/busybox --install -s /bin
trap 'echo guest: it ended; poweroff -f' EXIT
set -e
mount -t devtmpfs dev /dev
mount -t proc proc /proc
for module in {" ".join(MODULES)}; do insmod /modules/$module.ko; done
/sbin/mke2fs -q -t ext4 /dev/vda
mount -t ext4 /dev/vda /mnt
cp -r /sbin /modules /mnt
dd if=/dev/urandom of=/mnt/random bs=64k count=256 2>/dev/null
i=0
while [ $i -lt 200 ]; do
    echo $i > /mnt/file-$i
    dd if=/dev/urandom of=/mnt/overwritten bs=1000 seek=$((i * 37 % 101)) count=3 conv=notrunc 2>/dev/null
    i=$((i + 1))
done
rm /mnt/file-1*
fstrim /mnt || true
cd /mnt && find . -type f -exec sha256sum {{}} + > /sums && cd /
umount /mnt
echo 3 > /proc/sys/vm/drop_caches
mount -t ext4 /dev/vda /mnt
cd /mnt && sha256sum -c -s /sums && echo guest: found what it wrote && cd /
umount /mnt
sed 's/^/guest: sum /' /sums
"""


def initial_ram_file_system(files: Mapping[str, bytes]) -> bytes:
    """An archive as the kernel wants it: cpio's "newc", the parents before what is in them.

    (The kernel's documentation, "initramfs buffer format".)
    """
    archive = bytearray()

    def add(name: str, mode: int, data: bytes) -> None:
        fields = (0, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
        archive.extend(b"070701" + b"".join(b"%08x" % field for field in fields))
        for part in (name.encode() + b"\0", data):
            archive.extend(part)
            archive.extend(bytes(-len(archive) % 4))

    for folder in sorted({str(parent) for name in files for parent in Path(name).parents} - {"."}):
        add(folder, 0o40755, b"")
    for name, data in files.items():
        add(name, 0o100755, data)
    add("TRAILER!!!", 0, b"")
    return bytes(archive)


def program(name: str) -> dict[str, bytes]:
    """A program of this machine with its libraries, by their paths."""
    path = peers.path_of(name)
    said = subprocess.run(["ldd", path], capture_output=True, text=True, check=False).stdout
    libraries = re.findall(r"(/\S+)", said) if "=>" in said else []
    return {f"sbin/{name}": path.read_bytes()} | {
        library[1:]: Path(library).read_bytes() for library in libraries
    }


def guest_files(kernel: Path) -> dict[str, bytes]:
    modules = kernel.parents[1] / "lib/modules" / kernel.name.removeprefix("vmlinuz-")
    files = {"init": INIT.encode(), "etc/mke2fs.conf": Path("/etc/mke2fs.conf").read_bytes()}
    files |= program("mke2fs") | program("busybox")
    files["bin/busybox"] = files.pop("sbin/busybox")
    for module in MODULES:
        (found,) = modules.rglob(f"{module}.ko")
        files[f"modules/{module}.ko"] = found.read_bytes()
    return files


@pytest.mark.peer("qemu-system-x86_64", "linux", "busybox", "mke2fs", "e2fsck", "debugfs", "nbdcopy")
def test_a_linux_keeps_a_file_system_on_an_encrypted_export(
    start_daemon: Callable[..., RunningDaemon], tmp_path: Path
) -> None:
    daemon = served_disks.start(start_daemon)
    remote = served_disks.serve(daemon, "luks", "disk", GUEST_DISK)
    kernel = peers.path_of("linux")
    initrd = tmp_path / "initrd"
    initrd.write_bytes(initial_ram_file_system(guest_files(kernel)))
    server = f"server.type=unix,server.path={tmp_path / 'nbd.sock'}"
    done = subprocess.run(
        [
            *("qemu-system-x86_64", *MACHINE, "-cpu", "max", "-m", "256", "-serial", "stdio", "-no-reboot"),
            *("-kernel", str(kernel), "-initrd", str(initrd), "-append", "console=ttyS0 quiet panic=-1"),
            *("-blockdev", f"driver=nbd,node-name=remote,export=disk,discard=unmap,{server}"),
            *("-device", "virtio-blk-pci,drive=remote"),
        ],
        capture_output=True,
        text=True,
        timeout=GUEST_PATIENCE,
        check=False,
    )
    said = re.findall(r"^guest: (.*?)\r?$", done.stdout, re.MULTILINE)
    assert "found what it wrote" in said, done.stdout + done.stderr
    sums = dict(line.split()[::-1] for line in (one.removeprefix("sum ") for one in said[1:-1]))
    assert "./file-0" in sums
    assert "./file-1" not in sums

    copy, tree = tmp_path / "copy", tmp_path / "tree"
    tree.mkdir()
    subprocess.run(["nbdcopy", remote, copy], check=True, timeout=PATIENCE)
    checked = subprocess.run(["e2fsck", "-fn", copy], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
    subprocess.run(["debugfs", "-R", f"rdump / {tree}", copy], check=True, capture_output=True)
    found = {
        f"./{path.relative_to(tree)}": hashlib.sha256(path.read_bytes()).hexdigest()
        for path in tree.rglob("*")
        if path.is_file()
    }
    assert found == sums
    daemon.assert_alive()
