"""Addresses to listen on, for whatever is served: monitors and exports.

Refusals are in QEMU's words, because both of its kinds of servers use them.
"""

from __future__ import annotations

import asyncio
import errno
import os
import re
import socket
import stat
from collections.abc import Iterable, Mapping
from typing import Any, Final

from qmpd.errors import Error

#: <sys/un.h>: the size of sun_path.
PATH_SIZE: Final = 108

#: <linux/in.h>; Python knows it from 3.13 on.
_IPPROTO_MPTCP: Final = 262
#: QEMU cuts a port's name off here, which messages show.
_PORT_NAME_MAX: Final = 32
#: What strtol(3) takes for a decimal number: sign and digits.
_NUMBER: Final = re.compile(r"[ \t-\r]*([+-]?)([0-9]+)")
#: More digits than a number that is of any use has, and fewer than Python minds.
_MOST_DIGITS: Final = 20
_UINT32_MAX: Final = (1 << 32) - 1
_INT_MAX: Final = (1 << 31) - 1


def encoded(text: str) -> bytes:
    """A string of a client's, as the C library is to get it.

    A NUL, which would end it there, becomes the two bytes that QEMU's strings have for it.
    """
    return os.fsencode(text).replace(b"\0", b"\xc0\x80")


#: Host and port as people write them; a colon is in a host only between brackets.
_WRITTEN_INET: Final = re.compile(
    r"(?:\[(?P<bracketed>[^\]]{1,64})\]|(?P<host>[^:\[][^:]{0,63})|(?=:)):(?P<port>[^,]{1,32})(?P<options>,.*)?",
    re.DOTALL,
)
_SWITCH: Final[Mapping[str, bool]] = {"": True, "=on": True, "=off": False}


def written_address(text: str) -> dict[str, Any]:
    """A SocketAddress as people write it.

    :param text: ``HOST:PORT`` or ``tcp:HOST:PORT``, perhaps with ``,to=PORT``, ``,ipv4`` or ``,ipv6=off``
        behind; ``unix:PATH``, ``fd:NAME`` or ``vsock:CID:PORT``.
    :raise Error: if it is none of these.
    """
    kind, _, rest = text.partition(":")
    match kind:
        case "unix" if not rest:
            raise Error("invalid Unix socket address")
        case "unix":
            return {"type": "unix", "path": rest}
        case "fd" if not rest:
            raise Error("invalid file descriptor address")
        case "fd":
            return {"type": "fd", "str": rest}
        case "vsock":
            cid, _, port = rest.partition(":")
            if not cid or not port:
                raise Error(f"error parsing address '{rest}'")
            return {"type": "vsock", "cid": cid, "port": port}
    text = text.removeprefix("tcp:")
    found = _WRITTEN_INET.fullmatch(text)
    if found is None:
        what = "port in address" if text[:1] == ":" else "IPv6 address" if text[:1] == "[" else "address"
        raise Error(f"error parsing {what} '{text}'")
    address = {"type": "inet", "host": found["bracketed"] or found["host"] or "", "port": found["port"]}
    for option in (found["options"] or "").split(",")[1:]:
        address |= _written_option(option)
    return address


def _written_option(option: str) -> dict[str, Any]:
    """What stands behind a written port."""
    name, value = option[:4], option[4:]
    if name in ("ipv4", "ipv6"):
        if value not in _SWITCH:
            raise Error(f"error parsing '{name}' flag '{value}'")
        return {name: _SWITCH[value]}
    if option.startswith("to="):
        if not re.fullmatch("[0-9]{1,5}", option[3:]):
            raise Error("error parsing to= argument")
        return {"to": int(option[3:])}
    raise Error(f"'{option}' behind the port is none of to=PORT, ipv4 and ipv6")


# -- TCP

#: Which family is meant by `ipv4` and `ipv6`: each wanted, unwanted or not mentioned.
_FAMILIES: Final[Mapping[tuple[bool | None, bool | None], socket.AddressFamily]] = {
    (True, None): socket.AF_INET,
    (True, False): socket.AF_INET,
    (None, False): socket.AF_INET,
    (None, True): socket.AF_INET6,
    (False, True): socket.AF_INET6,
    (False, None): socket.AF_INET6,
}


