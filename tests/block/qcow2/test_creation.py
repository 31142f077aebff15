"""New images are the ones that QEMU makes, and none is there until all of it is."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from qcow2_images import attach, detach, run

from qmpd.block.drivers import create
from qmpd.block.drivers.qcow2.creation import new_header
from qmpd.block.drivers.qcow2.header import Header
from qmpd.block.drivers.qcow2.layout import Layout, Zeroes
from qmpd.block.graph import Graph
from qmpd.crypto.plan import Barrier, Write
from qmpd.errors import Error

SIZES = (0, 512, 1 << 20, 3_000_320)

#: What qemu-img calls the members of BlockdevCreateOptionsQcow2 that it has under another name.
NAMES = {"version": "compat", "data-file": "data_file", "data-file-raw": "data_file_raw"}


def combinations() -> Iterator[dict[str, Any]]:
    """Options that go together: each value with each of the others', as far as that is allowed."""
    versions = ("v2", "v3")
    clusters = (512, 1024, 2048, 4096, 65536, 2 << 20)
    widths = (1, 4, 16, 64)
    modes = ("off", "metadata", "falloc", "full")
    kinds: tuple[dict[str, Any], ...] = (
        {},
        {"lazy-refcounts": True, "compression-type": "zstd"},
        {"extended-l2": True},
        {"data-file": "data"},
        {"data-file": "data", "data-file-raw": True},
        {"backing-file": "base", "backing-fmt": "raw"},
        {"extended-l2": True, "backing-file": "base", "backing-fmt": "raw"},
    )
    chance = random.Random(4)
    for version, cluster, width, mode, kind in itertools.product(versions, clusters, widths, modes, kinds):
        options = {"version": version, "cluster-size": cluster, "refcount-bits": width, **kind}
        size = chance.choice(SIZES)
        try:
            new_header({**options, "preallocation": mode, "size": size}, kind.get("data-file"))
        except Error:
            continue
        if chance.random() < 0.1:
            yield {**options, "preallocation": mode, "size": size}


def a_file(path: Path | str) -> dict[str, Any]:
    """Options of a file that need not outlive a power cut: on a busy disk flushing takes most of the time."""
    return {"driver": "file", "filename": str(path), "cache": {"no-flush": True}}


def qemu_img_create(directory: Path, options: dict[str, Any]) -> None:
    """Let qemu-img make the same image."""
    spelled = []
    for name, value in options.items():
        if name in ("size", "backing-file", "backing-fmt"):
            continue
        if name == "version":
            value = {"v2": "0.10", "v3": "1.1"}[value]
        if value is True:
            value = "on"
        spelled.append(f"{NAMES.get(name, name.replace('-', '_'))}={value}")
    backing = ["-u", "-b", "base", "-F", "raw"] if "backing-file" in options else []
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", ",".join(spelled), *backing, "image"]
    run(directory, *command, str(options["size"]))


def info(directory: Path) -> Any:
    """What qemu-img says of the image, but for what depends on the file system."""
    shown = json.loads(run(directory, "qemu-img", "info", "-U", "--output=json", "image"))
    shown.pop("actual-size")
    shown.pop("children", None)
    return shown


