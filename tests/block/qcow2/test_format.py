"""The format's tables: what was parsed is built again, and what makes no sense is refused in QEMU's words."""

from __future__ import annotations

import json
import random
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest

from qmpd.block.drivers.qcow2 import mapping, refcounts
from qmpd.block.drivers.qcow2.header import (
    FULL_BYTES,
    Autoclear,
    Compression,
    Extension,
    ExtensionType,
    Header,
    Incompatible,
    feature_name_table,
)
from qmpd.block.drivers.qcow2.mapping import Kind
from qmpd.block.drivers.qcow2.snapshots import Snapshot, build_table, parse_table
from qmpd.errors import Error

CLUSTER = 65536


def example(**changes: object) -> Header:
    header = Header(
        size=1 << 20,
        l1_entries=1,
        l1_offset=3 * CLUSTER,
        refcount_table_offset=CLUSTER,
        refcount_table_clusters=1,
        extensions=[feature_name_table()],
    )
    for name, value in changes.items():
        setattr(header, name, value)
    return header


def area(header: Header) -> bytes:
    return header.build().ljust(header.cluster_bytes, b"\0")


# -- the header


def test_a_header_is_built_as_it_was_parsed() -> None:
    header = example(
        backing_name=b"base.qcow2",
        compression=Compression.ZSTD,
        incompatible=Incompatible.COMPRESSION | Incompatible.DIRTY,
        extensions=[
            Extension(ExtensionType.BACKING_FORMAT, b"qcow2"),
            Extension(0x12345678, b"kept as it is"),
            feature_name_table(),
            Extension(0x87654321, b""),
        ],
    )
    parsed = Header.parse(area(header))
    assert parsed.extensions == header.extensions
    assert (parsed.backing_name, parsed.backing_format) == (b"base.qcow2", "qcow2")
    assert parsed.compression is Compression.ZSTD
    assert parsed.build() == header.build()


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize(
    "options",
    [
        "compat=0.10",
        "compat=1.1",
        "cluster_size=512,refcount_bits=1",
        "cluster_size=2M,refcount_bits=64,lazy_refcounts=on",
        "extended_l2=on",
        "compression_type=zstd",
        "data_file=data.raw,data_file_raw=on",
        "data_file=data.raw",
        "backing_file=base.raw,backing_fmt=raw",
        "compat=0.10,backing_file=base.raw,backing_fmt=raw",
    ],
)
def test_the_header_that_qemu_img_writes_is_built_byte_for_byte(tmp_path: Path, options: str) -> None:
    (tmp_path / "base.raw").write_bytes(bytes(CLUSTER))
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", options, "d.qcow2", "3M"]
    subprocess.run(command, cwd=tmp_path, check=True)
    image = (tmp_path / "d.qcow2").read_bytes()
    start = image[: Header.cluster_bytes_of(image)]
    header = Header.parse(start)
    assert start == header.build().ljust(len(start), b"\0")
    shown = json.loads(
        subprocess.check_output(["qemu-img", "info", "--output=json", "d.qcow2"], cwd=tmp_path)
    )
    assert (header.size, header.cluster_bytes) == (shown["virtual-size"], shown["cluster-size"])
    specific = shown["format-specific"]["data"]
    assert 1 << header.refcount_order == specific["refcount-bits"]
    assert header.extended_l2 == specific.get("extended-l2", False)
    assert header.data_file_name == specific.get("data-file")
    assert header.raw_external_data == specific.get("data-file-raw", False)


