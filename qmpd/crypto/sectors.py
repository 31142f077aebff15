"""Encrypt and decrypt many sectors with a few calls.

A cipher object for each 512-byte sector costs twenty times what its AES does.
So the modes are put together here from AES in ECB, over tiles of many
sectors, and numpy does what lies between:

XTS (IEEE 1619-2018, section 5.3).  One ECB call turns the IVs of all sectors
into their first tweaks.  The tweak of block j is the first one times x^j in
GF(2^128), which for j < 57 is a shift by j bits whose overflow is folded back
by x^128 = x^7 + x^2 + x + 1; so 32 tweaks in a row come out of a dozen array
operations, whatever the number of rows.  A sector of 512 bytes is one such
row, a larger one several: their first tweaks are the sector's times x^32, x^64
and so on, which moves its words of 32 bits and folds back the words that come
out at the top.  That is done for many rows before the tweaks of any are made.

CBC.  Decryption is ECB and an XOR with the ciphertext moved by one block.
Encryption is a chain in each sector, but the sectors are independent: step k
of all sectors is one ECB call.  When there are few sectors, one CBC context
runs through all of them, and the first block of each is XORed with what makes
the running chain equal to that sector's IV.

Scratch memory is a few tiles for each request under way, whatever its size,
and is kept for the next one: making it anew takes longer than a small request.
It holds plaintext, so it is overwritten when the cipher is closed.

A call costs as much for one sector as for twenty.  So requests that come
together can be served together: the sectors in a buffer need not follow each
other on the volume.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from numpy.typing import NDArray

from qmpd.crypto import digests
from qmpd.crypto.ciphers import CipherSpec
from qmpd.crypto.memory import Buffer, KeyBuffer, KeyMemory

#: What LUKS1 counts in, in bytes; the numbers of sectors in this module count it too.
SECTOR: Final = 512

_BLOCK: Final = 16
_ZERO_IV: Final = bytes(_BLOCK)
#: Bytes worked on at once: for CBC enough sectors to make a step worth its call, and for XTS
#: enough of them to find their rows' first tweaks with few calls.
_TILE: Final = 256 << 10
#: What XTS then does at once: so little that all of it stays in the processor's second-level cache.
_XTS_PIECE: Final = 64 << 10
#: Scratch memory is kept for the next request of as many sectors, for this many sectors in all.
_KEPT_SECTORS: Final = 2048
#: Tweaks made by one multiplication: the blocks of a 512-byte sector.
_RUN: Final = SECTOR // _BLOCK
#: `cryptography` wants this many bytes more than it writes.
_SLACK: Final = _BLOCK
#: Up to this many sectors' rows begin with what Python's own numbers say, which is quicker for a few.
_FEW: Final = 2
#: From this many sectors on for every 16 bytes of one, CBC encryption goes across them: that has a step
#: for each block, whose calls have to be worth it.
_ACROSS: Final = 1.5

_WORD: Final = np.dtype("<u8")
Words = NDArray[np.uint64]

_ONE: Final = np.uint64(1)
_TWO: Final = np.uint64(2)
_SEVEN: Final = np.uint64(7)
_HALF: Final = np.uint64(32)
#: The exponents of x^128 = x^7 + x^2 + x + 1, and those of its square.
_FOLDS: Final = ((0, 1, 2, 7), (0, 2, 4, 14))


def _frozen(array: Words) -> Words:
    array.flags.writeable = False
    return array


_SHIFTS: Final = _frozen(np.arange(_RUN, dtype=_WORD))
#: An array is moved right by 64 - j as by 1 and then by 63 - j, because a shift by 64 is undefined.
_BACK_SHIFTS: Final = _frozen(np.arange(63, 63 - _RUN, -1).astype(_WORD))


class _Contexts:
    """AES contexts for one request at a time, and the running CBC chain.

    OpenSSL keeps keys in them, and overwrites those when they go: so nothing may refer to them in a
    circle, which would keep them until the garbage collector comes by.
    """

    __slots__ = ("cbc", "chain", "decrypt", "encrypt", "essiv", "tweak")

    def __init__(
        self, data_key: memoryview, tweak_key: memoryview | None, essiv_key: memoryview | None
    ) -> None:
        def ecb(key: memoryview) -> Cipher[modes.ECB]:
            return Cipher(algorithms.AES(key), modes.ECB())

        data = ecb(data_key)
        self.encrypt: CipherContext = data.encryptor()
        self.decrypt: CipherContext = data.decryptor()
        self.tweak: CipherContext | None = None
        self.cbc: CipherContext | None = None
        if tweak_key is not None:
            self.tweak = ecb(tweak_key).encryptor()
        else:
            cbc = Cipher(algorithms.AES(data_key), modes.CBC(_ZERO_IV))
            self.cbc = cbc.encryptor()
        #: The last ciphertext block that left `cbc`, as a number.
        self.chain = 0
        self.essiv: CipherContext | None = None if essiv_key is None else ecb(essiv_key).encryptor()


class _Worker:
    """What one request at a time needs: contexts, and scratch memory."""

    __slots__ = ("contexts", "kept", "tiles")

    def __init__(self, contexts: _Contexts) -> None:
        self.contexts = contexts
        #: Tiles by their numbers of sectors, and the sum of these numbers.
        self.tiles: dict[int, _Tile] = {}
        self.kept = 0

    def wipe(self) -> None:
        """Overwrite what is in scratch memory."""
        for tile in self.tiles.values():
            tile.wipe()


class SectorCipher:
    """A volume's cipher, for any number of whole sectors at a time, from any number of threads.

    :param spec: algorithm, mode and IV rule.
    :param key: the volume key, ``spec.key_bytes`` long; copied, and the copy wiped by :meth:`close`.
    :param sector_size: bytes that one IV serves: 512 (LUKS1), or a larger power of two up to 4096.
    :param iv_unit: bytes that the IV's number counts: 512, as dm-crypt does it
        whatever the sector's size, or `sector_size` (dm-crypt's "iv_large_sectors").
    :param memory: where the copy is to be; by default in a page of its own.
    :param secret_data: what is ciphered are keys: no memory that is not kept for the next request
        holds any of it either.
    :raise ValueError: a length that does not fit.
    """

    def __init__(
        self,
        spec: CipherSpec,
        key: Buffer,
        sector_size: int = SECTOR,
        *,
        iv_unit: int = SECTOR,
        memory: KeyMemory | None = None,
        secret_data: bool = False,
    ) -> None:
        if len(key) != spec.key_bytes:
            raise ValueError(
                f"{spec.algorithm} in {spec.mode} takes a key of {spec.key_bytes} bytes, not {len(key)}"
            )
        if sector_size not in (512, 1024, 2048, 4096):
            raise ValueError(f"sector size {sector_size} is not a power of two from 512 to 4096")
        if iv_unit not in (SECTOR, sector_size):
            raise ValueError(f"the IV counts sectors of 512 or {sector_size} bytes, not of {iv_unit}")
        self.spec = spec
        self.sector_size = sector_size
        self._iv_divisor = iv_unit // SECTOR
        self._iv_step = sector_size // iv_unit
        self._iv_mask = np.uint64(0xFFFFFFFF) if spec.ivgen == "plain" else None
        self._memory = memory or KeyMemory()
        self._key = self._memory.copy_of(key)
        self._secret_data = secret_data
        self._essiv_key: KeyBuffer | None = None
        if spec.ivgen == "essiv" and spec.ivgen_hash:
            # ESSIV keys its cipher with the hash of the volume key, in XTS of both halves.
            self._essiv_key = self._memory.take(digests.algorithm(spec.ivgen_hash).digest_size)
            digests.digest_into(spec.ivgen_hash, key, self._essiv_key.data)
        # A context must not be used by two threads at once, so a request takes a worker out and puts
        # it back; list.append and list.pop are atomic.
        self._idle: list[_Worker] = []
        self._closed = threading.Event()

    def __repr__(self) -> str:
        return f"<SectorCipher {self.spec.algorithm} {self.spec.header_names()[1]}>"

    def encrypt(self, data: Buffer, first_sector: int) -> memoryview:
        """Return the ciphertext of `data`.

        :param data: whole sectors.
        :param first_sector: where they are in the volume, in units of 512 bytes.
        :raise ValueError: not whole sectors, or the cipher was closed.
        """
        into = np.empty(len(data), np.uint8).data
        self.encrypt_into(data, first_sector, into)
        return into

    def decrypt(self, data: Buffer, first_sector: int) -> memoryview:
        """Return the plaintext of `data`; parameters and errors as of :meth:`encrypt`."""
        into = np.empty(len(data), np.uint8).data
        self.decrypt_into(data, first_sector, into)
        return into

    def encrypt_into(self, data: Buffer, first_sector: int, into: bytearray | memoryview) -> None:
        """Write the ciphertext of `data` to `into`: of the same length, and possibly the same memory."""
        self._run(data, self._first_number(len(data), first_sector), into, encrypting=True)

    def decrypt_into(self, data: Buffer, first_sector: int, into: bytearray | memoryview) -> None:
        """Write the plaintext of `data` to `into`: of the same length, and possibly the same memory."""
        self._run(data, self._first_number(len(data), first_sector), into, encrypting=False)

    def encrypt_runs(
        self, data: Buffer, runs: Sequence[tuple[int, int]], into: bytearray | memoryview
    ) -> None:
        """Write to `into` the ciphertext of runs of sectors that stand one after the other in `data`.

        :param data: whole sectors.
        :param runs: for each run, where it is in the volume, in units of 512 bytes; and its
            length in bytes.  Together they are as long as `data`.
        :param into: as of :meth:`encrypt_into`.
        :raise ValueError: as for :meth:`encrypt`.
        """
        self._run(data, self._numbers(runs), into, encrypting=True)

    def decrypt_runs(
        self, data: Buffer, runs: Sequence[tuple[int, int]], into: bytearray | memoryview
    ) -> None:
        """Write to `into` the plaintext of runs of sectors, as :meth:`encrypt_runs` the ciphertext."""
        self._run(data, self._numbers(runs), into, encrypting=False)

    @property
    def iv_unit(self) -> int:
        """Bytes that the IV's number counts."""
        return self._iv_divisor * SECTOR

    @property
    def locked(self) -> bool:
        """Whether the volume key is locked in memory."""
        return self._key.locked

    def copy_key(self) -> KeyBuffer:
        """A copy of the volume key, for the caller to wipe.

        :raise ValueError: if the cipher was closed.
        """
        if self._closed.is_set():
            raise ValueError("the cipher is closed")
        return self._memory.copy_of(self._key.data)

    def close(self) -> None:
        """Wipe the key, and what is in scratch memory; requests from now on fail.  May be called again."""
        self._closed.set()
        self._wipe_idle()
        self._key.wipe()
        if self._essiv_key is not None:
            self._essiv_key.wipe()

    def _wipe_idle(self) -> None:
        while self._idle:
            self._idle.pop().wipe()

    def _worker(self) -> _Worker:
        if self._closed.is_set():
            raise ValueError("the cipher is closed")
        try:
            return self._idle.pop()
        except IndexError:
            pass
        key = self._key.data
        essiv_key = None if self._essiv_key is None else self._essiv_key.data
        if self.spec.mode == "xts":
            half = len(key) // 2
            contexts = _Contexts(key[:half], key[half:], essiv_key)
        else:
            contexts = _Contexts(key, None, essiv_key)
        return _Worker(contexts)

    def _first_number(self, length: int, first_sector: int) -> int:
        """The number of the first IV."""
        if length % self.sector_size or first_sector % (self.sector_size // SECTOR):
            raise ValueError(
                f"{length} bytes at sector {first_sector} are not whole sectors of {self.sector_size} bytes"
            )
        return first_sector // self._iv_divisor

    def _numbers(self, runs: Sequence[tuple[int, int]]) -> Words:
        """The number of every IV."""
        length = runs[0][1]
        if all(run[1] == length for run in runs):
            firsts = np.array([self._first_number(length, first) for first, _ in runs], _WORD)
            return (firsts[:, None] + self._steps(length)).reshape(-1)
        return np.concatenate([self._first_number(size, first) + self._steps(size) for first, size in runs])

    def _steps(self, length: int) -> Words:
        return np.arange(0, length // self.sector_size * self._iv_step, self._iv_step, dtype=_WORD)

    def _run(
        self, data: Buffer, numbers: int | Words, into: bytearray | memoryview, *, encrypting: bool
    ) -> None:
        """Work tile by tile.

        :param numbers: the first IV's number, or those of all.
        """
        length = len(data)
        if len(into) != length:
            raise ValueError(f"{length} bytes of data for a buffer of {len(into)}")
        if not isinstance(numbers, int) and numbers.size * self.sector_size != length:
            raise ValueError(f"{numbers.size} sectors of {self.sector_size} bytes for {length} bytes of data")
        if not length:
            return
        source = np.frombuffer(data, _WORD)
        target = np.frombuffer(into, _WORD)
        worker = self._worker()
        words_in_sector = self.sector_size // 8
        stop = 0
        while stop < source.size:
            start, stop = stop, stop + self._words_in_tile(source.size - stop)
            first, end = start // words_in_sector, stop // words_in_sector
            tile = worker.tiles.get(end - first) or self._make_tile(worker, end - first)
            if isinstance(numbers, int):
                tile.number_from(numbers + first * self._iv_step)
            else:
                tile.number(numbers[first:end])
            run = tile.encrypt if encrypting else tile.decrypt
            run(source[start:stop].reshape(tile.shape), target[start:stop].reshape(tile.shape))
        self._idle.append(worker)
        if self._closed.is_set():
            self._wipe_idle()

    def _words_in_tile(self, left: int) -> int:
        """How much of what is left is worked on at once: of XTS whole pieces, and then the rest."""
        size = min(left, _TILE // 8)
        piece = _XTS_PIECE // 8
        return size - size % piece if self.spec.mode == "xts" and size > piece else size

    def _make_tile(self, worker: _Worker, sectors: int) -> _Tile:
        if worker.kept + sectors > _KEPT_SECTORS:
            worker.tiles.clear()
            worker.kept = 0
        kind = _XtsTile if self.spec.mode == "xts" else _CbcTile
        blocks = self.sector_size // _BLOCK
        tile = kind(worker.contexts, sectors, blocks, self._iv_step, self._iv_mask, self._secret_data)
        worker.tiles[sectors] = tile
        worker.kept += sectors
        return tile


def _bytes(array: Words) -> Any:
    """Return the memory of an array as `cryptography` takes it."""
    return array.data.cast("B")


def _times_x32(tweak: int) -> int:
    """Return a tweak times x^32."""
    over = tweak >> 96
    return (tweak << 32) & _BLOCK_MASK ^ over ^ over << 1 ^ over << 2 ^ over << 7


_BLOCK_MASK: Final = (1 << 8 * _BLOCK) - 1


class _RowStarts:
    """The first tweaks of the rows of sectors that have several.

    A tweak is four words w0 ... w3 of 32 bits, its digits in powers of X = x^32.  Times X they all move
    up by one, and the one at the top comes back in at the bottom times c = x^128 = X^4.  So the digits
    of a sector's tweak times X^r, from the top down, are a window that begins at r in

        w3 w2 w1 w0 cw3 cw2 cw1 cw0 c²w3 c²w2 c²w1

    What of a digit has more than 32 bits belongs to the next one, and what of the one at the top has
    more comes back in once more.

    :param sectors: how many there are; `rows` of each.
    """

    def __init__(self, sectors: int, rows: int) -> None:
        self._rows = rows
        self._sectors = sectors
        #: The digits above for each sector, with c²w0 behind, which is never in a window.
        self._digits = np.empty((12, sectors), _WORD)
        self._products = self._digits[4:].reshape(2, 4, sectors)
        self._left = np.empty_like(self._digits)
        self._right = np.empty_like(self._digits)
        self._terms = np.empty((4, 2, 4, sectors), _WORD)
        # As large as what is shifted: numpy is fastest where nothing has to be spread meanwhile.
        shifts = np.array(_FOLDS, _WORD).T[:, :, None, None]
        self._shifts = np.ascontiguousarray(np.broadcast_to(shifts, self._terms.shape))
        self._over = np.empty((4, 4, sectors), _WORD)
        self._over_shifts = np.ascontiguousarray(self._shifts[:, 0])
        #: Both halves of the tweaks that are found.
        self._halves = np.empty((2, rows, sectors), _WORD)

    def find(self, firsts: Words) -> Words:
        """Return the first tweaks of all rows from those of the sectors.

        :param firsts: (sectors, 2).
        :return: the low halves and the high ones: (2, sectors, rows).
        """
        if self._sectors <= _FEW:
            self._find_each(firsts)
        else:
            self._find_all(firsts)
        return self._halves.transpose(0, 2, 1)

    def _find_each(self, firsts: Words) -> None:
        starts = bytearray()
        for sector in range(self._sectors):
            tweak = int.from_bytes(firsts[sector].tobytes(), "little")
            for _ in range(self._rows):
                starts += tweak.to_bytes(_BLOCK, "little")
                tweak = _times_x32(tweak)
        found = np.frombuffer(starts, _WORD).reshape(self._sectors, self._rows, 2)
        self._halves[...] = found.transpose(2, 1, 0)

    def _find_all(self, firsts: Words) -> None:
        digits, left, right, rows = self._digits, self._left, self._right, self._rows
        digits[:4] = firsts.view("<u4").T[::-1]
        terms = self._terms
        terms[...] = digits[:4]
        np.left_shift(terms, self._shifts, out=terms)
        _sum_into(terms, self._products)
        np.left_shift(digits, _HALF, out=left)
        np.right_shift(digits, _HALF, out=right)
        # Windows of each of the four digits.
        low, high = self._halves
        np.bitwise_xor(digits[3 : 3 + rows], left[2 : 2 + rows], out=low)
        np.bitwise_xor(digits[1 : 1 + rows], left[:rows], out=high)
        np.bitwise_xor(high, right[2 : 2 + rows], out=high)
        if rows > 4:
            over = self._over
            over[...] = right[4:8]
            np.left_shift(over, self._over_shifts, out=over)
            _sum_into(over, right[4:8])
            np.bitwise_xor(low[4:], right[4:8], out=low[4:])


def _sum_into(terms: Words, into: Words) -> None:
    """Add four terms in GF(2); they are overwritten."""
    np.bitwise_xor(terms[:2], terms[2:], out=terms[:2])
    np.bitwise_xor(terms[0], terms[1], out=into)


class _Tile:
    """Sectors worked on at once: their IVs, and the scratch memory for it.

    Arrays of sectors are (sectors, blocks of 16 bytes, 2 words).

    :param iv_step: by how much the IVs' numbers grow from sector to sector.
    :param iv_mask: the bits of the number that the IV rule keeps.
    :param secret_data: memory that is needed once only is overwritten.
    """

    def __init__(
        self,
        contexts: _Contexts,
        sectors: int,
        blocks: int,
        iv_step: int,
        iv_mask: np.uint64 | None,
        secret_data: bool,
    ) -> None:
        self.sectors = sectors
        self.shape = (sectors, blocks, 2)
        self._contexts = contexts
        self._mask = iv_mask
        self._secret_data = secret_data
        self._steps = np.arange(0, sectors * iv_step, iv_step, dtype=_WORD)
        self._ivs = np.zeros((sectors, 2), _WORD)
        self._numbers = self._ivs[:, 0]
        self._iv_bytes = _bytes(self._ivs)
        if contexts.essiv is not None:
            self._essiv_ivs, self._essiv_space = self._cipher_space((sectors, 2))

    def number_from(self, first: int) -> None:
        """The sectors' IVs are those of `first` and of what follows it on the volume."""
        np.add(self._steps, np.uint64(first), out=self._numbers)

    def number(self, numbers: Words) -> None:
        """The sectors' IVs are those of `numbers`."""
        self._numbers[:] = numbers

    def encrypt(self, source: Words, target: Words) -> None:
        """Write the ciphertext of `source` to `target`."""
        raise NotImplementedError

    def decrypt(self, source: Words, target: Words) -> None:
        """Write the plaintext of `source` to `target`."""
        raise NotImplementedError

    def wipe(self) -> None:
        """Overwrite what is left of the data in scratch memory."""

    @staticmethod
    def _cipher_space(shape: tuple[int, ...]) -> tuple[Words, Any]:
        """Return an array for ECB's result, and the same memory as `cryptography` wants it."""
        size = math.prod(shape)
        space = np.empty(size + _SLACK // 8, _WORD)
        return space[:size].reshape(shape), _bytes(space)

    def _make_ivs(self) -> tuple[Words, Any]:
        """Return the IVs, and the same as bytes."""
        if self._mask is not None:
            self._numbers &= self._mask
        essiv = self._contexts.essiv
        if essiv is None:
            return self._ivs, self._iv_bytes
        essiv.update_into(self._iv_bytes, self._essiv_space)
        return self._essiv_ivs, self._essiv_space[: self._ivs.nbytes]


class _XtsTile(_Tile):
    def __init__(
        self,
        contexts: _Contexts,
        sectors: int,
        blocks: int,
        iv_step: int,
        iv_mask: np.uint64 | None,
        secret_data: bool,
    ) -> None:
        super().__init__(contexts, sectors, blocks, iv_step, iv_mask, secret_data)
        self._first, self._first_space = self._cipher_space((sectors, 2))
        rows = blocks // _RUN
        self._row_starts = _RowStarts(sectors, rows) if rows > 1 else None
        # What follows is for a piece.
        runs = min(sectors * rows, _XTS_PIECE // SECTOR)
        self._sectors_in_piece = runs // rows
        self._forward = np.empty((2, runs, _RUN), _WORD)
        self._back = np.empty((2, runs, _RUN), _WORD)
        self._shifts = np.ascontiguousarray(np.broadcast_to(_SHIFTS, self._forward.shape))
        self._back_shifts = np.ascontiguousarray(np.broadcast_to(_BACK_SHIFTS, self._back.shape))
        in_rows = (2, runs // rows, rows, _RUN)
        self._forward_rows, self._back_rows = self._forward.reshape(in_rows), self._back.reshape(in_rows)
        self._shifted = np.empty((runs, _RUN), _WORD)
        powers = np.empty((runs, _RUN, 2), _WORD)
        self._low_powers, self._high_powers = powers[:, :, 0], powers[:, :, 1]
        piece = (runs // rows, blocks, 2)
        self._tweaks = powers.reshape(piece)
        self._masked = np.empty(piece, _WORD)
        self._masked_bytes = _bytes(self._masked)
        self._result, self._result_space = self._cipher_space(piece)

    def encrypt(self, source: Words, target: Words) -> None:
        self._run(self._contexts.encrypt, source, target)

    def decrypt(self, source: Words, target: Words) -> None:
        self._run(self._contexts.decrypt, source, target)

    def wipe(self) -> None:
        self._masked.fill(0)
        self._result.fill(0)

    def _run(self, aes: CipherContext, source: Words, target: Words) -> None:
        tweak = self._contexts.tweak
        assert tweak is not None
        tweak.update_into(self._make_ivs()[1], self._first_space)
        rows = self._row_starts
        halves = self._first.T[:, :, None] if rows is None else rows.find(self._first)
        step = self._sectors_in_piece
        if step == self.sectors:
            self._run_piece(aes, halves, source, target)
            return
        for start in range(0, self.sectors, step):
            piece = slice(start, start + step)
            self._run_piece(aes, halves[:, piece], source[piece], target[piece])

    def _run_piece(self, aes: CipherContext, halves: Words, source: Words, target: Words) -> None:
        self._make_tweaks(halves)
        np.bitwise_xor(source, self._tweaks, out=self._masked)
        aes.update_into(self._masked_bytes, self._result_space)
        np.bitwise_xor(self._result, self._tweaks, out=target)

    def _make_tweaks(self, halves: Words) -> None:
        """Fill ``self._tweaks``.

        :param halves: of the first tweak of each row: (2, sectors, rows).
        """
        # Both halves of every tweak, moved left by 0 ... 31; and the other half moved right,
        # which is what comes over from the low half, or out at the top of the high half.
        # Spread first and shifted in place: numpy is fastest where everything is contiguous.
        np.copyto(self._forward_rows, halves[..., None])
        np.left_shift(self._forward, self._shifts, out=self._forward)
        np.copyto(self._back_rows, (halves[::-1] >> _ONE)[..., None])
        np.right_shift(self._back, self._back_shifts, out=self._back)
        low, high = self._forward
        over, carry = self._back
        np.bitwise_or(high, carry, out=self._high_powers)
        shifted = self._shifted
        np.bitwise_xor(low, over, out=low)
        np.left_shift(over, _ONE, out=shifted)
        np.bitwise_xor(low, shifted, out=low)
        np.left_shift(over, _TWO, out=shifted)
        np.bitwise_xor(low, shifted, out=low)
        np.left_shift(over, _SEVEN, out=shifted)
        np.bitwise_xor(low, shifted, out=self._low_powers)


class _CbcTile(_Tile):
    def decrypt(self, source: Words, target: Words) -> None:
        plain, space = self._cipher_space(self.shape)
        self._contexts.decrypt.update_into(_bytes(source), space)
        # All blocks are XORed with the one before, in one go: what is not contiguous numpy copies, piece
        # by piece, into memory that nobody overwrites.  So a sector's first block, which gets the IV
        # instead, is XORed with the one before twice.
        plain[:, 0] ^= self._make_ivs()[0]
        plain[1:, 0] ^= source[:-1, -1]
        chained = plain.reshape(-1)[2:]
        np.bitwise_xor(chained, source.reshape(-1)[:-2], out=chained)
        target[...] = plain
        if self._secret_data:
            plain.fill(0)

    def encrypt(self, source: Words, target: Words) -> None:
        if self.sectors < _ACROSS * self.shape[1]:
            self._encrypt_along(source, target)
        else:
            self._encrypt_across(source, target)

    def _encrypt_across(self, source: Words, target: Words) -> None:
        """Step k of all sectors is one ECB call."""
        sectors, blocks, _ = self.shape
        steps = source.transpose(1, 0, 2).copy()
        results, space = self._cipher_space((blocks, sectors, 2))
        step_bytes = _bytes(steps)
        row = sectors * _BLOCK
        chain = self._make_ivs()[0]
        update_into = self._contexts.encrypt.update_into
        for step in range(blocks):
            np.bitwise_xor(steps[step], chain, out=steps[step])
            start = step * row
            # The slack after a step is the beginning of the next one.
            update_into(step_bytes[start : start + row], space[start : start + row + _SLACK])
            chain = results[step]
        target[...] = results.transpose(1, 0, 2)
        if self._secret_data:
            steps.fill(0)

    def _encrypt_along(self, source: Words, target: Words) -> None:
        """One CBC context runs through all the sectors."""
        context = self._contexts.cbc
        assert context is not None
        size = source.nbytes // self.sectors
        number = int.from_bytes
        ivs = self._make_ivs()[1]
        data: Any = memoryview(bytearray(_bytes(source)))
        results, space = self._cipher_space(self.shape)
        chain = self._contexts.chain
        for sector in range(self.sectors):
            start = sector * size
            end = start + size
            iv = number(ivs[sector * _BLOCK : (sector + 1) * _BLOCK], "little")
            mixed = number(data[start : start + _BLOCK], "little") ^ iv ^ chain
            data[start : start + _BLOCK] = mixed.to_bytes(_BLOCK, "little")
            context.update_into(data[start:end], space[start : end + _SLACK])
            chain = number(space[end - _BLOCK : end], "little")
        self._contexts.chain = chain
        target[...] = results
        if self._secret_data:
            data[:] = bytes(len(data))
