"""A process that ciphers sectors for the daemon; started and used by :mod:`qmpd.block.cipher_pool`.

It has a socket to the daemon, on which each message is one packet, and memory
that both see, cut into slots.  The daemon says which slot to cipher with which
key; it is done in place, and answered by the slot's number.  When the daemon
closes the socket, or dies, the process ends; signals are the daemon's business.
"""

from __future__ import annotations

import ctypes
import mmap
import signal
import socket
import sys
from typing import Final

from qmpd.block.cipher_messages import ADD, ENCRYPT, FORGET, NO_SLOT, REPLY, REQUEST, SLOT
from qmpd.crypto.ciphers import CipherSpec
from qmpd.crypto.sectors import SectorCipher

_LONGEST: Final = 4096
_PR_SET_DUMPABLE: Final = 4


def unpack_cipher(packed: memoryview) -> SectorCipher:
    """The cipher that `pack_cipher` was given."""
    end = bytes(packed).index(b"\n")
    algorithm, mode, ivgen, ivgen_hash, sector_size, iv_unit = bytes(packed[:end]).decode().split(" ")
    spec = CipherSpec(algorithm, mode, ivgen, ivgen_hash or None)
    return SectorCipher(spec, packed[end + 1 :], int(sector_size), iv_unit=int(iv_unit))


def main(arguments: list[str]) -> None:
    """Serve until the daemon is gone.

    :param arguments: the descriptors of socket and memory.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # No core dump, and no debugger of the same user: there are keys in here.
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    daemon = socket.socket(fileno=int(arguments[0]))
    memory = memoryview(mmap.mmap(int(arguments[1]), 0))
    try:
        serve(daemon, memory)
    except (BrokenPipeError, ConnectionResetError):
        pass


def serve(daemon: socket.socket, memory: memoryview) -> None:
    """Do what comes, and return at the end of it.

    :raise OSError: if the daemon is gone.
    """
    ciphers: dict[int, SectorCipher] = {}
    message = memoryview(bytearray(_LONGEST))
    daemon.send(REPLY.pack(NO_SLOT))
    while size := daemon.recv_into(message):
        kind, cipher, slot, sector, length = REQUEST.unpack_from(message)
        if kind == ADD:
            ciphers[cipher] = unpack_cipher(message[REQUEST.size : size])
            message[:size] = bytes(size)
        elif kind == FORGET:
            ciphers.pop(cipher).close()
        else:
            data = memory[slot * SLOT : slot * SLOT + length]
            run = ciphers[cipher].encrypt_into if kind == ENCRYPT else ciphers[cipher].decrypt_into
            run(data, sector, data)
            daemon.send(REPLY.pack(slot))


if __name__ == "__main__":
    main(sys.argv[1:])