@pytest.mark.peer("qemu-img")
async def test_an_image_is_the_one_that_qemu_makes_with_the_same_options(
    graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    differences = []
    tried = 0
    for number, options in enumerate(combinations()):
        theirs, ours = tmp_path / f"{number}-qemu", tmp_path / f"{number}-qmpd"
        for directory in (theirs, ours):
            directory.mkdir()
            (directory / "base").touch()
        qemu_img_create(theirs, options)
        (ours / "image").touch()
        monkeypatch.chdir(ours)
        chosen: dict[str, Any] = {
            "driver": "qcow2",
            "file": a_file("image"),
            **options,
        }
        if "data-file" in options:
            (ours / "data").touch()
            chosen["data-file"] = a_file("data")
        await create(graph, chosen)
        expected, made = (theirs / "image").read_bytes(), (ours / "image").read_bytes()
        cluster = options["cluster-size"]
        if expected[:cluster] != made[:cluster]:
            differences.append(
                (options, "header", Header.parse(expected[:cluster]), Header.parse(made[:cluster]))
            )
        if len(expected) != len(made):
            differences.append((options, "size", len(expected), len(made)))
        if options["preallocation"] == "off" and "data-file-raw" not in options and expected != made:
            differences.append((options, "bytes"))
        if info(theirs) != info(ours):
            differences.append((options, "info", info(theirs), info(ours)))
        run(ours, "qemu-img", "check", "-q", "image")
        for file in (*theirs.iterdir(), *ours.iterdir()):
            file.unlink()
        tried += 1
    assert not differences, "\n".join(map(str, differences))
    assert tried > 40


def carried_out(steps: list[Any], before: bytes, length: int, chance: random.Random) -> bytes:
    """A file after a crash: what came before the last barrier is there, the rest in part or torn."""
    safe = max((number for number, step in enumerate(steps) if isinstance(step, Barrier)), default=0)
    image = bytearray(before.ljust(length, b"\0"))
    for number, step in enumerate(steps):
        if isinstance(step, Barrier):
            continue
        data = step.data if isinstance(step, Write) else bytes(step.length)
        if number >= safe:
            fate = chance.random()
            if fate < 0.3:
                continue
            if fate < 0.5:
                data = data[: chance.randrange(len(data)) // 512 * 512]
        image[step.offset : step.offset + len(data)] = data
    return bytes(image)


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize(
    "options",
    [
        {"cluster-size": 512},
        {"cluster-size": 512, "refcount-bits": 64, "preallocation": "metadata"},
        {"preallocation": "falloc"},
        {"version": "v2", "backing-file": "base", "backing-fmt": "raw"},
        {"backing-file": "./" * 450 + "base", "backing-fmt": "raw"},
        {"extended-l2": True, "preallocation": "metadata"},
    ],
)
def test_a_crash_leaves_a_whole_image_or_none(tmp_path: Path, options: dict[str, Any]) -> None:
    size = 600 << 10
    chance = random.Random(str(options))
    run(tmp_path, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", "old", "4M")
    old = (tmp_path / "old").read_bytes()
    layout = Layout(new_header({**options, "size": size}, None), options.get("preallocation", "off"))
    (tmp_path / "base").touch()
    steps = [*layout.wipe(), *layout.steps(len(old))]
    states = []
    for before in (b"", old):
        for moment in range(len(steps) + 1):
            image = carried_out(steps[:moment], before, layout.length, chance)
            if image[:4] != b"QFI\xfb":
                states.append("none")
                continue
            header = Header.parse(image[: Header.cluster_bytes_of(image)])
            if header.size != size:
                assert before == old
                assert moment < 2, "the old one is gone before anything else is changed"
                continue
            states.append("whole")
            (tmp_path / "image").write_bytes(image)
            run(tmp_path, "qemu-img", "check", "-q", "image")
        assert states[-1] == "whole"
    assert "none" in states


def test_the_steps_of_a_layout_stay_inside_the_file_and_apart_from_each_other() -> None:
    for options in combinations():
        external = options.get("data-file")
        layout = Layout(new_header(options, external), options["preallocation"])
        places = sorted(
            (step.offset, step.offset + (len(step.data) if isinstance(step, Write) else step.length))
            for step in layout.steps(0)
            if isinstance(step, Write | Zeroes)
        )
        # The L1 table is cleared as a whole first, before the entries that it has are written.
        l1 = layout.header.l1_offset
        places = [place for place in places if place[0] != l1 or not l1]
        for (_, end), (start, _) in itertools.pairwise(places):
            assert end <= start, options
        assert places[-1][1] <= layout.length, options


async def test_what_a_file_held_before_does_not_come_to_light(graph: Graph, tmp_path: Path) -> None:
    size = 1 << 20
    for options in (
        {"preallocation": "metadata"},
        {"preallocation": "metadata", "data": True},
        {"data": True},
        {},
    ):
        (tmp_path / "image").write_bytes(b"\xee" * (2 * size + 77))
        (tmp_path / "data").write_bytes(b"\xee" * (2 * size + 77))
        chosen: dict[str, Any] = {"driver": "qcow2", "size": size, **options}
        chosen["file"] = a_file(tmp_path / "image")
        if chosen.pop("data", False):
            chosen["data-file"] = a_file(tmp_path / "data")
        await create(graph, chosen)
        backend = await attach(graph, tmp_path / "image")
        assert bytes(await backend.pread(0, size)) == bytes(size)
        await detach(graph, backend)


async def test_a_raw_data_file_is_the_disk_from_the_beginning(graph: Graph, tmp_path: Path) -> None:
    content = random.Random(1).randbytes(1 << 20)
    (tmp_path / "image").touch()
    (tmp_path / "data").write_bytes(content)
    file = a_file(tmp_path / "image")
    data = a_file(tmp_path / "data")
    chosen = {"driver": "qcow2", "file": file, "data-file": data, "data-file-raw": True, "size": 2 << 20}
    await create(graph, chosen)
    backend = await attach(graph, tmp_path / "image")
    assert bytes(await backend.pread(0, 2 << 20)) == content.ljust(2 << 20, b"\0")
    assert (tmp_path / "data").stat().st_size == 2 << 20
    await detach(graph, backend)


async def test_options_that_do_not_go_together_touch_nothing(graph: Graph, tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(b"precious")
    file = a_file(tmp_path / "image")
    refused: tuple[dict[str, Any], ...] = (
        {"size": 513},
        {"size": 512, "cluster-size": 3},
        {"size": 512, "backing-file": "x" * 1024},
        {"size": 1 << 62},
        {"size": 512, "data-file": file},
        {"size": 512, "data-file": a_file(tmp_path / "missing")},
        {"size": 512, "encrypt": {"format": "luks", "key-secret": "missing"}},
    )
    for options in refused:
        with pytest.raises(Error):
            await create(graph, {"driver": "qcow2", "file": file, **options})
        assert (tmp_path / "image").read_bytes() == b"precious"
    assert graph._nodes == {}
