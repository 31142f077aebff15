"""Images that become another version, another size, or count otherwise: judged by QEMU's programs."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
from qcow2_images import attach, create, detach, judge, run

from qmpd.block import snapshots
from qmpd.block.backend import Backend
from qmpd.block.drivers.qcow2.amending import header_writes
from qmpd.block.drivers.qcow2.header import Extension, ExtensionType, Header
from qmpd.block.drivers.qcow2.refcount_width import lay_out
from qmpd.block.drivers.qcow2.refcounts import block_entries
from qmpd.block.graph import Graph
from qmpd.errors import Error

KILOBYTE: Final = 1 << 10
SIZE: Final = 3 << 20
SECRET: Final = ("--object", "secret,id=pw,data=pw")

#: By our names, qemu-img's.
SPELLINGS: Final = {
    "version": "compat",
    "backing-file": "backing_file",
    "backing-fmt": "backing_fmt",
    "data-file": "data_file",
    "data-file-raw": "data_file_raw",
    "lazy-refcounts": "lazy_refcounts",
    "refcount-bits": "refcount_bits",
    "size": "size",
}


async def amend(node: Any, *, force: bool = False, **options: Any) -> list[tuple[int, int]]:
    """Amend a node; returns what was told of the progress."""
    told: list[tuple[int, int]] = []
    await node.amend(
        {name.replace("_", "-"): value for name, value in options.items()},
        force=force,
        progress=lambda current, total: told.append((current, total)),
        commit=lambda: None,
    )
    return told


def info(path: Path) -> dict[str, Any]:
    """What qemu-img says of an image."""
    found: dict[str, Any] = json.loads(
        run(path.parent, "qemu-img", "info", "-U", "-f", "qcow2", "--output=json", str(path))
    )
    return found


def fields(path: Path) -> dict[str, Any]:
    """What can be amended, as qemu-img tells it."""
    found = info(path)
    data = found["format-specific"]["data"]
    return {
        "version": {"0.10": "v2", "1.1": "v3"}[data["compat"]],
        "size": found["virtual-size"],
        "lazy-refcounts": data.get("lazy-refcounts", False),
        "refcount-bits": data["refcount-bits"],
        "data-file": data.get("data-file"),
        "data-file-raw": data.get("data-file-raw"),
        "backing-file": found.get("backing-filename"),
        "backing-fmt": found.get("backing-filename-format"),
    }


async def fill(backend: Backend, model: bytearray, seed: object) -> None:
    """Data, zero clusters and discarded ones all over the disk."""
    chance = random.Random(str(seed))
    for _ in range(12):
        start = chance.randrange(0, len(model) - 300_000) // 512 * 512
        length = chance.choice((512, 70_144, 262_144))
        match chance.choice(("write", "write", "zeroes", "unmap")):
            case "write":
                data = chance.randbytes(length)
                await backend.pwrite(start, data)
            case kind:
                data = bytes(length)
                await backend.write_zeroes(start, length, unmap=kind == "unmap")
        model[start : start + length] = data


# -- each option

#: Stands for another file in the test's directory.
ANOTHER: Final = "another.raw"

CASES: Final[tuple[tuple[str, dict[str, Any]], ...]] = (
    ("compat=0.10", {"version": "v3"}),
    ("compat=0.10,cluster_size=512", {"version": "v3"}),
    ("", {"version": "v2"}),
    ("cluster_size=512", {"version": "v2"}),
    ("cluster_size=2M", {"version": "v2"}),
    ("lazy_refcounts=on", {"version": "v2"}),
    ("compression_type=zstd", {"version": "v2"}),
    ("refcount_bits=1", {"version": "v2", "refcount-bits": 16}),
    ("compat=0.10", {"version": "v3", "refcount-bits": 1, "lazy-refcounts": True, "size": SIZE * 2}),
    ("lazy_refcounts=on,refcount_bits=64", {"version": "v2", "refcount-bits": 16, "size": SIZE // 2}),
    ("", {"lazy-refcounts": True}),
    ("lazy_refcounts=on", {"lazy-refcounts": False}),
    *(
        (f"cluster_size=512,refcount_bits={bits}", {"refcount-bits": 64 // bits})
        for bits in (1, 2, 4, 16, 64)
    ),
    ("cluster_size=4096,lazy_refcounts=on", {"refcount-bits": 8}),
    ("extended_l2=on,cluster_size=16k", {"refcount-bits": 32, "lazy-refcounts": True}),
    ("cluster_size=2M", {"refcount-bits": 1}),
    ("", {"size": SIZE + 512}),
    ("cluster_size=512", {"size": 1 << 30}),
    ("", {"size": SIZE // 2}),
    ("extended_l2=on", {"size": SIZE // 2 + 512, "refcount-bits": 1}),
    ("data_file=data.raw", {"refcount-bits": 1, "size": SIZE * 2}),
    ("data_file=data.raw", {"data-file": ANOTHER}),
    ("data_file=data.raw", {"data-file": ""}),
    ("data_file=data.raw,data_file_raw=on", {"data-file-raw": False}),
    ("data_file=data.raw,data_file_raw=on", {"data-file-raw": True, "size": SIZE * 2}),
)


#: With each of them, whether there is a backing image; with a raw data file there can be none.
BACKED: Final = [
    pytest.param(made, wanted, backed, id=f"{made}-{wanted}-{'backed' if backed else 'alone'}")
    for made, wanted in CASES
    for backed in (False, True)
    if not (backed and "raw=on" in made)
]


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize(("made", "wanted", "backed"), BACKED)
async def test_what_is_amended_is_so_and_the_disk_holds_what_it_held(
    graph: Graph, tmp_path: Path, made: str, wanted: dict[str, Any], backed: bool
) -> None:
    base = random.Random(1).randbytes(SIZE - 70_144)
    (tmp_path / "base.raw").write_bytes(base)
    path = create(tmp_path, made, SIZE, backing="base.raw" if backed else None)
    before = fields(path)
    if wanted.get("data-file") == ANOTHER:
        wanted = {"data-file": str(tmp_path / ANOTHER)}
    backend = await attach(graph, path)
    model = bytearray(base if backed else b"").ljust(SIZE, b"\0")
    await fill(backend, model, made)
    told = await amend(backend.node, **wanted)
    assert told[-1][0] == told[-1][1]
    assert [now for now, _ in told] == sorted(now for now, _ in told)
    size = wanted.get("size", SIZE)
    model = model[:size].ljust(size, b"\0")
    assert backend.size == size
    assert bytes(await backend.pread(0, min(size, 4 << 20))) == model[: 4 << 20]
    # The node goes on, and the next one to open the image finds the same.
    model = model[: 4 << 20]
    model_end = min(len(model), SIZE // 2)
    part = bytearray(model[:model_end])
    await fill(backend, part, "again")
    model[:model_end] = part
    assert bytes(await backend.pread(0, len(model))) == model
    await detach(graph, backend)
    if wanted.get("data-file"):
        (tmp_path / "data.raw").rename(tmp_path / ANOTHER)
    found = fields(path)
    assert found == before | {name: None if value == "" else value for name, value in wanted.items()} | (
        {"lazy-refcounts": False} if found["version"] == "v2" else {}
    )
    if wanted.get("data-file") == "":
        return  # Nobody knows where the data is.
    run(tmp_path, "qemu-img", "check", str(path))
    if size <= 4 << 20:
        judge(path, model)
    backend = await attach(graph, path)
    assert bytes(await backend.pread(0, len(model))) == model
    await detach(graph, backend)


# -- refusals

#: Options, and what is done to the image.  With larger clusters qemu-img takes seconds for another width.
IMAGES: Final[tuple[tuple[str, Callable[[Path], None] | None], ...]] = (
    ("cluster_size=4k", None),
    ("cluster_size=4k,compat=0.10", None),
    ("cluster_size=4k,refcount_bits=8", None),
    ("cluster_size=4k,lazy_refcounts=on", None),
    ("cluster_size=4k,data_file=data.raw", None),
    ("cluster_size=4k,data_file=data.raw,data_file_raw=on", None),
    ("cluster_size=16k,extended_l2=on", None),
    ("cluster_size=16k,extended_l2=on,refcount_bits=8", None),
    ("cluster_size=4k", lambda path: compress(path, "zstd")),
    ("cluster_size=4k", lambda path: compress(path, "zlib")),
    ("cluster_size=4k", lambda path: keep(path)),
    ("cluster_size=4k,refcount_bits=2", lambda path: keep(path)),
    ("cluster_size=4k,compat=0.10", lambda path: keep(path)),
    ("cluster_size=4k", lambda path: keep(path, resize=True)),
    ("cluster_size=16k,extended_l2=on", lambda path: keep(path, resize=True)),
)

CHOICES: Final[tuple[dict[str, Any], ...]] = (
    {"version": "v2"},
    {"version": "v3"},
    {"backing-file": "x"},
    {"backing-file": ""},
    {"backing-fmt": "raw"},
    {"data-file": "data.raw"},
    {"data-file-raw": True},
    {"data-file-raw": False},
    {"lazy-refcounts": True},
    {"lazy-refcounts": False},
    {"refcount-bits": 0},
    {"refcount-bits": -1},
    {"refcount-bits": 1},
    {"refcount-bits": 7},
    {"refcount-bits": 8},
    {"refcount-bits": 16},
    {"refcount-bits": 128},
    {"size": 0},
    {"size": 1000},
    {"size": 4 << 20},
    {"size": (1 << 63) - 1024},
    {"size": 1 << 62},
)


def compress(path: Path, method: str) -> None:
    (path.parent / "s.raw").write_bytes(b"compressible" * (SIZE // 12))
    run(
        path.parent, "qemu-img", "convert", "-c", "-O", "qcow2", "-o",
        f"cluster_size=4k,compression_type={method}", "s.raw", str(path),
    )  # fmt: skip


def keep(path: Path, *, resize: bool = False) -> None:
    run(path.parent, "qemu-io", "-c", "write 0 128k", str(path))
    run(path.parent, "qemu-img", "snapshot", "-c", "s", str(path))
    if resize:
        run(path.parent, "qemu-img", "resize", "-q", str(path), str(SIZE * 2))


def by_qemu_img(path: Path, options: dict[str, Any]) -> str | None:
    """What qemu-img says to the same; None if it does it."""
    values = {"True": "on", "False": "off", "v2": "0.10", "v3": "1.1"}
    chosen = ",".join(f"{SPELLINGS[name]}={values.get(str(value), value)}" for name, value in options.items())
    done = subprocess.run(
        ["qemu-img", "amend", "-f", "qcow2", "-o", chosen, str(path)],
        cwd=path.parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode == 0:
        return None
    return done.stderr.splitlines()[0].removeprefix("qemu-img: ")


@pytest.mark.peer("qemu-img", "qemu-io")
@pytest.mark.parametrize("number", range(len(IMAGES)))
async def test_the_refusals_are_qemu_imgs(graph: Graph, tmp_path: Path, number: int) -> None:
    """Of every option, and of every two of them, on images of all kinds; in the same words and order."""
    made, prepare = IMAGES[number]
    path = create(tmp_path, made, SIZE)
    if prepare is not None:
        prepare(path)
    image = path.read_bytes()
    refused = tried = 0
    chance = random.Random(number)
    pairs = [a | b for a, b in itertools.combinations(CHOICES, 2) if a.keys() != b.keys()]
    for options in [*CHOICES, *chance.sample(pairs, 14)]:
        path.write_bytes(image)
        expected = by_qemu_img(path, options)
        if options.get("refcount-bits") == -1 and expected is not None and "out of range" in expected:
            expected = "Refcount width must be a power of two and may not exceed 64 bits"
        path.write_bytes(image)
        backend = await attach(graph, path)
        text = None
        try:
            await amend(backend.node, **options)
        except Error as error:
            text = error.desc
        await detach(graph, backend)
        assert text == expected, options
        tried += 1
        if text is not None:
            refused += 1
            assert path.read_bytes() == image, options
        else:
            run(tmp_path, "qemu-img", "check", str(path))
    assert 0 < refused < tried


# -- what else is in an image


@pytest.mark.peer("qemu-img", "qemu-io")
@pytest.mark.parametrize("kind", ["luks", "aes"])
async def test_an_encrypted_image_reads_the_same_in_every_version(
    graph: Graph, tmp_path: Path, kind: str
) -> None:
    """Zero clusters become enciphered zeroes, for there is something behind them; in a snapshot too."""
    base = random.Random(2).randbytes(SIZE)
    (tmp_path / "base.raw").write_bytes(base)
    options = f"encrypt.format={kind},encrypt.key-secret=pw,cluster_size=16k"
    options += ",encrypt.iter-time=1" if kind == "luks" else ""
    path = tmp_path / "d.qcow2"
    run(
        tmp_path, "qemu-img", "create", "-q", *SECRET, "-f", "qcow2", "-o", options, "-b", "base.raw",
        "-F", "raw", "d.qcow2", str(SIZE),
    )  # fmt: skip
    backend = await attach(graph, path, encrypt={"format": kind, "key-secret": "pw"})
    model = bytearray(base)
    await fill(backend, model, kind)
    async with graph.change() as change:
        await snapshots.create_internal(graph, "d", "s", change)
    kept = bytes(model)
    await fill(backend, model, "after")
    await amend(backend.node, version="v2")
    assert bytes(await backend.pread(0, SIZE)) == model
    await amend(backend.node, version="v3", refcount_bits=8)
    await detach(graph, backend)
    opened = f"driver=qcow2,file.filename={path},encrypt.format={kind},encrypt.key-secret=pw"
    for chosen, expected in (([], model), (["-l", "snapshot.name=s"], kept)):
        if kind == "aes" and chosen:
            continue  # QEMU's convert takes no --image-opts together with a snapshot of such an image.
        run(tmp_path, "qemu-img", "convert", *SECRET, "--image-opts", *chosen, "-O", "raw", opened, "r.raw")
        assert (tmp_path / "r.raw").read_bytes() == expected
    run(tmp_path, "qemu-img", "check", *SECRET, "--image-opts", opened)


@pytest.mark.peer("qemu-img", "qemu-io")
async def test_compressed_clusters_stay(graph: Graph, tmp_path: Path) -> None:
    path = tmp_path / "d.qcow2"
    compress(path, "zlib")
    model = bytearray(b"compressible" * (SIZE // 12))
    backend = await attach(graph, path)
    await backend.write_zeroes(300_000 // 512 * 512, 700 * KILOBYTE)
    start = 300_000 // 512 * 512
    model[start : start + 700 * KILOBYTE] = bytes(700 * KILOBYTE)
    await amend(backend.node, version="v2")
    await amend(backend.node, version="v3", refcount_bits=64)
    assert bytes(await backend.pread(0, SIZE)) == model
    await detach(graph, backend)
    judge(path, model)


@pytest.mark.peer("qemu-img", "qemu-io")
async def test_what_only_a_snapshot_has_in_zstd_stays_readable(graph: Graph, tmp_path: Path) -> None:
    """QEMU makes it an image of version 2, and can't read the snapshot any more."""
    path = tmp_path / "d.qcow2"
    compress(path, "zstd")
    run(tmp_path, "qemu-img", "snapshot", "-c", "s", "d.qcow2")
    run(tmp_path, "qemu-io", "-c", f"discard 0 {SIZE}", "d.qcow2")
    before = path.read_bytes()
    backend = await attach(graph, path)
    text = "Cannot downgrade an image with zstd compression type and existing compressed clusters"
    with pytest.raises(Error, match=text):
        await amend(backend.node, version="v2")
    await detach(graph, backend)
    assert path.read_bytes() == before


