"""The first cluster of an image: the header, its extensions, the backing file's name.

`Header.parse` takes the bytes of the first cluster and says what is wrong with them
in QEMU's words; `Header.build` is its inverse.  Extensions that qmpd has no use for
are kept as they are, in their order.

Source: qcow2 specification, sections "Header" and "Header extensions".
"""

from __future__ import annotations

import dataclasses
import enum
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from qmpd.errors import Error

MAGIC: Final = b"QFI\xfb"

#: Bytes of a version 2 header, and of the parts that version 3 adds.
V2_BYTES: Final = 72
V3_BYTES: Final = 104
#: A version 3 header as it is written today: with the compression type, padded to 8 bytes.
FULL_BYTES: Final = 112

MIN_CLUSTER_BITS: Final = 9
MAX_CLUSTER_BITS: Final = 21
#: Extended L2 entries divide a cluster into this many subclusters.
SUBCLUSTERS: Final = 32
#: A subcluster has at least this many bytes.
MIN_SUBCLUSTER: Final = 512

#: Only images with clusters of at least so many bytes name their features.
MIN_CLUSTER_FOR_NAMES: Final = 8192

#: Bounds that QEMU sets on the tables, in bytes, and on the number of snapshots.
MAX_L1_BYTES: Final = 32 << 20
MAX_REFCOUNT_TABLE_BYTES: Final = 8 << 20
MAX_SNAPSHOTS: Final = 65536
MAX_BACKING_NAME: Final = 1023
MAX_REFCOUNT_ORDER: Final = 6
#: The largest disk, in bytes, that can be asked for.
MAX_SIZE: Final = (1 << 63) - (1 << 30)

#: Offsets in the header of what changes while an image is in use.
L1_POSITION: Final = 36
SIZE_POSITION: Final = 24
REFCOUNT_TABLE_POSITION: Final = 48
SNAPSHOTS_POSITION: Final = 60
INCOMPATIBLE_POSITION: Final = 72
AUTOCLEAR_POSITION: Final = 88

_V2: Final = struct.Struct(">4sIQIIQIIQQIIQ")
_V3: Final = struct.Struct(">QQQII")
_EXTENSION: Final = struct.Struct(">II")
_FEATURE_NAME: Final = struct.Struct(">BB46s")
_CRYPTO: Final = struct.Struct(">QQ")
_BITMAPS: Final = struct.Struct(">IIQQ")


class Encryption(enum.IntEnum):
    """Header field "crypt_method"."""

    NONE = 0
    AES = 1
    LUKS = 2


def check_encryption(encryption: Encryption, *, old: bool) -> None:
    """See that an image's method of encryption may be used.

    :param old: whether the one that was before LUKS may be.
    :raise Error: if it may not.
    """
    if encryption is Encryption.AES and not old:
        raise Error(
            "Use of AES-CBC encrypted qcow2 images is no longer supported in system emulators",
            "qmpd itself and qemu-img read and write them.",
        )


class Incompatible(enum.IntFlag):
    """Bits that a program has to know to open the image at all."""

    DIRTY = 1
    CORRUPT = 2
    DATA_FILE = 4
    COMPRESSION = 8
    EXTENDED_L2 = 16


class Compatible(enum.IntFlag):
    """Bits that a program may ignore."""

    LAZY_REFCOUNTS = 1


class Autoclear(enum.IntFlag):
    """Bits that a program which does not know them clears before it writes."""

    BITMAPS = 1
    DATA_FILE_RAW = 2


class Compression(enum.IntEnum):
    """How compressed clusters are compressed."""

    ZLIB = 0
    ZSTD = 1


class ExtensionType(enum.IntEnum):
    """The header extensions with a meaning."""

    END = 0
    BACKING_FORMAT = 0xE2792ACA
    FEATURE_NAMES = 0x6803F857
    BITMAPS = 0x23852875
    CRYPTO = 0x0537BE77
    DATA_FILE = 0x44415441


#: Names of the feature bits, as QEMU writes them into new images: (type, bit) -> name.
FEATURE_NAMES: Final[Mapping[tuple[int, int], str]] = {
    (0, 0): "dirty bit",
    (0, 1): "corrupt bit",
    (0, 2): "external data file",
    (0, 3): "compression type",
    (0, 4): "extended L2 entries",
    (1, 0): "lazy refcounts",
    (2, 0): "bitmaps",
    (2, 1): "raw external data",
}