@pytest.mark.parametrize(
    ("position", "form", "value", "text"),
    [
        (0, "I", 0, "Image is not in qcow2 format"),
        (4, "I", 1, "Unsupported qcow2 version 1"),
        (20, "I", 8, "Unsupported cluster size: 2^8"),
        (20, "I", 22, "Unsupported cluster size: 2^22"),
        (24, "Q", 1 << 62, "Image is too big"),
        (24, "Q", 1 << 40, "L1 table is too small"),
        (32, "I", 3, "Unsupported encryption method 3"),
        (36, "I", (32 << 20) // 8 + 1, "Active L1 table too large"),
        (40, "Q", 4097, "Active L1 table offset invalid"),
        (40, "Q", 1 << 63, "Active L1 table offset invalid"),
        (48, "Q", 65537, "Reference count table offset invalid"),
        (56, "I", 0, "Image does not contain a reference count table"),
        (56, "I", 129, "Reference count table too large"),
        (60, "I", 65537, "Snapshot table too large"),
        (68, "I", 513, "Snapshot table offset invalid"),
        (72, "Q", 1 << 40, "Unsupported qcow2 feature(s): Unknown incompatible feature: 10000000000"),
        (72, "Q", 7 << 5, "Unsupported qcow2 feature(s): Unknown incompatible feature: e0"),
        (96, "I", 7, "Reference count entry width too large; may not exceed 64 bits"),
        (100, "I", 100, "qcow2 header too short"),
        (100, "I", 70000, "qcow2 header exceeds cluster size"),
        (104, "B", 1, "qcow2: Compression type incompatible feature bit must be set"),
        (104, "B", 2, "qcow2: unknown compression type: 2"),
        (79, "B", 8, "qcow2: Compression type incompatible feature bit must not be set"),
        (8, "QI", (600, 1024), "Backing file name too long"),
        (8, "QI", (CLUSTER - 6, 10), "Backing file name too long"),
        (112, "II", (0x12345678, 0x10000), "Header extension too large"),
        (112, "II", (0x12345678, 0xFFFFFFFF), "Header extension too large"),
        (112, "II", (0xE2792ACA, 17), "ERROR: ext_backing_format: len=17 too large (>=16)"),
        (112, "II", (0x0537BE77, 16), "CRYPTO header extension only expected with LUKS encryption method"),
    ],
)
def test_a_mangled_header_is_refused(
    position: int, form: str, value: int | tuple[int, ...], text: str
) -> None:
    data = bytearray(area(example()))
    struct.pack_into(">" + form, data, position, *(value if isinstance(value, tuple) else (value,)))
    with pytest.raises(Error) as caught:
        Header.parse(data)
    assert caught.value.desc == text


def test_an_unknown_feature_is_called_what_the_image_calls_it() -> None:
    names = struct.pack(">BB46s", 0, 40, b"time travel") + struct.pack(">BB46s", 1, 41, b"another kind")
    table = Extension(ExtensionType.FEATURE_NAMES, names)
    header = example(incompatible=1 << 40 | 1 << 41, extensions=[table])
    text = r"^Unsupported qcow2 feature\(s\): time travel, Unknown incompatible feature: 20000000000$"
    with pytest.raises(Error, match=text):
        Header.parse(area(header))


def test_any_bytes_are_a_header_or_an_error() -> None:
    chance = random.Random(1)
    good = area(example(backing_name=b"x"))
    refused = 0
    for _ in range(3000):
        data = bytearray(good)
        for _ in range(chance.randrange(1, 5)):
            data[chance.randrange(FULL_BYTES + 64)] = chance.randrange(256)
        try:
            Header.parse(data)
        except Error:
            refused += 1
    assert 1000 < refused < 3000


def test_bitmaps_count_only_while_their_bit_is_set() -> None:
    data = struct.pack(">IIQQ", 1, 0, 64, 5 * CLUSTER)
    header = example(extensions=[Extension(ExtensionType.BITMAPS, data)])
    assert Header.parse(area(header)).bitmaps is None
    header.autoclear = Autoclear.BITMAPS
    found = Header.parse(area(header)).bitmaps
    assert found is not None
    assert found.directory_offset == 5 * CLUSTER


# -- L1 and L2 tables


@pytest.mark.parametrize("cluster_bits", [9, 12, 16, 21])
def test_a_compressed_place_holds_the_bytes_that_it_was_made_for(cluster_bits: int) -> None:
    chance = random.Random(cluster_bits)
    for _ in range(500):
        offset = chance.randrange(1 << 40)
        length = chance.randrange(1, 1 << cluster_bits)
        place = mapping.compressed_place(mapping.compressed_entry(offset, length, cluster_bits), cluster_bits)
        assert place.offset == offset
        assert length <= place.length < length + mapping.SECTOR
        assert (place.offset + place.length) % mapping.SECTOR == 0


@pytest.mark.parametrize(
    ("entry", "external", "kind"),
    [
        (0, False, Kind.UNALLOCATED),
        (1, False, Kind.ZERO),
        (0x50001, False, Kind.ZERO_PLACED),
        (0x50000, False, Kind.DATA),
        (0x50000 | mapping.COPIED, False, Kind.DATA),
        (mapping.COMPRESSED | 5, False, Kind.COMPRESSED),
        (mapping.COPIED, False, Kind.UNALLOCATED),
        (mapping.COPIED, True, Kind.DATA),
    ],
)
def test_an_entry_says_what_its_cluster_is(entry: int, external: bool, kind: Kind) -> None:
    assert mapping.kind_of(entry, external) is kind


def test_a_subcluster_is_allocated_or_zero_but_not_both() -> None:
    bitmap = 0b0011 | 0b0110 << 32
    expected = [Kind.DATA, Kind.INVALID, Kind.ZERO_PLACED, Kind.UNALLOCATED_PLACED]
    assert [mapping.subcluster_kind(0x50000, bitmap, i) for i in range(4)] == expected
    expected = [Kind.INVALID, Kind.INVALID, Kind.ZERO, Kind.UNALLOCATED]
    assert [mapping.subcluster_kind(0, bitmap, i) for i in range(4)] == expected


def test_tables_are_big_endian() -> None:
    data = bytes(range(16))
    words = mapping.parse_table(data)
    assert list(words) == [0x0001020304050607, 0x08090A0B0C0D0E0F]
    assert mapping.build_table(words) == data
    assert list(words) == [0x0001020304050607, 0x08090A0B0C0D0E0F]


# -- refcount blocks


@pytest.mark.parametrize("order", range(7))
def test_counts_of_every_width_are_built_as_they_were_parsed(order: int) -> None:
    data = random.Random(order).randbytes(4096)
    counts = refcounts.parse_block(data, order)
    assert len(counts) == refcounts.block_entries(4096, order)
    assert int(counts.max()) <= refcounts.highest(order)
    assert refcounts.build_block(counts, order) == data


def test_the_first_narrow_count_is_in_the_lowest_bits() -> None:
    assert list(refcounts.parse_block(b"\x01\x80", 0)) == [1] + [0] * 14 + [1]
    assert list(refcounts.parse_block(b"\x21", 2)) == [1, 2]


def test_a_run_of_free_clusters_is_the_first_one() -> None:
    counts = np.ones(1000, np.uint16)
    assert refcounts.free_run(counts, 0, 5) == (1000, 0)
    counts[700:703] = 0
    counts[900:] = 0
    assert refcounts.free_run(counts, 0, 5) == (700, 3)
    assert refcounts.free_run(counts, 701, 1) == (701, 1)
    assert refcounts.free_run(counts, 703, 50) == (900, 50)
    assert refcounts.free_run(counts, 990, 50) == (990, 10)


# -- the snapshot table


def test_snapshots_are_built_as_they_were_parsed() -> None:
    snapshots = [
        Snapshot("1", "first", 5 * CLUSTER, 3, 17, 4, 99, 0, 1 << 20, None),
        Snapshot("2", "mit Umlaut: ä", 7 * CLUSTER, 1, 1, 2, 3, 1 << 40, 1 << 30, 12, b"more"),
    ]
    data = build_table(snapshots, 0)
    assert parse_table(data + b"behind it", 2) == (snapshots, len(data))
    for length in range(0, len(data), 7):
        with pytest.raises(Error):
            parse_table(data[:length], 2)


@pytest.mark.peer("qemu-img")
def test_the_snapshots_of_qemu_img_are_found(tmp_path: Path) -> None:
    image = tmp_path / "d.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "3M"], check=True)
    for name in ("one", "a longer name than that"):
        subprocess.run(["qemu-img", "snapshot", "-c", name, image], check=True)
    data = image.read_bytes()
    header = Header.parse(data[:CLUSTER])
    table = data[header.snapshots_offset :]
    snapshots, length = parse_table(table, header.snapshot_count)
    assert [(s.id, s.name, s.disk_size) for s in snapshots] == [
        ("1", "one", 3 << 20),
        ("2", "a longer name than that", 3 << 20),
    ]
    assert build_table(snapshots, 0) == table[:length]