@pytest.mark.peer("qemu-img")
async def test_bitmaps_go_with_version_3_and_leave_nothing_behind(graph: Graph, tmp_path: Path) -> None:
    path = create(tmp_path, "", SIZE)
    run(tmp_path, "qemu-img", "bitmap", "--add", "d.qcow2", "b")
    run(tmp_path, "qemu-io", "-c", "write 0 1M", "d.qcow2")
    run(tmp_path, "qemu-img", "bitmap", "--disable", "d.qcow2", "b")
    backend = await attach(graph, path)
    await amend(backend.node, lazy_refcounts=True, refcount_bits=8)
    assert info(path.parent / "d.qcow2")["format-specific"]["data"]["bitmaps"]
    await amend(backend.node, version="v2", refcount_bits=16)
    await detach(graph, backend)
    run(tmp_path, "qemu-img", "check", "d.qcow2")


@pytest.mark.peer("qemu-img", "qemu-io")
async def test_old_snapshots_learn_their_size(graph: Graph, tmp_path: Path) -> None:
    """In version 2 an entry may be without the size of the disk; in version 3 it is not."""
    path = create(tmp_path, "compat=0.10", SIZE)
    keep(path)
    with path.open("r+b") as image:
        image.seek(64)
        table = int.from_bytes(image.read(8), "big")
        image.seek(table)
        entry = bytearray(image.read(256))
        extra = int.from_bytes(entry[36:40], "big")
        entry[36:40] = bytes(4)
        image.seek(table)
        image.write(bytes(entry[:40] + entry[40 + extra :]).ljust(256, b"\0"))
    backend = await attach(graph, path)
    await amend(backend.node, version="v3", size=SIZE * 2)
    await detach(graph, backend)
    run(tmp_path, "qemu-img", "check", "d.qcow2")
    run(tmp_path, "qemu-img", "snapshot", "-a", "s", "d.qcow2")
    assert info(path)["virtual-size"] == SIZE


