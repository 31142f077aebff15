"""Listening on TCP, for whatever is served: monitors and exports."""

from __future__ import annotations

import socket
from collections.abc import Iterable
from typing import Any


def listen_on(found: Iterable[tuple[Any, ...]], backlog: int) -> list[socket.socket]:
    """Listen on every address that a name has, on the same port.

    :param found: what `getaddrinfo` found; with port 0 the first address gets any
        that is free, and the others the same.
    :param backlog: connections that the kernel keeps until they are accepted.
    :return: the sockets, not blocking; addresses that can't be had are left out.
    :raise OSError: the last failure, if none can be had.
    """
    listeners: list[socket.socket] = []
    failure: OSError | None = None
    for family, _, _, _, address in found:
        port = listeners[0].getsockname()[1] if listeners else address[1]
        listener = socket.socket(family)
        listener.setblocking(False)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind((address[0], port, *address[2:]))
            listener.listen(backlog)
        except OSError as error:
            listener.close()
            failure = error
            continue
        listeners.append(listener)
    if not listeners:
        assert failure is not None
        raise failure
    return listeners
