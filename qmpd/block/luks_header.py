"""Unlocking a LUKS1 header that lies on a node, and making one.

It may be at a disk's beginning, on a disk of its own, or somewhere inside an image of another format; a
:class:`HeaderArea` says where.  The passphrase is asked for at the moment of use and wiped at once, and
keys are derived in threads, so that the event loop never waits for one, in steps, so that whoever is
cancelled stops at the next one.

Source: LUKS On-Disk Format Specification 1.2.3 (the format itself is in `qmpd.crypto.luks1`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from qmpd.crypto import luks1
from qmpd.crypto.ciphers import CipherSpec
from qmpd.crypto.memory import KeyBuffer
from qmpd.crypto.plan import Plan
from qmpd.crypto.sectors import SectorCipher
from qmpd.crypto.steps import Steps
from qmpd.errors import Error

if TYPE_CHECKING:
    from qmpd.block.graph import Graph
    from qmpd.block.node import Node

#: Milliseconds for one passphrase check, if `iter-time` is not given.
DEFAULT_ITER_TIME: Final = 2000

#: The largest offset that QEMU reads at: the largest file, in whole GiB.
_MAX_OFFSET: Final = (1 << 63) - (1 << 30)


class OutsideArea(Error):
    """Something in the header points out of the area that the header has."""


@dataclass(frozen=True)
class HeaderArea:
    """Where on a node a header is.

    :param node: the node.
    :param offset: of the header, in bytes.
    :param length: of the header with its keyslots, in bytes; None if it may take all of the node.
    :param failure: what is said of errors in reading.
    """

    node: Node
    offset: int = 0
    length: int | None = None
    failure: str = "Unable to read LUKS header"

    async def read(self, offset: int, length: int) -> bytearray:
        """Bytes of the header; what lies behind the end of the node reads as zeroes.

        A truncated header is thereby found by what it says, not by its length.

        :param offset: from the header's beginning.
        :raise OutsideArea: if they are not in the header's area.
        :raise Error: if they can't be read.
        """
        if self.length is not None and offset + length > self.length:
            raise OutsideArea("Request for data outside of extension header")
        offset += self.offset
        if offset + length > _MAX_OFFSET:
            raise Error(f"{self.failure}: Input/output error")
        available = max(0, min(length, self.node.size - offset))
        buffer = bytearray(length)
        if available:
            try:
                buffer[:available] = memoryview(await self.node.pread(offset, available))
            except OSError as error:
                raise Error(f"{self.failure}: {error.strerror}") from None
        return buffer

    async def write(self, offset: int, data: bytes) -> None:
        """Put bytes into the header.

        :param offset: from the header's beginning.
        :raise OutsideArea: if they are not in the header's area.
        :raise OSError: what the storage says.
        """
        if self.length is not None and offset + len(data) > self.length:
            raise OutsideArea("Request for data outside of extension header")
        await self.node.pwrite(self.offset + offset, data, grow=True)


async def unlock(
    graph: Graph,
    area: HeaderArea,
    options: Mapping[str, Any],
    *,
    detached: bool = False,
    prefix: str = "",
) -> tuple[luks1.Header, SectorCipher]:
    """Read a header and unlock it.

    :param options: their "key-secret" is the id of the passphrase's secret.
    :param detached: the payload is on another node than the header.
    :param prefix: what the option's name begins with in messages.
    :returns: the header, and the cipher of its volume key, for the caller to close.
    :raise Error: in QEMU's words.
    """
    with password_for(graph, options, prefix) as password:
        header = luks1.Header.parse(await area.read(0, luks1.HEADER_BYTES), detached=detached)
        with await find_key(graph, area, header, password) as key:
            return header, SectorCipher(header.spec, key.data, memory=graph.key_memory)


async def find_key(
    graph: Graph, area: HeaderArea, header: luks1.Header, password: KeyBuffer
) -> luks1.VolumeKey:
    """The volume key, from the first keyslot that `password` opens.

    :raise Error: in QEMU's words, if it opens none.
    """
    materials: list[tuple[int, bytearray]] = []
    refusal = Error(luks1.INVALID_PASSWORD)
    for number in header.active_slots:
        try:
            materials.append((number, await area.read(*header.material_extent(number))))
        except OutsideArea as error:
            # It counts only if none of the slots before opens.
            refusal = error
            break
    return await graph.in_key_thread(_unlocking(header, password, materials, refusal))


async def opens(graph: Graph, area: HeaderArea, header: luks1.Header, slot: int, password: KeyBuffer) -> bool:
    """Whether `password` opens this keyslot.

    :raise Error: if that can't be found out.
    """
    if not header.slots[slot].active:
        return False
    material = await area.read(*header.material_extent(slot))
    key = await graph.in_key_thread(luks1.unlocking(header, slot, password.data, material))
    if key is not None:
        key.wipe()
    return key is not None


def password_for(graph: Graph, options: Mapping[str, Any], prefix: str = "") -> KeyBuffer:
    """The passphrase that `options` name, for the caller to wipe.

    :raise Error: if they name none, or there is no such secret.
    """
    if "key-secret" not in options:
        raise Error(f"Parameter '{prefix}key-secret' is required for cipher")
    return graph.secrets(options["key-secret"])


def _unlocking(
    header: luks1.Header, password: KeyBuffer, materials: list[tuple[int, bytearray]], refusal: Error
) -> Steps[luks1.VolumeKey]:
    """The volume key, from the first keyslot that `password` opens.

    :param materials: the number and the key material of each active keyslot.
    :param refusal: what to say if it opens none.
    :raise Error: if it opens none; a keyslot with an absurd iteration count does not
        keep the others from being tried, but is what is complained of then.
    """
    for slot, material in materials:
        try:
            key = yield from luks1.unlocking(header, slot, password.data, material)
        except Error as error:
            refusal = error
            continue
        if key is not None:
            return luks1.VolumeKey(key)
    raise refusal


def spec_for(options: Mapping[str, Any], prefix: str = "") -> CipherSpec:
    """The cipher that a header is to be made for.

    :param options: QCryptoBlockCreateOptionsLUKS.
    :param prefix: what the options' names begin with in messages.
    :raise Error: if there is no such cipher, or no secret is named.
    """
    spec = CipherSpec.from_options(
        options.get("cipher-alg"),
        options.get("cipher-mode"),
        options.get("ivgen-alg"),
        options.get("ivgen-hash-alg"),
    )
    if "key-secret" not in options:
        raise Error(f"Parameter '{prefix}key-secret' is required for cipher")
    return spec


async def make(
    graph: Graph, spec: CipherSpec, options: Mapping[str, Any], *, detached: bool = False
) -> tuple[luks1.Header, Plan]:
    """A new header, and the writes that put it at the beginning of a node.

    :param options: QCryptoBlockCreateOptionsLUKS.
    :param detached: the payload is on another node than the header.
    :raise Error: if there is no such secret, or no such hash.
    """
    hash_name = options.get("hash-alg", "sha256")
    iter_time = options.get("iter-time", DEFAULT_ITER_TIME)

    def making(password: KeyBuffer) -> Steps[tuple[luks1.Header, Plan]]:
        iterations = yield from luks1.iterations_for(hash_name, spec.key_bytes, iter_time)
        header, key, plan = yield from luks1.formatting(
            spec, hash_name, password.data, *iterations, detached=detached
        )
        key.wipe()
        return header, plan

    with graph.secrets(options["key-secret"]) as password:
        return await graph.in_key_thread(making(password))


def header_info(header: luks1.Header, *, detached: bool) -> dict[str, Any]:
    """QCryptoBlockInfoLUKS.

    :param detached: what is said of that.
    """
    spec = header.spec
    info: dict[str, Any] = {
        "cipher-alg": spec.algorithm,
        "cipher-mode": spec.mode,
        "ivgen-alg": spec.ivgen,
        "hash-alg": header.hash_name,
        "detached-header": detached,
        "payload-offset": header.payload_offset * luks1.SECTOR,
        "master-key-iters": header.digest_iterations,
        "uuid": header.uuid,
        "slots": [_slot_info(slot) for slot in header.slots],
    }
    if spec.ivgen == "essiv":
        info["ivgen-hash-alg"] = spec.ivgen_hash
    return info


def _slot_info(slot: luks1.Keyslot) -> dict[str, Any]:
    info: dict[str, Any] = {"active": slot.active, "key-offset": slot.key_offset * luks1.SECTOR}
    if slot.active:
        info |= {"iters": slot.iterations, "stripes": slot.stripes}
    return info
