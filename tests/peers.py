"""The peers: other people's programs that judge ours.

A test says which ones it needs with ``@pytest.mark.peer("cryptsetup", ...)``.
Where one is missing or too old the test is skipped by that name, and the end
of the run names all that are missing; with ``QMPD_REQUIRE_PEERS=1`` (as in CI)
the test fails instead.

Run as a program, this file says what is missing and exits with 1 if anything is.
"""

from __future__ import annotations

import glob
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

CHECKOUT: Final = Path(__file__).resolve().parent.parent

#: Where Debian keeps programs for administrators, which an ordinary user's PATH leaves out.
ADMINISTRATORS_PATH: Final = ("/usr/local/sbin", "/usr/sbin", "/sbin")


@dataclass(frozen=True)
class Peer:
    """A program that judges ours.

    :param package: the Debian package that has it.
    :param oldest: the oldest version that will do, or None where any will.
    :param file: where it is, absolute or in the checkout, if it is not found on PATH (a pattern; the last
        match counts).
    """

    name: str
    package: str
    oldest: tuple[int, ...] | None = None
    file: str | None = None


#: Detached LUKS headers came with QEMU 9.0; the wordings that we compare are those of 10.0.
_QEMU: Final = (10, 0)

#: What it sends, and expects as an answer, was watched with this one.
_LIBVIRT: Final = (11, 3)
_LIBVIRT_DRIVERS: Final = "/usr/lib/*/libvirt/connection-driver"

PEERS: Final[Mapping[str, Peer]] = {
    peer.name: peer
    for peer in (
        Peer("qemu-storage-daemon", "qemu-utils", _QEMU),
        Peer("qemu-img", "qemu-utils", _QEMU),
        Peer("qemu-io", "qemu-utils", _QEMU),
        Peer("qemu-system-x86_64", "qemu-system-x86", _QEMU),
        Peer("cryptsetup", "cryptsetup-bin", (2, 4)),
        Peer("nbdinfo", "libnbd-bin"),
        Peer("nbdcopy", "libnbd-bin"),
        Peer("nbdsh", "python3-libnbd"),
        Peer("nbd-client", "nbd-client"),
        Peer("fio", "fio"),
        Peer("nbdkit", "nbdkit"),
        Peer("mke2fs", "e2fsprogs"),
        Peer("e2fsck", "e2fsprogs"),
        Peer("debugfs", "e2fsprogs"),
        # For a guest, unpacked by .ci/run: a kernel that nobody wants installed here.
        Peer("busybox", "busybox-static", file=".guest/bin/busybox"),
        Peer("linux", "linux-image-cloud-amd64", file=".guest/boot/vmlinuz-*"),
        Peer("socat", "socat"),
        Peer("jq", "jq"),
        Peer("openssl", "openssl"),
        Peer("systemd-analyze", "systemd"),
        Peer("virsh", "libvirt-clients", _LIBVIRT),
        Peer("libvirtd", "libvirt-daemon", _LIBVIRT),
        Peer(
            "libvirt_driver_qemu.so",
            "libvirt-daemon-driver-qemu",
            file=f"{_LIBVIRT_DRIVERS}/libvirt_driver_qemu.so",
        ),
        Peer(
            "libvirt_driver_secret.so",
            "libvirt-daemon-driver-secret",
            file=f"{_LIBVIRT_DRIVERS}/libvirt_driver_secret.so",
        ),
        Peer("setpriv", "util-linux"),
    )
}


def search_path() -> str:
    """Return PATH with the administrators' directories at its end."""
    directories = os.environ.get("PATH", os.defpath).split(os.pathsep)
    return os.pathsep.join([*directories, *(d for d in ADMINISTRATORS_PATH if d not in directories)])


def _path(peer: Peer) -> str | None:
    if peer.file is None:
        return shutil.which(peer.name, path=search_path())
    return max(glob.glob(str(CHECKOUT / peer.file)), default=None)


def path_of(name: str) -> Path:
    """Return where the peer *name* is; it must be there."""
    found = _path(PEERS[name])
    assert found is not None, name
    return Path(found)


@cache
def missing(name: str) -> str | None:
    """Say why the peer *name* can't be used, or return None if it can.

    :raise KeyError: no such peer is known: it belongs into :data:`PEERS`.
    """
    peer = PEERS[name]
    program = _path(peer)
    if program is None:
        return f"{name} (Debian package {peer.package})"
    if peer.oldest is None:
        return None
    shown = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"\d+(?:\.\d+)+", shown)
    version = tuple(int(part) for part in found[0].split(".")) if found else ()
    if version < peer.oldest:
        wanted = ".".join(map(str, peer.oldest))
        return f"{name} {wanted} or newer (found: {found[0] if found else 'no version'})"
    return None


def all_missing() -> list[str]:
    """Return what :func:`missing` says of every peer that can't be used."""
    return [reason for name in PEERS if (reason := missing(name)) is not None]


def required() -> bool:
    """Whether a missing peer is a failure (``QMPD_REQUIRE_PEERS=1``)."""
    return os.environ.get("QMPD_REQUIRE_PEERS", "") not in ("", "0")


def summary() -> str:
    """Return one line that names the missing peers, or says that there are none."""
    reasons = all_missing()
    return "missing peers: " + ", ".join(reasons) if reasons else "no peer is missing"


if __name__ == "__main__":
    print(summary())
    sys.exit(bool(all_missing()))
