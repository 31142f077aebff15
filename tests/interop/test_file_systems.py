"""A file system that others made goes through encrypted exports and comes back sound.

``test_nbd_guest.py`` has one that a guest's kernel uses; here are the tools that need none.
"""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import served_disks
from daemons import PATIENCE, RunningDaemon

SIZE = 48 << 20


def run(*command: object) -> None:
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"


def make_tree(tree: Path) -> None:
    """Files of many sizes, with holes, links and long names among them."""
    choose = random.Random(20)
    for number in range(300):
        folder = tree / f"folder-{number % 7}" / ("x" * (number % 5 * 40 + 1))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"file-{number}").write_bytes(choose.randbytes(choose.choice((0, 1, 511, 4096, 70_001))))
    (tree / "large").write_bytes(choose.randbytes(9 << 20))
    with (tree / "sparse").open("wb") as sparse:
        for offset in (0, 3 << 20, 10 << 20):
            sparse.seek(offset)
            sparse.write(choose.randbytes(5000))
    os.symlink("large", tree / "link")
    os.link(tree / "large", tree / "same")


def sums(tree: Path) -> dict[str, str]:
    return {
        str(path.relative_to(tree)): os.readlink(path)
        if path.is_symlink()
        else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in tree.rglob("*")
        if path.is_symlink() or path.is_file()
    }


@pytest.mark.peer("mke2fs", "e2fsck", "debugfs", "nbdcopy", "qemu-img")
@pytest.mark.parametrize("kind", served_disks.KINDS)
@pytest.mark.parametrize("block", [1024, 4096])
def test_a_file_system_survives_the_journey(
    start_daemon: Callable[..., RunningDaemon], tmp_path: Path, kind: str, block: int
) -> None:
    tree, image, between, back = (tmp_path / name for name in ("tree", "image", "between", "back"))
    tree.mkdir()
    make_tree(tree)
    run("mke2fs", "-q", "-t", "ext4", "-b", block, "-d", tree, image, f"{SIZE >> 20}M")
    daemon = served_disks.start(start_daemon)
    first = served_disks.serve(daemon, kind, "first", SIZE)
    second = served_disks.serve(daemon, kind, "second", SIZE)
    run("nbdcopy", "--flush", image, first)
    # From one export to another, as nbdcopy and as QEMU do it; and home.
    run("nbdcopy", "--flush", first, second)
    run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", second, first)
    run("nbdcopy", first, between)
    run("qemu-img", "convert", "-f", "raw", "-O", "raw", second, back)
    for copy in (between, back):
        run("e2fsck", "-fn", copy)
        found = tmp_path / f"{copy.name}-tree"
        found.mkdir()
        run("debugfs", "-R", f"rdump / {found}", copy)
        (found / "lost+found").rmdir()
        assert sums(found) == sums(tree)
    if kind == "luks":
        # On the disk there is none to be seen.
        payload = served_disks.payload(daemon, "first").read_bytes()
        assert payload[1080:1082] != b"\x53\xef"
        assert image.read_bytes()[1080:1082] == b"\x53\xef"
    daemon.assert_alive()
