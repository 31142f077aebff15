"""Images with bitmaps, written by somebody who does not record."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from qcow2_images import attach, create, detach, judge, run

from qmpd.block.graph import Graph

SIZE = 4 << 20


@pytest.mark.peer("qemu-img", "qemu-io")
@pytest.mark.parametrize("options", ["", "lazy_refcounts=on", "cluster_size=512"])
@pytest.mark.parametrize("resized", [False, True])
async def test_bitmaps_that_missed_something_are_not_believed(
    graph: Graph, tmp_path: Path, options: str, resized: bool
) -> None:
    path = create(tmp_path, options, SIZE)
    for name, enabled in (("records", "--enable"), ("rests", "--disable")):
        run(tmp_path, "qemu-img", "bitmap", "--add", enabled, "-g", "64k", "d.qcow2", name)
    run(tmp_path, "qemu-io", "-c", "write -P 3 0 1M", "d.qcow2")
    before = path.read_bytes()
    backend = await attach(graph, path, write=False)
    await detach(graph, backend)
    assert path.read_bytes() == before

    model = bytearray(b"\3" * (1 << 20)).ljust(SIZE, b"\0")
    size = SIZE + (1 << 20) if resized else SIZE
    for turn in range(2):
        backend = await attach(graph, path)
        await backend.pwrite(turn * 300_000, b"x" * 100_000)
        model[turn * 300_000 : turn * 300_000 + 100_000] = b"x" * 100_000
        await backend.truncate(size)
        await detach(graph, backend)
    judge(path, model.ljust(size, b"\0"))
    info = json.loads(run(tmp_path, "qemu-img", "info", "--output=json", "d.qcow2"))
    flags = {bitmap["name"]: bitmap["flags"] for bitmap in info["format-specific"]["data"]["bitmaps"]}
    assert flags == {"records": ["in-use", "auto"], "rests": ["in-use"] if resized else []}
    # QEMU goes on with such an image, and may remove them.
    run(tmp_path, "qemu-io", "-c", "write -P 4 2M 1M", "d.qcow2")
    model[2 << 20 : 3 << 20] = b"\4" * (1 << 20)
    for name in flags:
        run(tmp_path, "qemu-img", "bitmap", "--remove", "d.qcow2", name)
    judge(path, model.ljust(size, b"\0"))
