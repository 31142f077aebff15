"""Processes that cipher long requests, so that more than one processor works for the data path.

Threads would be no use: a tile of sectors is some twenty calls of a few
microseconds, and between any two of them the threads would fight for the
interpreter's lock.  A process (:mod:`qmpd.block.cipher_process`) has none of
that, and it knows neither files nor the graph: it is given bytes in memory that
both see, and a key.

Whoever has something to cipher takes a :class:`Lease` on a slot of that memory,
reads or copies the data into it, and has it ciphered there.  The slot is free
again when nobody holds the lease's data any more; for a read that is when the
client's socket has taken it.  When no slot is free, or no process is there yet
or any more, the caller does it itself: nobody ever waits for a slot, so a
client that does not take its replies holds up nobody else.

The processes are started when there is something for them, and end with the
daemon.  Each has the keys of the ciphers that it was used with, until the node
is closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import mmap
import os
import socket
import subprocess
import sys
import weakref
from functools import partial
from typing import TYPE_CHECKING, Final

from qmpd.block.cipher_messages import (
    ADD,
    DECRYPT,
    ENCRYPT,
    FORGET,
    NO_SLOT,
    REPLY,
    REQUEST,
    SLOT,
    describe_cipher,
)

if TYPE_CHECKING:
    from qmpd.crypto.sectors import SectorCipher

_logger = logging.getLogger(__name__)

#: Slots for each process: what is under way there, and what clients have not taken yet.
_SLOTS: Final = 8
#: Seconds that a process has for ending by itself.
_PATIENCE: Final = 5.0


class Lease:
    """The use of one slot.

    :ivar data: its memory; holding on to it holds the slot.
    """

    def __init__(self, pool: CipherPool, number: int, data: memoryview) -> None:
        self._pool = pool
        self._number = number
        self.data = data

    async def encrypt(self, cipher: SectorCipher, first_sector: int) -> bool:
        """Encrypt `data` in place.

        :param first_sector: where it is in the volume, in units of 512 bytes.
        :returns: whether it was done; if not, `data` holds anything.
        """
        return await self._pool.run(ENCRYPT, cipher, self._number, self.data, first_sector)

    async def decrypt(self, cipher: SectorCipher, first_sector: int) -> bool:
        """Decrypt `data` in place; parameters and result as of `encrypt`."""
        return await self._pool.run(DECRYPT, cipher, self._number, self.data, first_sector)


class _Process:
    """One process, its socket, and what it is doing."""

    def __init__(self, process: subprocess.Popen[bytes], connection: socket.socket) -> None:
        self.process = process
        self.connection = connection
        self.ciphers: set[int] = set()
        #: By slots: who waits, and the memory, which has to last until the process is done with it.
        self.pending: dict[int, tuple[asyncio.Future[bool], memoryview]] = {}


class CipherPool:
    """All of these processes of one daemon.

    :param processes: how many there are to be, at least 1.
    """

    def __init__(self, processes: int) -> None:
        self._wanted = processes
        self._started = False
        self._starting: asyncio.Task[None] | None = None
        self._processes: list[_Process] = []
        #: Those that have said that they can begin.
        self._ready: list[_Process] = []
        #: The numbers of the slots that nobody uses.
        self._free = list(range(processes * _SLOTS))
        self._memory_descriptor = -1
        self._memory = memoryview(b"")
        self._numbers: weakref.WeakKeyDictionary[SectorCipher, int] = weakref.WeakKeyDictionary()
        self._last_number = 0

    # -- its use

    @property
    def has_room(self) -> bool:
        """Whether a lease may be had, or the processes are still to be started."""
        return bool(self._free and self._ready) or not self._started

    def lease(self, length: int) -> Lease | None:
        """The use of a slot, or None if there is none.

        :param length: in bytes; one that is longer than a slot gets none.
        """
        if not self._started:
            self._started = True
            self._starting = asyncio.get_running_loop().create_task(self._start())
        if not self._free or not self._ready or length > SLOT:
            return None
        # Who has something to cipher has imported numpy by now; not every daemon has.
        from qmpd.block.buffers import lend

        number = self._free.pop()
        start = number * SLOT
        data = lend(self._memory[start : start + length], partial(self._free.append, number))
        return Lease(self, number, data)

    async def run(
        self, kind: int, cipher: SectorCipher, slot: int, data: memoryview, first_sector: int
    ) -> bool:
        """Have a slot ciphered; see :class:`Lease`."""
        if not self._ready:
            return False
        process = min(self._ready, key=lambda process: len(process.pending))
        number = self._numbers.get(cipher)
        if number is None:
            number = self._last_number = self._last_number + 1
            self._numbers[cipher] = number
        done: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        try:
            if number not in process.ciphers:
                process.ciphers.add(number)
                added = REQUEST.pack(ADD, number, 0, 0, 0)
                with cipher.copy_key() as key:
                    process.connection.sendmsg([added, describe_cipher(cipher), key.data])
            process.connection.send(REQUEST.pack(kind, number, slot, first_sector, len(data)))
        except OSError as error:
            self._lose(process, error)
            return False
        process.pending[slot] = (done, data)
        return await done

    def forget(self, cipher: SectorCipher) -> None:
        """Have the key wiped wherever it was sent.  Nothing may be under way with it."""
        number = self._numbers.pop(cipher, None)
        if number is None:
            return
        for process in list(self._processes):
            if number in process.ciphers:
                process.ciphers.remove(number)
                try:
                    process.connection.send(REQUEST.pack(FORGET, number, 0, 0, 0))
                except OSError as error:
                    self._lose(process, error)

    # -- the processes' life

    async def _start(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            self._memory_descriptor = os.memfd_create("qmpd-cipher", os.MFD_CLOEXEC)
            os.ftruncate(self._memory_descriptor, len(self._free) * SLOT)
            self._memory = memoryview(mmap.mmap(self._memory_descriptor, 0))
            for _ in range(self._wanted):
                process = await loop.run_in_executor(None, _begin, self._memory_descriptor)
                self._processes.append(process)
                loop.add_reader(process.connection.fileno(), self._receive, process)
        except OSError as error:
            _logger.warning("no processes for ciphering: %s", error.strerror)

    def _receive(self, process: _Process) -> None:
        """Take what a process has to say."""
        try:
            while message := process.connection.recv(REPLY.size):
                (slot,) = REPLY.unpack(message)
                if slot == NO_SLOT:
                    self._ready.append(process)
                    continue
                done, _ = process.pending.pop(slot)
                if not done.done():
                    done.set_result(True)
        except BlockingIOError:
            return
        except OSError as error:
            self._lose(process, error)
        else:
            self._lose(process, None)

    def _lose(self, process: _Process, error: OSError | None) -> None:
        """Do without a process that has ended."""
        if process not in self._processes:
            return
        _logger.warning("a process for ciphering has ended: %s", error or "it closed its socket")
        self._processes.remove(process)
        if process in self._ready:
            self._ready.remove(process)
        asyncio.get_running_loop().remove_reader(process.connection.fileno())
        process.connection.close()
        process.process.kill()
        process.process.wait()
        for done, _ in process.pending.values():
            if not done.done():
                done.set_result(False)
        process.pending.clear()

    async def close(self) -> None:
        """End the processes.  Nothing may be under way."""
        if self._starting is not None:
            await asyncio.wait([self._starting])
        loop = asyncio.get_running_loop()
        processes, self._processes = self._processes, []
        self._ready.clear()
        for process in processes:
            loop.remove_reader(process.connection.fileno())
            process.connection.close()
        for process in processes:
            await loop.run_in_executor(None, _end, process.process)
        if self._memory_descriptor >= 0:
            os.close(self._memory_descriptor)
            self._memory_descriptor = -1


def _begin(memory: int) -> _Process:
    """Start a process.

    :raise OSError: if that can't be.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with contextlib.ExitStack() as undo, theirs:
        undo.enter_context(ours)
        ours.setblocking(False)
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "qmpd.block.cipher_process", str(theirs.fileno()), str(memory)],
            pass_fds=(theirs.fileno(), memory),
            stdin=subprocess.DEVNULL,
        )
        undo.pop_all()
        return _Process(process, ours)


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
