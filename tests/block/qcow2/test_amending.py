"""Images that become another version, another size, or count otherwise: judged by QEMU's programs."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
from qcow2_images import attach, create, detach, judge, run

from qmpd.block.backend import Backend
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
        run(path.parent, "qemu-img", "info", "-f", "qcow2", "--output=json", str(path))
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


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize("backed", [False, True])
@pytest.mark.parametrize(("made", "wanted"), CASES, ids=[f"{made}-{wanted}" for made, wanted in CASES])
async def test_what_is_amended_is_so_and_the_disk_holds_what_it_held(
    graph: Graph, tmp_path: Path, made: str, wanted: dict[str, Any], backed: bool
) -> None:
    if backed and "raw=on" in made:
        pytest.skip("there can be no backing image")
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

IMAGES: Final[tuple[tuple[str, Callable[[Path], None] | None], ...]] = (
    ("", None),
    ("compat=0.10", None),
    ("refcount_bits=8", None),
    ("lazy_refcounts=on", None),
    ("data_file=data.raw", None),
    ("data_file=data.raw,data_file_raw=on", None),
    ("extended_l2=on", None),
    ("extended_l2=on,refcount_bits=8,cluster_size=16k", None),
    ("compression_type=zstd", lambda path: compress(path, "zstd")),
    ("", lambda path: compress(path, "zlib")),
    ("", lambda path: keep(path)),
    ("refcount_bits=2,cluster_size=4k", lambda path: keep(path)),
    ("compat=0.10", lambda path: keep(path)),
    ("", lambda path: keep(path, resize=True)),
    ("extended_l2=on", lambda path: keep(path, resize=True)),
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
        path.parent, "qemu-img", "convert", "-c", "-O", "qcow2", "-o", f"compression_type={method}",
        "s.raw", str(path),
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
    for options in [*CHOICES, *chance.sample(pairs, 20)]:
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
