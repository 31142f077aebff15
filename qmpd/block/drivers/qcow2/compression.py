"""Compressed clusters: what one holds, never more than a cluster of it.

Source: qcow2 specification, section "Compressed Clusters Descriptor"; zlib's data is a raw deflate stream
with a window of 4 KiB.
"""

from __future__ import annotations

import zlib
from typing import Final

import zstandard

from qmpd.block.drivers.qcow2.header import Compression

_DEFLATE_WINDOW: Final = -12
#: zstd may want no more memory than this for its window, in bytes.
_ZSTD_WINDOW: Final = 8 << 20


def decompress(method: Compression, data: bytes | bytearray | memoryview, length: int) -> bytes:
    """The cluster of `length` bytes that compressed `data` begins with.

    :raise ValueError: if it is damaged or ends too early; what comes behind a cluster is not looked at.
    """
    try:
        if method is Compression.ZLIB:
            plain = zlib.decompressobj(_DEFLATE_WINDOW).decompress(data, length)
        else:
            reader = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW).stream_reader(
                data, read_across_frames=False
            )
            plain = reader.read(length)
    except (zlib.error, zstandard.ZstdError) as error:
        raise ValueError("damaged compressed cluster") from error
    if len(plain) != length:
        raise ValueError("compressed cluster ends too early")
    return plain
