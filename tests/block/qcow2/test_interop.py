"""Images go to and fro between QEMU's programs and qmpd, with every combination of the format's options."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
from qcow2_images import OPTIONS, WITH_BACKING, attach, create, create_over, detach, judge, run

from qmpd.block.graph import Graph

KILOBYTE = 1 << 10
MEGABYTE = 1 << 20

CASES = [(options, False) for options in OPTIONS] + [(options, True) for options in WITH_BACKING]


@pytest.mark.peer("qemu-img", "qemu-io")
@pytest.mark.parametrize(("options", "backed"), CASES)
async def test_what_qemu_io_wrote_is_read_the_same(
    graph: Graph, tmp_path: Path, options: str, backed: bool
) -> None:
    chance = random.Random(options)
    (tmp_path / "base.raw").write_bytes(chance.randbytes(2 * MEGABYTE))
    path = create(tmp_path, options, 3 * MEGABYTE, backing="base.raw" if backed else None)
    commands: list[str] = []
    for pattern in range(1, 13):
        start = chance.randrange(0, 2800) * KILOBYTE
        length = chance.choice((1, 4, 70, 200)) * KILOBYTE
        kind = chance.choice(("write -P", "write -P", "write -z", "write -zu", "discard"))
        kind = kind if kind != "write -zu" else "write -z -u"
        commands += ["-c", f"{kind} {pattern if kind.endswith('P') else ''} {start} {length}"]
    run(tmp_path, "qemu-io", "-f", "qcow2", *commands, "d.qcow2")
    run(tmp_path, "qemu-img", "convert", "-O", "raw", "d.qcow2", "expected.raw")
    expected = (tmp_path / "expected.raw").read_bytes()
    before = path.read_bytes()
    backend = await attach(graph, path, write=False)
    assert bytes(await backend.pread(0, 3 * MEGABYTE)) == expected
    for _ in range(20):
        start = chance.randrange(0, 2900 * KILOBYTE)
        length = chance.randrange(1, 100 * KILOBYTE)
        assert bytes(await backend.pread(start, length)) == expected[start : start + length]
    # What is said to be zero is zero, and allocated is what qemu-img says is.
    mapped = json.loads(run(tmp_path, "qemu-img", "map", "--output=json", "d.qcow2"))
    for extent in mapped:
        status = await backend.block_status(extent["start"], extent["length"])
        if backed and extent["start"] >= 2 * MEGABYTE:
            continue  # Behind the end of a short backing image `map` and NBD count layers differently.
        present = status.depth != 0
        assert (status.zero or not status.data) <= (not any(expected[extent["start"] :][: status.length]))
        assert present == extent["present"], extent
        if present and extent["depth"] == 0 and not extent["zero"]:
            assert status.data, extent
    await detach(graph, backend)
    assert path.read_bytes() == before, "reading changes nothing"


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize(
    ("method", "cluster"), [*itertools.product(("zlib", "zstd"), ("512", "4k", "64k", "2M"))]
)
async def test_compressed_images_are_read_and_written_over(
    graph: Graph, tmp_path: Path, method: str, cluster: str
) -> None:
    chance = random.Random(cluster)
    # Some of it can be compressed, some of it can't, and some is zeroes.
    pieces = [chance.choice((bytes(20000), chance.randbytes(20000), b"words " * 3333)) for _ in range(220)]
    model = bytearray(b"".join(pieces)[: 4 * MEGABYTE])
    model.extend(bytes(4 * MEGABYTE - len(model)))
    (tmp_path / "s.raw").write_bytes(model)
    options = f"cluster_size={cluster},compression_type={method}"
    run(tmp_path, "qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, "s.raw", "d.qcow2")
    backend = await attach(graph, tmp_path / "d.qcow2")
    assert bytes(await backend.pread(0, len(model))) == model
    for _ in range(30):
        start, length = chance.randrange(0, 4 * MEGABYTE - 70000), chance.randrange(1, 70000)
        data = chance.randbytes(length)
        model[start : start + length] = data
        await backend.pwrite(start, data)
        assert bytes(await backend.pread(start, 70000)) == model[start : start + 70000]
    await detach(graph, backend)
    judge(tmp_path / "d.qcow2", model)


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize(("options", "backed"), CASES)
async def test_what_qmpd_wrote_is_clean_and_read_the_same(
    graph: Graph, tmp_path: Path, options: str, backed: bool
) -> None:
    chance = random.Random(options)
    size = 3 * MEGABYTE + 512
    # Shorter than the image in front of it, and not a whole number of clusters.
    base = chance.randbytes(2 * MEGABYTE + 1536) if backed else b""
    path, model = create_over(tmp_path, options, size, base)
    for cache in ({}, {"l2-cache-size": 1024, "refcount-cache-size": 1024}):
        backend = await attach(graph, path, **cache)
        for _ in range(12):
            await play(backend, model, chance)
        assert bytes(await backend.pread(0, size)) == model
        await detach(graph, backend)
        judge(path, model)


async def play(backend: Any, model: bytearray, chance: random.Random) -> None:
    """A few requests at the same time, which do not overlap but may meet in a cluster."""
    requests = []
    borders = sorted(chance.sample(range(len(model) // 512), 8))
    for begin, end in itertools.pairwise(borders):
        start, stop = begin * 512, min(end * 512, begin * 512 + chance.choice((512, 5000, 300000)))
        if chance.random() < 0.3:
            start += chance.randrange(0, 512)
        match chance.choice(("write", "write", "zeroes", "unmap", "discard", "read")):
            case "write":
                data = chance.randbytes(stop - start)
                model[start:stop] = data
                requests.append(backend.pwrite(start, data))
            case "read":
                requests.append(expect(backend, start, bytes(model[start:stop])))
            case "discard":
                requests.append(discard(backend, start, stop, model))
            case kind:
                model[start:stop] = bytes(stop - start)
                requests.append(backend.write_zeroes(start, stop - start, unmap=kind == "unmap"))
    await asyncio.gather(*requests)


async def expect(backend: Any, start: int, data: bytes) -> None:
    assert bytes(await backend.pread(start, len(data))) == data


async def discard(backend: Any, start: int, stop: int, model: bytearray) -> None:
    """Afterwards there may be what there was, or zeroes; from then on that stays."""
    await backend.discard(start, stop - start)
    found = bytes(await backend.pread(start, stop - start))
    assert all(now in (0, before) for now, before in zip(found, model[start:stop], strict=True))
    model[start:stop] = found
