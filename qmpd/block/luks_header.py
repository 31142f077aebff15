"""Reading and unlocking a LUKS header that lies on a node, and making one.

It may be at a disk's beginning, on a disk of its own, or somewhere inside an image of another format; a
:class:`HeaderArea` says where.  The passphrase is asked for at the moment of use and wiped at once, and
keys are derived in threads, so that the event loop never waits for one, in steps, so that whoever is
cancelled stops at the next one.

The formats are in `qmpd.crypto.luks1` and `qmpd.crypto.luks2`, and the shape that both have in
`qmpd.crypto.luks`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from qmpd.crypto import kdf, luks, luks1, luks1_keyslots, luks2, luks2_binary, luks2_kdf, luks2_keyslots
from qmpd.crypto.ciphers import CipherSpec
from qmpd.crypto.luks import KdfChoice, LuksHeader, PayloadSegment
from qmpd.crypto.memory import KeyBuffer
from qmpd.crypto.plan import Barrier, Plan, Write
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
class OpenedSlot:
    """The keyslot that a passphrase has opened.

    :param number: of the slot.
    :param salt: of its key derivation: a slot that gets another key gets another salt.
    """

    number: int
    salt: bytes = field(repr=False)

    def find(self, header: LuksHeader) -> int | None:
        """The slot in which that key is now, or None if it has gone."""
        for number in (self.number, *header.volume_slots):
            with suppress(Error):
                if number in header.volume_slots and header.derivation(number).salt == self.salt:
                    return number
        return None


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


async def read_header(
    area: HeaderArea, *, detached: bool = False, only_version_1: bool = False
) -> LuksHeader:
    """Read the header in an area.

    :param detached: the payload is on another node than the header.
    :param only_version_1: refuse any other version.
    :raise Error: what is wrong with it.
    """
    reader = luks.reading(detached=detached, only_version_1=only_version_1)
    extent = next(reader)
    while True:
        data = await area.read(*extent)
        try:
            extent = reader.send(data)
        except StopIteration as end:
            header: LuksHeader = end.value
            return header


async def unlock(
    graph: Graph,
    area: HeaderArea,
    options: Mapping[str, Any],
    *,
    detached: bool = False,
    only_version_1: bool = False,
    prefix: str = "",
) -> tuple[LuksHeader, KeyBuffer, OpenedSlot]:
    """Read a header and unlock it.

    :param options: their "key-secret" is the id of the passphrase's secret.
    :param detached: the payload is on another node than the header.
    :param only_version_1: refuse any other version.
    :param prefix: what the option's name begins with in messages.
    :returns: the header; the volume key, for the caller to wipe; and the slot that opened.
    :raise Error: in QEMU's words.
    """
    with password_for(graph, options, prefix) as password:
        header = await read_header(area, detached=detached, only_version_1=only_version_1)
        slot, key = await find_key(graph, area, header, password)
        return header, key, OpenedSlot(slot, header.derivation(slot).salt)


async def find_key(
    graph: Graph, area: HeaderArea, header: LuksHeader, password: KeyBuffer
) -> tuple[int, KeyBuffer]:
    """The first keyslot that `password` opens, and the volume key out of it.

    A slot that can't be tried, be it because it would take absurdly long, does not keep the others from
    being tried, but is what is complained of if none opens.

    :raise Error: in QEMU's words, if it opens none.
    """
    refusal = Error(luks1.INVALID_PASSWORD)
    for slot in header.tried_slots:
        try:
            key = await _try_slot(graph, area, header, slot, password)
        except OutsideArea as error:
            refusal = error
            break
        except Error as error:
            refusal = error
            continue
        if key is not None:
            return slot, key
    raise refusal


async def opens(graph: Graph, area: HeaderArea, header: LuksHeader, slot: int, password: KeyBuffer) -> bool:
    """Whether `password` opens this keyslot.

    :raise Error: if that can't be found out.
    """
    if slot not in header.active_slots:
        return False
    key = await _try_slot(graph, area, header, slot, password)
    if key is not None:
        key.wipe()
    return key is not None


async def _try_slot(
    graph: Graph, area: HeaderArea, header: LuksHeader, slot: int, password: KeyBuffer
) -> KeyBuffer | None:
    """The volume key, if `password` opens this slot."""
    derivation = header.derivation(slot)
    if derivation.memory:
        # Who waits for memory shall not be told afterwards that it was in vain.
        graph.derivation_memory.check(derivation.memory)
        derivation.check()
    offset, length = header.material_extent(slot)
    # An area may be much larger than what lies in it.
    material = await area.read(offset, min(length, luks2.MAX_KEY_BYTES * luks2.STRIPES))
    async with graph.derivation_memory.reserve(derivation.memory):
        return await graph.in_key_thread(header.unlocking(slot, password.data, material))


def password_for(graph: Graph, options: Mapping[str, Any], prefix: str = "") -> KeyBuffer:
    """The passphrase that `options` name, for the caller to wipe.

    :raise Error: if they name none, or there is no such secret.
    """
    if "key-secret" not in options:
        raise Error(f"Parameter '{prefix}key-secret' is required for cipher")
    return graph.secrets(options["key-secret"])


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
) -> tuple[LuksHeader, Plan]:
    """A new header, and the writes that put it at the beginning of a node.

    :param options: QCryptoBlockCreateOptionsLUKS, maybe with what BlockdevCreateOptionsLUKS has besides.
    :param detached: the payload is on another node than the header.
    :raise Error: if there is no such secret, no such hash, or a choice that the version has not.
    """
    version = options.get("version", 1)
    if version not in (1, 2):
        raise Error(f"Parameter 'version' expects 1 or 2, not {version}")
    choice = kdf_choice(graph, options)
    making = _making_version_2 if version == 2 else _making_version_1
    with graph.secrets(options["key-secret"]) as password:
        async with graph.derivation_memory.reserve(choice.most_memory if version == 2 else 0):
            return await graph.in_key_thread(making(spec, options, choice, password, detached))


def kdf_choice(graph: Graph, options: Mapping[str, Any]) -> KdfChoice:
    """How a new key is to be derived.

    :param options: "iter-time", "pbkdf", "pbkdf-memory" and "pbkdf-parallel" of them.
    :raise Error: a number is out of its bounds.
    """
    memory, cpus = options.get("pbkdf-memory"), options.get("pbkdf-parallel")
    limit = graph.derivation_memory.limit
    bounds = luks2_kdf.MIN_MEMORY, luks2_kdf.MAX_MEMORY
    if memory is not None and not bounds[0] <= memory <= bounds[1]:
        raise Error(f"Parameter 'pbkdf-memory' expects a number from {bounds[0]} to {bounds[1]}")
    if memory is not None:
        graph.derivation_memory.check(memory)
    if cpus is not None and not 1 <= cpus <= luks2_kdf.MAX_CPUS:
        raise Error(f"Parameter 'pbkdf-parallel' expects a number from 1 to {luks2_kdf.MAX_CPUS}")
    milliseconds = options.get("iter-time", DEFAULT_ITER_TIME)
    return KdfChoice(milliseconds, options.get("pbkdf"), memory, cpus, limit)


#: What only LUKS2 can be made with, and what LUKS1 has.
_ONLY_VERSION_2: Final[Mapping[str, Any]] = {
    "pbkdf": "pbkdf2",
    "pbkdf-memory": None,
    "pbkdf-parallel": None,
    "sector-size": luks1.SECTOR,
    "label": None,
    "subsystem": None,
}


def _making_version_1(
    spec: CipherSpec, options: Mapping[str, Any], choice: KdfChoice, password: KeyBuffer, detached: bool
) -> Steps[tuple[LuksHeader, Plan]]:
    for name, usual in _ONLY_VERSION_2.items():
        if options.get(name, usual) != usual:
            raise Error(f"Parameter '{name}' needs 'version' 2")
    hash_name = options.get("hash-alg", "sha256")
    iterations = yield from luks1.iterations_for(hash_name, spec.key_bytes, choice.milliseconds)
    header, key, plan = yield from luks1.formatting(
        spec, hash_name, password.data, *iterations, detached=detached
    )
    key.wipe()
    sectors = header.pack().ljust(luks1_keyslots.HEADER_SECTORS_BYTES, b"\0")
    # The second copy of an older LUKS2 header would be taken for the volume's if this one got lost.
    places = [offset for offset in luks2_binary.SIZES if offset < header.header_length()]
    stale: Plan = [Write(offset, bytes(luks1.SECTOR)) for offset in places]
    return luks.Luks1(header, sectors), [*stale, Barrier(), *plan]


def _making_version_2(
    spec: CipherSpec, options: Mapping[str, Any], choice: KdfChoice, password: KeyBuffer, detached: bool
) -> Steps[tuple[LuksHeader, Plan]]:
    sector_size = options.get("sector-size", luks1.SECTOR)
    if sector_size not in (512, 1024, 2048, 4096):
        raise Error("Parameter 'sector-size' expects a power of two from 512 to 4096")
    hash_name = options.get("hash-alg", "sha256")
    costs = yield from luks.calibrating_version_2(choice, hash_name)
    digest_iterations = yield from kdf.calibrating(hash_name, luks2_keyslots.DIGEST_TIME, spec.key_bytes)
    header, key, plan = yield from luks2_keyslots.formatting(
        spec,
        hash_name,
        password.data,
        costs,
        digest_iterations,
        sector_size=sector_size,
        detached=detached,
        label=options.get("label", ""),
        subsystem=options.get("subsystem", ""),
    )
    key.wipe()
    return luks.Luks2(header), plan


def header_info(header: LuksHeader, segment: PayloadSegment, *, detached: bool) -> dict[str, Any]:
    """QCryptoBlockInfoLUKS.

    :param segment: the first of the payload, as it was when the header was unlocked.
    :param detached: what is said of that.
    """
    if isinstance(header, luks.Luks2):
        return _header_info_2(header, segment, detached)
    assert isinstance(header, luks.Luks1), "there are two versions"
    said = header.header
    return _cipher_info(segment.spec) | {
        "hash-alg": said.hash_name,
        "detached-header": detached,
        "payload-offset": said.payload_offset * luks1.SECTOR,
        "master-key-iters": said.digest_iterations,
        "uuid": said.uuid,
        "slots": [_slot_info(slot) for slot in said.slots],
    }


def _cipher_info(spec: CipherSpec) -> dict[str, Any]:
    info = {"cipher-alg": spec.algorithm, "cipher-mode": spec.mode, "ivgen-alg": spec.ivgen}
    return info | {"ivgen-hash-alg": spec.ivgen_hash} if spec.ivgen == "essiv" else info


def _slot_info(slot: luks1.Keyslot) -> dict[str, Any]:
    info: dict[str, Any] = {"active": slot.active, "key-offset": slot.key_offset * luks1.SECTOR}
    if slot.active:
        info |= {"iters": slot.iterations, "stripes": slot.stripes}
    return info


def _header_info_2(header: luks.Luks2, segment: PayloadSegment, detached: bool) -> dict[str, Any]:
    said = header.header
    info = _cipher_info(segment.spec) | {
        "version": 2,
        "hash-alg": said.volume_digest.hash_name,
        "detached-header": detached,
        "payload-offset": segment.offset,
        "sector-size": segment.sector_size,
        "master-key-iters": said.volume_digest.iterations,
        "uuid": shown(said.binary.uuid),
        "slots": [_slot_info_2(slot) for _, slot in sorted(said.keyslots.items())],
    }
    for name, text in (("label", said.binary.label), ("subsystem", said.binary.subsystem)):
        if text:
            info[name] = shown(text)
    return info | {"damaged": list(header.damaged)} if header.damaged else info


def _slot_info_2(slot: luks2.Keyslot) -> dict[str, Any]:
    info: dict[str, Any] = {
        "active": True,
        "slot": slot.number,
        "key-offset": slot.area.offset,
        "iters": slot.kdf.iterations,
        "stripes": slot.stripes,
        "pbkdf": slot.kdf.kind,
        "priority": slot.priority,
    }
    if slot.kdf.memory:
        info |= {"pbkdf-memory": slot.kdf.memory, "pbkdf-parallel": slot.kdf.cpus}
    return info


def shown(text: str) -> str:
    """Bytes of a header as text for a client, whatever they are."""
    return text.encode(errors="surrogateescape").decode("utf-8", "replace")
