"""Snapshots inside an image, judged by QEMU's programs."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from qcow2_images import attach, create, detach, judge, run

from qmpd.block import snapshots
from qmpd.block.graph import Graph

SIZE = 3 << 20

OPTIONS = (
    "",
    "compat=0.10,cluster_size=512",
    "cluster_size=512,refcount_bits=8",
    "cluster_size=1024,refcount_bits=64",
    "cluster_size=2M",
    "lazy_refcounts=on,cluster_size=4096",
    "extended_l2=on,cluster_size=16k",
)


async def make(graph: Graph, name: str) -> None:
    async with graph.change() as change:
        await snapshots.create_internal(graph, "d", name, change)


def holds(path: Path, name: str, model: bytes) -> None:
    """What QEMU finds in a snapshot."""
    run(path.parent, "qemu-img", "convert", "-l", f"snapshot.name={name}", "-O", "raw", str(path), "s.raw")
    assert (path.parent / "s.raw").read_bytes() == model


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
async def test_snapshots_keep_what_the_disk_held(
    graph: Graph, tmp_path: Path, options: str, compressed: bool
) -> None:
    chance = random.Random(options)
    path = create(tmp_path, options, SIZE)
    model = bytearray(chance.choice((bytes(1), b"text")) * SIZE)[:SIZE]
    if compressed:
        (tmp_path / "from.raw").write_bytes(b"compressible" * (SIZE // 12))
        chosen = ["-o", options] if options else []
        run(tmp_path, "qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", *chosen, "from.raw", "d.qcow2")
        model[:] = b"compressible" * (SIZE // 12)
    else:
        model[:] = bytes(SIZE)
    kept: dict[str, bytes] = {}
    for turn in range(3):
        backend = await attach(graph, path)
        for _ in range(6):
            start = chance.randrange(0, SIZE - 300_000)
            data = chance.randbytes(chance.choice((700, 70_000, 299_000)))
            model[start : start + len(data)] = data
            await backend.pwrite(start, data)
        start = chance.randrange(0, SIZE // 512 - 1000) * 512
        await backend.write_zeroes(start, 500 * 512, unmap=True)
        model[start : start + 500 * 512] = bytes(500 * 512)
        await make(graph, f"s{turn}")
        kept[f"s{turn}"] = bytes(model)
        data = chance.randbytes(100_000)
        await backend.pwrite(12345, data)
        model[12345 : 12345 + len(data)] = data
        if turn == 1:
            await snapshots.delete_internal(graph, "d", None, "s0")
            del kept["s0"]
        assert bytes(await backend.pread(0, SIZE)) == model
        await detach(graph, backend)
        judge(path, model)
        for name, state in kept.items():
            holds(path, name, state)
    listed = run(tmp_path, "qemu-img", "snapshot", "-l", "d.qcow2")
    assert [line.split()[:2] for line in listed.splitlines()[2:]] == [["2", "s1"], ["3", "s2"]]
    # QEMU goes back to one of them, and deletes the other.
    run(tmp_path, "qemu-img", "snapshot", "-a", "s1", "d.qcow2")
    judge(path, kept["s1"])
    run(tmp_path, "qemu-img", "snapshot", "-d", "s2", "d.qcow2")
    backend = await attach(graph, path)
    await snapshots.delete_internal(graph, "d", "2", None)
    assert bytes(await backend.pread(0, SIZE)) == kept["s1"]
    await detach(graph, backend)
    judge(path, kept["s1"])


@pytest.mark.peer("qemu-img")
async def test_a_count_that_does_not_fit_changes_nothing(graph: Graph, tmp_path: Path) -> None:
    path = create(tmp_path, "cluster_size=512,refcount_bits=2", 1 << 20)
    model = bytearray(random.Random(1).randbytes(300_000).ljust(1 << 20, b"\0"))
    backend = await attach(graph, path)
    await backend.pwrite(0, bytes(model[:300_000]))
    for name in ("a", "b"):
        await make(graph, name)
    with pytest.raises(Exception, match="Failed to create snapshot 'c' on device 'd': Invalid argument"):
        await make(graph, "c")
    await detach(graph, backend)
    judge(path, model)
    assert len(run(tmp_path, "qemu-img", "snapshot", "-l", "d.qcow2").splitlines()) == 4
