from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import pytest_asyncio
from nbd_served import Served

from qmpd import sockets
from qmpd.errors import Error

BACKLOG = 5


@pytest.fixture
def busy() -> Iterator[int]:
    """A port on which somebody else listens."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        yield other.getsockname()[1]


@pytest_asyncio.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    served = Served(tmp_path)
    yield served
    await served.exports.close()
    await served.graph.close()


async def test_the_next_port_is_tried_as_far_as_it_is_allowed(busy: int) -> None:
    found = await sockets.resolve("127.0.0.1", str(busy))
    for last in (None, busy):
        with pytest.raises(Error, match="^Failed to find an available port: Address already in use$"):
            sockets.listen_on(found, BACKLOG, last_port=last)
    with pytest.raises(Error, match=f"'to' is {busy - 1}, and 'port' {busy}$"):
        sockets.listen_on(found, BACKLOG, last_port=busy - 1)
    last = min(busy + 50, 65535)
    (listener,) = sockets.listen_on(found, BACKLOG, last_port=last)
    with listener:
        assert busy < listener.getsockname()[1] <= last


async def test_several_addresses_get_one_port() -> None:
    found = await sockets.resolve("127.0.0.1", "0") + await sockets.resolve("127.0.0.2", "0")
    first, second = sockets.listen_on(found, BACKLOG)
    with first, second:
        assert [one.getsockname() for one in (first, second)] == [
            ("127.0.0.1", first.getsockname()[1]),
            ("127.0.0.2", first.getsockname()[1]),
        ]


async def test_addresses_that_cannot_be_had_are_left_out() -> None:
    unknown = [(socket.AF_INET, socket.SOCK_STREAM, 0, "", ("192.0.2.1", 0))]
    with pytest.raises(Error, match="^Failed to bind socket: Cannot assign requested address$"):
        sockets.listen_on(unknown, BACKLOG)
    (listener,) = sockets.listen_on(unknown + await sockets.resolve("127.0.0.1", "0"), BACKLOG)
    listener.close()


async def test_a_port_may_have_a_name() -> None:
    with suppress(OSError):
        number = socket.getservbyname("http")
        found = await sockets.resolve("127.0.0.1", "http")
        assert [address[1] for *_, address in found] == [number]
    with pytest.raises(Error, match=r"^address resolution failed for 127\.0\.0\.1:http: "):
        await sockets.resolve("127.0.0.1", "http", numeric=True)


@pytest.mark.parametrize(
    ("text", "number"), [("0", 0), ("007", 7), ("0" * 5000 + "3", 3), (" \t+3", 3), ("-1", -1)]
)
def test_a_descriptor_s_number_is_read_as_c_does(text: str, number: int) -> None:
    assert sockets.descriptor_number(text) == number


@pytest.mark.parametrize("text", ["", "abc", "3x", "3 ", "0x3", "٣"])
def test_what_is_no_descriptor_s_number_is_refused(text: str) -> None:
    with pytest.raises(Error, match=f"^Unable to parse FD number {text}$"):
        sockets.descriptor_number(text)


async def test_a_passed_socket_is_the_server_s_own(served: Served) -> None:
    passed = socket.create_server(("127.0.0.1", 0))
    name, number = passed.getsockname(), passed.detach()
    served.address = {"type": "fd", "str": str(number)}
    await served.start()
    with socket.create_connection(name):
        await served.exports.stop_nbd_server()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(name)


async def test_what_is_passed_and_cannot_listen_is_left_alone(served: Served) -> None:
    one, other = socket.socketpair()
    with one, other, (served.image).open("rb") as file:
        for number, message in (
            (one.fileno(), "Failed to listen on fd socket: Invalid argument"),
            (file.fileno(), f"File descriptor '{file.fileno()}' is not a socket"),
        ):
            served.address = {"type": "fd", "str": str(number)}
            with pytest.raises(Error) as refusal:
                await served.start()
            assert refusal.value.desc == message
            os.fstat(number)


@pytest.mark.parametrize("wanted", [True, False, None])
async def test_silent_clients_are_asked_after_unless_that_is_not_wanted(
    served: Served, wanted: bool | None
) -> None:
    said = [] if wanted is None else [("keep-alive", wanted)]
    served.address = {"type": "inet", "host": "127.0.0.1", "port": "0", **dict(said)}
    await served.start()
    server = served.exports.nbd_server
    assert server is not None
    with socket.create_connection(server.addresses[0]) as client:
        await served.run(lambda: client.recv(1))
        (connection,) = server._connections
        transport = connection._transport
        assert transport is not None
        kept = transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert bool(kept) is (wanted is not False)


async def test_a_nameless_socket_gets_a_name(served: Served) -> None:
    served.address = {"type": "unix", "path": ""}
    await served.start()
    server = served.exports.nbd_server
    assert server is not None
    (path,) = server.addresses
    assert Path(path).is_socket()
    await served.exports.stop_nbd_server()
    assert not Path(path).exists()


async def test_a_path_that_python_cannot_bind_is_refused(served: Served) -> None:
    served.address = {"type": "unix", "path": "x" * 108}
    with pytest.raises(Error, match="^UNIX socket path 'x+' is too long$"):
        await served.start()


async def test_a_server_without_credentials_leaves_nothing_behind(served: Served) -> None:
    def none() -> None:
        raise Error("No TLS credentials with id 'none'")

    with pytest.raises(Error, match="^No TLS credentials"):
        await served.start(credentials=none)
    assert not served.socket.exists()
    assert served.exports.nbd_server is None
    await served.start()
