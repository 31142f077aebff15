"""`blockdev-create` for qcow2: options are checked, the image is laid out, and only then written.

What can fail without touching the disk fails before it is touched; `layout` has the writes and their order.

Source: qcow2 specification.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AsyncExitStack
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from qmpd.block import creation
from qmpd.block.creation import PERMISSIONS
from qmpd.block.drivers.qcow2.header import (
    MAX_BACKING_NAME,
    MAX_CLUSTER_BITS,
    MAX_REFCOUNT_ORDER,
    MAX_SIZE,
    MIN_CLUSTER_BITS,
    MIN_CLUSTER_FOR_NAMES,
    MIN_SUBCLUSTER,
    SUBCLUSTERS,
    Autoclear,
    Compatible,
    Compression,
    Encryption,
    Extension,
    ExtensionType,
    Header,
    Incompatible,
    check_encryption,
    feature_name_table,
)
from qmpd.block.drivers.qcow2.layout import CryptoHeader, Layout, Step
from qmpd.block.node import SECTOR
from qmpd.block.permissions import Permission
from qmpd.crypto.plan import Barrier, Write
from qmpd.errors import Error

if TYPE_CHECKING:
    from qmpd.block.backend import Backend
    from qmpd.block.graph import Graph

_DEFAULT_CLUSTER: Final = 64 << 10
_DEFAULT_REFCOUNT_BITS: Final = 16

#: Nobody else writes to an image in the making.
_ALONE: Final = Permission.everything() & ~PERMISSIONS

_NEWER: Final = "compatibility level 1.1 and above (use version=v3 or greater)"

_Options = Mapping[str, Any]

#: How QAPI's formats of encryption are called in the header.
_ENCRYPTIONS: Final[Mapping[str, Encryption]] = {"luks": Encryption.LUKS, "qcow": Encryption.AES}


def _is_power_of_two(number: int) -> bool:
    return number > 0 and not number & number - 1


def _is_v2(options: _Options) -> bool:
    return bool(options.get("version") == "v2")


def _cluster_bytes(options: _Options) -> int:
    return int(options.get("cluster-size", _DEFAULT_CLUSTER))


def _refcount_bits(options: _Options) -> int:
    return int(options.get("refcount-bits", _DEFAULT_REFCOUNT_BITS))


def _preallocation(options: _Options) -> str:
    return str(options.get("preallocation", "off"))


def _bad_cluster(options: _Options) -> bool:
    size = _cluster_bytes(options)
    return not (_is_power_of_two(size) and 1 << MIN_CLUSTER_BITS <= size <= 1 << MAX_CLUSTER_BITS)


def _bad_refcount_bits(options: _Options) -> bool:
    bits = _refcount_bits(options)
    return not (_is_power_of_two(bits) and bits <= 1 << MAX_REFCOUNT_ORDER)


#: What can't be: what is looked for, and what is said of it, in QEMU's order.
_CONFLICTS: Final[tuple[tuple[Callable[[_Options], bool], str], ...]] = (
    (lambda o: o["size"] % SECTOR != 0, "Image size must be a multiple of 512 bytes"),
    (_bad_cluster, "Cluster size must be a power of two between 512 and 2048k"),
    (
        lambda o: o.get("extended-l2", False) and _cluster_bytes(o) < SUBCLUSTERS * MIN_SUBCLUSTER,
        f"Extended L2 entries are only supported with cluster sizes of at least "
        f"{SUBCLUSTERS * MIN_SUBCLUSTER} bytes",
    ),
    (
        lambda o: o.get("extended-l2", False) and _is_v2(o),
        f"Extended L2 entries are only supported with {_NEWER}",
    ),
    (
        lambda o: "backing-file" in o and _preallocation(o) != "off" and not o.get("extended-l2", False),
        "Backing file and preallocation can only be used at the same time if extended_l2 is on",
    ),
    (
        lambda o: "backing-fmt" in o and "backing-file" not in o,
        "Backing format cannot be used without backing file",
    ),
    (
        lambda o: o.get("lazy-refcounts", False) and _is_v2(o),
        f"Lazy refcounts only supported with {_NEWER}",
    ),
    (_bad_refcount_bits, "Refcount width must be a power of two and may not exceed 64 bits"),
    (
        lambda o: _refcount_bits(o) != _DEFAULT_REFCOUNT_BITS and _is_v2(o),
        "Different refcount widths than 16 bits require compatibility level 1.1 or above "
        "(use version=v3 or greater)",
    ),
    (
        lambda o: o.get("data-file-raw", False) and "data-file" not in o,
        "data-file-raw requires data-file",
    ),
    (
        lambda o: o.get("data-file-raw", False) and "backing-file" in o,
        "Backing file and data-file-raw cannot be used at the same time",
    ),
    (
        lambda o: "data-file" in o and _is_v2(o),
        f"External data files are only supported with {_NEWER}",
    ),
    (
        lambda o: o.get("compression-type", "zlib") != "zlib" and _is_v2(o),
        f"Non-zlib compression type is only supported with {_NEWER}",
    ),
)


def new_header(options: _Options, data_file: str | None) -> Header:
    """The header of an image, without the places of its tables.

    :param options: BlockdevCreateOptionsQcow2, validated, in QAPI's names.
    :param data_file: the external data file's name, if there is one.
    :raise Error: if the options make no sense together.
    """
    for conflict, message in _CONFLICTS:
        if conflict(options):
            raise Error(message)
    _check_size(options["size"])
    header = Header(
        version=2 if _is_v2(options) else 3,
        cluster_bits=_cluster_bytes(options).bit_length() - 1,
        size=options["size"],
        refcount_order=_refcount_bits(options).bit_length() - 1,
        compression=Compression[options.get("compression-type", "zlib").upper()],
    )
    if data_file is not None:
        header.incompatible |= Incompatible.DATA_FILE
    if header.compression is not Compression.ZLIB:
        header.incompatible |= Incompatible.COMPRESSION
    if options.get("extended-l2", False):
        header.incompatible |= Incompatible.EXTENDED_L2
    if options.get("lazy-refcounts", False):
        header.compatible |= Compatible.LAZY_REFCOUNTS
    if options.get("data-file-raw", False):
        header.autoclear |= Autoclear.DATA_FILE_RAW
    if "backing-fmt" in options:
        header.extensions.append(Extension(ExtensionType.BACKING_FORMAT, options["backing-fmt"].encode()))
    if data_file is not None:
        header.extensions.append(
            Extension(ExtensionType.DATA_FILE, data_file.encode(errors="surrogateescape"))
        )
    if "encrypt" in options:
        header.encryption = _ENCRYPTIONS[options["encrypt"]["format"]]
    if header.encryption is Encryption.LUKS:
        # Where it is will be seen when there is a layout.
        header.extensions.append(Extension(ExtensionType.CRYPTO, bytes(16)))
    if header.version >= 3 and header.cluster_bytes >= MIN_CLUSTER_FOR_NAMES:
        header.extensions.append(feature_name_table())
    _check_room(header)
    if "backing-file" in options:
        _set_backing(header, options["backing-file"], options.get("backing-fmt"))
    return header


def _check_size(size: int) -> None:
    if size >= 1 << 63:
        raise Error("Could not resize image: Image size cannot be negative")
    if size > MAX_SIZE:
        raise Error(f"Could not resize image: offset({size}) exceeds maximum({MAX_SIZE})")


def _check_room(header: Header) -> None:
    """:raise Error: if the header does not fit into its cluster."""
    header.build()


def _set_backing(header: Header, name: str, image_format: str | None) -> None:
    header.backing_name = name.encode(errors="surrogateescape")
    reason = None
    if len(header.backing_name) > MAX_BACKING_NAME:
        reason = "Invalid argument"
    else:
        try:
            header.build()
        except Error:
            reason = "No space left on device"
    if reason is not None:
        shown = "(null)" if image_format is None else image_format
        raise Error(f"Could not assign backing file '{name}' with format '{shown}': {reason}")


async def create(graph: Graph, options: _Options) -> None:
    """Make a qcow2 image.

    :param options: BlockdevCreateOptions, validated, in QAPI's names.
    :raise Error: what went wrong.
    """
    async with AsyncExitStack() as stack:
        # QEMU opens the image that it has made, and reads; who may not read must not make one here either.
        target = await stack.enter_async_context(
            creation.disk_for(graph, options["file"], _ALONE, reads=True)
        )
        data = None
        if "data-file" in options:
            # Before another node is opened, for that may be seen.
            new_header(options, "")
            data = await stack.enter_async_context(creation.disk_for(graph, options["data-file"], _ALONE))
        header = new_header(options, None if data is None else data.node.filename)
        preallocation = _preallocation(options)
        if header.raw_external_data and preallocation == "off":
            # Whoever reads the data file alone finds the same as whoever reads the image.
            preallocation = "metadata"
        layout = Layout(header, preallocation)
        if "encrypt" in options:
            layout = Layout(header, preallocation, await _make_crypto_header(graph, options["encrypt"]))
        # QEMU finds out when it opens what it has made.
        check_encryption(header.encryption, old=graph.old_encryption)
        try:
            await _write_image(target, data, layout, preallocation)
        except OSError as error:
            raise Error(f"Could not write qcow2 header: {error.strerror}") from None


async def _make_crypto_header(graph: Graph, options: _Options) -> CryptoHeader | None:
    """The LUKS header for an image; None for the old method, which has none.

    :param options: QCryptoBlockCreateOptions.
    :raise Error: in QEMU's words.
    """
    # Only encrypted images need the ciphers.
    encryption = await graph.in_io_thread(import_module, f"{__package__}.encryption")
    made: CryptoHeader | None = await encryption.make_header(graph, options)
    return made


async def _write_image(target: Backend, data: Backend | None, layout: Layout, preallocation: str) -> None:
    # What preallocation does to the storage; tables are written for "metadata" as well.
    reserve = "off" if preallocation == "metadata" else preallocation
    stale = target.size if target.node.grows_with_zeroes else layout.length
    data_stale = 0 if data is None else data.size
    try:
        # There may be no room for it, so this is first.
        await _grow(target, layout.length, "off" if data is not None else reserve)
        if data is not None and preallocation != "off":
            await _grow(data, layout.data_bytes, reserve if data.size < layout.data_bytes else "off")
    except Error as error:
        raise Error(f"Could not resize image: Failed to resize underlying file: {error.desc}") from None
    await _carry_out(target, layout.wipe())
    if data is not None:
        await _clear(data, layout, data_stale, keep=preallocation != "off")
    await _carry_out(target, layout.steps(stale))


async def _grow(disk: Backend, length: int, reserve: str) -> None:
    """Make a node at least `length` bytes long."""
    alignment = disk.node.request_alignment
    length = -(-length // alignment) * alignment
    if reserve != "off" and disk.size > length:
        raise Error("Cannot use preallocation for shrinking files")
    if disk.size < length:
        await disk.truncate(length, reserve)


async def _clear(data: Backend, layout: Layout, stale: int, *, keep: bool) -> None:
    """See that an external data file holds nothing that the guest is not to see.

    :param stale: so many bytes from its start on hold what was there before; in a raw data file they
        are the disk.
    :param keep: its length is not the disk's.
    """
    size = layout.header.size
    if not keep:
        await data.truncate(size)
        return
    start = size if layout.header.raw_external_data else 0
    end = min(layout.data_bytes, stale)
    if end > start:
        await data.write_zeroes(start, end - start, unmap=True)
    await data.flush()


async def _carry_out(target: Backend, steps: Iterable[Step]) -> None:
    for step in steps:
        if isinstance(step, Write):
            await target.pwrite(step.offset, step.data)
        elif isinstance(step, Barrier):
            await target.flush()
        else:
            await target.write_zeroes(step.offset, step.length, unmap=True)
