"""Data that is encrypted inside the image: LUKS, and the old AES method.

Guests' clusters are encrypted sector by sector (512 bytes); the tables are not, nor is a compressed
cluster.

LUKS: the header extension says where the LUKS header lies.  A sector's IV counts sectors from the
beginning of the file that holds the data, so a cluster that moves is encrypted anew.

AES: the first 16 bytes of the password, filled up with zeroes, are a key for AES-128 in CBC mode.  The
IV counts the disk's sectors.  Nothing in the image can tell a wrong password from the right one.

Source: qcow2 specification, sections "Header" (crypt_method), "Full disk encryption header pointer" and
"Data encryption".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from qmpd.block import keyslots, luks_header
from qmpd.block.drivers.qcow2.layout import CryptoHeader
from qmpd.block.luks_header import HeaderArea, OpenedSlot
from qmpd.block.node import SECTOR, Data, Node
from qmpd.block.tiled_cipher import TiledCipher
from qmpd.crypto import luks1
from qmpd.crypto.ciphers import CipherSpec
from qmpd.crypto.luks import LuksHeader
from qmpd.crypto.memory import KeyBuffer
from qmpd.crypto.plan import Write
from qmpd.crypto.sectors import SectorCipher
from qmpd.errors import Error

if TYPE_CHECKING:
    from qmpd.block.drivers.qcow2.header import Crypto
    from qmpd.block.graph import Graph
    from qmpd.block.keyslot_holder import KeyslotHolder

#: What the options of the encryption begin with in messages.
PREFIX: Final = "encrypt."

_AES: Final = CipherSpec("aes-128", "cbc", "plain64")


async def make_header(graph: Graph, options: Mapping[str, Any]) -> CryptoHeader | None:
    """A new LUKS header; None for the AES method, which has none.

    :param options: QCryptoBlockCreateOptions.
    :raise Error: in QEMU's words.
    """
    if options["format"] == "qcow":
        luks_header.password_for(graph, options, PREFIX).wipe()
        return None
    header, plan = await luks_header.make(graph, luks_header.spec_for(options, PREFIX), options)
    # The order in which they reach the storage does not matter: the image is none before all are there.
    pieces = [(step.offset, step.data) for step in plan if isinstance(step, Write)]
    return CryptoHeader(header.length, pieces)


def _area(file: Node, extent: Crypto) -> HeaderArea:
    """Where a LUKS header is on the node with the image."""
    return HeaderArea(file, extent.offset, extent.length, "Could not read encryption header")


class DataCipher:
    """Between guests' data and the file that holds it; has the duty to wipe the key.

    :param cipher: what encrypts; taken over.
    :param header: the LUKS header, or None for the AES method.
    :param extent: where in the image the LUKS header is.
    :param opened: the LUKS header's keyslot that opened.
    """

    def __init__(
        self,
        cipher: TiledCipher,
        header: LuksHeader | None = None,
        extent: Crypto | None = None,
        opened: OpenedSlot | None = None,
    ) -> None:
        self._tiled = cipher
        self._header = header
        self._extent = extent
        self._opened = opened

    @classmethod
    async def open_luks(
        cls, graph: Graph, file: Node, extent: Crypto, options: Mapping[str, Any]
    ) -> DataCipher:
        """Unlock the LUKS header.

        :param file: the node with the image.
        :param extent: where the header is in it.
        :param options: BlockdevQcow2Encryption.
        :raise Error: in QEMU's words.
        """
        header, key, opened = await luks_header.unlock(
            graph, _area(file, extent), options, only_version_1=True, prefix=PREFIX
        )
        with key:
            cipher = SectorCipher(header.segments[0].spec, key.data, memory=graph.key_memory)
        return cls(TiledCipher(cipher, graph.cipher_pool), header, extent, opened)

    @classmethod
    def open_aes(cls, graph: Graph, options: Mapping[str, Any]) -> DataCipher:
        """Make a key of the password.

        :param options: BlockdevQcow2Encryption.
        :raise Error: if there is no password.
        """
        memory = graph.key_memory
        with luks_header.password_for(graph, options, PREFIX) as password, memory.take(_AES.key_bytes) as key:
            taken = min(len(key), len(password))
            key.data[:taken] = password.data[:taken]
            return cls(TiledCipher(SectorCipher(_AES, key.data, memory=memory), graph.cipher_pool))

    def close(self) -> None:
        """Wipe the key.  May be called again."""
        self._tiled.close()

    @property
    def luks_header(self) -> LuksHeader | None:
        """The LUKS header, or None for the AES method."""
        return self._header

    @luks_header.setter
    def luks_header(self, header: LuksHeader) -> None:
        self._header = header

    @property
    def opened_slot(self) -> OpenedSlot:
        """The LUKS header's keyslot that the passphrase opened."""
        assert self._opened is not None, "only LUKS has keyslots"
        return self._opened

    def header_area(self, file: Node) -> HeaderArea:
        """Where the LUKS header is on the node with the image."""
        assert self._extent is not None, "only LUKS has a header"
        return _area(file, self._extent)

    async def amend(
        self,
        image: KeyslotHolder,
        options: Mapping[str, Any],
        *,
        force: bool,
        commit: Callable[[], None],
    ) -> None:
        """Change keyslots.

        :param image: the node that this is the cipher of.
        :param options: QCryptoBlockAmendOptions.
        :raise Error: in QEMU's words.
        """
        if options["format"] != "luks":
            raise Error("Amend can't be used to change the qcow2 encryption format")
        if self._header is None:
            raise Error("Only LUKS encryption options can be amended for qcow2 with blockdev-amend")
        await keyslots.amend(image, options, force=force, commit=commit)

    def copy_key(self) -> KeyBuffer:
        """A copy of the volume key, for the caller to wipe."""
        return self._tiled.cipher.copy_key()

    def info(self) -> dict[str, Any]:
        """ImageInfoSpecificQCow2Encryption."""
        if self._header is None:
            return {"format": "aes"}
        segment = self._header.segments[0]
        return {"format": "luks", **luks_header.header_info(self._header, segment, detached=False)}

    def header_clusters(self, cluster_bytes: int) -> Iterator[int]:
        """The numbers of the clusters in which the LUKS header and the keys in use are.

        The area that the image claims for the header may be larger than the file.
        """
        if self._header is None or self._extent is None:
            return
        extents = [(0, luks1.HEADER_BYTES)]
        extents += (self._header.material_extent(slot) for slot in self._header.active_slots)
        for offset, length in extents:
            first = self._extent.offset + offset
            yield from range(first // cluster_bytes, -(-(first + length) // cluster_bytes))

    async def read(self, node: Node, place: int, length: int, offset: int) -> Data:
        """Read the disk's sectors at `offset`, which are at `place` in `node`, or zeroes behind its end.

        :raise OSError: what the node says.
        """
        sector = self._sector(place, offset)
        available = min(length, max(0, node.size - place))
        if available == length:
            return await self._tiled.read(node, place, length, sector)
        buffer = bytearray(length)
        if available:
            buffer[:available] = memoryview(await node.pread(place, available))
        return self._tiled.cipher.decrypt(buffer, sector)

    async def write(self, node: Node, place: int, data: Data, offset: int) -> None:
        """Write the disk's sectors at `offset` to `place` in `node`, which grows if need be.

        :raise OSError: what the node says.
        """
        await self._tiled.write(node, place, memoryview(data), self._sector(place, offset), grow=True)

    def _sector(self, place: int, offset: int) -> int:
        """The number that the first sector's IV is made of."""
        return (offset if self._header is None else place) // SECTOR
