"""Memory for key material: volume keys, derived keys, stripes, passphrases.

A :class:`KeyBuffer` is the only thing that key material is kept in.  It is a piece of a page that
nothing but key material lies on, and the page

* is locked, if the system lets us: it is never written to swap (mlock(2));
* is left out of core dumps (MADV_DONTDUMP);
* is empty in a forked child (MADV_WIPEONFORK): a lock is not inherited, and no child needs keys.

A buffer is overwritten by :meth:`KeyBuffer.wipe`, at the end of a ``with``, or at the latest when nobody
refers to it any more.  Only then is its piece given to another key, so that a view which somebody kept
shows zeroes, never somebody else's key.

How much may be locked is often little (RLIMIT_MEMLOCK: 64 KiB in older containers, 8 MiB by systemd's
default), and a page is what can be locked.  So a :class:`KeyMemory` cuts pages into pieces: 64 KiB hold
the keys of hundreds of disks.  Where the limit is reached, or locking is not allowed at all, everything
goes on without it, and :attr:`KeyBuffer.locked` says so.

What can't be done here: key material that Python, OpenSSL or the kernel copies elsewhere.  A result that
a library gives as `bytes` is overwritten by :func:`overwrite` when it has been copied.

Sources: mlock(2), madvise(2), getrlimit(2).
"""

from __future__ import annotations

import ctypes
import mmap
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Final, NoReturn, Self

Buffer = bytes | bytearray | memoryview

_PAGE: Final = mmap.PAGESIZE
#: Pieces begin at multiples of this many bytes: a volume key of the longest kind.
_UNIT: Final = 64
_UNITS: Final = _PAGE // _UNIT
#: What is longer, in bytes, has pages of its own.
_LONGEST_PIECE: Final = _PAGE // 2
#: <linux/mman.h>; Python's mmap does not name it.
_MADV_WIPEONFORK: Final = 18


class _Pages:
    """Some pages with nothing but key material on them.

    :ivar locked: whether they are.
    """

    def __init__(self, length: int) -> None:
        self._map = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for advice in (mmap.MADV_DONTDUMP, _MADV_WIPEONFORK):
            try:
                self._map.madvise(advice)
            except OSError:
                pass  # a kernel without it
        self.locked = _lock(self._map)
        #: A bit for each unit that is in use, the first one's the lowest.
        self._taken = 0
        #: Units that nobody uses any more.  They come whenever the garbage collector wants, maybe
        #: amid `take`, so they wait here.
        self._returned: deque[int] = deque()

    def in_use(self) -> bool:
        """Whether anything is on them."""
        while self._returned:
            self._taken &= ~self._returned.popleft()
        return self._taken != 0

    def take(self, length: int) -> KeyBuffer | None:
        """A piece, or None if there is no room for it."""
        units = max(1, -(-length // _UNIT))
        wanted = (1 << units) - 1
        for number in range(len(self._map) // _UNIT - units + 1):
            if not self._taken & wanted << number:
                self._taken |= wanted << number
                return self._piece(number, units, length)
        return None

    def _piece(self, number: int, units: int, length: int) -> KeyBuffer:
        start = number * _UNIT
        # What every view of the piece refers to; when it goes, so has the last of them.
        piece = (ctypes.c_ubyte * (units * _UNIT)).from_buffer(self._map, start)
        give_back = weakref.finalize(piece, self._give_back, start, units)
        give_back.atexit = False
        return KeyBuffer(memoryview(piece).cast("B")[:length], self.locked)

    def _give_back(self, start: int, units: int) -> None:
        self._map[start : start + units * _UNIT] = bytes(units * _UNIT)
        self._returned.append(((1 << units) - 1) << start // _UNIT)


class KeyMemory:
    """Pages from which keys get pieces.  May be used by several threads."""

    def __init__(self) -> None:
        self._pages: list[_Pages] = []
        self._guard = threading.Lock()

    def take(self, length: int) -> KeyBuffer:
        """A buffer of `length` bytes, which are zeroes."""
        if length > _LONGEST_PIECE:
            return _in_new_pages(_Pages(-(-length // _PAGE) * _PAGE), length)
        with self._guard:
            # What is empty goes back to the system, which may then let another page be locked.
            self._pages = [pages for pages in self._pages if pages.in_use()]
            for pages in self._pages:
                if (buffer := pages.take(length)) is not None:
                    return buffer
            made = _Pages(_PAGE)
            # Locked ones are filled first.
            self._pages.insert(0 if made.locked else len(self._pages), made)
            return _in_new_pages(made, length)

    def copy_of(self, data: Buffer) -> KeyBuffer:
        """A buffer with the same bytes as `data`, which is left as it is."""
        buffer = self.take(len(data))
        buffer.data[:] = data
        return buffer


def _in_new_pages(pages: _Pages, length: int) -> KeyBuffer:
    buffer = pages.take(length)
    assert buffer is not None, "new pages have room"
    return buffer


class KeyBuffer:
    """Key material, and the duty to wipe it: a context manager that wipes on the way out.

    Neither copied nor pickled, and no text shows what is in it.  :meth:`KeyMemory.take` makes them.

    :ivar locked: whether it is locked in memory.
    """

    __slots__ = ("_data", "locked")

    def __init__(self, data: memoryview, locked: bool) -> None:
        self._data = data
        self.locked = locked

    @property
    def data(self) -> memoryview:
        """The bytes, to be read or written; not to be kept: they become zeroes."""
        return self._data

    def __len__(self) -> int:
        return len(self._data)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {len(self._data)} bytes>"

    def shorten(self, length: int) -> None:
        """Leave the first `length` bytes, and wipe the others."""
        self._data[length:] = bytes(len(self._data) - length)
        self._data = self._data[:length]

    def wipe(self) -> None:
        """Overwrite the bytes with zeroes.  May be called again."""
        self._data[:] = bytes(len(self._data))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.wipe()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        # What copy and pickle ask.
        raise TypeError("key material is neither copied nor pickled")


@contextmanager
def wiped_on_failure(buffer: KeyBuffer) -> Iterator[None]:
    """Wipe `buffer` if what is done in this ``with`` fails or is stopped."""
    try:
        yield
    except BaseException:
        buffer.wipe()
        raise


def random_key(length: int, random: Callable[[int], bytes]) -> KeyBuffer:
    """A new key of `length` bytes in a page of its own.

    :param random: gives as many random bytes as it is asked for; they are overwritten.
    """
    key = KeyMemory().take(length)
    drawn = random(length)
    key.data[:] = drawn
    overwrite(drawn)
    return key


def overwrite(result: bytes) -> None:
    """Overwrite bytes that a library has just returned, when they have been copied.

    Python's `bytes` never change, so this is for those alone which nobody else refers to and which are
    no constant: what a hash, a decoder or the system's random numbers gave.
    """
    # CPython has one object for each byte, and one for no bytes at all.
    if len(result) > 1:
        ctypes.memset(ctypes.c_char_p(result), 0, len(result))


def _lock(memory: mmap.mmap) -> bool:
    """Keep memory out of swap; whether that is allowed."""
    try:
        mlock: Any = ctypes.CDLL(None).mlock
    except (AttributeError, OSError):
        return False
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    locked: bool = mlock(ctypes.c_void_p(address), ctypes.c_size_t(len(memory))) == 0
    return locked