@pytest.mark.peer("qemu-img")
async def test_another_backing_file_needs_force(graph: Graph, tmp_path: Path) -> None:
    for name in ("base.raw", "long" * 200 + "x"):
        (tmp_path / "base.raw").write_bytes(bytes(SIZE))
        path = create(tmp_path, "cluster_size=4k", SIZE, backing="base.raw")
        backend = await attach(graph, path)
        with pytest.raises(Error, match="^Cannot amend the backing file$"):
            await amend(backend.node, backing_file=name, backing_fmt="qcow2")
        await amend(backend.node, backing_file="base.raw", backing_fmt="raw")
        await amend(backend.node, force=True, backing_file=name, backing_fmt="qcow2")
        assert (backend.node.backing_filename, backend.node.backing_format) == (name, "qcow2")
        assert backend.node.backing is not None
        with pytest.raises(Error, match="^Backing file name too long$"):
            await amend(backend.node, force=True, backing_file="y" * 1024)
        await detach(graph, backend)
        assert fields(path)["backing-file"] == name
        backend = await attach(graph, path, backing=None)
        await amend(backend.node, force=True, backing_file="")
        with pytest.raises(Error, match="^Backing format cannot be used without backing file$"):
            await amend(backend.node, force=True, backing_fmt="raw")
        await detach(graph, backend)
        assert fields(path)["backing-file"] is fields(path)["backing-fmt"] is None
        judge(path, bytes(SIZE))


