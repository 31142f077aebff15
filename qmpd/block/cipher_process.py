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

from qmpd.block.cipher_messages import ADD, DESCRIPTION, ENCRYPT, FORGET, NO_SLOT, REPLY, REQUEST, SLOT
from qmpd.crypto.ciphers import CipherSpec
from qmpd.crypto.memory import KeyMemory
from qmpd.crypto.sectors import SectorCipher

#: Bytes that no message exceeds.
_LONGEST: Final = 512
_PR_SET_DUMPABLE: Final = 4


def new_cipher(description: memoryview, key: memoryview, memory: KeyMemory) -> SectorCipher:
    """The cipher that `describe_cipher` was given."""
    words = bytes(description).decode().rstrip(" ").split(" ")
    algorithm, mode, ivgen, ivgen_hash, sector_size, iv_unit = words
    spec = CipherSpec(algorithm, mode, ivgen, ivgen_hash or None)
    return SectorCipher(spec, key, int(sector_size), iv_unit=int(iv_unit), memory=memory)


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
    keys = KeyMemory()
    received = keys.take(_LONGEST)
    message = received.data
    daemon.send(REPLY.pack(NO_SLOT))
    while size := daemon.recv_into(message):
        kind, cipher, slot, sector, length = REQUEST.unpack_from(message)
        if kind == ADD:
            key = REQUEST.size + DESCRIPTION
            ciphers[cipher] = new_cipher(message[REQUEST.size : key], message[key:size], keys)
            received.wipe()
        elif kind == FORGET:
            ciphers.pop(cipher).close()
        else:
            data = memory[slot * SLOT : slot * SLOT + length]
            run = ciphers[cipher].encrypt_into if kind == ENCRYPT else ciphers[cipher].decrypt_into
            run(data, sector, data)
            daemon.send(REPLY.pack(slot))


if __name__ == "__main__":
    main(sys.argv[1:])