@dataclass(frozen=True)
class Extension:
    """A header extension: its type, and its bytes without padding."""

    type: int
    data: bytes


@dataclass(frozen=True)
class Crypto:
    """Where the LUKS header is (extension "Full disk encryption header pointer"); bytes."""

    offset: int
    length: int


@dataclass(frozen=True)
class Bitmaps:
    """Where the bitmap directory is (extension "Bitmaps"); bytes."""

    count: int
    directory_bytes: int
    directory_offset: int


def feature_name_table() -> Extension:
    """The extension that names the feature bits for programs that do not know them."""
    data = b"".join(
        _FEATURE_NAME.pack(kind, bit, name.encode()) for (kind, bit), name in FEATURE_NAMES.items()
    )
    return Extension(ExtensionType.FEATURE_NAMES, data)


def _check_table(offset: int, entries: int, entry_bytes: int, limit: int, cluster: int, name: str) -> None:
    """Refuse a table that is too large, or not at a cluster's start, or ends behind what a file can be."""
    if entries > limit // entry_bytes:
        raise Error(f"{name} too large")
    if offset % cluster or offset + entries * entry_bytes >= 1 << 63:
        raise Error(f"{name} offset invalid")


@dataclass
class Header:
    """What the header says; offsets and sizes are bytes, `l1_entries` is a number of entries."""

    version: int = 3
    cluster_bits: int = 16
    size: int = 0
    encryption: Encryption = Encryption.NONE
    l1_entries: int = 0
    l1_offset: int = 0
    refcount_table_offset: int = 0
    refcount_table_clusters: int = 0
    snapshot_count: int = 0
    snapshots_offset: int = 0
    incompatible: int = 0
    compatible: int = 0
    autoclear: int = 0
    refcount_order: int = 4
    compression: Compression = Compression.ZLIB
    #: Whatever a header longer than FULL_BYTES holds behind that.
    unknown_fields: bytes = b""
    extensions: list[Extension] = field(default_factory=list)
    backing_name: bytes | None = None
    #: Bytes of the header as it was found; 0 for one that is to be built.
    length: int = 0

    # -- parsing

    @staticmethod
    def cluster_bytes_of(start: bytes | bytearray | memoryview) -> int:
        """The cluster size, from the first bytes of the image (at least FULL_BYTES, zeroes behind its end).

        :raise Error: if this is no image whose first cluster could be parsed.
        """
        magic, version, _, _, cluster_bits, *_ = _V2.unpack_from(start)
        if magic != MAGIC:
            raise Error("Image is not in qcow2 format")
        if version not in (2, 3):
            raise Error(f"Unsupported qcow2 version {version}")
        if not MIN_CLUSTER_BITS <= cluster_bits <= MAX_CLUSTER_BITS:
            raise Error(f"Unsupported cluster size: 2^{cluster_bits}")
        return 1 << int(cluster_bits)

    @classmethod
    def parse(cls, area: bytes | bytearray | memoryview, *, data_file: bool = False) -> Header:
        """The header of an image.

        :param area: the first cluster, with zeroes behind the end of the file.
        :param data_file: whether the options give an external data file.
        :raise Error: in QEMU's words, if it makes no sense or asks for what qmpd has not.
        """
        area = bytes(area)
        cluster = cls.cluster_bytes_of(area)
        (_, version, backing_offset, backing_length, cluster_bits, size, crypt, l1_entries, l1_offset,
         table_offset, table_clusters, snapshot_count, snapshots_offset) = _V2.unpack_from(area)  # fmt: skip
        incompatible = compatible = autoclear = 0
        order, length = 4, V2_BYTES
        if version >= 3:
            incompatible, compatible, autoclear, order, length = _V3.unpack_from(area, V2_BYTES)
            if length < V3_BYTES:
                raise Error("qcow2 header too short")
        if length > cluster:
            raise Error("qcow2 header exceeds cluster size")
        if backing_offset > cluster:
            raise Error("Invalid backing file offset")
        end = backing_offset if backing_offset else cluster
        known = int(Incompatible(0b11111))
        if incompatible & ~known:
            names = _feature_names(area, length, end)
            raise Error(f"Unsupported qcow2 feature(s): {_name_features(incompatible & ~known, names)}")
        compression = area[104] if version >= 3 and length > V3_BYTES else 0
        _check_compression(compression, bool(incompatible & Incompatible.COMPRESSION))
        if incompatible & Incompatible.EXTENDED_L2 and cluster // SUBCLUSTERS < MIN_SUBCLUSTER:
            raise Error(f"Unsupported subcluster size: {cluster // SUBCLUSTERS}")
        if order > MAX_REFCOUNT_ORDER:
            raise Error("Reference count entry width too large; may not exceed 64 bits")
        if crypt not in Encryption.__members__.values():
            raise Error(f"Unsupported encryption method {crypt}")
        header = cls(
            version, cluster_bits, size, Encryption(crypt), l1_entries, l1_offset, table_offset,
            table_clusters, snapshot_count, snapshots_offset, incompatible, compatible, autoclear, order,
            Compression(compression), length=length,
        )  # fmt: skip
        header.unknown_fields = area[FULL_BYTES:length]
        header._check_tables()
        header.extensions = list(_extensions(area, length, end))
        header._check_extensions()
        if backing_offset:
            if backing_length > min(MAX_BACKING_NAME, cluster - backing_offset):
                raise Error("Backing file name too long")
            header.backing_name = area[backing_offset : backing_offset + backing_length]
        return header

    def _check_tables(self) -> None:
        cluster = self.cluster_bytes
        if self.refcount_table_clusters > MAX_REFCOUNT_TABLE_BYTES // cluster:
            raise Error("Reference count table too large")
        if not self.refcount_table_clusters:
            raise Error("Image does not contain a reference count table")
        _check_table(
            self.refcount_table_offset,
            self.refcount_table_clusters * cluster // 8,
            8,
            MAX_REFCOUNT_TABLE_BYTES,
            cluster,
            "Reference count table",
        )
        # A snapshot's entry has at least 40 bytes.
        if self.snapshot_count > MAX_SNAPSHOTS:
            raise Error("Snapshot table too large")
        _check_table(
            self.snapshots_offset, self.snapshot_count, 40, MAX_SNAPSHOTS * 40, cluster, "Snapshot table"
        )
        _check_table(self.l1_offset, self.l1_entries, 8, MAX_L1_BYTES, cluster, "Active L1 table")
        needed = self.l1_entries_for(self.size)
        if needed > 0x7FFFFFFF:
            raise Error("Image is too big")
        if self.l1_entries < needed:
            raise Error("L1 table is too small")

    def _check_extensions(self) -> None:
        for extension in self.extensions:
            length = len(extension.data)
            match extension.type:
                case ExtensionType.BACKING_FORMAT if length >= 16:
                    raise Error(f"ERROR: ext_backing_format: len={length} too large (>=16)")
                case ExtensionType.CRYPTO:
                    if self.encryption is not Encryption.LUKS:
                        raise Error("CRYPTO header extension only expected with LUKS encryption method")
                    if length != _CRYPTO.size:
                        raise Error(
                            f"CRYPTO header extension size {length}, but expected size {_CRYPTO.size}"
                        )
                    self._check_crypto(*_CRYPTO.unpack(extension.data))
                case ExtensionType.BITMAPS if self.autoclear & Autoclear.BITMAPS:
                    self._check_bitmaps(extension.data)
                case _:
                    pass

    def _check_crypto(self, offset: int, length: int) -> None:
        if offset % self.cluster_bytes:
            raise Error(
                f"Encryption header offset '{offset}' is not a multiple of cluster size "
                f"'{self.cluster_bytes}'"
            )

    def _check_bitmaps(self, data: bytes) -> None:
        if len(data) != _BITMAPS.size:
            raise Error("bitmaps_ext: Invalid extension length")
        count, reserved, directory_bytes, offset = _BITMAPS.unpack(data)
        if reserved:
            raise Error("bitmaps_ext: Reserved field is not zero")
        if count > 65535:
            raise Error(
                f"bitmaps_ext: image has {count} bitmaps, exceeding the QEMU supported maximum of 65535"
            )
        if not count:
            raise Error("found bitmaps extension with zero bitmaps")
        if offset % self.cluster_bytes:
            raise Error("bitmaps_ext: invalid bitmap directory offset")
        if directory_bytes > 65535 * 1024:
            raise Error(
                f"bitmaps_ext: bitmap directory size ({directory_bytes}) exceeds the maximum supported "
                f"size ({65535 * 1024})"
            )

    # -- what it says

    @property
    def cluster_bytes(self) -> int:
        """A cluster's size."""
        return 1 << self.cluster_bits

    @property
    def extended_l2(self) -> bool:
        """Whether L2 entries have 16 bytes, with bits for the subclusters."""
        return bool(self.incompatible & Incompatible.EXTENDED_L2)

    @property
    def external_data(self) -> bool:
        """Whether the guest's data is in another file."""
        return bool(self.incompatible & Incompatible.DATA_FILE)

    @property
    def raw_external_data(self) -> bool:
        """Whether that file reads the same as the image."""
        return bool(self.autoclear & Autoclear.DATA_FILE_RAW)

    @property
    def l2_entry_bytes(self) -> int:
        """Bytes of an entry of an L2 table, which takes a cluster."""
        return 16 if self.extended_l2 else 8

    @property
    def l2_entries(self) -> int:
        """Entries of an L2 table."""
        return self.cluster_bytes // self.l2_entry_bytes

    def l1_entries_for(self, size: int) -> int:
        """How many L1 entries a disk of `size` bytes needs."""
        return -(-size // (self.l2_entries * self.cluster_bytes))

    def extension(self, kind: ExtensionType) -> bytes | None:
        """The bytes of the last extension of this type, or None."""
        return next((e.data for e in reversed(self.extensions) if e.type == kind), None)

    def set_extension(self, kind: ExtensionType, data: bytes | None) -> None:
        """Replace the extension of this type where it stands, or add it in front; None removes it."""
        position = next((i for i, e in enumerate(self.extensions) if e.type == kind), 0)
        self.extensions = [e for e in self.extensions if e.type != kind]
        if data is not None:
            self.extensions.insert(position, Extension(kind, data))

    @property
    def backing_format(self) -> str | None:
        """The backing file's driver, where the header says it."""
        return _text(self.extension(ExtensionType.BACKING_FORMAT))

    @property
    def data_file_name(self) -> str | None:
        """The external data file's name, where the header says it."""
        return _text(self.extension(ExtensionType.DATA_FILE))

    @property
    def crypto(self) -> Crypto | None:
        """Where the LUKS header is."""
        data = self.extension(ExtensionType.CRYPTO)
        return None if data is None else Crypto(*_CRYPTO.unpack(data))

    def set_crypto(self, crypto: Crypto) -> None:
        """Say where the LUKS header is."""
        self.set_extension(ExtensionType.CRYPTO, _CRYPTO.pack(crypto.offset, crypto.length))

    @property
    def bitmaps(self) -> Bitmaps | None:
        """Where the bitmap directory is, if it is to be believed."""
        data = self.extension(ExtensionType.BITMAPS)
        if data is None or not self.autoclear & Autoclear.BITMAPS:
            return None
        count, _, directory_bytes, offset = _BITMAPS.unpack(data)
        return Bitmaps(count, directory_bytes, offset)

    # -- building

    def build(self, *, name_offset: int = 0) -> bytes:
        """The bytes at the start of the image, backing file name included.

        :param name_offset: where the name is to be, in bytes; the first place behind the extensions if
            that is less.
        :raise Error: if they do not fit into a cluster.
        """
        head = self.build_fixed()
        parts = [head]
        for extension in self.extensions:
            parts.append(_EXTENSION.pack(extension.type, len(extension.data)))
            parts.append(extension.data + bytes(-len(extension.data) % 8))
        parts.append(_EXTENSION.pack(ExtensionType.END, 0))
        data = b"".join(parts)
        name = self.backing_name
        if name is not None:
            offset = max(name_offset, len(data))
            patched = bytearray(data.ljust(offset, b"\0"))
            struct.pack_into(">QI", patched, 8, offset, len(name))
            data = bytes(patched) + name
        if len(data) > self.cluster_bytes:
            raise Error("Could not write qcow2 header: No space left on device")
        return data

    @staticmethod
    def bytes_in_use(area: bytes) -> list[range]:
        """Where in the first cluster of an image something is that counts: header, extensions, name.

        :param area: a first cluster that `parse` accepts.
        """
        version, name_offset, name_length = struct.unpack_from(">IQI", area, 4)
        length = V2_BYTES if version < 3 else int.from_bytes(area[100:104], "big")
        end = length + _EXTENSION.size
        for extension in _extensions(area, length, name_offset or len(area)):
            end += _EXTENSION.size + -(-len(extension.data) // 8) * 8
        name = range(name_offset, name_offset + name_length) if name_offset else range(0)
        return [range(min(end, name_offset or end)), name]

    def become(self, other: Header) -> None:
        """Say from now on what `other` says."""
        for each in dataclasses.fields(self):
            setattr(self, each.name, getattr(other, each.name))

    def build_fixed(self) -> bytes:
        """The header alone, without a place for the backing file's name."""
        data = _V2.pack(
            MAGIC, self.version, 0, 0, self.cluster_bits, self.size, self.encryption, self.l1_entries,
            self.l1_offset, self.refcount_table_offset, self.refcount_table_clusters, self.snapshot_count,
            self.snapshots_offset,
        )  # fmt: skip
        if self.version < 3:
            return data
        length = FULL_BYTES + len(self.unknown_fields)
        data += _V3.pack(self.incompatible, self.compatible, self.autoclear, self.refcount_order, length)
        return data + bytes([self.compression]) + bytes(7) + self.unknown_fields

    def copy(self) -> Header:
        """Another one that says the same."""
        return dataclasses.replace(self, extensions=list(self.extensions))


def _text(data: bytes | None) -> str | None:
    return None if data is None else data.decode(errors="surrogateescape")


def _extensions(area: bytes, start: int, end: int) -> list[Extension]:
    """The extensions between `start` and `end` of the first cluster.

    :raise Error: if one is longer than the room for it.
    """
    found: list[Extension] = []
    position = start
    while position < end:
        kind, length = _EXTENSION.unpack_from(area.ljust(position + 8, b"\0"), position)
        position += _EXTENSION.size
        if position > end or length > end - position:
            raise Error("Header extension too large")
        if kind == ExtensionType.END:
            break
        found.append(Extension(kind, area[position : position + length]))
        position += -(-length // 8) * 8
    return found


def _feature_names(area: bytes, start: int, end: int) -> dict[tuple[int, int], str]:
    """What the image's own table calls the features; empty if there is none to be read."""
    names: dict[tuple[int, int], str] = {}
    try:
        extensions = _extensions(area, start, end)
    except Error:
        return names
    for extension in extensions:
        if extension.type == ExtensionType.FEATURE_NAMES:
            for kind, bit, name in _FEATURE_NAME.iter_unpack(
                extension.data[: len(extension.data) // _FEATURE_NAME.size * _FEATURE_NAME.size]
            ):
                if name[0]:
                    names.setdefault((kind, bit), name.split(b"\0")[0].decode(errors="replace"))
    return names


def _name_features(mask: int, names: Mapping[tuple[int, int], str]) -> str:
    """Incompatible features by name, and those without one as a number in hexadecimal."""
    shown = []
    for (kind, bit), name in names.items():
        if kind == 0 and bit < 64 and mask & 1 << bit:
            shown.append(name)
            mask &= ~(1 << bit)
    if mask:
        shown.append(f"Unknown incompatible feature: {mask:x}")
    return ", ".join(shown)


def _check_compression(compression: int, announced: bool) -> None:
    if compression not in Compression.__members__.values():
        raise Error(f"qcow2: unknown compression type: {compression}")
    if compression == Compression.ZLIB and announced:
        raise Error("qcow2: Compression type incompatible feature bit must not be set")
    if compression != Compression.ZLIB and not announced:
        raise Error("qcow2: Compression type incompatible feature bit must be set")