# -- beside others


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize("made", ["cluster_size=4k", "cluster_size=4k,backing_file=base.raw,backing_fmt=raw"])
async def test_requests_go_on_meanwhile(graph: Graph, tmp_path: Path, made: str) -> None:
    """Two amend all the time, one of which waits for the other; a guest writes, and notices nothing."""
    base = random.Random(3).randbytes(SIZE)
    (tmp_path / "base.raw").write_bytes(base)
    path = create(tmp_path, made, SIZE)
    model = bytearray(base if "base" in made else SIZE)
    backend = await attach(graph, path)
    done = 0

    async def write(seed: int) -> None:
        chance = random.Random(seed)
        part = SIZE // 4
        while done < 2:
            length = chance.choice((512, 4096, 20_480))
            start = seed * part + chance.randrange(0, (part - length) // 512) * 512
            data = chance.choice((chance.randbytes(length), bytes(length)))
            if any(data):
                await backend.pwrite(start, data)
            else:
                await backend.write_zeroes(start, length, unmap=chance.random() < 0.5)
            model[start : start + length] = data
            if chance.random() < 0.1:
                await backend.flush()
            assert bytes(await backend.pread(start, length)) == data

    async def change(wanted: list[dict[str, Any]]) -> None:
        nonlocal done
        try:
            for _ in range(3):
                for options in wanted:
                    await amend(backend.node, **options)
        finally:
            done += 1

    await asyncio.gather(
        *(write(seed) for seed in range(4)),
        change([{"version": "v3", "refcount-bits": bits} for bits in (64, 8, 16)]),
        change(
            [
                {"version": "v2", "refcount-bits": 16, "lazy-refcounts": False},
                {"version": "v3", "lazy-refcounts": True},
            ]
        ),
    )
    assert bytes(await backend.pread(0, SIZE)) == model
    await detach(graph, backend)
    judge(path, model)


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize("seed", range(5))
async def test_any_amendments_between_snapshots_leave_a_sound_image(
    graph: Graph, tmp_path: Path, seed: int
) -> None:
    """Whether they are made or refused, with little room for tables in memory, and guests at work."""
    chance = random.Random(seed)
    (tmp_path / "base.raw").write_bytes(chance.randbytes(SIZE - 51_200))
    cluster, bits = chance.choice(("512", "1k", "4k")), chance.choice((1, 8, 64))
    backing = chance.choice((None, "base.raw"))
    path = create(tmp_path, f"cluster_size={cluster},refcount_bits={bits}", SIZE, backing=backing)
    backend = await attach(graph, path, **{"l2-cache-size": 1024, "refcount-cache-size": 2048})
    model = bytearray(await backend.pread(0, SIZE))
    done = False

    async def write() -> None:
        while not done:
            length = chance.choice((512, 20_480, 66_048))
            start = chance.randrange(0, (SIZE - length) // 512) * 512
            kind = chance.choice(("write", "write", "zeroes", "unmap"))
            data = chance.randbytes(length) if kind == "write" else bytes(length)
            if kind == "write":
                await backend.pwrite(start, data)
            else:
                await backend.write_zeroes(start, length, unmap=kind == "unmap")
            model[start : start + length] = data
            assert bytes(await backend.pread(start, length)) == data

    writing = asyncio.create_task(write())
    made = 0
    for number in range(12):
        wanted = {
            "version": chance.choice(("v2", "v3", None)),
            "refcount-bits": chance.choice((1, 8, 16, 16, 64, None)),
            "lazy-refcounts": chance.choice((True, False, None)),
            "size": SIZE + 512 * chance.choice((0, 3, 200)),
        }
        try:
            await amend(backend.node, **{name: value for name, value in wanted.items() if value is not None})
            made += 1
            async with graph.change() as change:
                await snapshots.create_internal(graph, "d", f"s{number}", change)
        except Error:
            pass
        if number % 3 == 0 and backend.node.internal_snapshots:
            await snapshots.delete_internal(graph, "d", backend.node.internal_snapshots[0].id, None)
    done = True
    await writing
    assert made
    await detach(graph, backend)
    judge(path, model.ljust(fields(path)["size"], b"\0"))


@pytest.mark.peer("qemu-img")
async def test_a_cancelled_amendment_has_changed_nothing(graph: Graph, tmp_path: Path) -> None:
    """It is cancelled wherever it can be: as long as it has not said that there is no way back."""
    path = create(tmp_path, "cluster_size=512", SIZE)
    model = bytearray(random.Random(4).randbytes(SIZE))
    backend = await attach(graph, path)
    await backend.pwrite(0, bytes(model))
    await backend.flush()
    before = fields(path)
    for steps in range(0, 200, 7):
        decided = False

        def decide() -> None:
            nonlocal decided
            decided = True

        amending = asyncio.create_task(
            backend.node.amend({"refcount-bits": 1}, force=False, progress=lambda *_: None, commit=decide)
        )
        for _ in range(steps):
            await asyncio.sleep(0)
        if decided or amending.done():
            await amending
            break
        amending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await amending
        assert fields(path) == before
        # Whoever needs a cluster gets one.
        await backend.write_zeroes(0, 4096, unmap=True)
        await backend.pwrite(0, bytes(model[:4096]))
    await detach(graph, backend)
    judge(path, model)


@pytest.mark.peer("qemu-img")
async def test_who_may_not_be_disturbed_is_not(graph: Graph, tmp_path: Path) -> None:
    path = create(tmp_path, "", SIZE)
    backend = await attach(graph, path, write=False)
    with pytest.raises(Error, match="^Block node is read-only$"):
        await amend(backend.node, lazy_refcounts=True)
    await detach(graph, backend)
    # What the node was opened with has to go on being possible.
    for option, text in (
        ("discard-no-unref", "discard-no-unref is only supported since qcow2 version 3"),
        ("lazy-refcounts", "Lazy refcounts require a qcow2 image with at least qemu 1.1 compatibility level"),
    ):
        backend = await attach(graph, path, **{option: True})
        with pytest.raises(Error, match=f"^{text}$"):
            await amend(backend.node, version="v2")
        await detach(graph, backend)


# -- plans


def _cluster(header: Header, *, name_offset: int = 0) -> bytes:
    return header.build(name_offset=name_offset).ljust(header.cluster_bytes, b"\0")


@pytest.mark.parametrize("name", [0, 20, 400, 1000])
@pytest.mark.parametrize("extra", [0, 300])
def test_a_header_is_replaced_by_one_sector(name: int, extra: int) -> None:
    """Before that sector is written the old header reads as ever."""
    old = Header(cluster_bits=13, refcount_table_offset=8192, refcount_table_clusters=1)
    old.backing_name = b"o" * name or None
    old.extensions = [Extension(ExtensionType.BACKING_FORMAT, b"raw"), Extension(0x1234, bytes(extra))]
    new = old.copy()
    new.version, new.compatible = 2, 0
    new.backing_name = b"n" * name or None
    for before, after in ((old, new), (new, old)):
        area = _cluster(before)
        writes, first = header_writes(area, after)
        assert len(first) == 512
        image = bytearray(area)
        for offset, data in writes:
            assert offset >= 512
            image[offset : offset + len(data)] = data
            assert Header.parse(image) == Header.parse(area)
        image[: len(first)] = first
        assert Header.parse(image) == Header.parse(_cluster(after))


@pytest.mark.parametrize("order", range(7))
@pytest.mark.parametrize("cluster", [512, 65536])
def test_a_new_refcount_structure_counts_itself(order: int, cluster: int) -> None:
    entries = block_entries(cluster, order)
    for start in (1, entries - 1, entries, entries * 3 + 5, entries * 1000 - 2):
        used = {0, (start - 1) // entries}
        made = lay_out(cluster, order, used, start)
        assert set(made.blocks) >= used
        assert {number // entries for number in range(start, made.end)} <= set(made.blocks)
        table = made.table()
        assert len(table) * 8 == made.table_clusters * cluster
        places = [word // cluster for word in table if word]
        assert places == list(range(start, start + len(made.blocks)))
        assert made.table_offset == (start + len(made.blocks)) * cluster
