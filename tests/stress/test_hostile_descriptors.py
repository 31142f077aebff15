"""Clients that pass descriptors by the thousand, in every way that there is.

The daemon's table never fills: another client connects, opens a disk and is
answered meanwhile, and what was passed is gone with who passed it.
"""

from __future__ import annotations

import json
import os
import resource
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest
from daemons import CommandError, Connection, RunningDaemon

#: Descriptors that the daemon may have; a quarter of them may be passed ones.
TABLE: Final = 400
KEPT: Final = TABLE // 4
#: What unix(7) allows in one message.
MOST: Final = 253


@pytest.fixture
def image(tmp_path: Path) -> Iterator[int]:
    (tmp_path / "image").write_bytes(bytes(4096))
    descriptor = os.open(tmp_path / "image", os.O_RDWR)
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def small(start_daemon: Callable[..., RunningDaemon]) -> RunningDaemon:
    """A daemon that may have few descriptors."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (TABLE, before[1]))
    try:
        return start_daemon()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def images(daemon: RunningDaemon) -> int:
    """How many descriptors of the image the daemon has."""
    return sum(name.endswith("/image") for name in daemon.open_files())


def assert_serves(daemon: RunningDaemon) -> None:
    """Fail unless another client gets in and can use a disk."""
    with daemon.connect() as client:
        client.execute("blockdev-add", {"driver": "file", "node-name": "n", "filename": "image"})
        client.execute("blockdev-del", {"node-name": "n"})


def test_descriptors_that_nobody_claims_are_one_for_each_client(small: RunningDaemon, image: int) -> None:
    for _ in range(2000):
        socket.send_fds(small.monitor.socket, [b" "], [image] * MOST)
    small.execute("query-version")
    assert images(small) == 1
    assert_serves(small)
    small.monitor.close()
    small.monitor = small.connect()
    small.execute("query-version")
    assert images(small) == 0


def test_many_clients_that_pass_and_never_claim_cost_one_each(small: RunningDaemon, image: int) -> None:
    clients = [small.connect() for _ in range(50)]
    for client in clients:
        for _ in range(20):
            socket.send_fds(client.socket, [b" "], [image] * MOST)
        client.execute("query-version")
    assert images(small) == len(clients)
    for client in clients:
        client.close()
    assert_serves(small)
    while images(small):
        small.execute("query-version")


def test_a_client_that_is_not_read_from_leaves_its_descriptors_in_the_kernel(
    small: RunningDaemon, image: int
) -> None:
    with small.connect() as greedy:
        greedy.socket.setblocking(False)
        command = b'{"execute": "query-qmp-schema"}' * 50
        try:
            while True:
                socket.send_fds(greedy.socket, [command], [image])
        except BlockingIOError:
            pass
        small.execute("query-version")
        assert images(small) <= 1
        assert_serves(small)
    while images(small):
        small.execute("query-version")


@pytest.mark.parametrize("command", ["getfd", "add-fd"])
def test_no_more_than_a_part_of_the_table_can_be_kept(small: RunningDaemon, image: int, command: str) -> None:
    def keep(client: Connection, number: int) -> None:
        arguments = {"fdname": f"x{number}"} if command == "getfd" else {"fdset-id": number}
        client.execute(command, arguments, passing=[image])

    with small.connect() as greedy:
        for number in range(KEPT):
            keep(greedy, number)
        for number in range(KEPT, KEPT + 20):
            with pytest.raises(CommandError, match=f"^{command}: No more than {KEPT} file descriptors"):
                keep(greedy, number)
        assert images(small) == KEPT
        assert_serves(small)
    for number in range(KEPT):
        if command == "getfd":
            small.execute("closefd", {"fdname": f"x{number}"})
        else:
            small.execute("remove-fd", {"fdset-id": number})
    assert images(small) == 0
    keep(small.monitor, 0)


def test_a_socket_that_holds_itself_in_flight_does_no_harm(small: RunningDaemon) -> None:
    """Sockets passed through each other: what the kernel's collector of cycles is for (unix(7))."""
    for _ in range(200):
        one, other = socket.socketpair()
        with one, other, small.connect() as client:
            socket.send_fds(one, [b"x"], [other.fileno(), client.socket.fileno()])
            request = {"execute": "getfd", "arguments": {"fdname": "cycle"}}
            socket.send_fds(client.socket, [json.dumps(request).encode()], [other.fileno()])
            assert client.reply() == {"return": {}}
    small.execute("closefd", {"fdname": "cycle"})
    small.assert_alive()