async def resolve(
    host: str,
    port: str,
    *,
    passive: bool = True,
    numeric: bool = False,
    ipv4: bool | None = None,
    ipv6: bool | None = None,
) -> list[tuple[Any, ...]]:
    """Look a TCP address up.

    :param host: a name or an address; empty for every address of this machine.
    :param port: a number or the name of a service.
    :param passive: it is to listen on, not to connect to.
    :param numeric: `host` has to be an address, and `port` a number.
    :param ipv4: whether to use IPv4; None if nothing was said about it.
    :return: as `socket.getaddrinfo` does.
    :raise Error: if there is no such address.
    """
    if ipv4 is False and ipv6 is False:
        raise Error("Cannot disable IPv4 and IPv6 at same time")
    port = port[:_PORT_NAME_MAX]
    flags = socket.AI_PASSIVE if passive else 0
    if numeric:
        flags |= socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
    family = _FAMILIES.get((ipv4, ipv6), socket.AF_UNSPEC)
    try:
        # Not the loop's: asyncio's takes numbers for ports that the C library would refuse.
        return await asyncio.to_thread(
            socket.getaddrinfo, encoded(host) or None, encoded(port), family, socket.SOCK_STREAM, 0, flags
        )
    except socket.gaierror as error:
        raise Error(f"address resolution failed for {host}:{port}: {error.args[1]}") from None


def listen_on(
    found: Iterable[tuple[Any, ...]], backlog: int, *, last_port: int | None = None, mptcp: bool = False
) -> list[socket.socket]:
    """Listen on every address that a name has, on the same port if it can be had.

    :param found: what `resolve` found; with port 0 the first address gets any
        that is free, and the others the same.
    :param backlog: connections that the kernel keeps until they are accepted.
    :param last_port: the last one to try when those before are in use.
    :param mptcp: let clients use several paths through the network.
    :return: the sockets, not blocking; addresses that can't be had are left out.
    :raise Error: the last failure, if none can be had.
    """
    listeners: list[socket.socket] = []
    failure: Error | None = None
    for family, _, _, _, address in found:
        first = listeners[0].getsockname()[1] if listeners else address[1]
        last = first if last_port is None else last_port
        if last < address[1]:
            failure = Error(f"Failed to find an available port: 'to' is {last}, and 'port' {address[1]}")
            continue
        for port in range(first, last + 1):
            try:
                where = (address[0], port, *address[2:])
                listeners.append(_listen(family, where, backlog, mptcp=mptcp))
            except OSError as error:
                failure = Error(f"Failed to find an available port: {error.strerror}")
                if error.errno == errno.EADDRINUSE:
                    continue
                failure = Error(f"Failed to bind socket: {error.strerror}")
            except Error as error:
                failure = error
            break
    if not listeners:
        assert failure is not None, "a name that is found has an address"
        raise failure
    return listeners


def _listen(family: int, address: tuple[Any, ...], backlog: int, *, mptcp: bool) -> socket.socket:
    try:
        listener = socket.socket(family, socket.SOCK_STREAM, _IPPROTO_MPTCP if mptcp else 0)
    except OSError as error:
        raise Error(f"Failed to create a socket: {error.strerror}") from None
    try:
        listener.setblocking(False)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(address)
        listener.listen(backlog)
    except BaseException:
        listener.close()
        raise
    return listener


# -- UNIX


def make_room(path: str | bytes) -> None:
    """Remove what stands where a socket is to be made.

    QEMU removes any file.  Here it has to be a socket or empty (as mktemp(1) makes it), so that a
    slip of the pen costs nobody a disk image.

    :raise Error: if it can't be removed, or has contents.
    """
    shown = os.fsdecode(path)
    try:
        there = os.lstat(path)
        if stat.S_ISREG(there.st_mode) and there.st_size:
            raise Error(f"Failed to bind socket to {shown}: there is a file that is not empty")
        os.unlink(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise Error(f"Failed to unlink socket {shown}: {error.strerror}") from None


# -- numbers


def decimal(text: str) -> int | None:
    """The decimal number that a text is; None if it is none.

    One of more than 64 bits may be any other such number.
    """
    found = _NUMBER.fullmatch(text)
    if found is None:
        return None
    digits = found[2].lstrip("0") or "0"
    return int(found[1] + (digits if len(digits) <= _MOST_DIGITS else "9" * _MOST_DIGITS))


def descriptor_number(text: str) -> int:
    """The file descriptor that somebody means.

    :raise Error: if it is no number, or no descriptor can have it.
    """
    number = decimal(text)
    if number is None:
        raise Error(f"Unable to parse FD number {text}")
    if abs(number) > _INT_MAX:
        raise Error(f"Unable to parse FD number {text}: Numerical result out of range")
    return number


def vsock_address(cid: str, port: str) -> tuple[int, int]:
    """The address of a vsock socket from a client's strings.

    :raise Error: if one of them is no number of 32 bits.
    """
    values = []
    for what, text in (("cid", cid), ("port", port)):
        number = decimal(text)
        if number is None or not 0 <= number <= _UINT32_MAX:
            raise Error(f"Failed to parse {what} '{text}'")
        values.append(number)
    return values[0], values[1]
