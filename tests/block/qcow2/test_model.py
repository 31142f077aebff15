"""A qcow2 image against an array of bytes: whatever is done to it, in whatever order.

Hypothesis makes up an image and a story: requests one by one and many at a time, other sizes, snapshots
inside and in front, other options, closing and opening.  Afterwards QEMU's programs find a sound image
without a leak, that holds what the array holds, and snapshots that hold what it held when they were made.

`QMPD_MODEL_EXAMPLES=5000` lets it make up so many stories, other ones each time.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from qcow2_images import judge, run

from qmpd.block import snapshots
from qmpd.block.backend import Backend
from qmpd.block.drivers import DRIVERS
from qmpd.block.drivers.file import FileNode
from qmpd.block.graph import Graph
from qmpd.block.permissions import Permission
from qmpd.block.reopening import reopen
from qmpd.crypto.memory import KeyMemory

SECTOR = 512
#: The largest disk, in sectors; with the smallest clusters it has many L2 tables.
MOST = 2000

CLUSTERS = (512, 1024, 4096, 16384, 65536, 2 << 20)

OTHER_OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "l2-cache-size": st.sampled_from([512, 4096, 1 << 20]),
        "l2-cache-entry-size": st.just(512),
        "refcount-cache-size": st.just(1024),
        "overlap-check": st.sampled_from(["none", "constant", "all"]),
        "pass-discard-request": st.booleans(),
        "pass-discard-snapshot": st.booleans(),
        "detect-zeroes": st.sampled_from(["on", "unmap"]),
    },
)
V3_OPTIONS = st.fixed_dictionaries(
    {}, optional={"discard-no-unref": st.booleans(), "lazy-refcounts": st.booleans()}
)

#: A request: its kind, where it begins and how long it is in sectors, bytes cut off, and what is written.
REQUESTS = st.tuples(
    st.sampled_from(["write", "write", "zeroes", "unmap", "discard", "read"]),
    # Most are near each other, so that they have to do with each other.
    st.integers(0, 150) | st.integers(0, MOST - 1),
    st.sampled_from([1, 7, 64, 130, 260, 1000]),
    st.sampled_from([0, 0, 0, 1, 300]),
    st.integers(0, 255),
)


class QuickFile(FileNode):
    """What barriers cost on real storage would only make the tests slow; others still get their turn."""

    async def _flush(self) -> None:
        await asyncio.sleep(0)


class Model(RuleBasedStateMachine):
    """The disk `array`, and the chain of images that should be the same."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.scratch = tempfile.TemporaryDirectory()
        self.directory = Path(self.scratch.name)
        self.graph = Graph({**DRIVERS, "file": QuickFile}, secrets=lambda _: KeyMemory().take(0))
        self.backend: Backend | None = None
        self.array = bytearray()
        self.layer = 0
        self.options: dict[str, Any] = {}
        #: By image: what its snapshots hold, and what those in front of which there is another one hold.
        self.kept: list[dict[str, bytes]] = [{}]
        self.covered: list[bytes] = []
        self.made = 0
        self.version = 3

    def do(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(asyncio.wait_for(coroutine, 30))

    def path(self, layer: int) -> Path:
        return self.directory / f"d{layer}.qcow2"

    # -- the image

    @initialize(
        cluster=st.sampled_from(CLUSTERS),
        order=st.integers(0, 6),
        shape=st.sampled_from(["plain", "plain", "v2", "extended", "lazy", "data", "raw data", "zstd"]),
        below=st.sampled_from(["", "", "raw", "short", "compressed"]),
        filled=st.booleans(),
        size=st.integers(1, MOST) | st.integers(800, MOST),
        seed=st.integers(0, 99),
        options=OTHER_OPTIONS,
    )
    def make(
        self,
        cluster: int,
        order: int,
        shape: str,
        below: str,
        filled: bool,
        size: int,
        seed: int,
        options: dict[str, Any],
    ) -> None:
        if shape == "extended":
            cluster = max(cluster, 16384)
        if shape == "raw data":
            below, filled = "", False
        self.version = 2 if shape == "v2" else 3
        self.shape = shape
        self.array = bytearray(size * SECTOR)
        words = [f"cluster_size={cluster}"]
        words.append("compat=0.10" if self.version == 2 else f"refcount_bits={1 << order}")
        words += {
            "extended": ["extended_l2=on"],
            "lazy": ["lazy_refcounts=on"],
            "data": [f"data_file={self.directory}/data.raw"],
            "raw data": [f"data_file={self.directory}/data.raw,data_file_raw=on"],
            "zstd": ["compression_type=zstd"],
        }.get(shape, [])
        #: Counts of one bit leave no room for a compressed neighbour, and of two for few snapshots.
        self.counts = 65535 if self.version == 2 else (1 << (1 << order)) - 1
        chance = random.Random(seed)
        content = b"".join(
            chance.choice((bytes(3000), chance.randbytes(3000), b"words " * 500))
            for _ in range(size // 5 + 1)
        )
        make = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", ",".join(words)]
        self.base: dict[str, Any] | None = None
        if below:
            content = content[: size * SECTOR // (2 if below == "short" else 1) // SECTOR * SECTOR]
            (self.directory / "base.raw").write_bytes(content)
            self.array[: len(content)] = content[: len(self.array)]
            name, kind = "base.raw", "raw"
            if below == "compressed":
                run(self.directory, "qemu-img", "convert", "-c", "-O", "qcow2", "base.raw", "base.qcow2")
                name, kind = "base.qcow2", "qcow2"
            self.base = {"driver": kind, "file": {"driver": "file", "filename": str(self.directory / name)}}
            run(self.directory, *make, "-b", name, "-F", kind, "d0.qcow2", str(len(self.array)))
        else:
            run(self.directory, *make, "d0.qcow2", str(len(self.array)))
        if filled and "data" not in shape and not below and self.counts >= 255:
            content = content[: len(self.array)]
            (self.directory / "content.raw").write_bytes(content.ljust(len(self.array), b"\0"))
            run(
                self.directory,
                "qemu-img",
                "convert",
                "-c",
                "-n",
                "-t",
                "unsafe",
                "-O",
                "qcow2",
                "content.raw",
                "d0.qcow2",
            )
            self.array[: len(content)] = content
        self.do(self.open(options))
        if seed % 3:
            self.do(self.request("write", 0, min(seed * 4096, len(self.array)), 1))

    def node_options(self, layer: int) -> dict[str, Any]:
        options = {
            "driver": "qcow2",
            "node-name": f"d{layer}",
            "discard": "unmap",
            "file": f"f{layer}",
            **(self.options if layer == self.layer else {}),
        }
        if layer:
            options["backing"] = f"d{layer - 1}"
        elif self.base is not None:
            options["backing"] = "base"
        return options

    async def open(self, options: dict[str, Any]) -> None:
        self.options = options
        if self.base is not None:
            await self.graph.add({**self.base, "node-name": "base", "read-only": True})
        for layer in range(self.layer + 1):
            read_only = layer < self.layer
            filename = str(self.path(layer))
            await self.graph.add(
                {"driver": "file", "node-name": f"f{layer}", "filename": filename, "discard": "unmap"}
                | {"read-only": read_only}
            )
            await self.graph.add({**self.node_options(layer), "read-only": read_only})
        self.backend = Backend(self.graph, perm=Permission.everything() & ~Permission.WRITE_UNCHANGED)
        self.backend.attach(self.graph.reference(f"d{self.layer}"))

    async def close(self) -> None:
        assert self.backend is not None
        self.backend.detach()
        for layer in range(self.layer, -1, -1):
            await self.graph.delete(f"d{layer}")
            await self.graph.delete(f"f{layer}")
        if self.base is not None:
            await self.graph.delete("base")

    # -- the story

    async def request(self, kind: str, start: int, stop: int, seed: int) -> None:
        assert self.backend is not None
        length = stop - start
        match kind:
            case "write":
                data = random.Random(seed).randbytes(length) if seed % 4 else bytes(length)
                self.array[start:stop] = data
                await self.backend.pwrite(start, data)
            case "read":
                expected = bytes(self.array[start:stop])
                assert bytes(await self.backend.pread(start, length)) == expected
            case "discard":
                await self.backend.discard(start, length)
                found = bytes(await self.backend.pread(start, length))
                # Each sector is what it was or zeroes, and stays so.
                for at in range(0, length, SECTOR):
                    now = found[at : at + SECTOR]
                    assert now in (bytes(len(now)), self.array[start + at : start + at + len(now)])
                self.array[start:stop] = found
            case _:
                self.array[start:stop] = bytes(length)
                await self.backend.write_zeroes(start, length, unmap=kind == "unmap")

    @rule(requests=st.lists(REQUESTS, min_size=1, max_size=7))
    def requests_at_the_same_time(self, requests: list[tuple[str, int, int, int, int]]) -> None:
        taken: list[tuple[int, int]] = []
        under_way = []
        size = len(self.array)
        for kind, begin, sectors, cut, seed in requests:
            start = begin * SECTOR % size
            stop = min(start + sectors * SECTOR, size) - (cut if kind != "discard" else 0)
            if any(start < end and first < stop for first, end in taken):
                continue
            taken.append((start, stop))
            under_way.append(self.request(kind, start, stop, seed))

        async def together() -> None:
            await asyncio.gather(*under_way)

        self.do(together())

    @rule(
        seed=st.integers(0, 99),
        starts=st.lists(st.integers(0, MOST - 1), min_size=1, max_size=12, unique=True),
    )
    def a_batch(self, seed: int, starts: list[int]) -> None:
        assert self.backend is not None
        chance = random.Random(seed)
        offsets = sorted({start * SECTOR % len(self.array) for start in starts})
        writes = [(offset, chance.randbytes(SECTOR)) for offset in offsets]
        for offset, data in writes:
            self.array[offset : offset + SECTOR] = data
        assert self.do(self.backend.pwrite_many(writes)) == [None] * len(writes)
        into = memoryview(bytearray(len(offsets) * SECTOR))
        for number, served in enumerate(self.backend.read_cached([(at, SECTOR) for at in offsets], into)):
            if served:
                assert into[number * SECTOR :][:SECTOR] == writes[number][1]

    @rule()
    def flush(self) -> None:
        assert self.backend is not None
        self.do(self.backend.flush())

    @precondition(lambda self: self.version == 3 or not self.kept[-1])
    @rule(size=st.integers(1, MOST), much=st.booleans())
    def resize(self, size: int, much: bool) -> None:
        assert self.backend is not None
        old = len(self.array)
        size = size * SECTOR if much else max(SECTOR, min(MOST * SECTOR, old + (size % 9 - 4) * SECTOR))
        self.do(self.backend.truncate(size))
        self.array[:] = self.array[:size].ljust(size, b"\0")

    @precondition(lambda self: self.layer or "data" not in self.shape)
    @precondition(lambda self: self.counts >= 255 or not self.kept[-1])
    @precondition(lambda self: self.counts > 1)
    @rule()
    def snapshot_inside(self) -> None:
        self.made += 1
        name = f"s{self.made}"

        async def make() -> None:
            async with self.graph.change() as change:
                await snapshots.create_internal(self.graph, f"d{self.layer}", name, change)

        self.do(make())
        self.kept[-1][name] = bytes(self.array)

    @precondition(lambda self: self.kept[-1])
    @rule(which=st.integers(0, 9))
    def forget_a_snapshot(self, which: int) -> None:
        names = list(self.kept[-1])
        name = names[which % len(names)]
        self.do(snapshots.delete_internal(self.graph, f"d{self.layer}", None, name))
        del self.kept[-1][name]

    @precondition(lambda self: self.layer < 3)
    @rule(cluster=st.sampled_from(CLUSTERS), extended=st.booleans())
    def snapshot_in_front(self, cluster: int, extended: bool) -> None:
        words = f"cluster_size={max(cluster, 16384) if extended else cluster}"
        words += ",extended_l2=on" if extended else ""
        before, self.layer = f"d{self.layer}", self.layer + 1
        name = self.path(self.layer).name
        make = ["qemu-img", "create", "-q", "-f", "qcow2", "-u", "-o", words, "-F", "qcow2"]
        run(self.directory, *make, "-b", f"{before}.qcow2", name, str(len(self.array)))

        async def put() -> None:
            overlay = f"d{self.layer}"
            file = {"driver": "file", "node-name": f"f{self.layer}", "discard": "unmap"}
            await self.graph.add({**file, "filename": str(self.path(self.layer))})
            self.options = {}
            await self.graph.add({**self.node_options(self.layer), "backing": None})
            async with self.graph.change() as change:
                await snapshots.put_overlay(self.graph, before, overlay, change)

        self.do(put())
        self.version, self.counts = 3, 65535
        self.covered.append(bytes(self.array))
        self.kept.append({})

    def chosen(self, options: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
        return options | (more if self.version == 3 else {})

    @rule(options=OTHER_OPTIONS, more=V3_OPTIONS)
    def other_options(self, options: dict[str, Any], more: dict[str, Any]) -> None:
        self.options = self.chosen(options, more)
        self.do(reopen(self.graph, [self.node_options(self.layer)]))

    @rule(options=OTHER_OPTIONS, more=V3_OPTIONS)
    def close_and_open(self, options: dict[str, Any], more: dict[str, Any]) -> None:
        async def again() -> None:
            await self.close()
            await self.open(self.chosen(options, more))

        self.do(again())

    # -- the end

    def teardown(self) -> None:
        try:
            if self.backend is not None:
                assert bytes(self.do(self.backend.pread(0, len(self.array)))) == self.array
                self.do(self.close())
                self.judge()
        finally:
            self.do(self.graph.close())
            self.loop.close()
            self.scratch.cleanup()

    def judge(self) -> None:
        for layer, held in enumerate([*self.covered, bytes(self.array)]):
            judge(self.path(layer), held)
            for name, state in self.kept[layer].items():
                self.judge_snapshot(layer, name, state)
        if self.shape == "raw data" and not self.layer:
            # QEMU makes the file larger: a whole number of clusters.
            data = (self.directory / "data.raw").read_bytes()
            assert data[: len(self.array)] == self.array
            assert not any(data[len(self.array) :])
        # qemu-io sees the same bytes as well, in what is at the end.
        start = max(0, len(self.array) - 4096)
        read = f"read -v {start} {len(self.array) - start}"
        dump = run(self.directory, "qemu-io", "-r", "-f", "qcow2", "-c", read, self.path(self.layer).name)
        rows = re.findall(r"^[0-9a-f]{8,}: +((?:[0-9a-f]{2} ){16})", dump, re.MULTILINE)
        assert bytes.fromhex("".join(rows)) == self.array[start:]

    def judge_snapshot(self, layer: int, name: str, state: bytes) -> None:
        convert = ["qemu-img", "convert", "-l", f"snapshot.name={name}", "-O", "raw"]
        run(self.directory, *convert, self.path(layer).name, "s.raw")
        found = (self.directory / "s.raw").read_bytes()
        # The disk may have had another size then.
        length = min(len(found), len(state))
        assert found[:length] == state[:length], name


@pytest.mark.peer("qemu-img", "qemu-io")
@pytest.mark.timeout(0)
def test_an_image_is_an_array_of_bytes() -> None:
    wanted = os.environ.get("QMPD_MODEL_EXAMPLES")
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        Model,
        settings=settings(
            max_examples=int(wanted or 60),
            stateful_step_count=20,
            derandomize=wanted is None,
            database=None,
            deadline=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        ),
    )
